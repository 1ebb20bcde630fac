"""Where a server listens, and by which names it may be called. Nothing of weight is imported here."""

from __future__ import annotations

import errno
import ipaddress
import os
import socket
from collections.abc import Collection
from typing import Any

from lorafit.errors import SettingsError

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
BACKLOG = 2048  # connections that wait to be taken


def is_loopback(host: str) -> bool:
    """Whether only this machine reaches an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def hosts_of(host: str, allowed: Collection[str], with_keys: bool) -> Collection[str] | None:
    """The names a server may be called by; None: any, where keys keep out what a page in a browser could send.

    Raises SettingsError for an address that others reach, without keys.
    """
    if not with_keys and not is_loopback(host):
        raise SettingsError(
            f"--host {host}: others reach this address, and no keys are set: make one with lorafit key "
            "create --keys FILE, and start with --keys FILE"
        )
    if with_keys and not allowed:
        return None
    return {*LOOPBACK, host.lower(), *(name.lower() for name in allowed)}


def listening(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen at every address of a host, at one port.

    host: a name or an address of this machine.
    port: 0 for one that is free.
    Raises SettingsError where another program listens there, or nobody can.
    """
    opened: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for family, kind, protocol, _, address in socket.getaddrinfo(host or ".", port, type=socket.SOCK_STREAM):
            try:
                opened.append(_listener(family, kind, protocol, (address[0], port, *address[2:])))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error  # as of localhost's two addresses one may be, where there is no IPv6
                continue
            port = port or opened[0].getsockname()[1]
        if missing and not opened:
            raise missing
    except (OSError, UnicodeError) as error:
        for one in opened:
            one.close()
        raise SettingsError(_refusal(host, port, error)) from error
    return opened


def _listener(family: int, kind: int, protocol: int, address: tuple[Any, ...]) -> socket.socket:
    made = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":  # elsewhere it would take the port away from another program
            made.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6:
            made.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        made.bind(address)
        made.listen(BACKLOG)
    except BaseException:
        made.close()
        raise
    return made


def _refusal(host: str, port: int, error: OSError | UnicodeError) -> str:
    """Why nobody can listen there, and what to do."""
    code = error.errno if isinstance(error, OSError) and not isinstance(error, socket.gaierror) else None
    if code == errno.EADDRINUSE:
        return f"--port {port}: in use by another program: end that one, or name another with --port"
    if code == errno.EACCES:
        return f"--port {port}: this user may not listen at it: name one above 1023 with --port"
    return f"--host {host}: no address of this machine ({error}): name another with --host"
