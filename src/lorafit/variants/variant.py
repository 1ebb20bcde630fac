"""The description of a method: its factors, how it computes with them, and how PEFT stores them."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

from torch import Generator, Tensor

from lorafit.layers.kind import Layer
from lorafit.layers.site import Site

Factors = Mapping[str, Tensor]


@dataclass(frozen=True)
class Factor:
    """The declaration of one tensor of a method.

    Args:
        shape: Its shape.
        trained: Whether training changes it; False for a tensor that keeps its initial value.
    """

    shape: tuple[int, ...]
    trained: bool = True


@dataclass(frozen=True)
class Served:
    """The change that a method makes to a layer's output y, in the form in which the engine computes it:
    B (A x) + gain · (y − bias).

    Args:
        A: (rank, d_in).
        B: (d_out, rank), multiplied by the scale.
        gain: (d_out,) if the method also scales the base's output; otherwise None.
        bias: The layer's bias (d_out,), or None. Used only with a gain.
    """

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
    """How PEFT stores a method.

    Args:
        names: The names of the factors below the module's path.
        config: The settings of adapter_config.json that select the method.
        ranks: PEFT's rank divided by ours. PEFT's alpha is multiplied by it too, so that the scale is the same.
        written: (our factors) -> PEFT's tensors, if they differ from ours.
        read: (PEFT's tensors) -> our factors, bit for bit; the inverse of `written`.
    """

    names: Mapping[str, str] = field(default_factory=lambda: {"A": "lora_A.weight", "B": "lora_B.weight"})
    config: Mapping[str, bool] = field(default_factory=dict)
    ranks: int = 1
    written: Callable[[Factors], dict[str, Tensor]] = _as_they_are
    read: Callable[[Factors], dict[str, Tensor]] = _as_they_are


@dataclass(frozen=True)
class Variant:
    """A method: the declaration of its factors, and pure functions of them.

    Args:
        factors: (site, rank) -> the declaration of each factor, by name. Matrices are cast to the compute dtype;
            vectors stay in fp32.
        init: (site, rank, weight (d_out, d_in), scaling, generator) -> the initial factors in fp32, by name. With them
            the layer's output does not change.
        forward: (x, y, layer, factors, scaling) -> the adapted output, in y's shape. x is the layer's input after
            dropout; y is the base's output for the input before dropout.
        delta: (layer, factors, scaling) -> the change of the weight (d_out, d_in) in fp32, from the stored factors.
        served: (layer, factors, scaling) -> `forward(x, y, ...) - y` in the engine's form, in fp32.
        together: (x, originals, layers, factors, scalings) -> the adapted outputs of several layers on one input
            without dropout, equal to `forward`'s. None if each layer must be computed on its own.
        scaling: (alpha, rank) -> the scale of the pair.
        alpha: (scaling, rank) -> the alpha that gives this scale.
        computed: (stored factors in fp32) -> the tensors that `forward` and `served` receive after a cast. Differences
            of factors belong here, because a cast would lose them.
        peft: How PEFT stores the method.
        any_kind: Whether it can act on layers of every kind, including those with `any_variant=False`.
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
