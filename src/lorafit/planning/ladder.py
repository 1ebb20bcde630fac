"""The ladder of a trained adapter: smaller versions of it, scored on validation, and the choice among them."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from lorafit.data.split import FEWEST, groups_of
from lorafit.evaluation.statistics import paired_bootstrap

RUNGS = (0.5, 0.25, 0.125, 0.0625)  # shares of the LoRA parameters; a head is not trimmed
TOLERATED = 0.005  # the largest share of the whole adapter's gain over its base that a smaller one may give up
SURE = 0.95  # the one-sided confidence of a rung's bound


@dataclass(frozen=True)
class Rung:
    """A smaller version of the adapter, scored on validation.

    Args:
        share: The share of the LoRA parameters that it keeps.
        parameters: The number of its parameters.
        nll: Its mean NLL.
        difference: Its mean NLL minus that of the whole adapter; above zero it is worse.
        bound: The one-sided upper 95 % confidence bound of the difference; None if there are too few independent
            examples.
        right: The number of questions that it answers right; None if they were not asked, because its NLL is too high
            already or no right answers are known.
    """

    share: float
    parameters: int
    nll: float
    difference: float
    bound: float | None
    right: int | None = None


@dataclass(frozen=True)
class Ladder:
    """The scored versions of an adapter, and the choice among them.

    Args:
        nll: The mean validation NLL of the whole adapter.
        margin: The largest difference to it that is allowed.
        rungs: The smaller versions, from the largest down.
        chosen: The share of the chosen version; 1 for the whole adapter.
        reason: The reason for the choice, in a sentence.
        asked: The number of validation questions that were answered.
        right: How many of them the whole adapter answers right; None if none were asked.
    """

    nll: float
    margin: float
    rungs: tuple[Rung, ...]
    chosen: float
    reason: str
    asked: int = 0
    right: int | None = None


def kept_whole(whole: Sequence[float], base: float, reason: str) -> Ladder:
    """A ladder without rungs, which chooses the whole adapter. whole, base: see `climb_down`."""
    nll = fmean(whole)
    return Ladder(nll, margin_of(nll, base), (), 1.0, reason)


def margin_of(nll: float, base: float) -> float:
    """The largest difference to the whole adapter's NLL that is allowed.

    Args:
        nll: The NLL of the whole adapter.
        base: The NLL of the base.
    """
    return TOLERATED * max(0.0, base - nll)


def costs_too_much(each: Rung, margin: float, right: int | None = None) -> bool:
    """Whether a rung must not be chosen: its NLL may be too high, or it answers fewer questions right than the whole
    adapter.

    Args:
        each: The rung.
        margin: The largest difference in NLL that is allowed.
        right: The number of questions that the whole adapter answers right; None to compare only the NLL.
    """
    if each.bound is None or each.bound > margin:
        return True
    return right is not None and each.right is not None and each.right < right


def rung(
    share: float, parameters: int, small: Sequence[float], whole: Sequence[float], groups: Sequence[str | None]
) -> Rung:
    """The scores of a rung.

    Args:
        share: The share of the LoRA parameters that it keeps.
        parameters: The number of its parameters.
        small: Its NLL on each validation example.
        whole: The whole adapter's NLL on the same examples.
        groups: The groups of the examples.
    """
    differences = [smaller - larger for smaller, larger in zip(small, whole, strict=True)]
    interval = paired_bootstrap(differences, groups, 2 * SURE - 1)
    return Rung(share, parameters, fmean(small), fmean(differences), interval.high if interval else None)


def climb_down(
    whole: Sequence[float],
    base: float,
    rungs: Sequence[Rung],
    groups: Sequence[str | None],
    asked: int = 0,
    right: int | None = None,
) -> Ladder:
    """Choose the smallest rung whose NLL is within the margin, and that answers no fewer questions right.

    The rungs are tested from the largest down, until one fails. With a fixed order, all tests together have the error
    of a single one (Westfall and Krishen 2001).

    The margin is a share of the gain over the base. A share of the NLL itself would forbid every trim after a training
    that brought the NLL close to zero; after a training that hardly lowered the NLL, it would allow to lose all that
    was learnt.

    The number of right answers must not fall. The NLL does not show it: a smaller adapter may predict all answers
    nearly as well, but write another word where two are about equally likely. There is no margin here, because it would
    need more questions than most runs have: 149 without a single loss, to show that fewer than 2 % are lost. Without a
    margin, a rung that loses a share s of n independent questions and gains none passes with probability (1 - s)^n:
    with 116 questions, a loss of 2.6 % passes one time in twenty. A rung that is refused by chance costs only size.

    Args:
        whole: The whole adapter's NLL on each validation example, in nats per token.
        base: The base's mean NLL on the same examples.
        rungs: The rungs, from the largest down.
        groups: The groups of the examples; the examples of a group count as one.
        asked: The number of validation questions that were answered.
        right: How many of them the whole adapter answers right; None if none were asked.
    """
    nll = fmean(whole)
    margin = margin_of(nll, base)
    chosen: Rung | None = None
    for each in rungs:
        if costs_too_much(each, margin, right):
            break
        chosen = each
    ladder = Ladder(nll, margin, tuple(rungs), chosen.share if chosen else 1.0, "", asked, right)
    return replace(ladder, reason=_reason(ladder, base - nll, groups))


def _reason(ladder: Ladder, gained: float, groups: Sequence[str | None]) -> str:
    rungs, margin, asked, right = ladder.rungs, ladder.margin, ladder.asked, ladder.right
    chosen = next((one for one in rungs if one.share == ladder.chosen), None)
    n = len(set(groups_of(groups)))
    allowed = (
        f"{TOLERATED:.1%} of the gain of {gained:.4f} nats may be given up, which is {margin:.4f}"
        if gained > 0
        else "validation shows no gain over the base, so nothing may be given up"
    )
    if chosen is not None:
        reason = (
            f"without {100 * (1 - chosen.share):.4g}% of the LoRA parameters, the validation NLL changes by "
            f"{chosen.difference:+.4f}, with 95 % confidence by less than {chosen.bound:+.4f}; {allowed}"
        )
        if chosen.right is not None:
            reason += f"; of {asked} validation questions it answers {chosen.right} right, the whole adapter {right}"
        smaller = [each for each in rungs if each.share < chosen.share]
        if smaller and smaller[0].right is not None:
            return reason + f", the next smaller one {smaller[0].right}"
        return reason + (f"; the next smaller one may cost {smaller[0].bound:+.4f}" if smaller else "")
    if not rungs:
        return "untrimmed: half of the adapter would be less than one direction of a pair"
    first = rungs[0]
    if first.bound is None:
        return f"untrimmed: {n} independent validation examples are too few: at least {FEWEST} are needed"
    if first.right is not None:
        return (
            f"untrimmed: of {asked} validation questions, {first.share:.0%} of the adapter answers {first.right} right "
            f"and the whole adapter {right}, and trimming must not lose a right answer; the NLL would change by "
            f"{first.difference:+.4f}"
        )
    if first.difference > margin or margin == 0:
        return f"untrimmed: {first.share:.0%} of the adapter already costs {first.difference:+.4f}; {allowed}"
    more = ((first.bound - first.difference) / (margin - first.difference)) ** 2
    needed = f"about {math.ceil(n * more):,}" if more < 100 else "more than a hundred times as many"
    return (
        f"untrimmed: validation cannot decide: {first.share:.0%} of the adapter costs {first.difference:+.4f}, perhaps "
        f"up to {first.bound:+.4f}; {allowed}; {needed} independent examples instead of {n} might decide"
    )
