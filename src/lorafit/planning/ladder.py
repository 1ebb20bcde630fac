"""The ladder of a trained adapter: how small it may get before validation notices, and which rung is shipped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from statistics import fmean

from lorafit.data.split import FEWEST, groups_of
from lorafit.evaluation.statistics import paired_bootstrap

RUNGS = (0.5, 0.25, 0.125, 0.0625)  # shares of the LoRA parameters; a head is not trimmed
TOLERATED = 0.005  # share of what the whole adapter gained over its base that a smaller one may give up at most
SURE = 0.95  # one-sided


@dataclass(frozen=True)
class Rung:
    """The adapter at `share` of its parameters on validation: mean NLL, its mean difference to the whole (above zero it
    is worse), and the bound below which that difference lies with 95 % certainty, one-sided; None where there are too
    few independent examples for one. right: questions that it answers right; None where its NLL costs too much already,
    or nothing says what is right."""

    share: float
    parameters: int
    nll: float
    difference: float
    bound: float | None
    right: int | None = None


@dataclass(frozen=True)
class Ladder:
    """Rungs from the largest down; `nll` is the whole adapter's, `margin` what a difference to it may be. chosen: the
    share that is shipped, 1 for the whole; reason: why, in a sentence. asked: validation questions that were answered,
    `right` of them right by the whole; None where none were."""

    nll: float
    margin: float
    rungs: tuple[Rung, ...]
    chosen: float
    reason: str
    asked: int = 0
    right: int | None = None


def kept_whole(whole: Sequence[float], base: float, reason: str) -> Ladder:
    """The ladder of which no rung was tried. whole, base: as `climb_down` takes them."""
    nll = fmean(whole)
    return Ladder(nll, margin_of(nll, base), (), 1.0, reason)


def margin_of(nll: float, base: float) -> float:
    """What a difference to the whole adapter's NLL may be. base: the base's."""
    return TOLERATED * max(0.0, base - nll)


def costs_too_much(each: Rung, margin: float, right: int | None = None) -> bool:
    """Whether a rung may not be shipped: for its NLL, or because it answers fewer questions right than the whole."""
    if each.bound is None or each.bound > margin:
        return True
    return right is not None and each.right is not None and each.right < right


def rung(
    share: float, parameters: int, small: Sequence[float], whole: Sequence[float], groups: Sequence[str | None]
) -> Rung:
    """small, whole: NLL of the same examples, one by one."""
    differences = [one - other for one, other in zip(small, whole, strict=True)]
    found = paired_bootstrap(differences, groups, 2 * SURE - 1)
    return Rung(share, parameters, fmean(small), fmean(differences), found.high if found else None)


def climb_down(
    whole: Sequence[float],
    base: float,
    rungs: Sequence[Rung],
    groups: Sequence[str | None],
    asked: int = 0,
    right: int | None = None,
) -> Ladder:
    """The smallest rung that is not worse by more than the margin, and answers no fewer questions right: down from the
    largest, until one costs too much. A fixed order of tests keeps the error of all at that of one (Westfall and
    Krishen 2001).

    The margin is a share of what was gained. A share of the NLL itself would forbid every cut after a training that
    brought it close to zero, and after one that hardly lowered it would allow to lose all that was learnt.

    Right answers may not become fewer. The NLL does not see them: a smaller adapter may predict all answers nearly as
    well, and yet write another word where two are about as likely. A margin with certainty, as the NLL has, would need
    more questions than most runs have: 149, none of them lost, to show that fewer than 2 % are. Without a margin, a
    rung that loses a share s of n independent questions and gains none passes with probability (1 - s)^n: where 116
    are asked, a loss of 2.6 % passes one time in twenty. A rung that is refused by chance costs nothing but its size.

    Args:
        whole: NLL of every validation example under the whole adapter, nats per token.
        base: mean NLL of the same examples under the base.
        rungs: from the largest down.
        groups: of the examples; those of one group count as one.
        asked: validation questions that were answered.
        right: how many of them the whole answers right; None where none were answered.
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
        f"{TOLERATED:.1%} of the {gained:.4f} nats that were gained may be given up, {margin:.4f}"
        if gained > 0
        else "validation shows no gain over the base, so nothing may be given up"
    )
    if chosen is not None:
        said = (
            f"{1 - chosen.share:.4g} of the LoRA parameters were given up for {chosen.difference:+.4f} validation NLL, "
            f"with 95 % certainty less than {chosen.bound:+.4f}; {allowed}"
        )
        if chosen.right is not None:
            said += f"; of {asked} validation questions it answers {chosen.right} right, the whole {right}"
        following = [each for each in rungs if each.share < chosen.share]
        if following and following[0].right is not None:
            return said + f", the next smaller {following[0].right}"
        return said + (f"; the next smaller may cost {following[0].bound:+.4f}" if following else "")
    if not rungs:
        return "untrimmed: half of it would be less than one direction of a pair"
    first = rungs[0]
    if first.bound is None:
        return f"untrimmed: {n} independent validation examples decide nothing, at least {FEWEST} are needed"
    if first.right is not None:
        return (
            f"untrimmed: of {asked} validation questions, {first.share:.0%} of the adapter answers {first.right} right "
            f"and the whole adapter {right}, and trimming must not lose a right answer; the NLL would change by "
            f"{first.difference:+.4f}"
        )
    if first.difference > margin or margin == 0:
        return f"untrimmed: {first.share:.0%} already costs {first.difference:+.4f}; {allowed}"
    more = ((first.bound - first.difference) / (margin - first.difference)) ** 2
    wanted = f"about {math.ceil(n * more):,}" if more < 100 else "more than a hundred times as many"
    return (
        f"untrimmed: validation cannot tell: {first.share:.0%} differs by {first.difference:+.4f}, perhaps by "
        f"{first.bound:+.4f}; {allowed}; {wanted} independent examples instead of {n} may decide"
    )
