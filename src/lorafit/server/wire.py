"""What clients send, and how answers are written: OpenAI's chat completions and completions, as vLLM extends them.

Fields that are not known pass, as clients of other servers send many. Sizes are bounded here; what a request may ask of
the engine is checked there, so that each rule stands once.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Field, StringConstraints

from lorafit.data.examples import Message
from lorafit.errors import RequestError
from lorafit.serving import Token

MOST_ANSWERS = 16

Text = Annotated[str, StringConstraints(max_length=1 << 20)]
Ids = Annotated[list[int], Field(max_length=1 << 17, fail_fast=True)]
Model = Annotated[str, StringConstraints(max_length=256)]


class Part(BaseModel):
    """Part of a message. Only text is read."""

    type: Literal["text"]
    text: Text


class Turn(BaseModel):
    """A message of a conversation."""

    role: Literal["system", "developer", "user", "assistant"]
    content: Text | list[Part]

    def message(self) -> Message:
        content = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return Message("system" if self.role == "developer" else self.role, content)


class Schema(BaseModel):
    """A JSON schema under a name."""

    model_config = ConfigDict(protected_namespaces=())
    name: str = ""
    schema_: dict[str, Any] = Field(alias="schema")


class Format(BaseModel):
    """What an answer must be: any text, any JSON object, or JSON that keeps to a schema."""

    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None

    def schema_of(self) -> dict[str, Any] | None:
        if self.type == "json_schema":
            if self.json_schema is None:
                raise RequestError('response_format: json_schema is missing: give {"name": ..., "schema": {...}}')
            return self.json_schema.schema_
        return {"type": "object"} if self.type == "json_object" else None


class StreamOptions(BaseModel):
    include_usage: bool = False


class Common(BaseModel):
    """What both kinds of completion take. max_tokens: of the answer."""

    model: Model
    max_tokens: int | None = None
    temperature: float | None = Field(None, allow_inf_nan=False)
    top_p: float | None = Field(None, allow_inf_nan=False)
    top_k: int | None = None
    seed: int | None = None
    n: int | None = Field(None, ge=1, le=MOST_ANSWERS)
    stop: Text | Annotated[list[Text], Field(max_length=16)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool = False
    adapter_scale: float | None = Field(None, allow_inf_nan=False)
    response_format: Format | None = None

    @property
    def count(self) -> int:
        return self.n or 1

    def settings(self, longest: int) -> dict[str, Any]:
        """What the engine's Request takes of it. longest: of an answer whose length is not said, in tokens."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return {
            "max_tokens": longest if self.max_tokens is None else self.max_tokens,
            "temperature": 0.0 if self.temperature is None else self.temperature,  # as what was proven was measured
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_k": 0 if self.top_k is None or self.top_k < 0 else self.top_k,
            "stop": tuple(stops),
            "ignore_end": self.ignore_eos,
            "adapter_scale": 1.0 if self.adapter_scale is None else self.adapter_scale,
            "schema": self.response_format.schema_of() if self.response_format else None,
        }


class ChatRequest(Common):
    """POST /v1/chat/completions"""

    messages: Annotated[list[Turn], Field(min_length=1, max_length=1024)]
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = None

    def settings(self, longest: int) -> dict[str, Any]:
        if self.max_completion_tokens is not None:
            longest = self.max_completion_tokens
        told = super().settings(longest)
        return {**told, "logprobs": (self.top_logprobs or 0) if self.logprobs else None}


class CompletionRequest(Common):
    """POST /v1/completions: one prompt, a text or token ids, or several."""

    prompt: Text | Ids | Annotated[list[Text], Field(max_length=64)] | Annotated[list[Ids], Field(max_length=64)]
    logprobs: int | None = None
    echo: Literal[False] | None = None

    def settings(self, longest: int) -> dict[str, Any]:
        return {**super().settings(longest), "logprobs": self.logprobs}

    def prompts(self) -> Sequence[str | list[int]]:
        """Each prompt on its own."""
        if isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int)):
            return [self.prompt]
        return self.prompt  # type: ignore[return-value]


class TokenizeRequest(BaseModel):
    """POST /tokenize"""

    model: Model | None = None
    prompt: Text | None = None
    messages: Annotated[list[Turn], Field(min_length=1, max_length=1024)] | None = None


class DetokenizeRequest(BaseModel):
    """POST /detokenize"""

    model: Model | None = None
    tokens: Ids


class LoadRequest(BaseModel):
    """POST /v1/load_lora_adapter. lora_path: a folder within the server's folder of adapters."""

    lora_name: str
    lora_path: str
    load_inplace: bool = False


class NameRequest(BaseModel):
    """POST /v1/unload_lora_adapter, /v1/rollback_lora_adapter"""

    lora_name: str


def error(message: str, kind: str, code: int, param: str | None = None) -> dict[str, Any]:
    """The body of an answer that is an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def chat_logprobs(tokens: Sequence[Token], text_of: Any) -> dict[str, Any]:
    """Log-probabilities as chat completions tell them. text_of: the text of one token id."""

    def one(token: int, value: float | None) -> dict[str, Any]:
        text = text_of(token)
        return {"token": text, "logprob": value, "bytes": list(text.encode())}

    return {"content": [{**one(token.id, token.logprob), "top_logprobs": [one(*pair) for pair in token.top]}
                        for token in tokens]}  # fmt: skip


def completion_logprobs(tokens: Sequence[Token], text_of: Any) -> dict[str, Any]:
    """Log-probabilities as completions tell them."""
    texts = [text_of(token.id) for token in tokens]
    starts = [0, *accumulate(map(len, texts))][: len(texts)]
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{text_of(id_): value for id_, value in token.top} for token in tokens],
        "text_offset": starts,
    }
