"""Answers of the engine as they come to a coroutine, and as OpenAI's clients read them."""

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
from lorafit.server.wire import error
from lorafit.serving import Answer, Engine, Piece, Request, Result, Version

Part = Piece | Result | LorafitError
ASKERS = (RequestError, CancelledError)  # what may break an answer off that its asker can do something about


class Coming:
    """Several answers of one version on their way, their parts in the order they come; version: None for the bare base.
    Made in the event loop; `submit` may be called in another thread. heard: called in the engine's thread with each
    part, whether anyone reads it or not. tokens: that were made so far."""

    def __init__(self, engine: Engine, version: Version | None, heard: Callable[[Part], None]):
        self._engine, self._version, self._heard = engine, version, heard
        self._loop = asyncio.get_running_loop()
        self._parts: asyncio.Queue[tuple[int, Part]] = asyncio.Queue()
        self._answers: list[Answer] = []
        self._is_cancelled = False
        self.results: dict[int, Result] = {}
        self.tokens = 0

    def submit(self, requests: Sequence[Request]) -> None:
        """Raises what the engine's submit raises, and CancelledError where `cancel` was called meanwhile; then none is
        answered."""
        try:
            for number, request in enumerate(requests):
                if not self._is_cancelled:
                    self._answers.append(self._engine.submit(request, partial(self._came, number), self._version))
            if self._is_cancelled:  # it did not see the last one that was taken
                raise CancelledError("cancelled before it was taken: ask again")
        except BaseException:
            self.cancel()
            raise

    def _came(self, number: int, part: Part) -> None:
        """In the engine's thread."""
        if isinstance(part, Piece):
            self.tokens += len(part.tokens)
        self._heard(part)
        if not self._loop.is_closed():
            self._loop.call_soon_threadsafe(self._parts.put_nowait, (number, part))

    async def pieces(self) -> AsyncIterator[tuple[int, Piece]]:
        """Every piece, with the number of its answer, until all have ended. Raises what broke one off."""
        while len(self.results) < len(self._answers):
            number, part = await self._parts.get()
            match part:
                case Piece():
                    yield number, part
                case Result():
                    self.results[number] = part
                case _ if isinstance(part, ASKERS):
                    raise part
                case _:  # of the server's files and memory, of which a client shall not hear
                    raise CancelledError("the server could not go on with this answer: ask again later") from part

    def cancel(self) -> None:
        """Those that have not ended end now, and no more are taken."""
        self._is_cancelled = True
        for number, answer in enumerate(self._answers):
            if number not in self.results:
                answer.cancel()


@dataclass(frozen=True)
class Style:
    """How chat completions, or completions, are written. id, created, model: of this answer. routed: what the router
    chose, and how sure it was. form: of the calls that are looked for. thought: how reasoning is told apart in what was
    generated; None where there is none."""

    kind: str  # chat.completion or text_completion
    id: str
    model: str
    routed: Mapping[str, Any] | None = None
    form: CallForm | None = None
    thought: Thought | None = None
    created: int = field(default_factory=lambda: int(time.time()))

    def whole(self, choices: list[dict[str, Any]], usage: dict[str, Any]) -> dict[str, Any]:
        return {**self._named(self.kind), "choices": choices, "usage": usage}

    def chunk(self, choices: list[dict[str, Any]], usage: dict[str, Any] | None = None) -> str:
        kind = f"{self.kind}.chunk" if self.kind == "chat.completion" else self.kind
        return _event({**self._named(kind), "choices": choices, **({} if usage is None else {"usage": usage})})

    def _named(self, kind: str) -> dict[str, Any]:
        told = {"id": self.id, "object": kind, "created": self.created, "model": self.model}
        return told if self.routed is None else {**told, "lorafit": dict(self.routed)}

    def choice(self, number: int, text: str, logprobs: Any, finish: str | None) -> dict[str, Any]:
        """Of a whole answer. That of a conversation is told as it is measured: without white space around it."""
        body: dict[str, Any]
        if self.kind == "chat.completion":
            reasoning, answer = parted(text, self.thought)
            reader = None if self.form is None else CallReader(self.form)
            if reader is not None:
                reader.add(answer, ended=True)
            said = {"role": "assistant", "content": answer} if reader is None else tools.message(reader)
            body = {"message": {**said, **({"reasoning_content": reasoning} if reasoning else {})}}
            finish = tools.finish_of(finish, reader)
        else:
            body = {"text": text}
        return {"index": number, **body, "logprobs": logprobs, "finish_reason": finish}

    def delta(
        self, number: int, told: str | dict[str, Any], logprobs: Any, finish: str | None, is_first: bool
    ) -> dict[str, Any]:
        """Of a part: the text of a completion, or the body of its delta. The role comes with the first token: clients
        take the first chunk for it."""
        if isinstance(told, dict):
            role = {"role": "assistant"} if is_first else {}
            empty = {"content": ""} if is_first and not {"content", "tool_calls"} & told.keys() else {}
            body: dict[str, Any] = {"delta": {**role, **told, **empty}}
        else:
            body = {"text": told}
        return {"index": number, **body, "logprobs": logprobs, "finish_reason": finish}


