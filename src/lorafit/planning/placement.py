"""Where to adapt: the arms that are worth trying, by the layer card. Which of them is right, validation decides."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

from lorafit.plan import LowRank, Plan
from lorafit.planning.signal import Card, block_of

WORTH = 0.5  # share of all energy below which a part of the sites is not tried alone
ALL = "all sites"


@dataclass(frozen=True)
class Placement:
    """A plan that is worth trying, or None with the reason why it is not."""

    name: str
    plan: Plan | None
    reason: str


def placements(plan: Plan, card: Card) -> list[Placement]:
    """All sites; each part of the blocks alone, as attention or MLP; the upper half of the blocks, below which nothing
    need be computed twice; and at equal parameters the sites that the card puts first. An arm of fewer sites has a
    higher rank, so that all have about the same number of parameters, save the upper half, whose point is to be cheap.
    """
    found = [Placement(ALL, plan, "the sound default")]
    part = {one.path: one.part for one in card.sites}
    parts = list(dict.fromkeys(part.values()))
    if len(parts) > 1:
        found += [_arm(plan, card, f"{name} alone", lambda slot, name=name: part[slot.site.path] == name)  # type: ignore[misc]
                  for name in parts]  # fmt: skip
    blocks = {block for one in card.sites if (block := one.block) is not None}
    if len(blocks) > 1:
        middle = sorted(blocks)[len(blocks) // 2]
        found.append(_arm(plan, card, "upper half", lambda slot: (block_of(slot.site) or 0) >= middle, even=False))
    top = _first_of(plan, card)
    if len(top) < len(plan.slots):
        found.append(_arm(plan, card, "first of the card", lambda slot: slot.site.path in top))
    return found


def _arm(
    plan: Plan, card: Card, name: str, belongs: Callable[[LowRank], bool], even: bool = True
) -> Placement:  # fmt: skip
    slots = [slot for slot in plan.slots if belongs(slot)]
    share = card.share([slot.site.path for slot in slots])
    has = f"its {len(slots)} sites have {share:.0%} of the pull"
    if share < WORTH:
        return Placement(name, None, f"not tried: {has}, less than half")
    if not even:
        return Placement(name, Plan(tuple(slots)), has)
    each = sum(_width(slot) for slot in slots)
    rank = max(1, round(plan.parameters / each))
    made = [_with_rank(slot, min(rank, slot.site.d_in, slot.site.d_out)) for slot in slots]
    return Placement(name, Plan(tuple(made)), f"{has}; rank {rank} at equal parameters")


def _with_rank(slot: LowRank, rank: int) -> LowRank:
    return replace(slot, rank=rank)  # at the same alpha: the rate serves every rank then


def _first_of(plan: Plan, card: Card) -> set[str]:
    """The sites with the most energy for each parameter, as many as hold half of the parameters."""
    ranked = sorted(card.sites, key=lambda one: -one.energy / one.parameters)
    half = sum(one.parameters for one in card.sites) / 2
    taken: set[str] = set()
    for one in ranked:
        half -= one.parameters
        if half < 0:
            break
        taken.add(one.path)
    return taken


def _width(slot: LowRank) -> int:
    return slot.site.d_in + slot.site.d_out
