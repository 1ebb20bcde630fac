"""Checkpoints: files from which a stopped run is resumed with the same bits as if it had never stopped."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from lorafit.adapters.state import TrainState
from lorafit.errors import FormatError, RunError
from lorafit.files import whole_file

DERIVED = {"task", "trainable", "start", "way", "order"}  # what lorafit derives from a run's base, rows and settings


@dataclass
class Progress:
    """The progress of a training.

    Args:
        step: Steps that are done.
        history: (step, validation NLL) of every validation.
        best: The master at the best validation.
        seconds: Time of the steps.
        overhead: Seconds of validations and checkpoints.
        tokens: Tokens of the steps, without padding.
        trained: Those of them that count in the loss.
    """

    step: int
    history: list[tuple[int, float]]
    best: Tensor
    seconds: float
    overhead: float
    tokens: int
    trained: int


def save(path: Path, state: TrainState, optimizer: torch.optim.Optimizer, at: Progress, of: dict[str, Any]) -> None:
    """Replace the checkpoint at `path` atomically, by one safetensors file with the progress in its header.

    Args:
        path: The file.
        state: The trained factors.
        optimizer: The optimizer, with its moments.
        at: The progress.
        of: Everything that identifies the run; `restore` compares it.
    """
    tensors = {"master": state.master.detach(), "best": at.best}
    for name, value in optimizer.state.get(state.master, {}).items():
        tensors[f"optimizer.{name}"] = value
    progress = {
        "step": at.step,
        "history": at.history,
        "seconds": at.seconds,
        "beside": at.overhead,
        "tokens": at.tokens,
        "trained": at.trained,
        "run": of,
    }
    path.parent.mkdir(exist_ok=True)
    with whole_file(path) as building:
        content = {name: tensor.cpu().contiguous() for name, tensor in tensors.items()}
        save_file(content, building, {"progress": json.dumps(progress)})


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The open file and the progress in its header. Raises FormatError if it is damaged, also while it is read."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file, json.loads(file.metadata()["progress"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path}: the checkpoint is damaged ({error}): start again with another --out") from error


def pace(path: Path) -> tuple[int, float]:
    """The steps that are done, and the mean seconds of one with its share of validations and checkpoints; (0, 0) if
    there is no checkpoint."""
    if not path.exists():
        return 0, 0.0
    with _opened(path) as (_, progress):
        step = int(progress["step"])
        return step, (progress["seconds"] + progress["beside"]) / max(1, step)


def restore(
    path: Path, state: TrainState, optimizer: torch.optim.Optimizer, of: Mapping[str, Any], older: Mapping[str, Any]
) -> Progress:
    """Load the checkpoint into state and optimizer; returns the progress.

    Args:
        path: The file.
        state: Receives the factors.
        optimizer: Receives its moments.
        of: Everything that identifies this run: base, trainable set, data, recipe, dtype, threads and whatever else the
            bits of the result depend on.
        older: Values that earlier versions wrote for some entries of `of`, and that are accepted as well.

    Raises:
        RunError: The checkpoint is of a run that differs in `of`; every difference is listed.
    """
    with _opened(path) as (file, progress):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        began, master, best = progress["run"], tensors["master"], tensors["best"]
    differing = {
        key: f"{key}: {began.get(key)!r} when it was saved, {value!r} now"
        for key, value in of.items()
        if began.get(key) not in (value, older.get(key, value))
    }
    if differing:
        if differing.keys() <= DERIVED:
            why = (
                "saved by another version of lorafit, or with another adapter, although base, rows and recipe are equal"
            )
            fix = "end it with that version, or with that adapter"
        else:
            why, fix = (
                "saved by a run with other inputs, which cannot be resumed with these",
                "restore what it began with",
            )
        raise RunError(
            f"{path}: {why}\n  " + "\n  ".join(differing.values()) + f"\n{fix}, or start again with another --out"
        )
    state.load(master)
    kept = {name.removeprefix("optimizer."): t for name, t in tensors.items() if name.startswith("optimizer.")}
    if kept:
        device = state.master.device
        optimizer.state[state.master] = {name: t.to(device) for name, t in kept.items()}
    history = [(int(step), float(nll)) for step, nll in progress["history"]]
    best = best.to(state.master.device)
    numbers = (progress[name] for name in ("seconds", "beside", "tokens", "trained"))
    return Progress(progress["step"], history, best, *numbers)
