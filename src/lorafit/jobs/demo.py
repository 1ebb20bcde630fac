"""The demo: the main job on the built-in base and data, with the recorded control beside it."""

from __future__ import annotations

import shutil
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from lorafit.data.reading import BUILTIN, BUILTIN_FOLDER
from lorafit.errors import FormatError, Interrupted, RunError
from lorafit.files import read_json, write_json
from lorafit.jobs.listener import Listener
from lorafit.jobs.train import run_training
from lorafit.runs.folder import RUN, SUMMARY, WRITTEN, left_by_kills, sole_writer
from lorafit.training.loop import RESUME_HINT

BASE = "smollm2-135m"
# The rest is left to the rules. Rate and rank were found good for it once (docs/log.md): a search would take minutes.
SETTINGS = {"system": "Help desk", "search": "none", "rank": 8}


def run_demo(out: Path, listener: Listener) -> dict[str, Any]:
    """Run it into `out`, replacing an earlier demo there; an interrupted one is gone on with."""
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


def _earlier(out: Path, listener: Listener) -> bool:
    """Clear a finished demo from `out`, and nothing else; whether an unfinished one is there to go on with."""
    try:
        asked = read_json(out / RUN)
    except FormatError:
        return False
    if not isinstance(asked, dict) or not asked.get("demo"):
        return False
    if not (out / SUMMARY).exists():
        return True
    left = left_by_kills(out)
    strange = sorted(path.name for path in out.iterdir() if path.name not in WRITTEN and path not in left)
    if strange:
        raise RunError(f"{out}: holds {', '.join(strange[:5])} beside an earlier demo: move it, or name another --out")
    listener.say(f"replacing the earlier demo in {out}")
    for path in out.iterdir():
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    return False
