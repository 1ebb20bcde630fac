"""Steps of a model of Llama's shape, without what transformers does around each layer.

The layers' own linear modules are called, so that adapters act as they do everywhere; norms, rotary positions, the
gate and attention are kernels that write where the next one reads. It computes what the model's own forward computes,
which remains the way for every other family, and the oracle of the tests.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from lorafit.serving.native import Kernels
from lorafit.serving.slots import Step, attended

FAMILIES = frozenset({"llama", "mistral", "qwen2"})


class Decoder:
    """The steps of one model; made by `decoder_of`."""

    def __init__(self, model: PreTrainedModel, kernels: Kernels):
        self._model: Any = model
        self._kernels = kernels

    def logits(self, ids: Tensor, step: Step, last: Tensor | None) -> Tensor:
        """ids (1, N) → logits (N, vocabulary), or those of the rows `last`."""
        body, kernels = self._model.model, self._kernels
        x = body.embed_tokens(ids)
        cos, sin = (one[0].contiguous() for one in body.rotary_emb(x, position_ids=step.positions))
        delta: Tensor | None = None
        for number, layer in enumerate(body.layers):
            mind, gate = layer.self_attn, layer.mlp
            h = kernels.norm(x, delta, layer.input_layernorm.weight, layer.input_layernorm.variance_epsilon)
            q, k, v = (one(h)[0].unflatten(1, (-1, mind.head_dim)) for one in (mind.q_proj, mind.k_proj, mind.v_proj))
            keys, values = step.slots.layer(number, k.transpose(0, 1)[None], v.transpose(0, 1)[None])
            kernels.store(q, k, v, cos, sin, keys, values, step.numbers, step.positions)
            delta = mind.o_proj(attended(step, q, keys, values, mind.scaling, None).flatten(1)[None])
            after = layer.post_attention_layernorm
            h = kernels.norm(x, delta, after.weight, after.variance_epsilon)
            delta = gate.down_proj(kernels.gated(gate.gate_proj(h), gate.up_proj(h)))
        h = kernels.norm(x, delta, body.norm.weight, body.norm.variance_epsilon)
        logits: Tensor = self._model.lm_head(h if last is None else h[:, last])[0]
        return logits


def decoder_of(model: PreTrainedModel, kernels: Kernels | None) -> Decoder | None:
    """The decoder of a model; None where it is of another shape, or without kernels."""
    config: Any = model.config
    if kernels is None or config.model_type not in FAMILIES or config.hidden_act != "silu":
        return None
    if getattr(config, "sliding_window", None) and getattr(config, "use_sliding_window", True):
        return None
    body: Any = model.base_model
    with torch.no_grad():
        x = body.embed_tokens.weight[:1, None]
        cos, _ = body.rotary_emb(x, position_ids=torch.zeros(1, 1, dtype=torch.int64, device=x.device))
    whole = cos.shape[-1] == body.layers[0].self_attn.head_dim and cos.dtype == x.dtype
    plain = all(type(one.mlp.gate_proj) is nn.Linear for one in body.layers)
    return Decoder(model, kernels) if whole and plain else None
