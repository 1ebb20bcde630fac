"""`lorafit refine` and --rounds: each round makes one change, trains again, and is kept only if validation improves."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.formats import peft
from lorafit.adapters.plan import Plan
from lorafit.attachment.adapters import attach
from lorafit.data.split import FEWEST, groups_of
from lorafit.errors import DivergedError, FormatError, Interrupted, RunError, SettingsError
from lorafit.files import make_folder, read_json, shown, whole_folder, write_json, write_text
from lorafit.jobs.extras import Extras
from lorafit.jobs.listener import Listener, Silent
from lorafit.jobs.looking_back import trim_trained, with_ladder
from lorafit.jobs.machine import keep_freed_memory, on_threads, room_of
from lorafit.jobs.plan import disk_of
from lorafit.jobs.prepare import Opened, fitted, open_all, prepare_again, require_same_classes
from lorafit.jobs.run import Run
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
    set_by,
    sole_writer,
    versions,
)
from lorafit.runs.summary import RunSummary
from lorafit.settings import settings_from
from lorafit.training.loop import RESUME_HINT, Trained
from lorafit.training.recipe import Recipe


@dataclass(frozen=True)
class BestAdapter:
    """The best adapter so far.

    Args:
        adapter: The adapter as it is shipped.
        decision: The decision by which it was trained.
        ladder: Its ladder.
        folder: The folder with its curves.
        figures: The numbers of its training, see `figures_of`.
    """

    adapter: Adapter
    decision: Decision
    ladder: Ladder
    folder: Path
    figures: Mapping[str, Any]

    def whole(self) -> Adapter:
        """The adapter as it was trained, before trimming."""
        kept = self.folder / LADDER / WHOLE
        return peft.read(kept) if kept.exists() else self.adapter

    def measured(self) -> dict[str, Any]:
        """The parts of a `RunSummary` that come from its training."""
        figures = {name: value for name, value in self.figures.items() if name != "each"}
        return {**figures, "parameters": self.adapter.plan.parameters, "ladder": asdict(self.ladder)}


def figures_of(trained: Trained) -> dict[str, Any]:
    """The numbers of a training by their names in a summary; `each` is the NLL of every validation example under the
    untrimmed adapter."""
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
    """Write plan.json: the plan, the recipe, and the reasons."""
    write_json(
        folder / PLAN,
        {
            **decision.plan.to_json(),
            "recipe": asdict(decision.recipe),
            "choices": [asdict(choice) for choice in decision.choices],
        },
    )


def _read_plan(folder: Path) -> Decision:
    content = read_json(folder / PLAN)
    choices = tuple(Choice(**choice) for choice in content["choices"])
    return Decision(Plan.from_json(content, str(folder / PLAN)), Recipe(**content["recipe"]), choices)


def run_refining(folder: str | Path, listener: Listener | None = None) -> dict[str, Any]:
    """Do one more round for the finished run in `folder`, or resume one that was stopped; returns the round's result.

    A better adapter replaces the run's; the first one is kept below rounds/0. Only validation is used, the test is not
    opened. Raises RunError for a run that is not finished, or whose base or data have changed.
    """
    folder, listener = Path(folder), listener or Silent()
    require_run(folder)
    keep_freed_memory()
    with sole_writer(folder), room_to_write(folder):
        return _refined(folder, listener)


def _refined(folder: Path, listener: Listener) -> dict[str, Any]:
    """`run_refining` in a folder to which no other process writes."""
    asked, summary = read_finished(folder)
    settings, frozen = settings_from(asked["settings"]), frozen_of(folder, asked)
    with on_threads(frozen.threads, listener):
        prepared = prepare_again(folder, asked["data"], settings, listener, "train again")
        opened = open_all(
            asked["base"], asked["data"], settings, listener, frozen, prepared=prepared, set_by=set_by(asked)
        )
        if opened.base.identity != asked["base_identity"] or not opened.examples.has_digest(asked["data_digest"]):
            raise RunError(
                f"{folder}: its base or its data have changed since it was trained, or an earlier version "
                "of lorafit held other examples out: restore them, or train again"
            )
        best = _installed(folder, summary)  # a round may have been killed before it did this
        require_same_classes(folder, best.adapter, opened)
        known = tuple(read_json(folder / SEARCH / CARD)["known"])
        try:
            run = Run(opened, settings, folder, listener, resume=True)
            _, done = one_round(run, best, history_of(folder), known)
        except Interrupted as error:
            raise Interrupted(str(error).replace(RESUME_HINT, "repeat the command to continue")) from None
        _installed(folder, summary)
        write_report([folder], folder / REPORT)
        if isinstance(done, str):
            return {
                "number": None,
                "accepted": False,
                "verdict": f"nothing is left to try: {done}",
                "adapter_dir": str(folder / ADAPTER),
            }
    return {**asdict(done), "adapter_dir": str(folder / ADAPTER)}


def _installed(folder: Path, summary: RunSummary) -> BestAdapter:
    """Make the run's adapter, ladder and summary those of the last accepted round, and return this best adapter.

    Everything is derived from the files of the rounds, so it may be called again: if a process was killed between the
    history of the rounds and the summary, the next call completes its work.

    Args:
        folder: A finished run.
        summary: The summary of its first training; its scores are kept, because the test is not opened again.
    """
    last = accepted_round(folder)
    if not last:
        figures = {name: getattr(summary, name) for name in ("best_step", "steps", "validation")}
        best = BestAdapter(peft.read(folder / ADAPTER), _read_plan(folder), _ladder(folder), folder, figures)
        now = replace(summary, rounds=_rounds(folder) or summary.rounds)
    else:
        best = _read_best(folder / ROUNDS / str(last))
        replaced = peft.read(folder / ADAPTER) != best.adapter
        first = folder / ROUNDS / "0" / ADAPTER
        if replaced and not first.exists():
            with whole_folder(first) as building:
                shutil.copytree(folder / ADAPTER, building, dirs_exist_ok=True)
        now = replace(summary, **best.measured(), scores_of_round=_replaced_by(folder), rounds=_rounds(folder))
        text = card(best.adapter, best.decision.choices, now)
        if replaced:
            extra = {"versions": versions(), "round": last}
            peft.write(best.adapter, folder / ADAPTER, text, extra, peft.routing_of(folder / ADAPTER))
        elif now.to_json() != summary.to_json():
            write_text(folder / ADAPTER / "README.md", text)
        _take_ladder(best, folder)
    if now.to_json() != summary.to_json():
        write_json(folder / SUMMARY, now.to_json())
    return best


def _replaced_by(folder: Path) -> int | None:
    """The accepted round whose adapter replaced the tested one; None if the tested adapter is still the run's. `train`
    tests the adapter of its last accepted round, `refine` tests none."""
    first = folder / ROUNDS / "0" / ADAPTER
    tested = peft.read(first if first.exists() else folder / ADAPTER)
    accepted = [done.number for done in history_of(folder) if done.accepted]
    own = [number for number in accepted if peft.read(folder / ROUNDS / str(number) / ADAPTER) == tested]
    return next((number for number in accepted if number > max(own, default=0)), None)


def _rounds(folder: Path) -> tuple[dict[str, Any], ...]:
    """The rounds of a run, as they are in its summary."""
    return tuple(asdict(done) for done in history_of(folder))


def _take_ladder(best: BestAdapter, out: Path) -> None:
    """Copy the ladder of the best adapter into the run's folder. If it has none, remove the one that is there."""
    if best.folder == out:
        return
    if (best.folder / LADDER).exists():
        with whole_folder(out / LADDER) as building:
            shutil.copytree(best.folder / LADDER, building, dirs_exist_ok=True)
    elif (out / LADDER).exists():
        shutil.rmtree(out / LADDER)


