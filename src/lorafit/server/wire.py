"""What clients send, and how answers are written: OpenAI's chat completions and completions, as vLLM extends them.

Fields that are not known pass, as clients of other servers send many, and those that are known and not done pass where
their value asks for nothing (unsupported.py); a number in quotes is no number, as at OpenAI.
What a field may hold is declared here, for the OpenAPI document tells it; what depends on the base is checked by the
engine.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from itertools import accumulate
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    StringConstraints,
    ValidationInfo,
    field_validator,
    model_validator,
)
from pydantic_core import PydanticCustomError

from lorafit.data.examples import Call, Message
from lorafit.data.messages import ROLES, THINKS, joined, thought_of
from lorafit.data.tools import CALLS, NAME, claim, read_calls
from lorafit.server import unsupported
from lorafit.server.unsupported import EMPTY, MEDIA, NONE
from lorafit.serving import Token
from lorafit.serving.request import (
    HOTTEST,
    LONGEST_STOP,
    MOST_BIAS,
    MOST_BIASES,
    MOST_LOGPROBS,
    MOST_PENALTY,
    MOST_SCALE,
    MOST_STOPS,
)

MOST_ANSWERS, MOST_TOOLS = 16, 128  # tools: as at OpenAI
HALF = "half of a surrogate pair is no character: send whole characters, as UTF-8"
TEXT = 'only text is read here: give a text, or parts of {"type": "text", "text": ...}'
CALLER = "only the assistant calls tools: leave the call out, or say assistant"
SILENT = "nothing is said in it: give a text"
REFUSED = "refusal: what was said in it is not read there: give it as content"
OPEN = "an answer is not gone on with here: end with what the user says"


def _whole(value: Any) -> Any:
    """JSON knows one kind of number: some clients write 8 as 8.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _characters(value: dict[str, Any]) -> dict[str, Any]:
    """JSON can spell what no text holds; where a text is expected pydantic sees it."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("string_unicode", HALF) from None
    return value


def _wrong(words: str) -> PydanticCustomError:
    """An error of pydantic's in words of ours."""
    return PydanticCustomError("lorafit", "{words}", {"words": words})


def _count(value: int) -> int:
    if value < 1 and value != NONE:
        raise ValueError(f"{value} tokens are no answer: ask for at least 1, or leave it out")
    return value


WHOLE = BeforeValidator(_whole)
Count = Annotated[int, Field(json_schema_extra={"minimum": NONE, "not": {"const": 0}}), WHOLE, AfterValidator(_count)]
Likely = Annotated[int, Field(ge=0, le=MOST_LOGPROBS), WHOLE]
Text = Annotated[str, StringConstraints(max_length=1 << 20)]
Prompt = Annotated[str, StringConstraints(min_length=1, max_length=1 << 20)]
Stop = Annotated[str, StringConstraints(max_length=LONGEST_STOP)]
Penalty = Annotated[float, Field(ge=-MOST_PENALTY, le=MOST_PENALTY)]
Bias = Annotated[float, Field(ge=-MOST_BIAS, le=MOST_BIAS)]
IdText = Annotated[str, StringConstraints(pattern="^(0|[1-9][0-9]{0,8})$")]  # JSON's names are texts
Id = Annotated[int, Field(ge=0)]
Ids = Annotated[list[Id], Field(max_length=1 << 17, fail_fast=True)]
PromptIds = Annotated[list[Id], Field(min_length=1, max_length=1 << 17, fail_fast=True)]
Model = Annotated[str, StringConstraints(max_length=256)]
Setting = Annotated[str, StringConstraints(max_length=1024)] | bool | int | float | None
Settings = Annotated[dict[Model, Setting], Field(max_length=16)]


class Body(BaseModel):
    model_config = ConfigDict(strict=True)


class Asked(Body):
    """A body that may ask for what is not done."""

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, value: Any) -> Any:
        if isinstance(value, dict) and (found := unsupported.problems(value)):
            raise _wrong("; ".join(found))
        return value


class Function(Body):
    """A function that may be called. parameters: a JSON schema. strict: whether arguments are kept to it."""

    model_config = ConfigDict(extra="allow")  # what else describes it is shown as it is learnt
    name: Annotated[str, StringConstraints(pattern=f"^{NAME.pattern}$")]
    description: Text | None = None
    parameters: Annotated[dict[str, Any], AfterValidator(_characters)] | None = None
    strict: bool | None = None


class Tool(Body):
    """What may be called."""

    type: Literal["function"]
    function: Function


class Named(Body):
    """A function, by its name."""

    name: Annotated[str, StringConstraints(max_length=256)]


class ToolChoice(Body):
    """The one function that is to be called."""

    type: Literal["function"]
    function: Named


class Called(Named):
    """A call. arguments: a JSON object, as text."""

    arguments: Text | dict[str, Any] | None = None


