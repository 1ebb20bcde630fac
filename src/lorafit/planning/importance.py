"""Which sites mattered: what a trained adapter's parts do to the validation loss, measured when it is there."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.state import TrainState
from lorafit.attachment.adapters import attach
from lorafit.data.render import Row
from lorafit.evaluation.statistics import paired_bootstrap
from lorafit.planning.signal import block_of, kinds_of
from lorafit.tasks.runner import Runner

SHARE, FEWEST, MOST = 0.05, 4, 64  # of the run's time that ablations may take; examples they are scored on


@dataclass(frozen=True)
class Ablation:
    """The adapter without these sites: how much the NLL rises, mean over examples, with its interval (None where there
    are too few)."""

    name: str
    sites: int
    parameters: int
    rise: float
    ci95: tuple[float, float] | None


def first_order(runner: Runner, adapter: Adapter, rows: Sequence[Row]) -> dict[str, float]:
    """By site path, what taking its pair away would add to the mean NLL (nats per token) if that were linear in the
    pair: −⟨gradient of B, B⟩, which is −⟨gradient of ΔW, ΔW⟩ (Molchanov et al. 2017, arXiv 1611.06440). Below zero it
    would help. Of a variant with more than A and B it is their part alone. One backward in all."""
    state = TrainState(adapter, runner.base.device)
    with runner.training(state):
        runner.gradient_of(rows)
    gradients = state.gradients()
    return {
        slot.site.path: -float((gradients[name].cpu().double() * adapter.tensors[name].double()).sum())
        for slot in adapter.plan.slots
        for name in (f"{slot.site.path}.B",)
    }


def ablations(
    runner: Runner,
    adapter: Adapter,
    rows: Sequence[Row],
    parts: Mapping[str, Sequence[str]],
    groups: Sequence[str | None],
    watch: Callable[[int, int], None] = lambda done, of: None,
) -> list[Ablation]:
    """Exact: each of the parts, as names of sites, taken away in turn, all else as it is."""

    def scored(one: Adapter) -> list[float]:
        with attach(runner.base, one):
            return runner.nll(rows)

    watch(0, len(parts) + 1)
    whole, found = scored(adapter), []
    for done, (name, paths) in enumerate(parts.items(), 1):
        watch(done, len(parts) + 1)
        less = without(adapter, paths)
        each = [b - a for a, b in zip(whole, scored(less), strict=True)]
        interval = paired_bootstrap(each, groups)
        parameters = adapter.plan.parameters - less.plan.parameters
        found.append(
            Ablation(
                name, len(paths), parameters, sum(each) / len(each), (interval.low, interval.high) if interval else None
            )
        )
    watch(len(parts) + 1, len(parts) + 1)
    return found


def parts_of(paths: Sequence[str]) -> dict[str, list[str]]:
    """Sites by block and by kind of module: parts of the whole, what is all of it left out."""
    blocks: dict[str, list[str]] = {}
    kinds: dict[str, list[str]] = {}
    for path, kind in kinds_of(paths).items():
        if (block := block_of(path)) is not None:
            blocks.setdefault(f"block {block}", []).append(path)
        kinds.setdefault(kind, []).append(path)
    found = {**blocks, **kinds}
    return {name: part for name, part in found.items() if len(part) < len(paths)}


def examples_for(parts: int, steps: int, batch: int, there: int) -> int:
    """How many examples every part is scored on: a forward is a third of a step's work on an example."""
    return min(there, MOST, max(FEWEST, int(3 * SHARE * steps * batch / (parts + 1))))


def without(adapter: Adapter, paths: Collection[str]) -> Adapter:
    """The adapter without its slots at these sites, of which it must have others."""
    slots = tuple(slot for slot in adapter.plan.slots if slot.site.path not in paths)
    plan = replace(adapter.plan, slots=slots)
    kept = [f"{path}.{name}" for path, name, _, _ in plan.tensors()]
    return replace(adapter, plan=plan, tensors={name: adapter.tensors[name] for name in kept})
