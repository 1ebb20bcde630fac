"""Checkpoints: all that a run needs to go on as if it had never stopped, bit for bit."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorafit.errors import FormatError, RunError
from lorafit.files import read_json, whole_folder, write_json
from lorafit.training.state import TrainState


@dataclass
class Progress:
    """Where a run stands. `history` holds (step, validation NLL); `best` is the master at the best of them.

    seconds, tokens, trained: of training alone; tokens without padding, and those of them that carry loss.
    """

    step: int
    history: list[tuple[int, float]]
    best: Tensor
    seconds: float
    tokens: int
    trained: int


def save(folder: Path, state: TrainState, optimizer: torch.optim.Optimizer, at: Progress, of: dict[str, Any]) -> None:
    """Replace the checkpoint in `folder`, whole or not at all. `of` says which run this is; see `restore`."""
    tensors = {"master": state.master.detach(), "best": at.best}
    for name, value in optimizer.state.get(state.master, {}).items():
        tensors[f"optimizer.{name}"] = value
    with whole_folder(folder) as building:
        save_file({name: t.cpu().contiguous() for name, t in tensors.items()}, building / "state.safetensors")
        said = {"step": at.step, "history": at.history, "seconds": at.seconds, "tokens": at.tokens, "trained": at.trained, "run": of}
        write_json(building / "progress.json", said)


def restore(folder: Path, state: TrainState, optimizer: torch.optim.Optimizer, of: dict[str, Any]) -> Progress:
    """Load the checkpoint into state and optimizer.

    Raises RunError listing every difference between the run it was saved in and this one: base, trainable set,
    data, recipe, dtype and threads all take part in the bits of the result.
    """
    said = read_json(folder / "progress.json")
    differences = [
        f"{key}: {said['run'].get(key)!r} when it was saved, {value!r} now"
        for key, value in of.items()
        if said["run"].get(key) != value
    ]
    if differences:
        raise RunError(
            f"{folder}: saved by another run, going on would be neither\n  "
            + "\n  ".join(differences)
            + "\nrepeat the settings it began with, or start anew with another --out"
        )
    try:
        tensors = load_file(folder / "state.safetensors")
    except (SafetensorError, OSError) as error:
        raise FormatError(f"{folder}: the checkpoint is damaged ({error}): start anew with another --out") from error
    state.load(tensors["master"])
    kept = {name.removeprefix("optimizer."): t for name, t in tensors.items() if name.startswith("optimizer.")}
    if kept:
        device = state.master.device
        optimizer.state[state.master] = {k: v.to(device) for k, v in kept.items()}
    history = [(int(step), float(nll)) for step, nll in said["history"]]
    return Progress(said["step"], history, tensors["best"], said["seconds"], said["tokens"], said["trained"])
