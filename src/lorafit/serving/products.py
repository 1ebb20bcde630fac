"""The base's own products for few rows, where the kernel is faster than torch; and in 8 bits, if asked.

A step that gives a few requests their next token is bound by reading the weights: each is read once, in order, for all
rows. 8-bit weights are made from the base in memory, a scale for each output: they are a quarter to half of the bytes.
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

MEASURED = 64 << 20  # bytes of weights that are measured on
MOST = 32  # rows of a step that the kernel is tried for; all of them are taken in 8 bits


@dataclass(frozen=True, eq=False)
class _Weight:
    """weight (d_out, d_in), of the base or in 8 bits; scale (d_out,) fp32 of the latter; bias (d_out,) or None."""

    weight: Tensor
    scale: Tensor | None
    bias: Tensor | None


class Products:
    """few: rows up to which the kernel is used, measured on this machine; 0 without kernels."""

    def __init__(self, base: Base, kernels: Kernels | None, eight_bit: bool = False):
        self.kernels = kernels
        self._weights: dict[int, _Weight] = {}
        self.few = 0
        if kernels is None:
            return
        made: dict[int, _Weight] = {}  # a head tied to another module shares its weight
        for number, site in enumerate(base.sites):
            module = base.model.get_submodule(site.path)
            if type(module) is nn.Linear and module.weight.is_contiguous():
                weight, bias = module.weight.detach(), module.bias
                key = weight.data_ptr()
                if eight_bit and key not in made:
                    made[key] = _Weight(*_in_eight_bits(weight), None)
                kept = made[key] if eight_bit else _Weight(weight, None, None)
                self._weights[number] = _Weight(kept.weight, kept.scale, None if bias is None else bias.detach())
        if eight_bit and len(self._weights) < len(base.sites):
            raise BaseError(f"'{base.name}': 8-bit weights are made of plain linear layers, which not all of its are: "
                            "leave it out")  # fmt: skip
        if self._weights:
            self.few = MOST if eight_bit else self._measured()

    @property
    def bytes(self) -> int:
        """What is held beside the base."""
        kept = {one.weight.data_ptr(): one.weight.nbytes for one in self._weights.values() if one.scale is not None}
        return sum(kept.values())

    def of(
        self, number: int, x: Tensor, original: Callable[[Tensor], Tensor], parts: Parts | None = None
    ) -> Tensor:  # fmt: skip
        """What the site gives for x (1, N, d_in), with what the adapters of these parts add."""
        own = self._weights.get(number) if x.numel() <= self.few * x.shape[-1] else None
        if own is not None and self.kernels is not None:
            return self.kernels.linear(x.contiguous(), own.weight, own.scale, own.bias, parts)
        y = original(x)
        if parts is not None and self.kernels is not None:
            self.kernels.add(y, x.contiguous(), parts)
        return y

    def _measured(self) -> int:
        """The most rows for which the kernel is faster than torch, on more weights than a cache holds."""
        assert self.kernels is not None
        some: list[Tensor] = []
        linear = self.kernels.linear
        for own in self._weights.values():
            if sum(weight.nbytes for weight in some) < MEASURED:
                some.append(own.weight)
        for rows in (MOST, MOST // 2, MOST // 4, 4, 1):
            given = {width: torch.ones(1, rows, width, dtype=some[0].dtype) for width in {len(w.T) for w in some}}
            by_torch = _seconds(lambda x: [F.linear(x[len(weight.T)], weight) for weight in some], given)
            if _seconds(lambda x: [linear(x[len(weight.T)], weight, None, None) for weight in some], given) < by_torch:
                return rows
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
