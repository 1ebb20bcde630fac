"""Rows packed one after the other into one sequence, with attention that keeps them apart.

All of a decoder except attention treats each token separately, so packed rows need no padding. Attention is computed
row by row: its cost is the sum of the squares of the rows' lengths, and no row can attend to another.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from inspect import signature
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.errors import AttachError

NAME = "lorafit_packed"  # under which `attention` is registered in transformers
# Up to this length, rows of similar lengths share one padded product, whose scores are kept for the backward. On two
# cores this is a fifth faster than the flash kernel, for a few KB per token. Longer rows go through the kernel one by
# one.
SHORT = 128
ALIKE = 0.75  # in a shared product, the shortest row has at least this share of the longest row's tokens


@dataclass(frozen=True)
class Group:
    """Neighbouring rows whose attention is computed as one product.

    Args:
        count: The number of rows.
        width: The length of the longest row.
        tokens: The number of tokens in all rows.
        places: (tokens,): the position of each token among the count × width padded positions; None if all rows have
            the same length.
        sources: (count × width,): the token at each padded position, and any token where there is padding.
    """

    count: int
    width: int
    tokens: int
    places: Tensor | None
    sources: Tensor | None


@dataclass(frozen=True, eq=False)
class Segments:
    """The boundaries of the rows in a pack.

    Args:
        lengths: The length of each row in tokens, in order.
        device: The device of the tensors below.
    """

    lengths: tuple[int, ...]
    device: torch.device

    @cached_property
    def positions(self) -> Tensor:
        """(1, N): the position of each token in its row, from zero."""
        return torch.cat([torch.arange(n) for n in self.lengths])[None].to(self.device)

    @cached_property
    def edges(self) -> Tensor:
        """(rows + 1,) int32: the cumulative lengths, as kernels for rows of different lengths take them."""
        return torch.tensor([0, *self.lengths]).cumsum(0).to(self.device, torch.int32)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """The rows in groups of neighbours with similar lengths."""
        runs: list[list[int]] = []
        for n in self.lengths:
            widest = max(runs[-1]) if runs else 0
            alike = runs and min(n, *runs[-1]) >= ALIKE * max(n, widest) and max(n, widest) <= SHORT
            runs[-1].append(n) if alike else runs.append([n])
        return tuple(self._group(run) for run in runs)

    def _group(self, run: Sequence[int]) -> Group:
        width = max(run)
        if min(run) == width:
            return Group(len(run), width, sum(run), None, None)
        places = torch.cat([i * width + torch.arange(n) for i, n in enumerate(run)])
        sources = torch.zeros(len(run) * width, dtype=torch.int64).index_copy_(0, places, torch.arange(len(places)))
        return Group(len(run), width, sum(run), places.to(self.device), sources.to(self.device))


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    segments: Segments | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Causal attention within each row of a pack. It has more than six parameters, because transformers calls an
    attention function with them.

    Args:
        module: The attention layer.
        query: (1, H, N, D).
        key: (1, H_kv, N, D).
        value: (1, H_kv, N, D_v).
        attention_mask: The result of `window`.
        scaling: The factor on the scores; by default 1/√D.
        dropout: Must be 0.
        segments: The rows of the pack.
        sliding_window: How many tokens a token attends to, itself included; None for all earlier ones.
        others: Further arguments. `softcap`, `s_aux` and `position_bias` must be None.

    Returns:
        The output (1, N, H, D_v), and None in place of attention weights.

    Raises:
        AttachError: For arguments that it does not support.
    """
    unsupported = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if attention_mask is not None and (attention_mask.ndim or int(attention_mask) != sliding_window):
        unsupported.append("a mask of its own")
    if segments is None or unsupported or dropout or len(query) != 1 or not getattr(module, "is_causal", True):
        what = ", ".join(unsupported) or "a call without segments"
        raise AttachError(f"attention of packed rows: {what} is not supported: leave packing() first")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, D)
    if query.is_cuda and query.dtype != torch.float32:
        return _varlen(q, k, v, segments, scale, sliding_window)[None], None
    sizes = [group.tokens for group in segments.groups]
    parts = zip(segments.groups, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    outs = [_of_group(group, one, of, to, scale, sliding_window) for group, one, of, to in parts]
    # Contiguous, like the result of every attention function of transformers: some families view it in another shape.
    return (outs[0].contiguous() if len(outs) == 1 else torch.cat(outs))[None], None


def window(*_: Any, local_size: int | None = None, use_vmap: bool = False, **__: Any) -> Tensor | None:
    """Called by transformers to make a mask. Returns only the width of the mask's window, if it has one.

    `attention` compares it with the sliding window of the layer. Some families limit attention only by the mask, to a
    window or a chunk; short rows would not reveal that.
    """
    if use_vmap:
        raise AttachError("attention of packed rows: a mask of its own is not supported: leave packing() first")
    return None if local_size is None else torch.tensor(local_size)


def _varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None) -> Tensor:
    """torch's kernel for rows of different lengths (CUDA, half precision)."""
    from torch.nn.attention.varlen import varlen_attn

    edges, longest = segments.edges, max(segments.lengths)
    before, queries_per_key = -1 if window is None else window - 1, q.shape[1] // k.shape[1]
    gqa: dict[str, Any] = {"enable_gqa": queries_per_key > 1} if _supports_gqa(varlen_attn) else {}
    if queries_per_key > 1 and not gqa:
        k, v = k.repeat_interleave(queries_per_key, 1), v.repeat_interleave(queries_per_key, 1)
    out = varlen_attn(q, k, v, edges, edges, longest, longest, scale=scale, window_size=(before, 0), **gqa)
    assert isinstance(out, Tensor)
    return out


