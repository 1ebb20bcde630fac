"""Paired statistics: bootstrap intervals, the sign test, and Wilson's interval. Intervals are 95 %."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from statistics import NormalDist

import numpy as np
from numpy.typing import NDArray

from lorafit.data.split import FEWEST, groups_of
from lorafit.evaluation.scores import Interval

RESAMPLES = 10_000
RESAMPLES_OF_ANY = 1_000  # of a statistic that is no mean, which takes longer


def paired_bootstrap(
    differences: Sequence[float], groups: Sequence[str | None] | None = None, level: float = 0.95
) -> Interval | None:
    """The mean of per-example differences with its seeded bootstrap interval (Efron 1979).

    The percentiles are expanded for few examples (Hesterberg 2015, "What Teachers Should Know about the Bootstrap",
    section 4.1). docs/log.md says how often the interval covers.

    Args:
        differences: One difference per example.
        groups: The group of every example. The examples of a group are drawn together, because they are not
            independent.
        level: The coverage of the interval; each end on its own holds in (1 + level) / 2.

    Returns:
        None for fewer than `FEWEST` groups, for which the interval would be far too narrow.
    """
    values = np.asarray(differences, dtype=np.float64)
    _, member = np.unique(groups_of(groups or [None] * len(values)), return_inverse=True)
    sums, counts = np.bincount(member, values), np.bincount(member)
    if len(sums) < FEWEST:
        return None
    rng = np.random.default_rng(0)
    means = []
    for _ in range(10):
        drawn = rng.integers(0, len(sums), (RESAMPLES // 10, len(sums)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    n = len(sums)
    beyond = NormalDist().cdf(-math.sqrt(n / (n - 1)) * student(n - 1, (1 + level) / 2))
    low, high = np.quantile(np.concatenate(means), [beyond, 1 - beyond])
    return Interval(float(values.mean()), float(low), float(high))


def bootstrap(
    statistic: Callable[[NDArray[np.int64]], float], groups: Sequence[str | None], level: float = 0.95
) -> tuple[float, float] | None:
    """The seeded interval of any statistic of the examples, by the percentiles of `paired_bootstrap`.

    Args:
        statistic: Computed from the positions of the drawn examples, (n,); NaN if it is not defined for them.
        groups: The group of every example, whose examples are drawn together.
        level: The coverage of the interval.

    Returns:
        The ends; None for fewer than `FEWEST` groups, or if the statistic is not defined for a draw in twenty or more.
    """
    _, member = np.unique(groups_of(groups), return_inverse=True)
    order, n = np.argsort(member, kind="stable"), int(member.max()) + 1
    if n < FEWEST:
        return None
    positions = np.split(order, np.cumsum(np.bincount(member))[:-1])
    alone = len(order) == n
    rng = np.random.default_rng(0)
    drawn = []
    for _ in range(RESAMPLES_OF_ANY):
        chosen = rng.integers(0, n, n)
        drawn.append(statistic(order[chosen] if alone else np.concatenate([positions[i] for i in chosen])))
    values = np.asarray(drawn)
    values = values[np.isfinite(values)]
    if len(values) <= 0.95 * RESAMPLES_OF_ANY:
        return None
    beyond = NormalDist().cdf(-math.sqrt(n / (n - 1)) * student(n - 1, (1 + level) / 2))
    low, high = np.quantile(values, [beyond, 1 - beyond])
    return float(low), float(high)


def detectable(values: Sequence[float], groups: Sequence[str | None] | None = None) -> float | None:
    """The smallest difference of means that these examples would detect with power 0.8 at 95 %, if differences varied
    as much as `values`; the differences between two adapters usually vary less. None for fewer than `FEWEST` groups."""
    interval = paired_bootstrap(values, groups)
    if interval is None:
        return None
    z = NormalDist().inv_cdf
    return (interval.high - interval.low) / 2 / z(0.975) * (z(0.975) + z(0.8))


def sign_test(differences: Sequence[float], groups: Sequence[str | None]) -> tuple[int, int, float]:
    """The two-sided exact sign test of groups (Conover 1999, section 3.4); for single examples that are right or wrong
    it is McNemar's test.

    Returns:
        The groups with a mean difference above zero, those below zero, and the p-value.
    """
    sums: dict[str, float] = {}
    for name, difference in zip(groups_of(groups), differences, strict=True):
        sums[name] = sums.get(name, 0.0) + difference
    above, below = sum(total > 0 for total in sums.values()), sum(total < 0 for total in sums.values())
    n = above + below
    tail = sum(math.comb(n, k) for k in range(min(above, below) + 1))
    return above, below, min(1.0, 2 * tail / 2**n)


def student(df: int, share: float = 0.975) -> float:
    """A quantile of Student's t, with an error below 2e-5 from 9 degrees of freedom (Abramowitz and Stegun 26.7.5)."""
    z = NormalDist().inv_cdf(share)
    terms = (
        (z**3 + z) / 4,
        (5 * z**5 + 16 * z**3 + 3 * z) / 96,
        (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / 384,
        (79 * z**9 + 776 * z**7 + 1482 * z**5 - 1920 * z**3 - 945 * z) / 92160,
    )
    return z + sum(term / float(df) ** k for k, term in enumerate(terms, 1))


def wilson(right: float, n: float) -> tuple[float, float]:
    """The interval of a proportion (Wilson 1927); (0, 1) if n is 0. For grouped answers, n is the number of groups, and
    `right` is the share of right answers times n, so that a group counts as one example."""
    if n == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    share, centre = right / n, right / n + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
