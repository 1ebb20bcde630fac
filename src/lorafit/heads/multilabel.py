"""The task of multi-label classification: to give a text all labels that apply, none, one or several."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from lorafit.bases.opening import CLASSIFIER
from lorafit.data.examples import Example, Examples
from lorafit.data.targets import Names, Target
from lorafit.errors import DataError, Problem, SettingsError
from lorafit.heads.head import Terms, listed
from lorafit.heads.texts import Guess, Read, TextHead

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from lorafit.adapters.rendering import Classes
    from lorafit.evaluation.scores import Measures
    from lorafit.heads.reading import Texts

SETS = Terms(
    "label",
    "text",
    "the most frequent set of labels",
    "most frequent set; NLL: label frequencies",
    "text",
    "texts with exactly the right labels",
    "get exactly the right labels",
    "It knows only the labels it was trained on, and gives a text each of them that it finds more likely than not.",
    reads=False,
    field="labels",
    needs="them",
    notes=(
        "NLL: summed over the labels of a text, each a yes or a no",
        "micro-F1: of all labels of all texts together; macro-F1: mean of F1 over the labels; both ignore labels that "
        "are rightly not given",
    ),
)


@dataclass(frozen=True)
class Sets:
    """Reads a text and gives a set of labels. It implements `Reader`; a prediction is a tuple of names, sorted."""

    target: type[Target] = Names
    exact: bool = True

    def labels(self, examples: Examples) -> tuple[str, ...]:
        found = {names_of(example.target) for example in examples.train}
        labels = sorted({name for names in found for name in names})
        if len(found) < 2:
            only = f"the labels {listed(labels)}" if labels else "no label"
            what = f"all training examples have {only}, so there is nothing to learn"
            raise DataError([Problem(examples.train[0].where, what, "add examples with other labels")])
        return tuple(labels)

    def fitted(self, classes: Classes, train: Sequence[Example]) -> Classes:
        left = {name for example in train for name in names_of(example.target)}
        if lost := {*classes.labels} - left:
            raise SettingsError(
                f"--skip-bad: leaves no training example of {', '.join(sorted(lost))}: raise --max-length, or remove "
                "the label"
            )
        return classes

    def read(self, texts: Texts, example: Example) -> Read | tuple[str, str]:
        names, labels = names_of(example.target), texts.classes.labels
        if unknown := [name for name in names if name not in labels]:
            what = f"has label {', '.join(map(repr, unknown))}, which no training example has"
            return what, "correct it, or add examples of it to training"
        return texts.read_whole(example, tuple(float(label in names) for label in labels))

    def loss(self, outputs: Tensor, values: Tensor, classes: Classes) -> Tensor:
        """The binary cross-entropy, summed over the labels."""
        from torch.nn.functional import binary_cross_entropy_with_logits

        return binary_cross_entropy_with_logits(outputs, values, reduction="none").sum(-1)

    def truth(self, target: Target) -> tuple[str, ...]:
        return names_of(target)

    def predicted(self, outputs: Tensor, read: Read, texts: Texts, example: Example) -> tuple[str, ...]:
        pairs = zip(texts.classes.labels, outputs[0].tolist(), strict=True)
        return tuple(sorted(label for label, logit in pairs if logit > 0))

    def guess(self, classes: Classes, train: Sequence[Example]) -> Guess:
        """The log-odds of each label, counted once more with and once more without it; and the most frequent set."""
        sets = [names_of(example.target) for example in train]
        times = Counter(name for names in sets for name in names)
        odds = (math.log((times[label] + 1) / (len(sets) - times[label] + 1)) for label in classes.labels)
        usual = Counter(sets).most_common(1)
        return Guess(tuple(odds), usual[0][0] if usual else ())

    def text(self, prediction: tuple[str, ...], text: str) -> str:
        return Names(prediction).text

    def shown(self, values: Sequence[float], classes: Classes) -> str:
        pairs = zip(classes.labels, values, strict=True)
        return f"labels: {Names(tuple(label for label, value in pairs if value)).text}"

    def measures(
        self,
        classes: Classes,
        truth: Sequence[tuple[str, ...]],
        adapter: Sequence[tuple[str, ...]],
        base: Sequence[tuple[str, ...]],
        groups: Sequence[str | None],
    ) -> Measures:
        import numpy as np

        from lorafit.evaluation.measures import label_scores, measure
        from lorafit.evaluation.scores import Measures

        def table(sets: Sequence[tuple[str, ...]]) -> NDArray[np.bool_]:
            return np.asarray([[label in names for label in classes.labels] for names in sets])

        right, ours, theirs = table(truth), table(adapter), table(base)
        pairs = (right, ours), (right, theirs)
        counts = [(right & ours).sum(0).tolist(), ours.sum(0).tolist(), right.sum(0).tolist()]
        return Measures(
            "multilabel",
            len(truth),
            (
                measure("micro-F1", micro_f1, *pairs, groups),
                measure("macro-F1", macro_f1, *pairs, groups),
            ),
            label_scores(classes.labels, *counts),
        )

    def said(self, classes: Classes) -> str:
        return f"It gives a text all that apply of {len(classes.labels)} labels: {listed(classes.labels, '`')}."

    def after(self, classes: Classes) -> list[str]:
        return ['print([label for label, logit in zip(classes["labels"], logits) if logit > 0])']


def names_of(target: Target | None) -> tuple[str, ...]:
    """The labels of an example."""
    assert isinstance(target, Names)
    return target.names


def micro_f1(right: NDArray[np.bool_], given: NDArray[np.bool_]) -> float:
    """Of all labels of all texts together. right, given: (texts, labels)."""
    from lorafit.evaluation.measures import f1

    return f1(float((right & given).sum()), float(given.sum()), float(right.sum()))


def macro_f1(right: NDArray[np.bool_], given: NDArray[np.bool_]) -> float:
    """The mean over the labels that some text has or is given."""
    import numpy as np

    hits, below = (right & given).sum(0), given.sum(0) + right.sum(0)
    return float((2 * hits[below > 0] / below[below > 0]).mean()) if np.any(below) else math.nan


HEAD = TextHead(
    name="multilabel",
    model="a multi-label classifier",
    pipeline="text-classification",
    opening=replace(CLASSIFIER, settings=(("problem_type", "multi_label_classification"),)),
    peft="SEQ_CLS",
    words=SETS,
    reader=Sets(),
)
