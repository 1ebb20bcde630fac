"""The routes: what OpenAI's clients call, and what operators do."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any
from urllib.parse import quote

import jinja2
from fastapi import FastAPI, HTTPException
from fastapi import Request as HttpRequest
from fastapi.openapi.utils import get_openapi
from fastapi.responses import JSONResponse, PlainTextResponse, Response

import lorafit
from lorafit.errors import (
    RequestError,
    UnknownAdapterError,
)
from lorafit.generation.text import token_bytes
from lorafit.routing import LONGEST, Routed, question_of
from lorafit.server.document import (
    CHAT,
    PHASE,
    PLAIN,
    TEXT,
    Card,
    Cards,
    PromptAnswer,
    TokensAnswer,
    VersionAnswer,
    finish,
    refused,
)
from lorafit.server.guard import GONE, OPEN, SOON, Guard
from lorafit.server.keys import Key
from lorafit.server.refusals import answer_errors
from lorafit.server.service import AUTO, Service
from lorafit.server.streams import Coming, Events, Part, Style, events, finish_of, usage_of
from lorafit.server.wire import (
    ChatRequest,
    CompletionRequest,
    DetokenizeRequest,
    LoadRequest,
    NameRequest,
    TokenizeRequest,
    chat_logprobs,
    completion_logprobs,
)
from lorafit.serving import Piece, Request, Result, Token, Version

MOST = 4 << 20  # bytes of a body
PATIENCE = 20.0  # seconds for a body to arrive
AT_ONCE = 512  # requests; more are told to come back
ADMIN = {200: TEXT, **refused(400, 507)}


def make_app(
    service: Service, hosts: Collection[str] | None, log: Callable[[dict[str, Any]], None] = lambda told: None
) -> FastAPI:
    """The application of a service. hosts: names it may be called by; None: any."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="lorafit",
        version=lorafit.__version__,
        lifespan=life,
        docs_url=None,
        redirect_slashes=False,
        redoc_url=None,
    )
    answer_errors(app)
    _watching(app, service)
    _models(app, service)
    _completions(app, service)
    _tokens(app, service)
    _admin(app, service)
    app.openapi = lambda: _openapi(app, service)  # type: ignore[method-assign]
    app.add_middleware(Guard, service=service, hosts=hosts, most=MOST, patience=PATIENCE, at_once=AT_ONCE, log=log)
    return app


def _openapi(app: FastAPI, service: Service) -> dict[str, Any]:
    if app.openapi_schema is None:
        made = get_openapi(title=app.title, version=app.version, routes=app.routes)
        app.openapi_schema = finish(made, with_keys=service.keys() is not None, open_paths=OPEN)
    return app.openapi_schema


def _key(request: HttpRequest) -> Key:
    key: Key = request.state.key
    return key


def _chosen(service: Service, key: Key, model: str) -> Version | None:
    """The version that a key may ask by this name; None: the bare base. Raises UnknownAdapterError, in the same words
    whether there is none, or none for this key."""
    try:
        if model == service.base or key.may_use(model.partition("@")[0]):
            version = service.chosen(model)
            if version is not None or key.may_use(service.base):
                return version
    except UnknownAdapterError:
        pass
    raise UnknownAdapterError(f"'{model[:80]}': no model is served by this name: see /v1/models")


def _ready(service: Service) -> None:
    """Raises HTTPException while nothing can be answered."""
    if service.phase != "ready":
        why = {
            "loading": "the base is being opened",
            "draining": "the server is ending",
            "dead": "the server has failed",
        }
        raise HTTPException(503, f"{why[service.phase]}: ask again later", {"retry-after": SOON})


# Watching over it


def _watching(app: FastAPI, service: Service) -> None:
    @app.get("/health", response_class=Response, responses={200: TEXT, **refused(), 503: PHASE})
    async def health() -> Response:
        """200 when requests are answered; 503, with the reason in a word, while loading, draining or dead."""
        return PlainTextResponse(service.phase, 200 if service.phase == "ready" else 503)

    @app.get("/version", responses=refused())
    async def version() -> VersionAnswer:
        return VersionAnswer(version=lorafit.__version__)

    @app.get("/metrics", response_class=Response, responses={200: TEXT, **refused()})
    async def metrics() -> Response:
        """For Prometheus."""
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


# Models


