"""Which requests are answered and which wait: from a request's coming until the last that is told to it."""

from __future__ import annotations

import threading
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from lorafit.errors import AdapterError, BusyError, CancelledError, LorafitError
from lorafit.generation.text import Until, Words
from lorafit.serving.mixing import Loaded
from lorafit.serving.pool import Pool, Version
from lorafit.serving.request import Result, Token
from lorafit.serving.rows import Asked, Row
from lorafit.serving.sampling import Sampler
from lorafit.serving.slots import WORTH, Key, Slots, common
from lorafit.serving.stats import Stats
from lorafit.serving.turns import Turns


class Scheduler:
    """Gives free slots to those who wait, the adapter that was served least first.

    Requests are added from any thread that holds `lock`; everything else happens in the thread that owns the model.

    Args:
        adapters: What is served beside the base.
        slots: Where requests are answered.
        tokenizer: Of the base; None where it has none.
        queue: Requests that may wait.
        room: Tokens of a request, prompt and answer.
        lock: Of the engine; it is notified of what comes.
    """

    def __init__(self, adapters: Pool, slots: Slots, tokenizer: Any, queue: int, room: int, lock: threading.Condition):
        self._adapters, self._slots, self._tokenizer = adapters, slots, tokenizer
        self._queue, self._room, self._lock = queue, room, lock
        self._turns = Turns()
        self.rows: list[Row] = []
        self._beginning: list[str | None] = []
        self._stats = Stats()
        self._reader = ThreadPoolExecutor(1, "lorafit-adapters")
        self._heating: dict[Version, Future[Loaded]] = {}

    def add(self, asked: Asked) -> None:
        """Have a request wait for its turn. Raises BusyError where too many wait already."""
        free = len(self._slots.slots) - len(self.rows) - len(self._beginning)
        if len(self._turns) >= self._queue + free:
            raise BusyError(f"{self._queue} requests are waiting already: ask again later")
        if asked.version is not None:
            self._adapters.enter(asked.version, 1)
        self._turns.add(asked, [*(row.asked.name for row in self.rows), *self._beginning])

    @property
    def waits(self) -> bool:
        """Whether any request waits."""
        return len(self._turns) > 0

    def ready(self) -> bool:
        """Whether some request that waits could be begun on; has adapters read that are on disk alone."""
        return any(asked.answer.is_cancelled for asked in self._turns) or any(self._turns.offers(self._can_begin))

    def _can_begin(self, asked: Asked) -> bool:
        """Whether its adapter is hot, and no other request is just reading what it would read too: the keys and values
        of a system prompt that many have in common are computed once, also where they all come at once."""
        if not self._heated(asked):
            return False
        prompt, key = asked.answer.request.prompt, _key(asked)
        coming = [common(row.ids, prompt) for row in self.rows if row.slot.key == key and row.left > 1]
        return not coming or max(coming) < WORTH + max(common(held, prompt) for held in self._slots.of(key))

    def _heated(self, asked: Asked) -> bool:
        """Whether its adapter is hot. One that is not is read by another thread, and others go before it."""
        version = asked.version
        if version is None or version.loaded is not None:
            self._heating.pop(version, None) if version else None
            return True
        if version not in self._heating:
            if any(not reading.done() for reading in self._heating.values()):
                return False  # one is read at a time, in the order of turns
            self._heating[version] = self._reader.submit(self._adapters.heat, version)
        return self._heating[version].done()

    def admit(self) -> None:
        """Begin on as many of those who wait as there are free slots."""
        while True:
            with self._lock:
                if all(slot.busy for slot in self._slots.slots):
                    return
                asked = next(self._turns.offers(self._can_begin), None)
                if asked is None:
                    return
                self._turns.take(asked)
                self._beginning = [asked.name]
            try:
                self._begin(asked)
            except LorafitError as error:  # its folder holds another adapter by now
                self._end(asked, error)
            except Exception as error:  # of one request, which must not end the others
                self._end(asked, AdapterError(f"'{asked.answer.adapter}' cannot be begun ({error!r}): load it again"))
            self._beginning = []

    def _begin(self, asked: Asked) -> None:
        request, version = asked.answer.request, asked.version
        loaded = None
        if version is not None:
            heating = self._heating.pop(version, None)
            loaded = heating.result() if heating else self._adapters.heat(version)
        words = None if self._tokenizer is None else Words(self._tokenizer, request.special)
        sampler, until = Sampler(request, asked.grammar), Until(request.stop)
        limit = min(request.max_tokens, self._room - len(request.prompt))
        slot = self._slots.take(request.prompt, _key(asked))  # last, so that nothing fails with a slot in hand
        assert slot is not None
        known = len(slot.held)
        row = Row(asked, slot, loaded, list(request.prompt), known, sampler, words, until, limit)
        with self._lock:
            self.rows.append(row)
            self._turns.charge(asked.name, len(request.prompt) - known)
        self.count(prompt_tokens=len(request.prompt), known_tokens=known, requests=1)

    def advance(self, row: Row, token: Token, stops: Collection[int]) -> None:
        """Tell a request its next token, and end it where that was the last. stops: ids that end a turn."""
        piece = row.advance(token, stops)
        with self._lock:
            self._turns.charge(row.asked.name, 1)
        row.asked.answer.put(piece)
        if piece.finish:
            self._leave(row)
            self._end(row.asked, row.result(piece.finish))

    def break_off(self, row: Row, why: LorafitError) -> None:
        """End one request with an error. What its slot holds is not to be trusted."""
        row.slot.held = []
        self._leave(row)
        self._end(row.asked, why)

    def drop_cancelled(self) -> None:
        """End the requests that were cancelled since the last step."""
        for row in [row for row in self.rows if row.asked.answer.is_cancelled]:
            if row.tokens:
                self._leave(row)
                row.asked.answer.put(row.cancelled())
                self._end(row.asked, row.result("cancelled"))
            else:
                self.break_off(row, CancelledError("cancelled before its first token: ask again"))
        with self._lock:
            dropped = self._turns.drop(lambda asked: asked.answer.is_cancelled)
            wanted = {asked.version for asked in self._turns}
            self._heating = {one: reading for one, reading in self._heating.items() if one in wanted}
        for asked in dropped:
            self._end(asked, CancelledError("cancelled before its first token: ask again"))

    def end_all(self, error: LorafitError) -> None:
        """End every request with an error."""
        with self._lock:
            waiting = self._turns.drop(lambda asked: True)
            rows, self.rows = self.rows, []
        for asked in [*waiting, *(row.asked for row in rows)]:
            self._end(asked, error)

    def _leave(self, row: Row) -> None:
        row.slot.busy = False
        with self._lock:
            self.rows.remove(row)

    def _end(self, asked: Asked, last: Result | LorafitError) -> None:
        """Tell the last there is to an answer, and let its adapter go."""
        if asked.version is not None:
            self._adapters.enter(asked.version, -1)
        asked.answer.put(last)

    def count(self, **more: float) -> None:
        """Add to fields of the stats."""
        with self._lock:
            self._stats = replace(self._stats, **{key: getattr(self._stats, key) + n for key, n in more.items()})

    def stats(self) -> Stats:
        """What is being done, and what was."""
        with self._lock:
            answering = frozenset(row.asked.name for row in self.rows if row.asked.name)
            queued = frozenset(asked.name for asked in self._turns if asked.name)
            return replace(
                self._stats,
                running=len(self.rows),
                waiting=len(self._turns),
                answering=answering,
                queued=queued,
                slots_used=self._slots.used,
                served=dict(self._turns.served),
            )

    def close(self) -> None:
        """Read no more adapters."""
        self._reader.shutdown(wait=True, cancel_futures=True)


def _key(asked: Asked) -> Key:
    return (asked.version.digest, asked.answer.request.adapter_scale) if asked.version else (None, 1.0)
