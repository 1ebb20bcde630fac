"""The run folder: what is in it, who may write there, and what is asked of it later."""

from __future__ import annotations

import hashlib
import json
import os
import platform
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import safetensors

from lorafit.adapters.rendering import is_time
from lorafit.errors import FormatError, LorafitError, RunError, SettingsError
from lorafit.files import (
    PROBE,
    absolute,
    did_you_mean,
    free_bytes,
    make_folder,
    read_json,
    shown,
    unfinished,
    write_json,
)
from lorafit.runs.tracking import TENSORBOARD, WANDB
from lorafit.settings import TrainSettings, settings_from
from lorafit.version import __version__

RUN, DATA, PLAN, SUMMARY, REPORT = "run.json", "data.json", "plan.json", "summary.json", "report.html"
METRICS, SCORES, CHECKPOINTS, ADAPTER = "metrics.jsonl", "scores", "checkpoints", "adapter"
SEARCH, LADDER, ROUNDS = "search", "ladder", "rounds"
PICTURES = tuple(f"report-{name}.png" for name in ("curves", "search", "layers", "scores", "examples", "forgetting"))
WRITTEN = {
    RUN,
    DATA,
    PLAN,
    SUMMARY,
    REPORT,
    METRICS,
    SCORES,
    CHECKPOINTS,
    ADAPTER,
    SEARCH,
    LADDER,
    ROUNDS,
    TENSORBOARD,
    WANDB,
    *PICTURES,
}  # all in a run folder
LAST = "last.safetensors"  # below CHECKPOINTS
CARD, TRIED = "card.json", "tried.json"  # below SEARCH: what was measured before; what each arm came to
RUNGS, MOMENTS, WHOLE = "rungs.json", "moments.safetensors", "whole"  # below LADDER; WHOLE is an adapter folder
HISTORY = "history.json"  # below ROUNDS, beside a folder for each round
FIGURES = "figures.json"  # below an accepted round: what its training came to
IMPORTANCE, FORGETTING = "importance.json", "forgetting.json"  # below SCORES
ANSWERS, TRAINED_ON, OPENINGS = "answers.jsonl", "trained_on.json", "test_openings.json"  # below SCORES
SCORED = {  # what a summary says at least, with the parts it has
    "nll": {"base", "adapter", "difference", "ci95"},
    "facts": {
        "base",
        "base_few_shot",
        "adapter",
        "shuffled_control",
        "ci95",
        "ci95_base",
        "ci95_base_few_shot",
        "n",
        "few_shot_examples",
    },
    "seconds": {"train"},
}
SAID = {
    "n_test",
    "n_train",
    "off_desk_declined",
    "natural_stops",
    "samples",
    "trainable_parameters",
    "best_step",
    "steps",
    "tokens_per_second",
    "base_unchanged",
    "adapter_dir",
    "base",
    *SCORED,
}


ONLY_RUNS = "only a run has validation examples: name one, or give --to 25%"  # to whoever trims


@dataclass(frozen=True)
class Environment:
    """What a run found out about its machine when it began, once: all of it takes part in the bits of the result.

    It is in run.json, and a run that is gone on with takes it from there, whatever would be found out by then.
    dtype: of the base, fp32 or bf16. threads: torch's. apart, packed: how the base may be run (`tasks.completion.Way`).
    micro_tokens, recompute: how much is run at a time and whether blocks are computed twice, by the memory there was.
    now: the time that the chat template is told, in ISO 8601; None where it asks for none.
    """

    dtype: str
    threads: int
    apart: bool
    packed: bool
    micro_tokens: int
    recompute: bool
    now: str | None = None


def open_run(
    out: Path, base_name: str | None, data: str | None, given: Mapping[str, Any], resume: bool
) -> tuple[str, str, TrainSettings, Environment | None]:
    """Base, data and settings of a new run in `out`, or of the one that is resumed there with what it has frozen.

    Raises RunError or SettingsError. That base and data hold what they held is for `require_same`: their names may be
    others.
    """
    if resume:
        require_out(out, resume)
        asked = read_run(out)
        stored = settings_from(asked["settings"])
        now, began = settings_written(settings_from(given)), settings_written(stored)
        odd = [f"{key}: {began[key]!r} when it began, {now[key]!r} now" for key in given if began[key] != now[key]]
        if odd:
            raise SettingsError(f"{out}: not the run that is here: " + "; ".join(odd) + ": leave these out")
        return base_name or asked["base"], data or asked["data"], stored, frozen_of(out, asked)
    if base_name is None or data is None:
        raise SettingsError("a new run needs a base and data: name both")
    require_out(out, resume)
    settings = settings_from(given)
    make_folder(out)
    return base_name, data, settings, None


