"""Middleware that checks every request before its route: the host name, the key, the size of the body, its speed.

A route that is not in SCOPES needs a key with the scope `infer`, so a new route is never open by accident.
"""

from __future__ import annotations

import asyncio
import re
import secrets
import time
import traceback
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from starlette.exceptions import HTTPException
from starlette.responses import JSONResponse

from lorafit.server.hosted import Hosted
from lorafit.server.keys import Key, Scope, find
from lorafit.server.refusals import SOON, error

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN = ("/health",)  # monitoring has no key, and gets one word
SCOPES: dict[str, Scope] = {
    "/v1/load_lora_adapter": "admin",
    "/v1/unload_lora_adapter": "admin",
    "/v1/rollback_lora_adapter": "admin",
    "/metrics": "admin",  # it names every adapter
}
CONTROL = re.compile(r"[\x00-\x1f\x7f]")  # a route's pattern may match up to a line break
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
GONE = 499  # for log and metrics, as in nginx: the client went away, and nobody reads the answer
LOCAL = Key(name="local", hash="0" * 64, scopes=("infer", "admin"))  # used without keys, when only this machine asks


@dataclass(frozen=True)
class Limits:
    """Limits of requests. most: bytes of a body; patience: seconds in which it must arrive; at_once: requests in
    progress, beyond which further ones get 503."""

    most: int = 4 << 20
    patience: float = 20.0
    at_once: int = 512


class Guard:
    """An ASGI application around that of a service, whose requests it counts. hosts: names that requests may use,
    without port; None: any. log: called with an entry for each request."""

    def __init__(
        self,
        app: App,
        service: Hosted,
        hosts: Collection[str] | None,
        limits: Limits,
        log: Callable[[dict[str, Any]], None],
    ):
        self._app, self._service, self._hosts, self._limits, self._log = app, service, hosts, limits, log

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                return
            await self._app(scope, receive, send)
            return
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        began, counts = time.perf_counter(), scope["path"] not in OPEN
        status: int | None = None
        name = headers.get("x-request-id", "")
        if not REQUEST_ID.fullmatch(name):
            name = secrets.token_hex(8)
        entry: dict[str, Any] = {"request": name, "method": scope["method"], "path": scope["path"]}
        scope["state"] = {**scope.get("state", {}), "log": entry}

        async def answer(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                message["headers"] = [
                    *message.get("headers", []),
                    (b"x-request-id", name.encode()),
                    (b"x-content-type-options", b"nosniff"),
                ]
            await send(message)

        self._service.under_way += counts
        try:
            if counts and self._service.under_way > self._limits.at_once:
                why = f"{self._limits.at_once} requests are under way already: ask again later"
                raise HTTPException(503, why, {"retry-after": SOON})
            key = self._require_allowed(scope["path"], headers)
            scope["state"]["key"], entry["key"] = key, key and key.name
            body = await self._body(headers, receive)
            await self._app(scope, _replayed(body, receive), answer)
        except HTTPException as refusal:
            await _response(refusal)(scope, receive, answer)
        except Exception as error:  # a bug; its message may quote the request, and stays out of the log
            entry["failed"] = f"{type(error).__name__} at {_place(error)}"
            if status is not None:
                raise
            failure = HTTPException(500, "the server failed at this request: tell its operator")
            await _response(failure)(scope, receive, answer)
        finally:
            self._service.under_way -= counts
            if counts:
                status = status or 500
                if status >= 400:
                    self._service.metrics.refused(status)
                self._log({**entry, "status": status, "seconds": round(time.perf_counter() - began, 4)})

    def _require_allowed(self, path: str, headers: dict[str, str]) -> Key | None:
        """The key of a request; None for a path that needs none. Raises HTTPException for a request that is refused."""
        host = re.sub(r":\d+$", "", headers.get("host", ""))
        if self._hosts is not None and host.lower() not in self._hosts:
            raise HTTPException(421, f"this server is not called {host[:80]!r}: start it with --allowed-host")
        if _is_foreign(headers):
            why = "a page of another origin sent this request"
            raise HTTPException(403, f"{why}: send it from a program, or through the page's own server")
        if CONTROL.search(path):
            raise HTTPException(404, "there is no such path: see /openapi.json")
        if path in OPEN:
            return None
        keys = self._service.keys()
        if keys is None:
            return LOCAL
        kind, _, secret = headers.get("authorization", "").partition(" ")
        key = find(list(keys), secret.strip()) if kind.lower() == "bearer" else None
        if key is None:
            fix = "send the header Authorization: Bearer KEY"
            raise HTTPException(401, f"the key is missing or unknown: {fix}", {"www-authenticate": "Bearer"})
        needed = SCOPES.get(path, "infer")
        if needed not in key.scopes:
            fix = f"make a key for it with lorafit key create --scope {needed}"
            raise HTTPException(403, f"this key may not do this, since {needed} is not among its scopes: {fix}")
        return key

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes:
        """The whole body. Raises HTTPException for one that is too large or too slow."""
        too_large = HTTPException(413, f"the body is larger than {self._limits.most:,} bytes: shorten it")
        if int(headers.get("content-length") or 0) > self._limits.most:
            raise too_large
        parts, size, end = [], 0, time.monotonic() + self._limits.patience
        while True:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except TimeoutError as error:
                why = f"the body did not arrive within {self._limits.patience:g} s: send it faster"
                raise HTTPException(408, why) from error
            if message["type"] == "http.disconnect":
                raise HTTPException(GONE, "the client went away: send the whole body")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._limits.most:
                raise too_large
            if not message.get("more_body"):
                return b"".join(parts)


def _is_foreign(headers: dict[str, str]) -> bool:
    """Whether a browser sent a request for a page of another origin. Such a page could not read the answer, but would
    make the server work. Browsers set sec-fetch-site, and no page can change it; older ones send the page's origin."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        return site not in ("same-origin", "none")
    return origin is not None and origin.partition("://")[2].lower() != headers.get("host", "").lower()


def _place(error: BaseException) -> str:
    """The place where an error was raised, as `file:line`."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body which has been read already, and then what `receive` gives."""
    messages: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return messages.pop() if messages else await receive()

    return next_message


def _response(refusal: HTTPException) -> JSONResponse:
    headers = {"connection": "close", **(refusal.headers or {})}
    return JSONResponse(error(refusal.detail, refusal.status_code), refusal.status_code, headers)
