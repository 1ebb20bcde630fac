"""Files are written whole or not at all: to a temporary name beside the target, then renamed, and kept on the disk."""

from __future__ import annotations

import ctypes
import difflib
import glob
import hashlib
import json
import os
import re
import shutil
import tempfile
import time
from collections.abc import Collection, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from lorafit.errors import FormatError, RunError, SettingsError

STATUS = Path("/proc/self/status")  # where Linux tells the umask
PROBE = "probe"  # of a folder that is tried
WAIT, TRIES = 0.1, 10  # seconds, and how many times, that a writer has between the two renames of a folder


def did_you_mean(path: Path, otherwise: str) -> str:
    """What to do about a path that is not there: the nearest names of its folder, or `otherwise`."""
    folder = path.parent
    if not folder.is_dir():
        return f"check the path, there is no folder {folder} either"
    try:
        near = difflib.get_close_matches(path.name, [one.name for one in folder.iterdir()], 2, 0.7)
    except OSError:  # a folder that cannot be listed
        near = []
    return f"did you mean {' or '.join(str(folder / name) for name in near)}?" if near else otherwise


def absolute(name: str) -> str:
    """A path that is there, from the root on; any other name as it is."""
    path = Path(name).expanduser()
    return str(path.absolute()) if path.exists() else name


def _umask() -> int:
    """What the user keeps from others: temporary files are made private, and must end as plainly written ones would.
    It is not asked by setting it, which would make private what other threads write meanwhile."""
    with suppress(OSError):
        status = STATUS.read_text(encoding="utf-8", errors="replace")
        if told := re.search(r"^Umask:\s*([0-7]+)$", status, re.MULTILINE):
            return int(told[1], 8)
    with tempfile.TemporaryDirectory() as folder:  # elsewhere it shows in what is made
        made = Path(folder) / PROBE
        made.mkdir(0o777)
        return ~made.stat().st_mode & 0o777


def _keep(path: Path) -> None:
    """Have the bytes of a file, or the names in a folder, on the disk, where a power cut does not reach them."""
    if path.is_dir():
        with suppress(OSError):  # Windows opens no folder, and some network drives keep none
            handle = os.open(path, os.O_RDONLY)
            try:
                os.fsync(handle)
            finally:
                os.close(handle)
        return
    with path.open("rb+") as file:
        os.fsync(file.fileno())


@contextmanager
def whole_file(path: Path, mode: int = 0o666) -> Iterator[Path]:
    """A temporary file that becomes `path` when the block ends well, and vanishes when it does not. mode: who may do
    what with it, less what the user keeps from others."""
    handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    os.close(handle)
    building = Path(name)
    try:
        yield building
        _keep(building)
        building.chmod(mode & ~_umask())
        building.replace(path)
        _keep(path.parent)
    finally:
        building.unlink(missing_ok=True)


def unfinished(folder: Path, names: Collection[str]) -> list[Path]:
    """What killed writers of `names` have left in `folder`: temporary files and folders that never took their name.

    A folder that was moved aside, and whose name nothing has taken since, is no such thing: it gets its name back.
    """
    ours = re.compile(rf"\.({'|'.join(map(re.escape, names))})\.\w{{8}}(\.old)?")
    paths = list(folder.iterdir()) if folder.is_dir() else []
    found = [(path, match) for path in paths if (match := ours.fullmatch(path.name))]
    for path, match in found:
        if match[2] and not (folder / match[1]).exists():
            path.rename(folder / match[1])
    return [path for path, _ in found if path.exists()]


def put_back(folder: Path) -> None:
    """Where a killed writer has moved `folder` aside, give it its name back, for who is going to read it. A writer that
    is at work gives it the name within a moment, and is waited for."""
    folder = folder.resolve()
    for _ in range(TRIES):
        if folder.exists() or not any(folder.parent.glob(f".{glob.escape(folder.name)}.*.old")):
            return
        time.sleep(WAIT)
    with suppress(OSError):  # a disk that is only read, where it stays for who can write
        unfinished(folder.parent, [folder.name])


