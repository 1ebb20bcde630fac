"""The task of regression: to give a text a number."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean, pstdev
from typing import TYPE_CHECKING

from lorafit.bases.opening import CLASSIFIER
from lorafit.data.examples import Example, Examples
from lorafit.data.targets import Number, Target, written
from lorafit.errors import DataError, Problem, SettingsError
from lorafit.heads.head import Terms
from lorafit.heads.texts import Guess, Read, TextHead

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from lorafit.adapters.rendering import Classes
    from lorafit.evaluation.scores import Measures
    from lorafit.heads.reading import Texts

DIGITS = 4  # of a predicted number, as people read it

NUMBERS = Terms(
    "number",
    "text",
    "the mean of the training numbers",
    "mean of training",
    "text",
    "right numbers",
    "get the right number",
    "It gives a number to every text, also to texts that are unlike those it was trained on.",
    reads=False,
    field="number",
    notes=(
        "NLL of a number: half the squared error in variances of the training numbers (a normal distribution, without "
        "its constant); their mean gets about 0.5",
        "MAE: mean distance from the right number; RMSE: root of the mean squared distance; R²: share of the variance "
        "that is explained, 0 for the mean of these numbers",
    ),
)


@dataclass(frozen=True)
class Numbers:
    """Reads a text and gives one number. It implements `Reader`; a prediction is a number."""

    target: type[Target] = Number
    exact: bool = False

    def labels(self, examples: Examples) -> tuple[str, ...]:
        values = {number_of(example.target) for example in examples.train}
        if len(values) < 2:
            what = f"all training examples have the number {written(values.pop())}, so there is nothing to learn"
            raise DataError([Problem(examples.train[0].where, what, "add examples with other numbers")])
        return ("score",)

    def fitted(self, classes: Classes, train: Sequence[Example]) -> Classes:
        values = [number_of(example.target) for example in train]
        spread = pstdev(values)
        if not 0 < spread < math.inf:
            raise SettingsError(
                f"the {len(values)} training examples that are left have numbers that do not differ enough to be "
                "learnt: add examples with other numbers, or raise --max-length where --skip-bad left long ones out"
            )
        return replace(classes, scale=(fmean(values), spread))

    def read(self, texts: Texts, example: Example) -> Read | tuple[str, str]:
        return texts.read_whole(example, (number_of(example.target),))

    def loss(self, outputs: Tensor, values: Tensor, classes: Classes) -> Tensor:
        """Half the squared error of the standardized number."""
        return ((outputs[:, 0] - values[:, 0]) ** 2) / 2

    def truth(self, target: Target) -> float:
        return number_of(target)

    def predicted(self, outputs: Tensor, read: Read, texts: Texts, example: Example) -> float:
        mean, spread = scale_of(texts.classes)
        return mean + spread * float(outputs[0, 0])

    def guess(self, classes: Classes, train: Sequence[Example]) -> Guess:
        return Guess((0.0,), scale_of(classes)[0])

    def text(self, prediction: float, text: str) -> str:
        return f"{prediction:.{DIGITS}g}"

    def shown(self, values: Sequence[float], classes: Classes) -> str:
        return f"score: {written(values[0])}"

    def measures(
        self,
        classes: Classes,
        truth: Sequence[float],
        adapter: Sequence[float],
        base: Sequence[float],
        groups: Sequence[str | None],
    ) -> Measures:
        import numpy as np

        from lorafit.evaluation.measures import measure
        from lorafit.evaluation.scores import Measures

        right, ours, theirs = (np.asarray(one, dtype=np.float64) for one in (truth, adapter, base))
        scores = {"MAE": mae, "RMSE": rmse, "Pearson": pearson, "Spearman": spearman, "R²": r2}
        return Measures(
            "regression",
            len(truth),
            tuple(measure(name, score, (right, ours), (right, theirs), groups) for name, score in scores.items()),
        )

    def said(self, classes: Classes) -> str:
        mean, spread = scale_of(classes)
        return f"It gives a text a number; those of training had a mean of {mean:.4g} and a deviation of {spread:.4g}."

    def after(self, classes: Classes) -> list[str]:
        return ['mean, spread = classes["scale"]', "print(mean + spread * float(logits[0]))"]


def number_of(target: Target | None) -> float:
    """The number of an example."""
    assert isinstance(target, Number)
    return target.value


def scale_of(classes: Classes) -> tuple[float, float]:
    """The mean and the deviation of the training numbers."""
    assert classes.scale is not None
    return classes.scale


def mae(right: NDArray[np.float64], given: NDArray[np.float64]) -> float:
    return float(abs(right - given).mean())


def rmse(right: NDArray[np.float64], given: NDArray[np.float64]) -> float:
    return math.sqrt(float(((right - given) ** 2).mean()))


def pearson(right: NDArray[np.float64], given: NDArray[np.float64]) -> float:
    """The linear correlation; NaN where one side is constant."""
    a, b = right - right.mean(), given - given.mean()
    if not (_varies(a, right) and _varies(b, given)):
        return math.nan
    return float((a * b).sum()) / math.sqrt(float((a * a).sum()) * float((b * b).sum()))


def spearman(right: NDArray[np.float64], given: NDArray[np.float64]) -> float:
    """The correlation of the ranks, of which equal numbers share the mean."""
    return pearson(_ranks(right), _ranks(given))


def r2(right: NDArray[np.float64], given: NDArray[np.float64]) -> float:
    """1 − squared errors / squared distances from the mean of these numbers; NaN where they are constant."""
    away = right - right.mean()
    whole = float((away**2).sum())
    return 1 - float(((right - given) ** 2).sum()) / whole if _varies(away, right) else math.nan


def _varies(away: NDArray[np.float64], values: NDArray[np.float64]) -> bool:
    """Whether values differ by more than the rounding of their mean. away: from the mean."""
    return float(abs(away).max()) > 1e-12 * float(abs(values).max())


def _ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    import numpy as np

    _, place, count = np.unique(values, return_inverse=True, return_counts=True)
    ends = np.cumsum(count)
    means: NDArray[np.float64] = ends - (count - 1) / 2
    return means[place]


HEAD = TextHead(
    name="regression",
    model="a regression",
    pipeline="text-classification",  # hubs have no name of its own for it
    opening=replace(CLASSIFIER, noun="regression of texts", settings=(("problem_type", "regression"),)),
    peft="SEQ_CLS",
    words=NUMBERS,
    reader=Numbers(),
)
