"""Measures memory: how much this process holds, how much the machine has free, and how both change."""

from __future__ import annotations

import ctypes
import platform
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import torch

from lorafit.bases.base import Base
from lorafit.jobs.listener import Listener
from lorafit.planning.memory import MARGIN, USABLE, Room
from lorafit.settings import bytes_of


def keep_freed_memory() -> None:
    """Make glibc keep freed blocks instead of returning them to the kernel; without glibc this does nothing.

    Every step frees and allocates the same large blocks, and mapping them again costs up to a third of the step. It
    affects the whole process, so a run does it, never an import. Between two stages of a run `return_freed_memory`
    gives the blocks back.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 1 << 30)
    libc.mallopt(trim_threshold, (1 << 31) - 1)


def return_freed_memory() -> None:
    """Return the freed blocks that glibc has kept: a stage that begins needs blocks of other sizes."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)


def peak_gb() -> float | None:
    """The largest resident memory of this process so far, in GB; None if the system does not report it."""
    if (peak := _bytes_in("/proc/self/status", "VmHWM")) is not None:
        return round(peak / 1e9, 2)  # getrusage would include what the process was before it became this program
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e9, 2)


def room_of(base: Base, processes: int = 1) -> Room:
    """The bytes held and free where the base is: on its GPU, or in this process and on this machine.

    Args:
        base: The base.
        processes: How many processes share the machine's memory; each is expected to hold as much as this one.
    """
    if base.device.type == "cuda":
        held = torch.cuda.memory_allocated(base.device)
        kept = torch.cuda.memory_reserved(base.device) - held  # freed, and ready to be used again
        return Room(held, torch.cuda.mem_get_info(base.device)[0] + kept)
    limits = (_bytes_in("/proc/meminfo", "MemAvailable"), free_in_container())
    free = min((limit for limit in limits if limit is not None), default=None)
    held = _held(base)
    return Room(held, None if free is None else max(0, free - (processes - 1) * held) // processes)


def free_in_container(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that are free in this container; None outside of one. The cache of files counts as free, because the kernel
    drops it when memory is needed."""
    try:
        allowed, taken = (int((folder / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):  # not there, or "max"
        return None
    files = sum(int(line.split()[1]) for line in lines if line.startswith(("active_file ", "inactive_file ")))
    return max(0, allowed - taken + files)


def left_of(memory: str | None, base: Base) -> int | None:
    """Bytes that may still be used, with a margin for the errors of estimates; None if no limit is set and free memory
    is not known.

    Args:
        memory: The limit that the user set; None for the memory that is free here.
        base: The base, whose memory counts towards a limit.
    """
    room = room_of(base)
    if memory:
        return max(0, int(((bytes_of(memory) or 0) - room.held) / MARGIN))
    return None if room.free is None else int(USABLE * room.free / MARGIN)


class Meter:
    """Measures the growth of memory where the base is, since `zero`. On a processor it relies on `keep_freed_memory`,
    by which memory never shrinks."""

    def __init__(self, base: Base):
        self._base, self._before = base, 0

    def zero(self) -> None:
        if self._base.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._base.device)
        self._before = room_of(self._base).held

    def grown(self) -> int:
        if self._base.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._base.device) - self._before
        return (_bytes_in("/proc/self/status", "VmRSS") or self._before) - self._before


def _held(base: Base) -> int:
    """Resident memory of this process in bytes, without freed blocks that glibc keeps."""
    return_freed_memory()
    if (now := _bytes_in("/proc/self/status", "VmRSS")) is not None:
        return now
    most = peak_gb()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in base.model.parameters())
    return int(1e9 * most) if most is not None else weights + int(0.5e9)  # importing torch takes that much


def _bytes_in(path: str, name: str) -> int | None:
    """The value of a line `name: 123 kB` in a file of Linux, in bytes; None on other systems."""
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


@contextmanager
def on_threads(count: int, listener: Listener) -> Iterator[None]:
    """Set the number of torch's threads for the length of the block; another number rounds differently."""
    before = torch.get_num_threads()
    if count != before:
        listener.say(f"using {count} thread{'s' * (count != 1)}, as when the run began, not {before}")
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
