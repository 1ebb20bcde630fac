"""Before the run proper: what validation can tell, the layer card, and the search that decides rate and placement."""

from __future__ import annotations

import shutil
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lorafit.adapter import Adapter
from lorafit.attachment import attach, free_blocks, fresh
from lorafit.data.render import Row
from lorafit.errors import DivergedError
from lorafit.evaluation.nll import example_nll
from lorafit.evaluation.statistics import FEWEST, detectable, groups_of
from lorafit.files import make_folder, read_json, write_json
from lorafit.pipeline.listener import Listener
from lorafit.pipeline.preparing import Opened
from lorafit.plan import Plan
from lorafit.planning import Choice, Decision
from lorafit.planning.halving import (
    SCORED,
    WANTED_PLACES,
    Arm,
    Tried,
    better,
    first_rung,
    rates_for,
    steps_needed,
    survivors,
)  # fmt: skip
from lorafit.planning.placement import Placement, placements
from lorafit.planning.signal import Card, Signal, card_of
from lorafit.run import CARD, SEARCH, TRIED
from lorafit.settings import TrainSettings
from lorafit.training.loop import Trained, train
from lorafit.training.processes import Processes
from lorafit.training.recipe import Recipe

SHRUNK = 4  # of the rank, for the arm that asks whether less is enough


@dataclass(frozen=True)
class Order:
    """One training: what to train, how, where. scored: on so many validation examples; None for all of them. known:
    what is validated first, where it has been measured."""

    plan: Plan
    recipe: Recipe
    folder: str = ""
    scored: int | None = None
    known: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "plan": self.plan.to_json()}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Order:
        plan, recipe = Plan.from_json(value["plan"]), Recipe(**value["recipe"])
        return Order(plan, recipe, value["folder"], value["scored"], tuple(value["known"]))


@dataclass(frozen=True)
class Found:
    """What is known before the run proper: validation NLL of every example under the base, the layer card (None where
    the run is too short for one), and the decision with what the search has changed. seconds: of this process alone."""

    known: tuple[float, ...]
    card: Card | None
    decision: Decision
    seconds: float


def carry_out(
    opened: Opened, order: Order, out: Path, resume: bool, trunk_bytes: int, processes: Processes,
    listener: Listener | None = None,
) -> Trained:  # fmt: skip
    """Train as ordered; called alike in all processes."""
    base, rows = opened.base, opened.rows
    if processes.first:
        (out / order.folder).mkdir(parents=True, exist_ok=True)
    valid = rows["valid"] if order.scored is None else some(rows["valid"], order.scored)
    kept: dict[str, Any] = {}
    if listener:
        name = f"{order.folder}: validation" if order.folder else "validation"
        kept = {"tell": listener.moment, "watch": lambda done, of: listener.watch(name, done, of)}
    return train(base, start_of(opened, order.plan), rows["train"], valid, order.recipe, folder=out / order.folder,
                 resume=resume, trunk_bytes=trunk_bytes, trunk_in=out if order.folder.startswith(SEARCH) else None,
                 way=opened.way, known=order.known, processes=processes, **kept)  # fmt: skip


def start_of(opened: Opened, plan: Plan) -> Adapter:
    """An adapter of this plan that changes nothing yet."""
    if plan == opened.decision.plan:
        return opened.start
    return fresh(opened.base, plan, opened.decision.recipe.seed, opened.renderer.rendering)


