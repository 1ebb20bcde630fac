"""Puts scores into words, with the same words in the terminal, the card and the report."""

from __future__ import annotations

import math
import shlex
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorafit.evaluation.classifier import NOT_INSTALLED
from lorafit.evaluation.scores import ClassScores, Counts, Measure, Paired
from lorafit.heads import HEADS
from lorafit.heads.head import Terms
from lorafit.runs.summary import PeftCheck, RunSummary, Summary

SURE = 0.05  # the level of significance
MORE, FEWER, NOT_SHOWN = "more", "fewer", "not shown"
SIMPLE = "(TF-IDF with logistic regression)"
ASIDE = "ignoring case and white space; JSON and calls by their content"  # how answers equal a reference


def terms(summary: Summary) -> Terms:
    """The words for a summary, by its task and what the adapter is compared with."""
    found = HEADS[summary.task].terms(summary.classes)
    return replace(found, rival="the other adapter", base="other adapter", reads=True) if summary.rival else found


def writes(summary: Summary) -> bool:
    """Whether the adapter writes text."""
    return HEADS[summary.task].opening is None


def same_as_peft(found: PeftCheck) -> bool:
    """Law 5: PEFT's logits are within 1e-4 of ours in fp32, or within 1e-5 of the adapter's effect if that is more."""
    return found.max_logit_difference <= max(1e-4, 1e-5 * found.adapter_effect)


def doubt(summary: Summary) -> str | None:
    """The reason why nobody should use the adapter, whatever its scores; None if there is none."""
    if not summary.base_unchanged:
        return "the base in memory is not what it was when it was opened"
    if isinstance(summary, RunSummary) and summary.peft and not same_as_peft(summary.peft):
        return "PEFT computes something else with it than lorafit"
    return None


def headline(summary: Summary) -> str:
    """The verdict of a run or an evaluation in one sentence, the same in terminal, page and card."""
    if why := doubt(summary):
        return f"Do not use this adapter: {why}"
    nll = summary.nll.ci95
    said = terms(summary)
    other, answers = said.rival, f"{said.answer}s"  # a verb
    few = of_checked(summary)
    questions, of_them = (f"of {few}", f"of {few}") if few else (f"{said.asked}s", "of them")
    if nll is None:
        return "Too few test examples to tell whether the adapter helps"
    says, base, constant = verdict(nll), against(summary, "base"), against(summary, "most_frequent")
    if base == FEWER:
        return f"The adapter is worse than {other}: it {answers} fewer {questions} right" + (
            f", though it predicts the {answers} better" if says == "better" else ""
        )
    if says == "worse":
        return f"The adapter is worse than {other} at predicting the {answers}" + (
            f", though it {answers} more {of_them} right" if base == MORE else ""
        )
    if constant in (FEWER, NOT_SHOWN):
        assert summary.counts is not None
        share = summary.counts.right["most_frequent"].share
        does = "does worse than" if constant == FEWER else "is not shown to do better than"
        though = f"{answers} more {questions} right" if base == MORE else f"predicts the {answers} better"
        return (
            f"The adapter {does} always giving the same {said.answer}, which is right in {percent(share)}"
            + (f" of {few}" if few else "")
            + (f", though it {though} than {other}" if base == MORE or says == "better" else "")
        )
    if base == MORE:
        but = []
        if against(summary, "base_few_shot") in (FEWER, NOT_SHOWN):
            but.append("is not shown to answer more than the base with examples in its prompt")
        if against(summary, "classifier") == FEWER:
            but.append(f"a simple classifier {SIMPLE} {answers} more")
        more = f"The adapter {answers} more {questions} right than {other}"
        return more + (", but " + ", and ".join(but) if but else "")
    if says == "better":
        return f"The adapter predicts the {answers} better than {other}" + (
            f", but is not shown to {said.answer} more {of_them} right" if base else ""
        )
    if tuple(nll) == (0, 0):
        return f"The adapter is the same as {other}: it changes nothing"
    return (
        f"The adapter is not shown to {said.answer} more {questions} right than {other}"
        if base
        else f"No difference between the adapter and {other} has been shown"
    )


def of_checked(summary: Summary) -> str | None:
    """The questions on which the verdict is based; None if all count, because none is without a check."""
    counts = summary.counts
    if not counts or not counts.unchecked:
        return None
    return f"the {counts.checked} question{'s' * (counts.checked != 1)} with a check"


