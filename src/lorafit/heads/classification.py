"""The task of a classifier: to give a text one of a few labels, with a probability for each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorafit.bases.opening import CLASSIFIER, Opening
from lorafit.data.examples import Example, Examples
from lorafit.data.rows import Row
from lorafit.errors import SettingsError
from lorafit.heads.head import OF_TEXT, PeftPlace, RowMaker, Setup, Splits, Terms, Test, listed, tokens_of

if TYPE_CHECKING:
    from lorafit.adapters.adapter import Adapter
    from lorafit.adapters.rendering import Classes
    from lorafit.bases.base import Base
    from lorafit.evaluation.classes import LabelQuestions
    from lorafit.evaluation.compare import Comparison
    from lorafit.evaluation.scores import ClassScores
    from lorafit.settings import TrainSettings
    from lorafit.tasks.classification import Classification as LabelTask
    from lorafit.tasks.classification import LabelRenderer

LABELS = Terms(
    "label",
    "text",
    "a guess by label frequency",
    "label frequencies in training",
    "text",
    "right labels",
    "get the right label",
    "It gives one of its labels to every text, also to texts that are unlike those it was trained on.",
    reads=False,
    notes=("macro-F1: mean of F1 over the labels; calibration error: mean distance of confidence from accuracy",),
)


@dataclass(frozen=True)
class Classification:
    """Labels. It implements `Head`."""

    name: str = "classification"
    model: str = "a classifier"
    pipeline: str = "text-classification"
    opening: Opening = CLASSIFIER
    idle: tuple[str, ...] = OF_TEXT

    def terms(self, scores: ClassScores | None) -> Terms:
        if scores and scores.weighted:  # of the two, one gives no label and the other no probability
            return replace(
                LABELS,
                unit="text, labels weighing alike",
                rival="a guess that reads no text",
                base="most frequent label; NLL: every label as likely",
            )
        if scores and not scores.learnt_from:
            return replace(LABELS, rival="a guess at random", base="every label as likely")
        return LABELS

    def labels(self, examples: Examples) -> tuple[str, ...]:
        from lorafit.tasks.classification import labels_of

        return tuple(labels_of(examples))

    def renderer(
        self,
        base: Base,
        labels: Sequence[str],
        examples: Examples,
        settings: TrainSettings,
        now: str | None,
        say: Callable[[str], None],
    ) -> LabelRenderer:
        """It has more than six parameters: see `Head`."""
        from lorafit.tasks.classification import LabelRenderer

        return LabelRenderer.of(base, labels)

    def renderer_of(self, base: Base, adapter: Adapter) -> LabelRenderer:
        from lorafit.tasks.classification import LabelRenderer

        assert adapter.classes is not None
        return LabelRenderer(base, adapter.classes)

    def rows(self, renderer: RowMaker, examples: Sequence[Example], max_length: int) -> list[Row]:
        from lorafit.tasks.classification import labelled_rows

        return labelled_rows(_labelling(renderer), examples, max_length)

    def setup(self, renderer: RowMaker, examples: Examples, settings: TrainSettings, resumed: bool) -> Setup:
        from lorafit.tasks.classification import Classification as LabelTask
        from lorafit.tasks.classification import balanced, labels_of

        classes = _labelling(renderer).classes
        if (lost := {*classes.labels} - {*labels_of(examples)}) and not resumed:
            raise SettingsError(
                f"--skip-bad: leaves no training example of {', '.join(sorted(lost))}: raise --max-length "
                f"({settings.max_length}), or remove the label's rows"
            )
        if settings.label_weights == "balanced":
            classes = replace(classes, weights=balanced(classes.labels, examples.train))
        return Setup(LabelTask(classes), classes=classes)

    def task_of(self, adapter: Adapter) -> LabelTask:
        from lorafit.tasks.classification import Classification as LabelTask

        assert adapter.classes is not None
        return LabelTask(adapter.classes)

    def looked_at(self, rows: Sequence[Row]) -> list[Row]:
        return list(rows[:2])

    def compare(self, test: Test, adapter: Adapter, against: Adapter | None = None) -> Comparison:
        from lorafit.evaluation.classes import compare_classes

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

    def questions(self, splits: Splits, memory: int | None) -> LabelQuestions:
        from lorafit.evaluation.classes import LabelQuestions

        return LabelQuestions(splits.runner, splits.examples.valid, splits.rows["valid"])

    def answering(self, splits: Splits, memory: int | None, shots: int) -> tuple[float, float]:
        return 0.0, tokens_of(splits.rows["valid"])

    def use(self, classes: Classes | None) -> list[str]:
        """The head needs the padding token to find the last token of a text."""
        assert classes is not None
        return [
            f"It gives a text one of {len(classes.labels)} labels: {listed(classes.labels, '`')}.",
            "",
            "```python",
            "import torch",
            "from lorafit import attach, open_base, read_adapter",
            "",
            'adapter = read_adapter(".")  # this folder',
            "base = open_base(adapter.base_name, labels=len(adapter.classes.labels))",
            "base.model.config.pad_token_id = adapter.classes.pad",
            'ids = base.tokenizer("your text", return_tensors="pt")["input_ids"].to(base.device)',
            "with attach(base, adapter), torch.no_grad():",
            "    likely = base.model(input_ids=ids).logits[0].softmax(-1)",
            "print(adapter.classes.labels[int(likely.argmax())], float(likely.max()))",
            "```",
        ]

    def use_in_peft(self, classes: Classes | None, place: PeftPlace) -> list[str]:
        assert classes is not None
        return [
            "In PEFT" + (f", where {place.shown}" if place.folder else "") + ":",
            "",
            "```python",
            "import json",
            "",
            "import torch",
            "from peft import PeftModel",
            "from transformers import AutoModelForSequenceClassification, AutoTokenizer",
            "",
            *([f"base = {place.folder!r}"] if place.folder else []),
            f"tokenizer = AutoTokenizer.from_pretrained({place.at})",
            'classes = json.load(open("lorafit.json", encoding="utf-8"))["classes"]',
            f"model = AutoModelForSequenceClassification.from_pretrained({place.at}, num_labels={len(classes.labels)})",
            'model.config.id2label = dict(enumerate(classes["labels"]))',
            'model.config.pad_token_id = classes["pad"]',
            'model = PeftModel.from_pretrained(model, ".").eval()  # this folder',
            "with torch.no_grad():",
            '    likely = model(tokenizer("your text", return_tensors="pt")["input_ids"]).logits[0].softmax(-1)',
            "print(model.config.id2label[int(likely.argmax())], float(likely.max()))",
            "```",
        ]


def _labelling(renderer: RowMaker) -> LabelRenderer:
    from lorafit.tasks.classification import LabelRenderer

    assert isinstance(renderer, LabelRenderer)
    return renderer


HEAD = Classification()
