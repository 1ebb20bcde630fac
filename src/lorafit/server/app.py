"""The application: a service in, an ASGI application out, with routes for OpenAI's clients and for operators."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Collection, Sequence
from contextlib import asynccontextmanager
from functools import partial
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.openapi.utils import get_openapi
from fastapi.responses import PlainTextResponse, Response

from lorafit.errors import RequestError
from lorafit.server import classifiers, completions
from lorafit.server.admission import chosen, key_of, require_ready, require_tokens, unknown
from lorafit.server.classifiers import ClassifierService
from lorafit.server.document import PHASE, TEXT, Card, Cards, PromptAnswer, TokensAnswer, VersionAnswer, finish, refused
from lorafit.server.guard import OPEN, Guard, Limits
from lorafit.server.hosted import Hosted
from lorafit.server.keys import Key
from lorafit.server.refusals import answer_errors
from lorafit.server.service import AUTO, Service
from lorafit.server.tools import shown
from lorafit.server.wire import DetokenizeRequest, LoadRequest, NameRequest, TokenizeRequest
from lorafit.serving import Version
from lorafit.version import __version__

LIMITS = Limits()
ADMIN = {200: TEXT, **refused(400, 507)}


def make_app(
    service: Service, hosts: Collection[str] | None, log: Callable[[dict[str, Any]], None] = lambda entry: None
) -> FastAPI:
    """Make the application of an engine's service. hosts: names that requests may use; None: any. log: called with an
    entry for each request."""
    app = _hosting(service, hosts, log)
    _models(app, service)
    completions.add(app, service)
    _tokens(app, service)
    _admin(app, service)
    return app


def make_classifier_app(
    service: ClassifierService,
    hosts: Collection[str] | None,
    log: Callable[[dict[str, Any]], None] = lambda entry: None,
) -> FastAPI:
    """Make the application of a service of classifiers, with the arguments of `make_app`."""
    app = _hosting(service, hosts, log)
    classifiers.add(app, service)
    return app


def _hosting(service: Hosted, hosts: Collection[str] | None, log: Callable[[dict[str, Any]], None]) -> FastAPI:
    """An application with the guard, the errors and the routes of monitoring that every service has."""

    @asynccontextmanager
    async def life(app: FastAPI) -> AsyncIterator[None]:
        service.start()
        yield
        await asyncio.to_thread(service.close)

    app = FastAPI(
        title="lorafit",
        version=__version__,
        lifespan=life,
        docs_url=None,
        redirect_slashes=False,
        redoc_url=None,
        strict_content_type=True,  # any page may send a body without a type
    )
    answer_errors(app)
    _watching(app, service)
    app.openapi = lambda: _openapi(app, service)  # type: ignore[method-assign]
    app.add_middleware(Guard, service=service, hosts=hosts, limits=LIMITS, log=log)
    return app


def _openapi(app: FastAPI, service: Hosted) -> dict[str, Any]:
    if app.openapi_schema is None:
        document = get_openapi(title=app.title, version=app.version, routes=app.routes)
        app.openapi_schema = finish(document, with_keys=service.keys() is not None, open_paths=OPEN)
    return app.openapi_schema


# Monitoring


def _watching(app: FastAPI, service: Hosted) -> None:
    @app.get("/health", response_class=Response, responses={200: TEXT, **refused(), 503: PHASE})
    async def health() -> Response:
        """200 while requests are answered; else 503 with the phase: loading, draining or dead."""
        return PlainTextResponse(service.phase, 200 if service.phase == "ready" else 503)

    @app.get("/version", responses=refused())
    async def version() -> VersionAnswer:
        return VersionAnswer(version=__version__)

    @app.get("/metrics", response_class=Response, responses={200: TEXT, **refused()})
    async def metrics() -> Response:
        """Metrics for Prometheus."""
        return Response(service.metrics.page(), media_type="text/plain; version=0.0.4; charset=utf-8")


# Models


def _models(app: FastAPI, service: Service) -> None:
    def card(name: str, created: int, version: Version | None) -> Card:
        return Card(
            id=name,
            created=created,
            root=version.id if version else name,
            parent=service.base if version else None,
            max_model_len=service.engine.room,
            single=version is not None and version.single,
        )

    def cards(key: Key) -> dict[str, Card]:
        """The models that a key may use, by id: the base, the router, each adapter, and each of its versions."""
        by_id = {service.base: card(service.base, service.began, None)}
        if service.can_route(key):
            by_id[AUTO] = card(AUTO, service.began, None).model_copy(update={"parent": service.base})
        for version, live in service.engine.adapters.listed():
            if live:
                by_id[version.name] = card(version.name, version.created, version)
            by_id[version.id] = card(version.id, version.created, version)
        return {id_: model for id_, model in by_id.items() if id_ == AUTO or key.may_use(id_.partition("@")[0])}

    @app.get("/v1/models", responses=refused())
    async def models(request: HttpRequest) -> Cards:
        """The models that a request may name: the base, its adapters, and the router."""
        require_ready(service)
        return Cards(data=list(cards(key_of(request)).values()))

    @app.get("/v1/models/{name:path}", responses=refused())
    async def model(name: str, request: HttpRequest) -> Card:
        """One of these models."""
        require_ready(service)
        by_id = cards(key_of(request))
        if name not in by_id:
            raise unknown(name)
        return by_id[name]


# Tokens


def _tokens(app: FastAPI, service: Service) -> None:
    @app.post("/tokenize", responses=refused(400))
    async def tokenize(body: TokenizeRequest, request: HttpRequest) -> TokensAnswer:
        """Token ids of a text, or of a conversation as it is rendered for the adapter."""
        require_ready(service)
        version = chosen(service, key_of(request), service.base if body.model is None else body.model)
        if body.messages is not None:
            given = body.model_dump(include={"tools", "tool_choice"})
            messages, tools = [turn.message() for turn in body.messages], shown(given["tools"], given["tool_choice"])
            settings, no_system = body.chat_template_kwargs or {}, bool(body.no_system)

            def rendered() -> tuple[int, ...]:
                return service.prompt(
                    messages, version, service.renderer(version, settings, no_system), tools, not tools
                )

            ids: Sequence[int] = await asyncio.to_thread(rendered)
        elif body.prompt is not None:
            encode = partial(service.engine.base.tokenizer, add_special_tokens=body.add_special_tokens is not False)
            ids = (await asyncio.to_thread(encode, body.prompt))["input_ids"]
        else:
            raise RequestError("prompt: nothing to tokenize: give prompt or messages")
        return TokensAnswer(count=len(ids), max_model_len=service.engine.room, tokens=list(ids))

    @app.post("/detokenize", responses=refused(400))
    async def detokenize(body: DetokenizeRequest, request: HttpRequest) -> PromptAnswer:
        """The text of token ids."""
        require_ready(service)
        if body.model is not None:
            chosen(service, key_of(request), body.model)
        require_tokens(service, body.tokens)
        return PromptAnswer(prompt=await asyncio.to_thread(service.engine.base.tokenizer.decode, body.tokens))


# For operators


def _admin(app: FastAPI, service: Service) -> None:
    async def run(work: Callable[[], Any]) -> Any:
        """Run work in the operators' thread, where it delays no answer."""
        return await asyncio.get_running_loop().run_in_executor(service.operators, work)

    def store() -> Any:
        require_ready(service)
        if service.store is None:
            raise RequestError("this server keeps no adapters: start it with --adapters DIR")
        return service.store

    @app.post("/v1/load_lora_adapter", response_class=Response, responses=ADMIN)
    async def load(body: LoadRequest) -> PlainTextResponse:
        """Serve an adapter of the server's folder. load_inplace: whether the name may be served already."""
        adapters, new_name = store(), not body.load_inplace
        version = await run(lambda: adapters.load(body.lora_name, adapters.within(body.lora_path), new_name))
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' added successfully as {version.id}.")

    @app.post("/v1/unload_lora_adapter", response_class=Response, responses=ADMIN)
    async def unload(body: NameRequest) -> PlainTextResponse:
        """Stop serving `name`, or the version `name@3`."""
        await run(partial(store().unload, body.lora_name))
        return PlainTextResponse(f"Success: LoRA adapter '{body.lora_name}' removed successfully.")

    @app.post("/v1/rollback_lora_adapter", response_class=Response, responses=ADMIN)
    async def rollback(body: NameRequest) -> PlainTextResponse:
        """Let the name mean the version before its live one."""
        version = await run(partial(store().rollback, body.lora_name))
        return PlainTextResponse(f"Success: '{body.lora_name}' is {version.id}.")
