"""The routes of completions and chat completions: a body becomes engine requests, and their answers a response."""

from __future__ import annotations

import asyncio
import secrets
from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from itertools import accumulate
from typing import Any
from urllib.parse import quote

from fastapi import FastAPI, HTTPException
from fastapi import Request as HttpRequest
from fastapi.responses import JSONResponse, Response

from lorafit.data.thoughts import Thought
from lorafit.errors import RequestError
from lorafit.generation.text import token_bytes
from lorafit.routing import LONGEST, Routed, question_of
from lorafit.server.admission import chosen, key_of, require_quota, require_ready, require_tokens
from lorafit.server.document import CHAT, PLAIN, refused
from lorafit.server.guard import GONE
from lorafit.server.keys import Key
from lorafit.server.service import AUTO, Service
from lorafit.server.streams import CLIENT_ERRORS, AnswerStream, Events, Part, Style, events, usage_of
from lorafit.server.tools import Calling, calling
from lorafit.server.wire import ChatRequest, CompletionRequest
from lorafit.serving import Engine, Piece, Request, Result, Token, Version


def add(app: FastAPI, service: Service) -> None:
    """Add the routes of completions, and one that says there are no embeddings."""

    @app.post("/v1/chat/completions", responses={200: CHAT, **refused(400, 429)})
    async def chat(body: ChatRequest, request: HttpRequest) -> Response:
        """The next message of a conversation, by the adapter that `model` names."""
        return await _answer(service, request, body, "chat.completion")

    @app.post("/v1/completions", responses={200: PLAIN, **refused(400, 429)})
    async def completions(body: CompletionRequest, request: HttpRequest) -> Response:
        """The continuation of each prompt, which is read without a template."""
        return await _answer(service, request, body, "text_completion")

    @app.post("/classify", include_in_schema=False)
    async def classify() -> Response:
        """The engine computes next tokens, and a classifier has none."""
        fix = "start another with classifiers, lorafit serve BASE NAME=RUN"
        raise HTTPException(404, f"the models of this server write text: {fix}")

    @app.post("/v1/embeddings", include_in_schema=False)
    async def embeddings() -> Response:
        """A causal language model is trained to continue a text, not to give embeddings that can be compared."""
        raise HTTPException(404, f"'{service.base}' writes text and gives no embeddings: ask a model made for them")


async def _answer(service: Service, request: HttpRequest, body: ChatRequest | CompletionRequest, kind: str) -> Response:
    require_ready(service)
    key, engine, entry = key_of(request), service.engine, request.state.log
    routed = await _route(service, key, body) if body.model == AUTO else None
    version = chosen(service, key, routed.adapter or service.base if routed else body.model)
    name = version.name if version else service.base
    entry["model"] = version.id if version else name

    answers = AnswerStream(engine, version, _counter(service, key, name))
    tools = await asyncio.to_thread(_tools, service, body, version)
    thought = await asyncio.to_thread(_thought, service, body, version, tools)
    requests = await asyncio.to_thread(_requests, service, body, version, tools, thought)
    prompt_tokens = sum(len(request.prompt) for request in requests)
    await _submit(service, key, answers, requests, len(requests) - bool(routed), prompt_tokens)
    logprobs = None if requests[0].logprobs is None else _logprobs(kind, engine)
    style = Style(
        kind,
        ("chatcmpl-" if kind == "chat.completion" else "cmpl-") + secrets.token_hex(12),
        entry["model"],
        {"adapter": name, "probability": round(routed.probability, 4)} if routed else None,
        tools.form,
        thought,
    )

    def end() -> None:
        answers.cancel()
        entry.update(prompt_tokens=prompt_tokens, tokens=answers.tokens)

    headers = {"x-lorafit-adapter": quote(entry["model"], safe="@/:")}
    if isinstance(body, ChatRequest) and service.asks_alone(version):
        headers["x-lorafit-asked"] = "last question"
    if routed:
        headers["x-lorafit-probability"] = f"{routed.probability:.4f}"
        service.metrics.routed(name)
    if body.stream:
        with_usage = bool(body.stream_options and body.stream_options.include_usage)
        return Events(events(answers, style, logprobs, with_usage), end, headers)
    try:
        await _wait_unless_gone(request, answers)
    finally:
        end()
    results = [answers.results[i] for i in range(len(requests))]
    choices = [
        style.choice(i, result.text, logprobs and logprobs(i, result.tokens), result.finish)
        for i, result in enumerate(results)
    ]
    return JSONResponse(style.whole(choices, usage_of(results)), headers=headers)


def _thought(
    service: Service, body: ChatRequest | CompletionRequest, version: Version | None, tools: Calling
) -> Thought | None:
    """The marks of reasoning in the answers; None where an answer has none. A grammar applies from the first token, and
    would apply to reasoning too."""
    if not isinstance(body, ChatRequest) or tools.grammar is not None or _schema(body) is not None:
        return None
    return service.renderer(version, body.chat_template_kwargs or {}).thought


def _schema(body: ChatRequest) -> dict[str, Any] | None:
    return body.response_format.schema_of() if body.response_format else None


