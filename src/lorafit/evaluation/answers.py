"""Answers checked against what their examples ask of them, or held against their references; calls of tools against the
calls they should be."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import replace
from typing import TYPE_CHECKING

import numpy as np
import regex

from lorafit.data.equality import compared, json_of, label_of, last_number
from lorafit.data.examples import Check, Example, Message
from lorafit.evaluation.scores import AnswerScore
from lorafit.evaluation.statistics import groups_of

if TYPE_CHECKING:  # torch and transformers are behind them
    from lorafit.data.render import Renderer
    from lorafit.generation.greedy import Answer

SECONDS = 2.0  # a pattern may take over one answer


def occurs(phrase: str, text: str) -> bool:
    """Whether the phrase occurs, whatever the case and the white space, from word boundary to word boundary.

    The point in 2.5 is no boundary: "5 years" does not occur in "2.5 years".
    """
    inner = r"\s+".join(re.escape(word) for word in phrase.split())
    before = r"(?<!\w)(?<!\d[.,])" if phrase.strip()[0].isdigit() else r"(?<!\w)"
    after = r"(?!\w)(?![.,]\d)" if phrase.strip()[-1].isdigit() else r"(?!\w)"
    return re.search(before + inner + after, text, re.IGNORECASE) is not None


def is_right(answer: str, check: Check) -> bool:
    """All that the check asks: see `Check`."""
    number = None if check.number is None else last_number(answer, check.numerals)
    return (
        len(answer.split()) <= check.max_words
        and all(occurs(phrase, answer) for phrase in check.contains)
        and not any(occurs(phrase, answer) for phrase in check.lacks)
        and (check.label is None or label_of(answer) == label_of(check.label))
        and (check.exact is None or answer.strip() == check.exact.strip())
        and (check.json is None or json_of(answer) == check.json)
        and (check.number is None or (number is not None and math.isclose(number, check.number)))
        and (check.pattern is None or _is_found(check.pattern, answer))
    )


def _is_found(pattern: str, text: str) -> bool:
    """Whether a regular expression is found; one that would look for longer than SECONDS is not."""
    try:
        return regex.search(pattern, text, timeout=SECONDS) is not None
    except TimeoutError:
        return False


def is_equal(answer: str, reference: str) -> bool:
    """Whether an answer is its reference: JSON objects and arrays by their content, other texts whatever the case and
    the white space."""
    return compared(answer) == compared(reference)


def prompts_of(renderer: Renderer, examples: Sequence[Example], shots: Sequence[Example] = ()) -> list[list[int]]:
    """Token ids of every example's last question, after the `shots`."""
    before: list[Message] = []
    for shot in shots:
        before += [message for message in shot.messages if message.role != "system"]
    prompts = []
    for example in examples:
        own = list(example.messages[:-1])
        system = [message for message in own[:1] if message.role == "system"]
        prompts.append(renderer.prompt_ids([*system, *before, *own[len(system) :]], example.tools))
    return prompts


def score_answers(examples: Sequence[Example], answers: Sequence[Answer], renderer: Renderer) -> AnswerScore:
    """Check the answers to the last questions of these examples: words by their check; calls, which must be the same
    in the same order, by name and arguments.

    Returns:
        The score; its answers have calls as people read them.
    """
    texts: list[str] = []
    correct: list[bool | None] = []
    for example, answer in zip(examples, answers, strict=True):
        words, calls = renderer.read(answer.ids) if example.with_tools else ("", ())
        texts.append(Message("assistant", words, calls=calls).text if calls else answer.text)
        if example.calls:
            correct.append([call.meaning for call in calls] == [call.meaning for call in example.calls])
        else:
            correct.append(is_right(texts[-1], example.check) if example.check else None)
    declining = [bool(example.check and example.check.declines) for example in examples]
    asked = [good for good, declines in zip(correct, declining, strict=True) if good is not None and not declines]
    turned = [good for good, declines in zip(correct, declining, strict=True) if declines]
    stops = sum(answer.stopped for answer in answers)
    names = [e.group for e, declines in zip(examples, declining, strict=True) if e.is_scored and not declines]
    groups = len(set(groups_of(names)))
    return AnswerScore(
        sum(asked), len(asked), sum(map(bool, turned)), len(turned), stops, groups, tuple(texts), tuple(correct)
    )


def few_shots(examples: Sequence[Example], k: int) -> list[Example]:
    """k examples spread evenly over a training set, the last of them one that declines where there is one."""
    examples = [example for example in examples if not example.is_text]
    if k <= 0 or not examples:
        return []
    answering = [e for e in examples if e.check is None or not e.check.declines] or list(examples)
    chosen = [answering[i * len(answering) // k] for i in range(min(k, len(answering)))]
    declining = next((e for e in examples if e.check is not None and e.check.declines), None)
    return [*chosen[: k - 1], declining] if declining is not None and k > 1 else chosen


def shuffled_answers(examples: Sequence[Example], seed: int) -> list[Example]:
    """The control: the same questions, each with the answer of another example, drawn with a seed.

    What an adapter trained on these still gets right, it owes to the form of the answers alone.
    """
    order = np.random.default_rng(seed).permutation(len(examples))
    answer_of = dict(zip(order.tolist(), np.roll(order, 1).tolist(), strict=True))  # one ring: nobody keeps its own
    return [
        replace(example, messages=(*example.messages[:-1], examples[answer_of[i]].messages[-1]))
        for i, example in enumerate(examples)
    ]
