"""Rows become batches: packed one behind the other, or padded to one width on the right, where a causal model's
trained tokens never look."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorafit.attachment.packing import Segments
from lorafit.data.render import Row
from lorafit.data.split import seed_of

LENGTH_STEP = 8  # widths of padded batches are multiples of this: a new width costs some kernels a preparation
# Batches among which padded rows are sorted by length. A step whose rows are alike learns less from them (docs/log.md);
# what the padding costs is in docs/why/rows-are-packed.md.
WINDOW = 4
ORDER = 2  # the rule of `epoch_order`: a run goes on by the one it began with, or not at all
PACK_STEP = 32  # so are packs in bf16 on a processor, where it costs about 0.4 s


@dataclass(frozen=True, eq=False)
class Start:
    """hidden (B, T, width): what a batch's tokens have become where block number `block` begins."""

    hidden: Tensor
    block: int


@dataclass(frozen=True, eq=False)
class Batch:
    """ids (B, T) int64, trained (B, T) bool: token t is predicted from those before it and counts in the loss.

    before (n_trained,): place among the B·T of the token before each trained one. owner (n_trained,): which of the rows
    it belongs to, of `rows`. segments: where the rows lie that are packed into one, B = 1; None where they are padded.
    start: where the lowest blocks need not be run again.
    """

    ids: Tensor
    trained: Tensor
    before: Tensor
    owner: Tensor
    rows: int
    segments: Segments | None = None
    start: Start | None = None

    @property
    def n_trained(self) -> int:
        return len(self.before)

    @property
    def targets(self) -> Tensor:
        """The trained tokens, (n_trained,)."""
        return self.ids.reshape(-1)[self.before + 1]


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
    return _batch(rows, ids, trained, device, None)


def pack(rows: Sequence[Row], pad_id: int, device: torch.device, step: int = 1) -> Batch:
    """Rows one behind the other, filled up to a multiple of `step` tokens. Raises ValueError as `collate` does."""
    lengths = [len(row.ids) for row in rows]
    if filler := -sum(lengths) % step:
        lengths.append(filler)
    ids = torch.tensor([[*(i for row in rows for i in row.ids), *[pad_id] * filler]])
    trained = torch.tensor([[*(t for row in rows for t in (False, *row.trained[1:])), *[False] * filler]])
    return _batch(rows, ids, trained, device, Segments(tuple(lengths), device))


def _batch(rows: Sequence[Row], ids: Tensor, trained: Tensor, device: torch.device, segments: Segments | None) -> Batch:
    trained[:, 0] = False  # no token stands before the first
    places = trained.reshape(-1).nonzero()[:, 0]
    if not len(places):
        raise ValueError("a batch without trained tokens: every example must have something to learn")
    ends = torch.tensor(segments.lengths).cumsum(0) if segments else ids.shape[1] * torch.arange(1, len(rows) + 1)
    owner = torch.searchsorted(ends, places, right=True)
    return Batch(ids.to(device), trained.to(device), (places - 1).to(device), owner.to(device), len(rows), segments)


def epoch_order(
    rows: Sequence[Row], batch_size: int, seed: int, epoch: int, fixed: bool = False, packed: bool = False
) -> list[list[int]]:
    """Batches of row positions for one epoch, shuffled by (seed, epoch). The last batch may be smaller.

    fixed: the batches are those of epoch 0 in every epoch, in another order each. packed: rows are not padded. Where
    they are, neighbours in length are put together within windows of WINDOW batches, and the batches shuffled.
    """
    rng = np.random.default_rng(seed_of(seed, "order", epoch))
    if fixed and epoch:
        batches = epoch_order(rows, batch_size, seed, 0, packed=packed)
    else:
        shuffled = rng.permutation(len(rows)).tolist()
        batches = []
        window = batch_size * (1 if packed else WINDOW)
        for start in range(0, len(shuffled), window):
            part = shuffled[start : start + window]
            if not packed:
                part.sort(key=lambda i: len(rows[i].ids))
            batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    return [batches[i] for i in rng.permutation(len(batches))]


def by_tokens(rows: Sequence[Row], positions: Sequence[int], max_tokens: int, packed: bool = False) -> list[list[int]]:
    """Positions in micro-batches of at most `max_tokens` tokens, padding included where rows are not packed (a longer
    row goes alone), by length."""
    parts: list[list[int]] = []
    size = 0
    for i in sorted(positions, key=lambda i: len(rows[i].ids), reverse=True):
        size = size + len(rows[i].ids) if packed or not parts else (len(parts[-1]) + 1) * _width(rows[parts[-1][0]])
        if parts and size <= max_tokens:
            parts[-1].append(i)
        else:
            parts.append([i])
            size = len(rows[i].ids)
    return parts
