"""Who is told while a base is made ready, and whether the disk has room for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lorafit.errors import BaseError
from lorafit.files import free_bytes, shown

Report = Callable[[str], None]  # one line for each step that takes a while
Watch = Callable[[str, int, int, str], None]  # what, done, of, unit ("bytes" or a plural): progress of one step


def silent(_: str) -> None:
    """A Report to no one."""


def unwatched(*_: object) -> None:
    """A Watch by no one."""


def require_room(size: int, folder: Path, what: str, setting: str) -> None:
    """Raise BaseError where `size` bytes do not fit beside `folder`. setting: the variable that names another place."""
    free = free_bytes(folder)
    if size > free:
        raise BaseError(
            f"{what}: {shown(size)} are needed and {shown(free)} are free where {folder} is: make room, "
            f"or name a folder on another disk in {setting}"
        )
