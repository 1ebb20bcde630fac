"""The demo: the main job on the built-in base and data, with the recorded control beside it."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lorafit.data.reading import BUILTIN, BUILTIN_FOLDER
from lorafit.errors import FormatError, Interrupted, RunError
from lorafit.files import read_json, write_json
from lorafit.runs.folder import RUN, SUMMARY, WRITTEN, left_by_kills, require_out, sole_writer

if TYPE_CHECKING:
    from lorafit.jobs.listener import Listener

BASE = "smollm2-135m"
# The rest is left to the rules. Rate and rank were found good for it once (docs/log.md): a search would take minutes.
SETTINGS = {"system": "Help desk", "search": "none", "rank": 8}


def run_demo(out: str | Path, listener: Listener) -> dict[str, Any]:
    """Run it into `out`, replacing an earlier demo there; an interrupted one is gone on with."""
    from lorafit.jobs.train import run_training
    from lorafit.training.loop import RESUME_HINT

    out = Path(out)
    listener.say(
        "Tarnwick Supply, a company invented for this demo, has a help desk for IT support, returns and product "
        "advice. The base has never heard of it; the adapter learns its handbook."
    )
    with sole_writer(out) if out.is_dir() else nullcontext():
        resume = _earlier(out, listener)
    if resume:
        listener.say(f"going on with the demo that was stopped in {out}")
    try:
        summary = run_training(BASE, BUILTIN, out, SETTINGS, resume=resume, listener=listener, extra={"demo": True})
    except Interrupted as error:
        raise Interrupted(str(error).replace(RESUME_HINT, "type the same again and it goes on")) from None
    control = read_json(BUILTIN_FOLDER / "control.json")
    summary["facts"]["shuffled_control"] = control["facts"]
    write_json(out / SUMMARY, summary)
    return summary


def require_demo(out: Path) -> None:
    """Raise RunError where `out` is neither free, nor holds a demo alone. Nothing is written."""
    if not _is_demo(out):
        require_out(out, False)
    elif (out / SUMMARY).exists():
        _require_nothing_else(out)


def _is_demo(out: Path) -> bool:
    try:
        asked = read_json(out / RUN)
    except FormatError:
        return False
    return isinstance(asked, dict) and bool(asked.get("demo"))


def _require_nothing_else(out: Path) -> None:
    left = left_by_kills(out)
    strange = sorted(path.name for path in out.iterdir() if path.name not in WRITTEN and path not in left)
    if strange:
        raise RunError(f"{out}: holds {', '.join(strange[:5])} beside an earlier demo: move it, or name another --out")


def _earlier(out: Path, listener: Listener) -> bool:
    """Clear a finished demo from `out`, and nothing else; whether an unfinished one is there to go on with."""
    if not _is_demo(out):
        return False
    if not (out / SUMMARY).exists():
        return True
    _require_nothing_else(out)
    listener.say(f"replacing the earlier demo in {out}")
    for path in out.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return False
