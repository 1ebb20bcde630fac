"""The task of sentence embeddings: vectors of texts, which are alike if the texts belong together."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from lorafit.bases.opening import CLASSIFIER, Opening
from lorafit.data.examples import Example, Examples
from lorafit.data.rows import Row
from lorafit.data.targets import FIELD, Pair, Target
from lorafit.errors import DataError, Problem
from lorafit.heads.head import OF_TEXT, PeftPlace, RowMaker, Setup, Splits, Terms, Test

if TYPE_CHECKING:
    from lorafit.adapters.adapter import Adapter
    from lorafit.adapters.rendering import Classes
    from lorafit.bases.base import Base
    from lorafit.evaluation.compare import Comparison
    from lorafit.evaluation.scores import ClassScores
    from lorafit.heads.pairs import Contrast, PairTexts
    from lorafit.settings import TrainSettings

PAIRS = Terms(
    "pair",
    "text",
    "its base",
    "base",
    "pair",
    "right pairs",
    "are paired right",
    "Its vectors are for texts like those it was trained on; elsewhere they may be worse than those of its base.",
    field="pair of texts",
    notes=(
        "NLL: of the right partner among a few others, by the similarity of the vectors",
        "recall@k: share of the texts whose partner is among the k nearest of all partners of these examples; MRR: "
        "mean of 1 / place of the partner",
    ),
)


BODY = Opening("AutoModel", CLASSIFIER.table, "embedding model", has_head=False)


@dataclass(frozen=True)
class Embedding:
    """Vectors. It implements `Head`."""

    name: str = "embedding"
    model: str = "an embedding model"
    pipeline: str = "sentence-similarity"
    opening: Opening = BODY
    idle: tuple[str, ...] = (*OF_TEXT, "label_weights")
    target: type[Target] = Pair

    def terms(self, scores: ClassScores | None) -> Terms:
        return PAIRS

    def labels(self, examples: Examples) -> tuple[str, ...]:
        every = [example for split in examples.by_name().values() for example in split]
        if without := [example for example in every if not isinstance(example.target, Pair)]:
            fix = f"give anchor and {FIELD[Pair]} on every line, or name another --task"
            what = f"has no pair of texts, but {self.model} needs one"
            raise DataError([Problem(example.where, what, fix) for example in without])
        if len({example.answer for example in examples.train}) < 2:
            what = "all training examples have the same text as positive, so there is nothing to learn"
            raise DataError([Problem(examples.train[0].where, what, "add examples with other texts")])
        return ()

    def renderer(
        self,
        base: Base,
        labels: Sequence[str],
        examples: Examples,
        settings: TrainSettings,
        now: str | None,
        say: Callable[[str], None],
    ) -> PairTexts:
        """It has more than six parameters: see `Head`."""
        from lorafit.heads.pairs import PairTexts
        from lorafit.heads.reading import classes_of

        return PairTexts(base, classes_of(base, labels, self.name, "FEATURE_EXTRACTION"))

    def renderer_of(self, base: Base, adapter: Adapter) -> PairTexts:
        from lorafit.heads.pairs import PairTexts

        assert adapter.classes is not None
        return PairTexts(base, adapter.classes)

    def rows(self, renderer: RowMaker, examples: Sequence[Example], max_length: int) -> list[Row]:
        from lorafit.heads.pairs import pairs_of

        return list(pairs_of(renderer).rows(examples, max_length))

    def setup(self, renderer: RowMaker, examples: Examples, settings: TrainSettings, resumed: bool) -> Setup:
        from lorafit.heads.pairs import Contrast, pairs_of

        classes = pairs_of(renderer).classes
        return Setup(Contrast(classes), classes=classes)

    def task_of(self, adapter: Adapter) -> Contrast:
        from lorafit.heads.pairs import Contrast

        assert adapter.classes is not None
        return Contrast(adapter.classes)

    def looked_at(self, rows: Sequence[Row]) -> list[Row]:
        return list(rows[:2])

    def compare(self, test: Test, adapter: Adapter, against: Adapter | None = None) -> Comparison:
        from lorafit.heads.pairs import compare_pairs

        return compare_pairs(test, adapter, against)

    def questions(self, splits: Splits, memory: int | None) -> None:
        return None

    def answering(self, splits: Splits, memory: int | None, shots: int) -> tuple[float, float]:
        return 0.0, 0.0

    def use(self, classes: Classes | None) -> list[str]:
        return [
            "It gives texts vectors of length 1; the more two texts belong together, the larger the product of theirs.",
            "",
            "```python",
            "from lorafit import open_base, read_adapter",
            "from lorafit.heads import opened_for",
            "from lorafit.heads.pairs import embed",
            "",
            'adapter = read_adapter(".")  # this folder',
            "base = open_base(adapter.base_name, **opened_for(adapter))",
            'a, b = embed(base, adapter, ["your text", "another text"])',
            "print(float(a @ b))",
            "```",
        ]

    def use_in_peft(self, classes: Classes | None, place: PeftPlace) -> list[str]:
        return [
            "In PEFT" + (f", where {place.shown}" if place.folder else "") + ":",
            "",
            "```python",
            "import torch",
            "from peft import PeftModel",
            "from transformers import AutoModel, AutoTokenizer",
            "",
            *([f"base = {place.folder!r}"] if place.folder else []),
            f"tokenizer = AutoTokenizer.from_pretrained({place.at})",
            f'model = PeftModel.from_pretrained(AutoModel.from_pretrained({place.at}), ".").eval()  # this folder',
            "",
            "",
            "def embedded(text):",
            "    with torch.no_grad():",
            '        states = model(tokenizer(text, return_tensors="pt")["input_ids"]).last_hidden_state[0]',
            "    return torch.nn.functional.normalize(states.mean(0), dim=0)  # the mean over all tokens",
            "",
            "",
            'print(float(embedded("your text") @ embedded("another text")))',
            "```",
        ]


HEAD = Embedding()
