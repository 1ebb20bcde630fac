"""What a run would do and cost, without doing it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorafit.adapters.plan import Plan
from lorafit.adapters.state import TrainState
from lorafit.attachment.adapters import attach
from lorafit.attachment.attention import packing
from lorafit.attachment.blocks import free_blocks, recomputing
from lorafit.bases.base import Base
from lorafit.data.batches import Start, by_tokens
from lorafit.data.render import Row
from lorafit.evaluation.compare import asked_of
from lorafit.evaluation.nll import example_nll
from lorafit.evaluation.questions import Questions
from lorafit.jobs.listener import Listener, Silent
from lorafit.jobs.machine import keep_freed_memory
from lorafit.jobs.prepare import Opened, open_all
from lorafit.jobs.search import look, places_tried, rates_tried, search_steps, spread_over, told_by
from lorafit.planning.importance import examples_for, parts_of
from lorafit.planning.memory import steps_of
from lorafit.planning.rules import hidden_size
from lorafit.prepared import Prepared
from lorafit.settings import TrainSettings, settings_from
from lorafit.tasks.completion import batch_of, length_step, trunk
from lorafit.training import optimizer as adamw
from lorafit.training.loop import gradient_step, own_randomness
from lorafit.training.trunk import room_for

TRIED = 3  # micro-batches whose time is taken, from the shortest to the longest
LONG = 100  # steps from which on that many are tried
EVIDENCE = 64  # validation examples by which is told what validation can show
VALIDATED = 16  # examples whose NLL is timed
RUNGS_TRIED = 2  # of the ladder, as a rule
DECODED = 3.0  # tokens of a prompt that a token of an answer takes as long as


@dataclass(frozen=True)
class Forecast:
    """Seconds of training, of one step and of one validation among them, and of the evaluation that follows; GB of
    memory of the whole run (of the process, or of the GPU) and bytes of the run folder, at most."""

    seconds: float
    step: float
    validation: float
    evaluation: float
    peak_gb: float
    disk: int


def run_planning(
    base_name: str | Path,
    data: str | Path,
    settings: Mapping[str, Any],
    listener: Listener | None = None,
    prepared: Prepared | None = None,
) -> dict[str, Any]:
    """Check, decide, try a few steps; returns the plan, its reasons and its cost. Nothing is written. prepared: the
    data, where they have been read already."""
    listener = listener or Silent()
    resolved = settings_from(settings)
    keep_freed_memory()
    opened = open_all(base_name, data, resolved, listener, prepared=prepared)
    cost = forecast(opened, resolved, room_for(Path(), resolved.trunk_bytes))
    places = spread_over(EVIDENCE, [one.group for one in opened.examples.valid])
    known, card, _ = look(opened, listener, places)
    decision = opened.decision
    rates, why = rates_tried(opened, resolved)
    offered = places_tried(opened, resolved, card)[1]
    return {
        "evidence": told_by(known, opened, places),
        "card": asdict(card) if card else None,
        "search": {"rates": rates, "reason": why, "seconds": search_steps(opened, resolved, card) * cost.step},
        "placements": [
            {
                "name": one.name,
                "tried": one.plan is not None,
                "reason": one.reason,
                "parameters": one.plan.parameters if one.plan else None,
            }
            for one in offered
        ],
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


def forecast(
    opened: Opened, settings: TrainSettings, trunk_bytes: int = 0, forward: float | None = None, processes: int = 1
) -> Forecast:
    """Try a short, a middling and the longest micro-batch of the first epoch, and reckon with all of the run.

    Whatever the batch size, six forwards and backwards are tried, and three more where a trunk is kept. A micro-batch
    takes some time of its own and some for each token; a size that comes for the first time takes a preparation, which
    is long in some kernels. Of a short run whose forward is known, one micro-batch is tried: three would be felt.

    Args:
        opened: The run, with its decision and the adapter it starts from.
        settings: Of the run.
        trunk_bytes: How much may be kept of what the lowest blocks make.
        forward: Seconds a token of a forward; measured here where it is None.
        processes: Among which a step is shared.
    """
    base, rows, recipe, way = opened.base, opened.rows, opened.decision.recipe, opened.way
    blocks = free_blocks(base, opened.decision.plan)
    later = 1 - -(-len(rows["train"]) // recipe.batch_size) / recipe.steps  # share of the steps after the first epoch
    needed = _tokens(rows["train"]) * hidden_size(base) * base.dtype.itemsize
    read = (
        later * min(1.0, trunk_bytes / needed) if blocks and later > 0 else 0.0
    )  # share of the steps whose trunk is read
    steps = steps_of(rows["train"], recipe, blocks > 0, way.packed)
    parts = [part for step in steps for part in by_tokens(rows["train"], step, recipe.micro_tokens, way.packed)]
    sizes = [sum(len(rows["train"][i].ids) for i in part) for part in parts]
    ranked = sorted(range(len(parts)), key=sizes.__getitem__)
    few = forward is not None and recipe.steps < LONG
    places = [0.5] if few else [i / (TRIED - 1) for i in range(TRIED)]
    tried = sorted({ranked[int(place * (len(ranked) - 1))] for place in places}, key=sizes.__getitem__)
    state = TrainState(opened.start, base.device, recipe.dropout)
    optimizer = adamw.make_optimizer(state)
    firsts, took, shorter = [], [], []
    with own_randomness(base), attach(base, state), packing(base, way.packed), recomputing(base, recipe.recompute):
        if forward is None:
            some = rows["valid"][:: max(1, len(rows["valid"]) // VALIDATED)][:VALIDATED]
            state.training = False
            example_nll(base, some, way=way)
            forward = _seconds(base, lambda: example_nll(base, some, way=way)) / _tokens(some)
            state.training = True
        validation = forward * _tokens(rows["valid"])
        for i in tried:
            batches = [batch_of(base, [rows["train"][k] for k in parts[i]], way)]
            work = partial(gradient_step, base, state, batches, way)
            firsts.append(_seconds(base, work))
            took.append(_seconds(base, work))
            if read:
                begun = [replace(one, start=Start(trunk(base, one, blocks), blocks)) for one in batches]
                shorter.append(_seconds(base, partial(gradient_step, base, state, begun, way)))
        update = partial(adamw.step, state, optimizer, recipe.learning_rate, recipe.weight_decay, recipe.clip)
        update()
        gradient_step(base, state, batches, way)
        updating = _seconds(base, update)

    def of_all(seconds: Sequence[float]) -> float:
        own, each = _line([sizes[i] for i in tried], seconds)
        return own * len(parts) + each * sum(sizes)

    preparing = max(0.0, min(first - second for first, second in zip(firsts, took, strict=True)))
    computing = (
        (1 - read) * of_all(took)
        + read * of_all(shorter or took)
        + preparing * len({-(-size // length_step(base, way)) for size in sizes})
    )
    step = computing / recipe.steps / processes + updating
    count = recipe.validations_after(0) + 1
    kept = min(trunk_bytes, needed) if read else 0
    disk = max(disk_of(opened.decision.plan, False) + kept, disk_of(opened.decision.plan, settings.trim == "auto"))
    scoring = evaluation_seconds(opened, forward, settings)
    return Forecast(
        recipe.steps * step + count * validation, step, validation, scoring, round((opened.peak or 0) / 1e9, 2), disk
    )


def evaluation_seconds(opened: Opened, per_token: float, settings: TrainSettings) -> float:
    """About how long everything takes that follows training: trimming, which sites mattered, forgetting, the NLL of the
    test, and its answers. per_token: seconds of a token in a forward."""
    rows, recipe = opened.rows, opened.decision.recipe
    parts = len(parts_of([slot.site.path for slot in opened.decision.plan.slots])) + 1
    valid, test = _tokens(rows["valid"]), _tokens(rows["test"])
    mattering = parts * examples_for(parts - 1, recipe.steps, recipe.batch_size, len(rows["valid"]))
    tokens = mattering * valid / len(rows["valid"]) + 2 * test + 2 * sum(map(_tokens, opened.general.values()))
    asked = len(asked_of(opened.examples.test, rows["test"], opened.examples.train)) / len(opened.examples.test)
    tokens += (2 + (settings.few_shot > 0)) * asked * _answering(rows["test"])
    if settings.trim == "auto":
        tokens += RUNGS_TRIED * valid
        if questions := Questions.among(
            opened.base, opened.renderer, opened.examples.valid, rows["valid"], opened.examples.train
        ):
            tokens += RUNGS_TRIED * len(questions.examples) / len(opened.examples.valid) * _answering(rows["valid"])
    return per_token * tokens


def _answering(rows: Sequence[Row]) -> float:
    """Tokens of a forward that take as long as decoding the answers of these rows."""
    answers = sum(row.n_trained for row in rows)
    return _tokens(rows) - answers + DECODED * answers


def disk_of(plan: Plan, trim: bool) -> int:
    """Bytes that a run of this plan writes into its folder at most, without a trunk. trim: whether a ladder is kept."""
    training = 2 * 4 * plan.bytes  # the old checkpoint beside the new: master, best and AdamW's two moments
    if not trim:
        return training
    moments = sum(2 * 8 * slot.rank**2 for slot in plan.slots)  # in fp64
    return max(training, 7 * plan.bytes + moments)  # a checkpoint, the adapter as trained, twice, and as shipped


def _line(tokens: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """Seconds of a micro-batch's own, and for each token: least squares, neither below zero."""
    if max(tokens) > min(tokens):
        each, own = np.polyfit(tokens, seconds, 1)
        if each > 0 and own > 0:
            return float(own), float(each)
    return 0.0, sum(seconds) / sum(tokens)


def _tokens(rows: Sequence[Row]) -> int:
    return sum(len(row.ids) for row in rows)


def _seconds(base: Base, work: Any) -> float:
    start = time.monotonic()
    work()
    if base.device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - start
