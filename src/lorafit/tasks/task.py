"""The interface of a task: what a model is trained to predict, as a value."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor

from lorafit.bases.base import Base
from lorafit.data.render import Row


@dataclass(frozen=True)
class ForwardMode:
    """How a base may be run; `probe.mode_of` measures it.

    Args:
        separate_head: The logits are the head's output for the last hidden state, so that the head needs to run only at
            trained tokens.
        packed: Rows that are packed one after another give the same results as each row on its own.
    """

    separate_head: bool
    packed: bool


PLAIN = ForwardMode(False, False)


class Task(Protocol):
    """How rows become a batch, and the loss of each of their targets. `Runner` does everything else.

    A batch is any value with `owner` (targets,), the row of each target; `rows`, the number of rows; and `n_trained`,
    the number of targets.
    """

    @property
    def name(self) -> str:
        """The name that is stored with a run and an adapter."""
        ...

    @property
    def logits_at_a_time(self) -> int | None:
        """The most logits that are held at a time with a separate head; None if they are held together with the rest of
        a forward."""
        ...

    @property
    def starts(self) -> bool:
        """Whether its batches may start from a cached output of the lowest blocks."""
        ...

    def mode(self, base: Base, rows: Sequence[Row]) -> ForwardMode:
        """Measure how this base may be run on such rows. Raises BaseError if it cannot do the task."""
        ...

    def batch(self, base: Base, rows: Sequence[Row], mode: ForwardMode) -> Any:
        """The rows as one batch for this base."""
        ...

    def body(self, base: Base, batch: Any, mode: ForwardMode) -> Tensor:
        """The forward up to the targets, without the loss."""
        ...

    def nll(self, base: Base, batch: Any, mode: ForwardMode) -> Tensor:
        """NLL in nats of every target, (targets,) in fp32, in the order of the rows, times the target's weight if the
        task has weights. The loss is the sum over all batches of a step, divided by the sum of `weight` of its rows."""
        ...

    def weight(self, row: Row) -> float:
        """The sum of the weights of the row's targets; their number if the task has no weights."""
        ...

    def probes(self, rows: Sequence[Row], lengths: Sequence[int]) -> list[Row]:
        """Rows of these lengths in tokens, made from the given rows, for measurements of memory and time."""
        ...
