"""Where a page and its pictures go. Nothing of weight is imported here."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from lorafit.errors import RunError
from lorafit.files import require_new

PICTURES = ("curves", "search", "layers", "scores", "examples", "forgetting")


def require_place(folders: Sequence[Path], out: Path) -> None:
    """Raise RunError where two of the names are one run, and where `out` is anything else than a page of ours."""
    twice = [str(folder) for folder, count in Counter(folder.resolve() for folder in folders).items() if count > 1]
    if twice:
        raise RunError(f"{', '.join(twice)}: named more than once: name each run once")
    if not _is_ours(out):
        for path in (out, *(beside(out, name) for name in PICTURES)):
            require_new(path, "--out")


def beside(out: Path, picture: str) -> Path:
    """The file of a picture of the page `out`."""
    return out.with_name(f"{out.stem}-{picture}.png")


def _is_ours(out: Path) -> bool:
    """Whether a page of ours is there, which may be written anew; anything else is not written over."""
    return out.is_file() and 'content="lorafit ' in out.read_text(encoding="utf-8", errors="replace")[:1000]
