"""LoRA: y = W x + b + s·B A x (Hu et al. 2021, arXiv 2106.09685).

A (rank, d_in) starts uniform in ±1/√d_in, the range of the layer itself; B (d_out, rank) starts at zero,
so that the adapted layer begins as the base's.
"""

from __future__ import annotations

import math

import torch
from torch import Generator, Tensor

from lorafit.sites import Site
from lorafit.variants.variant import Factors, Frozen


def shapes(site: Site, rank: int) -> dict[str, tuple[int, ...]]:
    return {"A": (rank, site.d_in), "B": (site.d_out, rank)}


def init(site: Site, rank: int, weight: Tensor, generator: Generator) -> dict[str, Tensor]:
    bound = 1 / math.sqrt(site.d_in)
    a = torch.empty(rank, site.d_in).uniform_(-bound, bound, generator=generator)
    return {"A": a, "B": torch.zeros(site.d_out, rank)}


def forward(x: Tensor, y: Tensor, frozen: Frozen, factors: Factors, scaling: float) -> Tensor:
    # One product that adds in place of two operations: y is as large as the layer's output.
    inner = x.reshape(-1, x.shape[-1]) @ factors["A"].T
    return torch.addmm(y.reshape(-1, y.shape[-1]), inner, factors["B"].T, alpha=scaling).view(y.shape)


def delta(frozen: Frozen, factors: Factors, scaling: float) -> Tensor:
    return scaling * (factors["B"].float() @ factors["A"].float())