def _counter(service: Service, key: Key, name: str) -> Callable[[Part], None]:
    """A listener that counts each part of an answer. Tokens are charged to the quota while they come, so that a client
    that breaks off and asks again cannot evade it."""

    def count(part: Part) -> None:
        if isinstance(part, Piece):
            service.quota.charge(key, len(part.tokens))
        elif isinstance(part, Result):
            service.metrics.answered(part, name)
        else:
            service.metrics.broken_off(part, name)
            if not isinstance(part, CLIENT_ERRORS):
                service.say(f"'{name}' could not answer: {part}")

    return count


async def _submit(
    service: Service, key: Key, answers: AnswerStream, requests: Sequence[Request], count: int, tokens: int
) -> None:
    """Submit requests, where the key's quota allows it. count: requests that the quota has not been charged for yet;
    tokens: of their prompts."""
    require_quota(service, key, count, tokens)
    try:
        await asyncio.to_thread(answers.submit, requests)
    except BaseException:
        answers.cancel()
        service.quota.give_back(key, count, tokens)
        raise


def _logprobs(kind: str, engine: Engine) -> Callable[[int, Sequence[Token]], dict[str, Any]]:
    """A function that formats the log-probabilities of the next tokens of an answer, which is given by its number."""
    tokenizer = engine.base.tokenizer
    offsets: Counter[int] = Counter()  # characters so far, by answer

    def text_of(token: int) -> str:
        return str(tokenizer.decode([token], clean_up_tokenization_spaces=False))

    def entry(token: int, value: float | None) -> dict[str, Any]:
        return {"token": text_of(token), "logprob": value, "bytes": list(token_bytes(tokenizer, token))}

    def of_chat(number: int, tokens: Sequence[Token]) -> dict[str, Any]:
        return {
            "content": [
                {**entry(token.id, token.logprob), "top_logprobs": [entry(*pair) for pair in token.top]}
                for token in tokens
            ]
        }

    def of_completion(number: int, tokens: Sequence[Token]) -> dict[str, Any]:
        texts = [text_of(token.id) for token in tokens]
        *starts, offsets[number] = accumulate(map(len, texts), initial=offsets[number])
        return {
            "tokens": texts,
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": [{text_of(id_): value for id_, value in token.top} for token in tokens],
            "text_offset": starts,
        }

    return of_chat if kind == "chat.completion" else of_completion


async def _route(service: Service, key: Key, body: ChatRequest | CompletionRequest) -> Routed:
    """Route the question of a request. The quota is charged for one request and for the tokens of a prompt."""
    if isinstance(body, ChatRequest):
        text = question_of([turn.message() for turn in body.messages])
    else:
        first, *rest = body.prompts()
        if rest:
            raise RequestError("model: 'auto' takes one prompt at a time: ask once for each prompt")
        if isinstance(first, str):
            text = first
        else:
            require_tokens(service, first)
            text = await asyncio.to_thread(service.engine.base.tokenizer.decode, first)
    require_quota(service, key, 1, min(LONGEST, len(text)))
    features = await asyncio.to_thread(service.engine.features, [text])
    return service.routed((await asyncio.wrap_future(features))[0], key)


def _tools(service: Service, body: ChatRequest | CompletionRequest, version: Version | None) -> Calling:
    """The tools that the answers may call."""
    if not isinstance(body, ChatRequest):
        return Calling()
    given = body.model_dump(include={"tools", "tool_choice"})
    renderer = service.renderer(version, body.chat_template_kwargs or {})
    tools = calling(given["tools"], given["tool_choice"], body.parallel_tool_calls, renderer)
    if tools.grammar is not None and _schema(body) is not None:
        raise RequestError(
            'response_format: it excludes calls of tools: leave one of them out, or set tool_choice to "none"'
        )
    return tools


def _requests(
    service: Service,
    body: ChatRequest | CompletionRequest,
    version: Version | None,
    tools: Calling,
    thought: Thought | None,
) -> list[Request]:
    """The engine's requests: for each prompt as many as answers are wanted, each with a seed of its own."""
    engine = service.engine
    if isinstance(body, ChatRequest):
        messages = [turn.message() for turn in body.messages]
        renderer = service.renderer(version, body.chat_template_kwargs or {}, bool(body.no_system))
        prompts = [service.prompt(messages, version, renderer, tools.tools, thinks=thought is not None)]
    else:
        encode = partial(engine.base.tokenizer, add_special_tokens=body.add_special_tokens is not False)
        prompts = [
            tuple(encode(prompt)["input_ids"] if isinstance(prompt, str) else prompt) for prompt in body.prompts()
        ]
    adapter = version.id if version else None
    settings = body.settings(longest=max(1, engine.room - max(map(len, prompts))))
    settings |= {"grammar": tools.grammar, "special": tools.special | (thought.special if thought else frozenset())}
    return [Request(prompt, adapter, seed=seed, **settings) for prompt in prompts for seed in body.seeds]


async def _wait_unless_gone(request: HttpRequest, answers: AnswerStream) -> None:
    """Wait for all answers. Raises HTTPException where the client goes away before."""

    async def all_pieces() -> None:
        async for _ in answers.pieces():
            pass

    async def gone() -> None:
        while (await request.receive())["type"] != "http.disconnect":
            pass

    tasks = [asyncio.ensure_future(all_pieces()), asyncio.ensure_future(gone())]
    try:
        await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        if not tasks[0].done():
            raise HTTPException(GONE, "the client went away: ask again")
        tasks[0].result()
    finally:
        for task in tasks:
            task.cancel()
