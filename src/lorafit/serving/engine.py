"""The engine: one loaded base answers many requests at once, each with its own adapter.

One thread owns the model. It goes in steps: every request that is being answered gets its next token, and prompts that
are new are read in pieces beside them, as many tokens of them as do not keep the others waiting too long. Between two
steps requests come and go, and adapters too.
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
from lorafit.errors import (
    BaseError,
    CancelledError,
    LorafitError,
    RequestError,
    SettingsError,
)
from lorafit.serving.beside import Aside, Probe
from lorafit.serving.families import same_for_all, servable
from lorafit.serving.pace import Pace
from lorafit.serving.pool import Pool, Version
from lorafit.serving.request import Answer, Piece, Request, Result, require_valid
from lorafit.serving.rows import Asked
from lorafit.serving.sampling import Grammar, grammar_tokenizer
from lorafit.serving.scheduler import Scheduler
from lorafit.serving.stats import Stats
from lorafit.serving.step import Steps

ROOM = 2048  # tokens of a slot, where the base reads as many
RENDERERS = 256  # that are kept, by system prompt: each looks through its template once
ASIDE = 0.02  # seconds that work aside may take between two steps; one piece is done at least
T = TypeVar("T")


def _renderer_of(base: Base, trained: str, system: str | None, told: str) -> Renderer:
    """trained, told: the rendering of an adapter, or null, and settings of the template, as JSON: true, 1 and 1.0 are
    equal in Python, and not to a template."""
    settings: tuple[tuple[str, Scalar], ...] = tuple(json.loads(told).items())
    if (found := json.loads(trained)) is None:
        return renderer_for(base, system, settings=settings, reasoning=True)
    rendering = Rendering.from_json(found)
    thinks = any("think" in name and value is True for name, value in settings)
    merged = tuple((dict(rendering.settings) | dict(settings)).items())
    return renderer_for(base, system, replace(rendering, settings=merged, reasoning=rendering.reasoning or thinks))


class Engine:
    """Serves a base and its adapters until it is closed: `with Engine(base, adapters) as engine: ...`.

    adapters: by name, each a value or the folder of one. slots: requests that are answered at once. room: tokens of
    each, prompt and answer; by default what the base reads, up to ROOM. queue: requests that may wait. stall: seconds
    that reading prompts may add to a step in which others wait for their next token. hot_bytes, warm_bytes: that
    adapters in the base's dtype, and as they were read, may take; by default no bytes of the latter beside a base on
    the CPU, where a hot one is smaller and in the same memory (the one made hot last is kept), and else 4 GiB. native:
    whether to use the kernels in C++ where there is a compiler. eight_bit: compute with 8-bit weights made of the base;
    needs them. timed: choose between ways to compute a step by their time on this machine; without, by its number of
    rows only, so that the answers to the same requests are the same each time. renderer: whose tokens end an answer; by
    default the base's.

    Raises NotServedError for a base that cannot be served so.
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
        self.base = base
        self._renderers = lru_cache(RENDERERS)(partial(_renderer_of, base))
        self._renderer = renderer or (self.renderer() if base.tokenizer is not None else None)
        require_bare(base)
        given = {"slots": slots, "room": 2 if room is None else room - 1, "queue": queue + 1, "stall": stall}
        if wrong := [name for name, value in given.items() if not value > 0]:
            raise SettingsError(f"{', '.join(wrong)}: too small: choose at least 1 slot, a room of 2, a queue of 0")
        model = servable(base)
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
        self._asides: deque[Aside] = deque()
        self._closing = False
        self._thread = threading.Thread(target=self._run, name="lorafit-engine", daemon=True)
        self._measured: Future[None] = Future()
        self._thread.start()
        atexit.register(self.close)  # a thread inside torch when the interpreter ends would abort the process
        try:
            self._measured.result()
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
        """Whether it answers no more: it was closed, or has failed."""
        return self._closing

    def close(self) -> None:
        """Break off what is being answered, and let go of the base."""
        atexit.unregister(self.close)
        with self._lock:
            self._closing = True
            self._lock.notify_all()
        if self._thread.is_alive() and self._thread is not threading.current_thread():
            self._thread.join()
        self._scheduler.close()

    # What others ask, from any thread

    def submit(
        self,
        request: Request,
        listener: Callable[[Piece | Result | LorafitError], None] | None = None,
        version: Version | None = None,
    ) -> Answer:
        """Have a request answered; returns at once. listener: see Answer. version: what `adapters.find` gave for its
        adapter before, whatever the name means by now. Raises RequestError, UnknownAdapterError, or BusyError."""
        require_valid(request, self.vocabulary, self.room)
        if self.base.tokenizer is None and (request.stop or request.schema is not None or request.grammar is not None):
            raise BaseError("stop, schema and grammar need text, and this base has no tokenizer: leave them out")
        if version is None and request.adapter is not None:
            version = self.adapters.find(request.adapter)
        grammar = self._grammar(request)  # compiled here, where no one else waits for it
        answer = Answer(request, version.id if version else None, listener)
        asked = Asked(answer, version, grammar)
        with self._lock:
            if self._closing:
                raise CancelledError("the engine is closed: open another")
            self._scheduler.add(asked)
            self._lock.notify_all()
        return answer

    def submit_all(self, requests: Sequence[Request]) -> list[Answer]:
        """Have requests answered that belong together: none begins before all are there, so that they share the same
        steps each time. Raises what `submit` raises."""
        with self._lock:
            return [self.submit(request) for request in requests]

    def prompt(
        self,
        messages: Sequence[Message],
        adapter: str | None = None,
        system: str | None = None,
        tools: Sequence[str] = (),
    ) -> tuple[int, ...]:
        """Token ids of a conversation, as the adapter was trained to read it. system: another system prompt. tools:
        that may be called, as `data.tools.read_tools` reads them."""
        version = None if adapter is None else self.adapters.find(adapter)
        return tuple(self.renderer(version, system).prompt_ids(messages, tools))

    def renderer(
        self,
        version: Version | None = None,
        system: str | None = None,
        settings: tuple[tuple[str, Scalar], ...] = (),
    ) -> Renderer:
        """The renderer of what an adapter was trained with; of the bare base, as its template has it, without one.

        Args:
            version: the adapter's.
            system: another system prompt.
            settings: of the template, over those of the training. One that turns thinking on lets an answer begin with
                its reasoning, whatever was learnt.

        Raises:
            SettingsError: a setting that the template does not read.
        """
        rendering = version.rendering if version else None
        trained = json.dumps(rendering.to_json() if rendering else None)
        return self._renderers(trained, system, json.dumps(dict(settings)))

    def load(self, name: str, source: Adapter | str | Path, pin: bool = False) -> Version:
        """Check an adapter, see that it changes something, and let its name mean it. What is being answered goes on,
        and ends on the version it began with. Raises AdapterError or FormatError; then all is as before."""
        version = self.tried(name, source, pin)
        self.adapters.publish(version)
        return version

    def tried(self, name: str, source: Adapter | str | Path, pin: bool = False) -> Version:
        """As load, but nobody finds the version before `adapters.publish` is called with it."""
        version = self.adapters.add(name, source, pin)
        assert version.loaded is not None
        probe = Probe(version.id, version.loaded)
        with self._lock:
            if self._closing:
                raise CancelledError("the engine is closed: open another")
            self._probes.append(probe)
            self._lock.notify_all()
        probe.require_effect()
        return version

    def aside(self, pieces: Generator[None, None, T]) -> Future[T]:
        """What a generator returns that runs in the thread which owns the model, in pieces between two steps: whatever
        computes beside the engine in a thread of its own makes both many times slower on a small machine."""
        aside = Aside(pieces)
        with self._lock:
            if self._closing:
                raise CancelledError("the engine is closed: open another")
            self._asides.append(aside)
            self._lock.notify_all()
        return aside.done

    def features(self, texts: Sequence[str]) -> Future[Tensor]:
        """What the bare base makes of questions, for a router: (texts, D), as `routing.features_of` gives it. Raises
        BaseError where it can tell nothing of them."""
        depths = routing.depths(self.base)
        asked = [routing.token_ids(self.base, text)[: self.room] for text in texts]

        def pieces() -> Generator[None, None, Tensor]:
            found = []
            for ids in asked:
                found.append(self._steps.features(ids, depths))
                yield
            return torch.stack(found)

        return self.aside(pieces())

    def unload(self, name: str) -> list[Version]:
        """Serve `name`, or the version `name@3`, no longer. What is being answered, or waits, is answered still."""
        return self.adapters.remove(name)

    def rollback(self, name: str) -> Version:
        """Let the name mean the version before."""
        return self.adapters.rollback(name)

    def stats(self) -> Stats:
        return self._scheduler.stats()

    def _grammar(self, request: Request) -> Grammar | None:
        kept = request.schema if request.grammar is None else request.grammar
        if kept is None:
            return None
        with self._grammar_lock:  # one of its own: making it takes a while
            if self._grammars is None:
                assert self._renderer is not None
                self._grammars = grammar_tokenizer(self.base.tokenizer, self.vocabulary, self._renderer.stop_ids)
        return Grammar(self._grammars, kept)

    # What the thread does that owns the model

    def _run(self) -> None:
        try:
            with self._steps.owning():
                self._measured.set_result(None)
                while self._turn():
                    pass
        except BaseException as error:  # whoever waits must hear of it
            self._end_all(
                error if isinstance(error, LorafitError) else BaseError(f"the engine stopped ({error!r}): open another")
            )
        else:
            self._end_all(CancelledError("the engine was closed: open another"))

    def _end_all(self, error: LorafitError) -> None:
        with self._lock:
            self._closing = True
            waiting = [*(probe.done for probe in self._probes), *(aside.done for aside in self._asides)]
            self._probes.clear()
            self._asides.clear()
        self._steps.forget()
        self._scheduler.end_all(error)
        for done in [*waiting, self._measured]:
            if not done.done():
                done.set_exception(error)

    def _turn(self) -> bool:
        """One step, or a wait for something to do. False once the engine is closed."""
        scheduler = self._scheduler
        with self._lock:
            while not (self._closing or self._probes or self._asides or scheduler.rows or scheduler.ready()):
                self._steps.mixer.end()
                self._lock.wait(0.05 if scheduler.waits else None)
            if self._closing:
                return False
            probe = self._probes[0] if self._probes else None  # it stays there until it is answered, however this ends
        began = time.monotonic()
        self._go_on_aside(began + ASIDE)
        scheduler.drop_cancelled()
        scheduler.admit()
        if scheduler.rows or probe:
            try:
                self._step(began, probe)
            except Exception as error:  # a full memory, in whatever way it shows: the next requests find it emptier
                why = f"the step failed ({error!r})"
                if probe and not probe.done.done():
                    probe.fail(why)
                else:
                    for row in list(scheduler.rows):
                        scheduler.break_off(row, CancelledError(f"{why}: ask again, with lower slots or room"))
        if probe:
            with self._lock:
                self._probes.popleft()
        return True

    def _go_on_aside(self, end: float) -> None:
        """A piece of what there is to do between steps, and more until `end`; each in its turn."""
        while True:
            with self._lock:
                aside = self._asides.popleft() if self._asides else None
            if aside is None:
                return
            if aside.goes_on():
                with self._lock:
                    self._asides.append(aside)
            if time.monotonic() > end:
                return

    def _step(self, began: float, probe: Probe | None) -> None:
        scheduler, steps = self._scheduler, self._steps
        shares = self._pace.shares(scheduler.rows)
        taking = sorted(shares, key=lambda row: (id(row.loaded) if row.loaded else 0, row.slot.number))
        lengths = [shares[row] for row in taking]
        ends = [shares[row] == row.left for row in taking]
        ids = [row.ids[len(row.slot.held) :][: shares[row]] for row in taking]
        owners = [row.loaded for row in taking]
        scales = [row.asked.answer.request.adapter_scale for row in taking]
        slots = [row.slot for row in taking]
        if probe:
            text = probe.text(self.vocabulary)
            slots += steps.slots.probing
            ids, owners = [*ids, text, text], [*owners, None, probe.loaded]
            scales, ends = [*scales, 1.0, 1.0], [*ends, True, True]
        ran = time.monotonic()
        logits = steps.forward(slots, ids, owners, scales, ends)
        model_seconds = time.monotonic() - ran
        if probe:
            probe.done.set_result(logits[-2:].float())
            logits = logits[:-2]
        for row, part in zip(taking, ids, strict=False):
            row.slot.held += part
        self._pace.learn(lengths, model_seconds)
        done = [row for row, ended in zip(taking, ends, strict=False) if ended]
        most, place = logits.max(-1)  # one that is no number is the most
        whole, likeliest = most.isfinite().tolist(), place.tolist()
        for row, own, finite, best in zip(done, logits, whole, likeliest, strict=True):
            if not finite:
                who = row.asked.answer.adapter or self.base.name
                scheduler.break_off(row, RequestError(f"'{who}' gives no finite numbers here: train it again"))
                continue
            try:
                scheduler.advance(row, row.sampler.draw(own, best), self._renderer.stop_ids if self._renderer else ())
            except Exception as error:  # of one request, which must not end the others
                scheduler.break_off(
                    row, RequestError(f"the answer cannot go on ({error!r}): change the request's settings")
                )
        scheduler.count(steps=1, seconds=time.monotonic() - began, model_seconds=model_seconds, tokens=len(done))
