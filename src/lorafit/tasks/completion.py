"""Completion: predict each trained token from all tokens before it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from lorafit.data.batches import Batch


def completion_logits(model: nn.Module, batch: Batch, split_head: bool) -> Tensor:
    """Logits of the positions that predict trained tokens, (n_trained, vocabulary), rows in order.

    With `split_head` the head runs only at those positions; see `head_is_plain`.
    """
    predicts = torch.zeros_like(batch.trained)
    predicts[:, :-1] = batch.trained[:, 1:]
    if not split_head:
        logits: Tensor = model(input_ids=batch.ids, use_cache=False).logits
        return logits[predicts]
    assert isinstance(model, PreTrainedModel)
    hidden: Tensor = model.base_model(input_ids=batch.ids, use_cache=False).last_hidden_state
    chosen: Tensor = model.get_output_embeddings()(hidden[predicts])
    return chosen


def token_nll(model: nn.Module, batch: Batch, split_head: bool) -> Tensor:
    """NLL in nats of every trained token, (n_trained,) fp32, rows in order."""
    logits = completion_logits(model, batch, split_head)
    return F.cross_entropy(logits.float(), batch.ids[batch.trained], reduction="none")


def row_sums(token_values: Tensor, batch: Batch) -> Tensor:
    """Sum of per-token values for each row of the batch, (B,) fp64."""
    rows = batch.trained.nonzero()[:, 0]
    sums = torch.zeros(len(batch.ids), dtype=torch.float64, device=token_values.device)
    return sums.index_add(0, rows, token_values.double())


@torch.no_grad()
def head_is_plain(model: nn.Module, batch: Batch) -> bool:
    """Whether this model's logits are its head over its last hidden state (measured on one batch).

    Some families scale or cap their logits after the head; for those the head cannot be run apart.
    """
    if not isinstance(model, PreTrainedModel) or model.get_output_embeddings() is None or model.base_model is model:
        return False
    one = Batch(batch.ids[:1], batch.trained[:1])
    whole, apart = (completion_logits(model, one, split) for split in (False, True))
    rounding = 1e-5 if whole.dtype == torch.float32 else 1e-2
    return torch.allclose(whole.float(), apart.float(), rtol=rounding, atol=rounding * float(whole.abs().max()))
