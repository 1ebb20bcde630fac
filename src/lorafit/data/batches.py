"""Batches of rows, which are packed one after another, or padded on the right, where a causal model never looks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorafit.attachment.packing import Segments
from lorafit.data.rows import Row
from lorafit.data.split import seed_of

LENGTH_STEP = 8  # widths of padded batches are multiples of this: some kernels prepare for every new width
PACK_STEP = 32  # likewise for packs in bf16 on a processor, where the preparation takes about 0.4 s
# Batches among which padded rows are sorted by length. A step whose rows are alike learns less from them (docs/log.md);
# what the padding costs is in docs/why/rows-are-packed.md.
WINDOW = 4
ORDER = 2  # the version of the rule in `epoch_order`: a run is resumed only with the version it began with


@dataclass(frozen=True, eq=False)
class Start:
    """The hidden states of a batch's tokens, (B, T, width), that are the input of block number `block`."""

    hidden: Tensor
    block: int


@dataclass(frozen=True, eq=False)
class Batch:
    """A batch of B rows of T tokens, or of packed rows, B = 1.

    Args:
        ids: token ids, (B, T) int64.
        trained: whether a token is predicted and counts in the loss, (B, T) bool.
        before: the flat index, in B·T, of the token before each trained token, (n_trained,).
        owner: the row of each trained token, (n_trained,).
        rows: how many rows there are.
        segments: the spans of packed rows; None where rows are padded.
        start: the hidden states to start from; None to run all blocks.
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
    """Pad rows to one width, at most the `context` of a model with a fixed number of positions. Raises ValueError for a
    batch without a trained token: its loss would be 0/0."""
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
    """Pack rows one after another, filled up to a multiple of `step` tokens. Raises ValueError as `collate` does."""
    lengths = [len(row.ids) for row in rows]
    if filler := -sum(lengths) % step:
        lengths.append(filler)
    ids = torch.tensor([[*(i for row in rows for i in row.ids), *[pad_id] * filler]])
    trained = torch.tensor([[*(t for row in rows for t in (False, *row.trained[1:])), *[False] * filler]])
    return _batch(rows, ids, trained, device, Segments(tuple(lengths), device))


def _batch(rows: Sequence[Row], ids: Tensor, trained: Tensor, device: torch.device, segments: Segments | None) -> Batch:
    trained[:, 0] = False  # nothing predicts the first token
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

    Args:
        rows: all rows.
        batch_size: rows in a batch.
        seed: of the run.
        epoch: its number, from 0.
        fixed: use the batches of epoch 0 in every epoch, each time in another order.
        packed: rows are not padded. Padded rows are sorted by length within windows of WINDOW batches.
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
    """Positions by length, in micro-batches of at most `max_tokens` tokens, including any padding. A longer row gets a
    micro-batch of its own."""
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
