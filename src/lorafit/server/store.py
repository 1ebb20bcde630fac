"""The adapters of a server on disk: folders that appear under ROOT become versions that the engine serves.

    ROOT/returns/            an adapter, or a run, served as `returns`; when it is replaced, a new version is served
    ROOT/.lorafit/versions/  a copy of each version, since a version never changes
    ROOT/.lorafit/registry.json  the versions, and which of them are live; always written whole

After a crash the registry says what was served. A version is copied before it is registered, so no registered version
is missing; copies that are not registered are deleted. Without a registry, it is rebuilt from the names of the copies.
"""

from __future__ import annotations

import hashlib
import shutil
import threading
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from pydantic import BaseModel, ConfigDict, ValidationError

from lorafit.adapters.formats import peft
from lorafit.errors import AdapterError, FormatError, LorafitError, RunError
from lorafit.files import read_json, unfinished, whole_folder, write_json
from lorafit.serving import Engine, Version
from lorafit.serving.pool import NAME

OWN = ".lorafit"


class Entry(BaseModel):
    """A version in the registry. digest: hash of its content. live: whether requests for its bare name get it."""

    model_config = ConfigDict(extra="forbid")
    name: str
    number: int
    digest: str
    live: bool


class Registry(BaseModel):
    """The content of registry.json. last: the last version number of each name, since no number is used twice. handled:
    the digest of what was last loaded from each folder, so that an unloaded adapter does not come back."""

    model_config = ConfigDict(extra="forbid")
    versions: list[Entry] = []
    last: dict[str, int] = {}
    handled: dict[str, str] = {}


