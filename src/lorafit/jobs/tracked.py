"""Sends the curve of a run, and its scores at the end, to a tracking program."""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorafit.errors import SettingsError
from lorafit.jobs.listener import Listener
from lorafit.jobs.prepare import Opened
from lorafit.runs.summary import RunSummary
from lorafit.runs.tracking import TENSORBOARD, TRACKERS, WANDB, Tracker
from lorafit.settings import TrainSettings
from lorafit.training.loop import Moment


class Tracked:
    """Passes the moments of a run on to its listener and to a tracking program.

    If the program fails, this is reported once, and the run continues without it.

    Args:
        tracker: The program; None for none.
        name: Its name, for messages.
        listener: The run's listener.
    """

    def __init__(self, tracker: Tracker | None, name: str, listener: Listener):
        self._tracker, self._name, self._listener = tracker, name, listener
        self._step = 0

    def moment(self, moment: Moment) -> None:
        self._listener.moment(moment)
        values = {"valid/nll": moment.valid_nll}
        if moment.train_nll is not None:
            values |= {
                "train/nll": moment.train_nll,
                "train/learning_rate": moment.learning_rate,
                "train/tokens_per_second": moment.tokens_per_second,
            }
        self._log(values, moment.step)

    def scores(self, summary: RunSummary) -> None:
        """Log the scores on the test, at the last step."""
        nll, facts, counts = summary.nll, summary.facts, summary.counts
        shares = counts.right if counts and counts.tells else {}  # of free text equality says little
        self._log(
            {
                "test/nll_base": nll.base,
                "test/nll_adapter": nll.adapter,
                "test/facts_base": facts.base,
                "test/facts_adapter": facts.adapter,
                **{f"test/right_{who}": share.share for who, share in shares.items()},
                "adapter/parameters": summary.trainable_parameters,
            },
            self._step,
        )

    def end(self) -> None:
        if self._tracker is not None:
            self._tried(self._tracker.end)

    def _log(self, values: Mapping[str, float | None], step: int) -> None:
        self._step = max(self._step, step)  # scores of an earlier step are refused by some programs
        numbers = {name: float(value) for name, value in values.items() if value is not None and math.isfinite(value)}
        if self._tracker is not None and numbers:
            tracker = self._tracker
            self._tried(lambda: tracker.log(numbers, step))

    def _tried(self, call: Any) -> None:
        try:
            call()
        except Exception as error:  # of any kind: a network, a full disk, another version
            self._tracker = None
            self._listener.say(f"--report-to {self._name}: {_why(error)}: it is left out, the run continues")


@contextmanager
def tracked(settings: TrainSettings, opened: Opened, out: Path, resume: bool, listener: Listener) -> Iterator[Tracked]:
    """Start the tracking program of the settings; it ends with the block. Raises SettingsError if it cannot start, and
    then removes what it has written into a new run folder."""
    name, tracker = settings.report_to, None
    if name != "none":
        try:
            tracker = TRACKERS[name](out, _facts(settings, opened))
        except Exception as error:
            if not resume:
                for left in (TENSORBOARD, WANDB):
                    shutil.rmtree(out / left, ignore_errors=True)
            raise SettingsError(f"--report-to {name}: {_why(error)}: correct it, or leave --report-to out") from error
    followed = Tracked(tracker, name, listener)
    try:
        yield followed
    finally:
        followed.end()


def _facts(settings: TrainSettings, opened: Opened) -> dict[str, Any]:
    """The numbers and choices that describe a run. They include no path, prompt or example."""
    numbers = {name: value for name, value in settings.model_dump().items() if isinstance(value, (bool, int, float))}
    recipe = {name: value for name, value in asdict(opened.decision.recipe).items() if isinstance(value, (int, float))}
    return {
        "base": Path(opened.base.name).name,
        "variant": settings.variant,
        "examples": len(opened.examples.train),
        "parameters": opened.decision.plan.parameters,
        **numbers,
        **recipe,
    }


def _why(error: Exception) -> str:
    return next(iter(str(error).strip().splitlines()), "") or type(error).__name__
