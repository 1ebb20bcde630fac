"""Completion NLL per example. Only per-example sums are kept, never logits."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch

from lorafit.base import Base
from lorafit.data.batches import Batch, by_tokens, collate
from lorafit.data.render import Row
from lorafit.tasks.completion import head_is_plain, row_sums, token_nll

EVALUATION_TOKENS = 2048  # padded tokens per forward


def batch_of(base: Base, rows: Sequence[Row]) -> Batch:
    """Rows as one batch for this base. Any valid token serves as padding: nothing trained ever looks at it."""
    known = base.tokenizer.pad_token_id if base.tokenizer is not None else None
    return collate(rows, 0 if known is None else int(known), base.device, base.context)


@torch.no_grad()
def example_nll(
    base: Base, rows: Sequence[Row], progress: Callable[[int, int], None] = lambda done, of: None
) -> list[float]:
    """Mean NLL in nats per trained token, of each example in the order of their numbers.

    Rows of one example (several answers in one conversation) are joined before the mean is taken. Numbers that no
    row has are passed over.
    """
    count = max(row.example for row in rows) + 1
    sums, tokens = [0.0] * count, [0] * count
    plain: bool | None = None
    done = 0
    progress(0, len(rows))
    for part in by_tokens(rows, range(len(rows)), EVALUATION_TOKENS):
        batch = batch_of(base, [rows[i] for i in part])
        if plain is None:
            plain = head_is_plain(base.model, batch)
        for i, total in zip(part, row_sums(token_nll(base.model, batch, plain), batch).tolist(), strict=True):
            sums[rows[i].example] += total
            tokens[rows[i].example] += rows[i].n_trained
        done += len(part)
        progress(done, len(rows))
    return [total / n for total, n in zip(sums, tokens, strict=True) if n]
