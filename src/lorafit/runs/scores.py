"""What a comparison says, as part of the summary of a run or of an evaluation."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Sequence, Set
from dataclasses import asdict
from typing import Any

from lorafit.data.examples import Example
from lorafit.digests import canonical
from lorafit.evaluation.answers import is_equal
from lorafit.evaluation.compare import Comparison
from lorafit.evaluation.scores import AnswerScore
from lorafit.evaluation.statistics import wilson


def scores_json(comparison: Comparison) -> dict[str, Any]:
    """The part of a summary that says how good: the same keys for a run and for an evaluation alone."""
    base, few, adapter = comparison.base, comparison.base_few_shot, comparison.adapter
    nll = asdict(comparison.nll)
    nll.pop("n")
    return {
        "n_test": comparison.nll.n,
        "nll": nll,
        **({"nll_of_reasoning": asdict(comparison.reasoning)} if comparison.reasoning else {}),
        "facts": {
            "base": base.accuracy,
            "base_few_shot": few.accuracy if few else None,
            "adapter": adapter.accuracy,
            "shuffled_control": None,
            "ci95": _interval(adapter),
            "ci95_base": _interval(base),
            "ci95_base_few_shot": _interval(few) if few else None,
            "n": adapter.n,
            "few_shot_examples": comparison.shots,
        },
        "off_desk_declined": adapter.declined / adapter.off_desk_n if adapter.off_desk_n else None,
        "natural_stops": adapter.natural_stops / len(adapter.answers) if adapter.answers else None,
        "counts": asdict(comparison.counts) | {"tells": comparison.counts.tells} if comparison.counts else None,
        "samples": [asdict(sample) for sample in comparison.samples],
    }


def _interval(score: AnswerScore) -> list[float] | None:
    """Of the share of right answers; a group counts as one piece of evidence."""
    return list(wilson(score.right * score.groups / score.n, score.groups)) if score.n else None


def was_scored(example: Example, fingerprints: Set[str]) -> bool:
    """Whether the fingerprint of an example is among these."""
    return bool(fingerprints & {example_digest(example), example_digest(example, repr)})


def example_digest(example: Example, written: Callable[[object], str] = canonical) -> str:
    """Fingerprint of all that was said in an example: system prompt, earlier turns, question, answer, tools. written:
    how tools and calls are; runs of before wrote them as Python prints them."""
    said: list[object] = [(one.role, one.content, *filter(None, [one.reasoning])) for one in example.messages]
    said += [written(part) for part in example.with_tools]
    return hashlib.sha256(json.dumps(said).encode()).hexdigest()[:16]


def answer_lines(examples: Sequence[Example], comparison: Comparison) -> str:
    """Every test example as a JSON line: fingerprint, question, reference, NLL; where it was answered, its answers and
    whether they equal the reference and are right, where anything says what is."""
    scores = {"base": comparison.base, "base_few_shot": comparison.base_few_shot, "adapter": comparison.adapter}
    place_of = {i: place for place, i in enumerate(comparison.asked)}
    lines = []
    for i, example in enumerate(examples):
        place = place_of.get(i)
        said = {who: None if place is None or score is None else score.answers[place] for who, score in scores.items()}
        one: dict[str, Any] = {
            "example": example_digest(example),
            "question": example.messages[-2].text if len(example.messages) > 1 else "",
            "reference": example.answer,
            "group": example.group,
            "nll": dict(zip(("base", "adapter"), comparison.nll_of_each[i], strict=True)),
            **said,
        }
        told = {who: text for who, text in said.items() if text is not None}
        right = {who: score.correct[place] for who, score in scores.items() if place is not None and score}
        if told:  # calls are equal where they are right: by name and arguments, however they are spelt
            one["equal"] = (
                right if example.calls else {who: is_equal(text, example.answer) for who, text in told.items()}
            )
        if example.is_scored:
            one["right"] = right
        lines.append(json.dumps(one, ensure_ascii=False) + "\n")
    return "".join(lines)
