"""What every module kind must tell."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor, nn


def _never(module: nn.Module) -> bool:
    return False


@dataclass(frozen=True)
class Kind:
    """How to read one kind of module.

    types: the exact types. widths(module) -> (d_in, d_out). weight(module) -> (d_out, d_in), a view.
    bias(module) -> (d_out,) or None. stored(delta) turns a (d_out, d_in) matrix into the layout of the
    module's own weight. computes_as(module) -> whether a module of another type is one of this kind.
    """

    types: tuple[type[nn.Module], ...]
    widths: Callable[[nn.Module], tuple[int, int]]
    weight: Callable[[nn.Module], Tensor]
    bias: Callable[[nn.Module], Tensor | None]
    stored: Callable[[Tensor], Tensor]
    computes_as: Callable[[nn.Module], bool] = _never
