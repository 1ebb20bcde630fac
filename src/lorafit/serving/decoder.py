"""Steps of a model of Llama's shape, without what transformers does around each layer.

A step is one call of the kernels, from the embedding to the logits, with all adapters in it. Or the layers' own linear
modules are called, so that adapters act as they do everywhere, and norms, rotary positions, the gate and attention are
kernels that write where the next one reads. Steps are timed both ways when the engine opens, and for each number of
tokens the faster way is taken. It computes what the model's own forward computes, which remains the way for every
other family, and the oracle of the tests.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_utils import PreTrainedModel

from lorafit.serving.mixing import Mix, Mixer
from lorafit.serving.native import SPENT, Kernels
from lorafit.serving.slots import Slots, Step, attended
from lorafit.serving.timing import FIRST, ROWS, SECOND, UNTIMED, bytes_for, compared

FAMILIES = frozenset({"llama", "mistral", "qwen2"})


SITES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)


class Decoder:
    """The steps of one model; made by `decoder_of`.

    timings: of a step in one call (first), and by layers (second). spent: seconds in steps of one call, by what
    native.SPENT names.
    """

    def __init__(self, model: PreTrainedModel, kernels: Kernels, mixer: Mixer, numbers: Mapping[str, int]):
        """numbers: of the sites, by their path."""
        self.spent = np.zeros(len(SPENT))
        self._model: Any = model
        self._kernels, self._mixer, self._numbers = kernels, mixer, numbers
        self._weights = mixer.products.eight or mixer.products.plain
        self.timings = FIRST if len(self._weights) == len(numbers) else SECOND  # until they are measured
        self._tables: tuple[np.ndarray, np.ndarray] | None = None

    def logits(self, ids: Tensor, step: Step, last: Tensor | None) -> Tensor:
        """ids (1, N) → logits (N, vocabulary), or those of the rows `last`."""
        mix, body = self._mixer.rows, self._model.model
        made = len(step.slots.layers) == len(body.layers)  # the first step of all makes their room
        if mix is not None and made and not mix.has_gains and self.timings.faster(ids.shape[1]):
            return self._in_one_call(ids, step, mix, last, self._addresses(step.slots))
        return self._by_layers(ids, step, last, len(body.layers), self._model.lm_head)

    def measure(self, slots: Slots) -> None:
        """Time steps of the bare base both ways, and choose by that from now on. The slots have their room, and hold
        nothing. With 8-bit weights there is no choice: what a row gets must not depend on its company."""
        if self._mixer.products.timings is UNTIMED:
            self.timings = UNTIMED if self.timings is FIRST else SECOND
        elif self.timings is FIRST and not self._mixer.products.eight:
            self.timings = compared(
                lambda rows: self._ways(rows, slots), [rows for rows in ROWS if rows <= slots.count * slots.room]
            )
        self.spent[:] = 0

    def _ways(self, rows: int, slots: Slots) -> tuple[Callable[[], object], Callable[[], object], float]:
        """A step of so many rows both ways, for `compared`: through as many blocks as are to be timed, and the same
        share of the output head. Each slot has one row, the next token of an answer; rows beyond them are a piece of a
        prompt, of which the last one reaches the head."""
        lengths: list[int] = []
        for others in reversed(range(min(rows, slots.count))):
            lengths.append(min(slots.room, rows - sum(lengths) - others))
        model, products, device = self._model, self._mixer.products, self._model.lm_head.weight.device
        step = Step.of(slots, slots.slots[: len(lengths)], lengths, device)
        ids = torch.zeros(1, rows, dtype=torch.int64, device=device)
        last = None if rows == len(lengths) else torch.tensor(lengths, device=device).cumsum(0) - 1
        kept = None if last is None else [1] * len(lengths)
        self._mixer.begin([None] * len(lengths), [1.0] * len(lengths), lengths, kept)
        mix, whole = self._mixer.rows, len(model.model.layers)
        assert mix is not None
        of_block = sum(one.weight.nbytes for one in self._weights.values()) / whole  # and its share of the head
        count = max(1, min(whole, round(bytes_for(rows) / of_block)))
        weight = model.lm_head.weight[: -(-len(model.lm_head.weight) * count // whole)]
        blocks, outputs = self._addresses(slots)
        part = blocks[:count], outputs.copy()
        part[1][4] = len(weight)  # d_out

        def head(h: Tensor) -> Tensor:
            ours = products.for_rows(h.shape[1])
            return self._kernels.linear(h.contiguous(), weight, None, None) if ours else F.linear(h, weight)

        return (
            lambda: self._in_one_call(ids, step, mix, last, part),
            lambda: self._by_layers(ids, step, last, count, head),
            count / whole,
        )

    def _in_one_call(
        self, ids: Tensor, step: Step, mix: Mix, last: Tensor | None, part: tuple[np.ndarray, np.ndarray]
    ) -> Tensor:
        """As `logits`. part: `blocks` and `head` of Kernels.step."""
        body, some = self._model.model, next(iter(self._weights.values())).weight.dtype
        cos, sin = (one[0].contiguous() for one in body.rotary_emb(self._model.lm_head.weight, step.positions))
        x, mind = body.embed_tokens(ids)[0].float(), body.layers[0].self_attn
        shape, ends = tuple(step.slots.layers[0][0].shape), torch.arange(len(x)) if last is None else last
        return self._kernels.step(
            some,
            x,
            *part,
            body.norm.weight,
            cos,
            sin,
            step.numbers,
            step.positions,
            shape,
            step.each,
            ends,
            shape[1] * mind.num_key_value_groups,
            mind.scaling,
            body.norm.variance_epsilon,
            *mix.tables,
            mix.scale,
            self.spent,
        )

    def _addresses(self, slots: Slots) -> tuple[np.ndarray, np.ndarray]:
        """`blocks` and `head` of Kernels.step, of the whole model."""
        if self._tables is not None:
            return self._tables

        def site(path: str) -> list[int]:
            number = self._numbers[path]
            own = self._weights[number]
            scale, bias = (0 if one is None else one.data_ptr() for one in (own.scale, own.bias))
            return [own.weight.data_ptr(), scale, bias, own.weight.shape[1], len(own.weight), number]

        blocks = []
        for i, layer in enumerate(self._model.model.layers):
            block = [word for name in SITES for word in site(f"model.layers.{i}.{name}")]
            norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
            blocks.append([*block, *(one.data_ptr() for one in (*norms, *slots.layers[i]))])
        self._tables = np.array(blocks, dtype=np.int64), np.array(site("lm_head"), dtype=np.int64)
        return self._tables

    def _by_layers(
        self, ids: Tensor, step: Step, last: Tensor | None, count: int, head: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """As `logits`, through the first `count` blocks and this head."""
        body, kernels = self._model.model, self._kernels
        x = body.embed_tokens(ids)
        cos, sin = (one[0].contiguous() for one in body.rotary_emb(x, position_ids=step.positions))
        delta: Tensor | None = None
        for number, layer in enumerate(body.layers[:count]):
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
        return head(h if last is None else h[:, last])[0]


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
