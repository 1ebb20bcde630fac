"""The answers in the OpenAPI document, as pydantic models; requests are declared in wire.py. A test compares the
server's answers with both."""

from __future__ import annotations

from typing import Any, Literal

from pydantic import BaseModel, Field

from lorafit.server.refusals import ERRORS

ANYWHERE = (401, 403, 404, 408, 413, 421, 503)  # statuses of checks before the routes
LATER = (429, 503)  # statuses with retry-after
RETRY = {"retry-after": {"description": "Seconds after which to ask again.", "schema": {"type": "string"}}}
PLAINLY = {"text/plain": {"schema": {"type": "string"}}}
TEXT = {"description": "Success.", "content": PLAINLY}
PHASE = {"description": "`loading`, `draining` or `dead`.", "content": PLAINLY}


class CachedTokens(BaseModel):
    cached_tokens: int


class Usage(BaseModel):
    """Tokens of all prompts and answers. cached_tokens: of prompts, whose keys and values were in the cache."""

    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: CachedTokens


class TokenLogprob(BaseModel):
    """A token and its natural log-probability."""

    token: str
    logprob: float | None
    bytes: list[int]


class ChatToken(TokenLogprob):
    top_logprobs: list[TokenLogprob]


class ChatLogprobs(BaseModel):
    content: list[ChatToken]


class AnswerFunction(BaseModel):
    """arguments: a JSON object, as text."""

    name: str
    arguments: str


class AnswerToolCall(BaseModel):
    id: str
    type: Literal["function"]
    function: AnswerFunction


class AnswerMessage(BaseModel):
    """The message of an answer. content: may be null where there are tool_calls."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: str | None = None
    tool_calls: list[AnswerToolCall] = []


class ChatChoice(BaseModel):
    """One answer. finish_reason: tool_calls where it ends with calls; length where it reached the limit of its tokens,
    or where a stop text cut a call."""

    index: int
    finish_reason: Literal["stop", "length", "tool_calls"]
    message: AnswerMessage
    logprobs: ChatLogprobs | None


class Logprobs(BaseModel):
    tokens: list[str]
    token_logprobs: list[float | None]
    top_logprobs: list[dict[str, float]]
    text_offset: list[int]


class TextChoice(BaseModel):
    """One answer. finish_reason: length where it reached the limit of its tokens."""

    index: int
    finish_reason: Literal["stop", "length"]
    text: str
    logprobs: Logprobs | None


class RoutedTo(BaseModel):
    """The router's choice. adapter: its name, or the base's; probability: that the question belongs to it."""

    adapter: str
    probability: float


class Completion(BaseModel):
    """model: the version that answered. lorafit: the router's choice, for requests to `auto`."""

    id: str
    created: int
    model: str
    usage: Usage
    routed: RoutedTo | None = Field(None, alias="lorafit")


class ChatAnswer(Completion):
    object: Literal["chat.completion"]
    choices: list[ChatChoice]


class TextAnswer(Completion):
    object: Literal["text_completion"]
    choices: list[TextChoice]


class Card(BaseModel):
    """A model. root: the version that its name means; parent: the base of an adapter; single: whether it was trained on
    single questions, and answers better without the conversation before one."""

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


class ClassifierCard(Card):
    """A classifier. labels: in the order of `probs`. max_model_len: most tokens of a text."""

    labels: list[str]


class ClassifierCards(BaseModel):
    object: Literal["list"] = "list"
    data: list[ClassifierCard]


class Classified(BaseModel):
    """A text. label: the most likely one; probs: the probability of every label of the model's card, in its order."""

    index: int
    label: str
    probs: list[float]
    num_classes: int


class ClassifyUsage(BaseModel):
    prompt_tokens: int
    total_tokens: int
    completion_tokens: Literal[0] = 0
    prompt_tokens_details: None = None


class ClassifyAnswer(BaseModel):
    """The labels of the texts of a request, in the form of vLLM's answer."""

    id: str
    object: Literal["list"] = "list"
    created: int
    model: str
    data: list[Classified]
    usage: ClassifyUsage


class TokensAnswer(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]


class PromptAnswer(BaseModel):
    prompt: str


class VersionAnswer(BaseModel):
    version: str


EVENT = {"type": "object", "properties": {"data": {"type": "string"}}, "required": ["data"]}
EVENTS = {"text/event-stream": {"itemSchema": EVENT}}  # OpenAPI 3.2 defines itemSchema
ADAPTER_HEADERS = {
    "x-lorafit-adapter": {"description": "The version that gave the answer.", "schema": {"type": "string"}},
    "x-lorafit-asked": {"description": "`last question`, where it got only that.", "schema": {"type": "string"}},
}
ANSWER = {"description": "An answer; with `stream` its parts as events.", "content": EVENTS, "headers": ADAPTER_HEADERS}
CHAT, PLAIN = {"model": ChatAnswer, **ANSWER}, {"model": TextAnswer, **ANSWER}


def refused(*statuses: int) -> dict[int | str, dict[str, Any]]:
    """The responses of a route for these error statuses, and for those of every route."""
    return {
        status: ERRORS[status] | ({"headers": RETRY} if status in LATER else {}) for status in (*ANYWHERE, *statuses)
    }


def finish(document: dict[str, Any], with_keys: bool, open_paths: tuple[str, ...]) -> dict[str, Any]:
    """FastAPI's document without status 422, which this server never sends, and with its keys. open_paths: paths that
    need no key."""
    for path, operations in document["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if path in open_paths:
                operation["responses"].pop("401")
            elif with_keys:
                operation["security"] = [{"key": []}]
    for unused in ("HTTPValidationError", "ValidationError"):
        document["components"]["schemas"].pop(unused, None)
    if with_keys:
        document["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return document
