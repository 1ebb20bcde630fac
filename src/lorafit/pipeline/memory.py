"""The memory of the process that does the work."""

from __future__ import annotations

import ctypes
import platform
import sys


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
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e9, 2)
