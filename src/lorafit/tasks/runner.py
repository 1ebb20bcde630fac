"""Runs a base on rows of a task, in micro-batches: rows go in; their NLL and its gradient come out."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lorafit.adapters.plan import Plan
from lorafit.attachment.adapters import attach
from lorafit.attachment.attention import packing
from lorafit.attachment.blocks import free_blocks, recomputing
from lorafit.attachment.source import Source
from lorafit.bases.base import Base
from lorafit.data.batches import Batch, Start, by_tokens
from lorafit.data.render import Row
from lorafit.errors import BaseError
from lorafit.tasks.completion import COMPLETION
from lorafit.tasks.forward import length_step, trunk
from lorafit.tasks.task import ForwardMode, Task

EVALUATION_TOKENS = 2048  # per forward
Progress = Callable[[int, int], None]  # called with the rows that are done, and the number of rows


def _unwatched(done: int, of: int) -> None:
    pass


@dataclass(frozen=True)
class Runner:
    """A base, the task for which it is run, and how it is run.

    Args:
        base: The base; an adapter may be attached to it.
        task: The task of the rows.
        mode: How the base may be run, as `task.mode` measured it.
        micro_tokens: Tokens per forward and backward, padding included.
        recompute: Whether blocks are computed again for the backward instead of kept.
    """

    base: Base
    task: Task
    mode: ForwardMode
    micro_tokens: int = 1024
    recompute: bool = False

    @staticmethod
    def of(base: Base, rows: Sequence[Row], task: Task = COMPLETION) -> Runner:
        """A runner whose mode is measured on the beginnings of these rows."""
        return Runner(base, task, task.mode(base, rows))

    def within(self, micro_tokens: int, recompute: bool) -> Runner:
        """The same runner with other micro-batches."""
        return replace(self, micro_tokens=micro_tokens, recompute=recompute)

    def parts(self, rows: Sequence[Row], positions: Sequence[int]) -> list[list[int]]:
        """The positions in micro-batches of at most `micro_tokens` tokens."""
        return by_tokens(rows, positions, self.micro_tokens, self.mode.packed)

    def batch(self, rows: Sequence[Row]) -> Any:
        """The rows as one batch."""
        return self.task.batch(self.base, rows, self.mode)

    def body(self, rows: Sequence[Row]) -> Tensor:
        """The forward of these rows up to their targets."""
        return self.task.body(self.base, self.batch(rows), self.mode)

    @property
    def length_step(self) -> int:
        """The padded length of rows, and the length of packs, are multiples of it."""
        return length_step(self.base, self.mode)

    def free_blocks(self, plan: Plan) -> int:
        """How many of the lowest blocks need not run again in every epoch, because the plan adapts none of them."""
        return free_blocks(self.base, plan) if self.task.starts else 0

    def started(self, batch: Batch, blocks: int) -> Batch:
        """The batch, started from its hidden states after the lowest `blocks` blocks, which do not run again."""
        return replace(batch, start=Start(trunk(self.base, batch, blocks), blocks))

    @contextmanager
    def training(self, state: Source) -> Iterator[None]:
        """Inside, gradients reach the factors of `state`. The state of the random generators is restored at the end."""
        base = self.base
        packed, twice = packing(base, self.mode.packed), recomputing(base, self.recompute)
        with own_randomness(base), attach(base, state), packed, twice:
            yield

    def gradient(self, batches: Sequence[Any], weight: float | None = None) -> float:
        """Accumulate the gradient of the mean loss over all targets of a step; returns the loss. Call it inside
        `training`.

        The sum is divided by the weight of the whole step, so every division into batches gives the same gradient.

        Args:
            batches: The batches of the step, or a share of them.
            weight: The weight of the whole step; by default the number of targets in the batches.
        """
        weight = weight or sum(batch.n_trained for batch in batches)
        total = torch.zeros((), device=self.base.device)
        for batch in batches:
            loss = self.task.nll(self.base, batch, self.mode).sum() / weight
            loss.backward()
            total += loss.detach()
        return float(total)

    def gradient_of(self, rows: Sequence[Row], parts: Sequence[Sequence[int]] | None = None) -> float:
        """`gradient` of these rows. parts: the positions of each micro-batch, by default those of `parts`."""
        parts = self.parts(rows, range(len(rows))) if parts is None else parts
        batches = [self.batch([rows[i] for i in part]) for part in parts]
        return self.gradient(batches, sum(self.task.weight(rows[i]) for part in parts for i in part))

    def nll(self, rows: Sequence[Row], progress: Progress = _unwatched) -> list[float]:
        """The mean NLL of each example, in nats per target, in the order of the examples' numbers.

        The mean is over all rows of an example, such as several answers in one conversation. Numbers without a row are
        left out.
        """
        return means(rows, self.nll_sums(rows, range(len(rows)), progress))

    @torch.no_grad()
    def nll_sums(self, rows: Sequence[Row], chosen: Sequence[int], progress: Progress = _unwatched) -> list[float]:
        """The NLL in nats of the rows at the `chosen` positions, summed by example; 0 for other examples. Only the sums
        are kept, never logits."""
        sums = [0.0] * (max(row.example for row in rows) + 1)
        done = 0
        progress(0, len(chosen))
        with packing(self.base, self.mode.packed):
            for part in by_tokens(rows, chosen, EVALUATION_TOKENS, self.mode.packed):
                batch = self.batch([rows[i] for i in part])
                values = self.task.nll(self.base, batch, self.mode)
                totals = torch.zeros(batch.rows, dtype=torch.float64, device=values.device)
                totals.index_add_(0, batch.owner, values.double())
                for i, total in zip(part, totals.tolist(), strict=True):
                    sums[rows[i].example] += total
                done += len(part)
                progress(done, len(chosen))
        return sums


def means(rows: Sequence[Row], sums: Sequence[float]) -> list[float]:
    """The mean of each example: its sum divided by its number of targets. Numbers without a row are left out."""
    targets = [0] * len(sums)
    for row in rows:
        targets[row.example] += row.n_trained
    return [total / n for total, n in zip(sums, targets, strict=True) if n]


def require_finite(base: Base, nll: Sequence[float]) -> None:
    """Raise BaseError if the NLL of an example is not finite before anything is trained."""
    if wrong := [value for value in nll if not math.isfinite(value)]:
        raise BaseError(
            f"'{base.name}' gives validation examples no finite NLL ({wrong[0]}): the fault is in the "
            "base or its dtype, not in the training; try --dtype fp32, or another base"
        )


def own_randomness(base: Base) -> AbstractContextManager[None]:
    """A context that restores the random generators of the processor and of the base's device at its end."""
    return torch.random.fork_rng([base.device] if base.device.type == "cuda" else [])
