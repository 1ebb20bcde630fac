"""The engine: one loaded base answers many requests at once, each with its own adapter.

One thread owns the model. It goes in steps: every request that is being answered gets its next token, and prompts that
are new are read in pieces beside them, as many tokens of them as do not keep the others waiting too long. Between two
steps requests come and go, and adapters too.
"""

from __future__ import annotations

import atexit
import inspect
import json
import threading
import time
from collections import deque
from collections.abc import Callable, Generator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from pathlib import Path
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor

from lorafit import routing
from lorafit.adapters.adapter import Adapter
from lorafit.adapters.rendering import Rendering, Scalar
from lorafit.attachment.adapters import adapting
from lorafit.attachment.attention import attending
from lorafit.attachment.blocks import inputs_of_blocks
from lorafit.attachment.checks import require_bare
from lorafit.bases.base import Base
from lorafit.data.examples import Message
from lorafit.data.render import Renderer, renderer_for
from lorafit.errors import (
    AdapterError,
    BaseError,
    BusyError,
    CancelledError,
    LorafitError,
    NotServedError,
    RequestError,
    SettingsError,
)
from lorafit.generation.text import Until, Words
from lorafit.serving.beside import Aside, Probe
from lorafit.serving.decoder import decoder_of
from lorafit.serving.families import PIECES, at_once, require_same, same_for_all, servable
from lorafit.serving.mixing import Loaded, Mixer
from lorafit.serving.native import kernels
from lorafit.serving.pace import Pace
from lorafit.serving.pool import Pool, Version
from lorafit.serving.products import Products
from lorafit.serving.request import Answer, Piece, Request, Result, Token, require_valid
from lorafit.serving.rows import Asked, Row
from lorafit.serving.sampling import Grammar, Sampler, grammar_tokenizer
from lorafit.serving.slots import NAME, WORTH, Key, Slot, Slots, Step, attention, common
from lorafit.serving.turns import Turns

ROOM = 2048  # tokens of a slot, where the base reads as many
RENDERERS = 256  # that are kept, by system prompt: each looks through its template once
ASIDE = 0.02  # seconds that work aside may take between two steps; one piece is done at least
T = TypeVar("T")


