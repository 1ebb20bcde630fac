"""The adapters of a server on disk: a folder that people and tools put adapters into, and what the server made of them.

    ROOT/returns/            an adapter, or a run: becomes `returns`; put another in its place: a new version of it
    ROOT/.lorafit/versions/  a copy of each version, for a version never changes
    ROOT/.lorafit/registry.json  which versions there are, and which are live; written whole

After a crash the registry says what was served; a version is stored before it is registered, so that nothing that was
promised is missing, and what is in versions/ without being registered is taken away. Where the registry itself is gone,
the names of the copies say what was served.
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
    """A version in the registry. digest: of its content."""

    model_config = ConfigDict(extra="forbid")
    name: str
    number: int
    digest: str
    live: bool


class Registry(BaseModel):
    """last: the number that was last given to a version of a name; none is given twice. handled: the content that was
    last taken from each folder: what was unloaded does not come back by itself."""

    model_config = ConfigDict(extra="forbid")
    versions: list[Entry] = []
    last: dict[str, int] = {}
    handled: dict[str, str] = {}


class Store:
    """What an engine serves, kept in a folder. All methods may be called from any thread; one changes it at a time."""

    def __init__(self, engine: Engine, root: Path, say: Callable[[str], None], require_name: Callable[[str], None]):
        """require_name: raises AdapterError for a name that means something else. Raises RunError where another server
        has the folder."""
        self.engine, self.root, self._say, self._require_name = engine, root.resolve(), say, require_name
        self._versions = self.root / OWN / "versions"
        self._file = self.root / OWN / "registry.json"
        self._lock = threading.Lock()
        self._seen: dict[str, tuple[Any, ...]] = {}
        self._taken: dict[str, tuple[Any, ...]] = {}
        self._said: dict[str, str] = {}
        self._handled: dict[str, str] = {}
        self._unserved: list[Entry] = []
        self._gone: list[Version] = []
        self._versions.mkdir(parents=True, exist_ok=True)
        self._held = _alone(self.root / OWN / "lock")

    def close(self) -> None:
        """Let another server have the folder."""
        self._held.close()

    def restore(self) -> None:
        """Register again what was served when the server ended; where there is a registry, nothing else is read. Raises
        FormatError for a registry that is none."""
        known = self._file.exists()
        try:
            registry = Registry.model_validate(read_json(self._file)) if known else self._found()
        except ValidationError as error:
            raise FormatError(
                f"{self._file}: {error.errors()[0]['msg']}: restore it from a copy, or move it away and "
                "the newest of each adapter is served"
            ) from error
        served: dict[str, list[Entry]] = {}
        for entry in registry.versions:
            folder = self._folder(entry.name, entry.number)
            try:
                if not NAME.fullmatch(entry.name) or not folder.is_dir():
                    raise FormatError(f"{folder}: is not there any more: load it again")
                self.engine.adapters.restore(entry.name, entry.number, entry.digest, folder, entry.live)
            except (FormatError, AdapterError) as error:
                self._say(f"'{entry.name}@{entry.number}' is not served: {error}")
                self._unserved.append(entry)
                continue
            served.setdefault(entry.name, []).append(entry)
        for name, entries in served.items():
            if not any(entry.live for entry in entries):
                self._next_best(name, entries)
        self._handled = dict(registry.handled)
        self.engine.adapters.number_from(registry.last)
        if not known:
            if registry.last:
                self._write()
            return
        kept = {self._folder(entry.name, entry.number) for entry in registry.versions}
        for left in [
            *unfinished(self._versions, [path.name for path in self._versions.iterdir()]),
            *(path for path in self._versions.iterdir() if path not in kept),
        ]:
            shutil.rmtree(left, ignore_errors=True)

    def _next_best(self, name: str, entries: Sequence[Entry]) -> None:
        """Let a name whose live version cannot be served mean the highest before that one: what came after it was
        rolled back from."""
        lost = [entry.number for entry in self._unserved if entry.live and entry.name == name]
        earlier = [entry for entry in entries if not lost or entry.number < lost[0]]
        if earlier:
            best = max(earlier, key=lambda entry: entry.number)
            self.engine.adapters.restore(name, best.number, best.digest, self._folder(name, best.number), True)
            if lost:
                self._say(f"'{name}' means {name}@{best.number} now: load a new version of it")
        else:
            self._say(f"'{name}' is not served, its later versions by their numbers alone: load a new version of it")

    def _found(self) -> Registry:
        """What the copies tell by their names where there is no registry. None is said to be live: the highest is."""
        found = Registry()
        numbered = [
            (name, int(number), path)
            for path in self._versions.iterdir()
            for name, _, number in [path.name.rpartition("@")]
            if NAME.fullmatch(name) and number.isdecimal()
        ]
        for name, number, folder in sorted(numbered):
            found.last[name] = number
            try:
                digest = peft.read(folder).digest()
            except LorafitError as error:
                self._say(f"'{folder.name}' is not served: {error}")
                continue
            found.versions.append(Entry(name=name, number=number, digest=digest, live=False))
        for name in found.last:
            with suppress(LorafitError):  # no such folder, or not to be served: which is said when it is looked at
                self._files(source := peft.adapter_folder(self.root / name))
                copies = [self._folder(entry.name, entry.number) for entry in found.versions if entry.name == name]
                if (contents := _contents(source)) in map(_contents, copies):
                    found.handled[name] = contents[0]
        if numbered:
            self._say(
                f"{self._file}: is not there: what lies in {self._versions} is served again, the highest version "
                "of each name live: roll back or unload what should not be"
            )
        return found

    def within(self, path: str) -> Path:
        """The folder that a request names, which is within the root whatever links there are. Raises AdapterError."""
        try:
            wanted = (self.root / path).resolve()
            outside = wanted == self.root or OWN in wanted.relative_to(self.root).parts
            there = not outside and wanted.is_dir()
        except (OSError, ValueError, RuntimeError):  # elsewhere, longer than names may be, a ring of links, a zero
            outside, there = True, False
        if outside:
            raise AdapterError(
                "lora_path: it is not within the server's folder of adapters: put the adapter there, "
                "and name its folder"
            )
        if not there:
            raise AdapterError("lora_path: there is no such folder among the server's adapters: put it there first")
        return wanted

    def load(self, name: str, source: Path, anew: bool = False, content: str | None = None) -> Version:
        """Serve the adapter in a folder as a new version of `name`, which is not served yet if `anew`. content: of the
        folder of this name, which is taken with it. Raises AdapterError or FormatError; then all is as before.

        The copy and the registry are on disk before anyone can be answered by it.
        """
        if not NAME.fullmatch(name):
            raise AdapterError(
                f"lora_name: {name[:80]!r}: begin with a letter or digit, and go on with up to 63 "
                "letters, digits, dots, hyphens and underscores"
            )
        self._require_name(name)
        folder = peft.adapter_folder(source)
        peft.require_adapter_folder(folder)
        with self._lock:
            if anew and any(version.name == name for version, _ in self.engine.adapters.listed()):
                raise AdapterError(
                    f"lora_name: '{name}' is loaded already: unload it first, or set load_inplace for a "
                    "new version of it"
                )
            target = self._folder(name, self.engine.adapters.numbers().get(name, 0) + 1)
            try:
                with whole_folder(target) as building:
                    for file in self._files(folder):
                        shutil.copyfile(file.resolve(), building / file.name)
                version = self.engine.tried(name, target)
                self._write(version, content)
            except BaseException:
                shutil.rmtree(target, ignore_errors=True)
                raise
            self.engine.adapters.publish(version)
        return version

    def unload(self, name: str) -> None:
        """Raises UnknownAdapterError."""
        with self._lock:
            self._write(without=self.engine.adapters.removable(name))
            self._gone += self.engine.unload(name)

    def rollback(self, name: str) -> Version:
        """Raises UnknownAdapterError or AdapterError."""
        with self._lock:
            self._write(self.engine.adapters.before(name))
            return self.engine.rollback(name)

    def look(self) -> None:
        """Serve what has come into the folder, or has been replaced there, since the last time. What cannot be served
        is said once; what the disk refused is tried again."""
        self._clear()
        for folder in sorted(self.root.iterdir()):
            if self.engine.is_closed:
                return
            if folder.name.startswith(".") or not folder.is_dir() or not NAME.fullmatch(folder.name):
                continue
            try:
                seen = self._state(folder)
                whole = self._seen.get(folder.name) == seen  # twice the same: nobody is just writing it
                self._seen[folder.name] = seen
                if not whole or self._taken.get(folder.name) == seen:
                    continue
                self._taken[folder.name] = seen
                self._files(peft.adapter_folder(folder))  # a link to somewhere else is not read
                contents = _contents(peft.adapter_folder(folder))
                if self._handled.get(folder.name) not in contents:
                    self._say(f"serving {self.load(folder.name, folder, content=contents[0]).told}")
                self._said.pop(folder.name, None)
            except (LorafitError, OSError) as error:
                if self._taken.get(folder.name) != self._seen.get(folder.name):
                    continue
                if isinstance(error, OSError):
                    self._taken.pop(folder.name, None)
                told = f"{folder.name}: not served: {error}"
                if self._said.get(folder.name) != told:
                    self._say(told)
                self._said[folder.name] = told

    def _state(self, folder: Path) -> tuple[Any, ...]:
        """What shows whether anything has changed in a folder."""
        try:
            found = [(file, file.stat()) for file in self._files(peft.adapter_folder(folder))]
        except AdapterError as error:  # a link to somewhere else
            return (str(error),)
        return tuple((str(file), stat.st_ino, stat.st_mtime_ns, stat.st_size) for file, stat in found)

    def _files(self, folder: Path) -> list[Path]:
        """What of a folder makes an adapter. Raises AdapterError where one is a link to somewhere else."""
        files = [folder / name for name in sorted(peft.FILES) if (folder / name).exists()]
        for file in (folder, *files):
            if not file.resolve().is_relative_to(self.root) or not (file.is_file() or file == folder):
                raise AdapterError(
                    f"{folder.name}/{file.name}: a link out of the server's folder of adapters, or no "
                    "file: put the file itself there"
                )
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

    def _write(
        self, coming: Version | None = None, content: str | None = None, without: Sequence[Version] = ()
    ) -> None:
        """What will be in a moment, so that a disk that is full leaves all as it was. coming: a version that will be
        live, of what its name's folder holds; without: versions that will be gone."""
        listed = [
            (version, live and not (coming and coming.name == version.name))
            for version, live in self.engine.adapters.listed()
            if version is not coming and version not in without
        ]
        listed += [(coming, True)] if coming else []
        listed = [one for one in listed if one[0].folder and one[0].folder.is_relative_to(self._versions)]
        entries = [
            Entry(name=version.name, number=version.number, digest=version.digest, live=live)
            for version, live in listed
        ]
        names = {version.name for version, live in listed if live}
        entries += [
            one.model_copy(update={"live": one.live and one.name not in names})
            for one in self._unserved
            if self._folder(one.name, one.number).is_dir()
        ]
        handled = {**self._handled, **({coming.name: content} if coming and content else {})}
        numbers = self.engine.adapters.numbers()
        write_json(self._file, Registry(versions=entries, last=numbers, handled=handled).model_dump())
        self._handled = handled


def _contents(folder: Path) -> tuple[str, str]:
    """Of an adapter folder: what it computes, and what a router learns from; as it is written now, and as registries of
    before have it. Raises FormatError."""
    adapter = peft.read(folder)
    routing = peft.routing_of(folder)
    also = "" if routing is None else f"+{hashlib.sha256(routing).hexdigest()[:16]}"
    return adapter.digest() + also, adapter.digest_of_format_1() + also


def _alone(path: Path) -> Any:
    """An open file that no other process can lock while it is held. Raises RunError."""
    held = path.open("a")
    try:
        import fcntl
    except ImportError:  # Windows: whoever starts two servers on one folder is on their own
        return held
    try:
        fcntl.flock(held, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        held.close()
        raise RunError(f"{path.parent.parent}: another server serves it: stop that one, or name another") from error
    return held
