"""Writes the files of a training: a line for every step and validation, and the checkpoint to resume from."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from lorafit.adapters.state import TrainState
from lorafit.files import write_text
from lorafit.runs.folder import CHECKPOINTS, LAST, METRICS, clear_left_by_kills
from lorafit.training import checkpoint
from lorafit.training.checkpoint import Progress

CHECKPOINT_SHARE = 0.02  # of the run's time that may go into writing checkpoints between validations


class Journal:
    """The files of one training.

    Args:
        folder: Their folder; None to write nothing.
        writes: Whether this process writes; the others only read.
        identity: Everything that the bits of the result depend on; it is stored in the checkpoint.
    """

    def __init__(self, folder: Path | None, writes: bool, identity: dict[str, Any]):
        if folder and writes:
            clear_left_by_kills(folder)
        self.checkpoint = folder / CHECKPOINTS / LAST if folder else None
        self.metrics = folder / METRICS if folder and writes else None
        self._writes, self._identity = writes, identity
        self._began, self._saving, self._last_save = time.monotonic(), 0.0, 0.0

    def restore(self, state: TrainState, optimizer: torch.optim.Optimizer, older: Mapping[str, Any]) -> Progress | None:
        """Load the checkpoint into state and optimizer; returns its progress, None if there is no checkpoint. See
        `checkpoint.restore`."""
        if self.checkpoint is None or not self.checkpoint.exists():
            return None
        return checkpoint.restore(self.checkpoint, state, optimizer, self._identity, older)

    def save(self, state: TrainState, optimizer: torch.optim.Optimizer, at: Progress) -> None:
        """Replace the checkpoint."""
        if self.checkpoint and self._writes:
            start = time.monotonic()
            checkpoint.save(self.checkpoint, state, optimizer, at, self._identity)
            self._last_save = time.monotonic() - start
            self._saving += self._last_save
            at.overhead += self._last_save

    def save_if_cheap(self, state: TrainState, optimizer: torch.optim.Optimizer, at: Progress) -> None:
        """Replace the checkpoint unless the writes would take more than CHECKPOINT_SHARE of the time so far."""
        if self._saving + self._last_save < CHECKPOINT_SHARE * (time.monotonic() - self._began):
            self.save(state, optimizer, at)

    def note(self, at: Progress, train_nll: float | None, valid_nll: float | None, rate: float) -> None:
        """Append a line to the metrics, without the values that are None."""
        if self.metrics:
            measured = {"train_nll": train_nll, "valid_nll": valid_nll}
            line = {"step": at.step, **{k: v for k, v in measured.items() if v is not None}, "learning_rate": rate}
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps({**line, "seconds": round(at.seconds, 3)}) + "\n")

    def trim(self, at: Progress) -> None:
        """Remove the lines of steps after the last checkpoint, which a killed run did and the resumed run repeats."""
        if self.metrics and self.metrics.exists():
            validated = {step for step, _ in at.history}
            lines = self.metrics.read_text(encoding="utf-8").splitlines(keepends=True)
            read = [(line, json.loads(line)) for line in lines if line.endswith("\n")]
            kept = [
                line
                for line, values in read
                if values["step"] <= at.step and ("valid_nll" not in values or values["step"] in validated)
            ]
            write_text(self.metrics, "".join(kept))
