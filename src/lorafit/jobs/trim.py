"""`lorafit trim`: a finished run goes in; a smaller adapter, as small as validation allows or as asked, comes out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
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
from lorafit.attachment.watching import observing
from lorafit.data.render import Row
from lorafit.errors import FormatError, RunError
from lorafit.files import read_json, require_new_folder, whole_file
from lorafit.heads.head import HeldOut
from lorafit.jobs.listener import Listener, Silent
from lorafit.jobs.machine import keep_freed_memory, return_freed_memory
from lorafit.jobs.prepare import open_all, prepare_again, require_same_classes
from lorafit.jobs.scoring import questions_of
from lorafit.planning.ladder import RUNGS, Ladder, Rung, climb_down, costs_too_much, margin_of, rung
from lorafit.planning.trim import Moments, require_pairs, smallest_share, trimmed
from lorafit.runs.folder import (
    LADDER,
    MOMENTS,
    ONLY_RUNS,
    PLAN,
    WHOLE,
    frozen_of,
    read_finished,
    set_by,
    standing_folder,
)
from lorafit.settings import settings_from, share_of
from lorafit.tasks.runner import Runner
from lorafit.training.recipe import Recipe

LOOKED_AT = 32  # training rows, spread over all, whose moments decide which directions go


def run_trimming(folder: str | Path, out: str | Path, listener: Listener | None = None) -> dict[str, Any]:
    """Score the ladder of the run in `folder` on the run's validation examples, and write the smallest adapter that may
    be shipped (`climb_down`) to `out`; returns the ladder. If no smaller adapter may be shipped, nothing is written.

    The test is not used. Raises RunError for a run that is not finished, or whose base or data have changed.
    """
    folder, out, listener = Path(folder), Path(out), listener or Silent()
    began = time.monotonic()
    require_new_folder(out, "--out")
    asked, summary = read_finished(folder, ONLY_RUNS)
    settings, frozen = settings_from(asked["settings"]), frozen_of(folder, asked)
    whole = peft.read(_whole(folder))
    require_pairs(whole)
    keep_freed_memory()
    prepared = prepare_again(folder, asked["data"], settings, listener, "give --to 25%")
    opened = open_all(asked["base"], asked["data"], settings, listener, frozen, prepared=prepared, set_by=set_by(asked))
    base, examples, rows = opened.base, opened.examples, opened.rows
    if base.identity != asked["base_identity"] or not examples.has_digest(asked["data_digest"]):
        raise RunError(
            f"{folder}: its base or its data have changed since it was trained, and so its validation, or "
            "an earlier version of lorafit held others out: restore them, or give --to 25%"
        )
    require_same_classes(folder, whole, opened)
    recipe = Recipe(**read_json(standing_folder(folder) / PLAN)["recipe"])
    # With the micro-batches of training, no more memory is needed than in training.
    runner = opened.runner.within(recipe.micro_tokens, recipe.recompute)
    with attach(base, whole):
        nll = runner.nll(rows["valid"], partial(listener.watch, "whole"))
    questions = questions_of(opened, settings)
    groups = [example.group for example in examples.valid]
    held = Validation(rows["valid"], nll, summary.validation[0][1], groups, questions)
    ladder, small, _ = ladder_of(runner, whole, rows["train"], held, listener)
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


@dataclass(frozen=True)
class Validation:
    """The validation examples that decide how small an adapter may be.

    Args:
        rows: The rows of every example.
        nll: The NLL of every example under the whole adapter, in nats per token.
        before: Their mean NLL under the base.
        groups: The group of every example; the examples of one group count as one.
        questions: Questions that are answered with each rung whose NLL may be shipped; None for none.
    """

    rows: Sequence[Row]
    nll: Sequence[float]
    before: float
    groups: Sequence[str | None]
    questions: HeldOut | None


def ladder_of(
    runner: Runner, whole: Adapter, train: Sequence[Row], held: Validation, listener: Listener
) -> tuple[Ladder, Adapter | None, dict[str, Moments]]:
    """Score smaller and smaller adapters until validation refuses one.

    Args:
        runner: The base of the adapter, and how it is run.
        whole: The adapter as it was trained.
        train: The run's training rows; the moments are measured on some of them.
        held: The validation examples.
        listener: Receives progress.

    Returns:
        The ladder down to the refused rung, the smallest adapter that may be shipped (None if that is the whole), and
        the moments by which it was cut.
    """
    moments = moments_of(runner, whole, train[:: max(1, len(train) // LOOKED_AT)][:LOOKED_AT])
    return_freed_memory()
    questions = held.questions
    small: dict[float, Adapter] = {}
    rungs: list[Rung] = []
    margin = margin_of(fmean(held.nll), held.before)
    right: int | None = None
    for share in RUNGS:
        if share < smallest_share(whole):
            break
        small[share], _ = trimmed(whole, share, moments)
        with attach(runner.base, small[share]):
            nll = runner.nll(held.rows, partial(listener.watch, f"{share:.2%}"))
        return_freed_memory()
        step = rung(share, small[share].plan.parameters, nll, held.nll, held.groups)
        if questions is not None and not costs_too_much(step, margin):
            if right is None:
                right = questions.right(whole, partial(listener.watch, "whole: answers"))
            if right:
                step = replace(
                    step, right=questions.right(small[share], partial(listener.watch, f"{share:.2%}: answers"))
                )
        rungs.append(step)
        if costs_too_much(step, margin, right):
            break
    asked = 0 if right is None or questions is None else len(questions.examples)
    ladder = climb_down(held.nll, held.before, rungs, held.groups, asked, right)
    return ladder, small.get(ladder.chosen), moments


def cut(folder: str | Path, to: str, out: str | Path) -> dict[str, Any]:
    """Write a share of an adapter to `out` without opening a model; returns the sizes before and after.

    A run with a ladder keeps the moments by which its rungs were cut, and they are used again. For any other adapter
    all directions are weighted alike.

    Args:
        folder: A run, or an adapter folder.
        to: The share of the parameters, such as 25%.
        out: A new folder.
    """
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
    """Write the moments as safetensors, by site path and side."""
    sides = {
        f"{name}.{side}": getattr(moment, side) for name, moment in moments.items() for side in ("inputs", "outputs")
    }
    with whole_file(path) as building:
        save_file({name: tensor.contiguous() for name, tensor in sides.items()}, building)


def read_moments(path: Path) -> dict[str, Moments]:
    """Read what `write_moments` wrote. Raises FormatError for a damaged file."""
    try:
        tensors = load_file(path)
        return {
            name.removesuffix(".inputs"): Moments(tensor, tensors[name.removesuffix(".inputs") + ".outputs"])
            for name, tensor in tensors.items()
            if name.endswith(".inputs")
        }
    except (SafetensorError, KeyError) as error:
        raise FormatError(f"{path}: damaged ({error}): remove it; all directions are then weighted alike") from error


def _whole(folder: Path) -> Path:
    """The folder of a run's untrimmed adapter, or the adapter folder itself."""
    kept = folder / LADDER / WHOLE
    return kept if kept.exists() else peft.adapter_folder(folder)


def moments_of(runner: Runner, adapter: Adapter, rows: Sequence[Row]) -> dict[str, Moments]:
    """The second moments inside the adapter's pairs, of their inputs and of the gradient of the rows' mean NLL.

    A pair that took no part has moments of zero. It needs the memory of a step, and of A x for every pair.
    """
    base = runner.base
    state = TrainState(adapter, base.device)
    pairs = {slot.site.path: slot for slot in adapter.plan.slots if slot.is_pair}
    factors = adapter.factors(torch.float32, base.device)
    sums = {
        path: [torch.zeros(slot.rank, slot.rank, dtype=torch.float64) for _ in range(2)] for path, slot in pairs.items()
    }

    def inside(path: str, x: Tensor) -> Tensor:
        return x.float() @ factors[path]["A"].T

    def add(path: str, inside: Tensor, g: Tensor) -> None:
        for total, values in zip(sums[path], (inside, g.float() @ factors[path]["B"]), strict=True):
            total += (values.double().T @ values.double()).cpu()

    with runner.training(state), observing(base, pairs, inside, add):
        runner.gradient_of(rows)
    return {path: Moments(*sides) for path, sides in sums.items()}
