"""What every method must give."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Generator, Tensor

from lorafit.layers.kind import Layer
from lorafit.layers.site import Site

Factors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Factor:
    """What a method declares of one of its tensors. trained: False for one that stays as it was at the start."""

    shape: tuple[int, ...]
    trained: bool = True


@dataclass(frozen=True)
class Served:
    """What a method adds to a layer's output, ready to be used many times: B (A x), and gain · (y − bias) where it
    scales the base's part too. A (rank, d_in), B (d_out, rank) with the scale in it; gain (d_out,); bias: its own."""

    A: Tensor
    B: Tensor
    gain: Tensor | None = None
    bias: Tensor | None = None


Together = Callable[
    [Tensor, Sequence[Callable[[Tensor], Tensor]], Sequence[Layer], Sequence[Factors], Sequence[float]],
    Sequence[Tensor],
]


def _by_rank(alpha: float, rank: int) -> float:
    return alpha / rank


def _times_rank(scaling: float, rank: int) -> float:
    return scaling * rank


def _as_they_are(factors: Factors) -> dict[str, Tensor]:
    return dict(factors)


@dataclass(frozen=True)
class Peft:
    """How PEFT keeps a method.

    Args:
        names: By factor, its name below the module's path.
        config: Settings of adapter_config.json that say which method it is.
        ranks: Ranks of PEFT's pair for one of ours; its alpha grows with them, so that the scale stays.
        written: (our factors) -> PEFT's pair, where they are not the same tensors.
        read: What `written` gave -> our factors, bit for bit.
    """

    names: Mapping[str, str] = field(default_factory=lambda: {"A": "lora_A.weight", "B": "lora_B.weight"})
    config: Mapping[str, bool] = field(default_factory=dict)
    ranks: int = 1
    written: Callable[[Factors], dict[str, Tensor]] = _as_they_are
    read: Callable[[Factors], dict[str, Tensor]] = _as_they_are


@dataclass(frozen=True)
class Variant:
    """A method: its factors, five pure functions of them, and one that may be there for speed.

    Args:
        factors: (site, rank) -> what is declared of each factor, by name. Those of two dimensions are cast to the
            compute dtype, vectors stay in fp32.
        init: (site, rank, weight (d_out, d_in), scaling, generator) -> fp32 tensors by factor, such that the layer is
            unchanged.
        forward: (x, y, layer, factors, scaling) -> y'. x: the (dropped-out) input of the layer; y: the base's
            output for the undropped input.
        delta: (layer, factors, scaling) -> (d_out, d_in) in fp32, of factors as they are kept: what the weight lacks.
        served: (layer, factors, scaling) -> `forward(x, y, ...) - y` in the form that serves many rows, in fp32.
        together: (x, originals, layers, factors, scalings) -> [y' of each]: several products on one undropped input,
            computed with `forward`'s result from the layers' own forwards. None: each goes on its own.
        scaling: (alpha, rank) -> the scale of the pair.
        alpha: (scaling, rank) -> the alpha that gives it.
        computed: (factors in fp32) -> what `forward` and `served` are given of them, cast: differences are taken before
            a cast would lose them.
        peft: How PEFT keeps it.
        any_kind: Whether it acts on layers of every kind, also those whose `any_variant` is False.
    """

    factors: Callable[[Site, int], dict[str, Factor]]
    init: Callable[[Site, int, Tensor, float, Generator], dict[str, Tensor]]
    forward: Callable[[Tensor, Tensor, Layer, Factors, float], Tensor]
    delta: Callable[[Layer, Factors, float], Tensor]
    served: Callable[[Layer, Factors, float], Served]
    together: Together | None = None
    scaling: Callable[[float, int], float] = _by_rank
    alpha: Callable[[float, int], float] = _times_rank
    computed: Callable[[Factors], dict[str, Tensor]] = _as_they_are
    peft: Peft = field(default_factory=Peft)
    any_kind: bool = True
