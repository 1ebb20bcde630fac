"""Scores answers by the checks of their examples, and tool calls by the calls of their references."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from lorafit.data.checks import is_right
from lorafit.data.examples import Example, Message
from lorafit.data.render import Renderer
from lorafit.data.split import groups_of
from lorafit.evaluation.scores import AnswerScore
from lorafit.generation.greedy import Answer


def prompts_of(renderer: Renderer, examples: Sequence[Example], shots: Sequence[Example] = ()) -> list[list[int]]:
    """Token ids of every example's prompt: the `shots`, and the conversation up to the last question."""
    before: list[Message] = []
    for shot in shots:
        before += [message for message in shot.messages if message.role != "system"]
    prompts = []
    for example in examples:
        turns = list(example.messages[:-1])
        system = [message for message in turns[:1] if message.role == "system"]
        prompts.append(renderer.prompt_ids([*system, *before, *turns[len(system) :]], example.tools))
    return prompts


def score_answers(examples: Sequence[Example], answers: Sequence[Answer], renderer: Renderer) -> AnswerScore:
    """Score the answers to the last questions of the examples: text by its check, and calls by name, arguments and
    order.

    Returns:
        The score; calls in its answers are written in a readable form.
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
    """k examples spread evenly over a training set. The last one declines to answer, if there is such an example."""
    examples = [example for example in examples if not example.is_text]
    if k <= 0 or not examples:
        return []
    answering = [e for e in examples if e.check is None or not e.check.declines] or list(examples)
    chosen = [answering[i * len(answering) // k] for i in range(min(k, len(answering)))]
    declining = next((e for e in examples if e.check is not None and e.check.declines), None)
    return [*chosen[: k - 1], declining] if declining is not None and k > 1 else chosen


def shuffled_answers(examples: Sequence[Example], seed: int) -> list[Example]:
    """The control: the same questions, each with the answer of another example, drawn with a seed.

    An adapter trained on these can learn only the form of the answers.
    """
    order = np.random.default_rng(seed).permutation(len(examples))
    answer_of = dict(
        zip(order.tolist(), np.roll(order, 1).tolist(), strict=True)
    )  # one ring: no example keeps its answer
    return [
        replace(example, messages=(*example.messages[:-1], examples[answer_of[i]].messages[-1]))
        for i, example in enumerate(examples)
    ]
