"""Serves classifiers: texts come in over HTTP; probabilities of labels, in the form of vLLM's /classify, go out.

The engine computes next tokens, which classifiers have none of, so they are served by a server of their own: one base,
opened with as many labels as its adapters have, and one thread that labels texts, a batch of one request at a time.
"""

from __future__ import annotations

import asyncio
import secrets
import threading
import time
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote

from fastapi import FastAPI, HTTPException, Response
from fastapi import Request as HttpRequest

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.formats import peft
from lorafit.adapters.rendering import Classes
from lorafit.attachment.adapters import attach
from lorafit.attachment.checks import require_fits
from lorafit.bases.base import Base
from lorafit.data.batches import by_tokens
from lorafit.data.render import Row
from lorafit.errors import AdapterError, BaseError, CancelledError, DataError, LorafitError, RequestError
from lorafit.server.admission import key_of, require_quota, require_ready, unknown
from lorafit.server.document import Classified, ClassifierCard, ClassifierCards, ClassifyAnswer, ClassifyUsage, refused
from lorafit.server.guard import GONE
from lorafit.server.hosted import Phase
from lorafit.server.keys import Key, KeyFile
from lorafit.server.metrics import Metrics
from lorafit.server.quota import Quota
from lorafit.server.refusals import SOON
from lorafit.server.wire import ClassifyRequest
from lorafit.serving.pool import NAME
from lorafit.tasks.classification import AT_A_TIME, Classification, LabelRenderer, probabilities, text_rows

WATCH = 2.0  # seconds between two looks at the file of keys
LISTED = 8  # texts that a refusal names
LONGEST = 8192  # tokens of a text, where the base has no limit: memory grows with them, for some models squared
# Bytes of the texts that wait or are computed, about as many as tokens at most. A request may take a half of what is
# left, so that short ones find room beside long ones; a half of it all is more than the largest body has.
ROOM = 10 << 20


