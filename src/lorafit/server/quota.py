"""Quotas of keys: token buckets that fill steadily, one for requests and one for tokens; seconds to wait come out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from lorafit.server.keys import Key


@dataclass
class _Bucket:
    """A token bucket. level: what is left of `size`, which is refilled within a minute. It may fall below zero, since
    the length of an answer is not known before."""

    size: float
    level: float
    at: float

    def refill(self, now: float) -> None:
        self.level, self.at = min(self.size, self.level + (now - self.at) * self.size / 60), now

    def wait(self, amount: float) -> float:
        """Seconds until an amount can be taken; one larger than the bucket needs it full."""
        return max(0.0, (min(amount, self.size) - self.level) * 60 / self.size)


class Quota:
    """The quotas of all keys, for as long as the server runs. clock: monotonic, in seconds."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[tuple[str, str], _Bucket] = {}

    def take(self, key: Key, requests: int, tokens: int) -> float:
        """Take requests, and the tokens of their prompts. Returns 0, or the seconds to wait where nothing was taken."""
        with self._lock:
            buckets = self._buckets_of(key, requests, tokens)
            wait = max((bucket.wait(amount) for bucket, amount in buckets), default=0.0)
            if not wait:
                for bucket, amount in buckets:
                    bucket.level -= amount
            return wait

    def give_back(self, key: Key, requests: int, tokens: int) -> None:
        """Give back what was taken for requests that were refused later."""
        with self._lock:
            for bucket, amount in self._buckets_of(key, requests, tokens):
                bucket.level += amount

    def charge(self, key: Key, tokens: int) -> None:
        """Take tokens of an answer, which were not known before."""
        if key.tokens:  # called for every token of an answer
            self.give_back(key, 0, -tokens)

    def _buckets_of(self, key: Key, requests: int, tokens: int) -> list[tuple[_Bucket, int]]:
        """The buckets of a key, each with the amount of it."""
        now, buckets = self._clock(), []
        for kind, size, amount in (("requests", key.requests, requests), ("tokens", key.tokens, tokens)):
            if size:
                bucket = self._buckets.get((key.name, kind))
                if bucket is None or bucket.size != size:
                    bucket = self._buckets[key.name, kind] = _Bucket(size, size, now)
                bucket.refill(now)
                buckets.append((bucket, amount))
        return buckets
