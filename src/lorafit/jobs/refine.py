"""The loop: one change by the rules, trained anew, kept only if validation shows that it is better; again."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.formats import peft
from lorafit.adapters.plan import Plan
from lorafit.attachment.adapters import attach
from lorafit.errors import DivergedError, FormatError, Interrupted, RunError, SettingsError
from lorafit.evaluation.nll import example_nll
from lorafit.evaluation.statistics import FEWEST, groups_of
from lorafit.files import make_folder, read_json, shown, whole_folder, write_json
from lorafit.jobs.extras import Extras
from lorafit.jobs.listener import Listener, Silent
from lorafit.jobs.looking_back import told_ladder, trim_trained
from lorafit.jobs.machine import keep_freed_memory, on_threads, room_of
from lorafit.jobs.plan import disk_of
from lorafit.jobs.prepare import Opened, fitted, open_all
from lorafit.jobs.search import Order, carry_out, start_of
from lorafit.planning import Choice, Decision
from lorafit.planning.ladder import Ladder, Rung
from lorafit.planning.refine import Evidence, Round, changed, judged, next_change
from lorafit.report.card import card
from lorafit.report.page import write_report
from lorafit.report.story import lines_of
from lorafit.runs.folder import (
    ADAPTER,
    CARD,
    CHECKPOINTS,
    FIGURES,
    HISTORY,
    LADDER,
    METRICS,
    PLAN,
    REPORT,
    ROUNDS,
    RUNGS,
    SEARCH,
    SUMMARY,
    WHOLE,
    accepted_round,
    frozen_of,
    read_finished,
    require_disk,
    require_run,
    room_to_write,
    sole_writer,
    versions,
)
from lorafit.settings import TrainSettings, settings_from
from lorafit.training.loop import RESUME_HINT, Trained
from lorafit.training.processes import ALONE, Processes
from lorafit.training.recipe import Recipe


@dataclass(frozen=True)
class Standing:
    """The adapter that stands: as it is shipped, the decision it was trained by, its ladder, the folder with its
    curves, and what its training came to."""

    adapter: Adapter
    decision: Decision
    ladder: Ladder
    folder: Path
    figures: Mapping[str, Any]

    def whole(self) -> Adapter:
        """As it was trained."""
        kept = self.folder / LADDER / WHOLE
        return peft.read(kept) if kept.exists() else self.adapter

    def told(self) -> dict[str, Any]:
        """What a summary says of it."""
        told = {name: value for name, value in self.figures.items() if name != "each"}
        return {**told, "parameters": self.adapter.plan.parameters, "ladder": asdict(self.ladder)}


def figures_of(trained: Trained) -> dict[str, Any]:
    """Of a training, as a summary says them; `each`: NLL of every validation example under the adapter as trained."""
    return {
        "trained_tokens": trained.trained_tokens,
        "trainable_parameters": trained.adapter.plan.parameters,
        "best_step": trained.best_step,
        "steps": trained.steps,
        "validation": [list(entry) for entry in trained.history],
        "tokens_per_second": round(trained.tokens_per_second, 1),
        "each": list(trained.each),
    }


def write_plan(decision: Decision, folder: Path) -> None:
    """plan.json: the plan, how it is trained, and why."""
    write_json(
        folder / PLAN,
        {
            **decision.plan.to_json(),
            "recipe": asdict(decision.recipe),
            "choices": [asdict(choice) for choice in decision.choices],
        },
    )


def _read_plan(folder: Path) -> Decision:
    told = read_json(folder / PLAN)
    choices = tuple(Choice(**choice) for choice in told["choices"])
    return Decision(Plan.from_json(told, str(folder / PLAN)), Recipe(**told["recipe"]), choices)


def run_refining(folder: str | Path, listener: Listener | None = None) -> dict[str, Any]:
    """One round for the finished run in `folder`, on its validation alone; returns what came of it. A better adapter
    takes the place of the run's, the first is kept below rounds/0. The test is not opened. A round that was stopped
    goes on.

    Raises RunError for a run that is not finished, or whose base or data have changed.
    """
    folder, listener = Path(folder), listener or Silent()
    require_run(folder)
    keep_freed_memory()
    with sole_writer(folder), room_to_write(folder):
        return _refined(folder, listener)


def _refined(folder: Path, listener: Listener) -> dict[str, Any]:
    """As run_refining, in a folder that nobody else writes to."""
    asked, summary = read_finished(folder)
    settings, frozen = settings_from(asked["settings"]), frozen_of(folder, asked)
    with on_threads(frozen.threads, listener):
        opened = open_all(asked["base"], asked["data"], settings, listener, frozen)
        if opened.base.identity != asked["base_identity"] or not opened.examples.has_digest(asked["data_digest"]):
            raise RunError(
                f"{folder}: its base or its data have changed since it was trained, or an earlier version "
                "of lorafit held other examples out: restore them, or train again"
            )
        last = accepted_round(folder)
        if last:
            standing = _stands(folder / ROUNDS / str(last))
            _install(standing, last, folder, summary)  # a kill may have come between
        else:
            figures = {name: summary[name] for name in ("best_step", "steps", "validation")}
            standing = Standing(peft.read(folder / ADAPTER), _read_plan(folder), _ladder(folder), folder, figures)
        known = tuple(read_json(folder / SEARCH / CARD)["known"])
        try:
            new, done = one_round(opened, standing, history_of(folder), folder, settings, known, True, listener)
        except Interrupted as error:
            raise Interrupted(str(error).replace(RESUME_HINT, "type the same again and it goes on")) from None
        if isinstance(done, str):
            return {
                "number": None,
                "accepted": False,
                "verdict": f"nothing is left to try: {done}",
                "adapter_dir": str(folder / ADAPTER),
            }
        if new is not None:
            _install(new, done.number, folder, summary)
        else:
            write_json(folder / SUMMARY, {**summary, "rounds": [asdict(one) for one in history_of(folder)]})
        write_report([folder], folder / REPORT)
    return {**asdict(done), "adapter_dir": str(folder / ADAPTER)}


def _install(standing: Standing, number: int, folder: Path, summary: Mapping[str, Any]) -> None:
    """Put the adapter of an accepted round in the place of the run's, where it is not there already."""
    first = folder / ROUNDS / "0"
    if not (first / ADAPTER).exists():
        with whole_folder(first / ADAPTER) as building:
            shutil.copytree(folder / ADAPTER, building, dirs_exist_ok=True)
    told = {
        **summary,
        **standing.told(),
        "scores_of_round": number,
        "rounds": [asdict(one) for one in history_of(folder)],
    }
    if peft.read(folder / ADAPTER) != standing.adapter:
        peft.write(
            standing.adapter,
            folder / ADAPTER,
            card(standing.adapter, standing.decision.choices, told),
            {"versions": versions(), "round": number},
            peft.routing_of(folder / ADAPTER),
        )
    _take_ladder(standing, folder)
    write_json(folder / SUMMARY, told)


