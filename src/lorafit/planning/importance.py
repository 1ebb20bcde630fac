"""Measures which parts of a trained adapter matter, by their effect on the validation loss."""

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

SHARE = 0.05  # of the run's time that ablations may take
FEWEST, MOST = 4, 64  # examples on which they are scored


@dataclass(frozen=True)
class Ablation:
    """The result of removing a part of the adapter.

    Args:
        name: The name of the part.
        sites: The number of its sites.
        parameters: The number of its parameters.
        rise: By how much the NLL rises without it, mean over the examples.
        ci95: The 95 % interval of the rise; None if there are too few examples.
    """

    name: str
    sites: int
    parameters: int
    rise: float
    ci95: tuple[float, float] | None


def first_order(runner: Runner, adapter: Adapter, rows: Sequence[Row]) -> dict[str, float]:
    """A first-order estimate of each site's effect: by how much the mean NLL would rise without its pair.

    It is −⟨gradient of B, B⟩ = −⟨gradient of ΔW, ΔW⟩ (Molchanov et al. 2017, arXiv 1611.06440), and costs one backward.
    A value below zero means that removing the pair would help. For a method with more factors than A and B, it covers
    only these two.

    Args:
        runner: Runs the base.
        adapter: The trained adapter.
        rows: The rows on which the NLL is measured.

    Returns:
        The estimate in nats per token, by site path.
    """
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
    """The exact effect of each part: each is removed in turn, and the rest of the adapter is scored.

    Args:
        runner: Runs the base.
        adapter: The trained adapter.
        rows: The rows on which it is scored.
        parts: The paths of the sites of each part, by the part's name.
        groups: The groups of the rows' examples.
        watch: Called with the number of scorings that are done, and of all.
    """

    def scored(scored_adapter: Adapter) -> list[float]:
        with attach(runner.base, scored_adapter):
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
    """The sites by block and by kind of module. A part that holds all sites is left out."""
    blocks: dict[str, list[str]] = {}
    kinds: dict[str, list[str]] = {}
    for path, kind in kinds_of(paths).items():
        if (block := block_of(path)) is not None:
            blocks.setdefault(f"block {block}", []).append(path)
        kinds.setdefault(kind, []).append(path)
    return {name: part for name, part in {**blocks, **kinds}.items() if len(part) < len(paths)}


def examples_for(parts: int, steps: int, batch: int, there: int) -> int:
    """The number of examples on which each part is scored, so that all ablations take the share SHARE of the run's
    time. The forward of an example is a third of its share of a step.

    Args:
        parts: The number of parts.
        steps: The steps of the run.
        batch: The examples in a step.
        there: The number of examples that exist.
    """
    return min(there, MOST, max(FEWEST, int(3 * SHARE * steps * batch / (parts + 1))))


def without(adapter: Adapter, paths: Collection[str]) -> Adapter:
    """The adapter without its slots at these sites. At least one other slot must remain."""
    slots = tuple(slot for slot in adapter.plan.slots if slot.site.path not in paths)
    plan = replace(adapter.plan, slots=slots)
    kept = [f"{path}.{name}" for path, name, _, _ in plan.tensors()]
    return replace(adapter, plan=plan, tensors={name: adapter.tensors[name] for name in kept})
