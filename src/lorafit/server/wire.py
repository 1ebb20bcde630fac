"""The bodies of requests, as pydantic models: OpenAI's chat completions and completions, with vLLM's extensions.

A body comes in as JSON; out come messages, and the settings of the engine's Request. Unknown fields are ignored, since
clients of other servers send many; known fields that lorafit does not support are refused by unsupported.py. Limits
that depend on the base are checked by the engine.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
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
from lorafit.serving import request

MOST_ANSWERS, MOST_TOOLS = 16, 128  # OpenAI allows as many tools
MOST_TEXTS = 1024  # of a request for labels
# Settings with the names and defaults of the engine's Request, which decodes greedily, as the evaluation does.
PENALTIES = "presence_penalty", "frequency_penalty", "repetition_penalty"
SAMPLING = "temperature", "top_p", "min_p", *PENALTIES, "adapter_scale"
SURROGATE = "half of a surrogate pair is not a character: send whole characters, as UTF-8"
TEXT = 'only text is read: give a text, or parts of {"type": "text", "text": ...}'
CALLER = "only the assistant calls tools: leave the call out, or set the role to assistant"
SILENT = "the message is empty: give a text"
REFUSED = "refusal: this field is not read: give its text as content"
OPEN = "a message cannot be continued: end with a message of the user"


def _as_int(value: Any) -> Any:
    """JSON has one kind of number: some clients write 8 as 8.0."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _require_characters(value: dict[str, Any]) -> dict[str, Any]:
    """Refuse half a surrogate pair, which JSON can spell. In fields that hold a string, pydantic does so itself."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        raise PydanticCustomError("string_unicode", SURROGATE) from None
    return value


def _invalid(message: str) -> PydanticCustomError:
    """A pydantic error with this message, which may hold braces."""
    return PydanticCustomError("lorafit", "{message}", {"message": message})


def _count(value: int) -> int:
    if value < 1 and value != NONE:
        raise ValueError(f"an answer cannot have {value} tokens: ask for at least 1, or leave it out")
    return value


WHOLE = BeforeValidator(_as_int)
Count = Annotated[int, Field(json_schema_extra={"minimum": NONE, "not": {"const": 0}}), WHOLE, AfterValidator(_count)]
Logprobs = Annotated[int, Field(ge=0, le=request.MOST_LOGPROBS), WHOLE]
Text = Annotated[str, StringConstraints(max_length=1 << 20)]
Prompt = Annotated[str, StringConstraints(min_length=1, max_length=1 << 20)]
Stop = Annotated[str, StringConstraints(max_length=request.LONGEST_STOP)]
Penalty = Annotated[float, Field(ge=-request.MOST_PENALTY, le=request.MOST_PENALTY)]
Bias = Annotated[float, Field(ge=-request.MOST_BIAS, le=request.MOST_BIAS)]
IdText = Annotated[str, StringConstraints(pattern="^(0|[1-9][0-9]{0,8})$")]  # keys of JSON objects are strings
Id = Annotated[int, Field(ge=0)]
Ids = Annotated[list[Id], Field(max_length=1 << 17, fail_fast=True)]
PromptIds = Annotated[list[Id], Field(min_length=1, max_length=1 << 17, fail_fast=True)]
Model = Annotated[str, StringConstraints(max_length=256)]
Setting = Annotated[str, StringConstraints(max_length=1024)] | bool | int | float | None
Settings = Annotated[dict[Model, Setting], Field(max_length=16)]
Schema = Annotated[dict[str, Any], AfterValidator(_require_characters)]


class Body(BaseModel):
    model_config = ConfigDict(strict=True)


class CheckedBody(Body):
    """A body whose unsupported fields are refused."""

    @model_validator(mode="before")
    @classmethod
    def _supported(cls, value: Any) -> Any:
        if isinstance(value, dict) and (problems := unsupported.problems(value)):
            raise _invalid("; ".join(problems))
        return value


class Function(Body):
    """A function that may be called. parameters: a JSON schema. strict: whether arguments must follow it."""

    model_config = ConfigDict(extra="allow")  # the prompt shows all fields, as in training
    name: Annotated[str, StringConstraints(pattern=f"^{NAME.pattern}$")]
    description: Text | None = None
    parameters: Schema | None = None
    strict: bool | None = None


class Tool(Body):
    """A tool that may be called."""

    type: Literal["function"]
    function: Function


class FunctionName(Body):
    """A function, by its name."""

    name: Annotated[str, StringConstraints(max_length=256)]


class ToolChoice(Body):
    """The function that must be called."""

    type: Literal["function"]
    function: FunctionName


class FunctionCall(FunctionName):
    """A call of a function. arguments: a JSON object, as text."""

    arguments: Text | dict[str, Any] | None = None


class ToolCall(Body):
    """A call in a message of the assistant."""

    id: Annotated[str, StringConstraints(max_length=256)] | None = None
    type: Literal["function"] = "function"
    function: FunctionCall


class Part(Body):
    """Part of a message. Only text is read."""

    type: Literal["text"]
    text: Text


class Turn(Body):
    """A message of a conversation. The content of an assistant's message may be empty; a tool's message answers a call.
    reasoning_content, reasoning, thinking: the assistant's reasoning, by the names that different programs use."""

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
    function_call: FunctionCall | None = None
    tool_call_id: str | None = None

    @model_validator(mode="before")
    @classmethod
    def _readable(cls, value: Any) -> Any:
        if isinstance(value, dict):
            if value.get("role") != "assistant" and any(value.get(field) for field in CALLS):
                raise _invalid(CALLER)
            if any(content and MEDIA.fullmatch(name) for name, content in value.items()):
                raise _invalid(TEXT)
            if value.get("refusal") and not value.get("content"):
                raise _invalid(REFUSED)
            if value.get("prefix") or value.get("partial"):
                raise _invalid(OPEN)
        return value

    @field_validator("content", mode="before")
    @classmethod
    def _text(cls, value: Any, info: ValidationInfo) -> Any:
        if value is None and info.data.get("role") != "assistant":
            raise _invalid(SILENT)
        if not isinstance(value, str | list | None) or not all(
            isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str)
            for part in (value if isinstance(value, list) else [])
        ):
            raise _invalid(TEXT)
        return value

    @model_validator(mode="after")
    def _readable_calls(self) -> Turn:
        if self.tool_calls or self.function_call:
            self._calls()
        return self

    def _calls(self) -> tuple[Call, ...]:
        """The calls it makes, read in the same way as those of examples."""

        def refuse(problem: str, fix: str, field: str) -> None:
            raise _invalid(f"{field.lstrip('.')}: {problem}: {fix}")

        return read_calls(self.model_dump(), "", refuse) or ()

    def message(self) -> Message:
        parts = [part.text for part in self.content] if isinstance(self.content, list) else [self.content or ""]
        role, text = ROLES[self.role], joined(parts)
        if role != "assistant":
            return Message(role, text, answers=claim(self.model_dump()) if role == "tool" else None)
        reasoning, answer = thought_of(text)
        candidates = [reasoning, *(getattr(self, name) or "" for name in THINKS)]
        reasoning = next((text.strip() for text in candidates if text.strip()), "")
        return Message(role, answer, calls=self._calls(), reasoning=reasoning)