def chosen(count: int, of: int) -> list[int]:
    """So many of the validation examples, spread over all."""
    return sorted({i * of // count for i in range(count)}) if count < of else list(range(of))


def some(rows: Sequence[Row], count: int) -> list[Row]:
    """The rows of so many examples, spread over all."""
    numbers = sorted({row.example for row in rows})
    taken = {numbers[i] for i in chosen(count, len(numbers))}
    return [row for row in rows if row.example in taken]


def look(opened: Opened, listener: Listener, count: int | None = None) -> tuple[tuple[float, ...], Card | None]:
    """The base's NLL on the validation examples (on `count` of them, where that many are enough) and the layer card."""
    rows = opened.rows["valid"] if count is None else some(opened.rows["valid"], count)
    with attach(opened.base, opened.start):  # as the run will: its first validation is this one
        known = example_nll(opened.base, rows, partial(listener.watch, "base: validation"), opened.way)
    card = card_of(opened.base, opened.start, opened.rows["train"], opened.decision.recipe, opened.way,
                   lambda d, n: listener.watch("layer card", d, n, "batches"))  # fmt: skip
    return tuple(known), card


def search(
    opened: Opened, settings: TrainSettings, out: Path, resume: bool, processes: Processes, listener: Listener
) -> Found:  # fmt: skip
    """Look, and search as the settings say. Every arm is a training of its own below `out`/search, and what it came to
    is in search/tried.json as soon as it is known: a search that was stopped goes on where it was.

    Called in the first process; the others carry out the orders it gives. Raises DivergedError where all arms have.
    """
    began = time.monotonic()
    folder = out / SEARCH
    make_folder(folder)
    if (folder / CARD).exists():
        told = read_json(folder / CARD)
        known = tuple(told["known"])
        card = card_from(told)
    else:
        known, card = look(opened, listener)
        write_json(folder / CARD, {**told_by(known, opened), "known": known, **(asdict(card) if card else {})})
    searching = _Search(opened, settings, out, resume, processes, listener, known)
    decision = searching.decide(card)
    if not free_blocks(opened.base, decision.plan):
        for path in out.glob("trunk-*.bin"):  # of an arm that was not taken
            path.unlink()
    return Found(known, card, decision, time.monotonic() - began)


def told_by(known: Sequence[float], opened: Opened) -> dict[str, Any]:
    """What validation can tell: how many independent examples there are, the base's NLL, the smallest effect.
    known: NLL of all validation examples, or of some spread over them."""
    groups = [example.group for example in opened.examples.valid]
    part = [groups[i] for i in chosen(len(known), len(groups))]
    seen, there = (len(set(groups_of(names))) for names in (part, groups))
    smallest = detectable(known, part)
    return {"independent": there, "nll": sum(known) / len(known),
            "detectable": None if smallest is None else smallest * (seen / there) ** 0.5}  # fmt: skip


def card_from(told: Mapping[str, Any]) -> Card | None:
    """A card as it was written; None where the run was too short for one."""
    if "sites" not in told:
        return None
    return Card(tuple(Signal(**site) for site in told["sites"]), told["batches"], told["rows"])


def searchable(opened: Opened, settings: TrainSettings) -> tuple[tuple[float, ...], str]:
    """Multiples of the rate by rule that are tried, and in words why these; one alone where nothing is searched."""
    steps, groups = opened.decision.recipe.steps, [one.group for one in opened.examples.valid]
    independent = len(set(groups_of(groups)))
    if settings.search == "none":
        return (1.0,), "not searched, as you set (--search)"
    if settings.learning_rate is not None:
        return (1.0,), "the rate is set by you"
    if independent < FEWEST:
        return (1.0,), (f"not searched: {independent} independent validation examples decide nothing, at least "
                        f"{FEWEST} are needed")  # fmt: skip
    rates = rates_for(steps)
    if len(rates) == 1:
        return rates, (f"not searched: {steps} steps are too short a run to search within half of it; from "
                       f"{steps_needed(2)} on two rates are tried, from {steps_needed(4)} four")  # fmt: skip
    told = f"{len(rates)} rates, each a short run of {first_rung(len(rates), steps)} steps of its own"
    return rates, told + ("; the better half for twice as many" if len(rates) > 2 else "")


class _Search:
    def __init__(
        self, opened: Opened, settings: TrainSettings, out: Path, resume: bool, processes: Processes,
        listener: Listener, known: tuple[float, ...],
    ):  # fmt: skip
        self.opened, self.settings, self.out, self.resume = opened, settings, out, resume
        self.processes, self.listener, self.known = processes, listener, known
        self.path = out / SEARCH / TRIED
        self.stored: list[dict[str, Any]] = read_json(self.path) if self.path.exists() else []
        run = opened.decision.recipe.steps
        self.first = first_rung(len(rates_for(run)), run) if len(rates_for(run)) > 1 else 0
        wanted = round(SCORED * self.first * opened.decision.recipe.batch_size)
        self.places = chosen(max(wanted, 2 * FEWEST), len(known))
        self.groups = [opened.examples.valid[i].group for i in self.places]
        self.plans = [opened.decision.plan]

    def decide(self, card: Card | None) -> Decision:
        decision = self.opened.decision
        rates, why = searchable(self.opened, self.settings)
        rule = decision.recipe.learning_rate
        parameters = decision.plan.parameters
        if len(rates) == 1:
            return decision if self.settings.learning_rate is not None else _told(decision, "search", "none", why)
        arms = [Arm(f"rate {rate * rule:.1e}", rate * rule, parameters) for rate in rates]
        winner, reason = self._halve(arms, "rate", self.first)
        recipe = replace(decision.recipe, learning_rate=winner.rate)
        decision = replace(decision, recipe=recipe)
        decision = _told(decision, "learning rate", f"{winner.rate:.1e}", f"searched among {_list(arms)}: {reason}")
        decision = _told(decision, "search", self.settings.search, why)
        self.listener.say(f"learning rate {winner.rate:.1e}: {reason}")
        if self.settings.search == "thorough":
            decision = self._place(decision, card)
        return decision

    def _place(self, decision: Decision, card: Card | None) -> Decision:
        """Placement and rank, at the rate that has been found: it serves every rank (alpha is fixed)."""
        offered: list[Placement] = []
        if card is not None and self.settings.targets is None:
            offered = placements(decision.plan, card)
            for one in offered:
                if one.plan is None:
                    self.listener.say(f"{one.name}: {one.reason}")
        plans = {one.name: one.plan for one in offered if one.plan is not None} or {"all sites": decision.plan}
        if self.settings.rank is None and (smaller := _smaller(decision.plan)) is not None:
            plans[f"rank {max(slot.rank for slot in smaller.slots)}"] = smaller
        if len(plans) == 1:
            return decision
        self.plans = list(plans.values())
        rate = decision.recipe.learning_rate
        arms = [Arm(name, rate, plan.parameters, i) for i, (name, plan) in enumerate(plans.items())]
        winner, reason = self._halve(arms, "place", first_rung(len(arms), decision.recipe.steps, WANTED_PLACES))
        plan = self.plans[winner.plan]
        self.listener.say(f"{winner.name}: {reason}")
        told = f"{winner.name}, searched among {_list(arms)}: {reason}"
        decision = _told(replace(decision, plan=plan), "sites", str(len(plan.slots)), told)
        ranks = sorted({slot.rank for slot in plan.slots})
        value = f"{ranks[0]}" if len(ranks) == 1 else f"{ranks[0]} to {ranks[-1]}"
        decision = _told(decision, "rank", f"{value} (alpha {self.settings.alpha:g})", "of the placement that won")
        return _told(decision, "adapter", f"{plan.parameters:,} parameters, {plan.bytes / 1e6:.1f} MB", "as searched")

    def _halve(self, arms: Sequence[Arm], what: str, first: int) -> tuple[Arm, str]:
        """The arm that is left, and in words why. first: steps of the first rung."""
        left, rung = list(arms), 0
        while True:
            rung += 1
            steps = first << (rung - 1)
            tried = [self._tried(arm, steps, f"{what}-{rung}-{i + 1}", f"{arm.name}, {i + 1} of {len(left)}")
                     for i, arm in enumerate(left)]  # fmt: skip
            whole = sorted((one for one in tried if one.each is not None), key=lambda one: one.nll)
            if not whole:
                lowest = min(arm.rate for arm in left)
                raise DivergedError(f"every arm of the search diverged, at rates from {lowest:.1e} up: give a lower "
                                    f"--learning-rate, e.g. {lowest / 10:.0e}, and name another --out")  # fmt: skip
            left = survivors(tried, self.groups)
            if len(left) > 1:
                continue
            if len(whole) == 1:
                return whole[0].arm, "the others diverged"
            if whole[0].each == whole[1].each:
                least = min((one.arm for one in whole), key=lambda arm: (arm.rate, arm.parameters))
                return least, "no arm changed the validation NLL: it says nothing of them"
            best, why = better(whole[0], whole[1], self.groups)
            return best.arm, f"{why}, NLL {best.nll:.4f} after {best.steps} steps"

    def _tried(self, arm: Arm, steps: int, cell: str, told: str) -> Tried:
        """What it came to: from the store, or trained now."""
        for one in self.stored:
            if one["cell"] == cell:
                return Tried(arm, one["steps"], None if one["each"] is None else tuple(one["each"]))
        self.listener.say(f"search: {told}, for {steps} steps")
        recipe = replace(self.opened.decision.recipe, learning_rate=arm.rate, steps=steps,
                         warmup=max(1, round(self.settings.warmup * steps)), validate_every=steps)  # fmt: skip
        known = tuple(self.known[i] for i in self.places)
        order = Order(self.plans[arm.plan], recipe, f"{SEARCH}/{cell}", len(self.places), known)
        self.processes.agreed(order.to_json)
        each: tuple[float, ...] | None
        try:
            each = carry_out(self.opened, order, self.out, self.resume, self.settings.trunk_bytes, self.processes,
                             self.listener).each  # fmt: skip
        except DivergedError:
            each = None
        self.stored.append({"cell": cell, **asdict(arm), "steps": steps, "each": each})
        write_json(self.path, self.stored)
        shutil.rmtree(self.out / SEARCH / cell / "checkpoints", ignore_errors=True)
        return Tried(arm, steps, each)


def _smaller(plan: Plan) -> Plan | None:
    """The same sites at a fraction of their rank; None where nothing is left to shrink."""
    made = tuple(replace(slot, rank=max(1, slot.rank // SHRUNK)) for slot in plan.slots)
    return Plan(made) if any(slot.rank > SHRUNK for slot in plan.slots) else None


def _told(decision: Decision, name: str, value: str, reason: str) -> Decision:
    """The decision with one of its choices replaced, or added."""
    flags = {"search": "--search", "learning rate": "--learning-rate", "sites": "--targets", "rank": "--rank, --alpha"}
    new = Choice(name, value, reason, flags.get(name, ""))
    if any(choice.name == name for choice in decision.choices):
        changed = tuple(new if choice.name == name else choice for choice in decision.choices)
        return replace(decision, choices=changed)
    return replace(decision, choices=(*decision.choices, new))


def _list(arms: Sequence[Arm]) -> str:
    return ", ".join(arm.name.removeprefix("rate ") for arm in arms)