def refine(run: Run, best: BestAdapter, known: tuple[float, ...], extras: Extras) -> BestAdapter:
    """Do up to settings.rounds rounds before the test is opened, and return the best adapter. Rounds that were done
    before a stop are read from the files. A round that fails is the last one, and changes nothing."""
    out, processes = run.out, run.processes
    history = history_of(out)
    if last := accepted_round(out):
        best = _read_best(out / ROUNDS / str(last))
    while len(history) < run.settings.rounds:
        tried = partial(one_round, run, best, history, known)
        # With several processes an error must end the run: the others are in the middle of the round and would wait.
        result = tried() if processes.count > 1 else extras.get(f"round {len(history) + 1}", tried)
        if result is None:
            break
        new, done = result
        if isinstance(done, str):
            extras.listener.say(f"no further round: {done}")
            break
        best = new or best
        history = [*history, done]
    _take_ladder(best, out)
    return best


def one_round(
    run: Run, best: BestAdapter, history: Sequence[Round], known: tuple[float, ...]
) -> tuple[BestAdapter | None, Round | str]:
    """Try the change that the rules suggest, and judge it. A round enters the history after its adapter is on disk.

    Args:
        run: The run.
        best: The best adapter so far.
        history: The rounds so far.
        known: The base's NLL of every validation example.

    Returns:
        The new best adapter, None if it has not changed; and the round, or the reason why there is none.
    """
    opened, out, listener = run.opened, run.out, run.listener
    groups = [example.group for example in opened.examples.valid]
    if (n := len(set(groups_of(groups)))) < FEWEST:
        return None, f"{n} independent validation examples are too few: at least {FEWEST} are needed"
    since = max((earlier.number for earlier in history if earlier.accepted), default=0)
    refused = {earlier.kind for earlier in history if earlier.number > since}
    lines = lines_of(best.folder / METRICS)
    recipe = best.decision.recipe
    evidence = Evidence(
        recipe.steps,
        [(line["step"], line["valid_nll"]) for line in lines if "valid_nll" in line and line["step"] != recipe.early],
        [(line["step"], line["train_nll"]) for line in lines if "train_nll" in line],
        best.ladder,
    )
    change = next_change(evidence, max(slot.rank for slot in best.decision.plan.slots), refused)
    if isinstance(change, str):
        return None, change
    number = len(history) + 1
    folder = out / ROUNDS / str(number)
    if (folder / PLAN).exists():  # the round was stopped: it is resumed with its plan
        decision = _read_plan(folder)
    else:
        fits = _fitting(run, changed(best.decision, change), folder)
        if isinstance(fits, str):
            return None, f"{change.kind} would be next, for {change.reason}, and is left out: {fits}"
        decision = fits
    listener.say(f"round {number}: {change.kind}, for {change.reason}")
    make_folder(folder)
    write_plan(decision, folder)
    order = Order(decision.plan, decision.recipe, f"{ROUNDS}/{number}", known=known)
    run.processes.agreed(order.to_json)
    rank = max(slot.rank for slot in decision.plan.slots)
    before = scored(opened, best.adapter, listener)
    new = None
    try:
        trained = carry_out(run, order)
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
        ladder, adapter = trim_trained(replace(run, out=folder), trained, decision.recipe, Extras(listener))
        after = trained.each if adapter is trained.adapter else scored(opened, adapter, listener)
        done = judged(number, change, rank, before, after, groups)
        if done.accepted:
            decision = with_ladder(decision, ladder, adapter)
            new = BestAdapter(adapter, decision, ladder, folder, figures_of(trained))
            write_plan(decision, folder)
            write_json(folder / FIGURES, new.figures)
            peft.write(adapter, folder / ADAPTER, extra={"round": asdict(done)})
    write_json(out / ROUNDS / HISTORY, [asdict(entry) for entry in (*history, done)])
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)
    listener.say(f"round {number}: {done.verdict}")
    return new, done


