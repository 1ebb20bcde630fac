"""The description of a kind of layer, which is what an adapter needs to act on one.

A pair of factors acts in one of two ways. Beside a module, it takes the module's input and adds to its output. Through
a module, it replaces the weight for the length of a call.
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
    # addmm multiplies and adds in one operation, which saves a tensor of the size of the layer's output.
    return torch.addmm(y.reshape(-1, y.shape[-1]), u, b.T, alpha=scaling).view(y.shape)


def _all_inputs(site: Site) -> int:
    return site.d_in


def _as_they_are(site: Site, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    return dict(tensors)


@dataclass(frozen=True)
class Kind:
    """How to read one weight of a kind of module, and how a pair of factors acts on it.

    Args:
        types: The exact types of its modules.
        widths: (module) -> (d_in, d_out).
        weight: (module) -> W (d_out, d_in). It is read whenever it is needed: a view, or a tensor made for the call.
        bias: (module) -> (d_out,) or None.
        stored: (module, matrix (d_out, d_in)) -> the matrix in the layout of the module's own weight.
        computes_as: (module) -> whether a module of another type belongs to this kind.
        down: (module, x, A (rank, d_in)) -> A x, in the form that `up` takes; for a linear layer (rows, rank).
        up: (module, the result of `down`, B (d_out, rank), scaling, y) -> y + scaling · B A x, in y's shape.
        is_product: Whether the module computes x Wᵀ + b. Only such layers are computed in groups, and served together
            with other adapters.
        any_variant: Whether methods with `any_kind=False` can act on it too.
        fan_in: (site) -> the number of inputs that act at a time; it sets the range of the initial A.
        form: (module) -> `Site.form`.
        out_dim: (module) -> the dimension of the output that has size d_out, counted from the end.
        through: (module, A, B, scaling) -> the value that replaces the module's weight during a call: the weight in its
            own layout, plus scaling · B A. None if the pair acts beside the module, by `down` and `up`.
        peft_below: The part between the module's path and the factor's name in the names of PEFT's tensors.
        peft_names: The names of factors in PEFT's files, if they differ from the method's.
        written: (site, a method's tensors) -> PEFT's tensors, if they have other shapes.
        read: (site, PEFT's tensors) -> the method's tensors, the inverse of `written`. Raises ValueError for tensors
            that `written` cannot have made.
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
    """A module of the base, as a method sees it. It keeps no tensor: each access reads the module."""

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
        """A x, in the form that `up` takes."""
        return self.kind.down(self.module, x, a)

    def up(self, u: Tensor, b: Tensor, scaling: float, y: Tensor) -> Tensor:
        """y + scaling · B u, of y's shape."""
        return self.kind.up(self.module, u, b, scaling, y)

    def by_output(self, vector: Tensor) -> Tensor:
        """A vector (d_out,) in the shape that broadcasts over the layer's output."""
        return vector.view(-1, *(1,) * (-1 - self.kind.out_dim(self.module)))
