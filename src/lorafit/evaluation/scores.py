"""Scores: what an evaluation comes to, as values that go to disk."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Interval:
    """A mean with its 95 % interval."""

    mean: float
    low: float
    high: float


@dataclass(frozen=True)
class NllScore:
    """Mean completion NLL (nats per trained token, averaged over examples), base against adapter.

    `difference` is adapter − base, paired per example; below zero the adapter is better. `ci95` is its interval, None
    where there are too few independent examples for one.
    """

    base: float
    adapter: float
    difference: float
    ci95: tuple[float, float] | None
    n: int


@dataclass(frozen=True)
class AnswerScore:
    """Answers of one model to the same questions, decoded greedily: `right` of `n`, `declined` of `off_desk_n`.
    `groups`: independent pieces of evidence among the `n`. correct: of each answer whether it is right, None where
    nothing says what is."""

    right: int
    n: int
    declined: int
    off_desk_n: int
    natural_stops: int
    groups: int
    answers: tuple[str, ...] = ()
    correct: tuple[bool | None, ...] = ()

    @property
    def accuracy(self) -> float | None:
        """Share of questions about facts that are answered right."""
        return self.right / self.n if self.n else None
