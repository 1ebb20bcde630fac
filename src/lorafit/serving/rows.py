"""One request on its way through the engine: first it waits, then it has a row in every step."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field

from lorafit.generation.text import Until, Words
from lorafit.serving.mixing import Loaded
from lorafit.serving.pool import Version
from lorafit.serving.request import Answer, Finish, Piece, Result, Token
from lorafit.serving.sampling import Grammar, Sampler
from lorafit.serving.slots import Slot


@dataclass(eq=False)
class Asked:
    """A request that waits, since `at` (monotonic seconds). version: None for the bare base."""

    answer: Answer
    version: Version | None
    grammar: Grammar | None
    at: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str | None:
        """Whose turn it is that is counted."""
        return self.version.name if self.version else None


@dataclass(eq=False)
class Row:
    """A request that is being answered. ids: prompt and answer; what of it has keys and values is slot.held. known:
    tokens of the prompt that had them before it began. limit: tokens of the answer at most."""

    asked: Asked
    slot: Slot
    loaded: Loaded | None
    ids: list[int]
    known: int
    sampler: Sampler
    words: Words | None
    until: Until
    limit: int
    began: float = field(default_factory=time.monotonic)
    text: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    first: float = 0.0

    @property
    def left(self) -> int:
        """Tokens that have no keys and values yet."""
        return len(self.ids) - len(self.slot.held)

    def advance(self, token: Token, stops: Collection[int]) -> Piece:
        """What follows from a new token: its text, and whether it was the last. stops: ids that end a turn."""
        self.first = self.first or time.monotonic()
        self.tokens.append(token)
        self.ids.append(token.id)
        ended = token.id in stops and not self.asked.answer.request.ignore_end
        full = len(self.tokens) >= self.limit
        closed = self.sampler.grammar is not None and self.sampler.grammar.ended
        last = ended or full or closed
        fresh = self.words.add([] if ended else [token.id], last) if self.words else ""
        text = self.until.add(fresh, last)
        self.text.append(text)
        finish: Finish | None = "stop" if ended or closed or self.until.met else "length" if full else None
        return Piece(text, (token,), finish)

    def cancelled(self) -> Piece:
        """The last piece of one that was cancelled: the text that was held back."""
        text = self.until.add(self.words.add([], True) if self.words else "", True)
        self.text.append(text)
        return Piece(text, (), "cancelled")

    def result(self, finish: Finish) -> Result:
        asked, now = self.asked, time.monotonic()
        return Result(
            "".join(self.text),
            tuple(self.tokens),
            finish,
            asked.answer.adapter,
            len(asked.answer.request.prompt),
            self.known,
            self.began - asked.at,
            (self.first or now) - asked.at,
            now - asked.at,
        )
