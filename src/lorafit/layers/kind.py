"""What every kind of module must say of itself, so that an adapter can act on it.

A pair acts beside a module, on what it is given and what it returns, or through it: the module computes with another
weight for the length of a call.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from lorafit.layers.site import Site


def _never(module: nn.Module) -> bool:
    return False


def _down(module: nn.Module, x: Tensor, a: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1]) @ a.T


def _up(module: nn.Module, u: Tensor, b: Tensor, scaling: float, y: Tensor) -> Tensor:
    # One product that adds in place of two operations: y is as large as the layer's output.
    return torch.addmm(y.reshape(-1, y.shape[-1]), u, b.T, alpha=scaling).view(y.shape)


def _all_inputs(site: Site) -> int:
    return site.d_in


def _as_they_are(site: Site, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(tensors)


@dataclass(frozen=True)
class Kind:
    """How to read one weight of one kind of module, and how a pair of factors acts on it: beside the module, or through
    it, which then computes with another weight for the length of a call.

    Args:
        types: The exact types of its modules.
        widths: (module) -> (d_in, d_out).
        weight: (module) -> W (d_out, d_in), read when it is asked for: a view, or made for the moment.
        bias: (module) -> (d_out,) or None.
        stored: (module, matrix (d_out, d_in)) -> the matrix in the layout of the module's own weight.
        computes_as: (module) -> whether a module of another type is one of this kind.
        down: (module, x, A (rank, d_in)) -> A x, as `up` takes it: of a product (rows, rank).
        up: (module, what `down` gave, B (d_out, rank), scaling, y) -> y + scaling · B A x, of y's shape.
        is_product: Whether it computes x Wᵀ + b: only such layers go together, and are served to many at once.
        any_variant: Whether methods act on it whose `any_kind` is False.
        fan_in: (site) -> how many of its inputs act at a time: the start of A is as large as theirs.
        form: (module) -> `Site.form`.
        out_dim: (module) -> the dimension of its output along which d_out lies, counted from the end.
        through: (module, A, B, scaling) -> what the module computes with in place of its weight, for a call: the weight
            as it keeps it, plus scaling · B A. None where a pair acts beside the module, by `down` and `up`.
        peft_below: What stands after the path of the module in the names of PEFT's tensors.
        peft_names: By factor, its name in PEFT's files, where that differs from the method's.
        written: (site, a method's tensors) -> those of PEFT's files, where they have other shapes.
        read: (site, what `written` gave) -> the tensors it was given. Raises ValueError for what it cannot have been.
    """

    types: tuple[type[nn.Module], ...]
    widths: Callable[[nn.Module], tuple[int, int]]
    weight: Callable[[nn.Module], Tensor]
    bias: Callable[[nn.Module], Tensor | None]
    stored: Callable[[nn.Module, Tensor], Tensor]
    computes_as: Callable[[nn.Module], bool] = _never
    down: Callable[[nn.Module, Tensor, Tensor], Tensor] = _down
    up: Callable[[nn.Module, Tensor, Tensor, float, Tensor], Tensor] = _up
    is_product: bool = True
    any_variant: bool = True
    fan_in: Callable[[Site], int] = _all_inputs
    form: Callable[[nn.Module], tuple[int, ...]] = lambda module: ()
    out_dim: Callable[[nn.Module], int] = lambda module: -1
    through: Callable[[nn.Module, Tensor, Tensor, float], Any] | None = None
    peft_below: str = ""
    peft_names: Mapping[str, str] = field(default_factory=dict)
    written: Callable[[Site, Mapping[str, Tensor]], dict[str, Tensor]] = _as_they_are
    read: Callable[[Site, Mapping[str, Tensor]], dict[str, Tensor]] = _as_they_are


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
        """A x, as `up` takes it."""
        return self.kind.down(self.module, x, a)

    def up(self, u: Tensor, b: Tensor, scaling: float, y: Tensor) -> Tensor:
        """y + scaling · B u, of y's shape."""
        return self.kind.up(self.module, u, b, scaling, y)

    def by_output(self, vector: Tensor) -> Tensor:
        """A vector (d_out,) in the shape in which it acts on the layer's output."""
        return vector.view(-1, *(1,) * (-1 - self.kind.out_dim(self.module)))
