"""Rows become padded batches. Padding is on the right, where a causal model's trained tokens never look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorafit.data.render import Row
from lorafit.data.split import seed_of

LENGTH_STEP = 8  # widths are multiples of this: every new width costs the kernels a preparation


@dataclass(frozen=True)
class Batch:
    """ids (B, T) int64, trained (B, T) bool: token t is predicted from those before it and counts in the loss."""

    ids: Tensor
    trained: Tensor

    @property
    def n_trained(self) -> int:
        return int(self.trained.sum())


def _width(row: Row) -> int:
    return -(-len(row.ids) // LENGTH_STEP) * LENGTH_STEP


def collate(rows: Sequence[Row], pad_id: int, device: torch.device, context: int | None = None) -> Batch:
    """Pad rows to one width, within the `context` of a model whose positions end there. Raises ValueError for a batch
    without a trained token: its loss would be 0/0."""
    longest = max(len(row.ids) for row in rows)
    stepped = max(_width(row) for row in rows)
    width = stepped if context is None else max(longest, min(stepped, context))
    ids = torch.full((len(rows), width), pad_id, dtype=torch.int64)
    trained = torch.zeros((len(rows), width), dtype=torch.bool)
    for i, row in enumerate(rows):
        ids[i, : len(row.ids)] = torch.tensor(row.ids)
        trained[i, : len(row.ids)] = torch.tensor(row.trained)
    trained[:, 0] = False
    if not trained.any():
        raise ValueError("a batch without trained tokens: every example must have something to learn")
    return Batch(ids.to(device), trained.to(device))


def epoch_order(rows: Sequence[Row], batch_size: int, seed: int, epoch: int) -> list[list[int]]:
    """Batches of row positions for one epoch: shuffled by (seed, epoch), then neighbours in length are put
    together within windows of 16 batches, and the batches shuffled. The last batch may be smaller."""
    rng = np.random.default_rng(seed_of(seed, "order", epoch))
    shuffled = rng.permutation(len(rows)).tolist()
    window = 16 * batch_size
    batches = []
    for start in range(0, len(shuffled), window):
        part = sorted(shuffled[start : start + window], key=lambda i: len(rows[i].ids))
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def by_tokens(rows: Sequence[Row], positions: Sequence[int], max_tokens: int) -> list[list[int]]:
    """Positions in micro-batches of at most `max_tokens` padded tokens (a longer row goes alone), by length."""
    parts: list[list[int]] = []
    for i in sorted(positions, key=lambda i: len(rows[i].ids), reverse=True):
        if parts and (len(parts[-1]) + 1) * _width(rows[parts[-1][0]]) <= max_tokens:
            parts[-1].append(i)
        else:
            parts.append([i])
    return parts