def usage_of(results: Sequence[Result]) -> dict[str, Any]:
    """Tokens of all prompts and answers."""
    prompt = sum(result.prompt_tokens for result in results)
    made = sum(len(result.tokens) for result in results)
    return {
        "prompt_tokens": prompt,
        "completion_tokens": made,
        "total_tokens": prompt + made,
        "prompt_tokens_details": {"cached_tokens": sum(result.known for result in results)},
    }


def finish_of(finish: str | None) -> str | None:
    return "stop" if finish == "cancelled" else finish


def _event(value: Any) -> str:
    return f"data: {json.dumps(value, separators=(',', ':'))}\n\n"


class Telling:
    """One answer of a stream, as it comes: its pieces as choices of chunks."""

    def __init__(self, style: Style, number: int):
        self._style, self._number, self._begun = style, number, False
        self._parts = Parts(style.thought)
        self._reader = None if style.form is None else CallReader(style.form)

    def choices(self, piece: Piece, logprobs: Any) -> list[dict[str, Any]]:
        """What is told of a piece, each as a chunk of its own. logprobs: of its tokens, or None."""
        is_first, self._begun = not self._begun, True
        is_chat, ended = self._style.kind == "chat.completion", piece.finish is not None
        empty: str | dict[str, Any] = {} if is_chat else ""
        told: list[Any] = self._deltas(piece.text, ended) if is_chat else [piece.text] * bool(piece.text)
        told = told or ([empty] if logprobs or is_first else [])
        choices = [
            self._style.delta(self._number, one, logprobs if i == 0 else None, None, is_first and i == 0)
            for i, one in enumerate(told)
        ]
        if piece.finish:
            finish = tools.finish_of(finish_of(piece.finish), self._reader)
            choices.append(self._style.delta(self._number, empty, None, finish, False))
        return choices

    def _deltas(self, text: str, ended: bool) -> list[dict[str, Any]]:
        """What a text adds to the answer: its reasoning first, and then its words and calls."""
        reasoning, answer = self._parts.add(text, ended)
        if self._reader is None:
            said = [{"content": answer}] if answer else []
        else:
            said = tools.deltas(self._reader.add(answer, ended))
        return [*([{"reasoning_content": reasoning}] if reasoning else []), *said]


async def events(coming: Coming, style: Style, logprobs: Any, with_usage: bool) -> AsyncIterator[str]:
    """Server-sent events of answers: parts, then each one's end, then what was used, then [DONE]. logprobs: of an
    answer's next tokens, how they are told, or None."""
    answers: dict[int, Telling] = {}
    try:
        async for number, piece in coming.pieces():
            told = logprobs(number, piece.tokens) if logprobs and piece.tokens else None
            for choice in answers.setdefault(number, Telling(style, number)).choices(piece, told):
                yield style.chunk([choice])
        if with_usage:
            yield style.chunk([], usage_of(list(coming.results.values())))
        yield "data: [DONE]\n\n"
    except LorafitError as broken:
        status = 503 if isinstance(broken, CancelledError) else 400
        kind = "ServiceUnavailableError" if status == 503 else "BadRequestError"
        yield _event(error(str(broken), kind, status))


class Events(StreamingResponse):
    """Server-sent events. However it ends, also where nobody was there to hear the first, `ended` is called once."""

    def __init__(self, parts: AsyncIterator[str], ended: Callable[[], None], headers: Mapping[str, str]):
        super().__init__(parts, media_type="text/event-stream", headers={**headers, "cache-control": "no-cache"})
        self._ended = ended

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._ended()