class ToolCall(Body):
    """A call in a message of the assistant."""

    id: Annotated[str, StringConstraints(max_length=256)] | None = None
    type: Literal["function"] = "function"
    function: Called


class Part(Body):
    """Part of a message. Only text is read."""

    type: Literal["text"]
    text: Text


class Turn(Body):
    """A message of a conversation. An assistant may have said nothing, or called tools; a tool answers a call.
    reasoning_content, reasoning, thinking: what an assistant thought before, by the names that programs give it."""

    model_config = ConfigDict(
        json_schema_extra={
            "anyOf": [
                {"properties": {"role": {"const": "assistant"}}},
                {"properties": {"content": {"not": {"type": "null"}}}, "required": ["content"]},
            ]
        }
    )
    role: Literal["system", "developer", "user", "assistant", "tool", "function"]
    content: Annotated[Text | list[Part] | None, Field(validate_default=True)] = None
    reasoning_content: Text | None = None
    reasoning: Text | None = None
    thinking: Text | None = None
    name: str | None = None
    tool_calls: list[ToolCall] | None = None
    function_call: Called | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _readable(cls, value: Any) -> Any:
        if isinstance(value, dict):
            if value.get("role") != "assistant" and any(value.get(field) for field in CALLS):
                raise _wrong(CALLER)
            if any(held and MEDIA.fullmatch(name) for name, held in value.items()):
                raise _wrong(TEXT)
            if value.get("refusal") and not value.get("content"):
                raise _wrong(REFUSED)
            if value.get("prefix") or value.get("partial"):
                raise _wrong(OPEN)
        return value

    @field_validator("content", mode="before")
    @classmethod
    def _text(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and info.data.get("role") != "assistant":
            raise _wrong(SILENT)
        parts = value if isinstance(value, list) else []
        if not isinstance(value, str | list | None) or not all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in parts
        ):
            raise _wrong(TEXT)
        return value

    @model_validator(mode="after")
    def _whole(self) -> Turn:
        if self.tool_calls or self.function_call:
            self._calls()
        return self

    def _calls(self) -> tuple[Call, ...]:
        """The calls it makes, read as those of examples are."""

        def wrong(what: str, fix: str, field: str) -> None:
            raise _wrong(f"{field.lstrip('.')}: {what}: {fix}")

        return read_calls(self.model_dump(), "", wrong) or ()

    def message(self) -> Message:
        parts = [self.content or ""] if not isinstance(self.content, list) else [part.text for part in self.content]
        role, text = ROLES[self.role], joined(parts)
        if role != "assistant":
            return Message(role, text, answers=claim(self.model_dump()) if role == "tool" else None)
        reasoning, answer = thought_of(text)
        told = [reasoning, *(getattr(self, name) or "" for name in THINKS)]
        reasoning = next((one for text in told if (one := text.strip())), "")
        return Message(role, answer, calls=self._calls(), reasoning=reasoning)


class Schema(Body):
    """A JSON schema under a name."""

    model_config = ConfigDict(protected_namespaces=())
    name: str = ""
    schema_: Annotated[dict[str, Any], AfterValidator(_characters)] = Field(alias="schema")


class Format(Body):
    """What an answer must be: any text, any JSON object, or JSON that keeps to a schema, which is given by itself or
    under a name."""

    model_config = ConfigDict(protected_namespaces=())
    type: Literal["text", "json_object", "json_schema"]
    json_schema: Schema | None = None
    schema_: Annotated[dict[str, Any], AfterValidator(_characters)] | None = Field(None, alias="schema")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        known = {"type", "json_schema", "schema"}
        for name in value if isinstance(value, dict) else ():
            if name not in known and value[name] not in EMPTY:
                raise _wrong(f"{name[:80]} is not read here: give type, and json_schema or schema")
        return value

    @model_validator(mode="after")
    def _one(self) -> Format:
        given = self._schemas()
        if self.type == "json_schema" and not given:
            raise _wrong('json_schema is missing: give {"name": ..., "schema": {...}}')
        if self.type == "text" and any(given):
            raise _wrong("an answer of the type text keeps to no schema: say json_schema, or leave the schema out")
        if len(given) > 1 and given[0] != given[1]:
            raise _wrong("schema is another than that of json_schema: give one")
        return self

    def _schemas(self) -> list[dict[str, Any]]:
        named = self.json_schema.schema_ if self.json_schema else None
        return [one for one in (named, self.schema_) if one is not None]

    def schema_of(self) -> dict[str, Any] | None:
        if self.type == "text":
            return None
        given = self._schemas()
        return given[0] if self.type == "json_schema" or any(given) else {"type": "object"}


class StreamOptions(Body):
    include_usage: bool = False