def _take_ladder(standing: Standing, out: Path) -> None:
    """The ladder in the run's folder is that of the adapter that stands."""
    if standing.folder == out:
        return
    if (standing.folder / LADDER).exists():
        with whole_folder(out / LADDER) as building:
            shutil.copytree(standing.folder / LADDER, building, dirs_exist_ok=True)
    elif (out / LADDER).exists():  # of an adapter that no longer stands
        shutil.rmtree(out / LADDER)


def refine(
    opened: Opened,
    standing: Standing,
    out: Path,
    settings: TrainSettings,
    known: tuple[float, ...],
    resume: bool,
    extras: Extras,
    processes: Processes,
) -> Standing:
    """At most settings.rounds of them, before the test is opened; those done before a stop are taken from the files.
    One that fails is the last, and what stood before it stands."""
    history = history_of(out)
    if last := accepted_round(out):
        standing = _stands(out / ROUNDS / str(last))
    while len(history) < settings.rounds:
        tried = partial(one_round, opened, standing, history, out, settings, known, resume, extras.listener, processes)
        # Of several processes the others are in the midst of the same round, and cannot be told that it has ended.
        found = tried() if processes.count > 1 else extras.get(f"round {len(history) + 1}", tried)
        if found is None:
            break
        new, done = found
        if isinstance(done, str):
            extras.listener.say(f"no further round: {done}")
            break
        standing = new or standing
        history = [*history, done]
    _take_ladder(standing, out)
    return standing


