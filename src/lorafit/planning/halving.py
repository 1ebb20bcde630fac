"""Successive halving (Jamieson and Talwalkar 2016): try many arms for a few steps each, then the better half for more.

An arm is a learning rate and a plan. Each rung is a complete run whose rate falls to zero, because a rate is judged by
where its run ends. Short runs favour high rates, so if validation cannot tell two arms apart, the lower rate is chosen,
or at equal rates the smaller plan.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from lorafit.evaluation.statistics import paired_bootstrap

RATES = (0.1, 1 / 3, 1.0, 3.0)  # multiples of the rule's rate
FEW_RATES = (1 / 3, 1.0)  # if there is time for two only; three times the rule's rate diverges too often (docs/log.md)
FEWEST_STEPS = 20  # of the first rung
# The share of the run's steps that a search of the rate takes if possible, and at most. Measured in time it takes about
# 0.05 more, for the layer card and for opening the arms (0.52 in place of 0.47, bench/planning.py).
WANTED, MOST = 0.4, 0.45
WANTED_PLACES, MOST_PLACES = 0.8, 1.5  # the same for a search of placements, which runs only on request
SCORED = 0.5  # examples on which an arm is scored, per step of the first rung


@dataclass(frozen=True)
class Arm:
    """One candidate of the search.

    Args:
        name: Its name in messages.
        rate: Its peak learning rate.
        parameters: The number of parameters of its plan.
        plan: The number of its plan among those that are tried.
    """

    name: str
    rate: float
    parameters: int
    plan: int = 0


@dataclass(frozen=True)
class Tried:
    """The result of an arm in one rung.

    Args:
        arm: The arm.
        steps: The steps it was trained for.
        each: The NLL of each example on which it was scored; None if training diverged.
    """

    arm: Arm
    steps: int
    each: tuple[float, ...] | None

    @property
    def nll(self) -> float:
        return math.inf if self.each is None else sum(self.each) / len(self.each)


def cost(arms: int, first: int) -> float:
    """The cost of a search in training steps. The forwards of scoring are included; one forward is a third of a step.

    Args:
        arms: The number of arms.
        first: The steps of the first rung. Each later rung is twice as long as the one before.
    """
    total, length = 0.0, first
    while arms > 1:
        total += arms * (length + SCORED * first / 3)
        arms, length = math.ceil(arms / 2), 2 * length
    return total


def first_rung(arms: int, run_steps: int, wanted: float = WANTED) -> int:
    """The steps of the first rung with which a search takes the share `wanted` of the run's steps."""
    return max(FEWEST_STEPS, int(wanted * run_steps / cost(arms, 1)))


def rates_for(run_steps: int) -> tuple[float, ...]:
    """The multiples of the rule's rate that a run of this length has time to try; (1.0,) if it has time for none."""
    for rates in (RATES, FEW_RATES):
        if cost(len(rates), first_rung(len(rates), run_steps)) <= MOST * run_steps:
            return rates
    return (1.0,)


def steps_needed(arms: int, most: float = MOST) -> int:
    """The steps of the shortest run in which trying this many arms takes at most the share `most`."""
    return math.ceil(cost(arms, FEWEST_STEPS) / most)


def survivors(tried: Sequence[Tried]) -> list[Tried]:
    """The better half, best first. Arms that diverged are left out, so the list may be empty."""
    finite = sorted((one for one in tried if one.each is not None), key=lambda one: one.nll)
    return finite[: math.ceil(len(tried) / 2)]


def better(best: Tried, other: Tried, groups: Sequence[str | None]) -> tuple[Tried, str]:
    """The winner of the last two arms, and the reason.

    Args:
        best: The arm with the lower NLL.
        other: The other arm, scored on the same examples.
        groups: The groups of the examples.
    """
    assert best.each is not None and other.each is not None
    interval = paired_bootstrap([b - a for a, b in zip(best.each, other.each, strict=True)], groups)
    gap = f"{other.nll - best.nll:+.4f} nats"
    bounds = "too few examples" if interval is None else f"95 % interval {interval.low:+.4f} to {interval.high:+.4f}"
    if interval is not None and interval.low > 0:
        return best, f"{other.arm.name} is worse by {gap} ({bounds})"
    winner = min(best, other, key=lambda one: (one.arm.rate, one.arm.parameters))
    lower = "lower rate" if best.arm.rate != other.arm.rate else "smaller plan"
    loser = (other if winner is best else best).arm.name
    return winner, f"validation cannot tell it from {loser} ({gap}, {bounds}), so the {lower} is chosen"
