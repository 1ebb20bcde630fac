"""Tasks whose model reads a text and gives numbers: what they have in common.

What differs between them is a `Reader`: its labels, its rows, its loss, its scores and its words.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from lorafit.bases.opening import Opening
from lorafit.data.examples import Example, Examples
from lorafit.data.rows import Row
from lorafit.data.targets import FIELD, Target
from lorafit.errors import DataError, Problem
from lorafit.heads.head import OF_TEXT, PeftPlace, RowMaker, Setup, Splits, Terms, Test, tokens_of

if TYPE_CHECKING:
    from torch import Tensor

    from lorafit.adapters.adapter import Adapter
    from lorafit.adapters.rendering import Classes
    from lorafit.bases.base import Base
    from lorafit.evaluation.compare import Comparison
    from lorafit.evaluation.scores import ClassScores, Measures
    from lorafit.heads.reading import HeldOutTexts, Reading, Texts
    from lorafit.settings import TrainSettings


@dataclass(frozen=True)
class Read:
    """A text as a model reads it.

    Args:
        ids: The tokens, (T,).
        trained: Whether the model gives something for each token, (T,).
        values: What it should give there, in numbers, for each such token.
    """

    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    values: tuple[tuple[float, ...], ...]


@dataclass(frozen=True)
class Guess:
    """A prediction that reads no text.

    Args:
        outputs: The outputs that a head would have, (outputs,), whose loss is compared.
        prediction: What it predicts for every text.
    """

    outputs: tuple[float, ...]
    prediction: Any


class Reader(Protocol):
    """What differs between tasks whose model reads a text. A prediction is any value; `text` writes it."""

    @property
    def target(self) -> type[Target]:
        """What the examples of the task have."""
        ...

    @property
    def exact(self) -> bool:
        """Whether a prediction is right or wrong, so that right ones are counted."""
        ...

    def labels(self, examples: Examples) -> tuple[str, ...]:
        """As in `Head`. Every example has a target of the task."""
        ...

    def fitted(self, classes: Classes, train: Sequence[Example]) -> Classes:
        """With what is learnt from the training examples before a model is trained. Raises SettingsError if too few
        are left."""
        ...

    def read(self, texts: Texts, example: Example) -> Read | tuple[str, str]:
        """An example as a model reads it; or what is wrong with it, and what to do."""
        ...

    def loss(self, outputs: Tensor, values: Tensor, classes: Classes) -> Tensor:
        """The loss of each output in fp32, (n,). outputs: (n, outputs) in fp32. values: (n, values), standardized
        where the classes have a scale."""
        ...

    def truth(self, target: Target) -> Any:
        """The prediction that is right."""
        ...

    def predicted(self, outputs: Tensor, read: Read, texts: Texts, example: Example) -> Any:
        """The prediction of a model. outputs: of each trained token, (n, outputs) in fp32."""
        ...

    def guess(self, classes: Classes, train: Sequence[Example]) -> Guess:
        """The best prediction that reads no text. train: the training examples, if they are known."""
        ...

    def text(self, prediction: Any, text: str) -> str:
        """A prediction for a text, as people read it."""
        ...

    def shown(self, values: Sequence[float], classes: Classes) -> str:
        """The values of one trained token, as people read them; "" for the usual ones."""
        ...

    def measures(
        self,
        classes: Classes,
        truth: Sequence[Any],
        adapter: Sequence[Any],
        base: Sequence[Any],
        groups: Sequence[str | None],
    ) -> Measures:
        """The scores of predictions."""
        ...

    def said(self, classes: Classes) -> str:
        """A sentence that says what the adapter gives for a text."""
        ...

    def after(self, classes: Classes) -> list[str]:
        """Python that makes predictions of `logits` and `classes`, for the code that uses PEFT."""
        ...


def asked(example: Example) -> str:
    """The text of an example."""
    return example.messages[-2].text if len(example.messages) > 1 else ""


@dataclass(frozen=True)
class TextHead:
    """A task whose model reads a text. It implements `Head`."""

    name: str
    model: str
    pipeline: str
    opening: Opening
    peft: str
    words: Terms
    reader: Reader
    idle: tuple[str, ...] = (*OF_TEXT, "label_weights")

    @property
    def target(self) -> type[Target]:
        """What the examples of the task have."""
        return self.reader.target

    def terms(self, scores: ClassScores | None) -> Terms:
        return self.words

    def labels(self, examples: Examples) -> tuple[str, ...]:
        every = [example for split in examples.by_name().values() for example in split]
        fix = f"give text and {FIELD[self.reader.target]} on every line, or name another --task"
        without = [example for example in every if not isinstance(example.target, self.reader.target)]
        if without:
            what = f"has no {self.words.field}, but {self.model} needs {self.words.needs}"
            raise DataError([Problem(example.where, what, fix) for example in without])
        return self.reader.labels(examples)

    def renderer(
        self,
        base: Base,
        labels: Sequence[str],
        examples: Examples,
        settings: TrainSettings,
        now: str | None,
        say: Callable[[str], None],
    ) -> Texts:
        """It has more than six parameters: see `Head`."""
        from lorafit.heads.reading import Texts, classes_of

        return Texts(base, classes_of(base, labels, self.name, self.peft), self.reader)

    def renderer_of(self, base: Base, adapter: Adapter) -> Texts:
        from lorafit.heads.reading import Texts

        assert adapter.classes is not None
        return Texts(base, adapter.classes, self.reader)

    def rows(self, renderer: RowMaker, examples: Sequence[Example], max_length: int) -> list[Row]:
        from lorafit.heads.reading import texts_of

        return list(texts_of(renderer).rows(examples, max_length))

    def setup(self, renderer: RowMaker, examples: Examples, settings: TrainSettings, resumed: bool) -> Setup:
        from lorafit.heads.reading import Reading, texts_of

        classes = self.reader.fitted(texts_of(renderer).classes, examples.train)
        return Setup(Reading(classes, self.reader, self.name), classes=classes)

    def task_of(self, adapter: Adapter) -> Reading:
        from lorafit.heads.reading import Reading

        assert adapter.classes is not None
        return Reading(adapter.classes, self.reader, self.name)

    def looked_at(self, rows: Sequence[Row]) -> list[Row]:
        return list(rows[:2])

    def compare(self, test: Test, adapter: Adapter, against: Adapter | None = None) -> Comparison:
        from lorafit.heads.reading import compare_texts

        return compare_texts(test, adapter, against)

    def questions(self, splits: Splits, memory: int | None) -> HeldOutTexts | None:
        from lorafit.heads.reading import HeldOutTexts

        if not self.reader.exact:
            return None
        return HeldOutTexts(splits.runner, splits.examples.valid, splits.rows["valid"], splits.renderer)

    def answering(self, splits: Splits, memory: int | None, shots: int) -> tuple[float, float]:
        return 0.0, tokens_of(splits.rows["valid"]) if self.reader.exact else 0.0

    def use(self, classes: Classes | None) -> list[str]:
        assert classes is not None
        return [
            self.reader.said(classes),
            "",
            "```python",
            "from lorafit import open_base, read_adapter",
            "from lorafit.heads import opened_for",
            "from lorafit.heads.reading import predict",
            "",
            'adapter = read_adapter(".")  # this folder',
            "base = open_base(adapter.base_name, **opened_for(adapter))",
            'print(predict(base, adapter, ["your text"]))',
            "```",
        ]

    def use_in_peft(self, classes: Classes | None, place: PeftPlace) -> list[str]:
        assert classes is not None
        problem = "".join(f", {name}={value!r}" for name, value in self.opening.settings)
        opened = f"from_pretrained({place.at}, num_labels={len(classes.labels)}{problem})"
        return [
            "In PEFT" + (f", where {place.shown}" if place.folder else "") + ":",
            "",
            "```python",
            "import json",
            "",
            "import torch",
            "from peft import PeftModel",
            f"from transformers import {self.opening.model}, AutoTokenizer",
            "",
            *([f"base = {place.folder!r}"] if place.folder else []),
            f"tokenizer = AutoTokenizer.from_pretrained({place.at})",
            'with open("lorafit.json", encoding="utf-8") as file:',
            '    classes = json.load(file)["classes"]',
            f"model = {self.opening.model}.{opened}",
            'model.config.pad_token_id = classes["pad"]',
            'model = PeftModel.from_pretrained(model, ".").eval()  # this folder',
            "with torch.no_grad():",
            '    logits = model(tokenizer("your text", return_tensors="pt")["input_ids"]).logits[0]',
            *self.reader.after(classes),
            "```",
        ]
