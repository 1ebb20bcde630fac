"""What the OpenAPI document says of answers; requests are declared in wire.py. A test holds the server to both."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from lorafit.server.refusals import ERRORS

ANYWHERE = (401, 403, 404, 408, 413, 421, 503)  # what is answered before a route is asked
LATER = (429, 503)  # with retry-after
RETRY = {"retry-after": {"description": "Seconds after which to ask again.", "schema": {"type": "string"}}}
PLAINLY = {"text/plain": {"schema": {"type": "string"}}}
TEXT = {"description": "It is done.", "content": PLAINLY}
PHASE = {"description": "`loading`, `draining` or `dead`.", "content": PLAINLY}


class CachedTokens(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    """Tokens of all prompts and answers; cached: of prompts whose keys and values were there already."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class Likely(BaseModel):
    """A token and its natural log-probability."""

    token: str
    logprob: float | None
    bytes: list[int]


class ChatToken(Likely):
    top_logprobs: list[Likely]


class ChatLogprobs(BaseModel):
    content: list[ChatToken]


class ToldFunction(BaseModel):
    """arguments: a JSON object, as text."""

    name: str
    arguments: str


class ToldCall(BaseModel):
    id: str
    type: Literal["function"]
    function: ToldFunction


class Said(BaseModel):
    """tool_calls: where there are some, content may be null."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[ToldCall] = []


class Choice(BaseModel):
    """One answer. finish_reason: its own end, or the most tokens that it might have."""

    index: int
    finish_reason: Literal["stop", "length"]


class ChatChoice(BaseModel):
    """One answer. finish_reason: its own end, its end with calls, or the most tokens that it might have."""

    index: int
    finish_reason: Literal["stop", "length", "tool_calls"]
    message: Said
    logprobs: ChatLogprobs | None


class Logprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(Choice):
    text: str
    logprobs: Logprobs | None


class RoutedTo(BaseModel):
    """adapter: its name, or the base's; probability: that the question is for it, or for none."""

    adapter: str
    probability: float


class Completed(BaseModel):
    """model: the version that answered. lorafit: of requests to `auto`."""

    id: str
    created: int
    model: str
    usage: Usage
    routed: RoutedTo | None = Field(None, alias="lorafit")


class ChatAnswer(Completed):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextAnswer(Completed):
    object: Literal["text_completion"]
    choices: list[TextChoice]


class Card(BaseModel):
    """A model that may be asked. root: the version that its name means; parent: the base of an adapter; single: whether
    it was trained on single questions, and is better asked without the conversation before one."""

    id: str
    object: Literal["model"] = "model"
    created: int
    owned_by: str = "lorafit"
    root: str
    parent: str | None
    max_model_len: int
    single: bool = False
    permission: list[dict[str, Any]] = []


class Cards(BaseModel):
    object: Literal["list"] = "list"
    data: list[Card]


class TokensAnswer(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]


class PromptAnswer(BaseModel):
    prompt: str


class VersionAnswer(BaseModel):
    version: str


EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
EVENTS = {"text/event-stream": {"itemSchema": EVENT}}  # as OpenAPI 3.2 has it, and FastAPI before
MADE_BY = {
    "x-lorafit-adapter": {"description": "The version that gave the answer.", "schema": {"type": "string"}},
    "x-lorafit-asked": {"description": "`last question`, where it was asked that alone.", "schema": {"type": "string"}},
}
ASKED = {"description": "The answer; with `stream` its parts as events.", "content": EVENTS, "headers": MADE_BY}
CHAT, PLAIN = {"model": ChatAnswer, **ASKED}, {"model": TextAnswer, **ASKED}


def refused(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """What a route answers by these, and by the statuses of every route."""
    return {
        status: ERRORS[status] | ({"headers": RETRY} if status in LATER else {}) for status in (*ANYWHERE, *statuses)
    }


def finish(made: dict[str, Any], with_keys: bool, open_paths: tuple[str, ...]) -> dict[str, Any]:
    """FastAPI's document without the 422 that this server never answers, and with its keys. open_paths: need none."""
    for path, operations in made["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if path in open_paths:
                operation["responses"].pop("401")
            elif with_keys:
                operation["security"] = [{"key": []}]
    for unused in ("HTTPValidationError", "ValidationError"):
        made["components"]["schemas"].pop(unused, None)
    if with_keys:
        made["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return made
