"""The run folder: the names of its files, the checks before a process writes there, and what is read from it later."""

from __future__ import annotations

import hashlib
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
from lorafit.runs.summary import RunSummary
from lorafit.runs.tracking import TENSORBOARD, WANDB
from lorafit.settings import TrainSettings, settings_from
from lorafit.version import __version__

RUN, DATA, PLAN, SUMMARY, REPORT = "run.json", "data.json", "plan.json", "summary.json", "report.html"
METRICS, SCORES, CHECKPOINTS, ADAPTER = "metrics.jsonl", "scores", "checkpoints", "adapter"
SEARCH, LADDER, ROUNDS = "search", "ladder", "rounds"
DRAWN = ("curves", "search", "layers", "scores", "examples", "forgetting", "confusion", "reliability")
PICTURES = tuple(f"report-{name}.png" for name in DRAWN)
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
}  # everything that is written into a run folder
LAST = "last.safetensors"  # below CHECKPOINTS
CARD, TRIED = "card.json", "tried.json"  # below SEARCH: the measurements before training; the results of the arms
RUNGS, MOMENTS, WHOLE = "rungs.json", "moments.safetensors", "whole"  # below LADDER; WHOLE is an adapter folder
HISTORY = "history.json"  # below ROUNDS, next to a folder for each round
FIGURES = "figures.json"  # below an accepted round: the numbers of its training
IMPORTANCE, FORGETTING = "importance.json", "forgetting.json"  # below SCORES
ANSWERS, TRAINED_ON, OPENINGS = "answers.jsonl", "trained_on.json", "test_openings.json"  # below SCORES
ONLY_RUNS = "only a run has validation examples: name one, or give --to 25%"  # a message of `lorafit trim`


@dataclass(frozen=True)
class Environment:
    """What a run measures on its machine when it begins. The bits of the result depend on it, so it is written to
    run.json, and a resumed run reads it from there.

    Args:
        dtype: The base's dtype, fp32 or bf16.
        threads: The number of torch's threads.
        apart: `ForwardMode.separate_head`.
        packed: `ForwardMode.packed`.
        micro_tokens: Tokens per forward, by the memory that was free.
        recompute: Whether blocks are computed again for the backward.
        now: The time for the chat template, in ISO 8601; None if the template does not use it.
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
    """Open a new run in `out`, or one that is resumed there.

    It does not check that base and data of a resumed run have the same content, which `require_same` does: their names
    may have changed.

    Args:
        out: The run's folder.
        base_name: The base; None for that of a resumed run.
        data: The data; None for those of a resumed run.
        given: The settings that the user set.
        resume: Whether a run is resumed.

    Returns:
        Base, data, settings, and the environment of a resumed run, None for a new one.

    Raises:
        RunError, SettingsError: The folder or the settings do not fit.
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


def set_by(asked: Mapping[str, Any]) -> str:
    """Who set the settings of a run, for the reasons of its choices. asked: the content of its run.json."""
    return "the demo" if asked.get("demo") else "you"


def require_out(out: Path, resume: bool) -> None:
    """Raise RunError if `out` holds no run to resume, or is not free for a new one. Writes nothing."""
    known = out / RUN
    if resume:
        if not known.exists():
            raise RunError(f"{out}: there is no run to resume here: leave --resume out to begin one")
        if (out / SUMMARY).exists():
            raise RunError(f"{out}: this run is finished: see lorafit show {out}")
        return
    if known.exists():
        state = "finished" if (out / SUMMARY).exists() else "unfinished"
        hint = "" if state == "finished" else " repeat the command with --resume, or"
        raise RunError(f"{out}: holds a run already ({state}):{hint} name another folder with --out")
    if out.exists() and (not out.is_dir() or set(out.iterdir()) - set(left_by_kills(out))):
        raise RunError(f"{out}: is not empty and not a run: name another folder with --out")


def require_run(folder: Path) -> None:
    """Raise RunError if the folder holds no run."""
    if not folder.exists():
        raise RunError(f"{folder}: no run: {did_you_mean(folder, 'name a folder that lorafit train wrote')}")
    if not (folder / RUN).exists():
        raise RunError(f"{folder}: no run: name a folder that lorafit train wrote")


def read_finished(
    folder: Path, otherwise: str = "name a folder that lorafit train wrote"
) -> tuple[dict[str, Any], RunSummary]:
    """The content of run.json, and the summary. Raises RunError if there is no run, with the advice `otherwise`, or if
    the run is not finished."""
    if not (folder / RUN).exists():
        raise RunError(f"{folder}: no run: {otherwise}")
    asked, summary = read_run(folder), read_summary(folder)
    if summary is None:
        raise RunError(f"{folder}: is not finished: end it with lorafit train --resume --out {folder}")
    return asked, summary


def settings_written(settings: TrainSettings) -> dict[str, Any]:
    """The settings as they are written to run.json, with absolute paths."""
    values = settings.model_dump(mode="json")
    return values | {"general": values["general"] and absolute(values["general"])}