@cache
def _supports_gqa(kernel: Callable[..., Any]) -> bool:
    """Whether the kernel takes fewer heads of keys and values than of queries, as it does from torch 2.12 on."""
    return "enable_gqa" in signature(kernel).parameters


def _of_group(group: Group, q: Tensor, k: Tensor, v: Tensor, scale: float, window: int | None) -> Tensor:
    """q (tokens, H, D), k (tokens, H_kv, D), v (tokens, H_kv, D_v) → (tokens, H, D_v)."""
    count, width, (_, heads, depth) = group.count, group.width, q.shape
    q, k, v = (_spread(x, group).view(count, width, *x.shape[1:]).transpose(1, 2) for x in (q, k, v))
    narrow = window is not None and window < width
    if width > SHORT:
        mask = _mask(width, window, q.device).to(q.dtype) if narrow else None
        out = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=heads != k.shape[1]
        )
    else:  # query heads that share keys and values become rows of one matrix, so keys and values are not repeated
        kv_heads = k.shape[1]
        flat = q.reshape(count * kv_heads, -1, depth), k.reshape(-1, width, depth), v.reshape(-1, width, v.shape[-1])
        mask = _mask(width, window, q.device).repeat(heads // kv_heads, 1)
        # Scores in fp32, like those of the kernels for a single row: rounded to bf16 before the softmax, a score of 20
        # would be off by up to 0.06, and so would the logarithm of its attention weight.
        scores = torch.baddbmm(mask, flat[0].float(), flat[1].float().transpose(1, 2), alpha=scale)
        out = torch.bmm(scores.softmax(-1).to(q.dtype), flat[2]).view(count, heads, width, -1)
    return _gather(out.transpose(1, 2).reshape(count * width, heads, -1), group)


def _mask(width: int, window: int | None, device: torch.device) -> Tensor:
    """(width, width) fp32: 0 where a token may attend, −∞ elsewhere."""
    hidden = torch.ones(width, width, dtype=torch.bool, device=device).triu(1)
    if window is not None:
        hidden |= torch.ones_like(hidden).tril(-window)
    return torch.zeros(width, width, device=device).masked_fill_(hidden, -torch.inf)


def _spread(x: Tensor, group: Group) -> Tensor:
    """(tokens, ...) → (count × width, ...). The padding is on the right, where causal attention does not reach it."""
    moved: Tensor = x if group.places is None else _Spread.apply(x, group.places, group.sources)
    return moved


def _gather(x: Tensor, group: Group) -> Tensor:
    """(count × width, ...) → (tokens, ...)."""
    moved: Tensor = x if group.places is None else _Gather.apply(x, group.places)
    return moved


class _Spread(torch.autograd.Function):
    """index_select whose gradient is an index_select too. Autograd would add up the gradient element by element, though
    each token goes to exactly one place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, sources: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, sources)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return gradient.index_select(0, places), None, None


class _Gather(torch.autograd.Function):
    """The inverse of _Spread. Its gradient is a copy, for the same reason."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.rows = len(x)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.rows, *gradient.shape[1:]).index_copy_(0, places, gradient), None
