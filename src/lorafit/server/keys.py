"""API keys in a JSON file, stored as hashes, each with its scopes, adapters and quota.

A key is 256 random bits, so it cannot be found from its plain SHA-256.
"""

from __future__ import annotations

import hashlib
import hmac
import secrets
import time
from collections import Counter
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError

from lorafit.errors import FormatError, SettingsError
from lorafit.files import read_json, write_text

Scope = Literal["infer", "admin"]
PREFIX = "lf-"


class Key(BaseModel):
    """One key. hash: its SHA-256, in hexadecimal. adapters: patterns of the names that it may use, with the base's.
    requests, tokens: per minute; None: no limit. created: unix time."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    hash: Annotated[str, StringConstraints(pattern="^[0-9a-f]{64}$")]
    scopes: tuple[Scope, ...] = ("infer",)
    adapters: tuple[str, ...] = ("*",)
    requests: Annotated[int, Field(ge=1)] | None = None
    tokens: Annotated[int, Field(ge=1)] | None = None
    created: int = 0

    def may_use(self, name: str) -> bool:
        """Whether it may use an adapter, given without a version, or the base."""
        return any(fnmatchcase(name, pattern) for pattern in self.adapters)


class _File(BaseModel):
    model_config = ConfigDict(extra="forbid")
    keys: list[Key] = []


def read(path: Path) -> list[Key]:
    """The keys in a file. Raises FormatError for an invalid file, and for two keys of one name."""
    try:
        keys = _File.model_validate(read_json(path)).keys
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, first["loc"]))
        raise FormatError(
            f"{path}: {where}: {first['msg']}: correct it, or make keys with lorafit key create"
        ) from error
    if twice := [name for name, count in Counter(key.name for key in keys).items() if count > 1]:
        raise FormatError(f"{path}: {', '.join(twice)}: given twice, and quotas are by name: rename one")
    return keys


class KeyFile:
    """The keys in a file, which may change while a server runs. Raises FormatError for an invalid file."""

    def __init__(self, path: Path | None):
        self._path = path
        self._time = path.stat().st_mtime_ns if path else 0  # first, so that a change while it is read is seen later
        self.keys = read(path) if path else None

    def look(self) -> None:
        """Read the file again if it has changed. Raises FormatError or OSError; the keys then stay as they were."""
        if self._path and (now := self._path.stat().st_mtime_ns) != self._time:
            self.keys, self._time = read(self._path), now


def create(
    path: Path,
    name: str,
    scopes: Sequence[str],
    adapters: Sequence[str] = ("*",),
    requests: int | None = None,
    tokens: int | None = None,
) -> str:
    """Add a key to a file, and return it. It cannot be read again later, since the file holds its hash only. Raises
    SettingsError where the name is taken or invalid, or a scope does not exist."""
    if unknown := sorted({*scopes} - {*get_args(Scope)}):
        raise SettingsError(f"--scope {unknown[0]}: not a scope: choose infer or admin")
    keys = read(path) if path.exists() else []
    if any(key.name == name for key in keys):
        raise SettingsError(f"{path}: there is a key '{name}' already: choose another name, or take its entry out")
    secret = PREFIX + secrets.token_urlsafe(32)
    try:
        key = Key(
            name=name,
            hash=_hash(secret),
            scopes=tuple(scopes),
            adapters=tuple(adapters),
            requests=requests,
            tokens=tokens,
            created=int(time.time()),
        )
    except ValidationError as error:
        raise SettingsError(f"{name!r}: not a name for a key: choose letters, digits, dots, hyphens") from error
    write_text(path, _File(keys=[*keys, key]).model_dump_json(indent=2) + "\n", mode=0o600)
    return secret


def find(keys: Sequence[Key], secret: str) -> Key | None:
    """The key with this secret; None without one. It compares all keys, so that its time tells nothing."""
    hashed = _hash(secret)
    matching = [key for key in keys if hmac.compare_digest(key.hash, hashed)]
    return matching[-1] if matching else None


def _hash(secret: str) -> str:
    return hashlib.sha256(secret.encode("utf-8", "surrogateescape")).hexdigest()
