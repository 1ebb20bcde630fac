"""The floor of `bench/train.py`: what no training of an adapter through this base can be faster than, uncompiled or
compiled. Forward and input-gradient backward of the bare, frozen base over the unpadded tokens of the same rows, the
head only where a token is trained. No adapter, no optimizer, nothing of lorafit.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from train_child import DTYPES, Job, Pace, load_model
from transformers import AttentionInterface, AttentionMaskInterface

ATTENTION = "each_row_alone"
Pair = tuple[list[int], list[bool]]


class RowByRow:
    """Causal attention of rows that lie behind one another in one sequence, each seeing itself alone."""

    def __init__(self) -> None:
        self.lengths: list[int] = []
        # Kept out of compiled graphs: how many rows there are, and of which lengths, changes with every step.
        AttentionInterface.register(ATTENTION, torch.compiler.disable(self.attend))
        AttentionMaskInterface.register(ATTENTION, lambda *args, **kwargs: None)

    def attend(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        **more: Any,
    ) -> tuple[Tensor, None]:
        """query (1, heads, N, d), key and value (1, kv heads, N, d) → (1, N, heads, d)."""
        parts = zip(*(x.split(self.lengths, dim=2) for x in (query, key, value)), strict=True)
        done = [
            F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scaling, enable_gqa=q.shape[1] != k.shape[1])
            for q, k, v in parts
        ]
        return torch.cat(done, dim=2).transpose(1, 2), None


def step(model: Any, attention: RowByRow, rows: Sequence[Pair], device: str) -> float:
    """One forward and backward down to the embeddings; returns the mean NLL of the trained tokens."""
    attention.lengths = [len(ids) for ids, _ in rows]
    ids = torch.tensor([token for row, _ in rows for token in row], device=device)
    positions = torch.tensor([place for row, _ in rows for place in range(len(row))], device=device)
    targets = torch.tensor([t for _, trained in rows for t in trained], device=device).nonzero()[:, 0]
    with torch.no_grad():
        embedded = model.get_input_embeddings()(ids[None])
    embedded.requires_grad_(True)
    hidden = model.base_model(inputs_embeds=embedded, position_ids=positions[None], use_cache=False).last_hidden_state
    logits = model.get_output_embeddings()(hidden[0, targets - 1])  # a row's first token is never trained
    loss = F.cross_entropy(logits.float(), ids[targets])
    loss.backward()
    assert embedded.grad is not None
    return float(loss.detach())


def cost(model: Any, rows: Sequence[Pair], dtype: str) -> dict[str, float]:
    """Operations and bytes of one step on these rows, counted by hand for a Llama-shaped base.

    FLOPs: a product with a weight costs 2 per weight and token, forward and again for the input gradient; causal
    attention of n tokens has n (n + 1) / 2 scores, with 2 products forward and 4 backward (a kernel that keeps no
    scores recomputes them: a fifth, not counted). Bytes, if every tensor came from memory once: the weights forward
    and backward, and what the backward needs of each layer (inputs of both norms, q, k, v, attention's output, gate,
    up), written and read.
    """
    config, size = model.config, DTYPES[dtype].itemsize
    blocks = sum(m.weight.numel() for m in model.base_model.layers.modules() if isinstance(m, nn.Linear))
    head = model.get_output_embeddings().weight.numel()
    wide = config.num_attention_heads * config.head_dim
    narrow = config.num_key_value_heads * config.head_dim
    tokens, trained = sum(len(ids) for ids, _ in rows), sum(sum(mask) for _, mask in rows)
    scores = sum(len(ids) * (len(ids) + 1) / 2 for ids, _ in rows)
    layers = config.num_hidden_layers
    kept = layers * (2 * config.hidden_size + 2 * wide + 2 * narrow + 2 * config.intermediate_size)
    return {
        "flops_linear": 4.0 * blocks * tokens,
        "flops_attention": 2.0 * wide * scores * (2 + 4) * layers,
        "flops_head": 4.0 * head * trained,
        "bytes_weights": 2.0 * size * (blocks + head),
        "bytes_activations": 2.0 * size * kept * tokens,
    }


def total_cost(model: Any, job: Job) -> dict[str, float]:
    """`cost` of a window's steps in the mean, over all rows."""
    steps = [cost(model, job.rows[i : i + job.batch], job.dtype) for i in range(0, len(job.rows), job.batch)]
    mean = {name: sum(one[name] for one in steps) / len(steps) for name in steps[0]}
    mean["flops"] = mean["flops_linear"] + mean["flops_attention"] + mean["flops_head"]
    mean["bytes"] = mean["bytes_weights"] + mean["bytes_activations"]
    return {**mean, "tokens": sum(len(ids) for ids, _ in job.rows) / len(steps)}


def run(job: Job) -> None:
    """Step through the windows, compiled layer by layer where the arm's name says so."""
    pace = Pace(job)
    attention = RowByRow()
    model: Any = load_model(job)
    model.config._attn_implementation = ATTENTION
    compiled = job.arm == "floor-compiled"
    if compiled:
        for layer in model.base_model.layers:  # of one code and one shape: compiled once, used by all
            layer.compile(dynamic=True)
    pace.memory.base_is_loaded()
    took: list[float] = []
    for done in range(job.all_steps):
        first = done * job.batch % len(job.rows)
        rows = job.rows[first : first + job.batch]
        began = time.perf_counter()
        step(model, attention, rows, job.device)
        took.append(time.perf_counter() - began)
        pace.stepped((len(rows), sum(len(ids) for ids, _ in rows), sum(sum(trained) for _, trained in rows)))
    setup = sum(took[: job.warmup]) - job.warmup * min(took)
    pace.finish(compile_seconds=round(setup, 1) if compiled else None, cost=total_cost(model, job))