class Common(Asked):
    """What both kinds of completion take. max_tokens: of the answer; logit_bias: by token id."""

    model: Model
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=HOTTEST)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, WHOLE] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=MOST_PENALTY)] | None = None
    logit_bias: Annotated[dict[IdText, Bias], Field(max_length=MOST_BIASES)] | None = None
    seed: Annotated[int, Field(ge=NONE, lt=1 << 63), WHOLE] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS), WHOLE] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    adapter_scale: Annotated[float, Field(ge=-MOST_SCALE, le=MOST_SCALE)] | None = None
    response_format: Format | None = None

    @property
    def count(self) -> int:
        return self.n or 1

    @property
    def seeds(self) -> list[int | None]:
        """Of each answer to a prompt."""
        if self.seed is None or self.seed == NONE:
            return [None] * self.count
        return [(self.seed + i) % 2**63 for i in range(self.count)]

    def settings(self, longest: int) -> dict[str, Any]:
        """What the engine's Request takes of it. longest: of an answer whose length is not said, in tokens."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return {
            "max_tokens": longest if self.max_tokens in (None, NONE) else self.max_tokens,
            "temperature": 0.0 if self.temperature is None else self.temperature,  # as what was proven was measured
            "top_p": 1.0 if self.top_p is None else self.top_p,
            "top_k": 0 if self.top_k is None or self.top_k < 0 else self.top_k,
            "min_p": self.min_p or 0.0,
            "presence_penalty": self.presence_penalty or 0.0,
            "frequency_penalty": self.frequency_penalty or 0.0,
            "repetition_penalty": 1.0 if self.repetition_penalty is None else self.repetition_penalty,
            "logit_bias": {int(token): bias for token, bias in self.logit_bias.items()} if self.logit_bias else None,
            "stop": tuple(stop for stop in stops if stop),
            "ignore_end": bool(self.ignore_eos),
            "adapter_scale": 1.0 if self.adapter_scale is None else self.adapter_scale,
            "schema": self.response_format.schema_of() if self.response_format else None,
        }


class ChatRequest(Common):
    """POST /v1/chat/completions. chat_template_kwargs: settings of the template, over those of the training."""

    messages: Annotated[list[Turn], Field(min_length=1, max_length=1024)]
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: Settings | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Likely | None = None

    def settings(self, longest: int) -> dict[str, Any]:
        if self.max_completion_tokens not in (None, NONE):
            longest = self.max_completion_tokens
        told = super().settings(longest)
        return {**told, "logprobs": (self.top_logprobs or 0) if self.logprobs else None}


class CompletionRequest(Common):
    """POST /v1/completions: one prompt, a text or token ids, or several."""

    prompt: (
        Prompt
        | PromptIds
        | Annotated[list[Prompt], Field(min_length=1, max_length=64)]
        | Annotated[list[PromptIds], Field(min_length=1, max_length=64)]
    )
    logprobs: Likely | None = None
    add_special_tokens: bool | None = None

    def settings(self, longest: int) -> dict[str, Any]:
        return {**super().settings(longest), "logprobs": self.logprobs}

    def prompts(self) -> Sequence[str | list[int]]:
        """Each prompt on its own."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class TokenizeRequest(Asked):
    """POST /tokenize. add_special_tokens: to a prompt."""

    model: Model | None = None
    prompt: Text | None = None
    messages: Annotated[list[Turn], Field(min_length=1, max_length=1024)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    chat_template_kwargs: Settings | None = None
    add_special_tokens: bool | None = None


class DetokenizeRequest(Body):
    """POST /detokenize"""

    model: Model | None = None
    tokens: Ids


class LoadRequest(Body):
    """POST /v1/load_lora_adapter. lora_path: a folder within the server's folder of adapters."""

    lora_name: Model
    lora_path: Text
    load_inplace: bool = False


class NameRequest(Body):
    """POST /v1/unload_lora_adapter, /v1/rollback_lora_adapter"""

    lora_name: Model


def error(message: str, kind: str, code: int, param: str | None = None) -> dict[str, Any]:
    """The body of an answer that is an error."""
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def chat_logprobs(
    tokens: Sequence[Token], text_of: Callable[[int], str], bytes_of: Callable[[int], bytes]
) -> dict[str, Any]:
    """Log-probabilities as chat completions tell them. text_of, bytes_of: of one token id."""

    def one(token: int, value: float | None) -> dict[str, Any]:
        return {"token": text_of(token), "logprob": value, "bytes": list(bytes_of(token))}

    return {
        "content": [
            {**one(token.id, token.logprob), "top_logprobs": [one(*pair) for pair in token.top]} for token in tokens
        ]
    }


def completion_logprobs(tokens: Sequence[Token], text_of: Callable[[int], str], start: int) -> dict[str, Any]:
    """Log-probabilities as completions tell them. start: characters of the answer's tokens before these."""
    texts = [text_of(token.id) for token in tokens]
    starts = list(accumulate(map(len, texts), initial=start))[: len(texts)]
    return {
        "tokens": texts,
        "token_logprobs": [token.logprob for token in tokens],
        "top_logprobs": [{text_of(id_): value for id_, value in token.top} for token in tokens],
        "text_offset": starts,
    }
