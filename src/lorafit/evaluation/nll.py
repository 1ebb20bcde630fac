"""Completion NLL per example. Only per-example sums are kept, never logits."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch

from lorafit.attachment.attention import packing
from lorafit.bases.base import Base
from lorafit.data.batches import by_tokens
from lorafit.data.render import Row
from lorafit.errors import BaseError
from lorafit.tasks.completion import Way, batch_of, row_sums, token_nll
from lorafit.tasks.probe import way_of

EVALUATION_TOKENS = 2048  # per forward


def example_nll(
    base: Base,
    rows: Sequence[Row],
    progress: Callable[[int, int], None] = lambda done, of: None,
    way: Way | None = None,
) -> list[float]:
    """Mean NLL in nats per trained token, of each example in the order of their numbers.

    Rows of one example (several answers in one conversation) are joined before the mean is taken. Numbers that no
    row has are passed over. way: as `way_of` measured it; measured here where it is not given.
    """
    return means(rows, nll_sums(base, rows, range(len(rows)), progress, way or way_of(base, rows)))


@torch.no_grad()
def nll_sums(
    base: Base, rows: Sequence[Row], chosen: Sequence[int], progress: Callable[[int, int], None], way: Way
) -> list[float]:
    """NLL in nats of the `chosen` rows alone, summed by the number of their example; 0 for all other numbers."""
    sums = [0.0] * (max(row.example for row in rows) + 1)
    done = 0
    progress(0, len(chosen))
    with packing(base, way.packed):
        for part in by_tokens(rows, chosen, EVALUATION_TOKENS, way.packed):
            batch = batch_of(base, [rows[i] for i in part], way)
            for i, total in zip(part, row_sums(token_nll(base, batch, way), batch).tolist(), strict=True):
                sums[rows[i].example] += total
            done += len(part)
            progress(done, len(chosen))
    return sums


def require_finite(base: Base, nll: Sequence[float]) -> None:
    """Raise BaseError where a base gives examples no finite NLL before anything is trained."""
    if wrong := [value for value in nll if not math.isfinite(value)]:
        raise BaseError(
            f"'{base.name}' gives validation examples no finite NLL ({wrong[0]}): the fault is in the "
            "base or its dtype, not in the training; try --dtype fp32, or another base"
        )


def means(rows: Sequence[Row], sums: Sequence[float]) -> list[float]:
    """Sums by number of example, over its trained tokens; numbers that no row has are passed over."""
    tokens = [0] * len(sums)
    for row in rows:
        tokens[row.example] += row.n_trained
    return [total / n for total, n in zip(sums, tokens, strict=True) if n]
