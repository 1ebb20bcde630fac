"""The base's own products, where the kernel is faster than torch; and in 8 bits, if asked.

A step that gives a few requests their next token is bound by reading the weights: each is read once, in order, for all
rows. In a dtype that torch has no fast product for on this processor the kernel is taken for many rows too. Both are
timed when the engine opens. 8-bit weights are made from the base in memory, a scale for each output: they are a quarter
to half of the bytes.
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
    """weight (d_out, d_in), of the base or in 8 bits; scale (d_out,) fp32 of the latter; bias (d_out,) or None."""

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None


class Products:
    """The products of a base's plain linear layers. timings: of the kernel, and of torch, on this machine."""

    def __init__(self, base: Base, kernels: Kernels | None, eight_bit: bool = False, timed: bool = True):
        self.kernels = kernels
        self.plain: dict[int, Weight] = {}
        self.eight: dict[int, Weight] = {}
        self.timings = SECOND
        if kernels is None:
            return
        made: dict[int, tuple[Tensor, Tensor]] = {}  # a head tied to another module shares its weight
        for number, site in enumerate(base.sites):
            module = base.model.get_submodule(site.path)
            if type(module) is nn.Linear and module.weight.is_contiguous():
                weight, bias = module.weight.detach(), None if module.bias is None else module.bias.detach()
                self.plain[number] = Weight(weight, None, bias)
                if eight_bit:
                    key = weight.data_ptr()
                    made[key] = made.get(key) or _in_eight_bits(weight)
                    self.eight[number] = Weight(*made[key], bias)
        if eight_bit and len(self.plain) < len(base.sites):
            raise BaseError(
                f"'{base.name}': 8-bit weights are made of plain linear layers, which not all of its are: leave it out"
            )
        if self.plain and not eight_bit:
            self.timings = compared(self._ways, ROWS) if timed else UNTIMED

    @property
    def bytes(self) -> int:
        """What is held beside the base."""
        return sum({one.weight.data_ptr(): one.weight.nbytes for one in self.eight.values()}.values())

    def for_rows(self, rows: int) -> dict[int, Weight]:
        """The weights the kernels take for a step of so many rows, by site; those that are not there go by torch. 8-bit
        weights are taken for any: what a row gets must not depend on its company."""
        return self.eight or (self.plain if self.timings.faster(rows) else {})

    def of(self, number: int, x: Tensor, original: Callable[[Tensor], Tensor], parts: Parts | None = None) -> Tensor:
        """What the site gives for x (1, N, d_in), with what the adapters of these parts add."""
        own = self.for_rows(x.shape[1]).get(number)
        if own is not None and self.kernels is not None:
            return self.kernels.linear(x.contiguous(), own.weight, own.scale, own.bias, parts)
        y = original(x)
        if parts is not None and self.kernels is not None:
            self.kernels.add(y, x.contiguous(), parts)
        return y

    def _ways(self, rows: int) -> tuple[Callable[[], object], Callable[[], object], float]:
        """Products of so many rows by the kernel and by torch, for `compared`: of as many weights as are timed."""
        assert self.kernels is not None
        linear, whole = self.kernels.linear, [one.weight for one in self.plain.values()]
        some: list[Tensor] = []
        for weight in whole:
            if sum(one.nbytes for one in some) < bytes_for(rows):
                some.append(weight)
        given = {width: torch.ones(1, rows, width, dtype=some[0].dtype) for width in {one.shape[1] for one in some}}
        return (
            lambda: [linear(given[weight.shape[1]], weight, None, None) for weight in some],
            lambda: [F.linear(given[weight.shape[1]], weight) for weight in some],
            sum(one.nbytes for one in some) / sum(one.nbytes for one in whole),
        )


def _in_eight_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (d_out, d_in) → int8, and the scale of each output (d_out,) fp32. Symmetric: zero stays zero."""
    wide = weight.float()
    scale = wide.abs().amax(1).clamp_min(1e-12) / 127
    return (wide / scale[:, None]).round_().to(torch.int8), scale
