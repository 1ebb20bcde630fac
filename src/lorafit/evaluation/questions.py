"""Held-out questions on which two adapters are compared by how many they answer right."""

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
    """Questions of which it is known what a right answer is.

    most: tokens of an answer at most. memory: bytes that decoding may take; None for as many as go well.
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
        """At most MOST of those among `examples` that are asked when answers are counted (`asked_of`); None where
        nothing says what is right: none carries a check or asks for a call, and their answers are not few different
        ones. rows: the examples rendered. known: what the adapter was trained on."""
        checked, bare = scored_and_bare(examples)
        if not checked and not are_few([examples[i] for i in bare], known):
            return None
        places = asked_of(examples, rows, known)
        asked = [examples[i] for i in places[:: -(-len(places) // MOST)]]
        return Questions(base, renderer, tuple(asked), answer_tokens(rows), memory)

    def right(self, adapter: Adapter, progress: Callable[[int, int], None]) -> int:
        """How many of them the adapter answers right. Nothing may be attached to the base."""
        prompts = prompts_of(self.renderer, self.examples)
        with Decoding(self.base, self.renderer, max(map(len, prompts)), self.most, self.memory) as decoding:
            score = score_answers(self.examples, decoding.answers(prompts, adapter, progress), self.renderer)
        return sum(map(right, self.examples, score.answers, score.correct))
