"""Two ways to compute the same thing, timed for a few numbers of rows; out comes the faster way for any number.

Which way is faster depends on the processor, the dtype and the number of rows, so it is measured when an engine opens.
The time of each way is interpolated, and the way with the lower line is chosen.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

# The most informative ones come first: where the budget ends early, the line through them is nearly the same.
ROWS = (16, 128, 1, 32, 4, 256, 64, 8, 2, 512)
BUDGET = 0.4  # seconds after which no other number of rows is timed
RUNS = 3  # of each way and number of rows, at least two; the fastest counts
MEASURED = 64 << 20  # bytes of weights that are timed with few rows, more than most caches hold
READING = 32  # rows up to which a product is bound by reading its weights, not by arithmetic


@dataclass(frozen=True)
class Timings:
    """Seconds that two ways take, first (n,) and second (n,), for ascending numbers of rows (n,)."""

    rows: tuple[int, ...]
    first: tuple[float, ...]
    second: tuple[float, ...]

    def at(self, rows: int) -> tuple[float, float]:
        """Seconds of each way for a number of rows, interpolated. Fewer rows than were timed take as long as the
        fewest; above the most, where arithmetic dominates, time is proportional to the rows."""
        most = self.rows[-1]
        times = (float(np.interp(rows, self.rows, way)) * max(rows, most) / most for way in (self.first, self.second))
        return next(times), next(times)

    def faster(self, rows: int) -> bool:
        """Whether the first way takes no longer than the second."""
        return self._choices[min(rows, self.rows[-1])]

    @cached_property
    def _choices(self) -> list[bool]:  # used at every layer of every step
        return [first <= second for first, second in map(self.at, range(self.rows[-1] + 1))]


FIRST, SECOND = Timings((1,), (0.0,), (1.0,)), Timings((1,), (1.0,), (0.0,))  # whatever the number of rows
# Where the result must not depend on the clock: the first way for answers, the second for prompts.
UNTIMED = Timings((32, 64), (0.0, 1.0), (1.0, 0.0))


def bytes_for(rows: int) -> int:
    """Bytes of weights to time with this many rows: too many for a cache, or enough that arithmetic takes as long."""
    return MEASURED * READING // max(rows, READING)


def compared(
    ways: Callable[[int], tuple[Callable[[], object], Callable[[], object], float]], counts: Sequence[int]
) -> Timings:
    """Time two ways in turns.

    Args:
        ways: for a number of rows, returns two functions that run each way, and the share of the whole that they do.
        counts: numbers of rows, the most informative first. The first is always timed, the others within BUDGET.

    Returns:
        The seconds that the whole takes each way.
    """
    end = time.perf_counter() + BUDGET
    measured: dict[int, tuple[float, float]] = {}
    for rows in counts:
        if measured and time.perf_counter() > end:
            break
        first, second, share = ways(rows)
        pairs: list[tuple[float, float]] = []
        while len(pairs) < 2 or (len(pairs) < RUNS and time.perf_counter() < end):  # the first run may read from disk
            pairs.append((_seconds(first), _seconds(second)))
        fastest = [min(times) / share for times in zip(*pairs, strict=True)]
        measured[rows] = fastest[0], fastest[1]
    ascending = sorted(measured)
    return Timings(tuple(ascending), *(tuple(measured[rows][way] for rows in ascending) for way in (0, 1)))


def _seconds(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began
