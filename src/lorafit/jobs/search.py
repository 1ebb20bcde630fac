"""Work before training: what validation can show, the layer card, and the search that decides rate and placement."""

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
from lorafit.data.split import FEWEST, groups_of
from lorafit.errors import DivergedError
from lorafit.evaluation.statistics import detectable
from lorafit.files import make_folder, read_json, write_json
from lorafit.jobs.listener import Listener
from lorafit.jobs.prepare import Opened
from lorafit.jobs.run import Run
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
from lorafit.planning.rules import reached, with_choice, with_rank
from lorafit.planning.signal import Card, Signal, card_of
from lorafit.runs.folder import CARD, SEARCH, TRIED
from lorafit.settings import TrainSettings
from lorafit.tasks.runner import require_finite
from lorafit.training.loop import Moment, Trained, train
from lorafit.training.recipe import Recipe

SHRUNK = 4  # the rank is divided by this in the arm that tests whether a smaller one is enough


@dataclass(frozen=True)
class Order:
    """An order for one training, which all processes carry out.

    Args:
        plan: The plan.
        recipe: How it is trained.
        folder: Where, below the run's folder.
        scored: Numbers of the validation examples it is scored on; empty for all of them.
        known: Their NLL before training, if it has been measured.
    """

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


def carry_out(run: Run, order: Order, tell: Callable[[Moment], None] | None = None) -> Trained:
    """Train as ordered; all processes make the same call. tell: receives the moments instead of the listener."""
    opened, rows, out = run.opened, run.opened.rows, run.out
    if run.processes.first:
        (out / order.folder).mkdir(parents=True, exist_ok=True)
    name = f"{order.folder}: validation" if order.folder else "validation"
    return train(
        opened.base,
        start_of(opened, order.plan),
        rows["train"],
        some(rows["valid"], order.scored) if order.scored else rows["valid"],
        order.recipe,
        tell=tell or run.listener.moment,
        watch=partial(run.listener.watch, name),
        folder=out / order.folder,
        resume=run.resume,
        trunk_bytes=run.settings.trunk_bytes,
        trunk_in=out if order.folder.startswith(SEARCH) else None,
        runner=opened.runner,
        known=order.known,
        processes=run.processes,
    )


def start_of(opened: Opened, plan: Plan) -> Adapter:
    """An adapter of this plan that changes nothing yet."""
    if plan == opened.decision.plan:
        return opened.start
    return fresh(opened.base, plan, opened.decision.recipe.seed, opened.start.rendering, opened.start.classes)


def spread_over(count: int, groups: Sequence[str | None]) -> list[int]:
    """The numbers of `count` examples from as many groups as possible: the first of every group, then the second, and
    so on. If the last turn has more examples than are wanted, they are spread evenly over it."""
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
    """Measure the base before training. Raises BaseError if its NLL is not finite.

    Returns:
        The base's NLL on the validation examples (at `places`, or on all), the layer card (None for a short run), and
        the seconds per token of a forward.
    """
    began = time.monotonic()
    rows = opened.rows["valid"] if places is None else some(opened.rows["valid"], places)
    with attach(opened.base, opened.start):  # as in the run, for which this is the first validation
        known = opened.runner.nll(rows, partial(listener.watch, "base: validation"))
    forward = (time.monotonic() - began) / sum(len(row.ids) for row in rows)
    require_finite(opened.base, known)
    card = card_of(
        opened.runner,
        _with_b_of_zero(opened),
        opened.rows["train"],
        opened.decision.recipe,
        lambda d, n: listener.watch("layer card", d, n, "batches"),
    )
    return tuple(known), card, forward


def looked(opened: Opened, out: Path, listener: Listener) -> tuple[tuple[float, ...], Card | None, float | None]:
    """The result of `look` on all validation examples, kept in search/card.json for a resume. The seconds are None in
    the file of an earlier version."""
    path = out / SEARCH / CARD
    if path.exists():
        content = read_json(path)
        return tuple(content["known"]), card_from(content), content.get("forward")
    make_folder(out / SEARCH)
    known, card, forward = look(opened, listener)
    content = {**evidence_of(known, opened, range(len(known))), "known": known, "forward": forward}
    write_json(path, {**content, **(asdict(card) if card else {})})
    return known, card, forward


def _with_b_of_zero(opened: Opened) -> Adapter:
    """The adapter that the run starts from, or LoRA on the same sites if its method does not start with B = 0."""
    plan = opened.start.plan
    if all(factor.trained for slot in plan.slots for factor in slot.factors().values()):
        return opened.start
    plain = replace(plan, slots=tuple(replace(slot, variant="lora") for slot in plan.slots))
    return fresh(opened.base, plain, opened.decision.recipe.seed, classes=opened.start.classes)


def search(run: Run, known: tuple[float, ...], card: Card | None) -> Decision:
    """Search as the settings say, and decide. Every arm is a short training below search/, and its result is written to
    search/tried.json at once, so that a stopped search can be resumed.

    Only the first process calls it; the others carry out its orders. Raises DivergedError if all arms diverge.

    Args:
        run: The run.
        known: The base's NLL of every validation example.
        card: The layer card; None for a short run.
    """
    return _Search(run, known).decide(card)


