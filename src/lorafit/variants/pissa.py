"""PiSSA: LoRA that starts at the largest singular directions of the weight (Meng et al. 2024, arXiv 2404.02948).

A and B start as A₀ = √(S/s) Vᵀ and B₀ = U √(S/s), from the `rank` largest singular values S of the weight and their
vectors. The paper subtracts s·B₀ A₀ from the weight. Here the base must not change, so the forward subtracts it:
y = W x + b + s·(B A − B₀ A₀) x, where A₀ and B₀ are not trained. PEFT stores this as one pair of twice the rank,
[A; A₀] and [B, −B₀].
"""

from __future__ import annotations

import torch
from torch import Generator, Tensor

from lorafit.layers.kind import Layer
from lorafit.layers.site import Site
from lorafit.variants import lora
from lorafit.variants.variant import Factor, Factors, Peft, Served, Variant

ITERATIONS = 8  # of the randomized subspace iteration (Halko et al. 2011, arXiv 0909.4061, algorithm 4.4)
OVERSAMPLING = 8  # directions that it computes in addition to those that are returned


def factors(site: Site, rank: int) -> dict[str, Factor]:
    pair = lora.factors(site, rank)
    return {**pair, "A0": Factor(pair["A"].shape, trained=False), "B0": Factor(pair["B"].shape, trained=False)}


def init(site: Site, rank: int, weight: Tensor, scaling: float, generator: Generator) -> dict[str, Tensor]:
    u, s, vt = _largest(weight.float(), rank, generator)
    root = (s / scaling).sqrt()
    a, b = torch.zeros(rank, site.d_in), torch.zeros(site.d_out, rank)
    a[: len(s)], b[:, : len(s)] = root[:, None] * vt, u * root  # a rank above min(d_out, d_in) leaves zeros
    return {"A": a, "B": b, "A0": a.clone(), "B0": b.clone()}


def _largest(weight: Tensor, rank: int, generator: Generator) -> tuple[Tensor, Tensor, Tensor]:
    """U (d_out, k), S (k,) and Vᵀ (k, d_in) of the k = min(rank, d_out, d_in) largest singular values."""
    narrow = min(weight.shape)
    sample = weight @ torch.randn(weight.shape[1], min(rank + OVERSAMPLING, narrow), generator=generator)
    for _ in range(ITERATIONS):
        sample = weight @ (weight.T @ torch.linalg.qr(sample).Q)
    basis = torch.linalg.qr(sample).Q
    u, s, vt = torch.linalg.svd(basis.T @ weight, full_matrices=False)
    k = min(rank, narrow)
    return (basis @ u)[:, :k], s[:k], vt[:k]


def computed(factors: Factors) -> dict[str, Tensor]:
    """A, B₀, A − A₀ and B − B₀. The differences are small, and would be lost if A and B were cast to bf16 first."""
    differences = {"dA": factors["A"] - factors["A0"], "dB": factors["B"] - factors["B0"]}
    return {"A": factors["A"], "B0": factors["B0"], **differences}


def forward(x: Tensor, y: Tensor, layer: Layer, factors: Factors, scaling: float) -> Tensor:
    # B A − B₀ A₀ = B₀ (A − A₀) + (B − B₀) A. The right side subtracts no large products: at the start it is exactly 0.
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
