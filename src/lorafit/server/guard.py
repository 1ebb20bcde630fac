"""What every request passes before any route sees it: whose host it names, whose key, how large, how slow.

A route that is not in SCOPES needs a key that may ask; so a route that is new is closed until it is opened here.
"""

from __future__ import annotations

import asyncio
import json
import re
import secrets
import time
import traceback
from collections.abc import Awaitable, Callable, Collection, MutableMapping
from pathlib import Path
from typing import Any

from lorafit.server.keys import Key, Scope, find
from lorafit.server.service import Service
from lorafit.server.wire import error

Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[MutableMapping[str, Any], Receive, Send], Awaitable[None]]

OPEN = ("/health",)  # what watches over servers has no key; it is told one word
SCOPES: dict[str, Scope] = {
    "/v1/load_lora_adapter": "admin",
    "/v1/unload_lora_adapter": "admin",
    "/v1/rollback_lora_adapter": "admin",
    "/metrics": "admin",  # it names every adapter
}
CONTROL = re.compile(r"[\x00-\x1f\x7f]")  # a route's pattern may end before a line break: none gets that far
REQUEST_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
GONE = 499  # for log and metrics, as nginx tells it: the client went away, and nobody reads the answer
SOON = "1"  # seconds after which to ask again, where that is not known
LOCAL = Key(
    name="local", hash="0" * 64, scopes=("infer", "admin")
)  # who asks where no keys are set: this machine alone


class Refused(Exception):
    """An answer that is an error, before a route was asked."""

    def __init__(self, status: int, message: str, kind: str, headers: dict[str, str] | None = None):
        super().__init__(message)
        self.status, self.kind, self.headers = status, kind, headers or {}


class Guard:
    """Around an ASGI application of a service, whose requests it counts. hosts: names by which this server may be
    called, without port; None: any. most: bytes of a body; patience: seconds for it to arrive; at_once: requests."""

    def __init__(
        self,
        app: App,
        service: Service,
        hosts: Collection[str] | None,
        most: int,
        patience: float,
        at_once: int,
        log: Callable[[dict[str, Any]], None],
    ):
        self._app, self._service, self._hosts, self._log = app, service, hosts, log
        self._most, self._patience, self._at_once = most, patience, at_once

    async def __call__(self, scope: MutableMapping[str, Any], receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "websocket":
                return
            await self._app(scope, receive, send)
            return
        headers = {key.decode("latin-1"): value.decode("latin-1") for key, value in scope["headers"]}
        began, counts = time.perf_counter(), scope["path"] not in OPEN
        status: int | None = None
        given = headers.get("x-request-id", "")
        name = given if REQUEST_ID.fullmatch(given) else secrets.token_hex(8)
        told: dict[str, Any] = {"request": name, "method": scope["method"], "path": scope["path"]}
        scope["state"] = {**scope.get("state", {}), "told": told}

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
            if counts and self._service.under_way > self._at_once:
                raise Refused(
                    503,
                    f"{self._at_once} requests are under way already: ask again later",
                    "ServiceUnavailableError",
                    {"retry-after": SOON},
                )
            key = self._known(scope["path"], headers)
            scope["state"]["key"], told["key"] = key, key and key.name
            body = await self._body(headers, receive)
            await self._app(scope, _again(body, receive), answer)
        except Refused as refused:
            await _refuse(answer, refused)
        except Exception as error:  # a fault of ours; what it says may be of the request, and stays out of the log
            told["failed"] = f"{type(error).__name__} at {_place(error)}"
            if status is not None:
                raise
            await _refuse(
                answer, Refused(500, "the server failed at this request: tell whoever runs it", "InternalServerError")
            )
        finally:
            self._service.under_way -= counts
            if counts:
                status = status or 500
                if status >= 400:
                    self._service.metrics.refused(status)
                self._log({**told, "status": status, "seconds": round(time.perf_counter() - began, 4)})

    def _known(self, path: str, headers: dict[str, str]) -> Key | None:
        """Whose request it is. Raises Refused."""
        host = re.sub(r":\d+$", "", headers.get("host", ""))
        if self._hosts is not None and host.lower() not in self._hosts:
            raise Refused(
                421, f"this server is not called {host[:80]!r}: start it with --allowed-host", "BadRequestError"
            )
        if _is_foreign(headers):
            raise Refused(
                403,
                "a page of another origin asked this: ask from a program, or through a server of that page's own",
                "PermissionDeniedError",
            )
        if CONTROL.search(path):
            raise Refused(404, "there is no such path", "NotFoundError")
        if path in OPEN:
            return None
        keys = self._service.keys()
        if keys is None:
            return LOCAL
        kind, _, secret = headers.get("authorization", "").partition(" ")
        key = find(list(keys), secret.strip()) if kind.lower() == "bearer" else None
        if key is None:
            raise Refused(
                401,
                "no key that is known: send the header Authorization: Bearer KEY",
                "AuthenticationError",
                {"www-authenticate": "Bearer"},
            )
        wanted = SCOPES.get(path, "infer")
        if wanted not in key.scopes:
            raise Refused(403, f"this key may not: {wanted} is not among its scopes", "PermissionDeniedError")
        return key

    async def _body(self, headers: dict[str, str], receive: Receive) -> bytes:
        """The whole body. Raises Refused for one that is too large or too slow."""
        large = Refused(413, f"the body is larger than {self._most:,} bytes: shorten it", "BadRequestError")
        if int(headers.get("content-length") or 0) > self._most:
            raise large
        parts, size, end = [], 0, time.monotonic() + self._patience
        while True:
            try:
                message = await asyncio.wait_for(receive(), max(0.0, end - time.monotonic()))
            except TimeoutError as error:
                raise Refused(
                    408, f"the body did not arrive within {self._patience:g} s: send it at once", "BadRequestError"
                ) from error
            if message["type"] == "http.disconnect":
                raise Refused(GONE, "the client went away: send the whole body", "BadRequestError")
            parts.append(message.get("body", b""))
            size += len(parts[-1])
            if size > self._most:
                raise large
            if not message.get("more_body"):
                return b"".join(parts)


def _is_foreign(headers: dict[str, str]) -> bool:
    """Whether a browser asks for a page of another origin, which must not make this server work though it could not
    read the answer. Browsers say so, and no page can change what they say; the older ones name the page's origin."""
    site, origin = headers.get("sec-fetch-site"), headers.get("origin")
    if site is not None:
        return site not in ("same-origin", "none")
    return origin is not None and origin.partition("://")[2].lower() != headers.get("host", "").lower()


def _place(error: BaseException) -> str:
    """Where it was raised, `file:line`."""
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f"{Path(frame.filename).name}:{frame.lineno}"


def _again(body: bytes, receive: Receive) -> Receive:
    """A body that was read, to be read once more; after it whatever else comes."""
    told = False

    async def next_message() -> Message:
        nonlocal told
        if told:
            return await receive()
        told = True
        return {"type": "http.request", "body": body, "more_body": False}

    return next_message


async def _refuse(send: Send, refused: Refused) -> None:
    body = json.dumps(error(str(refused), refused.kind, refused.status)).encode()
    headers = {
        "content-type": "application/json",
        "content-length": str(len(body)),
        "connection": "close",
        **refused.headers,
    }
    await send(
        {
            "type": "http.response.start",
            "status": refused.status,
            "headers": [(key.encode(), value.encode()) for key, value in headers.items()],
        }
    )
    await send({"type": "http.response.body", "body": body})
