"""The linear products of the base, by the C++ kernel where it is faster than torch, and in 8 bits if asked for.

A step that gives a few requests their next token is bound by reading the weights: the kernel reads each once, in order,
for all rows. Where torch has no fast product for the dtype on this processor, the kernel is also faster for many rows.
Both are timed when the engine opens. 8-bit weights are made from the base in memory, with a scale for each output, and
take a quarter to half of the bytes.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.bases.base import Base
from lorafit.errors import BaseError
from lorafit.serving.native import Kernels, Parts
from lorafit.serving.timing import ROWS, SECOND, UNTIMED, bytes_for, compared


@dataclass(frozen=True, eq=False)
class Weight:
    """A layer: weight (d_out, d_in), of the base or int8; scale (d_out,) fp32, for int8; bias (d_out,) or None."""

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None


class Products:
    """The products of a base's plain linear layers, by number of the site. timings: of the kernel (first) and torch."""

    def __init__(self, base: Base, kernels: Kernels | None, eight_bit: bool = False, timed: bool = True):
        self.kernels = kernels
        self.plain: dict[int, Weight] = {}
        self.eight: dict[int, Weight] = {}
        self.timings = SECOND
        if kernels is None:
            return
        quantized: dict[int, tuple[Tensor, Tensor]] = {}  # by address, since a tied head shares its weight
        for number, site in enumerate(base.sites):
            module = base.model.get_submodule(site.path)
            if type(module) is nn.Linear and module.weight.is_contiguous():
                weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
                self.plain[number] = Weight(weight, None, bias)
                if eight_bit:
                    key = weight.data_ptr()
                    quantized[key] = quantized.get(key) or _quantized(weight)
                    self.eight[number] = Weight(*quantized[key], bias)
        if eight_bit and len(self.plain) < len(base.sites):
            raise BaseError(
                f"'{base.name}': 8-bit weights need plain linear layers, and some of its are not: leave eight_bit out"
            )
        if self.plain and not eight_bit:
            self.timings = compared(self._ways, ROWS) if timed else UNTIMED

    @property
    def bytes(self) -> int:
        """The memory of the 8-bit weights."""
        return sum({layer.weight.data_ptr(): layer.weight.nbytes for layer in self.eight.values()}.values())

    def for_rows(self, rows: int) -> dict[int, Weight]:
        """The layers that the kernel computes in a step of this many rows, by site; torch computes the others. 8-bit
        weights are used for any number: the result of a row must not depend on the other rows."""
        return self.eight or (self.plain if self.timings.faster(rows) else {})

    def of(self, number: int, x: Tensor, original: Callable[[Tensor], Tensor], parts: Parts | None = None) -> Tensor:
        """The output of a site for x (1, N, d_in), with what the adapters of these parts add."""
        layer = self.for_rows(x.shape[1]).get(number)
        if layer is not None and self.kernels is not None:
            return self.kernels.linear(x.contiguous(), layer.weight, layer.scale, layer.bias, parts)
        y = original(x)
        if parts is not None and self.kernels is not None:
            self.kernels.add(y, x.contiguous(), parts)
        return y

    def _ways(self, rows: int) -> tuple[Callable[[], object], Callable[[], object], float]:
        """Products of this many rows by the kernel and by torch, for `compared`, of as many weights as are timed."""
        assert self.kernels is not None
        linear, weights = self.kernels.linear, [layer.weight for layer in self.plain.values()]
        some: list[Tensor] = []
        for weight in weights:
            if sum(chosen.nbytes for chosen in some) < bytes_for(rows):
                some.append(weight)
        inputs = {width: torch.ones(1, rows, width, dtype=some[0].dtype) for width in {w.shape[1] for w in some}}
        return (
            lambda: [linear(inputs[weight.shape[1]], weight, None, None) for weight in some],
            lambda: [F.linear(inputs[weight.shape[1]], weight) for weight in some],
            sum(weight.nbytes for weight in some) / sum(weight.nbytes for weight in weights),
        )


def _quantized(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (d_out, d_in) → int8, and the scale of each output (d_out,) fp32. Symmetric: zero stays zero."""
    wide = weight.float()
    scale = wide.abs().amax(1).clamp_min(1e-12) / 127
    return (wide / scale[:, None]).round_().to(torch.int8), scale