def require_out(out: Path, resume: bool) -> None:
    """Raise RunError where `out` holds no run that could be resumed, or is not free for a new one. Writes nothing."""
    known = out / RUN
    if resume:
        if not known.exists():
            raise RunError(f"{out}: there is no run to resume here: leave --resume out to begin one")
        if (out / SUMMARY).exists():
            raise RunError(f"{out}: this run is finished: see lorafit show {out}")
        return
    if known.exists():
        state = "finished" if (out / SUMMARY).exists() else "unfinished"
        hint = "" if state == "finished" else " go on with --resume, or"
        raise RunError(f"{out}: holds a run already ({state}):{hint} name another folder with --out")
    if out.exists() and (not out.is_dir() or set(out.iterdir()) - set(left_by_kills(out))):
        raise RunError(f"{out}: is not empty and not a run: name another folder with --out")


def require_run(folder: Path) -> None:
    """Raise RunError where a folder holds no run."""
    if not folder.exists():
        raise RunError(f"{folder}: no run: {did_you_mean(folder, 'name a folder that lorafit train wrote')}")
    if not (folder / RUN).exists():
        raise RunError(f"{folder}: no run: name a folder that lorafit train wrote")


def read_finished(
    folder: Path, otherwise: str = "name a folder that lorafit train wrote"
) -> tuple[dict[str, Any], dict[str, Any]]:
    """run.json and summary.json of a run. Raises RunError where it is not finished, or none; otherwise: what to do
    then."""
    if not (folder / RUN).exists():
        raise RunError(f"{folder}: no run: {otherwise}")
    asked, summary = read_run(folder), read_summary(folder)
    if summary is None:
        raise RunError(f"{folder}: is not finished: end it with lorafit train --resume --out {folder}")
    return asked, summary


def settings_written(settings: TrainSettings) -> dict[str, Any]:
    """Settings as they go into run.json: a file by its absolute path."""
    said = settings.model_dump(mode="json")
    return said | {"general": said["general"] and absolute(said["general"])}


def frozen_of(out: Path, asked: Mapping[str, Any]) -> Environment:
    """What the run in `out` has frozen. Raises FormatError for what is not whole."""
    try:
        frozen = Environment(**asked["frozen"])
    except TypeError as error:
        raise FormatError(
            f"{out / RUN}: frozen: begun by another version of lorafit, or damaged ({error}): "
            "start anew with another --out"
        ) from error
    counts = (frozen.threads, frozen.micro_tokens)
    flags = (frozen.apart, frozen.packed, frozen.recompute)
    whole = all(isinstance(n, int) and n > 0 for n in counts) and all(isinstance(flag, bool) for flag in flags)
    whole = whole and is_time(frozen.now)
    if frozen.dtype not in ("fp32", "bf16") or not whole:
        raise FormatError(f"{out / RUN}: frozen: damaged ({frozen}): start anew with another --out")
    return frozen


def left_by_kills(out: Path) -> list[Path]:
    """Temporary files of writes into a run folder that were killed: they are of no use to anyone."""
    written = (
        (out, {*WRITTEN, PROBE}),
        (out / CHECKPOINTS, {LAST}),
        (out / SEARCH, {CARD, TRIED}),
        (out / SCORES, {ANSWERS, TRAINED_ON, OPENINGS, IMPORTANCE, FORGETTING}),
        (out / LADDER, {RUNGS, MOMENTS, WHOLE}),
        (out / ROUNDS, {HISTORY}),
        *((folder, {PLAN, FIGURES, ADAPTER, LADDER, METRICS}) for folder in (out / ROUNDS).glob("[0-9]*")),
    )
    return [path for folder, names in written for path in unfinished(folder, names)]


def clear_left_by_kills(out: Path) -> None:
    """Remove them, or a run that is killed often would fill the disk."""
    for path in left_by_kills(out):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def require_same(out: Path, now: Mapping[str, Any]) -> None:
    """Raise RunError naming what differs from what the run in `out` began with."""
    began = read_run(out)
    odd = [
        f"{key}: {began.get(key)} when it began, {value} now" for key, value in now.items() if began.get(key) != value
    ]
    if odd:
        raise RunError(
            f"{out}: cannot go on, for something has changed since\n  "
            + "\n  ".join(odd)
            + "\nrestore it, or start anew with another --out"
        )


@contextmanager
def sole_writer(out: Path) -> Iterator[None]:
    """Keep other processes from writing into the run folder `out` for the length of the block; a process that is killed
    keeps nobody out. Where the system or the disk knows no locks (Windows, some network drives) nobody is kept out.

    Raises RunError where another process is at work there.
    """
    try:
        import fcntl
    except ImportError:
        yield
        return
    handle = os.open(out, os.O_RDONLY)
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunError(
                f"{out}: another process is at work in this run: stop it with Ctrl-C there, which "
                "saves, or leave this folder to it until it has ended"
            ) from None
        except OSError:
            pass
        yield
    finally:
        os.close(handle)


