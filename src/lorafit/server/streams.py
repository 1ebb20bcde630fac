"""Answers of the engine, read in a coroutine as they come, and written in the form that OpenAI's clients read."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from starlette.responses import StreamingResponse

from lorafit.data.calls import CallForm, CallReader
from lorafit.data.thoughts import Parts, Thought, parted
from lorafit.errors import CancelledError, LorafitError, RequestError
from lorafit.server import tools
from lorafit.server.refusals import error
from lorafit.serving import Answer, Engine, Piece, Request, Result, Version

Part = Piece | Result | LorafitError
CLIENT_ERRORS = (RequestError, CancelledError)  # errors that a client is told, and can do something about


class AnswerStream:
    """Several answers of one adapter version, whose parts are read in the order in which they come. It is made in the
    event loop; `submit` may be called in another thread. listener: called in the engine's thread with each part, even
    if nobody reads it. tokens: the number of tokens so far."""

    def __init__(self, engine: Engine, version: Version | None, listener: Callable[[Part], None]):
        self._engine, self._version, self._listener = engine, version, listener
        self._loop = asyncio.get_running_loop()
        self._parts: asyncio.Queue[tuple[int, Part]] = asyncio.Queue()
        self._answers: list[Answer] = []
        self._is_cancelled = False
        self.results: dict[int, Result] = {}
        self.tokens = 0

    def submit(self, requests: Sequence[Request]) -> None:
        """Submit requests to the engine. Raises what its `submit` raises, and CancelledError where `cancel` was called
        meanwhile; then none is answered."""
        try:
            for number, request in enumerate(requests):
                if not self._is_cancelled:
                    self._answers.append(self._engine.submit(request, partial(self._put, number), self._version))
            if self._is_cancelled:  # `cancel` did not see the request that was submitted last
                raise CancelledError("cancelled before it was taken: ask again")
        except BaseException:
            self.cancel()
            raise

    def _put(self, number: int, part: Part) -> None:
        """Called in the engine's thread."""
        if isinstance(part, Piece):
            self.tokens += len(part.tokens)
        self._listener(part)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._parts.put_nowait, (number, part))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Every piece with the number of its answer, until all have ended. Raises the error that ended an answer."""
        while len(self.results) < len(self._answers):
            number, part = await self._parts.get()
            match part:
                case Piece():
                    yield number, part
                case Result():
                    self.results[number] = part
                case _ if isinstance(part, CLIENT_ERRORS):
                    raise part
                case _:  # it may be about the server's files and memory, which a client must not see
                    raise CancelledError("the server could not finish this answer: ask again later") from part

    def cancel(self) -> None:
        """End the answers that have not ended, and submit no more."""
        self._is_cancelled = True
        for number, answer in enumerate(self._answers):
            if number not in self.results:
                answer.cancel()


@dataclass(frozen=True)
class Style:
    """Writes chat completions, or completions, of one response. model: the adapter version, or the base, that answers.
    routed: the adapter that the router chose, and its probability. form: of calls of tools; None where none is read.
    thought: the marks of reasoning; None where there is none. created: unix time."""

    kind: str  # chat.completion or text_completion
    id: str
    model: str
    routed: Mapping[str, Any] | None = None
    form: CallForm | None = None
    thought: Thought | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._fields(self.kind), "choices": choices, "usage": usage}

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
        kind = f"{self.kind}.chunk" if self.kind == "chat.completion" else self.kind
        return _event({**self._fields(kind), "choices": choices, **({} if usage is None else {"usage": usage})})

    def _fields(self, kind: str) -> dict[str, Any]:
        fields = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return fields if self.routed is None else {**fields, "lorafit": dict(self.routed)}

    def choice(self, number: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        """The choice of a whole answer. In a conversation its text is stripped, as in the evaluation."""
        body: dict[str, Any] = {"text": text}
        reader = None if self.form is None else CallReader(self.form)
        if self.kind == "chat.completion":
            reasoning, answer = parted(text, self.thought)
            if reader is not None:
                reader.add(answer, ended=True)
            message = {"role": "assistant", "content": answer} if reader is None else tools.message(reader)
            body = {"message": {**message, **({"reasoning_content": reasoning} if reasoning else {})}}
        return {"index": number, **body, "logprobs": logprobs, "finish_reason": tools.finish_of(finish, reader)}

    def delta(
        self, number: int, part: str | dict[str, Any], logprobs: Any, finish: str | None, is_first: bool
    ) -> dict[str, Any]:
        """The choice of a chunk. part: the text of a completion, or the delta of a message. The role comes with the
        first token, since clients expect it in the first chunk."""
        if isinstance(part, dict):
            role = {"role": "assistant"} if is_first else {}
            empty = {"content": ""} if is_first and not {"content", "tool_calls"} & part.keys() else {}
            body: dict[str, Any] = {"delta": {**role, **part, **empty}}
        else:
            body = {"text": part}
        return {"index": number, **body, "logprobs": logprobs, "finish_reason": finish}


def usage_of(results: Sequence[Result]) -> dict[str, Any]:
    """The tokens of all prompts and answers."""
    prompt = sum(result.prompt_tokens for result in results)
    completion = sum(len(result.tokens) for result in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": completion,
        "total_tokens": prompt + completion,
        "prompt_tokens_details": {"cached_tokens": sum(result.known for result in results)},
    }


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"


class ChunkWriter:
    """Writes one answer of a stream: its pieces become choices of chunks."""

    def __init__(self, style: Style, number: int):
        self._style, self._number, self._begun = style, number, False
        self._parts = Parts(style.thought)
        self._reader = None if style.form is None else CallReader(style.form)

    def choices(self, piece: Piece, logprobs: Any) -> list[dict[str, Any]]:
        """The choices for a piece, each for a chunk of its own. logprobs: of its tokens, or None."""
        is_first, self._begun = not self._begun, True
        is_chat, ended = self._style.kind == "chat.completion", piece.finish is not None
        empty: str | dict[str, Any] = {} if is_chat else ""
        parts: list[Any] = self._deltas(piece.text, ended) if is_chat else [piece.text] * bool(piece.text)
        parts = parts or ([empty] if logprobs or is_first else [])
        choices = [
            self._style.delta(self._number, part, logprobs if i == 0 else None, None, is_first and i == 0)
            for i, part in enumerate(parts)
        ]
        if piece.finish:
            finish = tools.finish_of(piece.finish, self._reader)
            choices.append(self._style.delta(self._number, empty, None, finish, False))
        return choices

    def _deltas(self, text: str, ended: bool) -> list[dict[str, Any]]:
        """The deltas that a text adds to the answer: reasoning first, then words and calls."""
        reasoning, answer = self._parts.add(text, ended)
        if self._reader is None:
            deltas = [{"content": answer}] if answer else []
        else:
            deltas = tools.deltas(self._reader.add(answer, ended))
        return [*([{"reasoning_content": reasoning}] if reasoning else []), *deltas]


async def events(answers: AnswerStream, style: Style, logprobs: Any, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events of answers: their parts and ends, then the usage, then [DONE]. logprobs: formats those of the
    next tokens of an answer, or None."""
    writers: dict[int, ChunkWriter] = {}
    try:
        async for number, piece in answers.pieces():
            values = logprobs(number, piece.tokens) if logprobs and piece.tokens else None
            for choice in writers.setdefault(number, ChunkWriter(style, number)).choices(piece, values):
                yield style.chunk([choice])
        if with_usage:
            yield style.chunk([], usage_of(list(answers.results.values())))
        yield "data: [DONE]\n\n"
    except LorafitError as failure:
        yield _event(error(str(failure), 503 if isinstance(failure, CancelledError) else 400))


class Events(StreamingResponse):
    """Server-sent events. `ended` is called once however the stream ends, also where no client read its first event."""

    def __init__(self, parts: AsyncIterator[str], ended: Callable[[], None], headers: Mapping[str, str]):
        super().__init__(parts, media_type="text/event-stream", headers={**headers, "cache-control": "no-cache"})
        self._ended = ended

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()
