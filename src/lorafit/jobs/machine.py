"""The memory of the process that does the work."""

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
    """Tell glibc to keep freed blocks instead of handing them back to the kernel.

    Every step frees and asks for the same large blocks; mapping them anew each time costs up to a third of the
    step. Affects the whole process, so a run does it, never an import. Elsewhere than on glibc it does nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 1 << 30)
    libc.mallopt(trim_threshold, (1 << 31) - 1)


def peak_gb() -> float | None:
    """Largest resident memory of this process so far, in GB; None where the system does not tell."""
    if (told := _told("/proc/self/status", "VmHWM")) is not None:
        return round(told / 1e9, 2)  # getrusage's counts what the process was before it became this program
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e9, 2)


def room_of(base: Base, processes: int = 1) -> Room:
    """What is held and free where the base is: on its GPU, or in this process and, of what so many processes share that
    will each hold as much, on this machine."""
    if base.device.type == "cuda":
        held = torch.cuda.memory_allocated(base.device)
        kept = torch.cuda.memory_reserved(base.device) - held  # freed, and ready to be used again
        return Room(held, torch.cuda.mem_get_info(base.device)[0] + kept)
    known = [each for each in (_told("/proc/meminfo", "MemAvailable"), free_in_container()) if each is not None]
    free = min(known, default=None)
    held = _held(base)
    return Room(held, None if free is None else max(0, free - (processes - 1) * held) // processes)


def free_in_container(folder: Path = Path("/sys/fs/cgroup")) -> int | None:
    """Bytes that a container leaves free, None outside of one. Files it has read count as taken there until something
    else needs the room: they are free."""
    try:
        allowed, taken = (int((folder / f"memory.{name}").read_text(encoding="ascii")) for name in ("max", "current"))
        lines = (folder / "memory.stat").read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):  # not there, or "max"
        return None
    files = sum(int(line.split()[1]) for line in lines if line.startswith(("active_file ", "inactive_file ")))
    return max(0, allowed - taken + files)


def left_of(memory: str | None, base: Base) -> int | None:
    """Bytes that may be planned with: of the limit that is set, or else of what is free here, less what estimates are
    off by. None where neither is known."""
    room = room_of(base)
    if memory:
        return max(0, int(((bytes_of(memory) or 0) - room.held) / MARGIN))
    return None if room.free is None else int(USABLE * room.free / MARGIN)


class Meter:
    """Memory held where the base is, over what was held when it was set to zero. On a processor it relies on
    `keep_freed_memory`: what was held once is held still."""

    def __init__(self, base: Base):
        self._base, self._before = base, 0

    def zero(self) -> None:
        if self._base.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self._base.device)
        self._before = room_of(self._base).held

    def grown(self) -> int:
        if self._base.device.type == "cuda":
            return torch.cuda.max_memory_allocated(self._base.device) - self._before
        return (_told("/proc/self/status", "VmRSS") or self._before) - self._before


def _held(base: Base) -> int:
    """Resident memory of this process, without what was freed and is only kept."""
    if platform.libc_ver()[0] == "glibc":
        ctypes.CDLL(None).malloc_trim(0)
    if (now := _told("/proc/self/status", "VmRSS")) is not None:
        return now
    most = peak_gb()
    weights = sum(parameter.numel() * parameter.element_size() for parameter in base.model.parameters())
    return int(1e9 * most) if most is not None else weights + int(0.5e9)  # what importing torch takes


def _told(path: str, name: str) -> int | None:
    """A line `name: 123 kB` of one of Linux's files, in bytes; None elsewhere."""
    try:
        lines = Path(path).read_text(encoding="ascii").splitlines()
    except (OSError, ValueError):
        return None
    return next((1024 * int(line.split()[1]) for line in lines if line.startswith(f"{name}:")), None)


@contextmanager
def on_threads(count: int, listener: Listener) -> Iterator[None]:
    """Compute on so many threads of torch, and then on as many as before: another number rounds otherwise."""
    before = torch.get_num_threads()
    if count != before:
        listener.say(f"on {count} thread{'s' * (count != 1)}, as the run began, not {before}")
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