def search_steps(opened: Opened, settings: TrainSettings, card: Card | None, out: Path | None = None) -> float:
    """The most that the search costs, in steps of the run, without the arms that a run in `out` has tried already."""
    steps, rates = opened.decision.recipe.steps, rates_tried(opened, settings)[0]
    ahead = cost(len(rates), first_rung(len(rates), steps)) if rates[1:] else 0.0
    if settings.search == "thorough" and not obstacle(opened, settings):
        plans = len(places_tried(opened, settings, card)[0])
        placing = places_cost(plans, steps) if plans > 1 else 0.0
        ahead += placing if placing <= MOST_PLACES * steps else 0.0
    tried = out / SEARCH / TRIED if out else None
    return max(0.0, ahead - sum(arm["steps"] for arm in read_json(tried))) if tried and tried.exists() else ahead


def evidence_of(known: Sequence[float], opened: Opened, places: Sequence[int]) -> dict[str, Any]:
    """What validation can show: the number of independent examples, the base's NLL, and the smallest effect that they
    detect. known: NLL of the validation examples at `places`."""
    groups = [example.group for example in opened.examples.valid]
    part = [groups[i] for i in places]
    seen, there = (len(set(groups_of(names))) for names in (part, groups))
    smallest = detectable(known, part)
    return {
        "independent": there,
        "nll": sum(known) / len(known),
        "detectable": None if smallest is None else smallest * (seen / there) ** 0.5,
    }


def card_from(content: Mapping[str, Any]) -> Card | None:
    """The card in the content of card.json; None if the run was too short for one."""
    if "sites" not in content:
        return None
    return Card(tuple(Signal(**site) for site in content["sites"]), content["batches"], content["rows"])


def obstacle(opened: Opened, settings: TrainSettings) -> str | None:
    """The reason why there is no search; None if there is one."""
    steps, groups = opened.decision.recipe.steps, [example.group for example in opened.examples.valid]
    independent = len(set(groups_of(groups)))
    if settings.search == "none":
        return "switched off (--search none)"
    if independent < FEWEST:
        return f"{independent} independent validation examples are too few: at least {FEWEST} are needed"
    if rates_for(steps) == (1.0,):
        return (
            f"{steps} steps are too few for a search that takes half as many: {steps_needed(2)} steps are needed to "
            f"try two rates, and {steps_needed(4)} to try four"
        )
    return None


def rates_tried(opened: Opened, settings: TrainSettings) -> tuple[list[float], str]:
    """The rates that a search compares, and why; only one rate if there is nothing to compare."""
    steps, rule = opened.decision.recipe.steps, opened.decision.recipe.learning_rate
    if why := obstacle(opened, settings):
        return [rule], f"not searched: {why}"
    if settings.learning_rate is not None:
        return [rule], "the rate is set by you"
    rates = rates_for(steps)
    reason = f"{len(rates)} rates, each in a short run of {first_rung(len(rates), steps)} steps"
    return [rate * rule for rate in rates], reason + ("; the better half for twice as many" if len(rates) > 2 else "")


def places_tried(opened: Opened, settings: TrainSettings, card: Card | None) -> tuple[dict[str, Plan], list[Placement]]:
    """The plans that a thorough search compares, by name; and all placements, including those that are not tried."""
    plan = opened.decision.plan
    offered: list[Placement] = []
    if card is not None and settings.targets is None:
        offered = placements(plan, card, even=settings.rank is None)
    whole = ALL if settings.targets is None else "the sites you named"
    plans = {placement.name: placement.plan for placement in offered if placement.plan is not None} or {whole: plan}
    if settings.rank is None and (smaller := _smaller(plan)) is not None:
        plans[f"rank {max(slot.rank for slot in smaller.slots)}"] = smaller
    return plans, offered


def places_cost(arms: int, run_steps: int) -> float:
    """The steps that a search among `arms` plans takes."""
    return cost(arms, first_rung(arms, run_steps, WANTED_PLACES))


