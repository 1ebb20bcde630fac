"""Held-out questions with known answers, on which adapters are compared by how many they answer right."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorafit.adapters.adapter import Adapter
from lorafit.bases.base import Base
from lorafit.data.examples import Example
from lorafit.data.render import Renderer, Row
from lorafit.evaluation.answers import prompts_of, score_answers
from lorafit.evaluation.compare import MOST, answer_tokens, asked_of
from lorafit.evaluation.counting import are_few, right, scored_and_bare
from lorafit.evaluation.decoding import Decoding


@dataclass(frozen=True)
class Questions:
    """Questions whose answers can be scored.

    Args:
        base: The base.
        renderer: Renders the prompts.
        examples: The questions.
        most: The most tokens of an answer.
        memory: Bytes that decoding may take; None for no limit.
    """

    base: Base
    renderer: Renderer
    examples: tuple[Example, ...]
    most: int
    memory: int | None

    @staticmethod
    def among(
        base: Base,
        renderer: Renderer,
        examples: Sequence[Example],
        rows: Sequence[Row],
        known: Sequence[Example],
        memory: int | None = None,
    ) -> Questions | None:
        """Choose at most MOST questions among those of `asked_of`; None if no answer can be scored: no example has a
        check or asks for a call, and the answers are not few.

        Args:
            base: The base.
            renderer: Renders the prompts.
            examples: The examples to choose from.
            rows: The examples as rows.
            known: The examples that the adapter was trained on.
            memory: Bytes that decoding may take; None for no limit.
        """
        checked, bare = scored_and_bare(examples)
        if not checked and not are_few([examples[i] for i in bare], known):
            return None
        places = asked_of(examples, rows, known)
        asked = [examples[i] for i in places[:: -(-len(places) // MOST)]]
        return Questions(base, renderer, tuple(asked), answer_tokens(rows), memory)

    def right(self, adapter: Adapter, progress: Callable[[int, int], None]) -> int:
        """How many questions the adapter answers right. Nothing may be attached to the base."""
        prompts = prompts_of(self.renderer, self.examples)
        with Decoding(self.base, self.renderer, max(map(len, prompts)), self.most, self.memory) as decoding:
            score = score_answers(self.examples, decoding.answers(prompts, adapter, progress), self.renderer)
        return sum(map(right, self.examples, score.answers, score.correct))
