"""DoRA: y = m/‖W + s·BA‖ · (W + s·BA) x + b, with one norm per output (Liu et al. 2024, arXiv 2402.09353).

m (d_out,) starts as the norms of W, so a fresh adapter changes nothing. The gradient treats the norm as a constant, as
in section 4.3 of the paper. m stays in fp32, and the output is computed from m/‖W + s·BA‖ − 1, so that steps smaller
than the spacing of bf16 numbers are not lost.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from lorafit.layers.kind import Layer
from lorafit.layers.site import Site
from lorafit.variants import lora
from lorafit.variants.variant import Factor, Factors, Peft, Served, Variant


def factors(site: Site, rank: int) -> dict[str, Factor]:
    return {**lora.factors(site, rank), "m": Factor((site.d_out,))}


def init(site: Site, rank: int, weight: Tensor, scaling: float, generator: Generator) -> dict[str, Tensor]:
    pair = lora.init(site, rank, weight, scaling, generator)
    return {**pair, "m": _norms(weight, pair, 1.0)}


def _norms(weight: Tensor, factors: Factors, scaling: float) -> Tensor:
    """‖W + s·BA‖ for each output, (d_out,) in fp32. It is at least 1e-6, so that a row of zeros, such as that of a
    padding token, does not lead to 0/0."""
    norms: Tensor = torch.linalg.vector_norm(weight.float() + lora.product(factors, scaling), dim=1)
    return norms.clamp_min(1e-6)


def forward(x: Tensor, y: Tensor, layer: Layer, factors: Factors, scaling: float) -> Tensor:
    with torch.no_grad():
        norms = _norms(layer.weight, factors, scaling)
    gain = layer.by_output(factors["m"] / norms)
    linear = y if layer.bias is None else y - layer.by_output(layer.bias)
    low_rank = layer.up(layer.down(x, factors["A"]), factors["B"] * scaling, 1.0, torch.zeros_like(y))
    return y + (gain - 1).to(y.dtype) * linear + gain.to(y.dtype) * low_rank


def delta(layer: Layer, factors: Factors, scaling: float) -> Tensor:
    weight = layer.weight.float()
    gain = factors["m"].float() / _norms(weight, factors, scaling)
    return gain[:, None] * (weight + lora.product(factors, scaling)) - weight


def served(layer: Layer, factors: Factors, scaling: float) -> Served:
    gain = factors["m"] / _norms(layer.weight, factors, scaling)
    return Served(factors["A"], (gain * scaling)[:, None] * factors["B"], gain - 1, layer.bias)


VARIANT = Variant(
    factors,
    init,
    forward,
    delta,
    served,
    peft=Peft({**Peft().names, "m": "lora_magnitude_vector"}, {"use_dora": True}),
    any_kind=False,
)