@dataclass
class ClassifierService:
    """The state of a server of classifiers. It implements `Hosted`.

    Args:
        base: the name of the base, as models name their parent.
        opened: opens the base for a number of labels, in a thread of its own, since it takes a while.
        adapters: folders of classifiers, by name. All must have the same number of labels.
        keys_file: None where no key is needed.
        say: called with each message for the operator.
        accept_unknown_base: whether adapters may not say which base they belong to.
    """

    base: str
    opened: Callable[[int], Base]
    adapters: Mapping[str, Path]
    keys_file: Path | None = None
    say: Callable[[str], None] = print
    accept_unknown_base: bool = False
    phase: Phase = "loading"
    failed: LorafitError | None = None
    under_way: int = 0
    began: int = field(default_factory=lambda: int(time.time()))

    def __post_init__(self) -> None:
        self.metrics, self.quota = Metrics(self.base), Quota()
        self.worker = ThreadPoolExecutor(1, "lorafit-classifier")
        self.turn = asyncio.Lock()  # of the worker; it goes to whoever has waited longest
        self._held = 0  # bytes of ROOM
        self._loaded: dict[str, Adapter] = {}
        self._opened: Base | None = None
        self._keys = KeyFile(self.keys_file)
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._work, name="lorafit-service", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        self.phase = "dead" if self.failed else "draining"
        self._ended.set()
        self.worker.shutdown(wait=False, cancel_futures=True)

    def keys(self) -> Collection[Key] | None:
        return self._keys.keys

    def names(self, key: Key) -> list[str]:
        """The classifiers that a key may use."""
        return [name for name in self._loaded if key.may_use(name)]

    @property
    def context(self) -> int:
        """The most tokens of a text."""
        return (self._opened.context if self._opened else None) or LONGEST

    def classes(self, name: str) -> Classes:
        """The labels of a classifier."""
        classes = self._loaded[name].classes
        assert classes is not None  # `_work` refuses others
        return classes

    def rows(self, name: str, texts: Sequence[str]) -> list[Row]:
        """Texts as rows. Raises RequestError that names every text that cannot be read."""
        assert self._opened is not None
        renderer = LabelRenderer(self._opened, self.classes(name))
        try:
            rows = text_rows(renderer, [(f"input[{i}]", text) for i, text in enumerate(texts)])
        except DataError as error:
            raise RequestError("; ".join(map(str, error.problems[:LISTED]))) from error
        most = self.context
        if long := [(i, len(row.ids)) for i, row in enumerate(rows) if len(row.ids) > most]:
            what = "this server reads at most"
            raise RequestError(
                "; ".join(f"input[{i}]: has {n} tokens: {what} {most}, shorten it" for i, n in long[:LISTED])
            )
        return rows

    @contextmanager
    def room(self, texts: Sequence[str]) -> Iterator[None]:
        """Hold room for texts until they are labelled. Only the thread of the event loop may call it. Raises
        HTTPException where they need too much of it."""
        size = sum(len(text.encode()) for text in texts)
        if size > (ROOM - self._held) // 2:
            why = "too many texts of other requests wait: ask again later, or send fewer at once"
            raise HTTPException(503, why, {"retry-after": SOON})
        self._held += size
        try:
            yield
        finally:
            self._held -= size

    def require_open(self) -> None:
        """Raise CancelledError once the service is closed."""
        if self._ended.is_set():
            raise CancelledError("the server is stopping: ask again later")

    def likely(self, name: str, rows: Sequence[Row]) -> list[list[float]]:
        """The probability of every label, by row. Only one thread at a time may call it."""
        assert self._opened is not None
        adapter = self._loaded[name]
        with attach(self._opened, adapter, accept_unknown_base=self.accept_unknown_base):
            shares: list[list[float]] = probabilities(self._opened, Classification(self.classes(name)), rows).tolist()
        return shares

    def _work(self) -> None:
        """Read the classifiers, open the base, and then watch the keys until the service is closed."""
        try:
            self._load()
        except Exception as error:  # after any error nothing will be served
            message = f"'{self.base}' cannot be served: {error!r}: correct that first"
            self.failed = error if isinstance(error, LorafitError) else BaseError(message)
            self.phase = "dead"
            return
        if self.phase == "loading":
            self.phase = "ready"
        said = ""
        while not self._ended.wait(WATCH):
            try:
                self._keys.look()
                message = ""
            except (LorafitError, OSError) as error:
                message = f"the file of keys: {error}: correct that: until then its last state is used"
            if message and message != said:
                self.say(message)
            said = message

    def _load(self) -> None:
        loaded = {}
        for name, folder in self.adapters.items():
            if not NAME.fullmatch(name):
                raise AdapterError(f"{name!r}: not a name for an adapter: choose letters, digits, dots and hyphens")
            peft.require_classifies(folder)
            loaded[name] = peft.read(peft.adapter_folder(folder))
        counts = {name: len(adapter.classes.labels) for name, adapter in loaded.items() if adapter.classes}
        (first, count), *others = counts.items()
        if odd := [name for name, n in others if n != count]:
            raise AdapterError(
                f"'{first}' has {count} labels, and '{odd[0]}' has {counts[odd[0]]}: the base is opened for one number "
                "of labels: start a server for each"
            )
        base = self.opened(count)
        for name, adapter in loaded.items():
            require_fits(base, adapter, accept_unknown_base=self.accept_unknown_base)
            self.say(f"serving {name}")
        self._opened, self._loaded = base, loaded


