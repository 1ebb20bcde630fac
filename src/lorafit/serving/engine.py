"""The engine: one loaded base answers many requests at once, each with its own adapter.

One thread owns the model. It goes in steps: every request that is being answered gets its next token, and prompts that
are new are read in pieces beside them, as many tokens of them as do not keep the others waiting too long. Between two
steps requests come and go, and adapters too.

Fairness: the place that is free next goes to the adapter that has been served the fewest tokens (virtual token
counters, Sheng et al. 2024, arXiv 2401.00588), so that one with few requests does not wait behind one with many.
"""

from __future__ import annotations

import atexit
import inspect
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from lorafit.adapter import Adapter
from lorafit.attachment import adapting, attending, require_bare
from lorafit.base import Base
from lorafit.data.examples import Message
from lorafit.data.render import Renderer, renderer_for
from lorafit.errors import AdapterError, BaseError, BusyError, CancelledError, LorafitError, RequestError, SettingsError
from lorafit.generation.text import Until, Words
from lorafit.serving.decoder import decoder_of
from lorafit.serving.mixing import Loaded, Mix, Mixer
from lorafit.serving.native import kernels
from lorafit.serving.pool import Pool, Version
from lorafit.serving.products import Products
from lorafit.serving.request import Answer, Finish, Piece, Request, Result, Token, require_valid
from lorafit.serving.sampling import Grammar, Sampler, grammar_tokenizer
from lorafit.serving.slots import NAME, Slot, Slots, Step, attention

# Families whose attention is all that passes from token to token, through transformers' attention interface. Each is
# tested; a base of one of them is still measured before it is served.
FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3", "gpt2", "gpt_neox", "olmo2", "phi3", "granite"})
ROOM = 2048  # tokens of a slot, where the base reads as many
MOST = 512  # tokens of prompts in one step
LEAST = 16


@dataclass(frozen=True)
class Stats:
    """What the engine is doing, and what it has done since it began. served: tokens by adapter, of prompts and answers;
    `seconds` of steps, and of that in the model."""

    running: int
    waiting: int
    slots_used: float
    prompt_tokens: int
    known_tokens: int
    tokens: int
    requests: int
    steps: int
    seconds: float
    model_seconds: float
    served: Mapping[str | None, int]


@dataclass(eq=False)
class _Asked:
    """A request that waits. version: None for the bare base."""

    answer: Answer
    version: Version | None
    grammar: Grammar | None
    at: float

    @property
    def name(self) -> str | None:
        """Whose turn it is that is counted."""
        return self.version.name if self.version else None


@dataclass(eq=False)
class _Row:
    """A request that is being answered. ids: prompt and answer; what of it has keys and values is slot.held."""

    asked: _Asked
    slot: Slot
    loaded: Loaded | None
    ids: list[int]
    known: int
    sampler: Sampler
    words: Words | None
    until: Until
    began: float
    limit: int
    text: list[str] = field(default_factory=list)
    tokens: list[Token] = field(default_factory=list)
    first: float = 0.0

    @property
    def left(self) -> int:
        return len(self.ids) - len(self.slot.held)