class NamedSchema(Body):
    """A JSON schema with a name."""

    model_config = ConfigDict(protected_namespaces=())
    name: str = ""
    schema_: Schema = Field(alias="schema")


class Format(Body):
    """The form of an answer: any text, any JSON object, or JSON that follows a schema, which may have a name."""

    model_config = ConfigDict(protected_namespaces=())
    type: Literal["text", "json_object", "json_schema"]
    json_schema: NamedSchema | None = None
    schema_: Schema | None = Field(None, alias="schema")

    @model_validator(mode="before")
    @classmethod
    def _known(cls, value: Any) -> Any:
        known = {"type", "json_schema", "schema"}
        for name in value if isinstance(value, dict) else ():
            if name not in known and value[name] not in EMPTY:
                raise _invalid(f"{name[:80]} is not supported: give type, and json_schema or schema")
        return value

    @model_validator(mode="after")
    def _consistent(self) -> Format:
        schemas = self._schemas()
        if self.type == "json_schema" and not schemas:
            raise _invalid('json_schema is missing: give {"name": ..., "schema": {...}}')
        if self.type == "text" and any(schemas):
            raise _invalid("the type text takes no schema: set the type to json_schema, or leave the schema out")
        if len(schemas) > 1 and schemas[0] != schemas[1]:
            raise _invalid("schema differs from that of json_schema: give only one")
        return self

    def _schemas(self) -> list[dict[str, Any]]:
        named = self.json_schema.schema_ if self.json_schema else None
        return [schema for schema in (named, self.schema_) if schema is not None]

    def schema_of(self) -> dict[str, Any] | None:
        """The JSON schema that an answer follows; None for any text."""
        if self.type == "text":
            return None
        schemas = self._schemas()
        return schemas[0] if self.type == "json_schema" or any(schemas) else {"type": "object"}


class StreamOptions(Body):
    include_usage: bool = False


