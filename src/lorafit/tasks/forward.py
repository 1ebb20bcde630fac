"""The forward of a causal language model: rows go in; the NLL of their trained tokens, or hidden states, come out."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import PreTrainedModel

from lorafit.attachment.blocks import inputs_of_blocks, skipping
from lorafit.bases.base import Base
from lorafit.data.batches import LENGTH_STEP, PACK_STEP, Batch, collate, pack
from lorafit.data.render import Row
from lorafit.tasks.task import ForwardMode

CHUNK = 1 << 23  # logits held at a time: 32 MB in fp32


def batch_of(base: Base, rows: Sequence[Row], mode: ForwardMode) -> Batch:
    """Rows as one batch for this base. Any valid token can serve as padding, because no trained token attends to it."""
    known = base.tokenizer.pad_token_id if base.tokenizer is not None else None
    pad = 0 if known is None else int(known)
    if mode.packed:
        return pack(rows, pad, base.device, length_step(base, mode))
    return collate(rows, pad, base.device, base.context)


def length_step(base: Base, mode: ForwardMode) -> int:
    """The padded length of rows, and the length of packs, are multiples of this number of tokens."""
    if not mode.packed:
        return LENGTH_STEP
    return PACK_STEP if base.device.type == "cpu" and base.dtype != torch.float32 else 1


def token_nll(base: Base, batch: Batch, mode: ForwardMode) -> Tensor:
    """NLL in nats of every trained token, (n_trained,) fp32, rows in order.

    A packed batch must be run inside `packing(base)`. With a separate head, logits are computed only at the trained
    tokens, CHUNK logits at a time.
    """
    chosen = body(base, batch, mode).flatten(0, 1).index_select(0, batch.before)
    if not mode.separate_head:
        return F.cross_entropy(chosen.float(), batch.targets, reduction="none")
    head = head_of(base.model)
    assert head is not None
    if type(head) is not nn.Linear or "forward" in vars(head):
        return _nll_of(head, chosen, batch.targets)
    nll: Tensor = _HeadNll.apply(chosen, head.weight, head.bias, batch.targets)
    return nll


def body(base: Base, batch: Batch, mode: ForwardMode) -> Tensor:
    """The input of the head, (B, T, hidden), or the logits, (B, T, vocabulary), if the head is not separate."""
    if not mode.separate_head:
        logits: Tensor = _run(base, base.model, batch).logits
        return logits
    assert isinstance(base.model, PreTrainedModel)
    hidden: Tensor = _run(base, base.model.base_model, batch).last_hidden_state
    return hidden.to(base.dtype)  # some families keep it in fp32 and round it for the head


def trunk(base: Base, batch: Batch, blocks: int) -> Tensor:
    """The output of the lowest `blocks` blocks for a batch, (B, T, hidden)."""
    assert isinstance(base.model, PreTrainedModel)
    with torch.no_grad(), inputs_of_blocks(base, [blocks]) as seen:
        _run(base, base.model.base_model, batch)
    return seen[0]


def _run(base: Base, model: nn.Module, batch: Batch) -> Any:
    """Run the model, or its body, on a batch, beginning at the block where the batch starts."""
    where: dict[str, Any] = {}
    if batch.segments is not None:
        where = {"position_ids": batch.segments.positions, "segments": batch.segments}
    if batch.start is None:
        return model(input_ids=batch.ids, use_cache=False, **where)
    with skipping(base, batch.start.block):
        return model(inputs_embeds=batch.start.hidden, use_cache=False, **where)


def head_of(model: nn.Module) -> nn.Module | None:
    """The output head of a model; None if the model has none, or no separate body."""
    if not isinstance(model, PreTrainedModel) or model.base_model is model:
        return None
    head: nn.Module | None = model.get_output_embeddings()
    return head


def _nll_of(head: nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """`_HeadNll` for any head, also for an adapted one. If there are more than CHUNK logits, they are computed in
    parts, and again for the backward, so that only one part is held."""

    def part(hidden: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(head(hidden).float(), targets, reduction="none")

    rows = max(1, CHUNK // len(head.weight))  # type: ignore[arg-type]
    if len(hidden) <= rows:
        return part(hidden, targets)
    parts = zip(hidden.split(rows), targets.split(rows), strict=True)
    return torch.cat([checkpoint(part, *each, use_reentrant=False) for each in parts])


class _HeadNll(torch.autograd.Function):
    """Head and cross entropy, `CHUNK` logits at a time. A frozen head needs only the gradient of its input, which is
    computed together with the loss while the logits are still in the cache, so that no logits are kept."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        rows = max(1, CHUNK // len(weight))
        wanted = ctx.needs_input_grad[0]
        nll, gradient = [], torch.empty_like(hidden) if wanted else None
        for start in range(0, len(hidden), rows):
            part, truth = hidden[start : start + rows], targets[start : start + rows, None]
            logits = F.linear(part, weight, bias).float()
            total = logits.logsumexp(1, keepdim=True)
            nll.append((total - logits.gather(1, truth))[:, 0])
            if gradient is not None:
                logits.sub_(total).exp_()
                logits.scatter_add_(1, truth, logits.new_full(truth.shape, -1.0))
                torch.mm(logits.to(weight.dtype), weight, out=gradient[start : start + rows])
        if gradient is not None:
            ctx.save_for_backward(gradient)
        return torch.cat(nll)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor, None, None, None]:
        (gradient,) = ctx.saved_tensors
        return (gradient.float() * upstream[0][:, None]).to(gradient.dtype), None, None, None
