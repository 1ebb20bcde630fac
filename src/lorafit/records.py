"""Frozen records that go to disk as JSON."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Rendering:
    """How messages become text: the hash of the chat template, and the system prompt put before every
    conversation that brings none (None: whatever the template itself does). single: whether each conversation that was
    trained on asked one question, so that an adapter has seen no answer of its own (False too where it is not known).
    """

    template_hash: str
    system: str | None = None
    single: bool = field(default=False, compare=False)  # of what was asked, not of how it is rendered


@dataclass(frozen=True)
class Frozen:
    """What a run found out about its machine when it began, once: all of it takes part in the bits of the result.

    It is in run.json, and a run that is gone on with takes it from there, whatever would be found out by then.
    dtype: of the base, fp32 or bf16. threads: torch's. apart, packed: how the base may be run (`tasks.completion.Way`).
    micro_tokens, recompute: how much is run at a time and whether blocks are computed twice, by the memory there was.
    """

    dtype: str
    threads: int
    apart: bool
    packed: bool
    micro_tokens: int
    recompute: bool


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
