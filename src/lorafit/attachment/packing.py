"""Rows packed one behind the other in one sequence, with attention that keeps them apart.

Everything in a decoder but attention treats tokens one by one, so packed rows cost no padding. Attention is computed
row by row: the cost is the sum of the squares of their lengths. No row can see another, for none is in its product.
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

NAME = "lorafit_packed"  # under which transformers finds `attention`
# Up to this length, rows of like lengths share one padded product whose scores are kept for the backward: on two cores
# a fifth faster than the flash kernel, for a few KB a token. Longer rows go through the kernel, one by one.
SHORT = 128
ALIKE = 0.75  # a row joins a product that is at most this much wider


@dataclass(frozen=True)
class Group:
    """Neighbouring rows whose attention is one product: `count` rows of at most `width` tokens, `tokens` in all.

    places (tokens,): of each token among count × width; None where every row is as wide. sources (count × width,): the
    other way round, any token for padding.
    """

    count: int
    width: int
    tokens: int
    places: Tensor | None
    sources: Tensor | None


@dataclass(frozen=True, eq=False)
class Segments:
    """Where each row of a pack lies. `lengths` in tokens, in order; tensors are on `device`."""

    lengths: tuple[int, ...]
    device: torch.device

    @cached_property
    def positions(self) -> Tensor:
        """(1, N): every row counts its tokens from zero."""
        return torch.cat([torch.arange(n) for n in self.lengths])[None].to(self.device)

    @cached_property
    def edges(self) -> Tensor:
        """(rows + 1,) int32: where rows begin and end, as kernels for rows of many lengths want it."""
        return torch.tensor([0, *self.lengths]).cumsum(0).to(self.device, torch.int32)

    @cached_property
    def groups(self) -> tuple[Group, ...]:
        """Neighbours in as few products as their lengths allow."""
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
    """Causal attention within each row of a pack, in the form transformers calls it, which is why it has more
    than six parameters.

    query (1, H, N, D), key (1, H_kv, N, D), value (1, H_kv, N, D_v) → (1, N, H, D_v). attention_mask: as `window`
    gives it. Raises AttachError for what it does not compute.
    """
    strange = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if attention_mask is not None and (attention_mask.ndim or int(attention_mask) != sliding_window):
        strange.append("a mask of its own")
    if segments is None or strange or dropout or len(query) != 1 or not getattr(module, "is_causal", True):
        what = ", ".join(strange) or "a call without segments"
        raise AttachError(f"attention of packed rows: {what} is not computed: leave packing() first")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    q, k, v = (x[0].transpose(0, 1) for x in (query, key, value))  # (N, heads, D)
    if query.is_cuda and query.dtype != torch.float32:
        return _varlen(q, k, v, segments, scale, sliding_window)[None], None
    sizes = [group.tokens for group in segments.groups]
    parts = zip(segments.groups, q.split(sizes), k.split(sizes), v.split(sizes), strict=True)
    outs = [_of_group(group, one, of, to, scale, sliding_window) for group, one, of, to in parts]
    # Contiguous as every attention of transformers gives it: some families view it in another shape.
    return (outs[0].contiguous() if len(outs) == 1 else torch.cat(outs))[None], None


def window(*_: Any, local_size: int | None = None, use_vmap: bool = False, **__: Any) -> Tensor | None:
    """In place of a mask: how far back it would let a token look, for `attention` to compare with what its layer says.
    Some families limit attention by the mask alone, within chunks or a window that no short row would show."""
    if use_vmap:
        raise AttachError("attention of packed rows: a mask of its own is not computed: leave packing() first")
    return None if local_size is None else torch.tensor(local_size)


def _varlen(q: Tensor, k: Tensor, v: Tensor, segments: Segments, scale: float, window: int | None) -> Tensor:
    """torch's kernel for rows of many lengths (CUDA, half precision)."""
    from torch.nn.attention.varlen import varlen_attn

    edges, longest = segments.edges, max(segments.lengths)
    behind, share = -1 if window is None else window - 1, q.shape[1] // k.shape[1]
    named: dict[str, Any] = {"enable_gqa": share > 1} if _shares_heads(varlen_attn) else {}
    if share > 1 and not named:
        k, v = k.repeat_interleave(share, 1), v.repeat_interleave(share, 1)
    out = varlen_attn(q, k, v, edges, edges, longest, longest, scale=scale, window_size=(behind, 0), **named)
    assert isinstance(out, Tensor)
    return out


@cache
def _shares_heads(kernel: Callable[..., Any]) -> bool:
    """Whether keys and values may have fewer heads than queries: from torch 2.12 on."""
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
    else:  # the heads that share keys and values stand below each other: nothing is repeated
        kept = k.shape[1]
        flat = q.reshape(count * kept, -1, depth), k.reshape(-1, width, depth), v.reshape(-1, width, v.shape[-1])
        mask = _mask(width, window, q.device).repeat(heads // kept, 1)
        # Scores in fp32, as the kernels of a row on its own accumulate them: rounded to bf16 before the softmax, a
        # score of 20 is off by up to 0.06, and so is the logarithm of the weight it becomes.
        scores = torch.baddbmm(mask, flat[0].float(), flat[1].float().transpose(1, 2), alpha=scale)
        out = torch.bmm(scores.softmax(-1).to(q.dtype), flat[2]).view(count, heads, width, -1)
    return _gather(out.transpose(1, 2).reshape(count * width, heads, -1), group)


def _mask(width: int, window: int | None, device: torch.device) -> Tensor:
    """(width, width) fp32: 0 where a token may look, −∞ where not."""
    hidden = torch.ones(width, width, dtype=torch.bool, device=device).triu(1)
    if window is not None:
        hidden |= torch.ones_like(hidden).tril(-window)
    return torch.zeros(width, width, device=device).masked_fill_(hidden, -torch.inf)


def _spread(x: Tensor, group: Group) -> Tensor:
    """(tokens, ...) → (count × width, ...). Padding is on the right, where no token of its row looks."""
    moved: Tensor = x if group.places is None else _Spread.apply(x, group.places, group.sources)
    return moved


def _gather(x: Tensor, group: Group) -> Tensor:
    """(count × width, ...) → (tokens, ...)."""
    moved: Tensor = x if group.places is None else _Gather.apply(x, group.places)
    return moved


class _Spread(torch.autograd.Function):
    """Its gradient picks where autograd's own would add, one by one: each token goes to one place."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor, sources: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return x.index_select(0, sources)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return gradient.index_select(0, places), None, None


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        ctx.rows = len(x)
        return x.index_select(0, places)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        (places,) = ctx.saved_tensors
        return gradient.new_zeros(ctx.rows, *gradient.shape[1:]).index_copy_(0, places, gradient), None
