"""The adapters of an engine, by name, in versions that never change: folders come in, adapters ready to run go out.

`name` means the live version, `name@3` version 3. A request keeps the version it began with. An adapter is hot (in the
dtype of the base), warm (as it was read) or cold (on disk). The least recently used are released first, from hot to
warm, and from warm to cold where they have a folder; pinned ones stay.
"""

from __future__ import annotations

import re
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.formats import peft
from lorafit.adapters.rendering import Rendering
from lorafit.attachment.checks import require_base, require_fits
from lorafit.bases.base import Base
from lorafit.data.render import renderer_for
from lorafit.errors import AdapterError, UnknownAdapterError
from lorafit.serving.mixing import Loaded

NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,63}")


@dataclass(eq=False)
class Version:
    """One version of an adapter. folder: from which it can be read again; None where it was given as a value. adapter:
    None while it is cold; loaded: None unless it is hot. users: requests that wait for it or are answered by it; it
    stays hot while there are any. used: when it was last used, by the pool's clock. created: unix time."""

    name: str
    number: int
    digest: str
    bytes: int
    folder: Path | None
    rendering: Rendering | None
    adapter: Adapter | None
    loaded: Loaded | None = None
    pinned: bool = False
    used: int = 0
    users: int = 0
    created: int = field(default_factory=lambda: int(time.time()))

    @property
    def id(self) -> str:
        return f"{self.name}@{self.number}"

    @property
    def single(self) -> bool:
        """Whether it was trained on single questions."""
        return self.rendering is not None and self.rendering.single

    @property
    def label(self) -> str:
        """Its name in messages for the operator."""
        return f"{self.id}, which was trained on single questions" if self.single else self.id