def _models(app: FastAPI, service: Service) -> None:
    def card(name: str, created: int, version: Version | None) -> Card:
        return Card(
            id=name, created=created, root=version.id if version else name,
            parent=service.base if version else None, max_model_len=service.engine.room,
        )  # fmt: skip

    def cards(key: Key) -> dict[str, Card]:
        """By id: the base, each adapter, and each of its versions. Nothing is read from disk."""
        found = {service.base: card(service.base, service.began, None)}
        if service.can_route(key):
            found[AUTO] = Card(id=AUTO, created=service.began, root=AUTO, parent=service.base,
                               max_model_len=service.engine.room)  # fmt: skip
        for version, live in service.engine.adapters.listed():
            if live:
                found[version.name] = card(version.name, version.created, version)
            found[version.id] = card(version.id, version.created, version)
        return {name: one for name, one in found.items() if name == AUTO or key.may_use(name.partition("@")[0])}

    @app.get("/v1/models", responses=refused())
    async def models(request: HttpRequest) -> Cards:
        """The base, its adapters, and the router, as `model` names them."""
        _ready(service)
        return Cards(data=list(cards(_key(request)).values()))

    @app.get("/v1/models/{name:path}", responses=refused())
    async def model(name: str, request: HttpRequest) -> Card:
        _ready(service)
        found = cards(_key(request)).get(name)
        if found is None:
            raise UnknownAdapterError(f"'{name[:80]}': no model is served by this name: see /v1/models")
        return found


# Completions


def _completions(app: FastAPI, service: Service) -> None:
    @app.post("/v1/chat/completions", responses={200: CHAT, **refused(400, 429)})
    async def chat(body: ChatRequest, request: HttpRequest) -> Response:
        """A conversation's next message, by the adapter that `model` names."""
        return await _answered(service, request, body, "chat.completion")

    @app.post("/v1/completions", responses={200: PLAIN, **refused(400, 429)})
    async def completions(body: CompletionRequest, request: HttpRequest) -> Response:
        """What follows each prompt, which is read as it is, without a template."""
        return await _answered(service, request, body, "text_completion")

    @app.post("/v1/embeddings", include_in_schema=False)
    async def embeddings() -> Response:
        """A causal language model was trained to go on with a text, not to place it among others."""
        raise HTTPException(404, f"'{service.base}' writes text and gives no embeddings: ask a model made for them")


async def _answered(
    service: Service, request: HttpRequest, body: ChatRequest | CompletionRequest, kind: str
) -> Response:
    _ready(service)
    key, engine, told = _key(request), service.engine, request.state.told
    routed = await _routed(service, key, body) if body.model == AUTO else None
    version = _chosen(service, key, routed.adapter or service.base if routed else body.model)
    name = version.name if version else service.base
    told["model"] = version.id if version else name

    def heard(part: Part) -> None:
        if isinstance(part, Piece):
            service.quota.charge(key, len(part.tokens))  # now: who asks again has used them up
        elif isinstance(part, Result):
            service.metrics.answered(part, name)
        else:
            service.metrics.broken_off(part, name)

    coming = Coming(engine, heard)
    requests = await asyncio.to_thread(_requests, service, body, version)
    prompts = sum(len(one.prompt) for one in requests)
    _require_quota(service, key, len(requests), prompts)
    try:
        await asyncio.to_thread(coming.submit, requests)
    except BaseException:
        coming.cancel()
        service.quota.give_back(key, len(requests), prompts)
        raise
    text_of, bytes_of = _text_of(engine), partial(token_bytes, engine.base.tokenizer)
    told_before: Counter[int] = Counter()  # characters, by answer
    wanted = requests[0].logprobs is not None
    style = Style(kind, ("chatcmpl-" if kind == "chat.completion" else "cmpl-") + secrets.token_hex(12), told["model"],
                  {"adapter": name, "probability": round(routed.probability, 4)} if routed else None)  # fmt: skip

    def logprobs(number: int, tokens: Sequence[Token]) -> Any:
        if kind == "chat.completion":
            return chat_logprobs(tokens, text_of, bytes_of)
        made = completion_logprobs(tokens, text_of, told_before[number])
        told_before[number] += sum(map(len, made["tokens"]))
        return made

    def ended() -> None:
        coming.cancel()
        told.update(prompt_tokens=prompts, tokens=coming.tokens)

    headers = {"x-lorafit-adapter": quote(told["model"], safe="@/:")}
    if routed:
        headers["x-lorafit-probability"] = f"{routed.probability:.4f}"
        service.metrics.routed(name)
    if body.stream:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        parts = events(coming, style, logprobs if wanted else None, with_usage)
        return Events(parts, ended, headers)
    try:
        await _unless_gone(request, coming)
    finally:
        ended()
    results = [coming.results[i] for i in range(len(requests))]
    choices = [style.choice(i, one.text, logprobs(i, one.tokens) if wanted else None, finish_of(one.finish))
               for i, one in enumerate(results)]  # fmt: skip
    return JSONResponse(style.whole(choices, usage_of(results)), headers=headers)


async def _routed(service: Service, key: Key, body: ChatRequest | CompletionRequest) -> Routed:
    """Where the question of a request goes. Reading it takes from the key's tokens, as a prompt does."""
    if isinstance(body, ChatRequest):
        text = question_of([turn.message() for turn in body.messages])
    else:
        first, *rest = body.prompts()
        if rest:
            raise RequestError("model: 'auto' takes one prompt at a time: give each a request of its own")
        text = first if isinstance(first, str) else service.engine.base.tokenizer.decode(first)
    _require_quota(service, key, 0, min(LONGEST, len(text)))
    return await asyncio.to_thread(service.routed, text, key)


