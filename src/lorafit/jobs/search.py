"""Before the run proper: what validation can tell, the layer card, and the search that decides rate and placement."""

from __future__ import annotations

import shutil
import time
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.plan import Plan
from lorafit.attachment.adapters import attach
from lorafit.attachment.pure import fresh
from lorafit.data.render import Row
from lorafit.errors import DivergedError
from lorafit.evaluation.nll import example_nll, require_finite
from lorafit.evaluation.statistics import FEWEST, detectable, groups_of
from lorafit.files import make_folder, read_json, write_json
from lorafit.jobs.listener import Listener
from lorafit.jobs.prepare import Opened
from lorafit.planning import Decision
from lorafit.planning.halving import (
    MOST_PLACES,
    SCORED,
    WANTED_PLACES,
    Arm,
    Tried,
    better,
    cost,
    first_rung,
    rates_for,
    steps_needed,
    survivors,
)
from lorafit.planning.placement import ALL, Placement, placements
from lorafit.planning.rules import reached, told, told_rank
from lorafit.planning.signal import Card, Signal, card_of
from lorafit.runs.folder import CARD, SEARCH, TRIED
from lorafit.settings import TrainSettings
from lorafit.training.loop import Moment, Trained, train
from lorafit.training.processes import Processes
from lorafit.training.recipe import Recipe

SHRUNK = 4  # of the rank, for the arm that asks whether less is enough


@dataclass(frozen=True)
class Order:
    """One training: what to train, how, where. scored: numbers of the validation examples it is scored on, none for all
    of them. known: their NLL before, where it has been measured."""

    plan: Plan
    recipe: Recipe
    folder: str = ""
    scored: tuple[int, ...] = ()
    known: tuple[float, ...] = ()

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "plan": self.plan.to_json()}

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Order:
        plan, recipe = Plan.from_json(value["plan"]), Recipe(**value["recipe"])
        return Order(plan, recipe, value["folder"], tuple(value["scored"]), tuple(value["known"]))


def carry_out(
    opened: Opened,
    order: Order,
    out: Path,
    resume: bool,
    trunk_bytes: int,
    processes: Processes,
    listener: Listener | None = None,
    tell: Callable[[Moment], None] | None = None,
) -> Trained:
    """Train as ordered; called alike in all processes. tell: hears the moments in the listener's place."""
    base, rows = opened.base, opened.rows
    if processes.first:
        (out / order.folder).mkdir(parents=True, exist_ok=True)
    valid = some(rows["valid"], order.scored) if order.scored else rows["valid"]
    kept: dict[str, Any] = {}
    if listener:
        name = f"{order.folder}: validation" if order.folder else "validation"
        kept = {"tell": tell or listener.moment, "watch": lambda done, of: listener.watch(name, done, of)}
    return train(
        base,
        start_of(opened, order.plan),
        rows["train"],
        valid,
        order.recipe,
        folder=out / order.folder,
        resume=resume,
        trunk_bytes=trunk_bytes,
        trunk_in=out if order.folder.startswith(SEARCH) else None,
        way=opened.way,
        known=order.known,
        processes=processes,
        **kept,
    )


def start_of(opened: Opened, plan: Plan) -> Adapter:
    """An adapter of this plan that changes nothing yet."""
    if plan == opened.decision.plan:
        return opened.start
    return fresh(opened.base, plan, opened.decision.recipe.seed, opened.start.rendering)


