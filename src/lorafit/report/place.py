"""The paths of a page and of its pictures. This file imports no large library."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lorafit.errors import RunError
from lorafit.files import require_new
from lorafit.runs.folder import DRAWN


def require_place(folders: Sequence[Path], out: Path) -> None:
    """Raise RunError if two of the folders are the same run, or if `out` is a file that is not a report."""
    twice = [str(folder) for folder, count in Counter(folder.resolve() for folder in folders).items() if count > 1]
    if twice:
        raise RunError(f"{', '.join(twice)}: named more than once: name each run once")
    if not _is_ours(out):
        for path in (out, *(beside(out, name) for name in DRAWN)):
            require_new(path, "--out")


def beside(out: Path, picture: str) -> Path:
    """The path of a picture of the page `out`, in the same folder."""
    return out.with_name(f"{out.stem}-{picture}.png")


def _is_ours(out: Path) -> bool:
    """Whether `out` is a report, which may be overwritten; other files may not."""
    return out.is_file() and 'content="lorafit ' in out.read_text(encoding="utf-8", errors="replace")[:1000]