def _require_quota(service: Service, key: Key, requests: int, tokens: int) -> None:
    if wait := service.quota.take(key, requests, tokens):
        raise HTTPException(429, f"the quota of the key '{key.name}' is used up: ask again in {math.ceil(wait)} s",
                            {"retry-after": str(math.ceil(wait))})  # fmt: skip


def _requests(service: Service, body: ChatRequest | CompletionRequest, version: Version | None) -> list[Request]:
    """What the engine is asked: each prompt as often as answers are wanted, each with a seed of its own."""
    engine = service.engine
    try:
        if isinstance(body, ChatRequest):
            prompts = [service.prompt([turn.message() for turn in body.messages], version)]
        else:
            prompts = [tuple(engine.base.tokenizer(one)["input_ids"]) if isinstance(one, str) else tuple(one)
                       for one in body.prompts()]  # fmt: skip
    except jinja2.TemplateError as refused:
        raise RequestError(
            f"messages: the base's chat template refuses them ({refused}): change their roles"
        ) from refused
    longest = max(1, engine.room - max(map(len, prompts)))
    adapter, settings = version.id if version else None, body.settings(longest)
    seeds = [None if body.seed is None else (body.seed + i) % 2**63 for i in range(body.count)]
    return [Request(prompt, adapter, seed=seed, **settings) for prompt in prompts for seed in seeds]


async def _unless_gone(request: HttpRequest, coming: Coming) -> None:
    """Wait for all answers, unless the client goes away before."""

    async def all_parts() -> None:
        async for _ in coming.pieces():
            pass

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(all_parts()), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise HTTPException(GONE, "the client went away: ask again")
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()


def _text_of(engine: Any) -> Callable[[int], str]:
    decode = engine.base.tokenizer.decode
    return lambda token: str(decode([token], clean_up_tokenization_spaces=False))


# Tokens


def _tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", responses=refused(400))
    async def tokenize(body: TokenizeRequest, request: HttpRequest) -> TokensAnswer:
        """Token ids of a text, or of a conversation as the adapter reads it."""
        _ready(service)
        version = _chosen(service, _key(request), service.base if body.model is None else body.model)
        if body.messages is not None:
            ids = await asyncio.to_thread(service.prompt, [turn.message() for turn in body.messages], version)
        elif body.prompt is not None:
            ids = (await asyncio.to_thread(service.engine.base.tokenizer, body.prompt))["input_ids"]
        else:
            raise RequestError("prompt: nothing to tokenize: give prompt or messages")
        return TokensAnswer(count=len(ids), max_model_len=service.engine.room, tokens=list(ids))

    @app.post("/detokenize", responses=refused(400))
    async def detokenize(body: DetokenizeRequest, request: HttpRequest) -> PromptAnswer:
        """The text of token ids."""
        _ready(service)
        if body.model is not None:
            _chosen(service, _key(request), body.model)
        most = service.engine.vocabulary
        if wrong := [token for token in body.tokens if not 0 <= token < most]:
            raise RequestError(f"tokens: {wrong[0]} is not in the base's vocabulary of {most}: take it out")
        return PromptAnswer(prompt=await asyncio.to_thread(service.engine.base.tokenizer.decode, body.tokens))


# What operators do


def _admin(app: FastAPI, service: Service) -> None:
    async def done(work: Callable[[], Any]) -> Any:
        """In a thread of its own, one after the other, so that what takes long keeps no answer waiting."""
        return await asyncio.get_running_loop().run_in_executor(service.operators, work)

    def store() -> Any:
        _ready(service)
        if service.store is None:
            raise RequestError("lora_path: this server has no folder of adapters: start it with --adapters DIR")
        return service.store

    @app.post("/v1/load_lora_adapter", response_class=Response, responses=ADMIN)
    async def load(body: LoadRequest) -> PlainTextResponse:
        """Serve an adapter of the server's folder. load_inplace: as a new version of a name that is served already."""
        kept = store()
        version = await done(lambda: kept.load(body.lora_name, kept.within(body.lora_path), anew=not body.load_inplace))
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully as {version.id}.")

    @app.post("/v1/unload_lora_adapter", response_class=Response, responses=ADMIN)
    async def unload(body: NameRequest) -> PlainTextResponse:
        """Serve `name`, or the version `name@3`, no longer."""
        await done(partial(store().unload, body.lora_name))
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    @app.post("/v1/rollback_lora_adapter", response_class=Response, responses=ADMIN)
    async def rollback(body: NameRequest) -> PlainTextResponse:
        """Let the name mean the version before its live one."""
        version = await done(partial(store().rollback, body.lora_name))
        return PlainTextResponse(f"Success: '{body.lora_name}' is {version.id}.")
