"""What a run adds to its adapter and its scores, and can do without."""

from __future__ import annotations

import errno
from collections.abc import Callable
from typing import TypeVar

from safetensors import SafetensorError

from lorafit.errors import Interrupted
from lorafit.jobs.listener import Listener

T = TypeVar("T")
OF_THE_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO}  # full, over the quota, read-only, broken


class Extras:
    """Does one extra after another. One that fails is passed over, with its reason in `passed_over` by the name of the
    extra: hours of training are not lost to a picture."""

    def __init__(self, listener: Listener):
        self.passed_over: dict[str, str] = {}
        self.listener = listener

    def get(self, name: str, work: Callable[[], T]) -> T | None:
        """What `work` returns; None where it fails. A disk that cannot be written to is no matter of one extra, and
        Ctrl-C ends a run anywhere: these are raised."""
        try:
            return work()
        except (SafetensorError, Interrupted):
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.errno in OF_THE_DISK:
                raise
            reason = (str(error).strip().splitlines() or [""])[0]
            self.passed_over[name] = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
            self.listener.say(f"{name}: passed over, for it failed ({self.passed_over[name]}); the adapter is whole")
            return None
