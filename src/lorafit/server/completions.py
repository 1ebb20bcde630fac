"""Completions and chat completions: from what a client asks to what the engine is asked, and back."""

from __future__ import annotations

import asyncio
import math
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, HTTPException
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from lorafit.data.thoughts import Thought
from lorafit.errors import RequestError
from lorafit.generation.text import token_bytes
from lorafit.routing import LONGEST, Routed, question_of
from lorafit.server.admission import chosen, key_of, require_ready, require_tokens
from lorafit.server.document import CHAT, PLAIN, refused
from lorafit.server.guard import GONE
from lorafit.server.keys import Key
from lorafit.server.service import AUTO, Service
from lorafit.server.streams import ASKERS, Coming, Events, Part, Style, events, finish_of, usage_of
from lorafit.server.tools import Calling, calling
from lorafit.server.wire import ChatRequest, CompletionRequest, chat_logprobs, completion_logprobs
from lorafit.serving import Engine, Piece, Request, Result, Token, Version


def add(app: FastAPI, service: Service) -> None:
    """The routes of completions, and the one that says there are no embeddings."""

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
    require_ready(service)
    key, engine, told = key_of(request), service.engine, request.state.told
    routed = await _routed(service, key, body) if body.model == AUTO else None
    version = chosen(service, key, routed.adapter or service.base if routed else body.model)
    name = version.name if version else service.base
    told["model"] = version.id if version else name

    coming = Coming(engine, version, _counted(service, key, name))
    called = await asyncio.to_thread(_called, service, body, version)
    thought = await asyncio.to_thread(_thought, service, body, version, called)
    requests = await asyncio.to_thread(_requests, service, body, version, called, thought)
    prompts = sum(len(one.prompt) for one in requests)
    await _submitted(service, key, coming, requests, len(requests) - bool(routed), prompts)
    logprobs = None if requests[0].logprobs is None else _logprobs(kind, engine)
    style = Style(
        kind,
        ("chatcmpl-" if kind == "chat.completion" else "cmpl-") + secrets.token_hex(12),
        told["model"],
        {"adapter": name, "probability": round(routed.probability, 4)} if routed else None,
        called.form,
        thought,
    )

    def ended() -> None:
        coming.cancel()
        told.update(prompt_tokens=prompts, tokens=coming.tokens)

    headers = {"x-lorafit-adapter": quote(told["model"], safe="@/:")}
    if isinstance(body, ChatRequest) and service.asks_alone(version):
        headers["x-lorafit-asked"] = "last question"
    if routed:
        headers["x-lorafit-probability"] = f"{routed.probability:.4f}"
        service.metrics.routed(name)
    if body.stream:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        parts = events(coming, style, logprobs, with_usage)
        return Events(parts, ended, headers)
    try:
        await _unless_gone(request, coming)
    finally:
        ended()
    results = [coming.results[i] for i in range(len(requests))]
    choices = [
        style.choice(i, one.text, logprobs and logprobs(i, one.tokens), finish_of(one.finish))
        for i, one in enumerate(results)
    ]
    return JSONResponse(style.whole(choices, usage_of(results)), headers=headers)


def _thought(
    service: Service, body: ChatRequest | CompletionRequest, version: Version | None, called: Calling
) -> Thought | None:
    """How reasoning is told apart in the answers; None where all is the answer, as it is of one that a grammar keeps to
    a form: it holds from the first token, and would hold within a thought too."""
    if not isinstance(body, ChatRequest) or called.grammar is not None:
        return None
    if body.response_format and body.response_format.schema_of() is not None:
        return None
    return service.renderer(version, body.chat_template_kwargs or {}).thought


def _counted(service: Service, key: Key, name: str) -> Callable[[Part], None]:
    """What hears each part of an answer: quotas while tokens come, for who asks again has used them up, and metrics."""

    def heard(part: Part) -> None:
        if isinstance(part, Piece):
            service.quota.charge(key, len(part.tokens))
        elif isinstance(part, Result):
            service.metrics.answered(part, name)
        else:
            service.metrics.broken_off(part, name)
            if not isinstance(part, ASKERS):
                service.say(f"'{name}' could not answer: {part}")

    return heard