@dataclass(frozen=True)
class Stats:
    """What the engine is doing, and what it has done since it began. answering, queued: adapters of requests that are
    answered, and that wait, the bare base apart; served: tokens by adapter, of prompts and answers; `seconds` of steps,
    and of that in the model."""

    running: int = 0
    waiting: int = 0
    answering: frozenset[str] = frozenset()
    queued: frozenset[str] = frozenset()
    slots_used: float = 0.0
    prompt_tokens: int = 0
    known_tokens: int = 0
    tokens: int = 0
    requests: int = 0
    steps: int = 0
    seconds: float = 0.0
    model_seconds: float = 0.0
    served: Mapping[str | None, int] = field(default_factory=dict)


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
        self, base: Base, adapters: Mapping[str, Adapter | Path] | None = None, *, slots: int = 16,
        room: int | None = None, queue: int = 1024, stall: float = 0.25, hot_bytes: int = 4 << 30,
        warm_bytes: int | None = None, native: bool = True, eight_bit: bool = False, accept_unknown_base: bool = False,
        timed: bool = True, renderer: Renderer | None = None,
    ):  # fmt: skip
        self.base = base
        self._renderers = lru_cache(RENDERERS)(partial(_renderer_of, base))
        self._renderer = renderer or (self.renderer() if base.tokenizer is not None else None)
        self._model = servable(base)
        require_bare(base)
        given = {"slots": slots, "room": 2 if room is None else room - 1, "queue": queue + 1, "stall": stall}
        if wrong := [name for name, value in given.items() if not value > 0]:
            raise SettingsError(f"{', '.join(wrong)}: too small: choose at least 1 slot, a room of 2, a queue of 0")
        self.room = min(room or ROOM, base.context or room or ROOM, same_for_all(self._model) or room or ROOM)
        self.slots, self.queue, self._pace = slots, queue, Pace(stall)
        self.vocabulary = int(self._model.config.get_text_config().vocab_size)
        self._head_alone = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        alike = all(one.dtype == base.dtype for one in self._model.parameters())  # the kernels read one dtype
        found = kernels(base.dtype, base.device) if native and alike else None
        if eight_bit and found is None:
            raise BaseError(
                "eight_bit: only our kernels compute with 8-bit weights: leave it out, or install a C++ compiler"
            )
        self._mixer = Mixer(Products(base, found, eight_bit, timed), base.device)
        numbers = {site.path: number for number, site in enumerate(base.sites)}
        self._decoder = decoder_of(self._model, self._mixer, numbers)
        self._slots = Slots(slots, max(self.room, sum(PIECES)), found)
        if warm_bytes is None:
            warm_bytes = 0 if base.device.type == "cpu" else 4 << 30
        self.adapters = Pool(base, hot_bytes, warm_bytes, accept_unknown_base)
        self._grammars: Any = None
        self._grammar_lock = threading.Lock()
        self._lock = threading.Condition()
        self._turns = Turns()
        self._probes: deque[Probe] = deque()
        self._asides: deque[Aside] = deque()
        self._rows: list[Row] = []
        self._beginning: list[str | None] = []
        self._stats = Stats()
        self._closing = False
        self._reader = ThreadPoolExecutor(1, "lorafit-adapters")
        self._heating: dict[Version, Future[Loaded]] = {}
        expected = [at_once(self._model)]
        self._thread = threading.Thread(target=self._run, args=(expected,), name="lorafit-engine", daemon=True)
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
        self._reader.shutdown(wait=True, cancel_futures=True)

    # What others ask, from any thread

    def submit(
        self, request: Request, listener: Callable[[Piece | Result | LorafitError], None] | None = None,
        version: Version | None = None,
    ) -> Answer:  # fmt: skip
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
            free = self.slots - len(self._rows) - len(self._beginning)
            if len(self._turns) >= self.queue + free:
                raise BusyError(f"{self.queue} requests are waiting already: ask again later")
            if version is not None:
                self.adapters.enter(version, 1)
            self._turns.add(asked, [*(row.asked.name for row in self._rows), *self._beginning])
            self._lock.notify_all()
        return answer

    def submit_all(self, requests: Sequence[Request]) -> list[Answer]:
        """Have requests answered that belong together: none begins before all are there, so that they share the same
        steps each time. Raises what `submit` raises."""
        with self._lock:
            return [self.submit(request) for request in requests]

    def prompt(
        self, messages: Sequence[Message], adapter: str | None = None, system: str | None = None,
        tools: Sequence[str] = (),
    ) -> tuple[int, ...]:  # fmt: skip
        """Token ids of a conversation, as the adapter was trained to read it. system: another system prompt. tools:
        that may be called, as `data.tools.read_tools` reads them."""
        version = None if adapter is None else self.adapters.find(adapter)
        return tuple(self.renderer(version, system).prompt_ids(messages, tools))

    def renderer(
        self, version: Version | None = None, system: str | None = None,
        settings: tuple[tuple[str, Scalar], ...] = (),
    ) -> Renderer:  # fmt: skip
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

    def load(self, name: str, source: Adapter | Path, pin: bool = False) -> Version:
        """Check an adapter, see that it changes something, and let its name mean it. What is being answered goes on,
        and ends on the version it began with. Raises AdapterError or FormatError; then all is as before."""
        version = self.tried(name, source, pin)
        self.adapters.publish(version)
        return version

    def tried(self, name: str, source: Adapter | Path, pin: bool = False) -> Version:
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
                found.append(self._features(ids, depths))
                yield
            return torch.stack(found)

        return self.aside(pieces())

    def _features(self, ids: list[int], depths: Sequence[int]) -> Tensor:
        slot = self._slots.probing[0]
        tokens = torch.tensor([ids], device=self.base.device)
        step = Step.of(self._slots, [slot], [len(ids)], self.base.device)
        self._mixer.begin([None], [1.0], [len(ids)], None)
        with inputs_of_blocks(self.base, depths) as streams:
            self._model(input_ids=tokens, position_ids=step.positions, use_cache=False, step=step)
        return routing.pooled([stream[0] for stream in streams])

    def unload(self, name: str) -> list[Version]:
        """Serve `name`, or the version `name@3`, no longer. What is being answered, or waits, is answered still."""
        return self.adapters.remove(name)

    def rollback(self, name: str) -> Version:
        """Let the name mean the version before."""
        return self.adapters.rollback(name)

    def stats(self) -> Stats:
        with self._lock:
            answering = frozenset(row.asked.name for row in self._rows if row.asked.name)
            queued = frozenset(asked.name for asked in self._turns if asked.name)
            return replace(self._stats, running=len(self._rows), waiting=len(self._turns), answering=answering,
                           queued=queued, slots_used=self._slots.used, served=dict(self._turns.served))  # fmt: skip

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

    def _run(self, expected: list[tuple[list[list[int]], Tensor]]) -> None:
        try:
            with ExitStack() as held:
                held.enter_context(torch.inference_mode())
                held.enter_context(attending(self.base, NAME, attention))
                held.enter_context(adapting(self.base, self._mixer.change))
                self._require_servable(*expected.pop())  # needed no longer than this takes
                if self._decoder is not None:
                    self._decoder.measure(self._slots)
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
            waiting = self._turns.drop(lambda asked: True)
            rows, self._rows = self._rows, []
            probes = list(self._probes)
            self._probes.clear()
            asides = list(self._asides)
            self._asides.clear()
        self._mixer.end()
        self._slots.layers.clear()
        for asked in [*waiting, *(row.asked for row in rows)]:
            self._end(asked, error)
        for done in [*(probe.done for probe in probes), *(aside.done for aside in asides)]:
            if not done.done():
                done.set_exception(error)
        if not self._measured.done():
            self._measured.set_exception(error)

    def _turn(self) -> bool:
        """One step, or a wait for something to do. False once the engine is closed."""
        with self._lock:
            while not (self._closing or self._probes or self._asides or self._rows or self._ready()):
                self._mixer.end()
                self._lock.wait(0.05 if self._turns else None)
            if self._closing:
                return False
            probe = self._probes[0] if self._probes else None  # it stays there until it is answered, however this ends
        began = time.monotonic()
        self._go_on_aside(began + ASIDE)
        self._drop_cancelled()
        self._admit()
        if self._rows or probe:
            try:
                self._step(began, probe)
            except Exception as error:  # a full memory, in whatever way it shows: the next requests find it emptier
                why = f"the step failed ({error!r})"
                if probe and not probe.done.done():
                    probe.fail(why)
                else:
                    for row in list(self._rows):
                        self._break_off(row, CancelledError(f"{why}: ask again, with lower slots or room"))
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

    def _ready(self) -> bool:
        """Whether some request that waits could be begun on; has adapters read that are on disk alone."""
        return any(asked.answer.is_cancelled for asked in self._turns) or any(self._turns.offers(self._can_begin))

    def _can_begin(self, asked: Asked) -> bool:
        """Whether its adapter is hot, and no other request is just reading what it would read too: the keys and values
        of a system prompt that many have in common are computed once, also where they all come at once."""
        if not self._heated(asked):
            return False
        prompt, key = asked.answer.request.prompt, self._key(asked)
        coming = [common(row.ids, prompt) for row in self._rows if row.slot.key == key and row.left > 1]
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
            self._heating[version] = self._reader.submit(self.adapters.heat, version)
        return self._heating[version].done()

    def _drop_cancelled(self) -> None:
        for row in [row for row in self._rows if row.asked.answer.is_cancelled]:
            if row.tokens:
                self._leave(row)
                row.asked.answer.put(row.cancelled())
                self._end(row.asked, row.result("cancelled"))
            else:
                self._break_off(row, CancelledError("cancelled before its first token: ask again"))
        with self._lock:
            dropped = self._turns.drop(lambda asked: asked.answer.is_cancelled)
            wanted = {asked.version for asked in self._turns}
            self._heating = {one: reading for one, reading in self._heating.items() if one in wanted}
        for asked in dropped:
            self._end(asked, CancelledError("cancelled before its first token: ask again"))

    def _admit(self) -> None:
        """Give free slots to those who wait, the adapter that was served least first."""
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

    def _key(self, asked: Asked) -> Key:
        return (asked.version.digest, asked.answer.request.adapter_scale) if asked.version else (None, 1.0)

    def _begin(self, asked: Asked) -> None:
        request, version = asked.answer.request, asked.version
        loaded = None
        if version is not None:
            heating = self._heating.pop(version, None)
            loaded = heating.result() if heating else self.adapters.heat(version)
        words = None if self.base.tokenizer is None else Words(self.base.tokenizer, request.special)
        sampler, until = Sampler(request, asked.grammar), Until(request.stop)
        limit = min(request.max_tokens, self.room - len(request.prompt))
        slot = self._slots.take(request.prompt, self._key(asked))  # last, so that nothing fails with a slot in hand
        assert slot is not None
        known = len(slot.held)
        row = Row(asked, slot, loaded, list(request.prompt), known, sampler, words, until, limit)
        with self._lock:
            self._rows.append(row)
            self._turns.charge(asked.name, len(request.prompt) - known)
        self._count(prompt_tokens=len(request.prompt), known_tokens=known, requests=1)

    def _count(self, **more: float) -> None:
        with self._lock:
            self._stats = replace(self._stats, **{key: getattr(self._stats, key) + n for key, n in more.items()})

    def _step(self, began: float, probe: Probe | None) -> None:
        shares = self._pace.shares(self._rows)
        taking = sorted(shares, key=lambda row: (id(row.loaded) if row.loaded else 0, row.slot.number))
        lengths = [shares[row] for row in taking]
        ends = [shares[row] == row.left for row in taking]
        ids = [row.ids[len(row.slot.held) :][: shares[row]] for row in taking]
        owners = [row.loaded for row in taking]
        scales = [row.asked.answer.request.adapter_scale for row in taking]
        slots = [row.slot for row in taking]
        if probe:
            text = probe.text(self.vocabulary)
            slots += self._slots.probing
            ids, owners = [*ids, text, text], [*owners, None, probe.loaded]
            scales, ends = [*scales, 1.0, 1.0], [*ends, True, True]
        ran = time.monotonic()
        logits = self._forward(slots, ids, owners, scales, ends)
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
                self._break_off(row, RequestError(f"'{who}' gives no finite numbers here: train it again"))
                continue
            try:
                self._advance(row, row.sampler.draw(own, best))
            except Exception as error:  # of one request, which must not end the others
                self._break_off(
                    row, RequestError(f"the answer cannot go on ({error!r}): change the request's settings")
                )
        self._count(steps=1, seconds=time.monotonic() - began, model_seconds=model_seconds, tokens=len(done))

    def _forward(
        self, slots: Sequence[Slot], ids: Sequence[Sequence[int]], owners: Sequence[Loaded | None],
        scales: Sequence[float], ends: Sequence[bool],
    ) -> Tensor:  # fmt: skip
        """Logits (ends, vocabulary) after the last token of each that ends here; keys and values go into the slots.
        Rows of one adapter are neighbours."""
        device, lengths = self.base.device, [len(part) for part in ids]
        step = Step.of(self._slots, slots, lengths, device)
        last = torch.tensor(lengths).cumsum(0)[torch.tensor(ends, dtype=torch.bool)] - 1
        alone = last.to(device) if self._head_alone and len(last) < sum(lengths) else None
        self._mixer.begin(owners, scales, lengths, None if alone is None else [int(one) for one in ends])
        tokens = torch.tensor([[token for part in ids for token in part]], device=device)
        if self._decoder is not None:
            logits = self._decoder.logits(tokens, step, alone)
        else:
            where = {} if alone is None else {"logits_to_keep": alone}
            logits = self._model(input_ids=tokens, position_ids=step.positions, use_cache=False, step=step,
                                 **where).logits[0]  # fmt: skip
        return logits if alone is not None else logits[last.to(device)]

    def _advance(self, row: Row, token: Token) -> None:
        piece = row.advance(token, self._renderer.stop_ids if self._renderer else ())
        with self._lock:
            self._turns.charge(row.asked.name, 1)
        row.asked.answer.put(piece)
        if piece.finish:
            self._leave(row)
            self._end(row.asked, row.result(piece.finish))

    def _break_off(self, row: Row, why: LorafitError) -> None:
        """End one request with an error. What its slot holds is not to be trusted."""
        row.slot.held = []
        self._leave(row)
        self._end(row.asked, why)

    def _leave(self, row: Row) -> None:
        row.slot.busy = False
        with self._lock:
            self._rows.remove(row)

    def _end(self, asked: Asked, last: Result | LorafitError) -> None:
        """Tell the last there is to an answer, and let its adapter go."""
        if asked.version is not None:
            self.adapters.enter(asked.version, -1)
        asked.answer.put(last)

    def _require_servable(self, pieces: list[list[int]], wanted: Tensor) -> None:
        """Raise BaseError unless steps over slots compute what the model computes at once: `wanted`, logits after each
        of these pieces of a text."""
        slot, found = replace(self._slots.probing[0], held=[]), []
        try:
            for part in pieces:
                found.append(self._forward([slot], [part], [None], [1.0], [True])[0])
                slot.held += part
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a family that takes no such arguments fails in whatever way it does
            raise NotServedError(
                f"'{self.base.name}' cannot be served ({error}): open a base of another family"
            ) from error
        exact = self.base.dtype == torch.float32 and not self._mixer.products.bytes
        require_same(self.base, torch.stack(found), wanted, 1e-3 if exact else 0.1)
