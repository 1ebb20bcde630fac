"""Placements: sets of sites that are worth trying according to the layer card. Validation chooses among them."""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, replace

from lorafit.adapters.plan import Plan
from lorafit.planning.signal import Card

WORTH = 0.5  # sites with less than this share of the gradient energy are not tried on their own
ALL = "all sites"


@dataclass(frozen=True)
class Placement:
    """A set of sites.

    Args:
        name: Its name in messages.
        plan: The plan with only these sites; None if it is not worth trying.
        reason: Why it is tried, or why not.
    """

    name: str
    plan: Plan | None
    reason: str


def placements(plan: Plan, card: Card, even: bool = True) -> list[Placement]:
    """The placements to consider: all sites; each part of the blocks on its own, such as attention or MLP; the upper
    half of the blocks, with which the lower half runs only once per example; and the first sites of the card.

    Args:
        plan: The plan with all sites.
        card: The layer card.
        even: Whether placements of fewer sites get a higher rank, so that all have about the same number of parameters.
            The upper half never does, because its purpose is to be cheap.
    """
    found = [Placement(ALL, plan, "the sound default")]
    part = {one.path: one.part for one in card.sites}
    parts = list(dict.fromkeys(part.values()))
    if len(parts) > 1:
        found += [
            _placement(plan, card, f"{name} only", {path for path in part if part[path] == name}, even)
            for name in parts
        ]
    blocks = {block for one in card.sites if (block := one.block) is not None}
    if len(blocks) > 1:
        middle = sorted(blocks)[len(blocks) // 2]
        upper = {one.path for one in card.sites if one.block is not None and one.block >= middle}
        found.append(_placement(plan, card, "upper half", upper, False))
    top = _first_of(card)
    if len(top) < len(plan.slots):
        found.append(_placement(plan, card, "first of the card", top, even))
    return found


def _placement(plan: Plan, card: Card, name: str, paths: Collection[str], even: bool) -> Placement:
    slots = [slot for slot in plan.slots if slot.site.path in paths]
    share = card.share([slot.site.path for slot in slots])
    energy = f"its {len(slots)} sites have {share:.0%} of the gradient energy"
    if share < WORTH:
        return Placement(name, None, f"not tried: {energy}, less than half")
    if not even:
        return Placement(name, replace(plan, slots=tuple(slots)), energy)
    rank = max(1, round(replace(plan, whole=()).parameters / sum(slot.site.per_rank for slot in slots)))
    # Alpha stays the same, with which one learning rate suits every rank.
    resized = tuple(replace(slot, rank=min(rank, slot.site.d_in, slot.site.d_out)) for slot in slots)
    limited = "" if {slot.rank for slot in resized} == {rank} else ", less in narrower layers"
    return Placement(name, replace(plan, slots=resized), f"{energy}; rank {rank} for as many parameters{limited}")


def _first_of(card: Card) -> set[str]:
    """The sites with the most energy per parameter, up to half of all parameters."""
    ranked = sorted(card.sites, key=lambda signal: -signal.energy / signal.parameters)
    left = sum(signal.parameters for signal in card.sites) / 2
    chosen: set[str] = set()
    for signal in ranked:
        left -= signal.parameters
        if left < 0:
            break
        chosen.add(signal.path)
    return chosen
