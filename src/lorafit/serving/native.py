"""Kernels in C++, compiled once for this machine into lorafit's cache; None where no compiler is at hand.

Compiled from the one file beside this one, without a header of torch, which takes a second or two. The threads are
torch's own: its OpenMP is in the process before, and is the one that is found.
"""

from __future__ import annotations

import ctypes
import hashlib
import platform
import shutil
import subprocess
import tempfile
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lorafit.sources.gguf import cache_folder

SOURCE = Path(__file__).with_name("kernels.cpp")
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O3", "-march=native", "-ffast-math", "-fopenmp", "-std=c++17", "-shared", "-fPIC")
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16"}


@dataclass(frozen=True, eq=False)
class Kernels:
    """The loops of kernels.cpp for one dtype."""

    pairs: Any
    attention: Any

    def add_pairs(self, y: Tensor, x: Tensor, parts: int, edges: int, pairs: int, scale: int) -> None:
        """y (N, d_out) += scale · B (A x) for x (N, d_in), in parts of rows; contiguous. The last three are addresses:
        of where parts begin and end (parts, 2), of their factors (parts, 3), of the scale of every row (N,) fp32."""
        self.pairs(y.data_ptr(), x.data_ptr(), x.shape[-1], y.shape[-1], parts, edges, pairs, scale)

    def attend(self, q: Tensor, keys: Tensor, values: Tensor, seen: Tensor, scale: float) -> Tensor:
        """q (rows, heads, depth), keys and values (slots, kept, room, depth), seen (rows, 3) int64: slot, first token,
        the one after the last → (rows, heads, depth); contiguous."""
        out = torch.empty_like(q)
        self.attention(out.data_ptr(), q.data_ptr(), keys.data_ptr(), values.data_ptr(), len(q), q.shape[1],
                       keys.shape[1], keys.shape[2], q.shape[2], seen.data_ptr(), scale)  # fmt: skip
        return out


def kernels(dtype: torch.dtype, device: torch.device) -> Kernels | None:
    """The kernels for tensors of this kind; None where there are none."""
    library = _library() if device.type == "cpu" and dtype in NAMES else None
    if library is None:
        return None
    word, address = ctypes.c_int64, ctypes.c_void_p
    pairs = getattr(library, f"add_pairs_{NAMES[dtype]}")
    pairs.argtypes, pairs.restype = [address, address, word, word, word, address, address, address], None
    attention = getattr(library, f"attend_{NAMES[dtype]}")
    attention.argtypes, attention.restype = [address] * 4 + [word] * 5 + [address, ctypes.c_float], None
    return Kernels(pairs, attention)


@cache
def _library() -> ctypes.CDLL | None:
    compiler = next((found for name in COMPILERS if (found := shutil.which(name))), None)
    if compiler is None:
        return None
    made_for = f"{compiler} {FLAGS} {_processor()}".encode()
    digest = hashlib.sha256(SOURCE.read_bytes() + made_for).hexdigest()
    target = cache_folder() / "kernels" / f"{digest[:16]}.so"
    try:
        if not target.exists():
            target.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=target.parent) as folder:
                built = Path(folder) / target.name
                subprocess.run([compiler, *FLAGS, str(SOURCE), "-o", str(built)], check=True, capture_output=True,
                               timeout=120)  # fmt: skip
                built.replace(target)
        return ctypes.CDLL(str(target))
    except (OSError, subprocess.SubprocessError):  # a compiler that lacks something: torch's own operations serve
        return None


def _processor() -> str:
    """What code made for this processor depends on: a cache may be shared by machines."""
    info = Path("/proc/cpuinfo")
    flags = (
        [line for line in info.read_text().splitlines() if line.startswith(("flags", "Features"))][:1]
        if info.exists()
        else []
    )
    return f"{platform.machine()} {platform.processor()} {flags}"
