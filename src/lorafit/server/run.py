"""A server on a port, from its start until it has drained."""

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

from lorafit.server.app import PATIENCE, make_app
from lorafit.server.service import Service

CONNECTIONS = 768  # at once; more are closed: a process may often have no more than 1024 open
UNREAD = 60.0  # seconds that a client may not read what is sent to it


class Patient(H11Protocol):
    """Connections that end when nothing comes of them: headers that arrive a byte at a time, answers nobody reads. So
    many at once, and no more."""

    def connection_made(self, transport: Any) -> None:
        super().connection_made(transport)
        self._watched: tuple[Any, ...] = ()
        self._since = self.loop.time()
        if len(self.connections) > CONNECTIONS:
            self.transport.abort()
        self._look()

    def _look(self) -> None:
        """Every second: since when has nothing come, or been read."""
        if self.transport.is_closing():
            return
        now, idle = self.loop.time(), self.conn.their_state is h11.IDLE or (self.cycle and self.cycle.response_complete)
        state = "unread" if self.flow.write_paused else "idle" if idle else "busy"
        if (state, id(self.cycle)) != self._watched:
            self._watched, self._since = (state, id(self.cycle)), now
        if state != "busy" and now - self._since > (UNREAD if state == "unread" else PATIENCE):
            self.transport.abort()
            return
        self.loop.call_later(1.0, self._look)


class Server(uvicorn.Server):
    """Ends at the first signal when what is being answered has ended, at the second at once."""

    def __init__(self, config: uvicorn.Config, service: Service, patience: float):
        super().__init__(config)
        self._service, self._patience = service, patience

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        if self._service.phase == "draining":
            self.should_exit = self.force_exit = True
            return
        self._service.phase = "draining"
        threading.Thread(target=self._drain, daemon=True).start()

    async def on_tick(self, counter: int) -> bool:
        """Whether to end: also where the base could not be opened."""
        return await super().on_tick(counter) or self._service.failed is not None

    def _drain(self) -> None:
        self._service.drain(self._patience)
        self.should_exit = True


class Log:
    """One line of JSON on stderr for each request: who asked what of which model, how it ended; never a prompt, nor an
    answer. Written by a thread of its own: a pipe that nobody reads keeps no client waiting."""

    def __init__(self, most: int = 10_000):
        self._lines: queue.Queue[str] = queue.Queue(most)
        threading.Thread(target=self._write, name="lorafit-log", daemon=True).start()

    def __call__(self, told: dict[str, Any]) -> None:
        with suppress(queue.Full):
            self._lines.put_nowait(json.dumps(told))

    def _write(self) -> None:
        while True:
            with suppress(OSError):
                print(self._lines.get(), file=sys.stderr, flush=True)


def serve(
    service: Service,
    sockets: list[socket.socket],
    hosts: Collection[str] | None,
    patience: float,
    log: Callable[[dict[str, Any]], None],
) -> None:
    """Serve until a signal comes. sockets: that listen. patience: seconds for what is being answered to end. Raises
    what the base or its adapters could not be opened for."""
    config = uvicorn.Config(
        make_app(service, hosts, log),
        http=Patient,
        ws="none",
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=int(PATIENCE),
        timeout_graceful_shutdown=5,
    )
    asyncio.run(Server(config, service, patience).serve(sockets))
    if service.failed:
        raise service.failed
