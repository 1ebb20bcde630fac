"""The interface of a task: everything that the other parts of lorafit ask about it.

A head here is a whole task: its data, how its base is opened, its outputs (an answer, a label, a number), its scores
and the words of its report. The files of the tasks import torch and transformers only inside functions, so that a
mistake in the arguments is reported at once.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from lorafit.adapters.adapter import Adapter
    from lorafit.adapters.rendering import Classes, Rendering
    from lorafit.bases.base import Base
    from lorafit.bases.opening import Opening
    from lorafit.data.examples import Example, Examples
    from lorafit.data.rows import Row
    from lorafit.evaluation.compare import Comparison, Watch
    from lorafit.evaluation.scores import ClassScores
    from lorafit.settings import TrainSettings
    from lorafit.tasks.runner import Runner
    from lorafit.tasks.task import Task

MOST_LABELS = 12  # at most this many labels are listed by name
OF_TEXT = ("general", "system", "template", "few_shot", "routing_questions", "trunk_gb")
"""Settings that have no effect on a model that writes no text."""


@dataclass(frozen=True)
class Terms:
    """The words for a task's scores in messages and reports.

    Args:
        answer: The word for an answer, used as a noun and as a verb, such as `answer` or `label`.
        asked: The noun for a question.
        rival: What the adapter is compared with, as a phrase for a sentence.
        base: The same, as a short name for a table.
        unit: What the NLL is averaged over, such as `token` or `text`.
        right: The name of the score that counts right answers, such as `facts right`.
        fine: What is said of questions that got a right answer, such as `are answered right`.
        limits: A sentence that says what not to expect of the adapter.
        reads: Whether `rival` reads the questions, so that its answers are worth showing.
        notes: Sentences that explain the scores that only this task has.
        field: What an example of the task must have, such as `label`.
        needs: The pronoun for `field`: `one` or `them`.
        labelled: What a label is given to: `texts` or `entities`.
    """

    answer: str
    asked: str
    rival: str
    base: str
    unit: str
    right: str
    fine: str
    limits: str
    reads: bool = True
    notes: tuple[str, ...] = ()
    field: str = "label"
    needs: str = "one"
    labelled: str = "texts"

    @property
    def nll(self) -> str:
        return f"NLL of the {self.answer}s, nats per {self.unit}"


class RowMaker(Protocol):
    """Makes rows of examples for one base."""

    def pieces(self, row: Row) -> list[tuple[str, bool]]:
        """The text of a row in pieces, each with whether it is trained."""
        ...


@dataclass(frozen=True)
class Setup:
    """What a run starts with: its task, and what its adapter stores about rows and outputs."""

    task: Task
    rendering: Rendering | None = None
    classes: Classes | None = None


@dataclass(frozen=True)
class Test:
    """The examples on which adapters are scored, and how they are scored.

    Args:
        runner: The base, and how it is run.
        renderer: How the examples became rows.
        examples: The questions, with their references.
        rows: The examples as rows.
        known: The examples that the adapter was trained on.
        shots_from: The examples from which the base's few-shot prompt is made.
        shots: How many examples that prompt has.
        watch: Called with the name of the work, how much of it is done, and how much there is.
        memory: Bytes that decoding may take; None for no limit.
        answer_all: Whether every question is answered, not only a sample.
        accept_unknown_base: Attach adapters that do not say which base they belong to.
    """

    runner: Runner
    renderer: RowMaker
    examples: Sequence[Example]
    rows: Sequence[Row]
    known: Sequence[Example]
    shots_from: Sequence[Example]
    shots: int
    watch: Watch
    memory: int | None = None
    answer_all: bool = False
    accept_unknown_base: bool = False


class Splits(Protocol):
    """The examples of a run in all splits, as rows, and how its base is run."""

    @property
    def runner(self) -> Runner: ...
    @property
    def renderer(self) -> RowMaker: ...
    @property
    def examples(self) -> Examples: ...
    @property
    def rows(self) -> dict[str, list[Row]]: ...


class HeldOut(Protocol):
    """Validation examples by which adapters are compared, in addition to NLL."""

    @property
    def examples(self) -> Sequence[Example]: ...

    def right(self, adapter: Adapter, progress: Callable[[int, int], None]) -> int:
        """How many of them the adapter has right. Nothing may be attached to the base."""
        ...


class Head(Protocol):
    """A task."""

    @property
    def name(self) -> str:
        """The name of `--task`, which is stored with a run and an adapter."""
        ...

    @property
    def model(self) -> str:
        """What is trained, such as `a classifier`."""
        ...

    @property
    def pipeline(self) -> str:
        """The name by which model hubs know the task."""
        ...

    @property
    def opening(self) -> Opening | None:
        """How a base is opened; None for a language model, which writes text."""
        ...

    @property
    def idle(self) -> Sequence[str]:
        """Settings that do nothing, and are refused where they are set."""
        ...

    def terms(self, scores: ClassScores | None) -> Terms:
        """The words for scores. scores: of a classifier."""
        ...

    def labels(self, examples: Examples) -> tuple[str, ...]:
        """The names of the head's outputs; empty for text. Raises DataError for examples that are not of this task, or
        from which nothing can be learnt, before a base is opened."""
        ...

    def renderer(
        self,
        base: Base,
        labels: Sequence[str],
        examples: Examples,
        settings: TrainSettings,
        now: str | None,
        say: Callable[[str], None],
    ) -> RowMaker:
        """How examples become rows for a base. It has more than six parameters, for all that it may depend on.

        Args:
            base: The base.
            labels: The result of `labels`.
            examples: The examples of all splits.
            settings: The run's settings.
            now: The time for a chat template; None for the present.
            say: Receives messages about how examples are rendered.
        """
        ...

    def renderer_of(self, base: Base, adapter: Adapter) -> RowMaker:
        """How examples become rows for an adapter that was trained."""
        ...

    def rows(self, renderer: RowMaker, examples: Sequence[Example], max_length: int) -> list[Row]:
        """The rows of examples. Raises DataError that names every example that cannot become one."""
        ...

    def setup(self, renderer: RowMaker, examples: Examples, settings: TrainSettings, resumed: bool) -> Setup:
        """What a run on these examples, which have all become rows, begins with. Raises SettingsError if too few are
        left; a resumed run began with them, whatever is left."""
        ...

    def task_of(self, adapter: Adapter) -> Task:
        """The task of an adapter that was trained."""
        ...

    def looked_at(self, rows: Sequence[Row]) -> list[Row]:
        """A few rows for one forward, which shows which layers take part."""
        ...

    def compare(self, test: Test, adapter: Adapter, against: Adapter | None = None) -> Comparison:
        """The adapter compared with its base, or with another adapter."""
        ...

    def questions(self, splits: Splits, memory: int | None) -> HeldOut | None:
        """The validation examples that an adapter can have right; None if there are none. memory: bytes that decoding
        may take; None for no limit."""
        ...

    def answering(self, splits: Splits, memory: int | None, shots: int) -> tuple[float, float]:
        """The costs of answering the test, and `questions`, as numbers of tokens whose forward takes as long."""
        ...

    def use(self, classes: Classes | None) -> list[str]:
        """Markdown with the Python code that uses an adapter. classes: of the adapter."""
        ...

    def use_in_peft(self, classes: Classes | None, place: PeftPlace) -> list[str]:
        """Markdown with the code that uses an adapter in PEFT."""
        ...


@dataclass(frozen=True)
class PeftPlace:
    """Where PEFT finds the base of an adapter.

    Args:
        at: The arguments of `from_pretrained`.
        folder: The name that lorafit knows the base's folder by; None for a model of the hub.
        shown: What `base` stands for in the code, in words.
    """

    at: str
    folder: str | None
    shown: str


def listed(labels: Sequence[str], mark: str = "") -> str:
    """Labels in one line, at most MOST_LABELS by name. mark: put around each of them."""
    more = f" and {len(labels) - MOST_LABELS} more" if len(labels) > MOST_LABELS else ""
    names = (" ".join(label.replace("`", "'").split()) for label in labels[:MOST_LABELS])
    return ", ".join(f"{mark}{name}{mark}" for name in names) + more


def tokens_of(rows: Sequence[Any]) -> float:
    """The number of tokens of rows."""
    return float(sum(len(row.ids) for row in rows))
