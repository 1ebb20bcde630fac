"""Faster steps for models with Llama's architecture, without transformers' work around each layer: ids in, logits out.

A step is a single call of the kernels, from the embeddings to the logits, with all adapters in it. Or it goes layer by
layer: the model's own linear modules are called, so that adapters act as everywhere, and norms, rotary positions, the
gate and attention are kernels. Both ways are timed when the engine opens, and the faster one is used for each number of
tokens. The result is that of the model's own forward, which other families use, and which the tests compare with.
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
    """The steps of one model, made by `decoder_of`.

    `timings` has the seconds of a step in one call (first) and by layers (second). `spent` has the seconds in steps of
    one call, by native.SPENT.
    """

    def __init__(self, model: PreTrainedModel, kernels: Kernels, mixer: Mixer, numbers: Mapping[str, int]):
        """numbers: of the sites, by path."""
        self.spent = np.zeros(len(SPENT))
        self._model: Any = model
        self._kernels, self._mixer, self._numbers = kernels, mixer, numbers
        self._weights = mixer.products.eight or mixer.products.plain
        self.timings = FIRST if len(self._weights) == len(numbers) else SECOND  # until they are measured
        self._tables: tuple[np.ndarray, np.ndarray] | None = None

    def logits(self, ids: Tensor, step: Step, last: Tensor | None) -> Tensor:
        """The logits of a step: ids (1, N) → (N, vocabulary), or only those of the rows `last`."""
        mix, body = self._mixer.rows, self._model.model
        allocated = len(step.slots.layers) == len(body.layers)  # the first step allocates the slots
        if mix is not None and allocated and not mix.has_gains and self.timings.faster(ids.shape[1]):
            return self._in_one_call(ids, step, mix, last, self._addresses(step.slots))
        return self._by_layers(ids, step, last, len(body.layers), self._model.lm_head)

    def measure(self, slots: Slots) -> None:
        """Time steps of the bare base both ways, to choose by these times. The slots must be allocated and empty. With
        8-bit weights there is no choice: the result of a row must not depend on the other rows."""
        if self._mixer.products.timings is UNTIMED:
            self.timings = UNTIMED if self.timings is FIRST else SECOND
        elif self.timings is FIRST and not self._mixer.products.eight:
            self.timings = compared(
                lambda rows: self._ways(rows, slots), [rows for rows in ROWS if rows <= slots.count * slots.room]
            )
        self.spent[:] = 0

    def _ways(self, rows: int, slots: Slots) -> tuple[Callable[[], object], Callable[[], object], float]:
        """A step of this many rows both ways, for `compared`, through as many blocks as are timed and the same share of
        the output head. Each slot has one row, the next token of an answer; further rows are a piece of a prompt, of
        which the last one reaches the head."""
        lengths: list[int] = []
        for remaining in reversed(range(min(rows, slots.count))):
            lengths.append(min(slots.room, rows - sum(lengths) - remaining))
        model, products, device = self._model, self._mixer.products, self._model.lm_head.weight.device
        step = Step.of(slots, slots.slots[: len(lengths)], lengths, device)
        ids = torch.zeros(1, rows, dtype=torch.int64, device=device)
        last = None if rows == len(lengths) else torch.tensor(lengths, device=device).cumsum(0) - 1
        kept = None if last is None else [1] * len(lengths)
        self._mixer.begin([None] * len(lengths), [1.0] * len(lengths), lengths, kept)
        mix, whole = self._mixer.rows, len(model.model.layers)
        assert mix is not None
        block_bytes = sum(layer.weight.nbytes for layer in self._weights.values()) / whole  # with a share of the head
        count = max(1, min(whole, round(bytes_for(rows) / block_bytes)))
        weight = model.lm_head.weight[: -(-len(model.lm_head.weight) * count // whole)]
        blocks, outputs = self._addresses(slots)
        part = blocks[:count], outputs.copy()
        part[1][4] = len(weight)  # d_out

        def head(h: Tensor) -> Tensor:
            by_kernel = products.for_rows(h.shape[1])
            return self._kernels.linear(h.contiguous(), weight, None, None) if by_kernel else F.linear(h, weight)

        return (
            lambda: self._in_one_call(ids, step, mix, last, part),
            lambda: self._by_layers(ids, step, last, count, head),
            count / whole,
        )

    def _in_one_call(
        self, ids: Tensor, step: Step, mix: Mix, last: Tensor | None, part: tuple[np.ndarray, np.ndarray]
    ) -> Tensor:
        """The logits in one call. part: `blocks` and `head` of Kernels.step."""
        body, dtype = self._model.model, next(iter(self._weights.values())).weight.dtype
        cos, sin = (table[0].contiguous() for table in body.rotary_emb(self._model.lm_head.weight, step.positions))
        x, self_attn = body.embed_tokens(ids)[0].float(), body.layers[0].self_attn
        shape, ends = tuple(step.slots.layers[0][0].shape), torch.arange(len(x)) if last is None else last
        heads, (blocks, head), (edges, table) = shape[1] * self_attn.num_key_value_groups, part, mix.tables
        return self._kernels.step(
            dtype,
            x,
            blocks,
            head,
            body.norm.weight,
            cos,
            sin,
            step.numbers,
            step.positions,
            shape,
            step.each,
            ends,
            heads,
            self_attn.scaling,
            body.norm.variance_epsilon,
            edges,
            table,
            mix.scale,
            self.spent,
        )

    def _addresses(self, slots: Slots) -> tuple[np.ndarray, np.ndarray]:
        """`blocks` and `head` of Kernels.step for the whole model."""
        if self._tables is not None:
            return self._tables

        def site(path: str) -> list[int]:
            number = self._numbers[path]
            layer = self._weights[number]
            scale, bias = (0 if tensor is None else tensor.data_ptr() for tensor in (layer.scale, layer.bias))
            return [layer.weight.data_ptr(), scale, bias, layer.weight.shape[1], len(layer.weight), number]

        blocks = []
        for i, layer in enumerate(self._model.model.layers):
            block = [word for name in SITES for word in site(f"model.layers.{i}.{name}")]
            norms = layer.input_layernorm.weight, layer.post_attention_layernorm.weight
            blocks.append([*block, *(tensor.data_ptr() for tensor in (*norms, *slots.layers[i]))])
        self._tables = np.array(blocks, dtype=np.int64), np.array(site("lm_head"), dtype=np.int64)
        return self._tables

    def _by_layers(
        self, ids: Tensor, step: Step, last: Tensor | None, count: int, head: Callable[[Tensor], Tensor]
    ) -> Tensor:
        """The logits layer by layer, through the first `count` blocks and this head."""
        body, kernels = self._model.model, self._kernels
        x = body.embed_tokens(ids)
        cos, sin = (table[0].contiguous() for table in body.rotary_emb(x, position_ids=step.positions))
        delta: Tensor | None = None
        for number, layer in enumerate(body.layers[:count]):
            attn, mlp = layer.self_attn, layer.mlp
            h = kernels.norm(x, delta, layer.input_layernorm.weight, layer.input_layernorm.variance_epsilon)
            q, k, v = (proj(h)[0].unflatten(1, (-1, attn.head_dim)) for proj in (attn.q_proj, attn.k_proj, attn.v_proj))
            keys, values = step.slots.layer(number, k.transpose(0, 1)[None], v.transpose(0, 1)[None])
            kernels.store(q, k, v, cos, sin, keys, values, step.numbers, step.positions)
            delta = attn.o_proj(attended(step, q, keys, values, attn.scaling, None).flatten(1)[None])
            after = layer.post_attention_layernorm
            h = kernels.norm(x, delta, after.weight, after.variance_epsilon)
            delta = mlp.down_proj(kernels.gated(mlp.gate_proj(h), mlp.up_proj(h)))
        h = kernels.norm(x, delta, body.norm.weight, body.norm.variance_epsilon)
        return head(h if last is None else h[:, last])[0]


def decoder_of(model: PreTrainedModel, mixer: Mixer, numbers: Mapping[str, int]) -> Decoder | None:
    """The decoder of a model; None for another architecture, or without kernels. numbers: of the sites, by path."""
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
    plain = all(type(layer.mlp.gate_proj) is nn.Linear for layer in body.layers)
    return Decoder(model, kernels, mixer, numbers) if whole and plain else None
