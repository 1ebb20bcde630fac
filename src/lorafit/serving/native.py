"""The C++ kernels, compiled once for this machine into lorafit's cache: tensors in, tensors out.

kernels.cpp includes no header of torch, so that compiling takes about ten seconds. The kernels run on torch's threads,
since the OpenMP library that torch has loaded is the one that they find.
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
# Linked without -ffast-math, which would switch off subnormal numbers for the whole process. NaN and infinity must be
# kept, since they show that an adapter overflows.
COMPILE = ("-O3", "-march=native", "-ffast-math", "-fno-finite-math-only", "-fopenmp", "-std=c++17", "-fPIC", "-c")
LINK = ("-fopenmp", "-shared")
# The parts of a step of one call, in the order in which kernels.cpp counts their time.
SPENT = ("norms", "q, k, v", "rotary positions", "attention", "o", "gate, up", "the gate", "down", "output head")
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True, eq=False)
class Parts:
    """The adapters of a step's rows, at one site: the number of parts, and the addresses of three arrays: of each part
    the first row and the one after its last (parts, 2), of each part the addresses of its factors and its rank (parts,
    3), and of every row its scale (N,) fp32."""

    count: int
    edges: int
    pairs: int
    scale: int


@dataclass(frozen=True, eq=False)
class Kernels:
    """The functions of kernels.cpp for one dtype. products, steps: by dtype of the weights; loops: the others, by
    name."""

    products: dict[torch.dtype, Any]
    steps: dict[torch.dtype, Any]
    loops: dict[str, Any]

    def linear(
        self, x: Tensor, weight: Tensor, scale: Tensor | None, bias: Tensor | None, parts: Parts | None = None
    ) -> Tensor:
        """The linear product of x (..., d_in), contiguous, and weight (d_out, d_in) of x's dtype, or int8 with scale
        (d_out,), plus what the parts' adapters add → (..., d_out)."""
        y = x.new_empty(*x.shape[:-1], len(weight))
        self._run(self.products[weight.dtype], y, x, weight.data_ptr(), scale, bias, parts)
        return y

    def add(self, y: Tensor, x: Tensor, parts: Parts) -> None:
        """Add what the parts' adapters add for x (..., d_in) to y (..., d_out); both contiguous."""
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
        """One call of a kernel, with more than six parameters, as the kernel has."""
        scales, biases = None if scale is None else scale.data_ptr(), None if bias is None else bias.data_ptr()
        adapters = (0, None, None, None) if parts is None else (parts.count, parts.edges, parts.pairs, parts.scale)
        width = x.shape[-1]
        sizes = x.numel() // width, width, y.shape[-1]
        product(y.data_ptr(), x.data_ptr(), weight, scales, biases, *sizes, *adapters)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float) -> Tensor:
        """Attention of q (rows, heads, depth) to keys and values (slots, kept, room, depth) → (rows, heads, depth).
        seen (rows, 3) int64: slot, first token, and the one after the last. All contiguous."""
        out = torch.empty_like(q)
        pointers = out.data_ptr(), q.data_ptr(), keys.data_ptr(), values.data_ptr()
        (rows, heads, depth), (_, kept, room, _) = q.shape, keys.shape
        self.loops["attend"](*pointers, rows, heads, kept, room, depth, seen.data_ptr(), scale)
        return out

    def norm(self, x: Tensor, delta: Tensor | None, weight: Tensor, epsilon: float) -> Tensor:
        """Add delta to x (..., n) in place; returns weight · x / root mean square of x. All contiguous."""
        y, width = torch.empty_like(x), x.shape[-1]
        pointers = y.data_ptr(), x.data_ptr(), None if delta is None else delta.data_ptr(), weight.data_ptr()
        self.loops["norm"](*pointers, x.numel() // width, width, epsilon)
        return y

    def gated(self, gate: Tensor, up: Tensor) -> Tensor:
        """Multiply silu(gate) by up, in place of gate; both contiguous."""
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
        """Apply rotary positions to q (N, heads, depth), in place, and to k (N, kept, depth). Write k and v to their
        slots and positions, (N,) int64, in keys and values (slots, kept, room, depth). cos, sin: (N, depth). All
        contiguous. It has more than six parameters, those of the kernel."""
        _, kept, room, depth = keys.shape
        tensors = (q, k, v, cos, sin, keys, values, numbers, positions)
        self.loops["store"](*(tensor.data_ptr() for tensor in tensors), len(q), q.shape[1], kept, room, depth)

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
        """A whole step: embeddings x (rows, width) fp32, which it changes → logits (ends, vocabulary) fp32.

        It has more than six parameters, those of the kernel.

        Args:
            kind: dtype of the weights.
            x: embeddings of the tokens.
            blocks: (blocks, 46) int64, the memory of `Block` in kernels.cpp; head: (6,), that of `Site`.
            last: weight of the last norm, (width,).
            cos, sin: rotary positions, (rows, depth).
            numbers, positions: slot and position of each row.
            shape: of a layer's keys.
            seen: as in `attend`; ends: rows whose logits are computed.
            heads, scale, epsilon: of attention and norms.
            edges, table, scales: the adapters of the rows, as in Parts, with table (sites, parts, 3).
            spent: seconds, by SPENT, which are added to.
        """
        logits = x.new_empty(len(ends), int(head[4]))
        _, kept, room, depth = shape
        weights = blocks.ctypes.data, len(blocks), head.ctypes.data, last.data_ptr()
        places = cos.data_ptr(), sin.data_ptr(), numbers.data_ptr(), positions.data_ptr(), kept, room, depth
        rows = seen.data_ptr(), len(x), ends.data_ptr(), len(ends), heads, scale, epsilon
        adapters = len(edges), edges.ctypes.data, table.ctypes.data, len(table), scales.data_ptr()
        inputs = *weights, *places, *rows, *adapters, spent.ctypes.data
        self.steps[kind](logits.data_ptr(), x.data_ptr(), *inputs)
        return logits


def kernels(dtype: torch.dtype, device: torch.device) -> Kernels | None:
    """The kernels for a dtype and device; None where there are none."""
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
    for loop, types in arguments.items():
        loops[loop] = getattr(library, f"{loop}_{NAMES[dtype]}")
        loops[loop].argtypes, loops[loop].restype = types, None
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
    compiler = next(filter(None, map(shutil.which, COMPILERS)), None)
    if compiler is None:
        return None
    target_machine = f"{compiler} {COMPILE} {LINK} {_processor()}".encode()
    digest = hashlib.sha256(SOURCE.read_bytes() + target_machine).hexdigest()
    target = cache_folder() / "kernels" / f"{digest[:16]}.so"
    try:
        target.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        if hasattr(os, "getuid") and target.parent.stat().st_uid != os.getuid():  # who could replace the library
            raise PermissionError(f"{target.parent} belongs to another user")
        if not target.exists():
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                built, part = Path(folder) / target.name, Path(folder) / "kernels.o"
                for words in ([*COMPILE, str(SOURCE), "-o", str(part)], [*LINK, str(part), "-o", str(built)]):
                    subprocess.run([compiler, *words], check=True, capture_output=True, timeout=120)
                built.replace(target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError) as error:  # a compiler that lacks something, a full disk
        warnings.warn(
            f"the C++ kernels could not be compiled with {compiler}: {_why(error)}: torch's own operations are "
            "used instead, with the same answers, several times slower on this machine: install a g++ or "
            "clang with OpenMP, or name a folder of your own in LORAFIT_CACHE",
            stacklevel=2,
        )
        return None


def _why(error: Exception) -> str:
    """The reason in one line: the compiler's first error, or the last line of its output."""
    output = getattr(error, "stderr", None) or b""
    lines = output.decode(errors="replace").strip().splitlines() or [str(error)]
    return next((line for line in lines if "error: " in line or "cannot find" in line), lines[-1]).strip()


def _processor() -> str:
    """The processor that code is compiled for, since machines may share a cache."""
    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    flags = [line for line in lines if line.startswith(("flags", "Features"))][:1]
    return f"{platform.machine()} {platform.processor()} {flags}"
