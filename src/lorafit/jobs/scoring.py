"""How the adapters of a task are scored: a class for every task, and a line in SCORINGS."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from lorafit.adapters.adapter import Adapter
from lorafit.data.examples import Example
from lorafit.data.render import Renderer, Row
from lorafit.evaluation.classes import LabelQuestions, compare_classes
from lorafit.evaluation.compare import Comparison, Watch, asked_of, compare
from lorafit.evaluation.questions import Questions
from lorafit.jobs.machine import left_of
from lorafit.jobs.prepare import Opened
from lorafit.settings import TrainSettings
from lorafit.tasks import classification, completion
from lorafit.tasks.classification import LabelRenderer
from lorafit.tasks.runner import Runner

DECODED = 3.0  # tokens of a prompt that a token of an answer takes as long as


@dataclass(frozen=True)
class Test:
    """The examples on which adapters are scored, and how they are scored.

    Args:
        runner: The base, and how it is run.
        renderer: How the examples became rows.
        examples: The questions, with their references.
        rows: The examples as rows.
        known: The examples that the adapter was trained on.
        shots_from: Examples from which the shots are taken that the base is given.
        shots: How many shots the base is given.
        watch: Called with the name of the work, how much of it is done, and how much there is.
        memory: Bytes that decoding may take; None for no limit.
        answer_all: Whether every question is answered.
        accept_unknown_base: Attach adapters that do not say which base they belong to.
    """

    runner: Runner
    renderer: Renderer | LabelRenderer
    examples: Sequence[Example]
    rows: Sequence[Row]
    known: Sequence[Example]
    shots_from: Sequence[Example]
    shots: int
    watch: Watch
    memory: int | None = None
    answer_all: bool = False
    accept_unknown_base: bool = False


class Scoring(Protocol):
    """Scores the adapters of one task."""

    def compare(self, test: Test, adapter: Adapter, against: Adapter | None = None) -> Comparison:
        """The adapter compared with its base, or with another adapter."""
        ...

    def questions(self, opened: Opened, settings: TrainSettings) -> Questions | LabelQuestions | None:
        """The validation questions whose answers can be scored; None if there are none."""
        ...

    def answering(self, opened: Opened, settings: TrainSettings) -> tuple[float, float]:
        """The costs of answering the test, and `questions`, as numbers of tokens whose forward takes as long."""
        ...


class _Answers:
    """The scoring of adapters that write answers."""

    def compare(self, test: Test, adapter: Adapter, against: Adapter | None = None) -> Comparison:
        return compare(
            test.runner.base,
            adapter,
            _writing(test.renderer),
            test.examples,
            test.rows,
            against=against,
            shots_from=test.shots_from,
            shots=test.shots,
            known=test.known,
            answer_all=test.answer_all,
            watch=test.watch,
            accept_unknown_base=test.accept_unknown_base,
            memory=test.memory,
            runner=test.runner,
        )

    def questions(self, opened: Opened, settings: TrainSettings) -> Questions | None:
        valid, known = opened.examples.valid, opened.examples.train
        memory = left_of(settings.memory, opened.base)
        return Questions.among(opened.base, _writing(opened.renderer), valid, opened.rows["valid"], known, memory)

    def answering(self, opened: Opened, settings: TrainSettings) -> tuple[float, float]:
        examples, rows = opened.examples, opened.rows
        asked = len(asked_of(examples.test, rows["test"], examples.train)) / len(examples.test)
        test = (2 + (settings.few_shot > 0)) * asked * _as_prompt(rows["test"])
        questions = self.questions(opened, settings)
        return test, len(questions.examples) / len(examples.valid) * _as_prompt(rows["valid"]) if questions else 0.0


class _Labels:
    """The scoring of classifiers."""

    def compare(self, test: Test, adapter: Adapter, against: Adapter | None = None) -> Comparison:
        return compare_classes(
            test.runner,
            adapter,
            test.examples,
            test.rows,
            known=test.known,
            against=against,
            watch=test.watch,
            accept_unknown_base=test.accept_unknown_base,
        )

    def questions(self, opened: Opened, settings: TrainSettings) -> LabelQuestions:
        return LabelQuestions(opened.runner, opened.examples.valid, opened.rows["valid"])

    def answering(self, opened: Opened, settings: TrainSettings) -> tuple[float, float]:
        return 0.0, float(sum(len(row.ids) for row in opened.rows["valid"]))


SCORINGS: dict[str, Scoring] = {completion.COMPLETION.name: _Answers(), classification.NAME: _Labels()}


def scoring_of(runner: Runner) -> Scoring:
    """How adapters of the runner's task are scored."""
    return SCORINGS[runner.task.name]


def test_of(opened: Opened, settings: TrainSettings, watch: Watch) -> Test:
    """The test of a run."""
    known, memory = opened.examples.train, left_of(settings.memory, opened.base)
    examples, rows, shots = opened.examples.test, opened.rows["test"], settings.few_shot
    return Test(opened.runner, opened.renderer, examples, rows, known, known, shots, watch, memory)


def _writing(renderer: Renderer | LabelRenderer) -> Renderer:
    assert isinstance(renderer, Renderer)
    return renderer


def _as_prompt(rows: Sequence[Row]) -> float:
    """The number of tokens of a forward that take as long as decoding the answers of these rows."""
    answers = sum(row.n_trained for row in rows)
    return sum(len(row.ids) for row in rows) - answers + DECODED * answers