def one_round(
    opened: Opened,
    standing: Standing,
    history: Sequence[Round],
    out: Path,
    settings: TrainSettings,
    known: tuple[float, ...],
    resume: bool,
    listener: Listener,
    processes: Processes = ALONE,
) -> tuple[Standing | None, Round | str]:
    """Try what the rules say, and judge it: what stands now where that has changed, and the round; or why none is left.
    A round is in the history once its adapter is on disk."""
    groups = [example.group for example in opened.examples.valid]
    if (n := len(set(groups_of(groups)))) < FEWEST:
        return None, f"{n} independent validation examples decide nothing, at least {FEWEST} are needed"
    since = max((one.number for one in history if one.accepted), default=0)
    refused = {one.kind for one in history if one.number > since}
    lines = lines_of(standing.folder / METRICS)
    recipe = standing.decision.recipe
    evidence = Evidence(
        recipe.steps,
        [(line["step"], line["valid_nll"]) for line in lines if "valid_nll" in line and line["step"] != recipe.early],
        [(line["step"], line["train_nll"]) for line in lines if "train_nll" in line],
        standing.ladder,
    )
    change = next_change(evidence, max(slot.rank for slot in standing.decision.plan.slots), refused)
    if isinstance(change, str):
        return None, change
    number = len(history) + 1
    folder = out / ROUNDS / str(number)
    if (folder / PLAN).exists():  # the round was stopped: it goes on as it began
        decision = _read_plan(folder)
    else:
        fits = _fitting(opened, changed(standing.decision, change), folder, settings, processes)
        if isinstance(fits, str):
            return None, f"{change.kind} would be next, for {change.reason}, and is left out: {fits}"
        decision = fits
    listener.say(f"round {number}: {change.kind}, for {change.reason}")
    make_folder(folder)
    write_plan(decision, folder)
    order = Order(decision.plan, decision.recipe, f"{ROUNDS}/{number}", known=known)
    processes.agreed(order.to_json)
    rank = max(slot.rank for slot in decision.plan.slots)
    before = scored(opened, standing.adapter, listener)
    new = None
    try:
        trained = carry_out(opened, order, out, resume, settings.trunk_bytes, processes, listener)
    except DivergedError as error:
        mean = sum(before) / len(before)
        done = Round(
            number,
            change.kind,
            change.reason,
            change.steps,
            rank,
            mean,
            mean,
            0.0,
            None,
            0.0,
            False,
            f"it diverged: {error}",
        )
    else:
        ladder, adapter = trim_trained(opened, trained, decision.recipe, settings, folder, Extras(listener))
        after = trained.each if adapter is trained.adapter else scored(opened, adapter, listener)
        done = judged(number, change, rank, before, after, groups)
        if done.accepted:
            decision = told_ladder(decision, ladder, adapter)
            new = Standing(adapter, decision, ladder, folder, figures_of(trained))
            write_plan(decision, folder)
            write_json(folder / FIGURES, new.figures)
            peft.write(adapter, folder / ADAPTER, extra={"round": asdict(done)})
    write_json(out / ROUNDS / HISTORY, [asdict(one) for one in (*history, done)])
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    listener.say(f"round {number}: {done.verdict}")
    return new, done


def _fitting(
    opened: Opened, decision: Decision, folder: Path, settings: TrainSettings, processes: Processes
) -> Decision | str:
    """The decision of a round with how much is run at a time, so that it stays within what the run was given; or in
    words why it cannot: a round is no reason to lose the run."""
    base = opened.base
    try:
        require_disk(folder, disk_of(decision.plan, settings.trim == "auto"))
        start = start_of(opened, decision.plan)
        decision, peak = fitted(base, start, opened.rows, decision, settings, opened.way, processes.here)
    except (RunError, SettingsError) as error:
        return str(error)
    room = room_of(base, processes.here)
    if settings.memory is None and room.free is not None and peak > room.held + room.free:
        return f"it would hold about {shown(peak - room.held)} more, and {shown(room.free)} of memory are free here"
    return decision


def scored(opened: Opened, adapter: Adapter, listener: Listener) -> list[float]:
    """NLL of every validation example under an adapter."""
    with attach(opened.base, adapter):
        return example_nll(opened.base, opened.rows["valid"], partial(listener.watch, "as it stands"), opened.way)


def _stands(folder: Path) -> Standing:
    """What an accepted round has left."""
    return Standing(
        peft.read(folder / ADAPTER), _read_plan(folder), _ladder(folder), folder, read_json(folder / FIGURES)
    )


def _ladder(folder: Path) -> Ladder:
    path = folder / LADDER / RUNGS
    if not path.exists():
        return Ladder(0.0, 0.0, (), 1.0, "not trimmed")
    told = read_json(path)
    try:
        return Ladder(**{**told, "rungs": tuple(Rung(**rung) for rung in told["rungs"])})
    except (TypeError, KeyError) as error:
        raise FormatError(f"{path}: damaged ({error}): remove it, and ranks are not judged") from error


def history_of(out: Path) -> list[Round]:
    """The rounds of a run so far. Raises FormatError for a damaged history."""
    path = out / ROUNDS / HISTORY
    if not path.exists():
        return []
    try:
        return [Round(**one) for one in read_json(path)]
    except TypeError as error:
        raise FormatError(f"{path}: damaged ({error}): move the folder {out / ROUNDS} elsewhere") from error
