"""Whose turn it is: requests that wait, by adapter, and what each adapter has been served.

The place that is free next goes to the adapter that has been served the fewest tokens (virtual token counters, Sheng et
al. 2024, arXiv 2401.00588), so that one with few requests does not wait behind one with many. One that comes anew
begins where the others are: what it was served while it was alone is not held against it, nor its rest paid back.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from itertools import islice

from lorafit.serving.rows import Asked

LOOKED_AT = 32  # requests of one adapter, of which one may begin where those before it cannot yet


class Turns:
    """Guarded by the engine's lock. served: tokens by adapter, of prompts and answers."""

    def __init__(self) -> None:
        self._waiting: dict[str | None, deque[Asked]] = {}
        self._credit: dict[str | None, float] = {}
        self._level = 0.0  # credit of the one served last
        self.served: dict[str | None, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Asked]:
        return (asked for queue in self._waiting.values() for asked in queue)

    def offers(self, can_begin: Callable[[Asked], bool]) -> Iterator[Asked]:
        """Of each adapter, in the order of turns, the first request that can be begun."""
        for name in sorted(self._waiting, key=lambda one: self._credit.get(one, 0.0)):
            if (found := next(filter(can_begin, islice(self._waiting[name], LOOKED_AT)), None)) is not None:
                yield found

    def add(self, asked: Asked, answering: Collection[str | None]) -> None:
        """answering: the adapters of the requests that are being answered."""
        name = asked.name
        active = {*self._waiting, *answering}
        if name not in active:
            level = min((self._credit[one] for one in active), default=self._level)
            self._credit[name] = max(self._credit.get(name, 0.0), level)
        self._waiting.setdefault(name, deque()).append(asked)

    def take(self, asked: Asked) -> None:
        """It waits no longer."""
        queue = self._waiting[asked.name]
        queue.remove(asked)
        if not queue:
            del self._waiting[asked.name]

    def drop(self, unwanted: Callable[[Asked], bool]) -> list[Asked]:
        """Those that need not wait, taken out."""
        dropped = [asked for asked in self if unwanted(asked)]
        if dropped:
            kept = {name: deque(one for one in queue if one not in dropped) for name, queue in self._waiting.items()}
            self._waiting = {name: queue for name, queue in kept.items() if queue}
        return dropped

    def charge(self, name: str | None, tokens: int) -> None:
        """Count what an adapter was served."""
        self.served[name] = self.served.get(name, 0) + tokens
        self._level = self._credit[name] = self._credit.get(name, 0.0) + tokens
