"""Which sites mattered: what a trained adapter's parts do to the validation loss, measured when it is there."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch

from lorafit.adapter import Adapter
from lorafit.attachment import attach, packing
from lorafit.base import Base
from lorafit.data.batches import by_tokens
from lorafit.data.render import Row
from lorafit.evaluation.nll import example_nll
from lorafit.evaluation.statistics import paired_bootstrap
from lorafit.planning.signal import block_of
from lorafit.tasks.completion import Way, batch_of
from lorafit.training.loop import gradient_step
from lorafit.training.state import TrainState

SHARE, FEWEST, MOST = 0.05, 8, 64  # of the run's time that ablations may take; examples they are scored on


@dataclass(frozen=True)
class Ablation:
    """The adapter without these sites: how much the NLL rises, mean over examples, with its interval (None where there
    are too few)."""

    name: str
    sites: int
    parameters: int
    rise: float
    ci95: tuple[float, float] | None


def first_order(
    base: Base, adapter: Adapter, rows: Sequence[Row], way: Way, micro_tokens: int = 1024
) -> dict[str, float]:  # fmt: skip
    """By site path, what taking its pair away would add to the mean NLL (nats per token) if that were linear in the
    pair: −⟨gradient of B, B⟩, which is −⟨gradient of ΔW, ΔW⟩ (Molchanov et al. 2017, arXiv 1611.06440). Below zero it
    would help. One backward in all."""
    state = TrainState(adapter, base.device)
    parts = by_tokens(rows, range(len(rows)), micro_tokens, way.packed)
    with attach(base, state), packing(base, way.packed):
        gradient_step(base, state, [batch_of(base, [rows[i] for i in part], way) for part in parts], way)
    gradients = state.gradients()
    return {slot.site.path: -float((gradients[name].cpu().double() * adapter.tensors[name].double()).sum())
            for slot in adapter.plan.slots for name in (f"{slot.site.path}.B",)}  # fmt: skip


def ablations(
    base: Base, adapter: Adapter, rows: Sequence[Row], parts: Mapping[str, Sequence[str]], way: Way,
    groups: Sequence[str | None], watch: Callable[[int, int], None] = lambda done, of: None,
) -> list[Ablation]:  # fmt: skip
    """Exact: each of the parts, as names of sites, taken away in turn, all else as it is."""

    def scored(one: Adapter) -> list[float]:
        with attach(base, one):
            return example_nll(base, rows, way=way)

    watch(0, len(parts) + 1)
    whole, found = scored(adapter), []
    for done, (name, paths) in enumerate(parts.items(), 1):
        watch(done, len(parts) + 1)
        each = [b - a for a, b in zip(whole, scored(without(adapter, paths)), strict=True)]
        interval = paired_bootstrap(each, groups)
        parameters = sum(adapter.tensors[f"{path}.{factor}"].numel() for path in paths for factor in "AB")
        found.append(Ablation(name, len(paths), parameters, sum(each) / len(each),
                              (interval.low, interval.high) if interval else None))  # fmt: skip
    watch(len(parts) + 1, len(parts) + 1)
    return found


def parts_of(paths: Sequence[str]) -> dict[str, list[str]]:
    """Sites by block and by name of module, where there are several of each."""
    blocks: dict[str, list[str]] = {}
    names: dict[str, list[str]] = {}
    for path in paths:
        if (block := block_of(path)) is not None:
            blocks.setdefault(f"block {block}", []).append(path)
        names.setdefault(path.rpartition(".")[2], []).append(path)
    return {**(blocks if len(blocks) > 1 else {}), **(names if len(names) > 1 else {})}


def examples_for(parts: int, steps: int, batch: int, there: int) -> int:
    """How many examples every part is scored on: a forward is a third of a step's work on an example."""
    return min(there, MOST, max(FEWEST, int(3 * SHARE * steps * batch / (parts + 1))))


def without(adapter: Adapter, paths: Sequence[str]) -> Adapter:
    """The adapter whose pairs at these sites do nothing."""
    gone = {f"{path}.B" for path in paths}
    return replace(adapter, tensors={name: torch.zeros_like(tensor) if name in gone else tensor
                                     for name, tensor in adapter.tensors.items()})  # fmt: skip
