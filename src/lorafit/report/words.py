"""Numbers in words, the same in the terminal, the card and the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lorafit.evaluation.classifier import NOT_INSTALLED

SURE = 0.05  # probability below which chance is no longer held for the reason
MORE, FEWER, NOT_SHOWN = "more", "fewer", "not shown"
SIMPLE = "(TF-IDF with logistic regression)"
ASIDE = "whatever the case and the white space; JSON and calls by their content"  # how answers equal a reference


def same_as_peft(found: Mapping[str, float]) -> bool:
    """Law 5: within 1e-4 in fp32, or within a hundred-thousandth of what the adapter moves where that is more."""
    return found["max_logit_difference"] <= max(1e-4, 1e-5 * found["adapter_effect"])


def doubt(summary: Mapping[str, Any]) -> str | None:
    """Why nobody should use the adapter of a run, whatever its scores; None where nothing speaks against it."""
    if not summary.get("base_unchanged", True):
        return "the base in memory is not what it was when it was opened"
    if (peft := summary.get("peft")) and not same_as_peft(peft):
        return "PEFT computes something else with it than lorafit"
    return None


def headline(summary: Mapping[str, Any]) -> str:
    """What a run or an evaluation has shown, in the one sentence that terminal, page and card say."""
    if why := doubt(summary):
        return f"Do not use this adapter: {why}"
    nll = summary["nll"]["ci95"]
    other = "the other adapter" if summary.get("against") else "its base"
    few = of_checked(summary)
    questions, of_them = (f"of {few}", f"of {few}") if few else ("questions", "of them")
    if nll is None:
        return "Too few test examples to tell whether the adapter helps"
    says, base, constant = verdict(nll), against(summary, "base"), against(summary, "most_frequent")
    if base == FEWER:
        return f"The adapter is worse than {other}: it answers fewer {questions} right" + (
            ", though it predicts the answers better" if says == "better" else ""
        )
    if says == "worse":
        return f"The adapter is worse than {other} at predicting the answers" + (
            f", though it answers more {of_them} right" if base == MORE else ""
        )
    if constant in (FEWER, NOT_SHOWN):
        share = summary["counts"]["right"]["most_frequent"]["share"]
        does = "does worse than" if constant == FEWER else "is not shown to do better than"
        though = f"answers more {questions} right" if base == MORE else "predicts the answers better"
        return (
            f"The adapter {does} always giving the same answer, which is right in {percent(share)}"
            + (f" of {few}" if few else "")
            + (f", though it {though} than {other}" if base == MORE or says == "better" else "")
        )
    if base == MORE:
        but = []
        if against(summary, "base_few_shot") in (FEWER, NOT_SHOWN):
            but.append("is not shown to answer more than the base with examples in its prompt")
        if against(summary, "classifier") == FEWER:
            but.append(f"a simple classifier {SIMPLE} answers more")
        more = f"The adapter answers more {questions} right than {other}"
        return more + (", but " + ", and ".join(but) if but else "")
    if says == "better":
        return f"The adapter predicts the answers better than {other}" + (
            f", but is not shown to answer more {of_them} right" if base else ""
        )
    if tuple(nll) == (0, 0):
        return f"The adapter is the same as {other}: it changes nothing"
    return (
        f"The adapter is not shown to answer more {questions} right than {other}"
        if base
        else f"No difference between the adapter and {other} has been shown"
    )


def of_checked(summary: Mapping[str, Any]) -> str | None:
    """Which questions the verdict rests on, where further ones have no check and do not count; None where all do."""
    counts = summary.get("counts") or {}
    n = counts.get("checked")
    return f"the {n} question{'s' * (n != 1)} with a check" if counts.get("unchecked") else None


def against(summary: Mapping[str, Any], who: str) -> str | None:
    """Whether the adapter answers MORE questions right than another, FEWER, or neither is shown; None where answers say
    nothing of it. who: base, base_few_shot, most_frequent or classifier."""
    if counts := summary.get("counts"):
        paired = counts["against"].get(who)
        if paired is None:
            return None
        if paired["p"] <= SURE:
            return MORE if paired["more"] > paired["fewer"] else FEWER
        # Where the answers show that the adapter beats the base, they are also held against everybody else.
        tells = counts["tells"] or (who != "base" and against(summary, "base") == MORE)
        return NOT_SHOWN if tells else None
    facts = summary["facts"]  # a run from before answers were counted in pairs
    right, ends = facts["ci95"], facts.get({"base": "ci95_base", "base_few_shot": "ci95_base_few_shot"}.get(who))
    if right is None or ends is None:
        return None
    return MORE if right[0] > ends[1] else FEWER if right[1] < ends[0] else NOT_SHOWN


def no_classifier(counts: Mapping[str, Any]) -> str | None:
    """Why there is no simple classifier where one would be of use."""
    why = counts["classifier_missing"]
    if why == NOT_INSTALLED:
        return "pip install scikit-learn, and a simple classifier is compared with the adapter too"
    return f"no simple classifier is compared with the adapter: {why}" if why else None


@dataclass(frozen=True)
class Line:
    """Scores of one that answers: its name in full and as a key; NLL; shares of right answers, by check and by equality
    with the reference, each (share, its 95 % interval or None). None for what was not measured."""

    name: str
    key: str
    nll: float | None
    right: tuple[float, Sequence[float] | None] | None
    equal: tuple[float, Sequence[float] | None] | None


def lines(summary: Mapping[str, Any]) -> list[Line]:
    """The table of scores, one line for each that answers."""
    nll, facts, counts = summary["nll"], summary["facts"], summary.get("counts")
    few = f"base, {facts['few_shot_examples']} examples in its prompt"
    learnt, of = (counts or {}).get("classifier_learnt") or (0, 0)
    simple = f"simple classifier, {learnt:,} of {of:,} examples" if learnt < of else "simple classifier"
    names = {
        "base": "other adapter" if summary.get("against") else "base",
        "base_few_shot": few,
        "most_frequent": "always the same answer",
        "classifier": simple,
        "adapter": "adapter",
        "shuffled_control": "control: trained on shuffled answers",
    }
    ends = {"base": "ci95_base", "base_few_shot": "ci95_base_few_shot", "adapter": "ci95"}
    found = []
    for key, name in names.items():
        right = equal = None
        if counts and key in counts["right"]:
            right, equal = ((one["share"], one["ci95"]) for one in (counts["right"][key], counts["equal"][key]))
            right = right if counts["by"] == "check" else None
        elif facts.get(key) is not None:
            right = facts[key], facts.get(ends.get(key))
        if key in ("base", "adapter") or right or equal:
            found.append(Line(name, key, nll.get(key), right, equal))
    return found


def share(summary: Mapping[str, Any]) -> tuple[float, Sequence[float] | None] | None:
    """Share of right answers with its 95 % interval; None where nobody can say which are right."""
    counts = summary.get("counts")
    if counts and not counts["tells"]:
        return None
    adapter = next(line for line in lines(summary) if line.key == "adapter")
    return adapter.right or adapter.equal


def of_a_hundred(summary: Mapping[str, Any]) -> str | None:
    """How many of a hundred who ask get the right answer; None where nobody can say."""
    found = share(summary)
    if found is None:
        return None
    right, ends = found
    sure = f", {100 * ends[0]:.0f} to {100 * ends[1]:.0f} with 95 % certainty" if ends else ""
    counts = summary.get("counts") or {}
    measure = "the answer passes its check" if counts.get("by", "check") == "check" else "the answer is the reference"
    if 0 < counts.get("checked", 0) < counts.get("n", 0):
        measure += ", or is the reference where there is no check"
    few = of_checked(summary)
    questions = f"like {few}" if few else "questions like these"
    return f"of 100 {questions} about {100 * right:.0f} are answered right{sure} (right: {measure})"


def interval(ci95: Sequence[float] | None) -> str:
    """An interval in words; None is one that too few examples allow."""
    if ci95 is None:
        return "too few examples for an interval"
    return f"95 % interval {ci95[0]:+.3f} to {ci95[1]:+.3f}"


def verdict(ci95: Sequence[float] | None) -> str:
    """What an interval of NLL differences, adapter − base, allows to say."""
    if ci95 is None:
        return "too few examples to tell"
    low, high = ci95
    if low == high == 0:
        return "the same: it changes nothing"
    return "better" if high < 0 else "worse" if low > 0 else "not shown to differ"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def clock(seconds: float) -> str:
    """Minutes and seconds; a question mark before the first measurement."""
    return "?" if math.isnan(seconds) else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