def spread_over(count: int, groups: Sequence[str | None]) -> list[int]:
    """Numbers of so many examples, of as many groups as there are: the first of every group, then the second; evenly
    spread where not all of a turn are wanted."""
    before: Counter[str] = Counter()
    turns: dict[int, list[int]] = {}
    for i, group in enumerate(groups_of(groups)):
        turns.setdefault(before[group], []).append(i)
        before[group] += 1
    taken: list[int] = []
    for _, turn in sorted(turns.items()):
        left = count - len(taken)
        taken += turn if left >= len(turn) else [turn[i * len(turn) // left] for i in range(left)]
    return sorted(taken)


def some(rows: Sequence[Row], numbers: Collection[int]) -> list[Row]:
    """The rows of these examples."""
    wanted = set(numbers)
    return [row for row in rows if row.example in wanted]


def look(
    opened: Opened, listener: Listener, places: Collection[int] | None = None
) -> tuple[tuple[float, ...], Card | None, float]:
    """The base's NLL on the validation examples (on those at `places`), the layer card, and the seconds that a token of
    a forward takes.
    Raises BaseError where the NLL is not finite."""
    began = time.monotonic()
    rows = opened.rows["valid"] if places is None else some(opened.rows["valid"], places)
    with attach(opened.base, opened.start):  # as the run will: its first validation is this one
        known = example_nll(opened.base, rows, partial(listener.watch, "base: validation"), opened.way)
    forward = (time.monotonic() - began) / sum(len(row.ids) for row in rows)
    require_finite(opened.base, known)
    card = card_of(
        opened.base,
        _with_b_of_zero(opened),
        opened.rows["train"],
        opened.decision.recipe,
        opened.way,
        lambda d, n: listener.watch("layer card", d, n, "batches"),
    )
    return tuple(known), card, forward


def looked(opened: Opened, out: Path, listener: Listener) -> tuple[tuple[float, ...], Card | None, float | None]:
    """What `look` finds on all validation examples, kept in search/card.json for a resume. The seconds are None where
    an earlier version looked."""
    path = out / SEARCH / CARD
    if path.exists():
        told = read_json(path)
        return tuple(told["known"]), card_from(told), told.get("forward")
    make_folder(out / SEARCH)
    known, card, forward = look(opened, listener)
    told = {**told_by(known, opened, range(len(known))), "known": known, "forward": forward}
    write_json(path, {**told, **(asdict(card) if card else {})})
    return known, card, forward


def _with_b_of_zero(opened: Opened) -> Adapter:
    """What the run starts from, or LoRA on the same sites where its method does not start with B = 0."""
    plan = opened.start.plan
    if all(factor.trained for slot in plan.slots for factor in slot.factors().values()):
        return opened.start
    plain = Plan(tuple(replace(slot, variant="lora") for slot in plan.slots))
    return fresh(opened.base, plain, opened.decision.recipe.seed)


def search(
    opened: Opened,
    settings: TrainSettings,
    known: tuple[float, ...],
    card: Card | None,
    out: Path,
    resume: bool,
    processes: Processes,
    listener: Listener,
) -> Decision:
    """Search as the settings say, and decide. Every arm is a training of its own below `out`/search, and what it came
    to is in search/tried.json as soon as it is known: a search that was stopped goes on where it was.

    Called in the first process; the others carry out the orders it gives. Raises DivergedError where all arms have.
    """
    return _Search(opened, settings, out, resume, processes, listener, known).decide(card)


def search_steps(opened: Opened, settings: TrainSettings, card: Card | None, out: Path | None = None) -> float:
    """As long as so many steps the search takes at most; without what a run in `out` has tried already."""
    steps, rates = opened.decision.recipe.steps, rates_tried(opened, settings)[0]
    ahead = cost(len(rates), first_rung(len(rates), steps)) if rates[1:] else 0.0
    if settings.search == "thorough" and not obstacle(opened, settings):
        plans = len(places_tried(opened, settings, card)[0])
        placing = places_cost(plans, steps) if plans > 1 else 0.0
        ahead += placing if placing <= MOST_PLACES * steps else 0.0
    tried = out / SEARCH / TRIED if out else None
    return max(0.0, ahead - sum(one["steps"] for one in read_json(tried))) if tried and tried.exists() else ahead


def told_by(known: Sequence[float], opened: Opened, places: Sequence[int]) -> dict[str, Any]:
    """What validation can tell: how many independent examples there are, the base's NLL, the smallest effect.
    known: NLL of the validation examples at `places`."""
    groups = [example.group for example in opened.examples.valid]
    part = [groups[i] for i in places]
    seen, there = (len(set(groups_of(names))) for names in (part, groups))
    smallest = detectable(known, part)
    return {
        "independent": there,
        "nll": sum(known) / len(known),
        "detectable": None if smallest is None else smallest * (seen / there) ** 0.5,
    }


def card_from(told: Mapping[str, Any]) -> Card | None:
    """A card as it was written; None where the run was too short for one."""
    if "sites" not in told:
        return None
    return Card(tuple(Signal(**site) for site in told["sites"]), told["batches"], told["rows"])


def obstacle(opened: Opened, settings: TrainSettings) -> str | None:
    """Why nothing is searched; None where something may be."""
    steps, groups = opened.decision.recipe.steps, [one.group for one in opened.examples.valid]
    independent = len(set(groups_of(groups)))
    if settings.search == "none":
        return "as you set"
    if independent < FEWEST:
        return f"{independent} independent validation examples decide nothing, at least {FEWEST} are needed"
    if rates_for(steps) == (1.0,):
        return (
            f"{steps} steps are too short a run to search within half of it; from {steps_needed(2)} on two rates "
            f"are tried, from {steps_needed(4)} four"
        )
    return None


def rates_tried(opened: Opened, settings: TrainSettings) -> tuple[list[float], str]:
    """The rates that a search compares, and why these; one alone where none are compared."""
    steps, rule = opened.decision.recipe.steps, opened.decision.recipe.learning_rate
    if why := obstacle(opened, settings):
        return [rule], f"not searched: {why}"
    if settings.learning_rate is not None:
        return [rule], "the rate is set by you"
    rates = rates_for(steps)
    told = f"{len(rates)} rates, each a short run of {first_rung(len(rates), steps)} steps of its own"
    return [rate * rule for rate in rates], told + ("; the better half for twice as many" if len(rates) > 2 else "")


def places_tried(opened: Opened, settings: TrainSettings, card: Card | None) -> tuple[dict[str, Plan], list[Placement]]:
    """The plans that a thorough search compares, by name, and all placements, those too that are not tried."""
    plan = opened.decision.plan
    offered: list[Placement] = []
    if card is not None and settings.targets is None:
        offered = placements(plan, card, even=settings.rank is None)
    whole = ALL if settings.targets is None else "the sites you named"
    plans = {one.name: one.plan for one in offered if one.plan is not None} or {whole: plan}
    if settings.rank is None and (smaller := _smaller(plan)) is not None:
        plans[f"rank {max(slot.rank for slot in smaller.slots)}"] = smaller
    return plans, offered


def places_cost(arms: int, run_steps: int) -> float:
    """Steps that searching among so many plans takes."""
    return cost(arms, first_rung(arms, run_steps, WANTED_PLACES))


class _Search:
    def __init__(
        self,
        opened: Opened,
        settings: TrainSettings,
        out: Path,
        resume: bool,
        processes: Processes,
        listener: Listener,
        known: tuple[float, ...],
    ):
        self.opened, self.settings, self.out, self.resume = opened, settings, out, resume
        self.processes, self.listener, self.known = processes, listener, known
        self.path = out / SEARCH / TRIED
        self.stored: list[dict[str, Any]] = read_json(self.path) if self.path.exists() else []
        self.run_steps = opened.decision.recipe.steps
        self.first = first_rung(max(2, len(rates_for(self.run_steps))), self.run_steps)
        wanted = round(SCORED * self.first * opened.decision.recipe.batch_size)
        groups = [one.group for one in opened.examples.valid]
        self.places = spread_over(max(wanted, 2 * FEWEST), groups)
        self.groups = [groups[i] for i in self.places]
        self.before = tuple(known[i] for i in self.places)
        self.plans = [opened.decision.plan]

    def decide(self, card: Card | None) -> Decision:
        decision = self.opened.decision
        if why := obstacle(self.opened, self.settings):
            return told(decision, "search", "none", why, "--search")
        rates, why = rates_tried(self.opened, self.settings)
        if len(rates) > 1:
            arms = [Arm(f"rate {rate:.1e}", rate, decision.plan.parameters) for rate in rates]
            winner, reason = self._halve(arms, "rate", self.first)
            decision = replace(decision, recipe=replace(decision.recipe, learning_rate=winner.rate))
            self.listener.say(f"learning rate {winner.rate:.1e}: {reason}")
            reason = f"searched among {_list(arms)}: {reason}"
            decision = told(decision, "learning rate", f"{winner.rate:.1e}", reason)
        if self.settings.search == "thorough":
            decision, more = self._place(decision, card)
            why = f"{why}; {more}"
        return told(decision, "search", self.settings.search, why, "--search")

    def _place(self, decision: Decision, card: Card | None) -> tuple[Decision, str]:
        """Placement and rank, at the rate that has been found: it serves every rank (alpha is fixed). Also in words
        what was tried."""
        plans, offered = places_tried(self.opened, self.settings, card)
        for one in offered:
            if one.plan is None:
                self.listener.say(f"{one.name}: {one.reason}")
        if len(plans) == 1:
            return decision, "no other places are worth trying"
        if places_cost(len(plans), self.run_steps) > MOST_PLACES * self.run_steps:
            needed = steps_needed(len(plans), MOST_PLACES)
            return decision, f"too short a run to try {len(plans)} places and ranks, from {needed} steps on they are"
        self.plans = list(plans.values())
        rate = decision.recipe.learning_rate
        arms = [Arm(name, rate, plan.parameters, i) for i, (name, plan) in enumerate(plans.items())]
        first = first_rung(len(arms), self.run_steps, WANTED_PLACES)
        winner, reason = self._halve(arms, "place", first)
        self.listener.say(f"{winner.name}: {reason}")
        decision = replace(decision, plan=self.plans[winner.plan])
        share = reached(self.opened.base, [slot.site for slot in decision.plan.slots])
        reason = f"{winner.name}, searched among {_list(arms)}: {reason}; {share}"
        decision = told(decision, "sites", str(len(decision.plan.slots)), reason)
        said = f"{len(arms)} places and ranks, the first of {first} steps"
        if decision.plan == self.opened.decision.plan:
            return decision, said
        return told_rank(decision, "of the placement that won"), said

    def _halve(self, arms: Sequence[Arm], what: str, first: int) -> tuple[Arm, str]:
        """The arm that is left, and in words why. first: steps of the first rung."""
        left, rung = list(arms), 0
        while True:
            rung += 1
            steps = first << (rung - 1)
            tried = [
                self._tried(arm, steps, f"{what}-{rung}-{i + 1}", f"{arm.name}, {i + 1} of {len(left)}")
                for i, arm in enumerate(left)
            ]
            best = survivors(tried)
            if not best:
                lowest = min(arm.rate for arm in left)
                raise DivergedError(
                    f"every arm of the search diverged, at rates from {lowest:.1e} up: give a lower "
                    f"--learning-rate, e.g. {lowest / 10:.0e}, and name another --out"
                )
            if all(one.each == self.before for one in best):
                least = min((one.arm for one in best), key=lambda arm: (arm.rate, arm.parameters))
                return least, "no arm was better than the base when it ended, so the least is taken"
            if len(best) > 1:
                left = [one.arm for one in best]
                continue
            others = [one for one in tried if one.each is not None and one is not best[0]]
            if not others:
                return best[0].arm, "the others diverged"
            taken, why = better(best[0], min(others, key=lambda one: one.nll), self.groups)
            return taken.arm, f"{why}, NLL {taken.nll:.4f} after {taken.steps} steps"

    def _tried(self, arm: Arm, steps: int, cell: str, told: str) -> Tried:
        """What it came to: from the store, or trained now."""
        for one in self.stored:
            if one["cell"] == cell:
                return Tried(arm, one["steps"], None if one["each"] is None else tuple(one["each"]))
        self.listener.say(f"search: {told}, for {steps} steps")
        recipe = replace(
            self.opened.decision.recipe,
            learning_rate=arm.rate,
            steps=steps,
            validate_every=steps,
            warmup=max(1, round(self.settings.warmup * steps)),
        )
        order = Order(self.plans[arm.plan], recipe, f"{SEARCH}/{cell}", tuple(self.places), self.before)
        self.processes.agreed(order.to_json)
        each: tuple[float, ...] | None
        try:
            each = carry_out(
                self.opened, order, self.out, self.resume, self.settings.trunk_bytes, self.processes, self.listener
            ).each
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


def _list(arms: Sequence[Arm]) -> str:
    return ", ".join(arm.name.removeprefix("rate ") for arm in arms)
