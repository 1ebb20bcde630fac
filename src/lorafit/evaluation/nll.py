"""Completion NLL per example. Only per-example sums are kept, never logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lorafit.attachment import packing
from lorafit.base import Base
from lorafit.data.batches import by_tokens
from lorafit.data.render import Row
from lorafit.tasks.completion import Way, batch_of, row_sums, token_nll, way_of

EVALUATION_TOKENS = 2048  # per forward


@torch.no_grad()
def example_nll(
    base: Base, rows: Sequence[Row], progress: Callable[[int, int], None] = lambda done, of: None,
    way: Way | None = None,
) -> list[float]:  # fmt: skip
    """Mean NLL in nats per trained token, of each example in the order of their numbers.

    Rows of one example (several answers in one conversation) are joined before the mean is taken. Numbers that no
    row has are passed over. way: as `way_of` measured it; measured here where it is not given.
    """
    count = max(row.example for row in rows) + 1
    sums, tokens = [0.0] * count, [0] * count
    done = 0
    progress(0, len(rows))
    way = way or way_of(base, rows)
    with packing(base, way.packed):
        for part in by_tokens(rows, range(len(rows)), EVALUATION_TOKENS, way.packed):
            batch = batch_of(base, [rows[i] for i in part], way)
            for i, total in zip(part, row_sums(token_nll(base, batch, way), batch).tolist(), strict=True):
                sums[rows[i].example] += total
                tokens[rows[i].example] += rows[i].n_trained
            done += len(part)
            progress(done, len(rows))
    return [total / n for total, n in zip(sums, tokens, strict=True) if n]
