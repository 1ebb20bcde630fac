"""Paired statistics. Intervals are 95 %."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np

from lorafit.records import Interval

RESAMPLES = 10_000


def paired_bootstrap(differences: Sequence[float], groups: Sequence[str | None] | None = None) -> Interval:
    """Mean of per-example differences with its percentile bootstrap interval (Efron 1979), seeded.

    Examples that share a group are drawn together: they are not independent evidence. None is a group of its own.
    """
    values = np.asarray(differences, dtype=np.float64)
    names = [f"\0{i}" if g is None else g for i, g in enumerate(groups or [None] * len(values))]
    _, member = np.unique(names, return_inverse=True)
    sums, counts = np.bincount(member, values), np.bincount(member)
    rng = np.random.default_rng(0)
    means = []
    for _ in range(10):
        drawn = rng.integers(0, len(sums), (RESAMPLES // 10, len(sums)))
        means.append(sums[drawn].sum(axis=1) / counts[drawn].sum(axis=1))
    low, high = np.quantile(np.concatenate(means), [0.025, 0.975])
    return Interval(float(values.mean()), float(low), float(high))


def wilson(right: int, n: int) -> tuple[float, float]:
    """Interval of a proportion (Wilson 1927); (0, 1) where n is 0."""
    if n == 0:
        return 0.0, 1.0
    z = 1.959963984540054
    share, centre = right / n, right / n + z * z / (2 * n)
    spread = z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    scale = 1 + z * z / n
    return max(0.0, (centre - spread) / scale), min(1.0, (centre + spread) / scale)
