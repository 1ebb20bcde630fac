"""Checkpoints: all that a run needs to go on as if it had never stopped, bit for bit."""

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


@dataclass
class Progress:
    """Where a run stands. `history` holds (step, validation NLL); `best` is the master at the best of them.

    seconds: of the steps; beside: of validations and checkpoints. tokens: without padding; trained: those of them that
    carry loss.
    """

    step: int
    history: list[tuple[int, float]]
    best: Tensor
    seconds: float
    beside: float
    tokens: int
    trained: int


def save(path: Path, state: TrainState, optimizer: torch.optim.Optimizer, at: Progress, of: dict[str, Any]) -> None:
    """Replace the checkpoint at `path`, whole or not at all: one safetensors file, what it stands for in its header.

    `of` says which run this is; see `restore`.
    """
    tensors = {"master": state.master.detach(), "best": at.best}
    for name, value in optimizer.state.get(state.master, {}).items():
        tensors[f"optimizer.{name}"] = value
    said = {
        "step": at.step,
        "history": at.history,
        "seconds": at.seconds,
        "beside": at.beside,
        "tokens": at.tokens,
        "trained": at.trained,
        "run": of,
    }
    path.parent.mkdir(exist_ok=True)
    with whole_file(path) as building:
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, building, {"progress": json.dumps(said)})


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Any, Any]]:
    """The open file, and what its header says. Raises FormatError for what is damaged, also while it is read."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file, json.loads(file.metadata()["progress"])
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise FormatError(f"{path}: the checkpoint is damaged ({error}): start anew with another --out") from error


def pace(path: Path) -> tuple[int, float]:
    """Steps that were done, and the seconds that one took, its share of validations and checkpoints among them; (0, 0)
    where there is no checkpoint."""
    if not path.exists():
        return 0, 0.0
    with _opened(path) as (_, said):
        step = int(said["step"])
        return step, (said["seconds"] + said["beside"]) / max(1, step)


def restore(
    path: Path, state: TrainState, optimizer: torch.optim.Optimizer, of: Mapping[str, Any], older: Mapping[str, Any]
) -> Progress:
    """Load the checkpoint into state and optimizer. older: what some of `of` was called by earlier versions.

    Raises RunError listing every difference between the run it was saved in and this one: base, trainable set,
    data, recipe, dtype and threads all take part in the bits of the result.
    """
    with _opened(path) as (file, said):
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
        began, master, best = said["run"], tensors["master"], tensors["best"]
    differences = [
        f"{key}: {began.get(key)!r} when it was saved, {value!r} now"
        for key, value in of.items()
        if began.get(key) not in (value, older.get(key, value))
    ]
    if differences:
        raise RunError(
            f"{path}: saved by another run, going on would be neither\n  "
            + "\n  ".join(differences)
            + "\nrepeat what it began with, or start anew with another --out"
        )
    state.load(master)
    kept = {name.removeprefix("optimizer."): t for name, t in tensors.items() if name.startswith("optimizer.")}
    if kept:
        device = state.master.device
        optimizer.state[state.master] = {name: t.to(device) for name, t in kept.items()}
    history = [(int(step), float(nll)) for step, nll in said["history"]]
    best = best.to(state.master.device)
    return Progress(said["step"], history, best, said["seconds"], said["beside"], said["tokens"], said["trained"])