def write_text(path: Path, text: str, mode: int = 0o666) -> None:
    """Write `text` as UTF-8 to `path`, whole or not at all. mode: as of whole_file."""
    with whole_file(path, mode) as building:
        building.write_text(text, encoding="utf-8", newline="\n")


def write_json(path: Path, value: Any) -> None:
    """Write `value` as indented JSON to `path`, whole or not at all. Not-a-number is refused."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False) + "\n")


def read_json(path: Path) -> Any:
    """The JSON value in `path`; a FormatError says where it breaks off."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise FormatError(f"{path}: there is no such file: {did_you_mean(path, 'check the path')}") from error
    except OSError as error:
        raise FormatError(f"{path}: cannot be read ({error.strerror}): check its permissions") from error
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise FormatError(f"{path}: not JSON ({error}): write the file again, it is damaged") from error


@contextmanager
def whole_folder(target: Path) -> Iterator[Path]:
    """A temporary folder that becomes `target` when the block ends well, and vanishes when it does not.

    An existing `target` and its replacement change names in one step where the system can (Linux). Elsewhere it is
    moved aside first, and put back if its replacement cannot take the name; `unfinished` and `put_back` do so after a
    kill.
    Raises RunError, before anything is built, where `target` is a file.
    """
    target = target.resolve()  # what a link leads to is replaced, and not the link
    if target.exists() and not target.is_dir():
        raise RunError(f"{target}: a file, not a folder: name another folder, or move the file away")
    target.parent.mkdir(parents=True, exist_ok=True)
    building = Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    old = building.with_name(building.name + ".old")
    try:
        yield building
        for path in (building, *building.rglob("*")):
            path.chmod((0o777 if path.is_dir() else 0o666) & ~_umask())
            _keep(path)
        if target.exists() and _exchanged(building, target):
            _keep(target.parent)
            return
        if target.exists():
            target.rename(old)
        try:
            building.rename(target)
        except OSError:
            if not target.exists():
                old.rename(target)
            elif target.is_dir():
                return  # another process made the same folder at the same moment
            raise
        _keep(target.parent)
    finally:
        shutil.rmtree(building, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _exchanged(one: Path, other: Path) -> bool:
    """Have two paths change names in one step, which no kill can halve; False where system or disk cannot."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError, TypeError):  # not Linux, or an old library
        return False
    here, exchange = -100, 2  # AT_FDCWD, RENAME_EXCHANGE
    return bool(renameat2(here, os.fsencode(one), here, os.fsencode(other), exchange) == 0)


def make_folder(path: Path, flag: str = "--out") -> None:
    """Make `path` and prove that it can be written; a RunError says why it cannot, and which flag names another."""
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe, name = tempfile.mkstemp(prefix=f".{PROBE}.", dir=path)
        os.close(probe)
        Path(name).unlink()
    except OSError as error:
        reason = error.strerror or error
        raise RunError(f"{path}: cannot be written ({reason}): name another folder with {flag}") from error


def text_of(path: Path, flag: str) -> str:
    """The text of a file that `flag` names. Raises SettingsError where it cannot be read."""
    try:
        return path.read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise SettingsError(f"{flag} {path}: there is no such file: {did_you_mean(path, 'check the path')}") from error
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(f"{flag} {path}: cannot be read as text in UTF-8 ({error}): name another") from error


def require_new(path: Path, flag: str) -> None:
    """Prove that a file can be written to `path`, where nothing may be yet; a RunError says why it cannot."""
    if path.is_dir():
        raise RunError(f"{path}: a folder: name a file in it with {flag}")
    if path.exists():
        raise RunError(f"{path}: is there already, and would be lost: name another file with {flag}")
    make_folder(path.parent, flag)


def require_new_folder(path: Path, flag: str) -> None:
    """The same of a folder, where nothing of the name may be yet."""
    if path.exists():
        raise RunError(f"{path}: is there already, and would be lost: name another folder with {flag}")
    make_folder(path.parent, flag)


def sha256_file(path: Path) -> str:
    """Hexadecimal SHA-256 of the bytes of one file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def shown(size: int) -> str:
    """Bytes as people read them."""
    return f"{size / 1e9:.2f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def free_bytes(folder: Path) -> int:
    """Room on the disk where `folder` is, or will be."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
