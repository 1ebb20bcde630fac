"""DoRA: y = m/‖W + s·BA‖ · (W + s·BA) x + b, norms per output (Liu et al. 2024, arXiv 2402.09353).

m (d_out,) starts at the norms of W, so that the adapted layer begins as the base's. As in section 4.3 of
the paper the norm is held constant for the gradient. m stays in fp32 and acts as its distance from one, so that
steps smaller than bf16's spacing are not lost.
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from lorafit.layers.site import Site
from lorafit.variants import lora
from lorafit.variants.variant import Factors, Frozen, Served


def shapes(site: Site, rank: int) -> dict[str, tuple[int, ...]]:
    return {**lora.shapes(site, rank), "m": (site.d_out,)}


def init(site: Site, rank: int, weight: Tensor, generator: Generator) -> dict[str, Tensor]:
    factors = lora.init(site, rank, weight, generator)
    return {**factors, "m": _norms(weight, factors, 1.0)}


def _norms(weight: Tensor, factors: Factors, scaling: float) -> Tensor:
    """‖W + s·BA‖ of every output, (d_out,) in fp32; a row of zeros (a padding token's) counts as 1e-6, not as 0/0."""
    norms: Tensor = torch.linalg.vector_norm(weight.float() + lora.delta(Frozen(weight, None), factors, scaling), dim=1)
    return norms.clamp_min(1e-6)


def forward(x: Tensor, y: Tensor, frozen: Frozen, factors: Factors, scaling: float) -> Tensor:
    with torch.no_grad():
        norms = _norms(frozen.weight, factors, scaling)
    gain = factors["m"] / norms
    linear = y if frozen.bias is None else y - frozen.bias
    low_rank = (x @ factors["A"].T) @ (factors["B"].T * scaling)
    return y + (gain - 1).to(y.dtype) * linear + gain.to(y.dtype) * low_rank


def delta(frozen: Frozen, factors: Factors, scaling: float) -> Tensor:
    weight = frozen.weight.float()
    gain = factors["m"].float() / _norms(frozen.weight, factors, scaling)
    return gain[:, None] * (weight + lora.delta(frozen, factors, scaling)) - weight


def served(frozen: Frozen, factors: Factors, scaling: float) -> Served:
    gain = factors["m"] / _norms(frozen.weight, factors, scaling)
    return Served(factors["A"], (gain * scaling)[:, None] * factors["B"], gain - 1, frozen.bias)
