"""What every kind of module must say of itself, so that an adapter can act on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from lorafit.layers.site import Site


def _never(module: nn.Module) -> bool:
    return False


def _down(x: Tensor, a: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]) @ a.T


def _up(u: Tensor, b: Tensor, scaling: float, y: Tensor) -> Tensor:
    # One product that adds in place of two operations: y is as large as the layer's output.
    return torch.addmm(y.reshape(-1, y.shape[-1]), u, b.T, alpha=scaling).view(y.shape)


def _all_inputs(site: Site) -> int:
    return site.d_in


@dataclass(frozen=True)
class Kind:
    """How to read one kind of module, and how a pair of factors acts beside it.

    Args:
        types: The exact types of its modules.
        widths: (module) -> (d_in, d_out).
        weight: (module) -> W (d_out, d_in), read when it is asked for: a view, or made for the moment.
        bias: (module) -> (d_out,) or None.
        stored: A matrix (d_out, d_in) in the layout of the module's own weight.
        computes_as: (module) -> whether a module of another type is one of this kind.
        down: (x, A (rank, d_in)) -> A x of every row of x, (rows, rank).
        up: (u (rows, rank), B (d_out, rank), scaling, y) -> y + scaling · B u, of y's shape.
        is_product: Whether it computes x Wᵀ + b: only such layers go together, and are served to many at once.
        fan_in: (site) -> how many of its inputs act at a time: the start of A is as large as theirs.
        peft_names: By factor, its name in PEFT's files, where that differs from the method's.
    """

    types: tuple[type[nn.Module], ...]
    widths: Callable[[nn.Module], tuple[int, int]]
    weight: Callable[[nn.Module], Tensor]
    bias: Callable[[nn.Module], Tensor | None]
    stored: Callable[[Tensor], Tensor]
    computes_as: Callable[[nn.Module], bool] = _never
    down: Callable[[Tensor, Tensor], Tensor] = _down
    up: Callable[[Tensor, Tensor, float, Tensor], Tensor] = _up
    is_product: bool = True
    fan_in: Callable[[Site], int] = _all_inputs
    peft_names: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, eq=False)
class Layer:
    """A module of the base as a method may use it; nothing of it is kept but the module."""

    kind: Kind
    module: nn.Module

    @property
    def weight(self) -> Tensor:
        """W (d_out, d_in)."""
        return self.kind.weight(self.module)

    @property
    def bias(self) -> Tensor | None:
        """(d_out,), or None."""
        return self.kind.bias(self.module)

    def down(self, x: Tensor, a: Tensor) -> Tensor:
        """A x of every row of x, (rows, rank)."""
        return self.kind.down(x, a)

    def up(self, u: Tensor, b: Tensor, scaling: float, y: Tensor) -> Tensor:
        """y + scaling · B u, of y's shape."""
        return self.kind.up(u, b, scaling, y)
