"""What a server is made of: a base that is being opened or served, its adapters, keys, quotas, counts, its phase."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Literal

from torch import Tensor

from lorafit.adapters.rendering import Scalar
from lorafit.data.examples import Message
from lorafit.data.messages import last_question
from lorafit.data.render import Renderer
from lorafit.errors import AdapterError, BaseError, LorafitError, RequestError
from lorafit.routing import Routed
from lorafit.server import keys
from lorafit.server.keys import Key
from lorafit.server.metrics import Metrics
from lorafit.server.quota import Quota
from lorafit.server.store import OWN, Store
from lorafit.server.switch import Switch
from lorafit.server.tools import conversation
from lorafit.serving import Engine, Version

Phase = Literal["loading", "ready", "draining", "dead"]
WATCH = 2.0  # seconds between two looks at the folder of adapters, and at the file of keys
OPENING = 16  # tokens at the end of a prompt, of which the mark is made that opens a thought
NO_SETTINGS: Mapping[str, Scalar] = MappingProxyType({})  # of a template
AUTO = "auto"  # what clients say for the router: no adapter may have the name


@dataclass
class Service:
    """base: the name it is served by. opened: makes the engine; it takes a while, and goes on beside the server.
    root: the folder of adapters, None without one. keys_file: None where no key is needed. ask_alone: adapters that
    were trained on single questions are asked the last one of a conversation by itself."""

    base: str
    opened: Callable[[], Engine]
    adapters: Mapping[str, Path] = field(default_factory=dict)
    root: Path | None = None
    keys_file: Path | None = None
    say: Callable[[str], None] = print
    ask_alone: bool = False
    phase: Phase = "loading"
    failed: LorafitError | None = None
    under_way: int = 0  # requests, from their arrival until their last byte is written
    began: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.metrics, self.quota = Metrics(self.base), Quota()
        self.store: Store | None = None
        self.switch: Switch | None = None
        self._engine: Engine | None = None
        self._keys = keys.read(self.keys_file) if self.keys_file else None
        self._read = self.keys_file.stat().st_mtime_ns if self.keys_file else 0
        self.operators = ThreadPoolExecutor(1, "lorafit-operators")  # for what only operators ask
        self._faults: dict[str, str] = {}  # of what is watched, each said already
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="lorafit-service", daemon=True)

    @property
    def engine(self) -> Engine:
        assert self._engine is not None
        return self._engine

    def start(self) -> None:
        self._thread.start()

    def keys(self) -> Collection[Key] | None:
        return self._keys

    def drain(self, patience: float) -> None:
        """Take nothing new, and wait until every request is answered, for so many seconds at most."""
        self.phase, end = "draining", time.monotonic() + patience
        while self.under_way and time.monotonic() < end:
            time.sleep(0.05)

    def close(self) -> None:
        self.phase = "dead" if self.failed else "draining"
        self._ended.set()
        if self._engine:  # a base that is just being opened is let go with the process
            self._engine.close()  # what is being loaded ends too
            self._thread.join()
        self.operators.shutdown(cancel_futures=True)
        if self.store:
            self.store.close()

    def _work(self) -> None:
        """Open the base, load what is to be served, and then look what comes."""
        try:
            engine = self._engine = self.opened()
            self.metrics.watch(engine)
            if self.root:
                self.store = Store(engine, self.root, self.say, lambda name: require_free(name, self.base))
                self.store.restore()
                for version, live in engine.adapters.listed():
                    if live:
                        self.say(f"serving {version.told}")
                self.store.look()
                self.store.look()
            for name, folder in self.adapters.items():
                require_free(name, self.base)
                self.say(f"serving {engine.load(name, folder).told}")
            self.switch = Switch(engine, self.root / OWN if self.root else None, self.say)
            self._try("the router", self.switch.look)
            if self.phase == "loading":
                self.phase = "ready"
        except Exception as error:  # whatever it is, nothing will be served
            if self._ended.is_set():
                return
            named = getattr(error, "filename", None)
            why = f"{named}: {error.strerror}" if named and isinstance(error, OSError) else repr(error)
            told = f"'{self.base}' cannot be served: {why}: correct that first"
            self.failed = error if isinstance(error, LorafitError) else BaseError(told)
            self.phase = "dead"
            return
        while not self._ended.wait(WATCH):
            self._look()

    def _look(self) -> None:
        if self.engine.is_closed:
            self.phase = "dead"
        self._try("the file of keys", self._look_at_keys)
        if self.store:
            self._try("the folder of adapters", self.store.look)
        self._try("the router", self._switch().look)

    def _try(self, what: str, look: Callable[[], None]) -> None:
        """A fault is said once, until there is none or another; what was read last goes on."""
        try:
            look()
        except Exception as error:  # whatever it is, it must not end the watch
            why = f"{what}: {type(error).__name__}: {error}: correct that: until then what was read last goes on"
            told = str(error) if isinstance(error, LorafitError) else why
            if self._faults.get(what) != told and not self._ended.is_set():
                self.say(told)
            self._faults[what] = told
        else:
            self._faults.pop(what, None)

    def _look_at_keys(self) -> None:
        if self.keys_file and (now := self.keys_file.stat().st_mtime_ns) != self._read:
            self._keys, self._read = keys.read(self.keys_file), now

    # What a request asks for

    def routed(self, features: Tensor, key: Key) -> Routed:
        """Where a question of these features goes, among what a key may use. Raises UnknownAdapterError."""
        return self._switch().route(features, key.may_use, self.base)

    def can_route(self, key: Key) -> bool:
        """Whether the router has an adapter to choose that a key may use."""
        return bool(self._switch().names(key.may_use))

    def _switch(self) -> Switch:
        assert self.switch is not None
        return self.switch

    def chosen(self, model: str) -> Version | None:
        """The version that a request's `model` means; None: the bare base. Raises UnknownAdapterError."""
        if model == self.base:
            return None
        return self.engine.adapters.find(model)

    def asks_alone(self, version: Version | None) -> bool:
        """Whether of a conversation an adapter is asked the last question by itself."""
        return self.ask_alone and version is not None and version.single

    def renderer(self, version: Version | None, settings: Mapping[str, Scalar] = NO_SETTINGS) -> Renderer:
        """As the adapter was trained, or as the bare base's template has it. settings: of the template, over those of
        the training; one that it does not read passes where it asks for nothing. Raises RequestError."""
        known = self.engine.renderer(version)
        given = {name: value for name, value in settings.items() if value or known.reads(name)}
        if strange := [name for name in given if not known.reads(name)]:
            raise RequestError(f"chat_template_kwargs: the template reads no {', '.join(strange)}: leave it out")
        return self.engine.renderer(version, settings=tuple(sorted(given.items()))) if given else known

    def prompt(
        self,
        messages: Sequence[Message],
        version: Version | None,
        tools: Sequence[str] = (),
        settings: Mapping[str, Scalar] = NO_SETTINGS,
        thinks: bool = True,
    ) -> tuple[int, ...]:
        """Token ids of a conversation, as the adapter was trained to read it. A system message of its own at the
        beginning takes the place of the adapter's. tools: that may be called. settings: of the template, as `renderer`
        takes them. thinks: whether the answer may begin with reasoning, where the adapter's may."""
        if len(messages) == 1 and messages[0].role == "system":
            raise RequestError("messages: there is nothing but a system message: add what the user says")
        asked = conversation(messages)
        if self.asks_alone(version):  # its calls are numbered as those of a conversation by itself
            asked = conversation(last_question(messages))
        renderer = self.renderer(version, settings)
        if thinks or renderer.thought is None:
            return tuple(renderer.prompt_ids(asked, tools))
        ids, thought = renderer.plain.prompt_ids(asked, tools), renderer.thought
        if thought.opens and renderer.tokenizer.decode(ids[-OPENING:]).rstrip().endswith(thought.opening):
            ids += renderer.tokenizer(f"\n{thought.closing}\n\n", add_special_tokens=False)["input_ids"]
        return tuple(ids)


def require_free(name: str, base: str) -> None:
    """Raise AdapterError for a name that means something else."""
    if name in {base, AUTO}:
        raise AdapterError(f"lora_name: '{name}' means {'the base' if name == base else 'the router'}: choose another")
