"""What every method must give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

from torch import Generator, Tensor

from lorafit.layers.site import Site

Factors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Frozen:
    """The base's layer as a method may read it: weight (d_out, d_in), bias (d_out,) or None."""

    weight: Tensor
    bias: Tensor | None


@dataclass(frozen=True)
class Served:
    """What a method adds to a layer's output, ready to be used many times: B (A x), and gain · (y − bias) where it
    scales the base's part too. A (rank, d_in), B (d_out, rank) with the scale in it; gain (d_out,); bias: its own."""

    A: Tensor
    B: Tensor
    gain: Tensor | None = None
    bias: Tensor | None = None


Together = Callable[
    [Tensor, Sequence[Callable[[Tensor], Tensor]], Sequence[Frozen], Sequence[Factors], Sequence[float]],
    Sequence[Tensor],
]


@dataclass(frozen=True)
class Variant:
    """Five pure functions, and one that may be there for speed.

    shapes(site, rank) -> {factor: shape}. Factors of two dimensions are cast to the compute dtype,
        vectors stay in fp32.
    init(site, rank, weight, generator) -> {factor: fp32 tensor}, such that the layer is unchanged.
    forward(x, y, frozen, factors, scaling) -> y': x (..., d_in) is the (dropped-out) input of the layer,
        y (..., d_out) the base's output for the undropped input.
    delta(frozen, factors, scaling) -> (d_out, d_in) in fp32: what must be added to the weight.
    served(frozen, factors, scaling) -> Served: `forward(x, y, ...) - y` in the form that serves many rows. In fp32.
    together(x, originals, frozen, factors, scalings) -> [y' of each]: several layers on one undropped input, computed
        with `forward`'s result from the layers' own forwards. None: each goes by itself.
    """

    shapes: Callable[[Site, int], dict[str, tuple[int, ...]]]
    init: Callable[[Site, int, Tensor, Generator], dict[str, Tensor]]
    forward: Callable[[Tensor, Tensor, Frozen, Factors, float], Tensor]
    delta: Callable[[Frozen, Factors, float], Tensor]
    served: Callable[[Frozen, Factors, float], Served]
    together: Together | None = None
