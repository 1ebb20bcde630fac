"""The demo: trains on the built-in base and data, and adds the recorded scores of the control to the summary."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from lorafit.data.reading import BUILTIN, BUILTIN_FOLDER
from lorafit.errors import FormatError, Interrupted, RunError
from lorafit.files import read_json, write_json
from lorafit.runs.folder import RUN, SUMMARY, WRITTEN, left_by_kills, require_out, sole_writer
from lorafit.runs.summary import RunSummary

if TYPE_CHECKING:
    from lorafit.jobs.listener import Listener

BASE = "smollm2-135m"
# The rules choose everything else. Rate and rank were tested once (docs/log.md); a search would take minutes.
SETTINGS = {"system": "Help desk", "search": "none", "rank": 8}


def run_demo(out: str | Path, listener: Listener) -> RunSummary:
    """Run the demo in the folder `out`. A finished demo there is replaced; a stopped one is resumed."""
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
        listener.say(f"resuming the demo that was stopped in {out}")
    try:
        result = run_training(BASE, BUILTIN, out, SETTINGS, resume=resume, listener=listener, extra={"demo": True})
    except Interrupted as error:
        raise Interrupted(str(error).replace(RESUME_HINT, "repeat the command to continue")) from None
    summary, control = RunSummary.from_json(result), read_json(BUILTIN_FOLDER / "control.json")
    summary = replace(summary, facts=replace(summary.facts, shuffled_control=control["facts"]))
    write_json(out / SUMMARY, summary.to_json())
    return summary


def require_demo(out: Path) -> None:
    """Raise RunError unless `out` is free or holds only a demo. Writes nothing."""
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
        raise RunError(
            f"{out}: holds {', '.join(strange[:5])} in addition to an earlier demo: move it, or name another --out"
        )


def _earlier(out: Path, listener: Listener) -> bool:
    """Remove a finished demo from `out`; returns whether `out` holds an unfinished one, which can be resumed."""
    if not _is_demo(out):
        return False
    if not (out / SUMMARY).exists():
        return True
    _require_nothing_else(out)
    listener.say(f"replacing the earlier demo in {out}")
    for path in out.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return False
