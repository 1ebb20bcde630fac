"""Optional parts of a run, such as pictures and comparisons: if one fails, the run continues without it."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

from safetensors import SafetensorError

from lorafit.errors import Interrupted
from lorafit.jobs.listener import Listener
from lorafit.jobs.machine import return_freed_memory

T = TypeVar("T")
OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}  # full, over the quota, read-only, broken


class Extras:
    """Runs the extras. The names of those that failed are in `passed_over`, with the reason."""

    def __init__(self, listener: Listener):
        self.passed_over: dict[str, str] = {}
        self.listener = listener

    def get(self, name: str, work: Callable[[], T]) -> T | None:
        """The result of `work`; None if it fails. Interrupts are raised, and so are errors of the disk, which would
        affect the rest of the run too. The memory that earlier stages freed is returned first."""
        return_freed_memory()
        try:
            return work()
        except (SafetensorError, Interrupted):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in OF_THE_DISK:
                raise
            reason = (str(error).strip().splitlines() or [""])[0]
            self.passed_over[name] = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
            self.listener.say(f"{name}: skipped because it failed ({self.passed_over[name]}); the adapter is whole")
            return None
