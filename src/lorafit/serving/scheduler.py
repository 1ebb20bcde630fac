"""Decides which requests are answered and which wait: requests come in, and their answers get parts until they end."""

from __future__ import annotations

import threading
from collections.abc import Collection
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from typing import Any

from lorafit.errors import AdapterError, BusyError, CancelledError, LorafitError
from lorafit.generation.text import Detokenizer, StopTexts
from lorafit.serving.mixing import Loaded
from lorafit.serving.pool import Pool, Version
from lorafit.serving.request import Result, Token
from lorafit.serving.rows import Row, Submission
from lorafit.serving.sampling import Sampler
from lorafit.serving.slots import MIN_SHARED, Key, Slots, common_length
from lorafit.serving.stats import Stats
from lorafit.serving.turns import Turns


class Scheduler:
    """Gives free slots to waiting requests, first to those of the adapter that was served least.

    Requests are added from any thread that holds `lock`; everything else happens in the thread that owns the model.

    Args:
        adapters: that are served.
        slots: that requests are answered in.
        tokenizer: of the base; None where it has none.
        queue: requests that may wait.
        room: tokens of a request, prompt and answer.
        lock: of the engine; it is notified of new requests.
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

    def add(self, submission: Submission) -> None:
        """Queue a request. Raises BusyError where too many wait already."""
        free = len(self._slots.slots) - len(self.rows) - len(self._beginning)
        if len(self._turns) >= self._queue + free:
            raise BusyError(f"{self._queue} requests are waiting already: ask again later")
        if submission.version is not None:
            self._adapters.enter(submission.version, 1)
        self._turns.add(submission, [*(row.submission.name for row in self.rows), *self._beginning])

    @property
    def waits(self) -> bool:
        """Whether any request waits."""
        return len(self._turns) > 0

    def ready(self) -> bool:
        """Whether a waiting request can begin, or was cancelled. Starts to read adapters that are only on disk."""
        return any(queued.answer.is_cancelled for queued in self._turns) or any(self._turns.offers(self._can_begin))

    def _can_begin(self, submission: Submission) -> bool:
        """Whether its adapter is hot, and no other request is computing keys and values that it could take over. So a
        system prompt that many requests share is computed once, even if they come at the same time."""
        if not self._is_hot(submission):
            return False
        prompt, key = submission.answer.request.prompt, _key(submission)
        shared = [common_length(row.ids, prompt) for row in self.rows if row.slot.key == key and row.left > 1]
        held = (common_length(ids, prompt) for ids in self._slots.of(key))
        return not shared or max(shared) < MIN_SHARED + max(held)

    def _is_hot(self, submission: Submission) -> bool:
        """Whether its adapter is hot. Otherwise another thread reads it, and other requests go first."""
        version = submission.version
        if version is None or version.loaded is not None:
            self._heating.pop(version, None) if version else None
            return True
        if version not in self._heating:
            if any(not reading.done() for reading in self._heating.values()):
                return False  # one is read at a time, in the order of turns
            self._heating[version] = self._reader.submit(self._adapters.heat, version)
        return self._heating[version].done()

    def admit(self) -> None:
        """Begin waiting requests while there are free slots."""
        while True:
            with self._lock:
                if all(slot.busy for slot in self._slots.slots):
                    return
                submission = next(self._turns.offers(self._can_begin), None)
                if submission is None:
                    return
                self._turns.take(submission)
                self._beginning = [submission.name]
            try:
                self._begin(submission)
            except LorafitError as error:  # its folder holds another adapter by now
                self._end(submission, error)
            except Exception as error:  # of one request, which must not end the others
                name = submission.answer.adapter
                self._end(submission, AdapterError(f"'{name}' cannot be begun ({error!r}): load it again"))
            self._beginning = []

    def _begin(self, submission: Submission) -> None:
        request, version = submission.answer.request, submission.version
        loaded = None
        if version is not None:
            heating = self._heating.pop(version, None)
            loaded = heating.result() if heating else self._adapters.heat(version)
        words = None if self._tokenizer is None else Detokenizer(self._tokenizer, request.special)
        sampler, until = Sampler(request, submission.grammar), StopTexts(request.stop)
        limit = min(request.max_tokens, self._room - len(request.prompt))
        slot = self._slots.take(request.prompt, _key(submission))  # last, so that no error leaves a slot busy
        assert slot is not None
        known = len(slot.held)
        row = Row(submission, slot, loaded, list(request.prompt), known, sampler, words, until, limit)
        with self._lock:
            self.rows.append(row)
            self._turns.charge(submission.name, len(request.prompt) - known)
        self.count(prompt_tokens=len(request.prompt), known_tokens=known, requests=1)

    def advance(self, row: Row, token: Token, stops: Collection[int]) -> None:
        """Give a request its next token, and end it where that is the last. stops: ids that end a turn."""
        piece = row.advance(token, stops)
        with self._lock:
            self._turns.charge(row.submission.name, 1)
        row.submission.answer.put(piece)
        if piece.finish:
            self._leave(row)
            self._end(row.submission, row.result(piece.finish))

    def break_off(self, row: Row, why: LorafitError) -> None:
        """End a request with an error, and forget what its slot holds."""
        row.slot.held = []
        self._leave(row)
        self._end(row.submission, why)

    def drop_cancelled(self) -> None:
        """End the requests that were cancelled since the last step."""
        for row in [row for row in self.rows if row.submission.answer.is_cancelled]:
            if row.tokens:
                self._leave(row)
                row.submission.answer.put(row.cancelled())
                self._end(row.submission, row.result("cancelled"))
            else:
                self.break_off(row, CancelledError("cancelled before its first token: ask again"))
        with self._lock:
            dropped = self._turns.drop(lambda queued: queued.answer.is_cancelled)
            needed = {queued.version for queued in self._turns}
            self._heating = {version: reading for version, reading in self._heating.items() if version in needed}
        for submission in dropped:
            self._end(submission, CancelledError("cancelled before its first token: ask again"))

    def end_all(self, error: LorafitError) -> None:
        """End every request with an error."""
        with self._lock:
            waiting = self._turns.drop(lambda queued: True)
            rows, self.rows = self.rows, []
        for submission in [*waiting, *(row.submission for row in rows)]:
            self._end(submission, error)

    def _leave(self, row: Row) -> None:
        row.slot.busy = False
        with self._lock:
            self.rows.remove(row)

    def _end(self, submission: Submission, last: Result | LorafitError) -> None:
        """Give an answer its last part, and release its adapter."""
        if submission.version is not None:
            self._adapters.enter(submission.version, -1)
        submission.answer.put(last)

    def count(self, **more: float) -> None:
        """Add to fields of the stats."""
        with self._lock:
            self._stats = replace(self._stats, **{key: getattr(self._stats, key) + n for key, n in more.items()})

    def stats(self) -> Stats:
        """The present state of the requests, and the counts so far."""
        with self._lock:
            return replace(
                self._stats,
                running=len(self.rows),
                waiting=len(self._turns),
                answering=frozenset(row.submission.name for row in self.rows if row.submission.name),
                queued=frozenset(queued.name for queued in self._turns if queued.name),
                slots_used=self._slots.used,
                served=dict(self._turns.served),
            )

    def close(self) -> None:
        """Read no more adapters."""
        self._reader.shutdown(wait=True, cancel_futures=True)


def _key(submission: Submission) -> Key:
    version = submission.version
    return (version.digest, submission.answer.request.adapter_scale) if version else (None, 1.0)
