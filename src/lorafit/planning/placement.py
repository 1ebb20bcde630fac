"""Where to adapt: the arms that are worth trying, by the layer card. Which of them is right, validation decides."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from lorafit.adapters.plan import Plan
from lorafit.planning.signal import Card

WORTH = 0.5  # share of all energy below which a part of the sites is not tried alone
ALL = "all sites"


@dataclass(frozen=True)
class Placement:
    """A plan that is worth trying, or None with the reason why it is not."""

    name: str
    plan: Plan | None
    reason: str


def placements(plan: Plan, card: Card, even: bool = True) -> list[Placement]:
    """All sites; each part of the blocks alone, as attention or MLP; the upper half of the blocks, below which nothing
    need be computed twice; and the sites that the card puts first. even: an arm of fewer sites has a higher rank, so
    that all have about the same number of parameters, save the upper half, whose point is to be cheap.
    """
    found = [Placement(ALL, plan, "the sound default")]
    part = {one.path: one.part for one in card.sites}
    parts = list(dict.fromkeys(part.values()))
    if len(parts) > 1:
        found += [
            _arm(plan, card, f"{name} alone", {path for path in part if part[path] == name}, even) for name in parts
        ]
    blocks = {block for one in card.sites if (block := one.block) is not None}
    if len(blocks) > 1:
        middle = sorted(blocks)[len(blocks) // 2]
        upper = {one.path for one in card.sites if one.block is not None and one.block >= middle}
        found.append(_arm(plan, card, "upper half", upper, False))
    top = _first_of(plan, card)
    if len(top) < len(plan.slots):
        found.append(_arm(plan, card, "first of the card", top, even))
    return found


def _arm(plan: Plan, card: Card, name: str, paths: Collection[str], even: bool) -> Placement:
    slots = [slot for slot in plan.slots if slot.site.path in paths]
    share = card.share([slot.site.path for slot in slots])
    has = f"its {len(slots)} sites have {share:.0%} of the pull"
    if share < WORTH:
        return Placement(name, None, f"not tried: {has}, less than half")
    if not even:
        return Placement(name, replace(plan, slots=tuple(slots)), has)
    rank = max(1, round(replace(plan, whole=()).parameters / sum(slot.site.per_rank for slot in slots)))
    # At the same alpha: one rate serves every rank then.
    made = tuple(replace(slot, rank=min(rank, slot.site.d_in, slot.site.d_out)) for slot in slots)
    ranks = {slot.rank for slot in made}
    told = f"rank {rank}, for as many parameters" if ranks == {rank} else f"rank {rank}, or as much as they hold"
    return Placement(name, replace(plan, slots=made), f"{has}; {told}")


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