class Engine:
    """Serves a base and its adapters until it is closed: `with Engine(base, adapters) as engine: ...`.

    adapters: by name, each a value or the folder of one. slots: requests that are answered at once. room: tokens of
    each, prompt and answer; by default what the base reads, up to ROOM. queue: requests that may wait. stall: seconds
    that reading prompts may add to a step in which others wait for their next token. hot_bytes, warm_bytes: that
    adapters in the base's dtype, and as they were read, may take. native: whether to use the kernels in C++ where there
    is a compiler. eight_bit: make 8-bit weights of the base, for steps of few tokens; needs them.

    Raises BaseError for a base that cannot be served so.
    """

    def __init__(
        self, base: Base, adapters: Mapping[str, Adapter | Path] | None = None, *, slots: int = 16,
        room: int | None = None, queue: int = 1024, stall: float = 0.25, hot_bytes: int = 4 << 30,
        warm_bytes: int = 4 << 30, native: bool = True, eight_bit: bool = False, accept_unknown_base: bool = False,
    ):  # fmt: skip
        self.base = base
        self._renderer = renderer_for(base) if base.tokenizer is not None else None
        self._model = _servable(base)
        require_bare(base)
        given = {"slots": slots, "room": 2 if room is None else room - 1, "queue": queue + 1, "stall": stall}
        if wrong := [name for name, value in given.items() if not value > 0]:
            raise SettingsError(f"{', '.join(wrong)}: too small: choose at least 1 slot, a room of 2, a queue of 0")
        self.room = min(room or ROOM, base.context or room or ROOM, _same_for_all(self._model) or room or ROOM)
        self.queue, self._stall = queue, stall
        self._vocabulary = int(self._model.config.get_text_config().vocab_size)
        self._head_alone = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        found = kernels(base.dtype, base.device) if native else None
        if eight_bit and found is None:
            raise BaseError(
                "eight_bit: only our kernels compute with 8-bit weights: leave it out, or install a C++ compiler"
            )
        self._decoder = decoder_of(self._model, found)
        self._mixer = Mixer(Products(base, found, eight_bit))
        self._slots = Slots(slots, self.room, found)
        self.adapters = Pool(base, hot_bytes, warm_bytes, accept_unknown_base)
        self._grammars: Any = None
        self._grammar_lock = threading.Lock()
        self._lock = threading.Condition()
        self._waiting: dict[str | None, deque[_Asked]] = {}
        self._orders: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._rows: list[_Row] = []
        self._served: dict[str | None, int] = {}
        self._credit: dict[str | None, float] = {}
        self._level = 0.0  # credit of the one served last
        self._beginning: list[str | None] = []
        self._stats = Stats(0, 0, 0.0, 0, 0, 0, 0, 0, 0.0, 0.0, {})
        self._per_token = 0.0  # seconds that a token of a prompt takes in a step
        self._closing = False
        self._reader = ThreadPoolExecutor(1, "lorafit-adapters")
        self._heating: dict[Version, Future[Loaded]] = {}
        self._thread = threading.Thread(target=self._run, name="lorafit-engine", daemon=True)
        ids = [(7 * i * i + 3 * i + 1) % self._vocabulary for i in range(24)]
        with torch.inference_mode():
            expected: Tensor = self._model(torch.tensor([ids], device=base.device), use_cache=False).logits[0]
        ready: Future[None] = Future()
        self._orders.append((lambda: self._check(ids, expected), ready))
        self._thread.start()
        atexit.register(self.close)  # a thread inside torch when the interpreter ends would abort the process
        try:
            ready.result()
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

    def submit(self, request: Request) -> Answer:
        """Have a request answered; returns at once. Raises RequestError, UnknownAdapterError, or BusyError."""
        require_valid(request, self._vocabulary, self.room)
        if self.base.tokenizer is None and (request.stop or request.schema is not None):
            raise BaseError("stop and schema need text, and this base has no tokenizer: leave them out")
        version = None if request.adapter is None else self.adapters.find(request.adapter)
        grammar = self._grammar(request)  # compiled here, where no one else waits for it
        answer = Answer(request, version.id if version else None)
        asked = _Asked(answer, version, grammar, time.monotonic())
        with self._lock:
            if self._closing:
                raise CancelledError("the engine is closed: open another")
            if sum(map(len, self._waiting.values())) >= self.queue:
                raise BusyError(f"{self.queue} requests are waiting already: ask again later")
            name = asked.name
            active = {*self._waiting, *(row.asked.name for row in self._rows), *self._beginning}
            if name not in active:  # one that comes anew begins where the others are
                level = min((self._credit[one] for one in active), default=self._level)
                self._credit[name] = max(self._credit.get(name, 0.0), level)
            self._waiting.setdefault(name, deque()).append(asked)
            self._lock.notify_all()
        return answer

    def prompt(
        self, messages: Sequence[Message], adapter: str | None = None, system: str | None = None
    ) -> tuple[int, ...]:
        """Token ids of a conversation, as the adapter was trained to read it. system: another system prompt."""
        version = None if adapter is None else self.adapters.find(adapter)
        return tuple(self.renderer(version.system if version and system is None else system).prompt_ids(messages))

    def renderer(self, system: str | None = None) -> Renderer:
        """The base's renderer with this system prompt."""
        return renderer_for(self.base, system)

    def load(self, name: str, source: Adapter | Path, pin: bool = False) -> Version:
        """Check an adapter, see that it changes something, and let its name mean it. What is being answered goes on,
        and ends on the version it began with. Raises AdapterError or FormatError; then all is as before."""
        version = self.adapters.add(name, source, pin)
        assert version.loaded is not None
        loaded = version.loaded
        self._order(lambda: self._probe(version, loaded))
        self.adapters.publish(version)
        return version

    def unload(self, name: str) -> None:
        """Serve `name`, or the version `name@3`, no longer. What is being answered, or waits, is answered still."""
        self.adapters.remove(name)

    def rollback(self, name: str) -> Version:
        """Let the name mean the version before."""
        return self.adapters.rollback(name)

    def stats(self) -> Stats:
        with self._lock:
            waiting = sum(map(len, self._waiting.values()))
            return replace(self._stats, running=len(self._rows), waiting=waiting, slots_used=self._slots.used,
                           served=dict(self._served))  # fmt: skip

    def _grammar(self, request: Request) -> Grammar | None:
        if request.schema is None:
            return None
        with self._grammar_lock:  # one of its own: making it takes a while
            if self._grammars is None:
                assert self._renderer is not None
                self._grammars = grammar_tokenizer(self.base.tokenizer, self._vocabulary, self._renderer.stop_ids)
        return Grammar(self._grammars, request.schema)

    def _order(self, work: Callable[[], Any]) -> Any:
        """Have something done by the thread that owns the model, between two steps."""
        done: Future[Any] = Future()
        with self._lock:
            if self._closing:
                raise CancelledError("the engine is closed: open another")
            self._orders.append((work, done))
            self._lock.notify_all()
        return done.result()

    # What the thread does that owns the model

    def _run(self) -> None:
        try:
            with ExitStack() as held:
                held.enter_context(torch.inference_mode())
                held.enter_context(attending(self.base, NAME, attention))
                held.enter_context(adapting(self.base, self._mixer.change))
                while self._turn():
                    pass
        except BaseException as error:  # whoever waits must hear of it
            self._end_all(
                error if isinstance(error, LorafitError) else BaseError(f"the engine stopped ({error!r}): open another")
            )
            if not isinstance(error, LorafitError):
                raise
        else:
            self._end_all(CancelledError("the engine was closed: open another"))

    def _end_all(self, error: LorafitError) -> None:
        with self._lock:
            self._closing = True
            waiting = [asked for queue in self._waiting.values() for asked in queue]
            rows, self._rows = self._rows, []
            self._waiting.clear()
            orders = list(self._orders)
            self._orders.clear()
        for asked in [*waiting, *(row.asked for row in rows)]:
            asked.answer.put(error)
        for _, done in orders:
            done.set_exception(error)

    def _turn(self) -> bool:
        """One step, or a wait for something to do. False once the engine is closed."""
        with self._lock:
            while not (self._closing or self._orders or self._rows or self._ready()):
                self._lock.wait(0.05 if self._waiting else None)
            if self._closing:
                return False
            orders = list(self._orders)
            self._orders.clear()
        for work, done in orders:
            try:
                done.set_result(work())
            except BaseException as error:  # it is the asker's to hear
                done.set_exception(error)
        began = time.monotonic()
        self._drop_cancelled()
        self._admit()
        if self._rows:
            try:
                self._step(began)
            except Exception as error:  # a full memory, in whatever way it shows: the next requests find it emptier
                for row in list(self._rows):
                    self._break_off(row, f"the step failed ({error!r}): ask again, with lower slots or room")
        return True

    def _ready(self) -> bool:
        """Whether some request that waits could be begun on; has adapters read that are on disk alone."""
        return any(self._heated(queue[0]) or queue[0].answer.is_cancelled for queue in self._waiting.values())

    def _heated(self, asked: _Asked) -> bool:
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
            self._finish(row, "cancelled")
        with self._lock:
            dropped = []
            for name in list(self._waiting):
                kept = deque(asked for asked in self._waiting[name] if not asked.answer.is_cancelled)
                if len(kept) != len(self._waiting[name]):
                    dropped += [asked for asked in self._waiting[name] if asked.answer.is_cancelled]
                    self._waiting[name] = kept
                if not kept:
                    del self._waiting[name]
            wanted = {asked.version for queue in self._waiting.values() for asked in queue}
            self._heating = {one: reading for one, reading in self._heating.items() if one in wanted}
        for asked in dropped:
            asked.answer.put(CancelledError("cancelled before its first token: ask again"))

    def _admit(self) -> None:
        """Give free slots to those who wait, the adapter that was served least first."""
        while True:
            with self._lock:
                if all(slot.busy for slot in self._slots.slots):
                    return
                turns = sorted(self._waiting, key=lambda one: self._credit.get(one, 0.0))
                ready = [name for name in turns if self._heated(self._waiting[name][0])]
                if not ready:
                    return
                name = ready[0]
                asked = self._waiting[name].popleft()
                self._beginning = [name]
                if not self._waiting[name]:
                    del self._waiting[name]
            try:
                self._begin(asked)
            except LorafitError as error:  # its folder holds another adapter by now
                asked.answer.put(error)
            except Exception as error:  # of one request, which must not end the others
                asked.answer.put(AdapterError(f"'{asked.answer.adapter}' cannot be begun ({error!r}): load it again"))
            self._beginning = []

    def _begin(self, asked: _Asked) -> None:
        request, version = asked.answer.request, asked.version
        loaded = None
        if version is not None:
            heating = self._heating.pop(version, None)
            loaded = heating.result() if heating else self.adapters.heat(version)
        key = (version.digest, request.adapter_scale) if version else (None, 1.0)
        words = Words(self.base.tokenizer) if self.base.tokenizer is not None else None
        sampler, until = Sampler(request, asked.grammar), Until(request.stop)
        limit = min(request.max_tokens, self.room - len(request.prompt))
        slot = self._slots.take(request.prompt, key)  # last, so that nothing fails with a slot in hand
        assert slot is not None
        known = len(slot.held)
        row = _Row(asked, slot, loaded, list(request.prompt), known, sampler, words, until, time.monotonic(), limit)
        with self._lock:
            self._rows.append(row)
        self._count(prompt_tokens=len(request.prompt), known_tokens=known, requests=1)
        self._charge(row, len(request.prompt) - known)

    def _charge(self, row: _Row, tokens: int) -> None:
        name = row.asked.name
        with self._lock:
            self._served[name] = self._served.get(name, 0) + tokens
            self._level = self._credit[name] = self._credit.get(name, 0.0) + tokens

    def _count(self, **more: float) -> None:
        with self._lock:
            self._stats = replace(self._stats, **{key: getattr(self._stats, key) + n for key, n in more.items()})

    def _shares(self) -> dict[_Row, int]:
        """How many tokens of each request go into this step."""
        single = [row for row in self._rows if row.left == 1]
        prompts = [row for row in self._rows if row.left > 1]
        budget = MOST
        if single and self._per_token:
            budget = max(LEAST, min(MOST, int(self._stall / self._per_token)))
        shares = dict.fromkeys(single, 1)
        for row in prompts:
            if budget <= 0:
                break
            shares[row] = min(row.left, budget)
            budget -= shares[row]
        return shares

    def _step(self, began: float) -> None:
        shares = self._shares()
        taking = sorted(shares, key=lambda row: (id(row.loaded) if row.loaded else 0, row.slot.number))
        lengths = [shares[row] for row in taking]
        ends = [shares[row] == row.left for row in taking]
        ids = [row.ids[len(row.slot.held) :][: shares[row]] for row in taking]
        owners = [row.loaded for row in taking]
        scales = [row.asked.answer.request.adapter_scale for row in taking]
        ran = time.monotonic()
        logits = self._forward([row.slot for row in taking], ids, owners, scales, ends)
        model_seconds = time.monotonic() - ran
        for row, part in zip(taking, ids, strict=True):
            row.slot.held += part
        long = sum(n for n in lengths if n > 1)
        if long >= LEAST:
            measured = model_seconds / long
            self._per_token = measured if not self._per_token else 0.7 * self._per_token + 0.3 * measured
        done = [row for row, ended in zip(taking, ends, strict=True) if ended]
        whole, likeliest = logits.isfinite().all(-1).tolist(), logits.argmax(-1).tolist()
        for row, own, finite, best in zip(done, logits, whole, likeliest, strict=True):
            if not finite:
                self._break_off(row, f"'{row.asked.answer.adapter}' gives no finite numbers here: train it again")
                continue
            try:
                self._advance(row, row.sampler.draw(own, best))
            except Exception as error:  # of one request, which must not end the others
                self._break_off(row, f"the answer cannot go on ({error!r}): change the request's settings")
        self._count(steps=1, seconds=time.monotonic() - began, model_seconds=model_seconds, tokens=len(done))

    def _forward(
        self, slots: Sequence[Slot], ids: Sequence[Sequence[int]], owners: Sequence[Loaded | None],
        scales: Sequence[float], ends: Sequence[bool],
    ) -> Tensor:  # fmt: skip
        """Logits (ends, vocabulary) after the last token of each that ends here; keys and values go into the slots.
        Rows of one adapter are neighbours."""
        device, lengths = self.base.device, [len(part) for part in ids]
        native = self._mixer.kernels is not None
        step = Step.of(self._slots, slots, lengths, device)
        self._mixer.rows = Mix.of(owners, scales, lengths, device, native)
        last = torch.tensor(lengths).cumsum(0)[torch.tensor(ends, dtype=torch.bool)] - 1
        alone = None
        if self._head_alone and len(last) < sum(lengths):
            alone = last.to(device)
            self._mixer.kept = Mix.of(owners, scales, [int(one) for one in ends], device, native)
        tokens = torch.tensor([[token for part in ids for token in part]], device=device)
        try:
            if self._decoder is not None:
                logits = self._decoder.logits(tokens, step, alone)
            else:
                where = {} if alone is None else {"logits_to_keep": alone}
                logits = self._model(input_ids=tokens, position_ids=step.positions, use_cache=False, step=step,
                                     **where).logits[0]  # fmt: skip
        finally:
            self._mixer.rows = self._mixer.kept = None  # nothing of an adapter is held between steps
        return logits if alone is not None else logits[last.to(device)]

    def _advance(self, row: _Row, token: Token) -> None:
        """What follows from a new token: its text, and whether it was the last."""
        request, now = row.asked.answer.request, time.monotonic()
        row.first = row.first or now
        row.tokens.append(token)
        row.ids.append(token.id)
        stops = self._renderer.stop_ids if self._renderer else ()
        ended = token.id in stops and not request.ignore_end
        full = len(row.tokens) >= row.limit
        closed = row.sampler.grammar is not None and row.sampler.grammar.ended
        last = ended or full or closed
        fresh = row.words.add([] if ended else [token.id], last) if row.words else ""
        text = row.until.add(fresh, last)
        row.text.append(text)
        self._charge(row, 1)
        finish: Finish | None = "stop" if ended or closed or row.until.met else "length" if full else None
        row.asked.answer.put(Piece(text, (token,), finish))
        if finish:
            self._finish(row, finish)

    def _break_off(self, row: _Row, why: str) -> None:
        """End one request with an error. What its slot holds is not to be trusted."""
        row.slot.held = []
        self._leave(row)
        row.asked.answer.put(RequestError(why))

    def _leave(self, row: _Row) -> None:
        row.slot.busy = False
        with self._lock:
            self._rows.remove(row)

    def _finish(self, row: _Row, finish: Finish) -> None:
        self._leave(row)
        asked, now = row.asked, time.monotonic()
        asked.answer.put(Result("".join(row.text), tuple(row.tokens), finish, asked.answer.adapter,
                                len(asked.answer.request.prompt), row.known, row.began - asked.at,
                                (row.first or now) - asked.at, now - asked.at))  # fmt: skip

    # Before anything is served

    def _check(self, ids: list[int], expected: Tensor) -> None:
        """Raise BaseError unless steps over slots compute what the model computes at once. expected: its logits."""
        pieces = [ids[:11], ids[11:12], ids[12:19], ids[19:]]
        try:
            with self._own_slots() as slots:
                slot = slots.take(ids, (None, 1.0))
                assert slot is not None
                found = []
                for part in pieces:
                    found.append(self._forward([slot], [part], [None], [1.0], [True])[0].float())
                    slot.held += part
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a family that takes no such arguments fails in whatever way it does
            raise BaseError(f"'{self.base.name}' cannot be served ({error}): open a base of another family") from error
        exact = self.base.dtype == torch.float32 and not self._mixer.products.bytes
        rounding = 1e-3 if exact else 0.1
        ends = torch.tensor([len(part) for part in pieces]).cumsum(0) - 1
        wanted = expected[ends.to(expected.device)].float()
        off = float((torch.stack(found) - wanted).norm() / wanted.norm())
        if not off <= rounding:
            raise BaseError(f"'{self.base.name}' cannot be served: token by token it computes something else than "
                            f"at once (by {off:.1%}): open a base whose state is in keys and values alone")  # fmt: skip

    @contextmanager
    def _own_slots(self) -> Iterator[Slots]:
        """A few slots beside those of requests, for what is measured."""
        kept, self._slots = self._slots, Slots(2, 64, self._slots.kernels)
        try:
            yield self._slots
        finally:
            self._slots = kept

    def _probe(self, version: Version, loaded: Loaded) -> None:
        """Raise AdapterError unless the adapter changes what the base says."""
        ids = [(5 * i * i + i + 2) % self._vocabulary for i in range(6)]
        with self._own_slots() as own:
            slots = [slot for key in (None, version.digest) if (slot := own.take(ids, (key, 1.0)))]
            bare, adapted = self._forward(slots, [ids, ids], [None, loaded], [1.0, 1.0], [True, True])
        if not torch.isfinite(adapted).all():
            raise AdapterError(f"'{version.id}': with it the base gives no finite numbers: train it again")
        if torch.equal(bare, adapted):
            raise AdapterError(f"'{version.id}': it changes nothing: train it first")


def _servable(base: Base) -> PreTrainedModel:
    model = base.model
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise BaseError(f"'{base.name}' cannot be served: it is no causal language model of transformers: open one")
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise BaseError(f"'{base.name}' cannot be served: the family {kind} has not been tried: open a base of one of "
                        f"{', '.join(sorted(FAMILIES))}")  # fmt: skip
    return model


def _same_for_all(model: PreTrainedModel) -> int | None:
    """The length up to which a position is rotated alike whatever else is in the step; None where it always is. Beyond,
    these kinds change the frequencies of all rows by the longest."""
    config: Any = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) not in {"longrope", "dynamic"}:
        return None
    said = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(said or config.max_position_embeddings)