def require_disk(folder: Path, size: int) -> None:
    """Raise RunError where a training into `folder` cannot take up `size` bytes: what it wrote before it was stopped is
    there already, the rest must be free."""
    files = (path for name in (CHECKPOINTS, LADDER, ADAPTER) for path in (folder / name).rglob("*") if path.is_file())
    there = sum(path.stat().st_size for path in files if not _is_temporary(path.relative_to(folder)))
    free = free_bytes(folder)
    if size - there > free:
        more = " more" if there else ""
        raise RunError(
            f"{folder}: this run writes up to {shown(size - there)}{more}, and {shown(free)} are free on "
            "that disk: make room, name another disk with --out, or train less with --rank or "
            "--targets"
        )


def _is_temporary(path: Path) -> bool:
    """Whether a write that was killed has left it, which is removed before the next."""
    return any(part.startswith(".") for part in path.parts)


@contextmanager
def room_to_write(out: Path) -> Iterator[None]:
    """Turn a full or vanished disk into a RunError: what was written before is whole, and the run can go on."""
    try:
        yield
    except LorafitError:
        raise
    except (OSError, safetensors.SafetensorError) as error:
        raise RunError(
            f"{out}: could not be written ({error}): make room there; what was saved is whole, --resume goes on"
        ) from error


def read_run(out: Path) -> dict[str, Any]:
    """run.json of a run folder. Raises FormatError where it is not one of ours."""
    asked = read_json(out / RUN)
    if not isinstance(asked, dict) or not {"base", "data", "settings", "frozen"} <= set(asked):
        raise FormatError(f"{out / RUN}: not written by lorafit, or damaged: name another folder")
    return asked


def read_summary(out: Path) -> dict[str, Any] | None:
    """summary.json of a run folder, None before the run has come so far. Raises FormatError for a damaged one."""
    path = out / SUMMARY
    if not path.exists():
        return None
    found = read_json(path)
    whole = isinstance(found, dict) and set(found) >= SAID
    if not whole or not all(isinstance(found[key], dict) and set(found[key]) >= parts for key, parts in SCORED.items()):
        raise FormatError(
            f"{path}: not written by lorafit, or damaged: remove it, and lorafit train --resume "
            f"--out {out} makes it anew"
        )
    return dict(found)


def versions() -> dict[str, str]:
    """Of lorafit and what computes its results."""
    import torch  # of weight: whether a folder holds a run is told without them
    import transformers

    return {
        "lorafit": __version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
    }


def accepted_round(out: Path) -> int:
    """The number of the last round whose adapter was better; 0 where there is none."""
    path = out / ROUNDS / HISTORY
    rounds = read_json(path) if path.exists() else []
    try:
        return max((int(one["number"]) for one in rounds if one["accepted"]), default=0)
    except (TypeError, KeyError) as error:
        raise FormatError(f"{path}: damaged ({error}): move the folder {out / ROUNDS} elsewhere") from error


def standing_folder(out: Path) -> Path:
    """The folder of the training whose adapter stands: that of the last accepted round, or the run's own."""
    last = accepted_round(out)
    return out / ROUNDS / str(last) if last else out


def count_opening(out: Path) -> int:
    """How often the test split of this run has been opened, this time included; kept in the run folder."""
    count = openings(out) + 1
    (out / SCORES).mkdir(exist_ok=True)
    write_json(out / SCORES / OPENINGS, {"openings": count})
    return count


def openings(out: Path) -> int:
    """How often the test split of this run has been opened so far."""
    path = out / SCORES / OPENINGS
    return int(read_json(path)["openings"]) if path.exists() else 0


def tested(out: Path) -> frozenset[str]:
    """Fingerprints of the test examples of this run; none where there is no run, or it has not been tested."""
    path = out / SCORES / ANSWERS
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    try:
        return frozenset(json.loads(line)["example"] for line in lines)
    except (ValueError, KeyError, TypeError) as error:
        raise FormatError(
            f"{path}: damaged ({error}): move it elsewhere, and looks at this test are counted no more"
        ) from error


def remember_questions(out: Path, questions: Sequence[str]) -> None:
    """Keep a fingerprint of each question a run was trained or validated on."""
    write_json(out / SCORES / TRAINED_ON, [_print(question) for question in questions])


def remembered(out: Path, questions: Sequence[str]) -> list[bool] | None:
    """Whether the run was trained or validated on each of the questions; None where there is no run."""
    known = out / SCORES / TRAINED_ON
    if not known.exists():
        return None
    trained = set(read_json(known))
    return [_print(question) in trained for question in questions]


def _print(question: str) -> str:
    return hashlib.sha256(" ".join(question.lower().split()).encode()).hexdigest()[:16]
