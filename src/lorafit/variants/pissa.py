"""PiSSA: LoRA that starts at the largest singular directions of the weight (Meng et al. 2024, arXiv 2404.02948).

A and B start as √S Vᵀ and U √S of the weight's largest `rank` directions, both over √s. The paper takes them out of the
weight; here the base stays as it is, and what they start as is taken off again: y = W x + b + s·(B A − B₀ A₀) x, where
A₀ and B₀ are not trained. PEFT keeps that as one pair of twice the rank, [A; A₀] and [B, −B₀].
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from lorafit.layers.kind import Layer
from lorafit.layers.site import Site
from lorafit.variants import lora
from lorafit.variants.variant import Factor, Factors, Peft, Served, Variant

ROUNDS = 8  # of the power iteration (Halko et al. 2011, arXiv 0909.4061, algorithm 4.4)
MORE = 8  # directions that it looks for beyond those that are wanted


def factors(site: Site, rank: int) -> dict[str, Factor]:
    pair = lora.factors(site, rank)
    return {**pair, "A0": Factor(pair["A"].shape, trained=False), "B0": Factor(pair["B"].shape, trained=False)}


def init(site: Site, rank: int, weight: Tensor, scaling: float, generator: Generator) -> dict[str, Tensor]:
    u, s, vt = _largest(weight.float(), rank, generator)
    root = (s / scaling).sqrt()
    a, b = torch.zeros(rank, site.d_in), torch.zeros(site.d_out, rank)
    a[: len(s)], b[:, : len(s)] = root[:, None] * vt, u * root  # a rank above the narrow side adds nothing
    return {"A": a, "B": b, "A0": a.clone(), "B0": b.clone()}


def _largest(weight: Tensor, rank: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """U (d_out, k), S (k,) and Vᵀ (k, d_in) of the largest k = min(rank, narrow side) directions."""
    narrow = min(weight.shape)
    seen = weight @ torch.randn(weight.shape[1], min(rank + MORE, narrow), generator=generator)
    for _ in range(ROUNDS):
        seen = weight @ (weight.T @ torch.linalg.qr(seen).Q)
    basis = torch.linalg.qr(seen).Q
    u, s, vt = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    k = min(rank, narrow)
    return (basis @ u)[:, :k], s[:k], vt[:k]


def computed(factors: Factors) -> dict[str, Tensor]:
    """A and what has been learnt of it, B₀ and what has been learnt of B: a cast of A alone would not hold it."""
    learnt = {"dA": factors["A"] - factors["A0"], "dB": factors["B"] - factors["B0"]}
    return {"A": factors["A"], "B0": factors["B0"], **learnt}


def forward(x: Tensor, y: Tensor, layer: Layer, factors: Factors, scaling: float) -> Tensor:
    # B A − B₀ A₀ = B₀ (A − A₀) + (B − B₀) A, in which nothing cancels: at the start nothing is added.
    with_a = layer.up(layer.down(x, factors["dA"]), factors["B0"], scaling, y)
    return layer.up(layer.down(x, factors["A"]), factors["dB"], scaling, with_a)


def delta(layer: Layer, factors: Factors, scaling: float) -> Tensor:
    parts = computed(factors)
    return lora.product({"A": parts["dA"], "B": parts["B0"]}, scaling) + lora.product(
        {"A": parts["A"], "B": parts["dB"]}, scaling
    )


def served(layer: Layer, factors: Factors, scaling: float) -> Served:
    return Served(torch.cat([factors["dA"], factors["A"]]), scaling * torch.cat([factors["B0"], factors["dB"]], dim=1))


def _written(factors: Factors) -> dict[str, Tensor]:
    return {"A": torch.cat([factors["A"], factors["A0"]]), "B": torch.cat([factors["B"], -factors["B0"]], dim=1)}


def _read(pair: Factors) -> dict[str, Tensor]:
    (a, a0), (b, b0) = pair["A"].chunk(2), pair["B"].chunk(2, dim=1)
    return {"A": a, "B": b, "A0": a0, "B0": -b0}


VARIANT = Variant(
    factors, init, forward, delta, served, computed=computed, peft=Peft(ranks=2, written=_written, read=_read)
)
