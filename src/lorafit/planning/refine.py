"""Decides from the curves of a run whether another round of training may help, and which change it should make.

The adapter of a round is accepted if a paired test on validation shows that it is better than the current one. The
error of the test is 0.05/k² in round k. Over any number of rounds, the chance of accepting an adapter that is no better
is thus at most 0.083.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from lorafit.data.split import FEWEST, groups_of
from lorafit.evaluation.statistics import paired_bootstrap
from lorafit.planning.ladder import Ladder, costs_too_much
from lorafit.planning.rules import LARGEST_RANK, Decision, with_choice, with_rank

EARLY = 0.6  # if the best validation lies before this share of the run, the run was too long
FALLING = 0.01  # validation counts as falling if its last interval lowered the NLL by at least this share
ERROR = 0.05  # of the test in the first round


@dataclass(frozen=True)
class Evidence:
    """What is known of the run that trained the current adapter.

    Args:
        steps: The number of planned steps.
        validation: The validation curve: (step, NLL).
        training: The training curve: (step, NLL).
        ladder: The ladder of its adapter.
    """

    steps: int
    validation: Sequence[tuple[int, float]]
    training: Sequence[tuple[int, float]]
    ladder: Ladder


@dataclass(frozen=True)
class Change:
    """A change to the run.

    Args:
        kind: The kind of change, in words.
        steps: The new number of steps.
        growth: The factor on all ranks.
        reason: The reason, in a sentence.
    """

    kind: str
    steps: int
    growth: int
    reason: str


@dataclass(frozen=True)
class Round:
    """The result of a round.

    Args:
        number: The number of the round, from 1.
        kind: The kind of change.
        reason: The reason for the change.
        steps: The number of steps.
        rank: The largest rank.
        before: The mean validation NLL of the adapter before the round.
        after: The mean validation NLL of the new adapter.
        difference: `after` minus `before`; below zero the new adapter is better.
        bound: The one-sided upper confidence bound of the difference, with the error `error`; None if there are too few
            examples.
        error: The error of the test.
        accepted: Whether the new adapter is kept.
        verdict: The result in a sentence.
    """

    number: int
    kind: str
    reason: str
    steps: int
    rank: int
    before: float
    after: float
    difference: float
    bound: float | None
    error: float
    accepted: bool
    verdict: str


def next_change(evidence: Evidence, rank: int, refused: Collection[str] = ()) -> Change | str:
    """The next change to try, or the reason why there is none.

    Args:
        evidence: What is known of the run.
        rank: The largest rank of the plan.
        refused: The kinds of change that were tried from the current adapter without success.
    """
    best = min(evidence.validation, key=lambda point: point[1])[0]
    why: list[str] = []
    if best < EARLY * evidence.steps:
        reason = f"validation was best at step {best} of {evidence.steps} and rose then, so the run should end there"
        if best and (kind := "fewer steps") not in refused:
            return Change(kind, best, 1, reason)
        why.append("fewer steps were tried" if best else "the adapter was never better than the base: try a lower rate")
    elif (falling := _falling(evidence)) is not None:
        if (kind := "more steps") not in refused:
            return Change(kind, 2 * evidence.steps, 1, falling)
        why.append("more steps were tried")
    else:
        why.append("training or validation had stopped falling when the run ended")
    half = next((each for each in evidence.ladder.rungs if each.share == 0.5), None)
    if half is None:
        why.append("no smaller adapter was scored, so it is not known whether the rank is used")
    elif not costs_too_much(half, evidence.ladder.margin, evidence.ladder.right):
        why.append("half of the rank was no worse")
    elif rank >= LARGEST_RANK:
        why.append(f"rank {rank} is the largest that is tried")
    elif (kind := "more rank") not in refused:
        answers = (
            f" and answers {half.right} questions right instead of {evidence.ladder.right}"
            if half.right is not None
            else ""
        )
        reason = f"half of the rank costs {half.difference:+.4f} on validation{answers}, so all of the rank is used"
        return Change(kind, evidence.steps, 2, reason)
    else:
        why.append("a higher rank was tried")
    return "; ".join(why)


def _falling(evidence: Evidence) -> str | None:
    """A sentence if training and validation were both falling when the run ended; otherwise None."""
    if len(evidence.validation) < 2 or len(evidence.training) < 8:
        return None
    (_, before), (last, after) = evidence.validation[-2:]
    quarter = len(evidence.training) // 4
    earlier = fmean(nll for _, nll in evidence.training[-2 * quarter : -quarter])
    later = fmean(nll for _, nll in evidence.training[-quarter:])
    if last < evidence.steps or before - after < FALLING * before or later >= earlier:
        return None
    return f"when the run ended, validation was falling ({before:.4f} to {after:.4f}), and so was training"


def changed(decision: Decision, change: Change) -> Decision:
    """The decision with the change. Warm-up and validations keep their shares of the run."""
    recipe = decision.recipe
    ratio = change.steps / recipe.steps
    if change.steps != recipe.steps:
        decision = with_choice(decision, "steps", str(change.steps), f"{change.kind}: {change.reason}")
    recipe = replace(
        recipe,
        steps=change.steps,
        warmup=max(1, round(ratio * recipe.warmup)),
        validate_every=max(1, math.ceil(ratio * recipe.validate_every)),
    )
    slots = tuple(
        replace(slot, rank=min(change.growth * slot.rank, slot.site.d_in, slot.site.d_out))
        for slot in decision.plan.slots
    )
    decision = replace(decision, plan=replace(decision.plan, slots=slots), recipe=recipe)
    return with_rank(decision, f"{change.kind}: {change.reason}") if change.growth > 1 else decision


def judged(
    number: int,
    change: Change,
    rank: int,
    before: Sequence[float],
    after: Sequence[float],
    groups: Sequence[str | None],
) -> Round:
    """The result of a round, by a one-sided paired test.

    Args:
        number: The number of the round, from 1.
        change: The change of the round.
        rank: The largest rank of the new plan.
        before: The NLL of each validation example before the round.
        after: The NLL of the same examples with the new adapter.
        groups: The groups of the examples.
    """
    error = ERROR / number**2
    interval = paired_bootstrap([b - a for a, b in zip(before, after, strict=True)], groups, 1 - 2 * error)
    difference = fmean(after) - fmean(before)
    bound = interval.high if interval else None
    accepted = bound is not None and bound < 0
    if bound is None:
        n = len(set(groups_of(groups)))
        verdict = f"{n} independent validation examples are too few: at least {FEWEST} are needed"
    else:
        verdict = (
            f"validation NLL differs by {difference:+.4f}, with {1 - error:.4g} confidence by less than {bound:+.4f}: "
            f"the new adapter is {'better' if accepted else 'not shown to be better'}"
        )
    return Round(
        number,
        change.kind,
        change.reason,
        change.steps,
        rank,
        fmean(before),
        fmean(after),
        difference,
        bound,
        error,
        accepted,
        verdict,
    )