class Store:
    """Keeps the adapters of an engine in a folder. All methods may be called from any thread. require_name: raises
    AdapterError for a name that is taken, such as the base's. Raises RunError if another server uses the folder."""

    def __init__(self, engine: Engine, root: Path, say: Callable[[str], None], require_name: Callable[[str], None]):
        self.engine, self.root, self._say, self._require_name = engine, root.resolve(), say, require_name
        self._versions = self.root / OWN / "versions"
        self._file = self.root / OWN / "registry.json"
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[Any, ...]] = {}  # state of each folder when it was last looked at
        self._tried: dict[str, tuple[Any, ...]] = {}  # its state when it was last loaded, or refused
        self._said: dict[str, str] = {}  # the last message about it
        self._handled: dict[str, str] = {}
        self._unserved: list[Entry] = []
        self._unloaded: list[Version] = []
        self._versions.mkdir(parents=True, exist_ok=True)
        self._lock_file = _locked(self.root / OWN / "lock")

    def close(self) -> None:
        """Release the folder for another server."""
        self._lock_file.close()

    def restore(self) -> None:
        """Serve what was served when the last server ended: what the registry lists or, without a registry, the copies.
        Raises FormatError for an invalid registry."""
        has_registry = self._file.exists()
        try:
            registry = Registry.model_validate(read_json(self._file)) if has_registry else self._from_copies()
        except ValidationError as error:
            raise FormatError(
                f"{self._file}: {error.errors()[0]['msg']}: restore it from a backup, or move it away: then "
                "the newest version of each adapter is served"
            ) from error
        served: dict[str, list[Entry]] = {}
        for entry in registry.versions:
            folder = self._folder(entry.name, entry.number)
            try:
                if not NAME.fullmatch(entry.name) or not folder.is_dir():
                    raise FormatError(f"{folder}: does not exist any more: load it again")
                self.engine.adapters.restore(entry.name, entry.number, entry.digest, folder, entry.live)
            except (FormatError, AdapterError) as error:
                self._say(f"'{entry.name}@{entry.number}' is not served: {error}")
                self._unserved.append(entry)
                continue
            served.setdefault(entry.name, []).append(entry)
        for name, entries in served.items():
            if not any(entry.live for entry in entries):
                self._serve_earlier(name, entries)
        self._handled = dict(registry.handled)
        self.engine.adapters.number_from(registry.last)
        if not has_registry:
            if registry.last:
                self._write()
            return
        registered = {self._folder(entry.name, entry.number) for entry in registry.versions}
        for leftover in [
            *unfinished(self._versions, [path.name for path in self._versions.iterdir()]),
            *(path for path in self._versions.iterdir() if path not in registered),
        ]:
            shutil.rmtree(leftover, ignore_errors=True)

    def _serve_earlier(self, name: str, entries: Sequence[Entry]) -> None:
        """If the live version of a name cannot be served, make the highest version below it live. Higher versions stay
        out: they were rolled back."""
        lost = [entry.number for entry in self._unserved if entry.live and entry.name == name]
        earlier = [entry for entry in entries if not lost or entry.number < lost[0]]
        if earlier:
            best = max(earlier, key=lambda entry: entry.number)
            self.engine.adapters.restore(name, best.number, best.digest, self._folder(name, best.number), True)
            if lost:
                self._say(f"'{name}' now serves {name}@{best.number}: load a new version of it")
        else:
            self._say(f"'{name}' is not served; its later versions are, by number: load a new version of it")

    def _from_copies(self) -> Registry:
        """A registry made from the names of the copies. No entry is live; `restore` then takes the highest."""
        registry = Registry()
        numbered = [
            (name, int(number), path)
            for path in self._versions.iterdir()
            for name, _, number in [path.name.rpartition("@")]
            if NAME.fullmatch(name) and number.isdecimal()
        ]
        for name, number, folder in sorted(numbered):
            registry.last[name] = number
            try:
                digest = peft.read(folder).digest()
            except LorafitError as error:
                self._say(f"'{folder.name}' is not served: {error}")
                continue
            registry.versions.append(Entry(name=name, number=number, digest=digest, live=False))
        for name in registry.last:
            with suppress(LorafitError):  # `look` reports it
                self._files(source := peft.adapter_folder(self.root / name))  # raises for a link out of the root
                copies = [self._folder(entry.name, entry.number) for entry in registry.versions if entry.name == name]
                if (digests := _digests(source)) in map(_digests, copies):
                    registry.handled[name] = digests[0]
        if numbered:
            self._say(
                f"{self._file}: it is missing: the copies in {self._versions} are served again, the highest version "
                "of each name live: roll back or unload what should not be served"
            )
        return registry

    def within(self, path: str) -> Path:
        """The folder that a request names, which must lie inside the root, also after links are resolved.
        Raises AdapterError."""
        try:
            folder = (self.root / path).resolve()
            outside = folder == self.root or OWN in folder.relative_to(self.root).parts
            exists = not outside and folder.is_dir()
        except (OSError, ValueError, RuntimeError):  # outside, too long a name, a cycle of links, a zero byte
            outside, exists = True, False
        if outside:
            raise AdapterError(
                "lora_path: it is not inside the server's folder of adapters: put the adapter there, "
                "and name its folder"
            )
        if not exists:
            raise AdapterError("lora_path: there is no such folder among the server's adapters: put it there first")
        return folder

    def load(self, name: str, source: Path, new_name: bool = False, digest: str | None = None) -> Version:
        """Serve the adapter in a folder as a new version of `name`, after its copy and the registry are on disk.
        new_name: refuse a name that is served already. digest: of the watched folder with this name, to be noted as
        handled. Raises AdapterError or FormatError for an adapter that cannot be served; then nothing has changed."""
        if not NAME.fullmatch(name):
            raise AdapterError(
                f"lora_name: {name[:80]!r}: begin with a letter or digit, and continue with up to 63 "
                "letters, digits, dots, hyphens and underscores"
            )
        self._require_name(name)
        folder = peft.adapter_folder(source)
        peft.require_adapter_folder(folder)
        with self._lock:
            if new_name and any(version.name == name for version, _ in self.engine.adapters.listed()):
                raise AdapterError(
                    f"lora_name: '{name}' is loaded already: unload it first, or set load_inplace for a "
                    "new version of it"
                )
            target = self._folder(name, self.engine.adapters.numbers().get(name, 0) + 1)
            try:
                with whole_folder(target) as building:
                    for file in self._files(folder):
                        shutil.copyfile(file.resolve(), building / file.name)
                version = self.engine.stage(name, target)
                self._write(version, digest)
            except BaseException:
                shutil.rmtree(target, ignore_errors=True)
                raise
            self.engine.adapters.publish(version)
        return version

    def unload(self, name: str) -> None:
        """Stop serving `name`, or the version `name@3`. Raises UnknownAdapterError or AdapterError."""
        with self._lock:
            self._write(without=self.engine.adapters.removable(name))
            self._unloaded += self.engine.unload(name)

    def rollback(self, name: str) -> Version:
        """Make the version before a name's live one live again. Raises UnknownAdapterError or AdapterError."""
        with self._lock:
            self._write(self.engine.adapters.before(name))
            return self.engine.rollback(name)

    def look(self) -> None:
        """Load adapters that were put into the folder, or replaced there, since the last call. Each error is reported
        once; after an error of the disk, loading is tried again."""
        self._clear()
        for folder in sorted(self.root.iterdir()):
            if self.engine.is_closed:
                return
            if folder.name.startswith(".") or not folder.is_dir() or not NAME.fullmatch(folder.name):
                continue
            try:
                state = self._state(folder)
                unchanged = self._seen.get(folder.name) == state  # otherwise somebody may still be writing it
                self._seen[folder.name] = state
                if not unchanged or self._tried.get(folder.name) == state:
                    continue
                self._tried[folder.name] = state
                self._files(peft.adapter_folder(folder))  # a link out of the root is not read
                digests = _digests(peft.adapter_folder(folder))
                if self._handled.get(folder.name) not in digests:
                    self._say(f"serving {self.load(folder.name, folder, digest=digests[0]).label}")
                self._said.pop(folder.name, None)
            except (LorafitError, OSError) as error:
                if self._tried.get(folder.name) != self._seen.get(folder.name):
                    continue  # it may still be being written: report nothing yet
                if isinstance(error, OSError):
                    self._tried.pop(folder.name, None)
                message = f"{folder.name}: not served: {error}"
                if self._said.get(folder.name) != message:
                    self._say(message)
                self._said[folder.name] = message

    def _state(self, folder: Path) -> tuple[Any, ...]:
        """A value that changes when the folder does."""
        try:
            stats = [(file, file.stat()) for file in self._files(peft.adapter_folder(folder))]
        except AdapterError as error:  # a link out of the root
            return (str(error),)
        return tuple((str(file), stat.st_ino, stat.st_mtime_ns, stat.st_size) for file, stat in stats)

    def _files(self, folder: Path) -> list[Path]:
        """The files of an adapter in a folder. Raises AdapterError where one is a link out of the root."""
        files = [folder / name for name in sorted(peft.FILES) if (folder / name).exists()]
        for file in (folder, *files):
            if not file.resolve().is_relative_to(self.root) or not (file.is_file() or file == folder):
                raise AdapterError(
                    f"{folder.name}/{file.name}: a link out of the server's folder of adapters, or not a "
                    "file: put the file itself there"
                )
        return files

    def _clear(self) -> None:
        """Delete the copies of versions that were unloaded and that no request uses any more."""
        with self._lock:
            done = [version for version in self._unloaded if not version.users]
            self._unloaded = [version for version in self._unloaded if version not in done]
        for version in done:
            if version.folder is not None and version.folder.is_relative_to(self._versions):
                shutil.rmtree(version.folder, ignore_errors=True)

    def _folder(self, name: str, number: int) -> Path:
        return self._versions / f"{name}@{number}"

    def _write(self, new: Version | None = None, digest: str | None = None, without: Sequence[Version] = ()) -> None:
        """Write the registry before the engine changes, so that a full disk changes nothing. new: a version that will
        be live; digest: of the watched folder it comes from; without: versions that will be unloaded."""
        listed = [
            (version, live and not (new and new.name == version.name))
            for version, live in self.engine.adapters.listed()
            if version is not new and version not in without
        ]
        listed += [(new, True)] if new else []
        entries = [
            Entry(name=version.name, number=version.number, digest=version.digest, live=live)
            for version, live in listed
            if version.folder and version.folder.is_relative_to(self._versions)
        ]
        names = {entry.name for entry in entries if entry.live}
        entries += [
            entry.model_copy(update={"live": entry.live and entry.name not in names})
            for entry in self._unserved
            if self._folder(entry.name, entry.number).is_dir()
        ]
        handled = {**self._handled, **({new.name: digest} if new and digest else {})}
        numbers = self.engine.adapters.numbers()
        write_json(self._file, Registry(versions=entries, last=numbers, handled=handled).model_dump())
        self._handled = handled


def _digests(folder: Path) -> tuple[str, str]:
    """Two digests of an adapter folder and its router data: in the present format, and in format 1, which older
    registries use. Raises FormatError."""
    adapter = peft.read(folder)
    routing = peft.routing_of(folder)
    suffix = "" if routing is None else f"+{hashlib.sha256(routing).hexdigest()[:16]}"
    return adapter.digest() + suffix, adapter.digest_of_format_1() + suffix


def _locked(path: Path) -> Any:
    """Open and lock a file until it is closed. Raises RunError if another process has locked it."""
    file = path.open("a")
    try:
        import fcntl
    except ImportError:  # Windows: nothing stops a second server on the same folder
        return file
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        file.close()
        raise RunError(f"{path.parent.parent}: another server uses it: stop it, or name another folder") from error
    return file
