"""The state that the stages of a run share."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from lorafit.jobs.listener import Listener
from lorafit.jobs.prepare import Opened
from lorafit.settings import TrainSettings
from lorafit.training.processes import ALONE, Processes


@dataclass(frozen=True)
class Run:
    """The value that every stage of a run takes.

    Args:
        opened: Base, data and decision.
        settings: The run's settings.
        out: The run's folder.
        listener: Receives messages and progress.
        resume: Whether a stopped run in the folder is resumed.
        processes: This process among those of the run.
    """

    opened: Opened
    settings: TrainSettings
    out: Path
    listener: Listener
    resume: bool = False
    processes: Processes = ALONE
