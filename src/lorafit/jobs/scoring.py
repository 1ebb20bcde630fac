"""How the adapters of a run are scored: by the task of the run."""

from __future__ import annotations

from lorafit.evaluation.compare import Watch
from lorafit.heads import HEADS
from lorafit.heads.head import Head, HeldOut, Test
from lorafit.jobs.machine import left_of
from lorafit.jobs.prepare import Opened
from lorafit.settings import TrainSettings
from lorafit.tasks.runner import Runner


def head_of(runner: Runner) -> Head:
    """The task of a runner, which says how its adapters are scored."""
    return HEADS[runner.task.name]


def questions_of(opened: Opened, settings: TrainSettings) -> HeldOut | None:
    """The validation examples that an adapter can have right; None if there are none."""
    return head_of(opened.runner).questions(opened, left_of(settings.memory, opened.base))


def answering(opened: Opened, settings: TrainSettings) -> tuple[float, float]:
    """The costs of answering the test, and `questions_of`, as numbers of tokens whose forward takes as long."""
    memory = left_of(settings.memory, opened.base)
    return head_of(opened.runner).answering(opened, memory, settings.few_shot)


def test_of(opened: Opened, settings: TrainSettings, watch: Watch) -> Test:
    """The test of a run."""
    known, memory = opened.examples.train, left_of(settings.memory, opened.base)
    examples, rows, shots = opened.examples.test, opened.rows["test"], settings.few_shot
    return Test(opened.runner, opened.renderer, examples, rows, known, known, shots, watch, memory)
