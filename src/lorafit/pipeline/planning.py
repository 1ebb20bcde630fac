"""What a run would do and cost, without doing it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from lorafit.attachment import attach, fresh, packing
from lorafit.base import Base
from lorafit.data.batches import by_tokens, epoch_order
from lorafit.data.render import Row
from lorafit.evaluation.nll import example_nll
from lorafit.pipeline.listener import Listener, Silent
from lorafit.pipeline.memory import keep_freed_memory, peak_gb
from lorafit.pipeline.preparing import Opened, open_all
from lorafit.settings import settings_from
from lorafit.tasks.completion import batch_of, way_of
from lorafit.training.loop import gradient_step
from lorafit.training.state import TrainState

TRIED = 3  # batches whose time is taken, from the shortest to the longest
VALIDATED = 16  # examples whose NLL is timed


@dataclass(frozen=True)
class Forecast:
    """Seconds of training, of one step and of one validation among them; peak memory in GB (None where the system does
    not tell); bytes of the run folder at its largest. The evaluation that follows comes on top."""

    seconds: float
    step: float
    validation: float
    peak_gb: float | None
    disk: int


def run_planning(
    base_name: str, data: str, settings: Mapping[str, Any], listener: Listener | None = None
) -> dict[str, Any]:
    """Check, decide, try a few steps; returns the plan, its reasons and its cost. Nothing is written."""
    listener = listener or Silent()
    resolved = settings_from(settings)
    keep_freed_memory()
    opened = open_all(base_name, data, resolved, listener)
    cost = forecast(opened, resolved.seed)
    decision = opened.decision
    return {
        "base": opened.base.name,
        "trainable_parameters": decision.plan.parameters,
        "bytes": decision.plan.bytes,
        "flops_per_token": decision.plan.flops_per_token,
        "forecast": asdict(cost),
        "recipe": asdict(decision.recipe),
        "choices": [asdict(choice) for choice in decision.choices],
        "settings": resolved.model_dump(mode="json"),
        **decision.plan.to_json(),
    }


def forecast(opened: Opened, seed: int) -> Forecast:
    """Try a short, a middling and the longest batch of the first epoch, and reckon with the padded tokens of all."""
    base, rows, recipe = opened.base, opened.rows, opened.decision.recipe
    order = epoch_order(rows["train"], recipe.batch_size, recipe.seed, 0)
    sizes = [_padded(rows["train"], positions, recipe.micro_tokens) for positions in order]
    ranked = sorted(range(len(order)), key=sizes.__getitem__)
    tried = sorted({ranked[i * (len(ranked) - 1) // (TRIED - 1)] for i in range(TRIED)})
    plan = opened.decision.plan
    state = TrainState(fresh(base, plan, seed, opened.renderer.rendering), base.device, recipe.dropout)
    state.training = True
    way = way_of(base, rows["train"])
    took = 0.0
    with torch.random.fork_rng(), attach(base, state), packing(base, way.packed):
        for i in tried:
            parts = by_tokens(rows["train"], order[i], recipe.micro_tokens, way.packed)
            batches = [batch_of(base, [rows["train"][k] for k in part], way) for part in parts]
            gradient_step(base, state, batches, way)  # a new width costs the kernels a preparation
            took += _seconds(base, lambda batches=batches: gradient_step(base, state, batches, way))
        few = rows["valid"][:: max(1, len(rows["valid"]) // VALIDATED)][:VALIDATED]
        validation = _seconds(base, lambda: example_nll(base, few, way=way)) * _tokens(rows["valid"]) / _tokens(few)
    step = took / sum(sizes[i] for i in tried) * sum(sizes) / len(sizes)
    count = -(-recipe.steps // recipe.validate_every) + 1
    peak = torch.cuda.max_memory_allocated() / 1e9 if base.device.type == "cuda" else peak_gb()
    disk = 2 * 4 * plan.bytes  # the old checkpoint beside the new: master, best and AdamW's two moments
    return Forecast(recipe.steps * step + count * validation, step, validation, peak, disk)


def _padded(rows: Sequence[Row], positions: Sequence[int], micro_tokens: int) -> int:
    return sum(len(part) * max(len(rows[i].ids) for i in part) for part in by_tokens(rows, positions, micro_tokens))


def _tokens(rows: Sequence[Row]) -> int:
    return sum(len(row.ids) for row in rows)


def _seconds(base: Base, work: Any) -> float:
    start = time.monotonic()
    work()
    if base.device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - start
