"""Rows of many adapters in one batch: what each row's adapter adds to every site.

The rows of one adapter stand together, so that each adapter is read once a step, at its own rank: nothing is padded to
the largest, and no list of ranks is fixed. Which adapter a row uses is data of the step; the model stays as it is.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from lorafit.adapter import Adapter
from lorafit.attachment import served
from lorafit.base import Base
from lorafit.serving.native import Parts
from lorafit.serving.products import Products

SHORT = 16  # rows of one adapter up to which its products go through our kernel: beyond, torch's are faster


@dataclass(frozen=True, eq=False)
class Gain:
    """What a method that scales the base's own output adds: gain · (y − bias)."""

    gain: Tensor
    bias: Tensor | None


class Loaded:
    """An adapter as the engine runs it, in the dtype of the base. Attributes are not to be changed.

    down: A (rank, d_in), up: Bᵀ with the scale in it (rank, d_out), by the number of the site. table: for the kernels,
    of each site where these two lie, and the rank.
    """

    def __init__(self, base: Base, adapter: Adapter):
        with torch.no_grad():
            parts = served(base, adapter)
        self.down = {n: one.A.to(base.dtype).contiguous() for n, one in parts.items()}
        self.up = {n: one.B.T.to(base.dtype).contiguous() for n, one in parts.items()}
        self.gains = {n: Gain(one.gain, one.bias) for n, one in parts.items() if one.gain is not None}
        self.table = np.zeros((len(base.sites), 3), dtype=np.int64)
        for n, a in self.down.items():
            self.table[n] = a.data_ptr(), self.up[n].data_ptr(), len(a)
        self.bytes = sum(t.nbytes for part in (self.down, self.up) for t in part.values())


@dataclass(frozen=True, eq=False)
class Mix:
    """Which rows of a step are whose. parts: an adapter with its first row and the one after its last, in order; rows
    of the bare base are in none. scale (N,) fp32: of each row."""

    parts: tuple[tuple[Loaded, int, int], ...]
    scale: Tensor
    few: tuple[Loaded, ...]
    edges: np.ndarray
    table: np.ndarray

    def few_at(self, number: int) -> Parts | None:
        """The parts of few rows, for the kernels; None where no adapter of theirs acts at this site."""
        row = self.table[number] if self.few else None
        if row is None or not row[:, 2].any():
            return None
        return Parts(len(row), self.edges.ctypes.data, row.ctypes.data, self.scale.data_ptr())

    @staticmethod
    def of(
        owners: Sequence[Loaded | None],
        scales: Sequence[float],
        lengths: Sequence[int],
        device: torch.device,
        native: bool,
    ) -> Mix:
        """owners, scales, lengths: of each request in the step, `lengths` in rows; those of one adapter are neighbours.
        native: whether parts of few rows go through the kernels."""
        ends = np.cumsum(lengths).tolist()
        parts: list[tuple[Loaded, int, int]] = []
        for owner, start, end in zip(owners, [0, *ends], ends, strict=False):
            if owner is None:
                continue
            if parts and parts[-1][0] is owner and parts[-1][2] == start:
                parts[-1] = (owner, parts[-1][1], end)
            else:
                parts.append((owner, start, end))
        scale = torch.tensor(np.repeat(np.asarray(scales, dtype=np.float32), lengths), device=device)
        small = [part for part in parts if native and part[2] - part[1] <= SHORT]
        large = tuple(part for part in parts if not (native and part[2] - part[1] <= SHORT))
        edges = np.array([part[1:] for part in small], dtype=np.int64)
        tables = [part[0].table for part in small]
        table = np.ascontiguousarray(np.stack(tables, axis=1)) if small else np.zeros((0, 0, 3), dtype=np.int64)
        return Mix(large, scale, tuple(part[0] for part in small), edges, table)


class Mixer:
    """`change` goes into attachment.adapting; `rows` and `kept` are set before every step.

    kept: the mix of the rows that reach the output head, where they are fewer.
    """

    def __init__(self, products: Products):
        self.products, self.kernels = products, products.kernels
        self.rows: Mix | None = None
        self.kept: Mix | None = None

    def change(self, number: int, x: Tensor, original: Callable[[Tensor], Tensor]) -> Tensor:
        """What the site gives for x (1, N, d_in), with what each row's adapter adds, (1, N, d_out)."""
        mix = self.rows
        if mix is not None and x.shape[-2] != len(mix.scale):
            mix = self.kept
            assert mix is not None and x.shape[-2] == len(mix.scale)
        few = mix.few_at(number) if mix is not None else None
        if mix is None or not (few or mix.parts or mix.few):
            return self.products.of(number, x, original)
        if any(number in loaded.gains for loaded in mix.few):
            y = self.products.of(number, x, original)
            for loaded, (start, end) in zip(mix.few, mix.edges.tolist(), strict=True):
                _gain(loaded, number, y[0, start:end], mix.scale[start:end])
            if few is not None and self.kernels is not None:
                self.kernels.add(y, x.contiguous(), few)
        else:
            y = self.products.of(number, x, original, few)
        for loaded, start, end in mix.parts:
            if (down := loaded.down.get(number)) is None:
                continue
            own, scale = y[0, start:end], mix.scale[start:end]
            _gain(loaded, number, own, scale)
            inner = (x[0, start:end] @ down.T).mul_(scale[:, None])
            own.addmm_(inner, loaded.up[number])
        return y


def _gain(loaded: Loaded, number: int, y: Tensor, scale: Tensor) -> None:
    if (one := loaded.gains.get(number)) is not None:
        linear = y if one.bias is None else y - one.bias
        y += (scale[:, None] * one.gain * linear).to(y.dtype)
