"""Kernels in C++, compiled once for this machine into lorafit's cache; None where no compiler is at hand.

Compiled from the one file beside this one, without a header of torch, which takes some ten seconds. The threads are
torch's own: its OpenMP is in the process before, and is the one that is found.
"""

from __future__ import annotations

import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import tempfile
import warnings
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lorafit.bases.gguf import cache_folder

SOURCE = Path(__file__).with_name("kernels.cpp")
COMPILERS = ("c++", "g++", "clang++")
# Linked apart, without -ffast-math: with it the library would switch off subnormal numbers for the whole process.
# What is no number must stay none: it tells that an adapter has left the numbers.
COMPILE = ("-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-fopenmp", "-std=c++17", "-fPIC", "-c")
LINK = ("-fopenmp", "-shared")
# What a step of one call is made of, in the order kernels.cpp counts its time.
SPENT = ("norms", "q, k, v", "rotary positions", "attention", "o", "gate, up", "the gate", "down", "output head")
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True, eq=False)
class Parts:
    """Rows of a step by their adapter, at one site: their first row and the one after their last (parts, 2), where
    their factors lie (parts, 3), the scale of every row (N,) fp32. Addresses, and how many parts."""

    count: int
    edges: int
    pairs: int
    scale: int


@dataclass(frozen=True, eq=False)
class Kernels:
    """The loops of kernels.cpp for one dtype. products, steps: by the dtype of the weights; loops: others by name."""

    products: dict[torch.dtype, Any]
    steps: dict[torch.dtype, Any]
    loops: dict[str, Any]

    def linear(
        self, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, parts: Parts | None = None
    ) -> Tensor:
        """x (..., d_in) contiguous, weight (d_out, d_in) of x's dtype, or int8 with scale (d_out,) → (..., d_out), with
        what the parts' adapters add."""
        y = x.new_empty(*x.shape[:-1], len(weight))
        self._run(self.products[weight.dtype], y, x, weight.data_ptr(), scale, bias, parts)
        return y

    def add(self, y: Tensor, x: Tensor, parts: Parts) -> None:
        """y (..., d_out) += what the parts' adapters add for x (..., d_in); both contiguous."""
        self._run(self.products[x.dtype], y, x, None, None, None, parts)

    def _run(
        self,
        product: Any,
        y: Tensor,
        x: Tensor,
        weight: int | None,
        scale: Tensor | None,
        bias: Tensor | None,
        parts: Parts | None,
    ) -> None:
        width = x.shape[-1]
        product(
            y.data_ptr(),
            x.data_ptr(),
            weight,
            None if scale is None else scale.data_ptr(),
            None if bias is None else bias.data_ptr(),
            x.numel() // width,
            width,
            y.shape[-1],
            *((0, None, None, None) if parts is None else (parts.count, parts.edges, parts.pairs, parts.scale)),
        )

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float) -> Tensor:
        """q (rows, heads, depth), keys and values (slots, kept, room, depth), seen (rows, 3) int64: slot, first token,
        the one after the last → (rows, heads, depth); contiguous."""
        out = torch.empty_like(q)
        self.loops["attend"](
            out.data_ptr(),
            q.data_ptr(),
            keys.data_ptr(),
            values.data_ptr(),
            len(q),
            q.shape[1],
            keys.shape[1],
            keys.shape[2],
            q.shape[2],
            seen.data_ptr(),
            scale,
        )
        return out

    def norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
        """x (..., n) += delta, in place; returns weight · x / root mean square of x. All contiguous."""
        y = torch.empty_like(x)
        self.loops["norm"](
            y.data_ptr(),
            x.data_ptr(),
            None if delta is None else delta.data_ptr(),
            weight.data_ptr(),
            x.numel() // x.shape[-1],
            x.shape[-1],
            epsilon,
        )
        return y

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """gate = silu(gate) · up, in place; both contiguous."""
        self.loops["gated"](gate.data_ptr(), up.data_ptr(), gate.numel())
        return gate

    def store(
        self,
        q: Tensor,
        k: Tensor,
        v: Tensor,
        cos: Tensor,
        sin: Tensor,
        keys: Tensor,
        values: Tensor,
        numbers: Tensor,
        positions: Tensor,
    ) -> None:
        """Rotary positions for q (N, heads, depth), in place, and for k (N, kept, depth), which goes with v to its slot
        and position (N,) int64 in keys and values (slots, kept, room, depth). cos, sin (N, depth). All contiguous."""
        _, kept, room, depth = keys.shape
        tensors = (q, k, v, cos, sin, keys, values, numbers, positions)
        self.loops["store"](*(one.data_ptr() for one in tensors), len(q), q.shape[1], kept, room, depth)

    def step(
        self,
        kind: torch.dtype,
        x: Tensor,
        blocks: np.ndarray,
        head: np.ndarray,
        last: Tensor,
        cos: Tensor,
        sin: Tensor,
        numbers: Tensor,
        positions: Tensor,
        shape: tuple[int, ...],
        seen: Tensor,
        ends: Tensor,
        heads: int,
        scale: float,
        epsilon: float,
        edges: np.ndarray,
        table: np.ndarray,
        scales: Tensor,
        spent: np.ndarray,
    ) -> Tensor:
        """A whole step: x (rows, width) fp32, which it changes → logits (ends, vocabulary) fp32, of the rows `ends`.

        kind: dtype of the weights. blocks (blocks, 46), head (6,) int64: as `Block` and `Site` of kernels.cpp lie in
        memory. last (width,): weight of the last norm. shape: of a layer's keys. seen (rows, 3): as for attend. edges
        (parts, 2), table (sites, parts, 3): whose rows, and where their factors lie; scales (rows,) fp32. spent: by
        SPENT, seconds, added to.
        """
        logits = x.new_empty(len(ends), int(head[4]))
        _, kept, room, depth = shape
        self.steps[kind](
            logits.data_ptr(),
            x.data_ptr(),
            blocks.ctypes.data,
            len(blocks),
            head.ctypes.data,
            last.data_ptr(),
            cos.data_ptr(),
            sin.data_ptr(),
            numbers.data_ptr(),
            positions.data_ptr(),
            kept,
            room,
            depth,
            seen.data_ptr(),
            len(x),
            ends.data_ptr(),
            len(ends),
            heads,
            scale,
            epsilon,
            len(edges),
            edges.ctypes.data,
            table.ctypes.data,
            len(table),
            scales.data_ptr(),
            spent.ctypes.data,
        )
        return logits


