"""Successive halving (Jamieson and Talwalkar 2016): many arms for a few steps, the better half for more.

Every rung is a run of its own with its own decay of the rate to zero, for a rate is judged by where its run ends. The
horizon is short, which favours high rates, so where validation cannot tell two apart the lower rate is taken, and the
smaller plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lorafit.evaluation.statistics import paired_bootstrap

RATES = (0.1, 1 / 3, 1.0, 3.0)  # times the rate by rule
FEW_RATES = (1 / 3, 1.0)  # where there is time for two: three times the rule's rate diverges too often (docs/log.md)
FEWEST_STEPS = 20  # that an arm is tried for
# Of the run that searching the rate takes, where that is enough; and at most. By the clock it is about 0.05 more: the
# layer card, and opening every arm (0.52 for 0.47, bench/planning.py).
WANTED, MOST = 0.4, 0.45
WANTED_PLACES, MOST_PLACES = 0.8, 1.5  # and that searching places takes, which has to be asked for
SCORED = 0.5  # examples an arm is scored on, for each one of the first rung's steps


@dataclass(frozen=True)
class Arm:
    """name: told. rate: the peak. parameters: of its plan; plan: which one, among those that are tried."""

    name: str
    rate: float
    parameters: int
    plan: int = 0


@dataclass(frozen=True)
class Tried:
    """An arm after `steps` steps: NLL of each example it was scored on; None where it diverged."""

    arm: Arm
    steps: int
    each: tuple[float, ...] | None

    @property
    def nll(self) -> float:
        return math.inf if self.each is None else sum(self.each) / len(self.each)


def cost(arms: int, first: int) -> float:
    """Steps that halving these arms takes, the first rung being so long and each later one twice as long as the one
    before; scoring counts, a forward being a third of a step's work."""
    total, length = 0.0, first
    while arms > 1:
        total += arms * (length + SCORED * first / 3)
        arms, length = math.ceil(arms / 2), 2 * length
    return total


def first_rung(arms: int, run_steps: int, wanted: float = WANTED) -> int:
    """Steps of the first rung, where halving is to take `wanted` of the run."""
    return max(FEWEST_STEPS, int(wanted * run_steps / cost(arms, 1)))


def rates_for(run_steps: int) -> tuple[float, ...]:
    """The multiples of the rate by rule for which there is time; the rule's alone where there is none."""
    for rates in (RATES, FEW_RATES):
        if cost(len(rates), first_rung(len(rates), run_steps)) <= MOST * run_steps:
            return rates
    return (1.0,)


def steps_needed(arms: int, most: float = MOST) -> int:
    """The shortest run of which trying so many arms takes no more than `most`."""
    return math.ceil(cost(arms, FEWEST_STEPS) / most)


def survivors(tried: Sequence[Tried]) -> list[Tried]:
    """The better half, best first; what diverged is left out, and where all have, nothing is left."""
    whole = sorted((one for one in tried if one.each is not None), key=lambda one: one.nll)
    return whole[: math.ceil(len(tried) / 2)]


def better(best: Tried, other: Tried, groups: Sequence[str | None]) -> tuple[Tried, str]:
    """Of two arms the one to go on with, and why. best: of the lower NLL."""
    assert best.each is not None and other.each is not None
    found = paired_bootstrap([b - a for a, b in zip(best.each, other.each, strict=True)], groups)
    gap = f"{other.nll - best.nll:+.4f} nats"
    if found is not None and found.low > 0:
        return best, f"{other.arm.name} is worse by {gap} (95 % interval {found.low:+.4f} to {found.high:+.4f})"
    first = min(best, other, key=lambda one: (one.arm.rate, one.arm.parameters))
    told = "too few examples" if found is None else f"95 % interval {found.low:+.4f} to {found.high:+.4f}"
    lower = "the lower rate" if best.arm.rate != other.arm.rate else "the smaller plan"
    left = (other if first is best else best).arm.name
    return first, f"validation cannot tell it from {left} ({gap}, {told}), and {lower} is taken"