def _fitting(run: Run, decision: Decision, folder: Path) -> Decision | str:
    """The decision of a round with a micro-batch that fits into the run's memory, or a message why it does not fit. It
    raises nothing, so that the run is not lost."""
    opened, settings, here = run.opened, run.settings, run.processes.here
    try:
        require_disk(folder, disk_of(decision.plan, settings.trim == "auto"))
        start = start_of(opened, decision.plan)
        decision, peak = fitted(opened.runner, start, opened.rows, decision, settings, here)
    except (RunError, SettingsError) as error:
        return str(error)
    room = room_of(opened.base, here)
    if settings.memory is None and room.free is not None and peak > room.held + room.free:
        return f"it would take about {shown(peak - room.held)} more memory, and {shown(room.free)} are free here"
    return decision


def scored(opened: Opened, adapter: Adapter, listener: Listener) -> list[float]:
    """The NLL of every validation example under an adapter."""
    with attach(opened.base, adapter):
        return opened.runner.nll(opened.rows["valid"], partial(listener.watch, "best adapter so far"))


def _read_best(folder: Path) -> BestAdapter:
    """The result of an accepted round, read from its folder."""
    return BestAdapter(
        peft.read(folder / ADAPTER), _read_plan(folder), _ladder(folder), folder, read_json(folder / FIGURES)
    )


def _ladder(folder: Path) -> Ladder:
    path = folder / LADDER / RUNGS
    if not path.exists():
        return Ladder(0.0, 0.0, (), 1.0, "not trimmed")
    content = read_json(path)
    try:
        return Ladder(**{**content, "rungs": tuple(Rung(**rung) for rung in content["rungs"])})
    except (TypeError, KeyError) as error:
        raise FormatError(f"{path}: damaged ({error}): remove it; rounds then do not propose another rank") from error


def history_of(out: Path) -> list[Round]:
    """The rounds of a run so far. Raises FormatError for a damaged history."""
    path = out / ROUNDS / HISTORY
    if not path.exists():
        return []
    try:
        return [Round(**entry) for entry in read_json(path)]
    except TypeError as error:
        raise FormatError(f"{path}: damaged ({error}): move the folder {out / ROUNDS} elsewhere") from error
