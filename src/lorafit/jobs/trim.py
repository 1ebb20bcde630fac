"""A finished run's adapter, as small as its validation allows."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from statistics import fmean
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.formats import peft
from lorafit.adapters.state import TrainState
from lorafit.attachment.adapters import attach
from lorafit.attachment.attention import packing
from lorafit.attachment.blocks import recomputing
from lorafit.attachment.watching import observing
from lorafit.bases.base import Base
from lorafit.data.batches import by_tokens
from lorafit.data.render import Row
from lorafit.errors import FormatError, RunError
from lorafit.evaluation.nll import example_nll
from lorafit.evaluation.questions import Questions
from lorafit.files import read_json, require_new_folder, whole_file
from lorafit.jobs.listener import Listener, Silent
from lorafit.jobs.machine import keep_freed_memory, left_of
from lorafit.jobs.prepare import opened_base, rendered
from lorafit.planning.ladder import RUNGS, Ladder, Rung, climb_down, costs_too_much, margin_of, rung
from lorafit.planning.trim import Moments, require_pairs, smallest_share, trimmed
from lorafit.prepared import prepare
from lorafit.runs.folder import LADDER, MOMENTS, ONLY_RUNS, PLAN, WHOLE, frozen_of, read_finished, standing_folder
from lorafit.settings import settings_from, share_of
from lorafit.tasks.completion import Way, batch_of
from lorafit.training.loop import gradient_step
from lorafit.training.recipe import Recipe

LOOKED_AT = 32  # training rows, spread over all, whose moments decide which directions go


def run_trimming(folder: str | Path, out: str | Path, listener: Listener | None = None) -> dict[str, Any]:
    """Score the ladder of the run in `folder` on its own validation examples, and write the smallest adapter that may
    be shipped (`climb_down`) to `out`; returns the ladder. Where none may be smaller, nothing is written.

    The test is not touched. Raises RunError for a run that is not finished, or whose data have changed.
    """
    folder, out, listener = Path(folder), Path(out), listener or Silent()
    began = time.monotonic()
    require_new_folder(out, "--out")
    asked, summary = read_finished(folder, ONLY_RUNS)
    settings, frozen = settings_from(asked["settings"]), frozen_of(folder, asked)
    whole, way = peft.read(_whole(folder)), Way(frozen.apart, frozen.packed)
    require_pairs(whole)
    keep_freed_memory()
    examples, _ = prepare(asked["data"], settings, listener)
    base = opened_base(asked["base"], settings, listener, frozen)
    examples, renderer, rows = rendered(base, examples, settings, listener, frozen.now)
    if base.identity != asked["base_identity"] or not examples.has_digest(asked["data_digest"]):
        raise RunError(
            f"{folder}: its base or its data have changed since it was trained, and so its validation, or "
            "an earlier version of lorafit held others out: restore them, or give --to 25%"
        )
    with attach(base, whole):
        nll = example_nll(base, rows["valid"], partial(listener.watch, "whole"), way)
    groups = [example.group for example in examples.valid]
    before, recipe = float(summary["validation"][0][1]), Recipe(**read_json(standing_folder(folder) / PLAN)["recipe"])
    questions = Questions.among(
        base, renderer, examples.valid, rows["valid"], examples.train, left_of(settings.memory, base)
    )
    ladder, small, _ = ladder_of(base, whole, rows, way, recipe, nll, before, groups, questions, listener)
    if small is not None:
        peft.write(
            small,
            out,
            extra={"trimmed_from": whole.digest(), "ladder": asdict(ladder)},
            routing=peft.routing_of(peft.adapter_folder(folder)),
        )
    return {
        **asdict(ladder),
        "parameters": whole.plan.parameters,
        "seconds": round(time.monotonic() - began, 1),
        "adapter_dir": str(out) if small else None,
    }


def ladder_of(
    base: Base,
    whole: Adapter,
    rows: Mapping[str, Sequence[Row]],
    way: Way,
    recipe: Recipe,
    nll: Sequence[float],
    before: float,
    groups: Sequence[str | None],
    questions: Questions | None,
    listener: Listener,
) -> tuple[Ladder, Adapter | None, dict[str, Moments]]:
    """Down the ladder until validation refuses a rung: the ladder as far as it was climbed, the smallest adapter that
    may be shipped (None where that is the whole), and the moments by which it was cut.

    Args:
        base: what the adapter was trained on.
        whole: the adapter as it was trained.
        rows: the run's, by split; `train` gives the moments, `valid` the scores.
        way: how rows are computed.
        recipe: by which it was trained: what is computed at a time is no more than then, and needs no more memory.
        nll: of every validation example under the whole, nats per token.
        before: mean NLL of them under the base.
        groups: of the validation examples.
        questions: those of validation that are answered under each rung whose NLL may be shipped; None for none.
        listener: hears how far it has come.
    """
    spread = rows["train"][:: max(1, len(rows["train"]) // LOOKED_AT)][:LOOKED_AT]
    moments = moments_of(base, whole, spread, way, recipe)
    small: dict[float, Adapter] = {}
    rungs: list[Rung] = []
    margin = margin_of(fmean(nll), before)
    right: int | None = None
    for share in RUNGS:
        if share < smallest_share(whole):
            break
        small[share], _ = trimmed(whole, share, moments)
        with attach(base, small[share]):
            found = example_nll(base, rows["valid"], partial(listener.watch, f"{share:.2%}"), way)
        each = rung(share, small[share].plan.parameters, found, nll, groups)
        if questions is not None and not costs_too_much(each, margin):
            if right is None:
                right = questions.right(whole, partial(listener.watch, "whole: answers"))
            if right:
                each = replace(
                    each, right=questions.right(small[share], partial(listener.watch, f"{share:.2%}: answers"))
                )
        rungs.append(each)
        if costs_too_much(each, margin, right):
            break
    asked = 0 if right is None or questions is None else len(questions.examples)
    ladder = climb_down(nll, before, rungs, groups, asked, right)
    return ladder, small.get(ladder.chosen), moments


def cut(folder: str | Path, to: str, out: str | Path) -> dict[str, Any]:
    """Write so much of the adapter of a run, or in an adapter folder, to `out`; no model is opened. Of a run with a
    ladder it is the rung that was scored there, cut from the whole by the moments it keeps; of anything else every
    direction counts alike. Returns what came of it."""
    folder, out = Path(folder), Path(out)
    require_new_folder(out, "--out")
    share = share_of(to)
    whole, moments = peft.read(_whole(folder)), folder / LADDER / MOMENTS
    small, left = trimmed(whole, share, read_moments(moments) if moments.exists() else None)
    peft.write(small, out, extra={"trimmed_from": whole.digest()}, routing=peft.routing_of(peft.adapter_folder(folder)))
    ranks = [slot.rank for slot in small.plan.slots]
    return {
        "adapter_dir": str(out),
        "parameters": small.plan.parameters,
        "of": whole.plan.parameters,
        "sites": len(ranks),
        "ranks": [min(ranks), max(ranks)],
        "left": left,
    }


def write_moments(moments: Mapping[str, Moments], path: Path) -> None:
    """As safetensors, by site path and side."""
    sides = {f"{name}.{side}": getattr(each, side) for name, each in moments.items() for side in ("inputs", "outputs")}
    with whole_file(path) as building:
        save_file({name: tensor.contiguous() for name, tensor in sides.items()}, building)


def read_moments(path: Path) -> dict[str, Moments]:
    """Raises FormatError for a damaged file."""
    try:
        tensors = load_file(path)
        return {
            name.removesuffix(".inputs"): Moments(tensor, tensors[name.removesuffix(".inputs") + ".outputs"])
            for name, tensor in tensors.items()
            if name.endswith(".inputs")
        }
    except (SafetensorError, KeyError) as error:
        raise FormatError(f"{path}: damaged ({error}): remove it, and every direction counts alike") from error


def _whole(folder: Path) -> Path:
    """Where the untrimmed adapter of a run lies, or of an adapter folder the adapter."""
    kept = folder / LADDER / WHOLE
    return kept if kept.exists() else peft.adapter_folder(folder)


def moments_of(base: Base, adapter: Adapter, rows: Sequence[Row], way: Way, recipe: Recipe) -> dict[str, Moments]:
    """Second moments inside the adapter's pairs, over what the rows are laid into, with the gradient of their mean NLL.
    A pair that took no part has moments of zero. It holds no more than a step of the recipe, and A x of every pair."""
    state = TrainState(adapter, base.device)
    pairs = {slot.site.path: slot for slot in adapter.plan.slots if slot.is_pair}
    factors = adapter.factors(torch.float32, base.device)
    sums = {
        path: [torch.zeros(slot.rank, slot.rank, dtype=torch.float64) for _ in range(2)] for path, slot in pairs.items()
    }

    def inside(path: str, x: Tensor) -> Tensor:
        return x.float() @ factors[path]["A"].T

    def see(path: str, inside: Tensor, g: Tensor) -> None:
        for total, values in zip(sums[path], (inside, g.float() @ factors[path]["B"]), strict=True):
            total += (values.double().T @ values.double()).cpu()

    steps = [range(i, min(i + recipe.batch_size, len(rows))) for i in range(0, len(rows), recipe.batch_size)]
    parts = [part for step in steps for part in by_tokens(rows, step, recipe.micro_tokens, way.packed)]
    watched = observing(base, pairs, inside, see)
    with attach(base, state), packing(base, way.packed), recomputing(base, recipe.recompute), watched:
        gradient_step(base, state, [batch_of(base, [rows[i] for i in part], way) for part in parts], way)
    return {path: Moments(*each) for path, each in sums.items()}
