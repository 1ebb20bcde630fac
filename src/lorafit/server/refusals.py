"""Errors as OpenAI's clients read them: `{"error": {"message", "type", "param", "code"}}`, with the status that fits.

Never 409: clients ask again at 408, 409, 429 and 5xx.
"""

from __future__ import annotations

import errno
import re
from collections.abc import Sequence
from typing import Any

from fastapi import FastAPI
from fastapi import Request as HttpRequest
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from pydantic import BaseModel
from starlette.exceptions import HTTPException as StarletteError

from lorafit.errors import BusyError, CancelledError, InputError, LorafitError, UnknownAdapterError
from lorafit.server.guard import SOON
from lorafit.server.wire import HALF, error

NOWHERE = {"Not Found": "there is no such path", "Method Not Allowed": "not with this method"}  # what Starlette says


class ErrorBody(BaseModel):
    """What went wrong. code: the HTTP status."""

    message: str
    type: str
    param: str | None = None
    code: int | None = None


class ErrorAnswer(BaseModel):
    error: ErrorBody


ERRORS: dict[int | str, dict[str, Any]] = {
    status: {"model": ErrorAnswer, "description": text}
    for status, text in {
        400: "The request cannot be served as it is.",
        401: "No key that is known.",
        403: "The key may not, or a page of another origin asks.",
        404: "There is nothing by this name.",
        405: "Not with this method.",
        408: "The body came too slowly.",
        413: "The body is too large.",
        421: "Another server's name.",
        507: "The disk is full.",
        429: "Too much at once; see retry-after.",
        503: "Loading, draining or ended; see retry-after.",
    }.items()
}


BROKEN = {
    UnicodeDecodeError: "the body is not UTF-8: encode it so",
    RecursionError: "the body is nested too deeply: flatten it",
}  # what a body could not be read for
NO_OBJECT = "the body is no JSON object: send one, with the header content-type: application/json"
SAID = {  # by pydantic's types of errors, where its words do not tell
    "string_unicode": HALF,
    "model_attributes_type": "no JSON object: send one",
}


def _field(path: Sequence[str | int]) -> str:
    """`messages.0.content`, without the kinds that pydantic names where a field may be of several."""
    return ".".join(str(part) for part in path if isinstance(part, int) or re.fullmatch("[a-z_]+", part))


def _words(problem: Any) -> str:
    """What one of pydantic's errors says, without what it puts before words of ours."""
    if problem["type"] == "value_error":
        return f"{problem['ctx']['error']}"
    if problem["loc"] == ("body",) and problem["type"] == "model_attributes_type":
        return NO_OBJECT
    return SAID.get(problem["type"]) or str(problem["msg"])


def _named(message: str) -> str | None:
    """The field that a message begins with."""
    found = re.match(r"[a-z_]+(?=(\[\d+\]|\.[a-z_]+)*: )", message)
    return found[0] if found else None


def answer_errors(app: FastAPI) -> None:
    """Have an application answer whatever is raised in it."""

    def answer(
        status: int, message: str, kind: str, param: str | None = None, retry: str | None = None
    ) -> JSONResponse:
        headers = {"retry-after": retry} if retry else None
        return JSONResponse(error(message, kind, status, param), status, headers)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: HttpRequest, error: RequestValidationError) -> JSONResponse:
        found = dict.fromkeys((_field(one["loc"][1:]), _words(one)) for one in error.errors())
        message = "; ".join(f"{where}: {what}" if where else what for where, what in [*found][:8])
        return answer(400, message, "BadRequestError", next(iter(found))[0] or _named(message))

    @app.exception_handler(StarletteError)
    async def http(request: HttpRequest, error: StarletteError) -> JSONResponse:
        kinds = {404: "NotFoundError", 429: "RateLimitError", 503: "ServiceUnavailableError"}
        kind = kinds.get(error.status_code, "BadRequestError")
        message = BROKEN.get(type(error.__cause__), str(error.detail))
        if message in NOWHERE:
            message = f"{request.method} {request.url.path[:80]}: {NOWHERE[message]}: see /openapi.json"
        made = answer(error.status_code, message, kind)
        made.headers.update(error.headers or {})
        return made

    @app.exception_handler(LorafitError)
    async def ours(request: HttpRequest, error: LorafitError) -> JSONResponse:
        if isinstance(error, UnknownAdapterError):
            return answer(404, str(error), "NotFoundError", "model")
        if isinstance(error, BusyError):
            return answer(429, str(error), "RateLimitError", retry=SOON)
        if isinstance(error, CancelledError):
            return answer(503, str(error), "ServiceUnavailableError", retry=SOON)
        if isinstance(error, InputError):
            return answer(400, str(error), "BadRequestError", _named(str(error)))
        return answer(500, str(error), "InternalServerError")

    @app.exception_handler(OSError)
    async def disk(request: HttpRequest, error: OSError) -> JSONResponse:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return answer(507, f"the server's disk: {error.strerror}: make room, and ask again", "StorageError")
        raise error

    @app.exception_handler(RecursionError)
    async def deep(request: HttpRequest, error: RecursionError) -> JSONResponse:
        return answer(400, BROKEN[RecursionError], "BadRequestError")
