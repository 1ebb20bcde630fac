"""Many adapters in one batch: the outputs of a site come in, and get what each row's adapter adds.

The rows of an adapter are neighbours, so that each adapter is read once per step, at its own rank: nothing is padded to
the largest rank. Which adapter a row uses is data of the step; the model does not change.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorafit.adapters.adapter import Adapter
from lorafit.attachment.pure import served
from lorafit.bases.base import Base
from lorafit.serving.native import Parts
from lorafit.serving.products import Products

SHORT = 16  # rows of an adapter up to which its products always use the kernel, or a stack
ALIGNED = 32  # each factor begins at a multiple of this many numbers, a line of the processor's cache


@dataclass(frozen=True, eq=False)
class Gain:
    """The term of a method that scales the base's output: gain · (y − bias)."""

    gain: Tensor
    bias: Tensor | None


class Loaded:
    """An adapter in the form that the engine runs, in the dtype of the base. Its attributes must not be changed.

    `down` has A (rank, d_in) and `up` Bᵀ times the scale (rank, d_out), by number of the site. All are parts of one
    tensor, so that they are contiguous in memory and released together. `table` (sites, 3) has, for the kernels, the
    addresses of both and the rank.
    """

    def __init__(self, base: Base, adapter: Adapter):
        with torch.no_grad():
            parts = served(base, adapter)
            pairs = {n: (part.A, part.B.T) for n, part in parts.items()}
            sizes = [-(-factor.numel() // ALIGNED) * ALIGNED for pair in pairs.values() for factor in pair]
            whole = torch.empty(sum(sizes), dtype=base.dtype, device=base.device)
            places = iter(whole.split(sizes))
            placed = {
                n: tuple(next(places)[: factor.numel()].view(factor.shape).copy_(factor) for factor in pair)
                for n, pair in pairs.items()
            }
        self.down = {n: pair[0] for n, pair in placed.items()}
        self.up = {n: pair[1] for n, pair in placed.items()}
        self.gains = {n: Gain(part.gain, part.bias) for n, part in parts.items() if part.gain is not None}
        self.table = np.zeros((len(base.sites), 3), dtype=np.int64)
        for n, a in self.down.items():
            self.table[n] = a.data_ptr(), self.up[n].data_ptr(), len(a)
        self.bytes = whole.nbytes + sum(site.gain.nbytes for site in self.gains.values())

    @property
    def is_zero(self) -> bool:
        """Whether it adds nothing at any site."""
        epsilon = torch.finfo(next(iter(self.up.values())).dtype).eps
        pairs = (self.up[n].any() and self.down[n].any() for n in self.up)
        return not any(pairs) and not any(bool(site.gain.abs().max() > epsilon) for site in self.gains.values())


@dataclass(frozen=True, eq=False)
class Stack:
    """k parts of equal rank and number of rows, at one site: down (k, rank, d_in), up (k, rank, d_out), and their rows
    (k · n,), or a slice where k is 1."""

    down: Tensor
    up: Tensor
    rows: Tensor | slice

    def add(self, y: Tensor, x: Tensor, scale: Tensor) -> None:
        """Add scale · B (A x) to the parts' rows of y (N, d_out), for x (N, d_in) and scale (N,)."""
        if isinstance(self.rows, slice):
            inner = (x[self.rows] @ self.down[0].T).mul_(scale[self.rows, None])
            y[self.rows].addmm_(inner, self.up[0])
            return
        k = len(self.down)
        inner = torch.bmm(x[self.rows].view(k, -1, x.shape[-1]), self.down.mT).mul_(scale[self.rows].view(k, -1, 1))
        y.index_add_(0, self.rows, torch.bmm(inner, self.up).flatten(0, 1))


class Mix:
    """The adapters of a step's rows. A part is an adapter, its first row, and the row after its last; rows of the bare
    base are in no part. scale (N,) fp32: of each row.

    `few` has the parts of few rows, which use the kernels if there are any; `others` become stacks of equal rank. In a
    step of one call (decoder.py) all parts use the kernels.
    """

    def __init__(
        self,
        owners: Sequence[Loaded | None],
        scales: Sequence[float],
        lengths: Sequence[int],
        device: torch.device,
        few: int,
    ):
        """owners, scales, lengths: adapter, scale and rows of each request. few: rows of a part up to which it uses the
        kernels."""
        ends = np.cumsum(lengths).tolist()
        parts: list[tuple[Loaded, int, int]] = []
        for owner, start, end in zip(owners, [0, *ends], ends, strict=False):
            if owner is None:
                continue
            if parts and parts[-1][0] is owner and parts[-1][2] == start:
                parts[-1] = (owner, parts[-1][1], end)
            else:
                parts.append((owner, start, end))
        self.scale = torch.tensor(np.repeat(np.asarray(scales, dtype=np.float32), lengths), device=device)
        self.parts = tuple(parts)
        self.few = tuple(part for part in parts if part[2] - part[1] <= few)
        self.others = tuple(part for part in parts if part not in self.few)
        self._few: dict[int, Parts | None] = {}
        self._stacks: dict[int, tuple[Stack, ...]] = {}

    @cached_property
    def has_gains(self) -> bool:
        """Whether an adapter in it scales the base's output, which no kernel does."""
        return any(part[0].gains for part in self.parts)

    @cached_property
    def tables(self) -> tuple[np.ndarray, np.ndarray]:
        """For the kernels: edges of all parts, (parts, 2), and their tables, (sites, parts, 3), as in Loaded."""
        return _tables(self.parts)

    @cached_property
    def _few_tables(self) -> tuple[np.ndarray, np.ndarray]:
        return _tables(self.few)

    def few_at(self, number: int) -> Parts | None:
        """The parts of few rows, for the kernels; None where none of their adapters acts at this site."""
        if number not in self._few:
            parts, (edges, table) = None, self._few_tables
            if self.few and table[number, :, 2].any():
                parts = Parts(len(edges), edges.ctypes.data, table[number].ctypes.data, self.scale.data_ptr())
            self._few[number] = parts
        return self._few[number]

    def stacks(self, number: int) -> tuple[Stack, ...]:
        """The other parts at this site. They are cached, since the rows stay the same until a request comes or goes."""
        if number not in self._stacks:
            alike: dict[tuple[int, ...], list[tuple[Loaded, int, int]]] = {}
            for i, (loaded, start, end) in enumerate(self.others):
                if number in loaded.down:
                    key = (len(loaded.down[number]), end - start) if end - start <= SHORT else (-1, i)
                    alike.setdefault(key, []).append((loaded, start, end))
            self._stacks[number] = tuple(self._stacked(number, parts) for parts in alike.values())
        return self._stacks[number]

    def _stacked(self, number: int, parts: list[tuple[Loaded, int, int]]) -> Stack:
        if len(parts) == 1:
            loaded, start, end = parts[0]
            return Stack(loaded.down[number][None], loaded.up[number][None], slice(start, end))
        rows = torch.tensor([row for _, start, end in parts for row in range(start, end)], device=self.scale.device)
        down, up = (
            torch.stack([of[number] for of in which])
            for which in ([loaded.down for loaded, *_ in parts], [loaded.up for loaded, *_ in parts])
        )
        return Stack(down, up, rows)


def _tables(parts: Sequence[tuple[Loaded, int, int]]) -> tuple[np.ndarray, np.ndarray]:
    edges = np.array([part[1:] for part in parts], dtype=np.int64).reshape(-1, 2)
    tables = [part[0].table for part in parts]
    return edges, np.ascontiguousarray(np.stack(tables, axis=1)) if tables else np.zeros((0, 0, 3), dtype=np.int64)


class Mixer:
    """Adds adapters to the outputs of sites. attachment.adapting calls `change` at every site; `begin` is called before
    every step. rows: the Mix of the step."""

    def __init__(self, products: Products, device: torch.device):
        self.products, self.kernels, self._device = products, products.kernels, device
        self._mixes: dict[tuple[Any, ...], Mix] = {}
        self.rows: Mix | None = None
        self._kept: Mix | None = None

    def begin(
        self,
        owners: Sequence[Loaded | None],
        scales: Sequence[float],
        lengths: Sequence[int],
        kept: Sequence[int] | None,
    ) -> None:
        """Set the rows of the next forward. owners, scales, lengths: adapter, scale and rows of each request; kept: of
        its rows, how many reach the output head; None where all do."""
        mixes = {}
        for counts in (lengths, kept):
            if counts is not None:
                key = (*owners, *scales, *counts)
                mixes[key] = self._mixes.get(key) or Mix(owners, scales, counts, self._device, self._few(sum(counts)))
        self._mixes = mixes  # the mixes of earlier steps release their adapters
        ordered = list(mixes.values())
        self.rows, self._kept = ordered[0], ordered[-1]

    def end(self) -> None:
        """Release all adapters."""
        self._mixes, self.rows, self._kept = {}, None, None

    def _few(self, rows: int) -> int:
        """Rows of a part up to which it uses the kernels, in a step of this many rows: any part does where the base's
        products do."""
        if self.kernels is None:
            return 0
        return rows if self.products.for_rows(rows) else SHORT

    def change(self, number: int, x: Tensor, original: Callable[[Tensor], Tensor]) -> Tensor:
        """The output of a site for x (1, N, d_in), with what each row's adapter adds: (1, N, d_out)."""
        mix = self.rows
        if mix is not None and x.shape[-2] != len(mix.scale):
            mix = self._kept
            assert mix is not None and x.shape[-2] == len(mix.scale)
        few = mix.few_at(number) if mix is not None else None
        if mix is None or not mix.parts:
            return self.products.of(number, x, original)
        gains = [part for part in mix.parts if number in part[0].gains]
        y = self.products.of(number, x, original, None if gains else few)
        for loaded, start, end in gains:  # gains scale the base's output, so they come first
            _gain(loaded.gains[number], y[0, start:end], mix.scale[start:end])
        if gains and few is not None and self.kernels is not None:
            self.kernels.add(y, x.contiguous(), few)
        for stack in mix.stacks(number):
            stack.add(y[0], x[0], mix.scale)
        return y


def _gain(site: Gain, y: Tensor, scale: Tensor) -> None:
    linear = y if site.bias is None else y - site.bias
    y += (scale[:, None] * site.gain * linear).to(y.dtype)