class Common(CheckedBody):
    """The fields of both kinds of completion. max_tokens: of the answer; logit_bias: by token id."""

    model: Model
    max_tokens: Count | None = None
    temperature: Annotated[float, Field(ge=0, le=request.HOTTEST)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, WHOLE] | None = None
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    repetition_penalty: Annotated[float, Field(gt=0, le=request.MOST_PENALTY)] | None = None
    logit_bias: Annotated[dict[IdText, Bias], Field(max_length=request.MOST_BIASES)] | None = None
    seed: Annotated[int, Field(ge=NONE, lt=1 << 63), WHOLE] | None = None
    n: Annotated[int, Field(ge=1, le=MOST_ANSWERS), WHOLE] | None = None
    stop: Stop | Annotated[list[Stop], Field(max_length=request.MOST_STOPS)] | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    ignore_eos: bool | None = None
    adapter_scale: Annotated[float, Field(ge=-request.MOST_SCALE, le=request.MOST_SCALE)] | None = None
    response_format: Format | None = None

    @property
    def count(self) -> int:
        return self.n or 1

    @property
    def seeds(self) -> list[int | None]:
        """The seed of each answer to a prompt."""
        if self.seed is None or self.seed == NONE:
            return [None] * self.count
        return [(self.seed + i) % 2**63 for i in range(self.count)]

    def settings(self, longest: int) -> dict[str, Any]:
        """The settings of the engine's Request. longest: tokens of an answer where the body gives no limit."""
        stops = [self.stop] if isinstance(self.stop, str) else self.stop or []
        return {
            **{name: value for name in SAMPLING if (value := getattr(self, name)) is not None},
            "max_tokens": longest if self.max_tokens in (None, NONE) else self.max_tokens,
            "top_k": max(0, self.top_k or 0),
            "logit_bias": {int(token): bias for token, bias in self.logit_bias.items()} if self.logit_bias else None,
            "stop": tuple(stop for stop in stops if stop),
            "ignore_end": bool(self.ignore_eos),
            "schema": self.response_format.schema_of() if self.response_format else None,
        }


class ChatRequest(Common):
    """POST /v1/chat/completions. chat_template_kwargs: settings of the template, which override those of training;
    no_system: whether the system prompts of the adapter and of the template are left out."""

    messages: Annotated[list[Turn], Field(min_length=1, max_length=1024)]
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    chat_template_kwargs: Settings | None = None
    no_system: bool | None = None
    max_completion_tokens: Count | None = None
    logprobs: bool | None = None
    top_logprobs: Logprobs | None = None

    def settings(self, longest: int) -> dict[str, Any]:
        if self.max_completion_tokens not in (None, NONE):
            longest = self.max_completion_tokens
        return {**super().settings(longest), "logprobs": (self.top_logprobs or 0) if self.logprobs else None}


class CompletionRequest(Common):
    """POST /v1/completions. prompt: a text or token ids, or a list of such prompts."""

    prompt: (
        Prompt
        | PromptIds
        | Annotated[list[Prompt], Field(min_length=1, max_length=64)]
        | Annotated[list[PromptIds], Field(min_length=1, max_length=64)]
    )
    logprobs: Logprobs | None = None
    add_special_tokens: bool | None = None

    def settings(self, longest: int) -> dict[str, Any]:
        return {**super().settings(longest), "logprobs": self.logprobs}

    def prompts(self) -> Sequence[str | list[int]]:
        """The prompts, each a text or token ids."""
        if isinstance(self.prompt, str) or isinstance(self.prompt[0], int):
            return [self.prompt]
        return self.prompt


class TokenizeRequest(CheckedBody):
    """POST /tokenize. add_special_tokens: whether a prompt gets them."""

    model: Model | None = None
    prompt: Text | None = None
    messages: Annotated[list[Turn], Field(min_length=1, max_length=1024)] | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    chat_template_kwargs: Settings | None = None
    no_system: bool | None = None
    add_special_tokens: bool | None = None


class DetokenizeRequest(Body):
    """POST /detokenize"""

    model: Model | None = None
    tokens: Ids


class ClassifyRequest(CheckedBody):
    """POST /classify. input: a text, or several. use_activation, activation, softmax: as vLLM's versions call the
    choice between probabilities, which are always given, and logits."""

    model: Model
    input: Prompt | Annotated[list[Prompt], Field(min_length=1, max_length=MOST_TEXTS)]
    add_special_tokens: Literal[True] | None = None
    use_activation: Literal[True] | None = None
    activation: Literal[True] | None = None
    softmax: Literal[True] | None = None

    @field_validator("input", mode="after")
    @classmethod
    def _says_something(cls, value: str | list[str]) -> str | list[str]:
        texts = [value] if isinstance(value, str) else value
        if blank := [i for i, text in enumerate(texts) if not text.strip()]:
            raise _invalid(f"text {blank[0]} is blank: give a text")
        return value

    @property
    def texts(self) -> list[str]:
        return [self.input] if isinstance(self.input, str) else self.input


class LoadRequest(Body):
    """POST /v1/load_lora_adapter. lora_path: a folder inside the server's folder of adapters."""

    lora_name: Model
    lora_path: Text
    load_inplace: bool = False


class NameRequest(Body):
    """POST /v1/unload_lora_adapter, /v1/rollback_lora_adapter"""

    lora_name: Model