def against(summary: Summary, who: str) -> str | None:
    """Whether it is shown that the adapter answers MORE or FEWER questions right than another, or neither; None if the
    answers cannot be compared. who: base, base_few_shot, most_frequent or classifier."""
    if counts := summary.counts:
        paired = counts.against.get(who)
        if paired is None:
            return None
        if (found := shown(paired)) != NOT_SHOWN:
            return found
        # If the answers show that the adapter beats the base, they also decide against all others.
        tells = counts.tells or (who != "base" and against(summary, "base") == MORE)
        return NOT_SHOWN if tells else None
    facts = summary.facts  # the run of an earlier version, which did not count answers in pairs
    right, ends = facts.ci95, {"base": facts.ci95_base, "base_few_shot": facts.ci95_base_few_shot}.get(who)
    if right is None or ends is None:
        return None
    return MORE if right[0] > ends[1] else FEWER if right[1] < ends[0] else NOT_SHOWN


def shown(paired: Paired) -> str:
    """Whether it is shown that MORE or FEWER questions were answered right than by another, or neither."""
    return NOT_SHOWN if paired.p > SURE else MORE if paired.more > paired.fewer else FEWER


def no_classifier(counts: Counts) -> str | None:
    """The reason why there is no simple classifier although one would be useful; None if there is none."""
    why = counts.classifier_missing
    if why == NOT_INSTALLED:
        return "pip install scikit-learn, and the adapter is also compared with a simple classifier"
    return f"no simple classifier is compared with the adapter: {why}" if why else None


Shared = tuple[float, tuple[float, float] | None]
"""A share, and its 95 % interval."""


@dataclass(frozen=True)
class Line:
    """The scores of one model: its name and key, its NLL, and its shares of right answers by check and by equality with
    the reference, each as (share, 95 % interval or None). None for what was not measured."""

    name: str
    key: str
    nll: float | None
    right: Shared | None
    equal: Shared | None


def lines(summary: Summary) -> list[Line]:
    """The table of scores, with one line for each model."""
    nll, facts, counts, said = summary.nll, summary.facts, summary.counts, terms(summary)
    few = f"base, {facts.few_shot_examples} examples in its prompt"
    learnt, of = (counts and counts.classifier_learnt) or (0, 0)
    simple = f"simple classifier, {learnt:,} of {of:,} examples" if learnt < of else "simple classifier"
    names = {
        "base": said.base,
        "base_few_shot": few,
        "most_frequent": f"always the same {said.answer}",
        "classifier": simple,
        "adapter": "adapter",
        "shuffled_control": "control: trained on shuffled answers",
    }
    checked = {
        "base": (facts.base, facts.ci95_base),
        "base_few_shot": (facts.base_few_shot, facts.ci95_base_few_shot),
        "adapter": (facts.adapter, facts.ci95),
        "shuffled_control": (facts.shuffled_control, None),
    }
    measured = {"base": nll.base, "adapter": nll.adapter}
    found = []
    for key, name in names.items():
        right: Shared | None = None
        equal: Shared | None = None
        share, ends = checked.get(key, (None, None))
        if counts and key in counts.right:
            same = counts.equal[key]
            equal = (same.share, same.ci95) if writes(summary) else None  # for a label, equal and right are the same
            right = (counts.right[key].share, counts.right[key].ci95) if counts.by == "check" else None
        elif share is not None:
            right = share, ends
        if key in measured or right or equal:
            found.append(Line(name, key, measured.get(key), right, equal))
    return found


def table(summary: Summary) -> list[tuple[str, list[str]]]:
    """The rows of the table: the name of a score, and a cell for each of `lines`."""
    scores, said, counts, thought = lines(summary), terms(summary), summary.counts, summary.nll_of_reasoning
    asked = counts.n if counts else summary.facts.n
    reasoned = {"base": thought.base, "adapter": thought.adapter} if thought else {}

    def cells(shares: Sequence[Shared | None]) -> list[str]:
        return [percent(one[0]) if one else "" for one in shares]

    def of_adapter(text: str) -> list[str]:
        return [text if line.key == "adapter" else "" for line in scores]

    rows = [
        (said.nll, ["" if line.nll is None else f"{line.nll:.3f}" for line in scores]),
        (
            "NLL of the reasoning before them",
            [f"{reasoned[one.key]:.3f}" if one.key in reasoned else "" for one in scores],
        ),
        (f"{said.right} (of {asked})", cells([line.right for line in scores])),
        (f"equal to the reference (of {asked})", cells([line.equal for line in scores])),
    ]
    if summary.classes:
        rows += [(name, of_adapter(text)) for name, text in of_classes(summary.classes)]
    for one in summary.measures.scores if summary.measures else ():
        rows.append((one.name, [of_measure(one, line.key) for line in scores]))
    for what, of_all in (
        ("off-topic declined", summary.off_desk_declined),
        ("answers that end by themselves", summary.natural_stops),
    ):
        rows += [(what, of_adapter(percent(of_all)))] if of_all is not None else []
    return [(what, row) for what, row in rows if any(row)]


