"""One more round, or none: what the curves of a run say should be tried next, by rules that anyone can check.

A round is accepted by a paired test on validation against the adapter that stands, and the chance of accepting one
that is no better is spent over the rounds: 0.05/k² in round k, 0.08 in all however many there are.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from lorafit.data.split import FEWEST, groups_of
from lorafit.evaluation.statistics import paired_bootstrap
from lorafit.planning.ladder import Ladder, costs_too_much
from lorafit.planning.rules import LARGEST_RANK, Decision, told, told_rank

EARLY = 0.6  # share of the run before which the best validation means that it was too long
FALLING = 0.01  # share of the validation NLL that its last interval must gain to count as falling
ERROR = 0.05


@dataclass(frozen=True)
class Evidence:
    """Of the run that stands: the steps planned, (step, NLL) of validation and of training, and its ladder."""

    steps: int
    validation: Sequence[tuple[int, float]]
    training: Sequence[tuple[int, float]]
    ladder: Ladder


@dataclass(frozen=True)
class Change:
    """What to do otherwise: `kind` in words, the steps of the run, and by how much the ranks grow."""

    kind: str
    steps: int
    growth: int
    reason: str


@dataclass(frozen=True)
class Round:
    """What came of one: mean validation NLL of the adapter that stood and of the new one, their mean difference (below
    zero the new one is better), and the bound below which it lies but for an error of `error`, None where there are too
    few examples for one."""

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
    """What to try, or why to stop. rank: the largest of the plan. refused: kinds that were tried since the adapter that
    stands was found, and were no better."""
    best = min(evidence.validation, key=lambda point: point[1])[0]
    why: list[str] = []
    if best < EARLY * evidence.steps:
        reason = f"validation was best at step {best} of {evidence.steps}, and rose after it: the rate should end there"
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
        why.append("there is no ladder by which to judge its rank")
    elif not costs_too_much(half, evidence.ladder.margin, evidence.ladder.right):
        why.append("half of the rank was no worse")
    elif rank >= LARGEST_RANK:
        why.append(f"rank {rank} is the largest that is tried")
    elif (kind := "more rank") not in refused:
        answers = (
            f" and answers {half.right} questions right, not {evidence.ladder.right}" if half.right is not None else ""
        )
        reason = f"half of the rank costs {half.difference:+.4f} on validation{answers}: what is there is used"
        return Change(kind, evidence.steps, 2, reason)
    else:
        why.append("more rank was tried")
    return "; ".join(why)


def _falling(evidence: Evidence) -> str | None:
    """That training and validation were both falling when the run ended, in words."""
    if len(evidence.validation) < 2 or len(evidence.training) < 8:
        return None
    (_, before), (last, after) = evidence.validation[-2:]
    quarter = len(evidence.training) // 4
    earlier = fmean(nll for _, nll in evidence.training[-2 * quarter : -quarter])
    later = fmean(nll for _, nll in evidence.training[-quarter:])
    if last < evidence.steps or before - after < FALLING * before or later >= earlier:
        return None
    return f"when it ended, validation was falling ({before:.4f} to {after:.4f}) and training too"


def changed(decision: Decision, change: Change) -> Decision:
    """The decision with the change made; warm-up and validations keep their shares of the run."""
    recipe = decision.recipe
    by = change.steps / recipe.steps
    if change.steps != recipe.steps:
        decision = told(decision, "steps", str(change.steps), f"{change.kind}: {change.reason}")
    recipe = replace(
        recipe,
        steps=change.steps,
        warmup=max(1, round(by * recipe.warmup)),
        validate_every=max(1, math.ceil(by * recipe.validate_every)),
    )
    slots = tuple(
        replace(slot, rank=min(change.growth * slot.rank, slot.site.d_in, slot.site.d_out))
        for slot in decision.plan.slots
    )
    decision = replace(decision, plan=replace(decision.plan, slots=slots), recipe=recipe)
    return told_rank(decision, f"{change.kind}: {change.reason}") if change.growth > 1 else decision


def judged(
    number: int,
    change: Change,
    rank: int,
    before: Sequence[float],
    after: Sequence[float],
    groups: Sequence[str | None],
) -> Round:
    """The paired test of round `number`, one-sided, on the NLL of the same examples before and after."""
    error = ERROR / number**2
    found = paired_bootstrap([b - a for a, b in zip(before, after, strict=True)], groups, 1 - 2 * error)
    difference = fmean(after) - fmean(before)
    bound = found.high if found else None
    accepted = bound is not None and bound < 0
    if bound is None:
        verdict = f"{len(set(groups_of(groups)))} independent validation examples decide nothing, {FEWEST} are needed"
    else:
        verdict = (
            f"validation NLL differs by {difference:+.4f}, but for an error of {error:.2g} by less than "
            f"{bound:+.4f}: it is {'better' if accepted else 'not shown to be better'}"
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