async def _submitted(
    service: Service, key: Key, coming: Coming, requests: Sequence[Request], count: int, prompts: int
) -> None:
    """Ask the engine, where the key's quota allows it. count: requests that were not taken yet; prompts: tokens."""
    _require_quota(service, key, count, prompts)
    try:
        await asyncio.to_thread(coming.submit, requests)
    except BaseException:
        coming.cancel()
        service.quota.give_back(key, count, prompts)
        raise


def _logprobs(kind: str, engine: Engine) -> Callable[[int, Sequence[Token]], Any]:
    """How the log-probabilities of an answer's next tokens are told, by its number."""
    decode = engine.base.tokenizer.decode
    bytes_of = partial(token_bytes, engine.base.tokenizer)
    told_before: Counter[int] = Counter()  # characters, by answer

    def text_of(token: int) -> str:
        return str(decode([token], clean_up_tokenization_spaces=False))

    def told(number: int, tokens: Sequence[Token]) -> Any:
        if kind == "chat.completion":
            return chat_logprobs(tokens, text_of, bytes_of)
        made = completion_logprobs(tokens, text_of, told_before[number])
        told_before[number] += sum(map(len, made["tokens"]))
        return made

    return told


async def _routed(service: Service, key: Key, body: ChatRequest | CompletionRequest) -> Routed:
    """Where the question of a request goes. Reading it takes a request from the key, and tokens as a prompt does."""
    if isinstance(body, ChatRequest):
        text = question_of([turn.message() for turn in body.messages])
    else:
        first, *rest = body.prompts()
        if rest:
            raise RequestError("model: 'auto' takes one prompt at a time: give each a request of its own")
        if isinstance(first, str):
            text = first
        else:
            require_tokens(service, first)
            text = await asyncio.to_thread(service.engine.base.tokenizer.decode, first)
    _require_quota(service, key, 1, min(LONGEST, len(text)))
    reading = await asyncio.to_thread(service.engine.features, [text])
    return service.routed((await asyncio.wrap_future(reading))[0], key)


def _require_quota(service: Service, key: Key, requests: int, tokens: int) -> None:
    if wait := service.quota.take(key, requests, tokens):
        raise HTTPException(
            429,
            f"the quota of the key '{key.name}' is used up: ask again in {math.ceil(wait)} s",
            {"retry-after": str(math.ceil(wait))},
        )


def _called(service: Service, body: ChatRequest | CompletionRequest, version: Version | None) -> Calling:
    """What may be called in the answers."""
    if not isinstance(body, ChatRequest):
        return Calling()
    told = body.model_dump(include={"tools", "tool_choice"})
    renderer = service.renderer(version, body.chat_template_kwargs or {})
    found = calling(told["tools"], told["tool_choice"], body.parallel_tool_calls, renderer)
    if found.grammar is not None and body.response_format and body.response_format.schema_of() is not None:
        raise RequestError(
            'response_format: an answer keeps to it, or calls tools: leave one of them out, or say tool_choice "none"'
        )
    return found


def _requests(
    service: Service,
    body: ChatRequest | CompletionRequest,
    version: Version | None,
    called: Calling,
    thought: Thought | None,
) -> list[Request]:
    """What the engine is asked: each prompt as often as answers are wanted, each with a seed of its own."""
    engine = service.engine
    if isinstance(body, ChatRequest):
        messages = [turn.message() for turn in body.messages]
        settings = body.chat_template_kwargs or {}
        prompts = [service.prompt(messages, version, called.tools, settings, thinks=thought is not None)]
    else:
        read = partial(engine.base.tokenizer, add_special_tokens=body.add_special_tokens is not False)
        prompts = [tuple(read(one)["input_ids"] if isinstance(one, str) else one) for one in body.prompts()]
    longest = max(1, engine.room - max(map(len, prompts)))
    adapter, asked = version.id if version else None, body.settings(longest)
    asked |= {"grammar": called.grammar, "special": called.special | (thought.special if thought else frozenset())}
    return [Request(prompt, adapter, seed=seed, **asked) for prompt in prompts for seed in body.seeds]


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