class _Search:
    def __init__(self, run: Run, known: tuple[float, ...]):
        self.run, self.opened, self.settings, self.listener = run, run.opened, run.settings, run.listener
        self.path, opened = run.out / SEARCH / TRIED, run.opened
        self.stored: list[dict[str, Any]] = read_json(self.path) if self.path.exists() else []
        self.run_steps = opened.decision.recipe.steps
        self.first = first_rung(max(2, len(rates_for(self.run_steps))), self.run_steps)
        wanted = round(SCORED * self.first * opened.decision.recipe.batch_size)
        groups = [example.group for example in opened.examples.valid]
        self.places = spread_over(max(wanted, 2 * FEWEST), groups)
        self.groups = [groups[i] for i in self.places]
        self.before = tuple(known[i] for i in self.places)
        self.plans = [opened.decision.plan]

    def decide(self, card: Card | None) -> Decision:
        decision = self.opened.decision
        if why := obstacle(self.opened, self.settings):
            return with_choice(decision, "search", "none", why, "--search")
        rates, why = rates_tried(self.opened, self.settings)
        if len(rates) > 1:
            arms = [Arm(f"rate {rate:.1e}", rate, decision.plan.parameters) for rate in rates]
            winner, reason = self._halve(arms, "rate", self.first)
            decision = replace(decision, recipe=replace(decision.recipe, learning_rate=winner.rate))
            self.listener.say(f"learning rate {winner.rate:.1e}: {reason}")
            reason = f"searched among {_list(arms)}: {reason}"
            decision = with_choice(decision, "learning rate", f"{winner.rate:.1e}", reason)
        if self.settings.search == "thorough":
            decision, more = self._place(decision, card)
            why = f"{why}; {more}"
        return with_choice(decision, "search", self.settings.search, why, "--search")

    def _place(self, decision: Decision, card: Card | None) -> tuple[Decision, str]:
        """Search placement and rank at the rate that won, which is right for every rank because alpha is fixed. Returns
        the decision, and a description of what was tried."""
        plans, offered = places_tried(self.opened, self.settings, card)
        for placement in offered:
            if placement.plan is None:
                self.listener.say(f"{placement.name}: {placement.reason}")
        if len(plans) == 1:
            return decision, "no other places are worth trying"
        if places_cost(len(plans), self.run_steps) > MOST_PLACES * self.run_steps:
            needed = steps_needed(len(plans), MOST_PLACES)
            return decision, f"the run is too short to try {len(plans)} places and ranks, which needs {needed} steps"
        self.plans = list(plans.values())
        rate = decision.recipe.learning_rate
        arms = [Arm(name, rate, plan.parameters, i) for i, (name, plan) in enumerate(plans.items())]
        first = first_rung(len(arms), self.run_steps, WANTED_PLACES)
        winner, reason = self._halve(arms, "place", first)
        self.listener.say(f"{winner.name}: {reason}")
        decision = replace(decision, plan=self.plans[winner.plan])
        share = reached(self.opened.base, [slot.site for slot in decision.plan.slots])
        reason = f"{winner.name}, searched among {_list(arms)}: {reason}; {share}"
        decision = with_choice(decision, "sites", str(len(decision.plan.slots)), reason)
        tried = f"{len(arms)} places and ranks, the first runs of {first} steps"
        if decision.plan == self.opened.decision.plan:
            return decision, tried
        return with_rank(decision, "of the placement that won"), tried

    def _halve(self, arms: Sequence[Arm], what: str, first: int) -> tuple[Arm, str]:
        """The arm that wins by successive halving, and the reason. first: steps of the first rung."""
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
            if all(result.each == self.before for result in best):
                least = min((result.arm for result in best), key=lambda arm: (arm.rate, arm.parameters))
                return (
                    least,
                    "no arm ended better than the base, so the lowest rate and the fewest parameters are taken",
                )
            if len(best) > 1:
                left = [result.arm for result in best]
                continue
            others = [result for result in tried if result.each is not None and result is not best[0]]
            if not others:
                return best[0].arm, "the others diverged"
            taken, why = better(best[0], min(others, key=lambda result: result.nll), self.groups)
            return taken.arm, f"{why}, NLL {taken.nll:.4f} after {taken.steps} steps"

    def _tried(self, arm: Arm, steps: int, cell: str, description: str) -> Tried:
        """The result of an arm: read from the store, or trained now."""
        for stored in self.stored:
            if stored["cell"] == cell:
                return Tried(arm, stored["steps"], None if stored["each"] is None else tuple(stored["each"]))
        self.listener.say(f"search: {description}, for {steps} steps")
        recipe = replace(
            self.opened.decision.recipe,
            learning_rate=arm.rate,
            steps=steps,
            validate_every=steps,
            warmup=max(1, round(self.settings.warmup * steps)),
        )
        order = Order(self.plans[arm.plan], recipe, f"{SEARCH}/{cell}", tuple(self.places), self.before)
        self.run.processes.agreed(order.to_json)
        each: tuple[float, ...] | None
        try:
            each = carry_out(self.run, order).each
        except DivergedError:
            each = None
        self.stored.append({"cell": cell, **asdict(arm), "steps": steps, "each": each})
        write_json(self.path, self.stored)
        shutil.rmtree(self.run.out / SEARCH / cell / "checkpoints", ignore_errors=True)
        return Tried(arm, steps, each)


def _smaller(plan: Plan) -> Plan | None:
    """The same sites with a fraction of their rank; None if the ranks are too small for that."""
    made = tuple(replace(slot, rank=max(1, slot.rank // SHRUNK)) for slot in plan.slots)
    return replace(plan, slots=made) if any(slot.rank > SHRUNK for slot in plan.slots) else None


def _list(arms: Sequence[Arm]) -> str:
    return ", ".join(arm.name.removeprefix("rate ") for arm in arms)