def add(app: FastAPI, service: ClassifierService) -> None:
    """Add the routes of classifiers, and those that say there are no others."""

    def card(name: str) -> ClassifierCard:
        return ClassifierCard(
            id=name,
            created=service.began,
            root=name,
            parent=service.base,
            max_model_len=service.context,
            labels=list(service.classes(name).labels),
        )

    @app.get("/v1/models", responses=refused())
    async def models(request: HttpRequest) -> ClassifierCards:
        """The classifiers that a request may name."""
        require_ready(service)
        return ClassifierCards(data=[card(name) for name in service.names(key_of(request))])

    @app.get("/v1/models/{name:path}", responses=refused())
    async def model(name: str, request: HttpRequest) -> ClassifierCard:
        """One of these classifiers."""
        require_ready(service)
        if name not in service.names(key_of(request)):
            raise unknown(name)
        return card(name)

    @app.post("/classify", responses=refused(400, 429))
    async def classify(body: ClassifyRequest, request: HttpRequest, response: Response) -> ClassifyAnswer:
        """The probability of every label of the classifier that `model` names, for each text."""
        require_ready(service)
        key, name, began = key_of(request), body.model, time.perf_counter()
        if name not in service.names(key):
            raise unknown(name)
        request.state.log["model"] = name
        texts = body.texts
        with service.room(texts), _charged(service, key, len(texts)) as charge:
            await _require_there(request)
            rows = await asyncio.to_thread(service.rows, name, texts)
            tokens = sum(len(row.ids) for row in rows)
            charge(tokens)
            likely = await _likely(service, request, name, rows)
        service.metrics.labelled(name, len(rows), tokens, time.perf_counter() - began)
        request.state.log["prompt_tokens"] = tokens
        response.headers["x-lorafit-adapter"] = quote(name, safe="@/:")
        return _answer(name, service.classes(name).labels, likely, tokens)

    async def text(request: HttpRequest) -> None:
        """A classifier gives labels and writes no text."""
        raise HTTPException(404, "the models of this server give texts labels, and write none: ask /classify")

    for path in ("/v1/chat/completions", "/v1/completions", "/v1/embeddings"):
        app.post(path, include_in_schema=False)(text)


@contextmanager
def _charged(service: ClassifierService, key: Key, requests: int) -> Iterator[Callable[[int], None]]:
    """Charge the quota of a key for requests and a token of each, which each has at least, before any work is done.
    Gives a function that charges their tokens instead, once these are counted. All is given back after an error,
    unless the client has gone: its request may have been computed."""
    held = (requests, requests)
    require_quota(service, key, *held)

    def charge(tokens: int) -> None:
        nonlocal held
        service.quota.give_back(key, *held)  # a request of more tokens than a minute has needs all of them there
        held = (0, 0)
        require_quota(service, key, requests, tokens)
        held = (requests, tokens)

    try:
        yield charge
    except Exception as error:
        if not (isinstance(error, HTTPException) and error.status_code == GONE):
            service.quota.give_back(key, *held)
        raise


async def _require_there(request: HttpRequest) -> None:
    """Raise HTTPException where the client has gone."""
    if await request.is_disconnected():
        raise HTTPException(GONE, "the client went away: ask again")


async def _likely(
    service: ClassifierService, request: HttpRequest, name: str, rows: Sequence[Row]
) -> list[list[float]]:
    """The probability of every label, by row. Requests take turns, a batch each, so that short ones wait for no long
    one. Raises HTTPException where the client goes away, and CancelledError where the service is closed."""
    loop = asyncio.get_running_loop()
    likely: list[list[float]] = [[] for _ in rows]
    for part in by_tokens(rows, range(len(rows)), AT_A_TIME):
        async with service.turn:
            service.require_open()
            await _require_there(request)
            found = await loop.run_in_executor(service.worker, service.likely, name, [rows[i] for i in part])
        for i, shares in zip(part, found, strict=True):
            likely[i] = shares
    return likely


def _answer(name: str, labels: Sequence[str], likely: Sequence[Sequence[float]], tokens: int) -> ClassifyAnswer:
    def classified(index: int, shares: Sequence[float]) -> Classified:
        best = max(range(len(shares)), key=shares.__getitem__)
        return Classified(index=index, label=labels[best], probs=list(shares), num_classes=len(labels))

    return ClassifyAnswer(
        id=f"classify-{secrets.token_hex(12)}",
        created=int(time.time()),
        model=name,
        data=[classified(index, shares) for index, shares in enumerate(likely)],
        usage=ClassifyUsage(prompt_tokens=tokens, total_tokens=tokens),
    )