def kernels(dtype: torch.dtype, device: torch.device) -> Kernels | None:
    """The kernels for tensors of this kind; None where there are none."""
    library = _library() if device.type == "cpu" and dtype in NAMES else None
    if library is None:
        return None
    word, address = ctypes.c_int64, ctypes.c_void_p
    arguments = {
        "attend": [address] * 4 + [word] * 5 + [address, ctypes.c_float],
        "norm": [address] * 4 + [word, word, ctypes.c_float],
        "gated": [address, address, word],
        "store": [address] * 9 + [word] * 5,
    }
    loops = {}
    for loop, kinds in arguments.items():
        loops[loop] = getattr(library, f"{loop}_{NAMES[dtype]}")
        loops[loop].argtypes, loops[loop].restype = kinds, None
    products, steps, real = {}, {}, ctypes.c_float
    for kind, name in ((dtype, NAMES[dtype]), (torch.int8, "int8")):
        products[kind] = getattr(library, f"linear_{NAMES[dtype]}_{name}")
        products[kind].argtypes, products[kind].restype = [address] * 5 + [word] * 4 + [address] * 3, None
        steps[kind] = getattr(library, f"step_{NAMES[dtype]}_{name}")
        steps[kind].argtypes = (
            [address] * 3
            + [word]
            + [address] * 6
            + [word] * 3
            + [address, word, address, word, word, real, real, word, address, address, word, address, address]
        )
        steps[kind].restype = None
    return Kernels(products, steps, loops)


@cache
def _library() -> ctypes.CDLL | None:
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        return None
    made_for = f"{compiler} {COMPILE} {LINK} {_processor()}".encode()
    digest = hashlib.sha256(SOURCE.read_bytes() + made_for).hexdigest()
    target = cache_folder() / "kernels" / f"{digest[:16]}.so"
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if hasattr(os, "getuid") and target.parent.stat().st_uid != os.getuid():  # who could put anything there
            raise PermissionError(f"{target.parent} is someone else's folder")
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                built, part = Path(folder) / target.name, Path(folder) / "kernels.o"
                for words in ([*COMPILE, str(SOURCE), "-o", str(part)], [*LINK, str(part), "-o", str(built)]):
                    subprocess.run([compiler, *words], check=True, capture_output=True, timeout=120)
                built.replace(target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError) as error:  # a compiler that lacks something, a full disk
        warnings.warn(
            f"the C++ kernels could not be made with {compiler}: {_why(error)}: torch's own operations "
            "serve instead, with the same answers, several times slower on this machine: install a g++ or "
            "clang that has OpenMP, or name a folder of your own in LORAFIT_CACHE",
            stacklevel=2,
        )
        return None


def _why(error: Exception) -> str:
    """What went wrong, in a line: of all that a compiler said, the first error, or its last word."""
    said = getattr(error, "stderr", None) or b""
    lines = said.decode(errors="replace").strip().splitlines() or [str(error)]
    return next((line for line in lines if "error: " in line or "cannot find" in line), lines[-1]).strip()


def _processor() -> str:
    """What code made for this processor depends on: a cache may be shared by machines."""
    info = Path("/proc/cpuinfo")
    flags = (
        [line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))][:1]
        if info.exists()
        else []
    )
    return f"{platform.machine()} {platform.processor()} {flags}"
