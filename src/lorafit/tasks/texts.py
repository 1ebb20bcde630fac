"""Texts that a head reads: padded on the right, and run through a model with a head."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lorafit.bases.base import Base
from lorafit.data.batches import LENGTH_STEP


def padded(base: Base, texts: Sequence[tuple[int, ...]], pad: int) -> tuple[Tensor, Tensor]:
    """Token ids (texts, T), padded on the right, and their mask."""
    longest = max(map(len, texts))
    width = -(-longest // LENGTH_STEP) * LENGTH_STEP
    width = width if base.context is None else max(longest, min(width, base.context))
    ids = torch.full((len(texts), width), pad, dtype=torch.int64)
    mask = torch.zeros((len(texts), width), dtype=torch.int64)
    for i, text in enumerate(texts):
        ids[i, : len(text)] = torch.tensor(text)
        mask[i, : len(text)] = 1
    return ids, mask


def head_outputs(base: Base, ids: Tensor, mask: Tensor, pad: int) -> Tensor:
    """The outputs of the base's head: (texts, outputs), or (texts, T, outputs) if it gives something for each token."""
    model: Any = base.model
    config = model.config.get_text_config()
    before, config.pad_token_id = config.pad_token_id, pad  # a decoder finds the last token by it
    try:
        outputs: Tensor = model(input_ids=ids, attention_mask=mask).logits
    finally:
        config.pad_token_id = before
    return outputs
