"""The loop: one change by the rules, trained anew, kept only if validation shows that it is better; again."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lorafit.adapter import Adapter
from lorafit.attachment import attach
from lorafit.errors import DivergedError, FormatError, RunError
from lorafit.evaluation.nll import example_nll
from lorafit.files import make_folder, read_json, write_json
from lorafit.formats import peft
from lorafit.pipeline.listener import Listener, Silent
from lorafit.pipeline.looking_back import trim_trained
from lorafit.pipeline.memory import keep_freed_memory
from lorafit.pipeline.preparing import Opened, open_all
from lorafit.pipeline.searching import Order, carry_out
from lorafit.plan import Plan
from lorafit.planning import Decision
from lorafit.planning.ladder import Ladder, Rung
from lorafit.planning.refine import Evidence, Round, changed, judged, next_change
from lorafit.report.page import write_report
from lorafit.report.story import lines_of
from lorafit.run import (
    ADAPTER,
    CARD,
    HISTORY,
    LADDER,
    METRICS,
    PLAN,
    REPORT,
    ROUNDS,
    RUN,
    RUNGS,
    SEARCH,
    SUMMARY,
    frozen_of,
    read_run,
    read_summary,
)  # fmt: skip
from lorafit.settings import TrainSettings, settings_from
from lorafit.training.processes import ALONE, Processes
from lorafit.training.recipe import Recipe

SCORED_EACH = "validation.json"  # below a round: NLL of every validation example under its adapter


@dataclass(frozen=True)
class Standing:
    """The adapter that stands: as it is shipped, the decision it was trained by, its ladder, the folder with its
    curves, and its NLL on every validation example."""

    adapter: Adapter
    decision: Decision
    ladder: Ladder
    folder: Path
    each: Sequence[float]


def run_refining(folder: Path, listener: Listener | None = None) -> dict[str, Any]:
    """One round for the finished run in `folder`, on its validation alone; returns what came of it. A better adapter
    takes the place of the run's, the one before is kept below rounds/. The test is not opened.

    Raises RunError for a run that is not finished, or whose base or data have changed.
    """
    listener = listener or Silent()
    if not (folder / RUN).exists():
        raise RunError(f"{folder}: no run: name a folder that lorafit train wrote")
    asked, summary = read_run(folder), read_summary(folder)
    if summary is None:
        raise RunError(f"{folder}: is not finished: end it with lorafit train --resume --out {folder}")
    keep_freed_memory()
    settings, frozen = settings_from(asked["settings"]), frozen_of(folder, asked)
    opened = open_all(asked["base"], asked["data"], settings, listener, frozen)
    if (opened.base.identity, opened.examples.digest()) != (asked["base_identity"], asked["data_digest"]):
        raise RunError(f"{folder}: its base or its data have changed since it was trained: restore them")
    history = history_of(folder)
    last = max((one.number for one in history if one.accepted), default=0)
    where = folder / ROUNDS / str(last) if last else folder
    told = read_json(where / PLAN)
    decision = Decision(Plan.from_json(told, str(where / PLAN)), Recipe(**told["recipe"]), opened.decision.choices)
    adapter = peft.read(folder / ADAPTER)
    each = scored(opened, adapter, listener)
    standing = Standing(adapter, decision, _ladder(where, each), where, each)
    known = tuple(read_json(folder / SEARCH / CARD)["known"])
    new, done = one_round(opened, standing, history, folder, settings, known, True, listener)
    if new is not None:
        keep = folder / ROUNDS / "0" / ADAPTER
        if not keep.exists():
            shutil.copytree(folder / ADAPTER, keep)
        peft.write(new.adapter, folder / ADAPTER, extra={"round": asdict(done) if isinstance(done, Round) else None})
    if isinstance(done, Round):
        told = {**summary, "rounds": [asdict(one) for one in history_of(folder)]}
        if done.accepted:
            told = {"scores_of_round": done.number, **told}  # those of the adapter before it: the test stays shut
        write_json(folder / SUMMARY, told)
        write_report([folder], folder / REPORT)
        return {**asdict(done), "adapter_dir": str(folder / ADAPTER)}
    return {"number": None, "accepted": False, "verdict": f"nothing is left to try: {done}",
            "adapter_dir": str(folder / ADAPTER)}  # fmt: skip


def refine(
    opened: Opened, standing: Standing, out: Path, settings: TrainSettings, known: tuple[float, ...], resume: bool,
    listener: Listener, processes: Processes,
) -> Standing:  # fmt: skip
    """At most settings.rounds of them, before the test is opened; those done before a stop are taken from the files."""
    history = history_of(out) if resume else []
    for one in history:
        if one.accepted:
            standing = _stands(out / ROUNDS / str(one.number), standing.decision)
    while len(history) < settings.rounds:
        new, done = one_round(opened, standing, history, out, settings, known, resume, listener, processes)
        if isinstance(done, str):
            listener.say(f"no further round: {done}")
            break
        standing = new or standing
        history = [*history, done]
    return standing


def one_round(
    opened: Opened, standing: Standing, history: Sequence[Round], out: Path, settings: TrainSettings,
    known: tuple[float, ...], resume: bool, listener: Listener, processes: Processes = ALONE,
) -> tuple[Standing | None, Round | str]:  # fmt: skip
    """Try what the rules say, and judge it: what stands now where that has changed, and the round; or why none is left.
    A round is in the history once its adapter is on disk."""
    since = max((one.number for one in history if one.accepted), default=0)
    refused = {one.kind for one in history if one.number > since}
    lines = lines_of(standing.folder / METRICS)
    evidence = Evidence(
        standing.decision.recipe.steps,
        [(line["step"], line["valid_nll"]) for line in lines if "valid_nll" in line],
        [(line["step"], line["train_nll"]) for line in lines if "train_nll" in line],
        standing.ladder,
    )
    change = next_change(evidence, max(slot.rank for slot in standing.decision.plan.slots), refused)
    if isinstance(change, str):
        return None, change
    number = len(history) + 1
    folder = out / ROUNDS / str(number)
    listener.say(f"round {number}: {change.kind}, for {change.reason}")
    decision = changed(standing.decision, change)
    order = Order(decision.plan, decision.recipe, f"{ROUNDS}/{number}", known=known)
    processes.agreed(order.to_json)
    rank = max(slot.rank for slot in decision.plan.slots)
    groups = [example.group for example in opened.examples.valid]
    try:
        trained = carry_out(opened, order, out, resume, settings.trunk_bytes, processes, listener)
    except DivergedError as error:
        mean = sum(standing.each) / len(standing.each)
        done = Round(number, change.kind, change.reason, change.steps, rank, mean, mean, 0.0, None, 0.0, False,
                     f"it diverged: {error}")  # fmt: skip
        write_json(out / ROUNDS / HISTORY, [asdict(one) for one in (*history, done)])
        return None, done
    write_json(folder / PLAN, {**decision.plan.to_json(), "recipe": asdict(decision.recipe)})
    ladder, adapter = trim_trained(opened, trained, settings.trim, folder, listener)
    each = trained.each if adapter is trained.adapter else scored(opened, adapter, listener)
    done = judged(number, change, rank, standing.each, each, groups)
    new = None
    if done.accepted:
        peft.write(adapter, folder / ADAPTER, extra={"round": asdict(done)})
        write_json(folder / SCORED_EACH, list(each))
        new = Standing(adapter, decision, ladder, folder, each)
    write_json(out / ROUNDS / HISTORY, [asdict(one) for one in (*history, done)])
    listener.say(f"round {number}: {done.verdict}")
    return new, done


def scored(opened: Opened, adapter: Adapter, listener: Listener) -> list[float]:
    """NLL of every validation example under an adapter."""
    with attach(opened.base, adapter):
        return example_nll(opened.base, opened.rows["valid"], partial(listener.watch, "as it stands"), opened.way)


def _stands(folder: Path, decision: Decision) -> Standing:
    """What an accepted round has left."""
    told = read_json(folder / PLAN)
    decision = replace(decision, plan=Plan.from_json(told, str(folder / PLAN)), recipe=Recipe(**told["recipe"]))
    each = read_json(folder / SCORED_EACH)
    return Standing(peft.read(folder / ADAPTER), decision, _ladder(folder, each), folder, each)


def _ladder(folder: Path, each: Sequence[float]) -> Ladder:
    path = folder / LADDER / RUNGS
    if not path.exists():
        return Ladder(sum(each) / len(each), 0.0, (), 1.0, "not trimmed")
    told = read_json(path)
    try:
        return Ladder(**{**told, "rungs": tuple(Rung(**rung) for rung in told["rungs"])})
    except (TypeError, KeyError) as error:
        raise FormatError(f"{path}: damaged ({error}): remove it, and ranks are not judged") from error


def history_of(out: Path) -> list[Round]:
    """The rounds of a run so far. Raises FormatError for a damaged history."""
    path = out / ROUNDS / HISTORY
    make_folder(out / ROUNDS)
    if not path.exists():
        return []
    try:
        return [Round(**one) for one in read_json(path)]
    except TypeError as error:
        raise FormatError(f"{path}: damaged ({error}): move the folder {out / ROUNDS} elsewhere") from error
