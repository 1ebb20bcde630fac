"""Runs a service on listening sockets, from its start until it has drained."""

from __future__ import annotations

import asyncio
import json
import queue
import socket
import sys
import threading
from collections.abc import Callable, Collection
from contextlib import suppress
from types import FrameType
from typing import Any

import h11
import uvicorn
from uvicorn.protocols.http.h11_impl import H11Protocol

from lorafit.server.app import LIMITS, make_app, make_classifier_app
from lorafit.server.classifiers import ClassifierService
from lorafit.server.hosted import Hosted, drain
from lorafit.server.service import Service

CONNECTIONS = 768  # at a time; further ones are closed, since a process may often open no more than 1024 files
UNREAD = 60.0  # seconds for which a client may leave an answer unread


class TimedProtocol(H11Protocol):
    """Closes connections that make no progress, such as headers that arrive byte by byte, or answers that nobody reads,
    and those beyond CONNECTIONS."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watched: tuple[Any, ...] = ()
        self._since = self.loop.time()
        if len(self.connections) > CONNECTIONS:
            self.transport.abort()
        self._look()

    def _look(self) -> None:
        """Called every second: close the connection where it has made no progress for too long."""
        if self.transport.is_closing():
            return
        now, idle = self.loop.time(), self.conn.their_state is h11.IDLE or (self.cycle and self.cycle.response_complete)
        state = "unread" if self.flow.write_paused else "idle" if idle else "busy"
        if (state, id(self.cycle)) != self._watched:
            self._watched, self._since = (state, id(self.cycle)), now
        if state != "busy" and now - self._since > (UNREAD if state == "unread" else LIMITS.patience):
            self.transport.abort()
            return
        self.loop.call_later(1.0, self._look)


class Server(uvicorn.Server):
    """Stops after the answers in progress at the first signal, and immediately at the second."""

    def __init__(self, config: uvicorn.Config, service: Hosted, patience: float):
        super().__init__(config)
        self._service, self._patience = service, patience

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.phase == "draining":
            self.should_exit = self.force_exit = True
            return
        self._service.phase = "draining"
        threading.Thread(target=self._drain, daemon=True).start()

    async def on_tick(self, counter: int) -> bool:
        """Whether to stop: also where the base could not be opened."""
        return await super().on_tick(counter) or self._service.failed is not None

    def _drain(self) -> None:
        drain(self._service, self._patience)
        self.should_exit = True


class Log:
    """Writes one line of JSON to stderr for each request, without prompts and answers. A thread of its own writes, so
    that a pipe that nobody reads delays no client. most: lines that may wait to be written; further ones are lost."""

    def __init__(self, most: int = 10_000):
        self._lines: queue.Queue[str] = queue.Queue(most)
        threading.Thread(target=self._write, name="lorafit-log", daemon=True).start()

    def __call__(self, entry: dict[str, Any]) -> None:
        with suppress(queue.Full):
            self._lines.put_nowait(json.dumps(entry))

    def _write(self) -> None:
        while True:
            with suppress(OSError):
                print(self._lines.get(), file=sys.stderr, flush=True)


def serve(
    service: Service | ClassifierService,
    sockets: list[socket.socket],
    hosts: Collection[str] | None,
    patience: float,
    log: Callable[[dict[str, Any]], None],
) -> None:
    """Serve on listening sockets until a signal comes. hosts: names that requests may use; None: any. patience: seconds
    that answers in progress have to end. log: called with an entry for each request. Raises the LorafitError for which
    base or adapters could not be opened."""
    app = make_app(service, hosts, log) if isinstance(service, Service) else make_classifier_app(service, hosts, log)
    config = uvicorn.Config(
        app,
        http=TimedProtocol,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=int(LIMITS.patience),
        timeout_graceful_shutdown=5,
    )
    asyncio.run(Server(config, service, patience).serve(sockets))
    if service.failed:
        raise service.failed
