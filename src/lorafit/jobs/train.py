"""The main job: a base and a file of examples go in; a tested adapter, its scores and a report come out."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, replace
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.formats import peft
from lorafit.adapters.formats.oddities import misread_by_peft
from lorafit.data.prepared import Prepared
from lorafit.data.reading import BUILTIN
from lorafit.errors import BaseError, DivergedError, FormatError
from lorafit.files import absolute, make_folder, write_json, write_text
from lorafit.jobs.ahead import TimeEstimate
from lorafit.jobs.extras import Extras
from lorafit.jobs.listener import Listener, Silent
from lorafit.jobs.looking_back import forgotten, sites_that_mattered, trim_trained, with_ladder
from lorafit.jobs.machine import keep_freed_memory, left_of, on_threads, peak_gb
from lorafit.jobs.peft_oracle import compare_with_peft
from lorafit.jobs.plan import disk_of
from lorafit.jobs.prepare import Opened, open_all, prepare_again
from lorafit.jobs.refine import BestAdapter, figures_of, history_of, refine, write_plan
from lorafit.jobs.run import Run
from lorafit.jobs.scoring import head_of, test_of
from lorafit.jobs.search import Order, carry_out, looked, search
from lorafit.jobs.tracked import Tracked, tracked
from lorafit.report.card import card
from lorafit.report.page import write_report
from lorafit.report.result import Result
from lorafit.report.words import doubt
from lorafit.routing import Features
from lorafit.runs.folder import (
    ADAPTER,
    ANSWERS,
    DATA,
    PLAN,
    REPORT,
    RUN,
    SCORES,
    SUMMARY,
    Environment,
    count_opening,
    open_run,
    read_run,
    remember_questions,
    require_disk,
    require_out,
    require_same,
    room_to_write,
    set_by,
    settings_written,
    sole_writer,
    versions,
)
from lorafit.runs.scores import answer_lines, scores_of
from lorafit.runs.summary import RunSummary
from lorafit.runs.tracking import require_tracker
from lorafit.settings import settings_from
from lorafit.training.processes import ALONE, Processes

START_OVER = "start again with another --out"  # where a run cannot be resumed
PROBED = 64  # tokens per row for the comparison with PEFT: the logits of long rows would take gigabytes


def run_training(
    base_name: str | Path | None,
    data: str | Path | None,
    out: str | Path,
    settings: Mapping[str, Any],
    *,
    resume: bool = False,
    listener: Listener | None = None,
    extra: Mapping[str, Any] | None = None,
    processes: Processes = ALONE,
    prepared: Prepared | None = None,
) -> dict[str, Any]:
    """The whole job into the run folder `out`; returns the summary that is also written there. It has more than six
    parameters; those that are set by name are optional.

    Args:
        base_name: The base; None for that of a resumed run.
        data: The examples: a file, a folder, or the built-in set; None for those of a resumed run.
        out: The run's folder: new or empty, or that of a run to resume.
        settings: Fields of TrainSettings that the user set; rules choose the rest.
        resume: Continue the run in `out`. Its settings and its environment, such as the number of threads, are read
            from run.json; a setting that contradicts run.json is refused.
        listener: Receives messages and progress.
        extra: Further entries for run.json.
        processes: The processes of the run, which all make the same call. Only the first writes and reports; the others
            return {}.
        prepared: The result of `prepare` for the data; None to read them here.
    """
    out = Path(out)
    if not processes.first:
        return _train_along(out, resume, processes)
    listener = listener or Silent()
    base_given, data_given = (None if given is None else str(given) for given in (base_name, data))
    base_name, data, resolved, began = open_run(out, base_given, data_given, settings, resume)
    keep_freed_memory()
    threads = began.threads if began else torch.get_num_threads()
    who = set_by({**(read_run(out) if resume else {}), **(extra or {})})
    with sole_writer(out), on_threads(threads, listener):
        require_out(out, resume)  # again: another process may have written there while this one waited
        try:
            require_tracker(resolved.report_to)
            prepared = prepare_again(out, data, resolved, listener, START_OVER) if resume else prepared
            opened = open_all(base_name, data, resolved, listener, began, processes.here, prepared, who)
            processes.require_work(opened.decision.recipe.batch_size)
        except BaseException:
            if not resume:
                with suppress(OSError):
                    out.rmdir()  # it was empty when this run took it
            raise
        make_folder(out)
        with room_to_write(out), tracked(resolved, opened, out, resume, listener) as tracking:
            require_disk(out, disk_of(opened.decision.plan, resolved.trim == "auto"))
            run = Run(opened, resolved, out, listener, resume, processes)
            summary = _run_from_plan(run, {"base": base_name, "data": data}, tracking, extra or {})
            tracking.scores(summary)
            return Result(summary, out)


def _train_along(out: Path, resume: bool, processes: Processes) -> dict[str, Any]:
    """The job of every process but the first. Before it begins, the first process has opened everything: only that one
    downloads or converts a base, measures, and reports what is wrong."""
    keep_freed_memory()
    base_name, data, settings, frozen = processes.agreed(dict)
    began, resolved = Environment(**frozen), settings_from(settings)
    with on_threads(began.threads, Silent()):
        prepared = prepare_again(out, data, resolved, Silent(), START_OVER)
        opened = open_all(base_name, data, resolved, Silent(), began, prepared=prepared)
        run = Run(opened, resolved, out, Silent(), resume, processes)
        while message := processes.agreed(dict):
            order = Order.from_json(message)
            try:
                carry_out(run, order)
            except DivergedError:  # for a trial of the search this is a result, and the first process has it too
                if not order.folder:
                    raise
    return {}


def _run_from_plan(run: Run, typed: Mapping[str, str], tracking: Tracked, extra: Mapping[str, Any]) -> RunSummary:
    """The job from the plan on, which writes into the run folder. typed: base and data as the user typed them."""
    before, extras = run.opened.base.integrity(), Extras(run.listener)
    _record(run, typed, extra)
    frozen, settings = asdict(run.opened.frozen), run.settings.model_dump(mode="json")
    run.processes.agreed(lambda: [typed["base"], typed["data"], settings, frozen])
    best, seconds = _trained(run, tracking, extras)
    summary = _scored(run, best, before, seconds, extras)
    return _checked(run, best, summary, extras)


def _record(run: Run, typed: Mapping[str, str], extra: Mapping[str, Any]) -> None:
    """Write what was asked for, and the report on the data. Raises RunError where a resumed run began with others."""
    opened, out, data = run.opened, run.out, typed["data"]
    if run.resume:
        require_same(out, _result_inputs(opened, run.processes, str(read_run(out).get("data_digest"))))
    else:
        asked = {
            "base": opened.base.address or opened.base.name,
            "data": data if data == BUILTIN else absolute(data),
            "typed": dict(typed),
            "settings": settings_written(run.settings),
        }
        write_json(out / RUN, {**asked, **_provenance(opened, run.processes), **extra})
    if not (out / DATA).exists():
        write_json(out / DATA, _about_data(opened))


def _trained(run: Run, tracking: Tracked, extras: Extras) -> tuple[BestAdapter, dict[str, float]]:
    """Search, train, trim and refine: the adapter that is shipped, and what took how many seconds. The other processes
    are released."""
    opened, settings, out, listener, processes = run.opened, run.settings, run.out, run.listener, run.processes
    began = time.monotonic()
    known, card_of_layers, forward = looked(opened, out, listener)
    estimates = TimeEstimate(opened, settings, out, forward, processes)
    if estimate := estimates.of_search(card_of_layers):
        listener.say(estimate)
    decision = search(run, known, card_of_layers)
    seconds = {"load": opened.seconds, "search": time.monotonic() - began}
    if not (out / PLAN).exists():
        write_plan(decision, out)
    listener.say(estimates.of_run(decision))
    several = f" on {processes.count} processes" if processes.count > 1 else ""
    listener.say(f"training{several}; Ctrl-C saves and stops")
    order = Order(decision.plan, decision.recipe, known=known)
    processes.agreed(order.to_json)
    trained = carry_out(run, order, tracking.moment)
    listener.say(f"trained: best validation at step {trained.best_step} of {decision.recipe.steps}")
    _write(out, trained.adapter)
    began = time.monotonic()
    ladder, adapter = trim_trained(run, trained, decision.recipe, extras)
    best = BestAdapter(adapter, with_ladder(decision, ladder, adapter), ladder, out, figures_of(trained))
    seconds |= {"train": trained.seconds, "trim": time.monotonic() - began}
    if settings.rounds:
        began = time.monotonic()
        best = refine(run, best, known, extras)
        seconds["rounds"] = time.monotonic() - began
    processes.agreed(dict)
    processes.leave()
    for path in out.glob("trunk-*.bin"):  # left by a trial of the search, and not used by the run
        path.unlink()
    _write(out, best.adapter)
    listener.say(f"adapter written to {out / ADAPTER}; read back, it is equal bit for bit. Scoring it now")
    return best, seconds


def _scored(run: Run, best: BestAdapter, before: str, seconds: Mapping[str, float], extras: Extras) -> RunSummary:
    """Score the adapter, and write scores, card and summary. before: the integrity of the base when it was opened."""
    opened, settings, out, listener, base = run.opened, run.settings, run.out, run.listener, run.opened.base
    began, adapter, decision = time.monotonic(), best.adapter, best.decision
    extras.get(
        "which sites mattered", lambda: sites_that_mattered(opened, decision.recipe, best.whole(), out, listener)
    )
    lost = extras.get("forgetting", lambda: forgotten(opened, adapter, out, listener))
    opens = count_opening(out)
    comparison = head_of(opened.runner).compare(test_of(opened, settings, listener.watch), adapter)
    remember_questions(out, [e.question for e in (*opened.examples.train, *opened.examples.valid)])
    seconds = {**seconds, "evaluate": time.monotonic() - began}
    summary = RunSummary(
        base=base.name,
        base_identity=base.identity,
        adapter_dir=str(out / ADAPTER),
        base_unchanged=base.integrity() == before,
        dtype=str(base.dtype).removeprefix("torch."),
        n_train=len(opened.examples.train),
        n_valid=len(opened.examples.valid),
        test_openings=opens,
        seconds={name: round(value, 2) for name, value in seconds.items()},
        forgetting=lost,
        rounds=tuple(asdict(done) for done in history_of(out)) if settings.rounds else None,
        misread_by_peft=misread_by_peft(base.model, adapter.plan.slots),
        **scores_of(comparison),
        **best.measured(),
    )
    routing = extras.get("what a router learns from", lambda: _routing(opened, settings.routing_questions, listener))
    _write(out, adapter, card(adapter, decision.choices, summary), _scores(summary), routing)
    write_text(out / SCORES / ANSWERS, answer_lines(opened.examples.test, comparison))
    summary = replace(summary, peak_rss_gb=peak_gb(), passed_over=dict(extras.passed_over))
    write_json(out / SUMMARY, summary.to_json())  # now, because PEFT's process takes as much memory again
    return summary


def _checked(run: Run, best: BestAdapter, summary: RunSummary, extras: Extras) -> RunSummary:
    """Ask PEFT for its logits, and write summary and report."""
    base, out, rows = run.opened.base, run.out, run.opened.rows["test"]
    began = time.monotonic()
    probes = [list(row.ids)[:PROBED] for row in rows[:: max(1, len(rows) // 8)][:8]]
    room = left_of(run.settings.memory, base)
    theirs = partial(compare_with_peft, out / ADAPTER, base, probes, run.listener.say, room)
    # If PEFT is known to misread such an adapter, the comparison would differ although the adapter is right: skip it.
    peft = None if summary.misread_by_peft else extras.get("comparison with PEFT", theirs)
    seconds = {**summary.seconds, "check": round(time.monotonic() - began, 2)}
    summary = replace(summary, peft=peft, passed_over=dict(extras.passed_over), seconds=seconds)
    if doubt(summary):
        text = card(best.adapter, best.decision.choices, summary)
        write_text(out / ADAPTER / "README.md", text)
    write_json(out / SUMMARY, summary.to_json())
    if extras.get("report", lambda: write_report([out], out / REPORT)) is None:
        summary = replace(summary, passed_over=dict(extras.passed_over))
        write_json(out / SUMMARY, summary.to_json())
    else:
        run.listener.say(f"report: {out / REPORT}")
    return summary


def _about_data(opened: Opened) -> dict[str, Any]:
    """The data report, and one example as the model sees it: pieces of text, each with whether it is trained."""
    skipped = [str(problem) for problem in opened.examples.skipped]
    return {**asdict(opened.report), "skipped": skipped, "example": opened.renderer.pieces(opened.rows["train"][0])}


def _result_inputs(opened: Opened, processes: Processes, began: str = "") -> dict[str, Any]:
    """What the results of a run depend on, besides its settings and the `frozen` part of run.json. began: the digest of
    the data that a resumed run began with, which may be in an older format."""
    return {
        "base_identity": opened.base.identity,
        "data_digest": began if opened.examples.has_digest(began) else opened.examples.digest(),
        "processes": processes.count,
    }


def _provenance(opened: Opened, processes: Processes) -> dict[str, Any]:
    return {
        **_result_inputs(opened, processes),
        "frozen": asdict(opened.frozen),
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {opened.base.device.type}",
        "versions": versions(),
    }


def _routing(opened: Opened, questions: int, listener: Listener) -> bytes | None:
    """Features of the training and validation questions, from which a router learns. None if they are not wanted, or if
    the base cannot give them, which is reported."""
    if not questions or opened.start.classes:
        return None
    examples = opened.examples
    try:
        features = Features.of(opened.base, examples.train, examples.valid, questions, listener.watch)
    except BaseError as error:
        listener.say(f"no features are stored for the router: {error}")
        return None
    return features.to_bytes() if features else None


def _scores(summary: RunSummary) -> dict[str, Any]:
    """The scores that are stored in the adapter folder."""
    kept = ("n_train", "n_valid", "n_test", "nll", "facts", "off_desk_declined", "natural_stops")
    return {"scores": {name: part for name, part in summary.to_json().items() if name in kept}}


def _write(
    out: Path, adapter: Adapter, text: str = "", scores: Mapping[str, Any] | None = None, routing: bytes | None = None
) -> None:
    """Write the adapter folder and read it back. Raises FormatError if the result is not the same value."""
    peft.write(adapter, out / ADAPTER, text, {**(scores or {}), "versions": versions()}, routing)
    if peft.read(out / ADAPTER) != adapter:
        raise FormatError(
            f"{out / ADAPTER}: what was read back differs from what was written: check the disk, and train again"
        )
