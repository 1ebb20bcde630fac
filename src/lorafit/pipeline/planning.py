"""What a run would do and cost, without doing it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch

from lorafit.attachment import attach, free_blocks, packing, recomputing
from lorafit.base import Base
from lorafit.data.batches import PACK_STEP
from lorafit.data.render import Row
from lorafit.evaluation.nll import example_nll
from lorafit.pipeline.listener import Listener, Silent
from lorafit.pipeline.memory import keep_freed_memory
from lorafit.pipeline.preparing import Opened, open_all
from lorafit.planning.memory import parts_of
from lorafit.planning.rules import hidden_size
from lorafit.settings import TrainSettings, settings_from
from lorafit.tasks.completion import batch_of
from lorafit.training import optimizer as adamw
from lorafit.training.loop import gradient_step
from lorafit.training.state import TrainState

TRIED = 3  # micro-batches whose time is taken, from the shortest to the longest
VALIDATED = 16  # examples whose NLL is timed


@dataclass(frozen=True)
class Forecast:
    """Seconds of training, of one step and of one validation among them; GB of memory while training (of the
    process, or of the GPU) and bytes of the run folder, at most. The evaluation that follows comes on top."""

    seconds: float
    step: float
    validation: float
    peak_gb: float
    disk: int


def run_planning(
    base_name: str, data: str, settings: Mapping[str, Any], listener: Listener | None = None
) -> dict[str, Any]:
    """Check, decide, try a few steps; returns the plan, its reasons and its cost. Nothing is written."""
    listener = listener or Silent()
    resolved = settings_from(settings)
    keep_freed_memory()
    opened = open_all(base_name, data, resolved, listener)
    cost = forecast(opened)
    cost = replace(cost, disk=cost.disk + _trunk(opened, resolved))
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


def forecast(opened: Opened) -> Forecast:
    """Try a short, a middling and the longest micro-batch of the first epoch, and reckon with all of the run.

    Whatever the batch size, six forwards and backwards are tried. A micro-batch takes some time of its own and some for
    each token; a size that comes for the first time takes a preparation, which is long in some kernels.
    """
    base, rows, recipe, way = opened.base, opened.rows, opened.decision.recipe, opened.way
    parts = list(parts_of(rows["train"], recipe, way))
    sizes = [sum(len(rows["train"][i].ids) for i in part) for part in parts]
    ranked = sorted(range(len(parts)), key=sizes.__getitem__)
    tried = sorted({ranked[i * (len(ranked) - 1) // (TRIED - 1)] for i in range(TRIED)}, key=sizes.__getitem__)
    state = TrainState(opened.start, base.device, recipe.dropout)
    optimizer = adamw.make_optimizer(state)
    firsts, took = [], []
    with torch.random.fork_rng(), attach(base, state), packing(base, way.packed), recomputing(base, recipe.recompute):
        few = rows["valid"][:: max(1, len(rows["valid"]) // VALIDATED)][:VALIDATED]
        state.training = False
        example_nll(base, few, way=way)
        validation = _seconds(base, lambda: example_nll(base, few, way=way)) * _tokens(rows["valid"]) / _tokens(few)
        state.training = True
        for i in tried:
            batches = [batch_of(base, [rows["train"][k] for k in parts[i]], way)]
            work = partial(gradient_step, base, state, batches, way)
            firsts.append(_seconds(base, work))
            took.append(_seconds(base, work))
        update = partial(adamw.step, state, optimizer, recipe.learning_rate, recipe.weight_decay, recipe.clip)
        update()
        gradient_step(base, state, batches, way)
        updating = _seconds(base, update)
    own, each = _line([sizes[i] for i in tried], took)
    preparing = max(0.0, min(first - second for first, second in zip(firsts, took, strict=True)))
    computing = own * len(parts) + each * sum(sizes) + preparing * _shapes(sizes, base)
    step = computing / recipe.steps + updating
    count = -(-recipe.steps // recipe.validate_every) + 1
    disk = 2 * 4 * opened.decision.plan.bytes  # the old checkpoint beside the new: master, best and AdamW's two moments
    return Forecast(recipe.steps * step + count * validation, step, validation, round(opened.peak / 1e9, 2), disk)


def _trunk(opened: Opened, settings: TrainSettings) -> int:
    """Bytes on disk of what is kept of the lowest blocks, in runs of more than one pass."""
    rows, recipe = opened.rows["train"], opened.decision.recipe
    if recipe.steps * recipe.batch_size <= len(rows) or not free_blocks(opened.base, opened.decision.plan):
        return 0
    return min(int(settings.trunk_gb * 1e9), _tokens(rows) * hidden_size(opened.base) * opened.base.dtype.itemsize)


def _line(tokens: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Seconds of a micro-batch's own, and for each token: least squares, neither below zero."""
    if max(tokens) > min(tokens):
        each, own = np.polyfit(tokens, seconds, 1)
        if each > 0 and own > 0:
            return float(own), float(each)
    return 0.0, sum(seconds) / sum(tokens)


def _shapes(sizes: Sequence[int], base: Base) -> int:
    """How many different sizes the kernels are given."""
    stepped = PACK_STEP if base.device.type == "cpu" and base.dtype != torch.float32 else 1
    return len({-(-size // stepped) for size in sizes})


def _tokens(rows: Sequence[Row]) -> int:
    return sum(len(row.ids) for row in rows)


def _seconds(base: Base, work: Any) -> float:
    start = time.monotonic()
    work()
    if base.device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - start
