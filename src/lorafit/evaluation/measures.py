"""Scores that are no share of right answers, such as a correlation or an F1, with their intervals."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from lorafit.evaluation.scores import Label, Measure
from lorafit.evaluation.statistics import bootstrap

Array = NDArray[Any]


def measure(
    name: str,
    score: Callable[..., float],
    adapter: Sequence[Array],
    base: Sequence[Array],
    groups: Sequence[str | None],
    percent: bool = False,
) -> Measure:
    """A score with its interval, and that of the paired difference.

    Args:
        name: The name in tables.
        score: Computes the score from arrays of the same examples; NaN if it is not defined for them.
        adapter: The arrays of the adapter, each (examples, ...).
        base: Those of what it is compared with.
        groups: The group of every example.
        percent: As in `Measure`.
    """

    def of(arrays: Sequence[Array], at: Array) -> float:
        return score(*(one[at] for one in arrays))

    every = np.arange(len(groups))
    ours, theirs = (value if math.isfinite(value := of(one, every)) else None for one in (adapter, base))
    ends = bootstrap(lambda at: of(adapter, at), groups)
    apart = None if theirs is None else bootstrap(lambda at: of(adapter, at) - of(base, at), groups)
    return Measure(name, ours, theirs, ends, apart, percent)


def f1(hits: float, given: float, wanted: float) -> float:
    """2 · hits / (given + wanted); NaN if nothing is given or wanted."""
    return 2 * hits / (given + wanted) if given + wanted else math.nan


def label_scores(
    labels: Sequence[str], hits: Sequence[int], given: Sequence[int], wanted: Sequence[int]
) -> tuple[Label, ...]:
    """The scores of every label, from how often it is given rightly, given, and wanted."""
    return tuple(
        Label(label, w, h / g if g else None, h / w if w else None, 2 * h / (g + w) if g + w else 0.0)
        for label, h, g, w in zip(labels, hits, given, wanted, strict=True)
    )
