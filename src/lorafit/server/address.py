"""The sockets that a server listens on, and the host names it accepts. This module imports nothing that is slow."""

from __future__ import annotations

import errno
import ipaddress
import socket
from collections.abc import Collection

from lorafit.errors import SettingsError

LOOPBACK = ("localhost", "127.0.0.1", "[::1]")
BACKLOG = 2048  # connections that may wait to be accepted


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach an address."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"


def hosts_of(host: str, allowed: Collection[str], with_keys: bool) -> Collection[str] | None:
    """The host names that requests may use: the server's own and `allowed`. None: any, since keys keep out what a page
    in a browser could send. Raises SettingsError for an address that others can reach, without keys."""
    if not with_keys and not is_loopback(host):
        raise SettingsError(
            f"--host {host}: other machines can reach this address, and no keys are set: make one with lorafit key "
            "create --keys FILE, and start with --keys FILE"
        )
    if with_keys and not allowed:
        return None
    return {*LOOPBACK, host.lower(), *(name.lower() for name in allowed)}


def listening(host: str, port: int) -> list[socket.socket]:
    """Sockets that listen at every address of a host, at one port; port 0: any free one. Raises SettingsError where the
    port is in use, or the host is not this machine."""
    opened: list[socket.socket] = []
    missing: OSError | None = None
    try:
        for family, *_, address in socket.getaddrinfo(host or ".", port, type=socket.SOCK_STREAM):
            try:
                opened.append(socket.create_server((address[0], port, *address[2:]), family=family, backlog=BACKLOG))
            except OSError as error:
                if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                    raise
                missing = error  # without IPv6 one of localhost's two addresses is missing
                continue
            port = port or opened[0].getsockname()[1]
        if missing and not opened:
            raise missing
    except (OSError, UnicodeError) as error:
        for listener in opened:
            listener.close()
        raise SettingsError(_refusal(host, port, error)) from error
    return opened


def _refusal(host: str, port: int, error: OSError | UnicodeError) -> str:
    """The message where it is impossible to listen."""
    code = error.errno if isinstance(error, OSError) and not isinstance(error, socket.gaierror) else None
    if code == errno.EADDRINUSE:
        return f"--port {port}: in use by another program: end that one, or choose another port with --port"
    if code == errno.EACCES:
        return f"--port {port}: this user may not listen at it: choose one above 1023 with --port"
    return f"--host {host}: not an address of this machine ({error}): choose another with --host"
