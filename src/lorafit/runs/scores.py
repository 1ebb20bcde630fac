"""Converts a comparison into the scores of a summary, and into the lines of answers.jsonl."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

from lorafit.data.equality import is_equal
from lorafit.data.examples import Example
from lorafit.evaluation.compare import Comparison
from lorafit.evaluation.scores import AnswerScore
from lorafit.evaluation.statistics import wilson
from lorafit.runs.summary import Facts
from lorafit.runs.tested import record_of


def scores_of(comparison: Comparison) -> dict[str, Any]:
    """The fields of a `Summary` that come from a comparison."""
    base, few, adapter = comparison.base, comparison.base_few_shot, comparison.adapter
    writes = bool(adapter.answers) and not comparison.classes and not comparison.measures
    return {
        "n_test": comparison.nll.n,
        "nll": comparison.nll,
        "nll_of_reasoning": comparison.reasoning,
        "facts": Facts(
            base=base.accuracy,
            base_few_shot=few.accuracy if few else None,
            adapter=adapter.accuracy,
            shuffled_control=None,
            ci95=_interval(adapter),
            ci95_base=_interval(base),
            ci95_base_few_shot=_interval(few) if few else None,
            n=adapter.n,
            few_shot_examples=comparison.shots,
        ),
        "off_desk_declined": adapter.declined / adapter.off_desk_n if adapter.off_desk_n else None,
        "natural_stops": adapter.natural_stops / len(adapter.answers) if writes else None,
        "classes": comparison.classes,
        "measures": comparison.measures,
        "counts": comparison.counts,
        "samples": comparison.samples,
    }


def _interval(score: AnswerScore) -> tuple[float, float] | None:
    """The interval of the share of right answers; a group counts as one example."""
    return wilson(score.right * score.groups / score.n, score.groups) if score.n else None


def answer_lines(examples: Sequence[Example], comparison: Comparison) -> str:
    """Every test example as a JSON line: fingerprint, question, reference and NLL; if it was answered, also its
    answers, whether they equal the reference, and, if they can be scored, whether they are right."""
    scores = {"base": comparison.base, "base_few_shot": comparison.base_few_shot, "adapter": comparison.adapter}
    place_of = {i: place for place, i in enumerate(comparison.asked)}
    lines = []
    for i, example in enumerate(examples):
        place = place_of.get(i)
        answers = {
            who: None if place is None or score is None else score.answers[place] for who, score in scores.items()
        }
        line: dict[str, Any] = {
            **record_of(example),
            "nll": dict(zip(("base", "adapter"), comparison.nll_of_each[i], strict=True)),
            **answers,
        }
        texts = {who: text for who, text in answers.items() if text is not None}
        right = {who: score.correct[place] for who, score in scores.items() if place is not None and score}
        if texts and (comparison.counts or not comparison.measures):
            # Calls are equal if they are right: by name and arguments, not by their spelling.
            line["equal"] = (
                right if example.calls else {who: is_equal(text, example.answer) for who, text in texts.items()}
            )
        if example.is_scored:
            line["right"] = right
        lines.append(json.dumps(line, ensure_ascii=False) + "\n")
    return "".join(lines)
