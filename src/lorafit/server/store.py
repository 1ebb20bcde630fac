"""The adapters of a server on disk: a folder that people and tools put adapters into, and what the server made of them.

    ROOT/returns/            an adapter, or a run: becomes `returns`; put another in its place: a new version of it
    ROOT/.lorafit/versions/  a copy of each version, for a version never changes
    ROOT/.lorafit/registry.json  which versions there are, and which are live; written whole

After a crash the registry says what was served; a version is stored before it is registered, so that nothing that was
promised is missing, and what is in versions/ without being registered is taken away.
"""

from __future__ import annotations

import shutil
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lorafit.errors import AdapterError, FormatError, LorafitError
from lorafit.files import read_json, unfinished, whole_folder, write_json
from lorafit.formats import peft
from lorafit.serving import Engine, Version
from lorafit.serving.pool import NAME

OWN = ".lorafit"


class Entry(BaseModel):
    """A version in the registry. digest: of its content."""

    model_config = ConfigDict(extra="forbid")
    name: str
    number: int
    digest: str
    live: bool


class Registry(BaseModel):
    """last: the number that was last given to a version of a name; none is given twice."""

    model_config = ConfigDict(extra="forbid")
    versions: list[Entry] = []
    last: dict[str, int] = {}


class Store:
    """What an engine serves, kept in a folder. All methods may be called from any thread; one changes it at a time."""

    def __init__(self, engine: Engine, root: Path, say: Callable[[str], None]):
        self.engine, self.root, self._say = engine, root.resolve(), say
        self._versions = self.root / OWN / "versions"
        self._file = self.root / OWN / "registry.json"
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[Any, ...]] = {}
        self._gone: list[Version] = []
        self._versions.mkdir(parents=True, exist_ok=True)

    def restore(self) -> None:
        """Register again what was served when the server ended; nothing is read but the registry. Raises FormatError
        for a registry that is none."""
        if self._file.exists():
            try:
                registry = Registry.model_validate(read_json(self._file))
            except ValidationError as error:
                raise FormatError(f"{self._file}: {error.errors()[0]['msg']}: restore it from a copy, or move it away "
                                  "to begin with the adapters in the folder alone") from error  # fmt: skip
        else:
            registry = Registry()
        kept = set()
        for entry in registry.versions:
            folder = self._folder(entry.name, entry.number)
            if not folder.is_dir():
                self._say(f"{folder}: is not there any more: '{entry.name}@{entry.number}' is not served")
                continue
            self.engine.adapters.restore(entry.name, entry.number, entry.digest, folder, entry.live)
            kept.add(folder)
        self.engine.adapters.number_from(registry.last)
        for left in [*unfinished(self._versions, [path.name for path in self._versions.iterdir()]),
                     *(path for path in self._versions.iterdir() if path not in kept)]:  # fmt: skip
            shutil.rmtree(left, ignore_errors=True)

    def within(self, path: str) -> Path:
        """The folder that a request names, which is within the root whatever links there are. Raises AdapterError."""
        wanted = (self.root / path).resolve() if "\0" not in path else self.root
        if wanted == self.root or not wanted.is_relative_to(self.root) or OWN in wanted.relative_to(self.root).parts:
            raise AdapterError("lora_path: it is not within the server's folder of adapters: put the adapter there, "
                               "and name its folder")  # fmt: skip
        if not wanted.is_dir():
            raise AdapterError("lora_path: there is no such folder among the server's adapters: put it there first")
        return wanted

    def load(self, name: str, source: Path) -> Version:
        """Serve the adapter in a folder as a new version of `name`. Raises AdapterError or FormatError; then all is as
        before."""
        if not NAME.fullmatch(name):
            raise AdapterError(f"lora_name: {name[:80]!r}: begin with a letter or digit, and go on with up to 63 "
                               "letters, digits, dots, hyphens and underscores")  # fmt: skip
        folder = peft.adapter_folder(source)
        peft.require_adapter_folder(folder)
        with self._lock:
            number = self.engine.adapters.numbers().get(name, 0) + 1
            target = self._folder(name, number)
            with whole_folder(target) as building:
                for file in self._files(folder):
                    shutil.copyfile(file, building / file.name)
            try:
                version = self.engine.load(name, target)
            except LorafitError:
                shutil.rmtree(target, ignore_errors=True)
                raise
            self._write()
        return version

    def unload(self, name: str) -> None:
        """Raises UnknownAdapterError."""
        with self._lock:
            gone = self.engine.unload(name)
            self._write()
            self._gone += gone

    def rollback(self, name: str) -> Version:
        """Raises UnknownAdapterError or AdapterError."""
        with self._lock:
            version = self.engine.rollback(name)
            self._write()
        return version

    def look(self) -> None:
        """Serve what has come into the folder, or has been replaced there, since the last time. What cannot be served
        is said once."""
        self._clear()
        for folder in sorted(self.root.iterdir()):
            if folder.name.startswith(".") or not folder.is_dir() or not NAME.fullmatch(folder.name):
                continue
            try:
                files = self._files(peft.adapter_folder(folder))
                seen = tuple((str(file), file.stat().st_mtime_ns, file.stat().st_size) for file in files)
            except (LorafitError, OSError):
                continue  # not whole yet, or no adapter
            if self._seen.get(folder.name) == seen:
                continue
            self._seen[folder.name] = seen
            try:
                if not self._is_known(folder):
                    self._say(f"serving {self.load(folder.name, folder).id}")
            except (LorafitError, OSError) as error:
                self._say(f"{folder.name}: not served: {error}")

    def _is_known(self, folder: Path) -> bool:
        """Whether what is in the folder is a version of its name already."""
        digest = peft.read(peft.adapter_folder(folder)).digest()
        return any(
            version.digest == digest for version, _ in self.engine.adapters.listed() if version.name == folder.name
        )

    def _files(self, folder: Path) -> list[Path]:
        """What of a folder makes an adapter. Raises AdapterError where one is a link to somewhere else."""
        files = [folder / name for name in peft.FILES if (folder / name).exists()]
        if folder.resolve().is_relative_to(self.root):
            for file in files:
                if not file.resolve().is_relative_to(self.root):
                    raise AdapterError(f"{folder.name}/{file.name}: a link out of the server's folder of adapters: "
                                       "put the file itself there")  # fmt: skip
        return files

    def _clear(self) -> None:
        """Take away the copies of versions that were unloaded, once the last answer by them has ended."""
        with self._lock:
            done = [version for version in self._gone if not version.users]
            self._gone = [version for version in self._gone if version not in done]
        for version in done:
            if version.folder is not None and version.folder.is_relative_to(self._versions):
                shutil.rmtree(version.folder, ignore_errors=True)

    def _folder(self, name: str, number: int) -> Path:
        return self._versions / f"{name}@{number}"

    def _write(self) -> None:
        listed = [(version, live) for version, live in self.engine.adapters.listed()
                  if version.folder is not None and version.folder.is_relative_to(self._versions)]  # fmt: skip
        entries = [Entry(name=version.name, number=version.number, digest=version.digest, live=live)
                   for version, live in listed]  # fmt: skip
        write_json(self._file, Registry(versions=entries, last=self.engine.adapters.numbers()).model_dump())
