"""The state of a server: its engine, adapters, keys, quotas, metrics and phase; messages in, token ids out."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType

from torch import Tensor

from lorafit.adapters.rendering import Scalar
from lorafit.data.examples import Message
from lorafit.data.messages import last_question
from lorafit.data.render import Renderer
from lorafit.errors import AdapterError, BaseError, LorafitError, RequestError
from lorafit.routing import Routed
from lorafit.server.hosted import Phase
from lorafit.server.keys import Key, KeyFile
from lorafit.server.live_router import LiveRouter
from lorafit.server.metrics import Metrics
from lorafit.server.quota import Quota
from lorafit.server.store import OWN, Store
from lorafit.server.tools import conversation
from lorafit.serving import Engine, Version

WATCH = 2.0  # seconds between two looks at the folder of adapters, and at the file of keys
OPENING = 16  # tokens at the end of a prompt that are searched for the mark before reasoning
NO_SETTINGS: Mapping[str, Scalar] = MappingProxyType({})  # of a template
AUTO = "auto"  # the model name of the router: no adapter may have it


@dataclass
class Service:
    """The state of one server. It implements `Hosted`.

    Args:
        base: the name of the base, as `model` gives it.
        opened: makes the engine, in a thread of its own, since it takes a while.
        adapters: folders of adapters that are served from the start, by name.
        root: the folder of adapters that is watched.
        keys_file: None where no key is needed.
        say: called with each message for the operator.
        ask_alone: whether adapters trained on single questions get only the last question of a conversation.
    """

    base: str
    opened: Callable[[], Engine]
    adapters: Mapping[str, Path] = field(default_factory=dict)
    root: Path | None = None
    keys_file: Path | None = None
    say: Callable[[str], None] = print
    ask_alone: bool = False
    phase: Phase = "loading"
    failed: LorafitError | None = None
    under_way: int = 0  # requests that have arrived and whose last byte is not written yet
    began: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.metrics, self.quota = Metrics(self.base), Quota()
        self.store: Store | None = None
        self.live_router: LiveRouter | None = None
        self._engine: Engine | None = None
        self._keys = KeyFile(self.keys_file)
        self.operators = ThreadPoolExecutor(1, "lorafit-operators")  # for requests of operators
        self._faults: dict[str, str] = {}  # the last message about each thing that is watched
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="lorafit-service", daemon=True)

    @property
    def engine(self) -> Engine:
        assert self._engine is not None
        return self._engine

    def start(self) -> None:
        self._thread.start()

    def keys(self) -> Collection[Key] | None:
        return self._keys.keys

    def close(self) -> None:
        self.phase = "dead" if self.failed else "draining"
        self._ended.set()
        if self._engine:  # a base that is still being opened ends with the process
            self._engine.close()  # this also ends loading
            self._thread.join()
        self.operators.shutdown(cancel_futures=True)
        if self.store:
            self.store.close()

    def _work(self) -> None:
        """Open the base, load the adapters, and then watch folder and keys until the service is closed."""
        try:
            engine = self._engine = self.opened()
            self.metrics.watch(engine)
            if self.root:
                self.store = Store(engine, self.root, self.say, lambda name: require_free(name, self.base))
                self.store.restore()
                for version, live in engine.adapters.listed():
                    if live:
                        self.say(f"serving {version.label}")
                self.store.look()
                self.store.look()
            for name, folder in self.adapters.items():
                require_free(name, self.base)
                self.say(f"serving {engine.load(name, folder).label}")
            self.live_router = LiveRouter(engine, self.root / OWN if self.root else None, self.say)
            self._try("the router", self.live_router.look)
            if self.phase == "loading":
                self.phase = "ready"
        except Exception as error:  # after any error nothing will be served
            if self._ended.is_set():
                return
            file = getattr(error, "filename", None)
            why = f"{file}: {error.strerror}" if file and isinstance(error, OSError) else repr(error)
            message = f"'{self.base}' cannot be served: {why}: correct that first"
            self.failed = error if isinstance(error, LorafitError) else BaseError(message)
            self.phase = "dead"
            return
        while not self._ended.wait(WATCH):
            self._look()

    def _look(self) -> None:
        if self.engine.is_closed:
            self.phase = "dead"
        self._try("the file of keys", self._keys.look)
        if self.store:
            self._try("the folder of adapters", self.store.look)
        self._try("the router", self._router().look)

    def _try(self, watched: str, look: Callable[[], None]) -> None:
        """Call `look`. An error is reported once, until the next call has none, or another one."""
        try:
            look()
        except Exception as error:  # no error may end the watch
            why = f"{watched}: {type(error).__name__}: {error}: correct that: until then its last state is used"
            message = str(error) if isinstance(error, LorafitError) else why
            if self._faults.get(watched) != message and not self._ended.is_set():
                self.say(message)
            self._faults[watched] = message
        else:
            self._faults.pop(watched, None)

    # For requests

    def routed(self, features: Tensor, key: Key) -> Routed:
        """Route a question, (D,) features, among the adapters that a key may use. Raises UnknownAdapterError."""
        return self._router().route(features, key.may_use, self.base)

    def can_route(self, key: Key) -> bool:
        """Whether the router knows an adapter that a key may use."""
        return bool(self._router().names(key.may_use))

    def _router(self) -> LiveRouter:
        assert self.live_router is not None
        return self.live_router

    def chosen(self, model: str) -> Version | None:
        """The version that a request's `model` means; None: the bare base. Raises UnknownAdapterError."""
        return None if model == self.base else self.engine.adapters.find(model)

    def asks_alone(self, version: Version | None) -> bool:
        """Whether an adapter gets only the last question of a conversation."""
        return self.ask_alone and version is not None and version.single

    def renderer(
        self, version: Version | None, settings: Mapping[str, Scalar] = NO_SETTINGS, no_system: bool = False
    ) -> Renderer:
        """The renderer of an adapter, or of the bare base. settings: of the template, which override those of training;
        one that the template does not read is ignored if its value is false or empty, and else raises RequestError.
        no_system: whether a conversation without a system message gets no system prompt at all."""
        system = "" if no_system else None
        renderer = self.engine.renderer(version, system)
        given = {name: value for name, value in settings.items() if value or renderer.reads(name)}
        if unread := [name for name in given if not renderer.reads(name)]:
            raise RequestError(f"chat_template_kwargs: the template reads no {', '.join(unread)}: leave it out")
        return self.engine.renderer(version, system, tuple(sorted(given.items()))) if given else renderer

    def prompt(
        self,
        messages: Sequence[Message],
        version: Version | None,
        renderer: Renderer,
        tools: Sequence[str] = (),
        thinks: bool = True,
    ) -> tuple[int, ...]:
        """Token ids of a conversation, rendered as in the adapter's training.

        Args:
            messages: a system message at the beginning replaces the adapter's system prompt.
            version: of the adapter; None: the bare base.
            renderer: that of the version.
            tools: texts of those that may be called.
            thinks: whether the answer may begin with reasoning, where the adapter's answers may.
        """
        if all(message.role == "system" for message in messages):
            raise RequestError("messages: there are only system messages: add a message of the user")
        turns = conversation(messages)
        if self.asks_alone(version):  # its calls are numbered from its own beginning
            turns = conversation(last_question(messages))
        if thinks or renderer.thought is None:
            return tuple(renderer.prompt_ids(turns, tools))
        ids, thought = renderer.plain.prompt_ids(turns, tools), renderer.thought
        if thought.opens and renderer.tokenizer.decode(ids[-OPENING:]).rstrip().endswith(thought.opening):
            ids += renderer.tokenizer(f"\n{thought.closing}\n\n", add_special_tokens=False)["input_ids"]
        return tuple(ids)


def require_free(name: str, base: str) -> None:
    """Raise AdapterError for the name of the base or of the router."""
    if name in {base, AUTO}:
        raise AdapterError(f"lora_name: '{name}' means {'the base' if name == base else 'the router'}: choose another")