def frozen_of(out: Path, asked: Mapping[str, Any]) -> Environment:
    """The environment in the content of run.json. Raises FormatError if it is damaged."""
    try:
        frozen = Environment(**asked["frozen"])
    except TypeError as error:
        raise FormatError(
            f"{out / RUN}: frozen: begun by another version of lorafit, or damaged ({error}): "
            "start again with another --out"
        ) from error
    counts = (frozen.threads, frozen.micro_tokens)
    flags = (frozen.apart, frozen.packed, frozen.recompute)
    whole = all(isinstance(n, int) and n > 0 for n in counts) and all(isinstance(flag, bool) for flag in flags)
    whole = whole and is_time(frozen.now)
    if frozen.dtype not in ("fp32", "bf16") or not whole:
        raise FormatError(f"{out / RUN}: frozen: damaged ({frozen}): start again with another --out")
    return frozen


def left_by_kills(out: Path) -> list[Path]:
    """Temporary files in a run folder from writes that were killed."""
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
    """Remove these files; a run that is killed often would fill the disk with them."""
    for path in left_by_kills(out):
        shutil.rmtree(path) if path.is_dir() else path.unlink()


def require_same(out: Path, now: Mapping[str, Any]) -> None:
    """Raise RunError that names each of these values that differs from the one in run.json."""
    began = read_run(out)
    odd = [
        f"{key}: {began.get(key)} when it began, {value} now" for key, value in now.items() if began.get(key) != value
    ]
    if odd:
        raise RunError(
            f"{out}: cannot be resumed, because something has changed since it began\n  "
            + "\n  ".join(odd)
            + "\nrestore it, or start again with another --out"
        )


@contextmanager
def sole_writer(out: Path) -> Iterator[None]:
    """Lock the run folder `out` against other processes for the length of the block. The lock ends with the process,
    even if it is killed. Without support for locks (on Windows, on some network drives) it does nothing.

    Raises RunError if another process holds the lock.
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
    """Raise RunError if a training into `folder` cannot write `size` bytes. Files that it wrote before it was stopped
    count; the rest must be free."""
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
    """Whether a killed write has left this file, which is removed before the next one."""
    return any(part.startswith(".") for part in path.parts)


@contextmanager
def room_to_write(out: Path) -> Iterator[None]:
    """Turn the errors of a full or missing disk into RunError; the run can be resumed."""
    try:
        yield
    except LorafitError:
        raise
    except (OSError, safetensors.SafetensorError) as error:
        raise RunError(
            f"{out}: could not be written ({error}): make room there; what was saved is intact, and --resume continues"
        ) from error


def read_run(out: Path) -> dict[str, Any]:
    """The content of run.json. Raises FormatError if it is damaged or was not written by lorafit."""
    asked = read_json(out / RUN)
    if not isinstance(asked, dict) or not {"base", "data", "settings", "frozen"} <= set(asked):
        raise FormatError(f"{out / RUN}: not written by lorafit, or damaged: name another folder")
    return asked


def read_summary(out: Path) -> RunSummary | None:
    """The summary of a run; None if it is not finished. Raises FormatError if summary.json is damaged, or if a
    newer version of lorafit wrote it."""
    path = out / SUMMARY
    if not path.exists():
        return None
    found = read_json(path)
    try:
        return RunSummary.from_json(found)
    except FormatError as error:
        raise FormatError(f"{path}: {error}") from error
    except ValueError as error:
        raise FormatError(
            f"{path}: not written by lorafit, or damaged: remove it, and lorafit train --resume "
            f"--out {out} makes it again ({error})"
        ) from error


def versions() -> dict[str, str]:
    """The versions of lorafit and of the libraries that compute its results."""
    import torch  # imported here, because the other functions of this file need no large library
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
        return max((int(done["number"]) for done in rounds if done["accepted"]), default=0)
    except (TypeError, KeyError) as error:
        raise FormatError(f"{path}: damaged ({error}): move the folder {out / ROUNDS} elsewhere") from error


def standing_folder(out: Path) -> Path:
    """The folder of the best adapter's training: that of the last accepted round, or the run's folder."""
    last = accepted_round(out)
    return out / ROUNDS / str(last) if last else out


def count_opening(out: Path) -> int:
    """Count an opening of the run's test split in its folder; returns how often it has been opened."""
    count = openings(out) + 1
    (out / SCORES).mkdir(exist_ok=True)
    write_json(out / SCORES / OPENINGS, {"openings": count})
    return count


def openings(out: Path) -> int:
    """How often the run's test split has been opened."""
    path = out / SCORES / OPENINGS
    return int(read_json(path)["openings"]) if path.exists() else 0


def remember_questions(out: Path, questions: Sequence[str]) -> None:
    """Store the fingerprint of each question that the run was trained or validated on."""
    write_json(out / SCORES / TRAINED_ON, [_print(question) for question in questions])


def remembered(out: Path, questions: Sequence[str]) -> list[bool] | None:
    """Whether the run was trained or validated on each of the questions; None if there is no run."""
    known = out / SCORES / TRAINED_ON
    if not known.exists():
        return None
    trained = set(read_json(known))
    return [_print(question) in trained for question in questions]


def _print(question: str) -> str:
    return hashlib.sha256(" ".join(question.lower().split()).encode()).hexdigest()[:16]
