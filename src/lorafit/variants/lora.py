"""LoRA: y = W x + b + s·B A x (Hu et al. 2021, arXiv 2106.09685).

A (rank, d_in) starts uniform in ±1/√d_in, the range of the layer itself (±1 where one input acts at a time); B
(d_out, rank) starts at zero, so that the adapted layer begins as the base's. Experts have a pair each, which lie in one
A (experts, rank, d_in) and one B (experts, d_out, rank).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Generator, Tensor
from torch.autograd.function import once_differentiable

from lorafit.layers import KINDS
from lorafit.layers.kind import Layer
from lorafit.layers.site import Site
from lorafit.variants.variant import Factor, Factors, Served, Variant


def factors(site: Site, rank: int) -> dict[str, Factor]:
    each = (site.count,) if site.count > 1 else ()
    return {"A": Factor((*each, rank, site.d_in)), "B": Factor((*each, site.d_out, rank))}


def init(site: Site, rank: int, weight: Tensor, scaling: float, generator: Generator) -> dict[str, Tensor]:
    bound = 1 / math.sqrt(KINDS[site.kind].fan_in(site))
    shapes = {name: factor.shape for name, factor in factors(site, rank).items()}
    a = torch.empty(shapes["A"]).uniform_(-bound, bound, generator=generator)
    return {"A": a, "B": torch.zeros(shapes["B"])}


def forward(x: Tensor, y: Tensor, layer: Layer, factors: Factors, scaling: float) -> Tensor:
    return layer.up(layer.down(x, factors["A"]), factors["B"], scaling, y)


def product(factors: Factors, scaling: float) -> Tensor:
    """s·B A, (d_out, d_in) in fp32; of every expert."""
    return scaling * (factors["B"].float() @ factors["A"].float())


def delta(layer: Layer, factors: Factors, scaling: float) -> Tensor:
    return product(factors, scaling)


def served(layer: Layer, factors: Factors, scaling: float) -> Served:
    return Served(factors["A"], scaling * factors["B"])


def together(
    x: Tensor,
    originals: Sequence[Callable[[Tensor], Tensor]],
    layers: Sequence[Layer],
    factors: Sequence[Factors],
    scalings: Sequence[float],
) -> Sequence[Tensor]:
    """`forward` of several layers on one input, bit for bit, with one backward for all that keeps x once."""
    pairs = [factor for each in factors for factor in (each["A"], each["B"])]
    outputs: Sequence[Tensor] = _Together.apply(x, originals, layers, scalings, *pairs)
    return outputs


class _Together(torch.autograd.Function):
    """y_i = W_i x + s_i·B_i A_i x. Kept for the backward: x, the factors, and A x, which is as narrow as the ranks.

    Products of a few rows are written in the order in which they are fast: on two cores g B takes 1.7 times as long
    as Bᵀ gᵀ, and gᵀ u up to 3 times as long as uᵀ g (376 tokens, fp32).
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        originals: Sequence[Callable[[Tensor], Tensor]],
        layers: Sequence[Layer],
        scalings: Sequence[float],
        *pairs: Tensor,
    ) -> tuple[Tensor, ...]:
        a, b = pairs[::2], pairs[1::2]
        flat = x.reshape(-1, x.shape[-1])
        outputs, inner = [], []
        for original, down, up, scaling in zip(originals, a, b, scalings, strict=True):
            inner.append(flat @ down.T)
            y = original(x)
            y.view(-1, y.shape[-1]).addmm_(inner[-1], up.T, alpha=scaling)
            # A layer with a bias gives a view: whoever follows could not write to it (clamp_, an in-place activation).
            outputs.append(torch.ops.aten._unsafe_view(y, y.shape))
        ctx.save_for_backward(flat, torch.cat(a), *inner, *b)
        ctx.layers, ctx.scalings, ctx.shape, ctx.ranks = layers, scalings, x.shape, [len(down) for down in a]
        return tuple(outputs)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *upstream: Tensor) -> tuple[Tensor | None, ...]:
        flat, joined, *kept = ctx.saved_tensors
        inner, b = kept[: len(upstream)], kept[len(upstream) :]
        through = joined.new_empty(len(joined), len(flat))  # (ranks, tokens): s·Bᵀ gᵀ of each
        to_x: Tensor | None = None
        to_b = []
        parts = zip(upstream, inner, b, ctx.layers, ctx.scalings, through.split(ctx.ranks), strict=True)
        for gradient, own, up, layer, scaling, behind in parts:
            g = gradient.reshape(-1, gradient.shape[-1])
            torch.mm(up.T, g.T, out=behind).mul_(scaling)
            to_b.append((own.T @ g).mul_(scaling).T)
            if ctx.needs_input_grad[0]:
                to_x = g @ layer.weight if to_x is None else to_x.addmm_(g, layer.weight)
        to_a = (through @ flat).split(ctx.ranks)
        if to_x is not None:
            to_x = to_x.addmm_(through.T, joined).view(ctx.shape)
        return to_x, None, None, None, *(each for pair in zip(to_a, to_b, strict=True) for each in pair)


VARIANT = Variant(factors, init, forward, delta, served, together)
