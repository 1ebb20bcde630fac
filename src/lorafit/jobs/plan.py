"""Estimates what a run would decide, and its time, memory and disk, from a few steps; nothing is written."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch

from lorafit.adapters.plan import Plan
from lorafit.adapters.state import TrainState
from lorafit.bases.base import Base
from lorafit.data.prepared import Prepared
from lorafit.data.render import Row
from lorafit.jobs.listener import Listener, Silent
from lorafit.jobs.machine import keep_freed_memory
from lorafit.jobs.prepare import Opened, open_all
from lorafit.jobs.scoring import answering
from lorafit.jobs.search import evidence_of, look, places_tried, rates_tried, search_steps, spread_over
from lorafit.planning.importance import examples_for, parts_of
from lorafit.planning.memory import steps_of
from lorafit.planning.rules import hidden_size
from lorafit.settings import TrainSettings, settings_from
from lorafit.training import optimizer as adamw
from lorafit.training.trunk import room_for

TRIED = 3  # micro-batches that are timed, from the shortest to the longest
LONG = 100  # steps of a run from which on TRIED micro-batches are timed
EVIDENCE = 64  # validation examples from which it is estimated what validation can show
VALIDATED = 16  # examples whose NLL is timed
RUNGS_TRIED = 2  # rungs of the ladder that are usually scored


@dataclass(frozen=True)
class Forecast:
    """The estimated cost of a run.

    Args:
        seconds: Time of training.
        step: Seconds of one step.
        validation: Seconds of one validation.
        evaluation: Seconds of the evaluation after training.
        peak_gb: The most memory, of the process or of the GPU, in GB.
        disk: The largest size of the run folder, in bytes.
    """

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
    """Check the data, decide, and time a few steps; returns the plan, its reasons and its cost. Nothing is written.

    Args:
        base_name: The base.
        data: The examples: a file, a folder, or the built-in set.
        settings: Fields of TrainSettings that the user set.
        listener: Receives messages and progress.
        prepared: The result of `prepare` for the data; None to read them here.
    """
    listener = listener or Silent()
    resolved = settings_from(settings)
    keep_freed_memory()
    opened = open_all(base_name, data, resolved, listener, prepared=prepared)
    cost = forecast(opened, resolved, room_for(Path(), resolved.trunk_bytes))
    places = spread_over(EVIDENCE, [example.group for example in opened.examples.valid])
    known, card, _ = look(opened, listener, places)
    decision = opened.decision
    rates, why = rates_tried(opened, resolved)
    offered = places_tried(opened, resolved, card)[1]
    return {
        "evidence": evidence_of(known, opened, places),
        "card": asdict(card) if card else None,
        "search": {"rates": rates, "reason": why, "seconds": search_steps(opened, resolved, card) * cost.step},
        "placements": [
            {
                "name": placement.name,
                "tried": placement.plan is not None,
                "reason": placement.reason,
                "parameters": placement.plan.parameters if placement.plan else None,
            }
            for placement in offered
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
    """Estimate the cost of the run from the times of a short, a medium and the longest micro-batch.

    For any batch size these are six forwards and backwards, and three more if a trunk is kept. The model is that a
    micro-batch takes a constant time and a time per token, and that the first micro-batch of every size also takes a
    preparation, which is long in some kernels. In a short run with a known `forward` only one micro-batch is timed,
    because three would be a noticeable share of the run.

    Args:
        opened: The run, with its decision and the adapter it starts from.
        settings: The run's settings.
        trunk_bytes: The most bytes that may be kept of the lowest blocks' outputs.
        forward: Seconds per token of a forward; None to measure it here.
        processes: How many processes share a step.
    """
    base, rows, recipe = opened.base, opened.rows, opened.decision.recipe
    runner = opened.runner.within(recipe.micro_tokens, recipe.recompute)
    blocks = runner.free_blocks(opened.decision.plan)
    later = 1 - -(-len(rows["train"]) // recipe.batch_size) / recipe.steps  # share of the steps after the first epoch
    needed = _tokens(rows["train"]) * hidden_size(base) * base.dtype.itemsize
    # The share of the steps whose trunk is read:
    read = later * min(1.0, trunk_bytes / needed) if blocks and later > 0 else 0.0
    steps = steps_of(rows["train"], recipe, blocks > 0, runner.mode.packed)
    parts = [part for step in steps for part in runner.parts(rows["train"], step)]
    sizes = [sum(len(rows["train"][i].ids) for i in part) for part in parts]
    ranked = sorted(range(len(parts)), key=sizes.__getitem__)
    few = forward is not None and recipe.steps < LONG
    places = [0.5] if few else [i / (TRIED - 1) for i in range(TRIED)]
    tried = sorted({ranked[int(place * (len(ranked) - 1))] for place in places}, key=sizes.__getitem__)
    state = TrainState(opened.start, base.device, recipe.dropout)
    optimizer = adamw.make_optimizer(state)
    firsts, took, shorter = [], [], []
    with runner.training(state):
        if forward is None:
            some = rows["valid"][:: max(1, len(rows["valid"]) // VALIDATED)][:VALIDATED]
            state.training = False
            runner.nll(some)
            forward = _seconds(base, lambda: runner.nll(some)) / _tokens(some)
            state.training = True
        validation = forward * _tokens(rows["valid"])
        for i in tried:
            batches = [runner.batch([rows["train"][k] for k in parts[i]])]
            work = partial(runner.gradient, batches)
            firsts.append(_seconds(base, work))
            took.append(_seconds(base, work))
            if read:
                started = [runner.started(batch, blocks) for batch in batches]
                shorter.append(_seconds(base, partial(runner.gradient, started)))
        update = partial(adamw.step, state, optimizer, recipe.learning_rate, recipe.weight_decay, recipe.clip)
        update()
        runner.gradient(batches)
        updating = _seconds(base, update)

    def of_all(seconds: Sequence[float]) -> float:
        constant, per_token = _line([sizes[i] for i in tried], seconds)
        return constant * len(parts) + per_token * sum(sizes)

    preparing = max(0.0, min(first - second for first, second in zip(firsts, took, strict=True)))
    computing = (
        (1 - read) * of_all(took)
        + read * of_all(shorter or took)
        + preparing * len({-(-size // runner.length_step) for size in sizes})
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
    """The estimated seconds of everything after training: trimming, which sites mattered, forgetting, and the NLL and
    the answers of the test.

    Args:
        opened: The run.
        per_token: Seconds per token of a forward.
        settings: The run's settings.
    """
    rows, recipe = opened.rows, opened.decision.recipe
    parts = len(parts_of([slot.site.path for slot in opened.decision.plan.slots])) + 1
    valid, test = _tokens(rows["valid"]), _tokens(rows["test"])
    mattering = parts * examples_for(parts - 1, recipe.steps, recipe.batch_size, len(rows["valid"]))
    tokens = mattering * valid / len(rows["valid"]) + 2 * test + 2 * sum(map(_tokens, opened.general.values()))
    answers, questions = answering(opened, settings)
    tokens += answers
    if settings.trim == "auto":
        tokens += RUNGS_TRIED * (valid + questions)
    return per_token * tokens


def disk_of(plan: Plan, trim: bool) -> int:
    """The most bytes that a run of this plan writes to its folder, without a trunk. trim: whether a ladder is kept."""
    training = 2 * 4 * plan.bytes  # the old checkpoint and the new one: master, best and AdamW's two moments
    if not trim:
        return training
    moments = sum(2 * 8 * slot.rank**2 for slot in plan.slots)  # in fp64
    return max(training, 7 * plan.bytes + moments)  # a checkpoint, the adapter as trained, twice, and as shipped


def _line(tokens: Sequence[int], seconds: Sequence[float]) -> tuple[float, float]:
    """The constant seconds of a micro-batch, and the seconds per token: least squares, neither below zero."""
    if max(tokens) > min(tokens):
        per_token, constant = np.polyfit(tokens, seconds, 1)
        if per_token > 0 and constant > 0:
            return float(constant), float(per_token)
    return 0.0, sum(seconds) / sum(tokens)


def _tokens(rows: Sequence[Row]) -> int:
    return sum(len(row.ids) for row in rows)


def _seconds(base: Base, work: Any) -> float:
    start = time.monotonic()
    work()
    if base.device.type == "cuda":
        torch.cuda.synchronize()
    return time.monotonic() - start