def answered(summary: Summary | None, answer: Mapping[str, Any], good: Mapping[str, Any]) -> dict[str, Any]:
    """An answer as it is shown. good: whether each model's answer is right, by name."""
    return {**answer, "good": good, **({} if summary is None or terms(summary).reads else {"base": None})}


def of_classes(classes: ClassScores) -> list[tuple[str, str]]:
    """The scores that only classifiers have: their name and their value as text."""
    return [("macro-F1", f"{classes.macro_f1:.3f}"), ("calibration error", f"{classes.calibration_error:.3f}")]


def of_measure(one: Measure, key: str) -> str:
    """A score as text, for the row or column of a model; "" for a model that it was not measured for.

    Args:
        one: The score.
        key: The key of the model, as in `Line`.
    """

    def number(value: float) -> str:
        return percent(value) if one.percent else f"{value:.3f}"

    if key == "adapter":
        ends = f" ({number(one.ci95[0])} to {number(one.ci95[1])})" if one.ci95 else ""
        return "-" if one.adapter is None else number(one.adapter) + ends
    return "" if key != "base" else "-" if one.base is None else number(one.base)


def uses(summary: Summary, folder: Path, columns: Sequence[str] = ()) -> list[str]:
    """The commands, without `lorafit`, that use and test a run. columns: those of the table it was trained on."""
    flags = [f" --columns {shlex.quote(column)}" for column in columns]
    of_texts = [flag for flag, column in zip(flags, columns, strict=True) if column.startswith("text=")]
    named, texts = "".join(flags), "".join(of_texts)
    run, asked = shlex.quote(str(folder)), f"{terms(summary).asked.upper()}S.jsonl"
    return [
        *([f"classify {run} TEXTS.csv{texts}    # labels for new texts"] if summary.classes else []),
        *([f"chat {run}"] if writes(summary) else []),
        f"show {run} --why",
        f"eval {run} {asked}{named}    # with questions it was not trained on",
    ]


def share(summary: Summary) -> Shared | None:
    """The share of right answers with its 95 % interval; None if answers cannot be scored."""
    if summary.counts and not summary.counts.tells:
        return None
    adapter = next(line for line in lines(summary) if line.key == "adapter")
    return adapter.right or adapter.equal


def of_a_hundred(summary: Summary) -> str | None:
    """A sentence that says how many of a hundred questions get the right answer; None if that is not known."""
    found = share(summary)
    if found is None:
        return None
    (right, ends), said = found, terms(summary)
    sure = f", {100 * ends[0]:.0f} to {100 * ends[1]:.0f} in the 95 % interval" if ends else ""
    counts = summary.counts
    measure = "the answer passes its check" if not counts or counts.by == "check" else "the answer is the reference"
    if counts and 0 < counts.checked < counts.n:
        measure += ", or is the reference where there is no check"
    few = of_checked(summary)
    questions = f"like {few}" if few else f"{said.asked}s like these"
    told = f" (right: {measure})" if writes(summary) else ""
    return f"of 100 {questions} about {100 * right:.0f} {said.fine}{sure}{told}"


def interval(ci95: Sequence[float] | None) -> str:
    """An interval in words. ci95: None if there are too few examples for an interval."""
    if ci95 is None:
        return "too few examples for an interval"
    return f"95 % interval {ci95[0]:+.3f} to {ci95[1]:+.3f}"


def verdict(ci95: Sequence[float] | None) -> str:
    """The conclusion from an interval of NLL differences, adapter − base."""
    if ci95 is None:
        return "too few examples to tell"
    low, high = ci95
    if low == high == 0:
        return "the same: it changes nothing"
    return "better" if high < 0 else "worse" if low > 0 else "not shown to differ"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def clock(seconds: float) -> str:
    """Seconds as minutes and seconds; a question mark if they are not known yet."""
    return "?" if math.isnan(seconds) else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