class Pool:
    """The adapters of one base. hot_bytes, warm_bytes: limits, which adapters in use and pinned ones may exceed. All
    methods may be called from any thread."""

    def __init__(self, base: Base, hot_bytes: int, warm_bytes: int, accept_unknown_base: bool = False):
        self.base, self.hot_bytes, self.warm_bytes = base, hot_bytes, warm_bytes
        self._accept = accept_unknown_base
        self._versions: dict[str, dict[int, Version]] = {}
        self._live: dict[str, int] = {}
        self._next: dict[str, int] = {}
        self._lock = threading.RLock()
        self._clock = 0

    def add(self, name: str, source: Adapter | str | Path, pin: bool = False) -> Version:
        """Check and load a new version, which no request finds until it is published. Raises AdapterError or
        FormatError for an invalid name or folder, and for an adapter of another base."""
        if not NAME.fullmatch(name):
            raise AdapterError(
                f"{name!r}: not a name for an adapter: begin with a letter or digit, and continue with up to "
                "63 letters, digits, dots, hyphens and underscores"
            )
        folder = None if isinstance(source, Adapter) else peft.adapter_folder(source).resolve()
        if folder is not None:
            peft.require_writes(folder)
        adapter = source if isinstance(source, Adapter) else peft.read(peft.adapter_folder(source))
        self._require(adapter)
        version = Version(name, 0, adapter.digest(), adapter.plan.bytes, folder, adapter.rendering, adapter, pinned=pin)
        version.loaded = Loaded(self.base, adapter)
        with self._lock:
            version.number = self._next[name] = self._next.get(name, 0) + 1
        return version

    def _require(self, adapter: Adapter) -> None:
        """Raise AdapterError unless the adapter fits the base, and the base can render as in its training."""
        require_fits(self.base, adapter, accept_unknown_base=self._accept)
        if adapter.rendering and self.base.tokenizer is not None:
            renderer_for(self.base, like=adapter.rendering)

    def publish(self, version: Version) -> None:
        """Let the name of a version mean it from now on."""
        with self._lock:
            self._versions.setdefault(version.name, {})[version.number] = version
            self._live[version.name] = max(version.number, self._live.get(version.name, 0))
            self._make_room(version)

    def restore(self, name: str, number: int, digest: str, folder: Path, live: bool) -> None:
        """Register a version that was served before. It is read, and compared with its digest, on its first request.
        Raises FormatError, or AdapterError for an adapter of another base."""
        found = peft.glance(folder)
        require_base(self.base, found.base, found.base_name, self._accept)
        version = Version(name, number, digest, found.bytes, folder, found.rendering, None)
        with self._lock:
            self._versions.setdefault(name, {})[number] = version
            self._next[name] = max(number, self._next.get(name, 0))
            if live:
                self._live[name] = number

    def numbers(self) -> dict[str, int]:
        """The last version number of each name. No number is used twice, even after its version was removed."""
        with self._lock:
            return dict(self._next)

    def number_from(self, numbers: Mapping[str, int]) -> None:
        """Number new versions above these."""
        with self._lock:
            for name, number in numbers.items():
                self._next[name] = max(number, self._next.get(name, 0))

    def find(self, name: str) -> Version:
        """The version that `name` or `name@3` means. Raises UnknownAdapterError."""
        alias, at, number = name.partition("@")
        with self._lock:
            versions = self._versions.get(alias, {})
            wanted = int(number) if at and number.isdecimal() else None if at else self._live.get(alias)
            if wanted in versions:
                return versions[wanted]
            if versions and at:
                raise UnknownAdapterError(
                    f"'{name}': '{alias}' has the versions {', '.join(map(str, versions))}: name "
                    "one of them, or none for the live one"
                )
            known = ", ".join(sorted(self._live)[:20])
            fix = f"name one of {known}" if known else "load one first, or name none for the bare base"
            raise UnknownAdapterError(f"'{name}': no adapter has this name: {fix}")

    def remove(self, name: str) -> list[Version]:
        """Remove all versions of `name`, or only `name@3`, which must not be live. Raises UnknownAdapterError or
        AdapterError."""
        with self._lock:
            removed = self.removable(name)
            for version in removed:
                del self._versions[version.name][version.number]
            if "@" not in name:
                del self._live[name], self._versions[name]
            return removed

    def removable(self, name: str) -> list[Version]:
        """The versions that `remove` would remove. Raises what it raises."""
        with self._lock:
            version = self.find(name)
            if "@" not in name:
                return list(self._versions[name].values())
            if self._live.get(version.name) == version.number:
                raise AdapterError(f"'{name}' is live: roll back, or load another version, and then remove it")
            return [version]

    def rollback(self, name: str) -> Version:
        """Let a name mean the version before its live one. Raises UnknownAdapterError, or AdapterError where there is
        none."""
        with self._lock:
            version = self.before(name)
            self._live[version.name] = version.number
            return version

    def before(self, name: str) -> Version:
        """The version that `rollback` would return to. Raises what it raises."""
        with self._lock:
            live = self.find(name)
            earlier = [number for number in self._versions[live.name] if number < live.number]
            if not earlier:
                raise AdapterError(f"'{live.id}' is the first version: load an earlier one again")
            return self._versions[live.name][max(earlier)]

    def listed(self) -> list[tuple[Version, bool]]:
        """All versions, each with whether it is live."""
        with self._lock:
            return [
                (version, self._live.get(name) == number)
                for name, versions in self._versions.items()
                for number, version in versions.items()
            ]

    def heat(self, version: Version) -> Loaded:
        """The loaded adapter of a version, which is read again if it is cold. Raises AdapterError where the folder
        holds another adapter by now, and the errors of reading it."""
        with self._lock:
            self._touch(version)
            adapter, loaded = version.adapter, version.loaded
        if loaded is not None:
            return loaded
        if adapter is None:
            assert version.folder is not None
            adapter = peft.read(version.folder)
            if version.digest not in (adapter.digest(), adapter.digest_of_format_1()):
                raise AdapterError(
                    f"{version.folder}: holds another adapter than when '{version.id}' was loaded: "
                    "load it as a new version"
                )
            self._require(adapter)
        loaded = Loaded(self.base, adapter)
        with self._lock:
            version.adapter, version.loaded = adapter, loaded
            self._make_room(version)
        return loaded

    def enter(self, version: Version, users: int) -> None:
        """Add to the users of a version; a negative number takes off."""
        with self._lock:
            version.users += users
            if not version.users:
                self._cool(version)

    def _touch(self, version: Version) -> None:
        self._clock += 1
        version.used = self._clock

    def _make_room(self, version: Version) -> None:
        self._touch(version)
        self._cool(version)
        self._release("adapter", self.warm_bytes, version, lambda v: v.bytes if v.adapter and v.folder else 0)

    def _cool(self, kept: Version) -> None:
        self._release("loaded", self.hot_bytes, kept, lambda v: v.loaded.bytes if v.loaded else 0)

    def _release(self, attribute: str, limit: int, kept: Version, size: Callable[[Version], int]) -> None:
        """Set an attribute of the least recently used versions to None until their size is within the limit."""
        held = sorted(
            (v for versions in self._versions.values() for v in versions.values() if size(v)), key=lambda v: v.used
        )
        total = sum(map(size, held))
        for version in held:
            if total <= limit:
                return
            if version is not kept and not version.pinned and not version.users:
                total -= size(version)
                setattr(version, attribute, None)
