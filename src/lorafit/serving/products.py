"""The base's own products, where the kernel is faster than torch; and in 8 bits, if asked.

A step that gives a few requests their next token is bound by reading the weights: each is read once, in order, for all
rows. In a dtype that torch has no fast product for on this processor the kernel is taken for many rows too. 8-bit
weights are made from the base in memory, a scale for each output: they are a quarter to half of the bytes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.base import Base
from lorafit.errors import BaseError
from lorafit.serving.native import Kernels, Parts

MEASURED = 64 << 20  # bytes of weights that are measured on, with few rows: more than a cache holds
ROWS = (512, 256, 128, 32, 16, 8, 4, 1)  # of a step, for which the kernel is tried
MANY = 1 << 20
EVEN = 1.1  # times what torch takes: a step of the kernels alone saves as much between its products
READING = 32  # rows up to which a product is reading its weights, not computing


@dataclass(frozen=True, eq=False)
class Weight:
    """weight (d_out, d_in), of the base or in 8 bits; scale (d_out,) fp32 of the latter; bias (d_out,) or None."""

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None


class Products:
    """few: rows up to which the kernel is used, measured on this machine; 0 without kernels."""

    def __init__(self, base: Base, kernels: Kernels | None, eight_bit: bool = False):
        self.kernels = kernels
        self.plain: dict[int, Weight] = {}
        self.eight: dict[int, Weight] = {}
        self.few = 0
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
            raise BaseError(f"'{base.name}': 8-bit weights are made of plain linear layers, which not all of its are: "
                            "leave it out")  # fmt: skip
        if self.plain:
            self.few = self._measured()

    @property
    def bytes(self) -> int:
        """What is held beside the base."""
        return sum({one.weight.data_ptr(): one.weight.nbytes for one in self.eight.values()}.values())

    def for_rows(self, rows: int) -> dict[int, Weight]:
        """The weights the kernels take for a step of so many rows, by site; those that are not there go by torch. 8-bit
        weights are taken for any: what a row gets must not depend on its company."""
        return self.eight or (self.plain if rows <= self.few else {})

    def of(
        self, number: int, x: Tensor, original: Callable[[Tensor], Tensor], parts: Parts | None = None
    ) -> Tensor:  # fmt: skip
        """What the site gives for x (1, N, d_in), with what the adapters of these parts add."""
        own = self.for_rows(x.shape[1]).get(number)
        if own is not None and self.kernels is not None:
            return self.kernels.linear(x.contiguous(), own.weight, own.scale, own.bias, parts)
        y = original(x)
        if parts is not None and self.kernels is not None:
            self.kernels.add(y, x.contiguous(), parts)
        return y

    def _measured(self) -> int:
        """The most rows for which the kernel takes at most EVEN times what torch takes. Where torch has no fast product
        for the dtype on this processor, as for bf16 on many, that is as many as there are."""
        assert self.kernels is not None
        linear = self.kernels.linear
        for rows in ROWS:
            some: list[Tensor] = []
            for own in self.plain.values():
                if sum(weight.nbytes for weight in some) * max(rows, READING) < MEASURED * READING:
                    some.append(own.weight)
            given = {width: torch.ones(1, rows, width, dtype=some[0].dtype) for width in {len(w.T) for w in some}}
            ways = (
                lambda x, some=some: [F.linear(x[len(weight.T)], weight) for weight in some],
                lambda x, some=some: [linear(x[len(weight.T)], weight, None, None) for weight in some],
            )
            by_torch, by_kernel = (_seconds(way, given) for way in ways)
            if by_kernel < EVEN * by_torch:
                return MANY if rows == ROWS[0] else rows
        return 0


def _seconds(work: Callable[[dict[int, Tensor]], object], given: dict[int, Tensor]) -> float:
    """The fastest of a few."""
    times = []
    for _ in range(3):
        began = time.perf_counter()
        work(given)
        times.append(time.perf_counter() - began)
    return min(times)


def _in_eight_bits(weight: Tensor) -> tuple[Tensor, Tensor]:
    """weight (d_out, d_in) → int8, and the scale of each output (d_out,) fp32. Symmetric: zero stays zero."""
    wide = weight.float()
    scale = wide.abs().amax(1).clamp_min(1e-12) / 127
    return (wide / scale[:, None]).round_().to(torch.int8), scale
