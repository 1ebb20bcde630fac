"""How much each key may ask in a minute: a bucket that fills steadily, and from which requests and tokens are taken."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from dataclasses import dataclass

from lorafit.server.keys import Key


@dataclass
class _Bucket:
    """level: what is left of `size`, which comes back within a minute; it may fall below zero, by what an answer took
    that was longer than thought."""

    size: float
    level: float
    at: float

    def refill(self, now: float) -> None:
        self.level, self.at = min(self.size, self.level + (now - self.at) * self.size / 60), now

    def wait(self, wanted: float) -> float:
        """Seconds until so much is there; a wish larger than the bucket needs it full."""
        return max(0.0, (min(wanted, self.size) - self.level) * 60 / self.size)


class Quota:
    """By key, for as long as the server runs. clock: seconds, monotonic."""

    def __init__(self, clock: Callable[[], float] = time.monotonic):
        self._clock = clock
        self._lock = threading.Lock()
        self._buckets: dict[tuple[str, str], _Bucket] = {}

    def take(self, key: Key, requests: int, tokens: int) -> float:
        """Take requests, and the tokens of their prompts. Returns 0, or the seconds to wait where nothing was taken."""
        with self._lock:
            found = [
                (self._bucket(key.name, kind, size), wanted)
                for kind, size, wanted in (("requests", key.requests, requests), ("tokens", key.tokens, tokens))
                if size
            ]
            wait = max((bucket.wait(wanted) for bucket, wanted in found), default=0.0)
            if not wait:
                for bucket, wanted in found:
                    bucket.level -= wanted
            return wait

    def give_back(self, key: Key, requests: int, tokens: int) -> None:
        """What was taken for requests that were refused after all."""
        with self._lock:
            for kind, size, taken in (("requests", key.requests, requests), ("tokens", key.tokens, tokens)):
                if size:
                    self._bucket(key.name, kind, size).level += taken

    def charge(self, key: Key, tokens: int) -> None:
        """Take the tokens of an answer, which are known when it is there."""
        if key.tokens:
            with self._lock:
                self._bucket(key.name, "tokens", key.tokens).level -= tokens

    def _bucket(self, name: str, kind: str, size: int) -> _Bucket:
        now = self._clock()
        bucket = self._buckets.get((name, kind))
        if bucket is None or bucket.size != size:
            bucket = self._buckets[name, kind] = _Bucket(size, size, now)
        bucket.refill(now)
        return bucket
