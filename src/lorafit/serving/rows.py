"""One request in the engine: a Submission while it waits, a Row while it is answered; tokens in, pieces of text out."""

from __future__ import annotations

import time
from collections.abc import Collection
from dataclasses import dataclass, field

from lorafit.generation.text import Detokenizer, StopTexts
from lorafit.serving.mixing import Loaded
from lorafit.serving.pool import Version
from lorafit.serving.request import Answer, Finish, Piece, Result, Token
from lorafit.serving.sampling import Grammar, Sampler
from lorafit.serving.slots import Slot


@dataclass(eq=False)
class Submission:
    """A request as it was submitted, at `at` (monotonic seconds). version: of the adapter; None: the bare base."""

    answer: Answer
    version: Version | None
    grammar: Grammar | None
    at: float = field(default_factory=time.monotonic)

    @property
    def name(self) -> str | None:
        """The adapter whose share of the engine it counts for; None: the bare base."""
        return self.version.name if self.version else None


@dataclass(eq=False)
class Row:
    """A request that is being answered. ids: tokens of prompt and answer; those in slot.held have keys and values.
    known: tokens of the prompt that had them before. limit: tokens of the answer at most. began, first: when it got its
    slot, and its first token."""

    submission: Submission
    slot: Slot
    loaded: Loaded | None
    ids: list[int]
    known: int
    sampler: Sampler
    words: Detokenizer | None
    until: StopTexts
    limit: int
    began: float = field(default_factory=time.monotonic)
    text: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    first: float = 0.0

    @property
    def left(self) -> int:
        """The number of tokens whose keys and values are not computed yet."""
        return len(self.ids) - len(self.slot.held)

    def advance(self, token: Token, stops: Collection[int]) -> Piece:
        """Add a token; returns its text, and why the answer ended if it did. stops: ids that end a turn."""
        self.first = self.first or time.monotonic()
        self.tokens.append(token)
        self.ids.append(token.id)
        ended = token.id in stops and not self.submission.answer.request.ignore_end
        full = len(self.tokens) >= self.limit
        closed = self.sampler.grammar is not None and self.sampler.grammar.ended
        last = ended or full or closed
        fresh = self.words.add([] if ended else [token.id], last) if self.words else ""
        text = self.until.add(fresh, last)
        self.text.append(text)
        finish: Finish | None = "stop" if ended or closed or self.until.met else "length" if full else None
        return Piece(text, (token,), finish)

    def cancelled(self) -> Piece:
        """The last piece of a cancelled answer: the text that was held back."""
        text = self.until.add(self.words.add([], True) if self.words else "", True)
        self.text.append(text)
        return Piece(text, (), "cancelled")

    def result(self, finish: Finish) -> Result:
        answer, at, now = self.submission.answer, self.submission.at, time.monotonic()
        return Result(
            "".join(self.text),
            tuple(self.tokens),
            finish,
            answer.adapter,
            len(answer.request.prompt),
            self.known,
            self.began - at,
            (self.first or now) - at,
            now - at,
        )
