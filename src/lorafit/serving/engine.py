"""The engine: requests for many adapters come in, and answers from one loaded base go out, computed in batches.

One thread owns the model and runs steps. In a step every request that is being answered gets its next token, and new
prompts are read in pieces, short enough that the other requests do not wait too long. Requests and adapters are added
and removed between steps.
"""

from __future__ import annotations

import atexit
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future
from dataclasses import replace
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from lorafit import routing
from lorafit.adapters.adapter import Adapter
from lorafit.adapters.rendering import Rendering, Scalar
from lorafit.attachment.checks import require_bare
from lorafit.bases.base import Base
from lorafit.data.examples import Message
from lorafit.data.render import Renderer, renderer_for
from lorafit.errors import BaseError, CancelledError, LorafitError, RequestError, SettingsError
from lorafit.serving.background import Probe, Task
from lorafit.serving.families import same_for_all, servable
from lorafit.serving.pace import Pace
from lorafit.serving.pool import Pool, Version
from lorafit.serving.request import Answer, Piece, Request, Result, require_valid
from lorafit.serving.rows import Submission
from lorafit.serving.sampling import Grammar, grammar_tokenizer
from lorafit.serving.scheduler import Scheduler
from lorafit.serving.stats import Stats
from lorafit.serving.step import Steps

ROOM = 2048  # tokens of a slot by default, if the base reads as many
RENDERERS = 256  # renderers that are cached, since making one takes a while
TASKS = 0.02  # seconds for background tasks between two steps; one piece is always done
T = TypeVar("T")


def _renderer_of(base: Base, rendering: str, system: str | None, settings: str) -> Renderer:
    """Make a renderer. rendering: an adapter's, or null; settings: of the chat template. Both are JSON texts, because
    they are keys of a cache: as Python values, True, 1 and 1.0 would be one key, but templates tell them apart."""
    given: dict[str, Scalar] = json.loads(settings)
    if (trained := json.loads(rendering)) is None:
        return renderer_for(base, system, settings=tuple(given.items()), reasoning=True)
    like = Rendering.from_json(trained)
    thinks = any("think" in name and value is True for name, value in given.items())
    merged = tuple((dict(like.settings) | given).items())
    return renderer_for(base, system, replace(like, settings=merged, reasoning=like.reasoning or thinks))


