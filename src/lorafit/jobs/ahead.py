"""Estimates, in words, of how long the search, the training and the evaluation of a run will take."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from lorafit.jobs.plan import Forecast, evaluation_seconds, forecast
from lorafit.jobs.prepare import Opened
from lorafit.jobs.search import rates_tried, search_steps, start_of
from lorafit.planning import Decision
from lorafit.planning.signal import Card
from lorafit.report.words import clock
from lorafit.runs.folder import CHECKPOINTS, LAST, PLAN
from lorafit.settings import TrainSettings
from lorafit.training.checkpoint import pace
from lorafit.training.processes import Processes
from lorafit.training.trunk import room_for


class TimeEstimate:
    """Estimates times from a few steps that it tries, or from the steps that a stopped run has done.

    Args:
        opened: Base, data and decision.
        settings: The run's settings.
        out: The run's folder.
        forward: Seconds per token of a forward; None if it was not measured.
        processes: The processes of the run.
    """

    def __init__(self, opened: Opened, settings: TrainSettings, out: Path, forward: float | None, processes: Processes):
        self._opened, self._settings, self._out = opened, settings, out
        self._forward, self._processes = forward, processes
        self._cost: Forecast | None = None

    def of_search(self, card: Card | None) -> str:
        """A sentence with the longest time that the search takes; "" if there is no search."""
        if (self._out / PLAN).exists():
            return ""
        steps = search_steps(self._opened, self._settings, card, self._out)
        if steps == 0:
            return ""
        self._cost = self._tried(self._opened)
        what = rates_tried(self._opened, self._settings)[1]
        return f"the search before training takes at most about {clock(steps * self._cost.step)}: {what}"

    def of_run(self, decision: Decision) -> str:
        """A sentence with the time that training and evaluation take."""
        opened = self._opened
        at_start = replace(opened, decision=decision, start=start_of(opened, decision.plan))
        done, seconds = pace(self._out / CHECKPOINTS / LAST)
        if done and self._forward:
            training = (decision.recipe.steps - done) * seconds
            evaluation = evaluation_seconds(at_start, self._forward, self._settings)
        else:
            if self._cost is None or decision.plan != opened.decision.plan:
                self._cost = self._tried(at_start)
            training, evaluation = self._cost.seconds, self._cost.evaluation
        n = self._settings.rounds
        rounds = f" (the {n} round{'s' * (n > 1)} between them not counted)" if n else ""
        return f"about {clock(training)} of training and {clock(evaluation)} of evaluation are ahead{rounds}"

    def _tried(self, opened: Opened) -> Forecast:
        room = room_for(self._out, self._settings.trunk_bytes)
        return forecast(opened, self._settings, room, self._forward, self._processes.count)
