"""Signals that stop a training after the step in progress."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def interruptible(launched: bool) -> Iterator[threading.Event]:
    """Yields an event that the first SIGINT, SIGTERM or SIGHUP sets; a second SIGINT or SIGTERM ends the process.

    A terminal that closes sends SIGHUP, often twice; under nohup the signal stays ignored. Python delivers signals to
    the main thread only; in any other thread, the event is never set.

    Args:
        launched: Whether torchrun started the process. Then a second signal does not end it, because torchrun may
            repeat a signal that the process has already received, and kills a process that does not end.
    """
    stop = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return
    before = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    if hasattr(signal, "SIGHUP") and (hangup := signal.getsignal(signal.SIGHUP)) is not signal.SIG_IGN:
        before[signal.SIGHUP] = hangup

    def first(number: int, frame: object) -> None:
        stop.set()
        if launched:
            return
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.signal(signal.SIGTERM, signal.SIG_DFL)

    for number in before:
        signal.signal(number, first)
    try:
        yield stop
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
