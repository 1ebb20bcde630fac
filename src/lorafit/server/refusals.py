"""Errors as OpenAI's clients read them: an exception becomes a status and `{"error": {"message", "type", "param",
"code"}}`.

The status is never 409: clients retry after 408, 409, 429 and 5xx.
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
from lorafit.server.wire import SURROGATE

SOON = "1"  # seconds after which to ask again, where nothing better is known
NOWHERE = {  # by Starlette's own messages
    "Not Found": "there is no such path",
    "Method Not Allowed": "the path does not take this method",
}
TYPES = {  # by HTTP status, as OpenAI's clients know them; any other status is a BadRequestError
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    429: "RateLimitError",
    500: "InternalServerError",
    503: "ServiceUnavailableError",
    507: "StorageError",
}


class ErrorBody(BaseModel):
    """An error. code: the HTTP status."""

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
        401: "The key is missing or unknown.",
        403: "The key does not allow this, or a page of another origin sent the request.",
        404: "Nothing has this name.",
        405: "The path does not take this method.",
        408: "The body arrived too slowly.",
        413: "The body is too large.",
        421: "The host name is not one of this server's.",
        507: "The disk is full.",
        429: "Too many requests or tokens; see retry-after.",
        503: "Loading, draining, ended or too busy; see retry-after.",
    }.items()
}

UNREADABLE = {  # by what was raised when a body was parsed
    UnicodeDecodeError: "the body is not UTF-8: encode it as UTF-8",
    RecursionError: "the body is nested too deeply: flatten it",
}
NO_OBJECT = "the body is not a JSON object: send one, with the header content-type: application/json"
MESSAGES = {  # by pydantic's types of errors, where its own message is not clear
    "string_unicode": SURROGATE,
    "model_attributes_type": "not a JSON object: send one",
}


def error(message: str, code: int, param: str | None = None) -> dict[str, Any]:
    """The body of an error. code: the HTTP status."""
    return {"error": {"message": message, "type": TYPES.get(code, "BadRequestError"), "param": param, "code": code}}


def _field(path: Sequence[str | int]) -> str:
    """The path of a field as `messages.0.content`, without the types that pydantic adds for a union."""
    return ".".join(str(part) for part in path if isinstance(part, int) or re.fullmatch("[a-z_]+", part))


def _message(problem: Any) -> str:
    """The message of a pydantic error, without the prefix that pydantic puts before messages of a ValueError."""
    if problem["type"] == "value_error":
        return f"{problem['ctx']['error']}"
    if problem["loc"] == ("body",) and problem["type"] == "model_attributes_type":
        return NO_OBJECT
    return MESSAGES.get(problem["type"]) or str(problem["msg"])


def _param(message: str) -> str | None:
    """The field that a message begins with."""
    field = re.match(r"[a-z_]+(?=(\[\d+\]|\.[a-z_]+)*: )", message)
    return field[0] if field else None


def answer_errors(app: FastAPI) -> None:
    """Add the handlers that turn exceptions into answers."""

    def answer(status: int, message: str, param: str | None = None, retry: str | None = None) -> JSONResponse:
        return JSONResponse(error(message, status, param), status, {"retry-after": retry} if retry else None)

    @app.exception_handler(RequestValidationError)
    async def invalid(request: HttpRequest, error: RequestValidationError) -> JSONResponse:
        problems = [*dict.fromkeys((_field(problem["loc"][1:]), _message(problem)) for problem in error.errors())]
        message = "; ".join(f"{field}: {text}" if field else text for field, text in problems[:8])
        return answer(400, message, problems[0][0] or _param(message))

    @app.exception_handler(StarletteError)
    async def http(request: HttpRequest, error: StarletteError) -> JSONResponse:
        message = UNREADABLE.get(type(error.__cause__), str(error.detail))
        if message in NOWHERE:
            message = f"{request.method} {request.url.path[:80]}: {NOWHERE[message]}: see /openapi.json"
        response = answer(error.status_code, message)
        response.headers.update(error.headers or {})
        return response

    @app.exception_handler(LorafitError)
    async def lorafit(request: HttpRequest, error: LorafitError) -> JSONResponse:
        if isinstance(error, UnknownAdapterError):
            return answer(404, str(error), "model")
        if isinstance(error, BusyError):
            return answer(429, str(error), retry=SOON)
        if isinstance(error, CancelledError):
            return answer(503, str(error), retry=SOON)
        if isinstance(error, InputError):
            return answer(400, str(error), _param(str(error)))
        return answer(500, str(error))

    @app.exception_handler(OSError)
    async def disk(request: HttpRequest, error: OSError) -> JSONResponse:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return answer(507, f"the server's disk: {error.strerror}: free some space, and ask again")
        raise error

    @app.exception_handler(RecursionError)
    async def deep(request: HttpRequest, error: RecursionError) -> JSONResponse:
        return answer(400, UNREADABLE[RecursionError])
