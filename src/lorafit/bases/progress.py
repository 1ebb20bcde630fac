"""Reports of progress while a base is fetched or converted, and the check that the disk has room for it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lorafit.errors import BaseError
from lorafit.files import free_bytes, shown

Report = Callable[[str], None]  # one line for each step that takes a while
Watch = Callable[[str, int, int, str], None]  # what, done, of, unit ("bytes" or a plural): progress of one step


def silent(_: str) -> None:
    """A Report that does nothing."""


def unwatched(*_: object) -> None:
    """A Watch that does nothing."""


def require_room(size: int, folder: Path, what: str, setting: str) -> None:
    """Raise BaseError where the disk of `folder` has no room for `size` bytes. setting: the variable that names another
    folder."""
    free = free_bytes(folder)
    if size > free:
        raise BaseError(
            f"{what}: {shown(size)} are needed and {shown(free)} are free where {folder} is: make room, "
            f"or name a folder on another disk in {setting}"
        )