class Engine:
    """Serves a base and its adapters until it is closed: `with Engine(base, adapters) as engine: ...`. It takes more
    than six parameters, and all but one are optional.

    Args:
        base: the base that answers; it is not changed.
        adapters: by name, each an Adapter or its folder.
        slots: requests that are answered at the same time.
        room: tokens of each request, prompt and answer; by default what the base reads, up to ROOM.
        queue: requests that may wait.
        stall: seconds that reading prompts may add to a step in which other requests wait for their next token.
        hot_bytes: memory for adapters in the base's dtype, ready to use.
        warm_bytes: memory for adapters as they were read. By default 4 GiB for a base on a GPU, and 0 for a base on the
            CPU, where hot adapters are in the same memory and not larger.
        native: whether to use the C++ kernels where there is a compiler.
        eight_bit: whether to compute with 8-bit weights made from the base; needs the kernels.
        accept_unknown_base: whether to take adapters that do not say which base they were trained on.
        timed: whether to choose between ways to compute a step by their time on this machine; otherwise the number of
            rows decides, and equal requests get equal answers each time.
        renderer: the renderer whose stop tokens end an answer; by default that of the base.

    Raises:
        NotServedError: the base cannot be served.
        SettingsError: slots, room, queue or stall is too small.
    """

    def __init__(
        self,
        base: Base,
        adapters: Mapping[str, Adapter | str | Path] | None = None,
        *,
        slots: int = 16,
        room: int | None = None,
        queue: int = 1024,
        stall: float = 0.25,
        hot_bytes: int = 4 << 30,
        warm_bytes: int | None = None,
        native: bool = True,
        eight_bit: bool = False,
        accept_unknown_base: bool = False,
        timed: bool = True,
        renderer: Renderer | None = None,
    ):
        model = servable(base)
        self.base = base
        self._renderers = lru_cache(RENDERERS)(partial(_renderer_of, base))
        self._renderer = renderer or (self.renderer() if base.tokenizer is not None else None)
        require_bare(base)
        positive = {"slots": slots, "room": 2 if room is None else room - 1, "queue": queue + 1, "stall": stall}
        if wrong := [name for name, value in positive.items() if not value > 0]:
            raise SettingsError(
                f"{', '.join(wrong)}: too small: choose at least 1 slot, room 2, queue 0, and stall above 0"
            )
        self.room = min(room or ROOM, base.context or room or ROOM, same_for_all(model) or room or ROOM)
        self.slots, self._pace = slots, Pace(stall)
        self.vocabulary = int(model.config.get_text_config().vocab_size)
        self._steps = Steps(base, slots, self.room, native=native, eight_bit=eight_bit, timed=timed)
        if warm_bytes is None:
            warm_bytes = 0 if base.device.type == "cpu" else 4 << 30
        self.adapters = Pool(base, hot_bytes, warm_bytes, accept_unknown_base)
        self._grammars: Any = None
        self._grammar_lock = threading.Lock()
        self._lock = threading.Condition()
        self._scheduler = Scheduler(self.adapters, self._steps.slots, base.tokenizer, queue, self.room, self._lock)
        self._probes: deque[Probe] = deque()
        self._tasks: deque[Task] = deque()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="lorafit-engine", daemon=True)
        self._started: Future[None] = Future()
        self._thread.start()
        atexit.register(self.close)  # a thread that is inside torch when the interpreter exits aborts the process
        try:
            self._started.result()
            for name, source in (adapters or {}).items():
                self.load(name, source)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def is_closed(self) -> bool:
        """Whether it has been closed or has failed."""
        return self._closing

    def close(self) -> None:
        """Cancel all answers in progress, and release the base."""
        atexit.unregister(self.close)
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        self._scheduler.close()

    # From any thread

    def submit(
        self,
        request: Request,
        listener: Callable[[Piece | Result | LorafitError], None] | None = None,
        version: Version | None = None,
    ) -> Answer:
        """Queue a request; returns at once.

        Args:
            request: the request to answer.
            listener: called with each part of the answer, as Answer describes.
            version: what `adapters.find` returned earlier; used even if the name stands for another version by now.

        Raises:
            RequestError: the request is invalid.
            UnknownAdapterError: no adapter has this name.
            BusyError: too many requests are waiting.
            BaseError: the request needs a tokenizer, and the base has none.
            CancelledError: the engine is closed.
        """
        require_valid(request, self.vocabulary, self.room)
        if self.base.tokenizer is None and (request.stop or request.schema is not None or request.grammar is not None):
            raise BaseError("stop, schema and grammar need text, and this base has no tokenizer: leave them out")
        if version is None and request.adapter is not None:
            version = self.adapters.find(request.adapter)
        grammar = self._grammar(request)  # compiled in this thread, where it delays no other request
        answer = Answer(request, version.id if version else None, listener)
        submission = Submission(answer, version, grammar)
        with self._lock:
            self._require_open()
            self._scheduler.add(submission)
            self._lock.notify_all()
        return answer

    def _require_open(self) -> None:
        if self._closing:
            raise CancelledError("the engine is closed: open another")

    def submit_all(self, requests: Sequence[Request]) -> list[Answer]:
        """Queue requests that belong together: none begins before all are queued, so that they share the same steps
        each time. Raises what `submit` raises."""
        with self._lock:
            return [self.submit(request) for request in requests]

    def prompt(
        self,
        messages: Sequence[Message],
        adapter: str | None = None,
        system: str | None = None,
        tools: Sequence[str] = (),
    ) -> tuple[int, ...]:
        """Token ids of a conversation, rendered as in the adapter's training.

        Args:
            messages: the conversation.
            adapter: its name; None: the bare base.
            system: replaces the system prompt.
            tools: the tools that may be called, as `data.tools.read_tools` returns them.
        """
        version = None if adapter is None else self.adapters.find(adapter)
        return tuple(self.renderer(version, system).prompt_ids(messages, tools))

    def renderer(
        self,
        version: Version | None = None,
        system: str | None = None,
        settings: tuple[tuple[str, Scalar], ...] = (),
    ) -> Renderer:
        """The renderer of an adapter's training, or that of the bare base.

        Args:
            version: a version of an adapter; None: the bare base.
            system: replaces the system prompt.
            settings: settings of the chat template, which override those of training. A setting that turns thinking on
                lets an answer begin with reasoning, even if the adapter learnt none.

        Raises:
            SettingsError: the template does not read a setting.
        """
        rendering = version.rendering if version else None
        trained = json.dumps(rendering.to_json() if rendering else None)
        return self._renderers(trained, system, json.dumps(dict(settings)))

    def load(self, name: str, source: Adapter | str | Path, pin: bool = False) -> Version:
        """Check an adapter, and serve it as a new version of a name. Answers in progress keep their version.

        Args:
            name: the name under which the new version is served.
            source: an Adapter, or its folder.
            pin: whether the version always stays in memory.

        Raises:
            AdapterError, FormatError: the adapter cannot be served, or has no effect; the engine serves what it served.
        """
        version = self.stage(name, source, pin)
        self.adapters.publish(version)
        return version

    def stage(self, name: str, source: Adapter | str | Path, pin: bool = False) -> Version:
        """Do what `load` does, except that no request finds the version before it is given to `adapters.publish`."""
        version = self.adapters.add(name, source, pin)
        assert version.loaded is not None
        probe = Probe(version.id, version.loaded)
        with self._lock:
            self._require_open()
            self._probes.append(probe)
            self._lock.notify_all()
        probe.require_effect()
        return version

    def between_steps(self, pieces: Generator[None, None, T]) -> Future[T]:
        """Run a generator in the thread that owns the model, piece by piece between steps. The Future gets what
        the generator returns. On a small machine, computing in a second thread would slow both down many times."""
        task = Task(pieces)
        with self._lock:
            self._require_open()
            self._tasks.append(task)
            self._lock.notify_all()
        return task.done

    def features(self, texts: Sequence[str]) -> Future[Tensor]:
        """Features of questions for a router, by the bare base: (texts, D), as `routing.features_of` returns. Raises
        BaseError for a base that gives none."""
        depths = routing.depths(self.base)
        prompts = [routing.token_ids(self.base, text)[: self.room] for text in texts]

        def pieces() -> Generator[None, None, Tensor]:
            features = []
            for ids in prompts:
                features.append(self._steps.features(ids, depths))
                yield
            return torch.stack(features)

        return self.between_steps(pieces())

    def unload(self, name: str) -> list[Version]:
        """Stop serving `name`, or the version `name@3`. Requests that are queued or being answered keep it."""
        return self.adapters.remove(name)

    def rollback(self, name: str) -> Version:
        """Make the version before a name's live one live again."""
        return self.adapters.rollback(name)

    def stats(self) -> Stats:
        """Counts of requests, tokens and steps."""
        return self._scheduler.stats()

    def _grammar(self, request: Request) -> Grammar | None:
        source = request.schema if request.grammar is None else request.grammar
        if source is None:
            return None
        with self._grammar_lock:  # a lock of its own, since making the tokenizer takes a while
            if self._grammars is None:
                assert self._renderer is not None
                self._grammars = grammar_tokenizer(self.base.tokenizer, self.vocabulary, self._renderer.stop_ids)
        return Grammar(self._grammars, source)

    # In the thread that owns the model

    def _run(self) -> None:
        try:
            with self._steps.owning():
                self._started.set_result(None)
                while self._turn():
                    pass
        except BaseException as error:  # everyone who waits for a result must get the error
            self._end_all(
                error if isinstance(error, LorafitError) else BaseError(f"the engine stopped ({error!r}): open another")
            )
        else:
            self._end_all(CancelledError("the engine was closed: open another"))

    def _end_all(self, error: LorafitError) -> None:
        with self._lock:
            self._closing = True
            waiting = [*(probe.done for probe in self._probes), *(task.done for task in self._tasks)]
            self._probes.clear()
            self._tasks.clear()
        self._steps.forget()
        self._scheduler.end_all(error)
        for done in [*waiting, self._started]:
            if not done.done():
                done.set_exception(error)

    def _turn(self) -> bool:
        """Do one step, or wait for something to do. Returns False once the engine is closed."""
        scheduler = self._scheduler
        with self._lock:
            while not (self._closing or self._probes or self._tasks or scheduler.rows or scheduler.ready()):
                self._steps.mixer.end()
                self._lock.wait(0.05 if scheduler.waits else None)
            if self._closing:
                return False
            probe = self._probes[0] if self._probes else None  # it stays in the queue until the step has ended
        began = time.monotonic()
        self._run_tasks(began + TASKS)
        scheduler.drop_cancelled()
        scheduler.admit()
        if scheduler.rows or probe:
            try:
                self._step(began, probe)
            except Exception as error:  # such as full memory: ending the requests frees some for the next ones
                why = f"the step failed ({error!r})"
                if probe and not probe.done.done():
                    probe.fail(why)
                else:
                    for row in list(scheduler.rows):
                        again = "ask again; if it fails again, lower slots or room"
                        scheduler.break_off(row, CancelledError(f"{why}: {again}"))
        if probe:
            with self._lock:
                self._probes.popleft()
        return True

    def _run_tasks(self, end: float) -> None:
        """Do one piece of the background tasks, and more pieces in turns until `end`."""
        while True:
            with self._lock:
                task = self._tasks.popleft() if self._tasks else None
            if task is None:
                return
            if task.advance():
                with self._lock:
                    self._tasks.append(task)
            if time.monotonic() > end:
                return

    def _step(self, began: float, probe: Probe | None) -> None:
        """Compute one step, with a new adapter to try, if any. Each row whose prompt is fully read gets a token."""
        scheduler, steps = self._scheduler, self._steps
        shares = self._pace.shares(scheduler.rows)
        rows = sorted(shares, key=lambda row: (id(row.loaded) if row.loaded else 0, row.slot.number))
        lengths = [shares[row] for row in rows]
        ends = [shares[row] == row.left for row in rows]
        ids = [row.ids[len(row.slot.held) :][: shares[row]] for row in rows]
        owners = [row.loaded for row in rows]
        scales = [row.submission.answer.request.adapter_scale for row in rows]
        slots = [row.slot for row in rows]
        if probe:
            text = probe.text(self.vocabulary)
            slots += steps.slots.probing
            ids, owners = [*ids, text, text], [*owners, None, probe.loaded]
            scales, ends = [*scales, 1.0, 1.0], [*ends, True, True]
        started = time.monotonic()
        logits = steps.forward(slots, ids, owners, scales, ends)
        model_seconds = time.monotonic() - started
        if probe:
            probe.done.set_result(logits[-2:].float())
            logits = logits[:-2]
        for row, part in zip(rows, ids, strict=False):
            row.slot.held += part
        self._pace.learn(lengths, model_seconds)
        done = [row for row, ended in zip(rows, ends, strict=False) if ended]
        most, place = logits.max(-1)  # a NaN counts as the largest
        finite, likeliest = most.isfinite().tolist(), place.tolist()
        for row, row_logits, is_finite, best in zip(done, logits, finite, likeliest, strict=True):
            if not is_finite:
                name = row.submission.answer.adapter or self.base.name
                scheduler.break_off(row, RequestError(f"'{name}' computes NaN or infinity: train it again"))
                continue
            try:
                token = row.sampler.draw(row_logits, best)
                scheduler.advance(row, token, self._renderer.stop_ids if self._renderer else ())
            except Exception as error:  # an error of one request must not end the others
                scheduler.break_off(
                    row, RequestError(f"the answer cannot continue ({error!r}): change the request's settings")
                )
        scheduler.count(steps=1, seconds=time.monotonic() - began, model_seconds=model_seconds, tokens=len(done))
