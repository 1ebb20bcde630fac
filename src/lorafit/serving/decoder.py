"""Steps of a model of Llama's shape, without what transformers does around each layer.

A step of as many tokens as the kernels are faster for is one call of them, from the embedding to the logits, with all
adapters in it. In other steps the layers' own linear modules are called, so that adapters act as they do everywhere;
norms, rotary positions, the gate and attention are kernels that write where the next one reads. It computes what the
model's own forward computes, which remains the way for every other family, and the oracle of the tests.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from lorafit.serving.mixing import Mix, Mixer
from lorafit.serving.native import SPENT, Kernels
from lorafit.serving.products import Weight
from lorafit.serving.slots import Slots, Step, attended

FAMILIES = frozenset({"llama", "mistral", "qwen2"})


SITES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj", "mlp.gate_proj",
         "mlp.up_proj", "mlp.down_proj")  # fmt: skip


class Decoder:
    """The steps of one model; made by `decoder_of`."""

    def __init__(self, model: PreTrainedModel, kernels: Kernels, mixer: Mixer, numbers: Mapping[str, int]):
        """numbers: of the sites, by their path. spent: seconds in steps of one call, by native.SPENT."""
        self.spent = np.zeros(len(SPENT))
        self._model: Any = model
        self._kernels, self._mixer, self._numbers = kernels, mixer, numbers
        self._tables: dict[torch.dtype, tuple[np.ndarray, np.ndarray]] = {}

    def logits(self, ids: Tensor, step: Step, last: Tensor | None) -> Tensor:
        """ids (1, N) → logits (N, vocabulary), or those of the rows `last`."""
        mix, weights = self._mixer.rows, self._mixer.products.for_rows(ids.shape[1])
        known = len(step.slots.layers) == len(self._model.model.layers)  # the first step of all makes their room
        if mix is not None and mix.is_few and known and len(weights) == len(self._numbers):
            return self._at_once(ids, step, mix, weights, last)
        return self._by_layers(ids, step, last)

    def _at_once(self, ids: Tensor, step: Step, mix: Mix, weights: Mapping[int, Weight], last: Tensor | None) -> Tensor:
        body, some = self._model.model, next(iter(weights.values())).weight.dtype
        if some not in self._tables:
            self._tables[some] = self._addresses(step.slots, weights)
        cos, sin = (one[0].contiguous() for one in body.rotary_emb(self._model.lm_head.weight, step.positions))
        x, mind = body.embed_tokens(ids)[0].float(), body.layers[0].self_attn
        shape, ends = tuple(step.slots.layers[0][0].shape), torch.arange(len(x)) if last is None else last
        return self._kernels.step(
            some, x, *self._tables[some], body.norm.weight, cos, sin, step.numbers, step.positions, shape, step.each,
            ends, shape[1] * mind.num_key_value_groups, mind.scaling, body.norm.variance_epsilon, mix.edges, mix.table,
            mix.scale, self.spent,
        )  # fmt: skip

    def _addresses(self, slots: Slots, weights: Mapping[int, Weight]) -> tuple[np.ndarray, np.ndarray]:
        """`blocks` and `head` of Kernels.step."""

        def site(path: str) -> list[int]:
            number = self._numbers[path]
            own = weights[number]
            scale, bias = (0 if one is None else one.data_ptr() for one in (own.scale, own.bias))
            return [own.weight.data_ptr(), scale, bias, own.weight.shape[1], len(own.weight), number]

        blocks = []
        for i, layer in enumerate(self._model.model.layers):
            block = [word for name in SITES for word in site(f"model.layers.{i}.{name}")]
            norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
            blocks.append([*block, *(one.data_ptr() for one in (*norms, *slots.layers[i]))])
        return np.array(blocks, dtype=np.int64), np.array(site("lm_head"), dtype=np.int64)

    def _by_layers(self, ids: Tensor, step: Step, last: Tensor | None) -> Tensor:
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


def decoder_of(model: PreTrainedModel, mixer: Mixer, numbers: Mapping[str, int]) -> Decoder | None:
    """The decoder of a model; None where it is of another shape, or without kernels. numbers: of the sites."""
    kernels = mixer.kernels
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
    return Decoder(model, kernels, mixer, numbers) if whole and plain else None
