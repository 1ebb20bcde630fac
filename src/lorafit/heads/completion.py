"""The task of a language model: to write an answer."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorafit.data.examples import Example, Examples, asks_once
from lorafit.data.rows import Row
from lorafit.data.targets import Names
from lorafit.errors import DataError, Problem
from lorafit.heads.head import PeftPlace, RowMaker, Setup, Splits, Terms, Test

if TYPE_CHECKING:
    from lorafit.adapters.adapter import Adapter
    from lorafit.adapters.rendering import Classes
    from lorafit.bases.base import Base
    from lorafit.data.render import Renderer
    from lorafit.evaluation.compare import Comparison
    from lorafit.evaluation.questions import Questions
    from lorafit.evaluation.scores import ClassScores
    from lorafit.settings import TrainSettings
    from lorafit.tasks.task import Task

DECODED = 3.0  # tokens of a prompt that a token of an answer takes as long as

ANSWERS = Terms(
    "answer",
    "question",
    "its base",
    "base",
    "token",
    "facts right",
    "are answered right",
    "It answers what it was trained for, in the form it was trained in; elsewhere it may be worse than its base.",
)


@dataclass(frozen=True)
class Completion:
    """Answers. It implements `Head`."""

    name: str = "completion"
    model: str = "a language model"
    pipeline: str = "text-generation"
    opening: None = None
    idle: tuple[str, ...] = ("label_weights",)

    def terms(self, scores: ClassScores | None) -> Terms:
        return ANSWERS

    def labels(self, examples: Examples) -> tuple[str, ...]:
        """None. Raises DataError for labels that commas, which separate them in an answer, would cut."""
        every = [example for split in examples.by_name().values() for example in split]
        cut = [(e.where, n) for e in every if isinstance(e.target, Names) for n in e.target.names if "," in n]
        if cut:
            fix = "take the comma out, or use --task multilabel"
            raise DataError([Problem(w, f"the label {n!r} has a comma, which separates labels", fix) for w, n in cut])
        return ()

    def renderer(
        self,
        base: Base,
        labels: Sequence[str],
        examples: Examples,
        settings: TrainSettings,
        now: str | None,
        say: Callable[[str], None],
    ) -> Renderer:
        """It has more than six parameters: see `Head`."""
        from lorafit.data.render import renderer_for

        conversations = [example for split in examples.by_name().values() for example in split if not example.is_text]
        reasoned = sum(example.reasoned for example in conversations)
        renderer = renderer_for(
            base,
            examples.system if settings.system is None else settings.system,
            now=now,
            settings=settings.template_settings,
            reasoning=reasoned > 0,
        )
        if not renderer.system and (added := renderer.preamble()):
            say(f"the base's template puts this before every conversation: {added!r}; --system replaces it")
        if renderer.now:
            say(f"the base's template includes the time: {renderer.now}, in this run and whenever its adapter is used")
        if reasoned:
            say(
                f"{reasoned} of {len(conversations)} conversations have their reasoning: it is learnt before the "
                "answer, which is scored on its own"
            )
        return renderer

    def renderer_of(self, base: Base, adapter: Adapter) -> Renderer:
        from lorafit.data.render import renderer_for

        return renderer_for(base, like=adapter.rendering, reasoning=adapter.rendering is None)

    def rows(self, renderer: RowMaker, examples: Sequence[Example], max_length: int) -> list[Row]:
        from lorafit.data.render import render

        return render(writing(renderer), examples, max_length)

    def setup(self, renderer: RowMaker, examples: Examples, settings: TrainSettings, resumed: bool) -> Setup:
        from lorafit.tasks.completion import COMPLETION

        return Setup(COMPLETION, replace(writing(renderer).rendering, single=asks_once(examples.train)))

    def task_of(self, adapter: Adapter) -> Task:
        from lorafit.tasks.completion import COMPLETION

        return COMPLETION

    def looked_at(self, rows: Sequence[Row]) -> list[Row]:
        from lorafit.tasks.probe import beginnings

        return beginnings(rows)

    def compare(self, test: Test, adapter: Adapter, against: Adapter | None = None) -> Comparison:
        from lorafit.evaluation.compare import compare

        return compare(
            test.runner.base,
            adapter,
            writing(test.renderer),
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

    def questions(self, splits: Splits, memory: int | None) -> Questions | None:
        from lorafit.evaluation.questions import Questions

        valid, known = splits.examples.valid, splits.examples.train
        return Questions.among(splits.runner.base, writing(splits.renderer), valid, splits.rows["valid"], known, memory)

    def answering(self, splits: Splits, memory: int | None, shots: int) -> tuple[float, float]:
        from lorafit.evaluation.compare import asked_of

        examples, rows = splits.examples, splits.rows
        asked = len(asked_of(examples.test, rows["test"], examples.train)) / len(examples.test)
        test = (2 + (shots > 0)) * asked * _as_prompt(rows["test"])
        questions = self.questions(splits, memory)
        return test, len(questions.examples) / len(examples.valid) * _as_prompt(rows["valid"]) if questions else 0.0

    def use(self, classes: Classes | None) -> list[str]:
        return [
            "```python",
            "from lorafit import Message, attach, generate, open_base, read_adapter, renderer_for",
            "",
            'adapter = read_adapter(".")  # this folder',
            "base = open_base(adapter.base_name)",
            "renderer = renderer_for(base, like=adapter.rendering)",
            'prompt = renderer.prompt_ids([Message("user", "your question")])',
            "with attach(base, adapter):",
            "    print(generate(base, renderer, [prompt], max_new_tokens=100)[0].text)",
            "```",
        ]

    def use_in_peft(self, classes: Classes | None, place: PeftPlace) -> list[str]:
        said = f" ({place.shown})" if place.folder else ""
        return [
            f"In PEFT, open the base with `AutoModelForCausalLM.from_pretrained({place.at})`{said}, then "
            "`PeftModel.from_pretrained(model, folder)`."
        ]


def writing(renderer: RowMaker) -> Renderer:
    """The renderer of a task that writes text."""
    from lorafit.data.render import Renderer

    assert isinstance(renderer, Renderer)
    return renderer


def _as_prompt(rows: Sequence[Row]) -> float:
    """The number of tokens of a forward that take as long as decoding the answers of these rows."""
    answers = sum(row.n_trained for row in rows)
    return sum(len(row.ids) for row in rows) - answers + DECODED * answers


HEAD = Completion()
