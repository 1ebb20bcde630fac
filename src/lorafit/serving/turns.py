"""The fair queue: waiting requests, by adapter, and the tokens that each adapter has been served.

A free slot goes to the adapter that has been served the fewest tokens (virtual token counters, Sheng et al. 2024, arXiv
2401.00588), so that an adapter with few requests does not wait behind one with many. An adapter that had no requests
for a while starts at the level of the others: it owes nothing for earlier tokens, and its pause earns nothing.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Collection, Iterator
from itertools import islice

from lorafit.serving.rows import Submission

LOOKAHEAD = 32  # requests of an adapter of which any may begin if the earlier ones cannot yet


class Turns:
    """The fair queue, guarded by the engine's lock. served: tokens of prompts and answers, by adapter."""

    def __init__(self) -> None:
        self._waiting: dict[str | None, deque[Submission]] = {}
        self._counters: dict[str | None, float] = {}
        self._level = 0.0  # counter of the adapter that was served last
        self.served: dict[str | None, int] = {}

    def __len__(self) -> int:
        return sum(map(len, self._waiting.values()))

    def __iter__(self) -> Iterator[Submission]:
        return (request for queue in self._waiting.values() for request in queue)

    def offers(self, can_begin: Callable[[Submission], bool]) -> Iterator[Submission]:
        """The first request of each adapter that can begin, in the order of turns."""
        for name in sorted(self._waiting, key=lambda name: self._counters.get(name, 0.0)):
            if (first := next(filter(can_begin, islice(self._waiting[name], LOOKAHEAD)), None)) is not None:
                yield first

    def add(self, request: Submission, answering: Collection[str | None]) -> None:
        """Queue a request. answering: the adapters of the requests that are being answered."""
        name = request.name
        active = {*self._waiting, *answering}
        if name not in active:
            level = min((self._counters[busy] for busy in active), default=self._level)
            self._counters[name] = max(self._counters.get(name, 0.0), level)
        self._waiting.setdefault(name, deque()).append(request)

    def take(self, request: Submission) -> None:
        """Remove a request that begins."""
        queue = self._waiting[request.name]
        queue.remove(request)
        if not queue:
            del self._waiting[request.name]

    def drop(self, unwanted: Callable[[Submission], bool]) -> list[Submission]:
        """Remove and return the requests for which `unwanted` is true."""
        dropped = [request for request in self if unwanted(request)]
        for request in dropped:
            self.take(request)
        return dropped

    def charge(self, name: str | None, tokens: int) -> None:
        """Count tokens that an adapter was served."""
        self.served[name] = self.served.get(name, 0) + tokens
        self._level = self._counters[name] = self._counters.get(name, 0.0) + tokens
