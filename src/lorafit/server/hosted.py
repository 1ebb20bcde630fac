"""What guard, routes of monitoring and the process that listens need of a service, whatever it answers."""

from __future__ import annotations

import time
from collections.abc import Collection
from typing import Literal, Protocol

from lorafit.errors import LorafitError
from lorafit.server.keys import Key
from lorafit.server.metrics import Metrics
from lorafit.server.quota import Quota

Phase = Literal["loading", "ready", "draining", "dead"]


class Hosted(Protocol):
    """A service that is hosted.

    Args:
        base: the name of the base.
        phase: whether requests are answered.
        failed: why it never will be ready; None while it may.
        under_way: requests that have arrived and whose last byte is not written yet.
        metrics: what is counted.
        quota: what keys have used.
    """

    base: str
    phase: Phase
    failed: LorafitError | None
    under_way: int
    metrics: Metrics
    quota: Quota

    def start(self) -> None: ...
    def close(self) -> None: ...
    def keys(self) -> Collection[Key] | None: ...


def drain(service: Hosted, patience: float) -> None:
    """Let a service take no new requests, and wait until all are answered. patience: seconds to wait at most."""
    service.phase, end = "draining", time.monotonic() + patience
    while service.under_way and time.monotonic() < end:
        time.sleep(0.05)
