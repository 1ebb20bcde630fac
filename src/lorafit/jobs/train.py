"""The main job: check → plan → train → evaluate → write, from a file of examples to a proven adapter."""

from __future__ import annotations

import os
import platform
import time
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict
from datetime import UTC, datetime
from functools import partial
from pathlib import Path
from typing import Any

import torch

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.formats import peft
from lorafit.adapters.formats.oddities import misread_by_peft
from lorafit.data.reading import BUILTIN
from lorafit.errors import BaseError, DivergedError, FormatError
from lorafit.evaluation.compare import Comparison, compare
from lorafit.files import absolute, make_folder, write_json, write_text
from lorafit.jobs.ahead import Ahead
from lorafit.jobs.extras import Extras
from lorafit.jobs.listener import Listener, Silent
from lorafit.jobs.looking_back import forgotten, sites_that_mattered, told_ladder, trim_trained
from lorafit.jobs.machine import keep_freed_memory, left_of, on_threads, peak_gb
from lorafit.jobs.peft_oracle import compare_with_peft
from lorafit.jobs.plan import disk_of
from lorafit.jobs.prepare import Opened, open_all
from lorafit.jobs.refine import Standing, figures_of, history_of, refine, write_plan
from lorafit.jobs.search import Order, carry_out, looked, search
from lorafit.jobs.tracked import Tracked, tracked
from lorafit.prepared import Prepared
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
    settings_written,
    sole_writer,
    versions,
)
from lorafit.runs.scores import answer_lines, scores_json
from lorafit.runs.tracking import require_tracker
from lorafit.settings import TrainSettings, settings_from
from lorafit.training.processes import ALONE, Processes

PROBED = 64  # tokens of a row on which PEFT's logits are compared: those of long rows would take gigabytes


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
    """The whole job into the run folder `out`; returns the summary that is also written there.

    settings: fields of TrainSettings that are set; the rest is left to the rules. With `resume` those the run began
    with are used again, and one that contradicts them is refused; base and data may be None; what it found out about
    its machine is taken from run.json, its number of threads too. extra: goes into run.json.
    prepared: what `prepare` made of the data, which are read here where it is not given.
    processes: called alike in each of them; the first alone speaks and writes, the others return {} after training.
    """
    out = Path(out)
    if not processes.first:
        return _train_along(out, resume, processes)
    listener = listener or Silent()
    named, given = (None if one is None else str(one) for one in (base_name, data))
    base_name, data, resolved, began = open_run(out, named, given, settings, resume)
    keep_freed_memory()
    threads = began.threads if began else torch.get_num_threads()
    with sole_writer(out), on_threads(threads, listener):
        require_out(out, resume)  # again, for another may have been at work there until now
        try:
            require_tracker(resolved.report_to)
            opened = open_all(base_name, data, resolved, listener, began, processes.here, prepared)
            processes.require_work(opened.decision.recipe.batch_size)
        except BaseException:
            if not resume:
                with suppress(OSError):
                    out.rmdir()  # it was empty when this run took it
            raise
        make_folder(out)
        with room_to_write(out), tracked(resolved, opened, out, resume, listener) as followed:
            require_disk(out, disk_of(opened.decision.plan, resolved.trim == "auto"))
            summary = _run(base_name, data, out, resolved, opened, resume, listener, followed, extra or {}, processes)
            followed.scores(summary)
            return summary


def _train_along(out: Path, resume: bool, processes: Processes) -> dict[str, Any]:
    """What the other processes do. The first has opened everything before they begin: it alone fetches or converts a
    base, measures, and says what is wrong."""
    keep_freed_memory()
    base_name, data, settings, frozen = processes.agreed(dict)
    began, resolved = Environment(**frozen), settings_from(settings)
    with on_threads(began.threads, Silent()):
        opened = open_all(base_name, data, resolved, Silent(), began)
        while told := processes.agreed(dict):
            order = Order.from_json(told)
            try:
                carry_out(opened, order, out, resume, resolved.trunk_bytes, processes)
            except DivergedError:  # of an arm it is an answer, which the first has too
                if not order.folder:
                    raise
    return {}


def _run(
    base_name: str,
    data: str,
    out: Path,
    resolved: TrainSettings,
    opened: Opened,
    resume: bool,
    listener: Listener,
    followed: Tracked,
    extra: Mapping[str, Any],
    processes: Processes,
) -> dict[str, Any]:
    """From the plan on: everything here writes into the run folder."""
    base, rows = opened.base, opened.rows
    before = base.integrity()
    asked = {
        "base": base.address or base.name,
        "data": data if data == BUILTIN else absolute(data),
        "typed": {"base": base_name, "data": data},
        "settings": settings_written(resolved),
    }
    if resume:
        require_same(out, _decides(opened, processes, str(read_run(out).get("data_digest"))))
    else:
        write_json(out / RUN, {**asked, **_provenance(opened, processes), **extra})
    if not (out / DATA).exists():
        write_json(out / DATA, _about_data(opened))
    processes.agreed(lambda: [base_name, data, resolved.model_dump(mode="json"), asdict(opened.frozen)])
    began = time.monotonic()
    known, card_of_layers, forward = looked(opened, out, listener)
    ahead = Ahead(opened, resolved, out, forward, processes)
    if said := ahead.of_search(card_of_layers):
        listener.say(said)
    decision = search(opened, resolved, known, card_of_layers, out, resume, processes, listener)
    seconds = {"load": opened.seconds, "search": time.monotonic() - began}
    if not (out / PLAN).exists():
        write_plan(decision, out)
    listener.say(ahead.of_run(decision))
    several = f" on {processes.count} processes" if processes.count > 1 else ""
    listener.say(f"training{several}; Ctrl-C saves and stops")
    order = Order(decision.plan, decision.recipe, known=known)
    processes.agreed(order.to_json)
    trained = carry_out(opened, order, out, resume, resolved.trunk_bytes, processes, listener, followed.moment)
    listener.say(f"trained: best validation at step {trained.best_step} of {decision.recipe.steps}")
    _write(out, trained.adapter)
    began, extras = time.monotonic(), Extras(listener)
    ladder, adapter = trim_trained(opened, trained, decision.recipe, resolved, out, extras)
    standing = Standing(adapter, told_ladder(decision, ladder, adapter), ladder, out, figures_of(trained))
    seconds |= {"train": trained.seconds, "trim": time.monotonic() - began}
    if resolved.rounds:
        began = time.monotonic()
        standing = refine(opened, standing, out, resolved, known, resume, extras, processes)
        seconds["rounds"] = time.monotonic() - began
    processes.agreed(dict)
    processes.leave()
    for path in out.glob("trunk-*.bin"):  # of an arm that the run itself did not read
        path.unlink()
    began = time.monotonic()
    adapter, decision = standing.adapter, standing.decision
    _write(out, adapter)
    listener.say(f"adapter written to {out / ADAPTER} and read back: equal bit for bit; now it is scored")
    extras.get(
        "which sites mattered", lambda: sites_that_mattered(opened, decision.recipe, standing.whole(), out, listener)
    )
    lost = extras.get("forgetting", lambda: forgotten(opened, adapter, out, listener))
    beside: dict[str, Any] = {"forgetting": lost} if lost else {}
    if resolved.rounds:
        beside["rounds"] = [asdict(one) for one in history_of(out)]
    opens = count_opening(out)
    comparison = compare(
        base,
        adapter,
        opened.renderer,
        opened.examples.test,
        rows["test"],
        shots_from=opened.examples.train,
        shots=resolved.few_shot,
        known=opened.examples.train,
        watch=listener.watch,
        memory=left_of(resolved.memory, base),
        way=opened.way,
    )
    remember_questions(out, [e.question for e in (*opened.examples.train, *opened.examples.valid)])
    unchanged = base.integrity() == before
    seconds["evaluate"] = time.monotonic() - began
    summary = {**_summary(opened, standing, comparison, out, seconds, opens), **beside, "base_unchanged": unchanged}
    # PEFT would compute something else, which says nothing against the adapter: it is not asked.
    summary["misread_by_peft"] = misread_by_peft(base.model, [slot.site.path for slot in adapter.plan.slots])
    routing = extras.get("what a router learns from", lambda: _routing(opened, resolved.routing_questions, listener))
    _write(out, adapter, card(adapter, decision.choices, summary), _scores(summary), routing)
    write_text(out / SCORES / ANSWERS, answer_lines(opened.examples.test, comparison))
    summary |= {"peak_rss_gb": peak_gb(), "passed_over": extras.passed_over}
    write_json(out / SUMMARY, summary)  # before a process is started that takes as much memory again
    checking = time.monotonic()
    probes = [list(row.ids)[:PROBED] for row in rows["test"][:: max(1, len(rows["test"]) // 8)][:8]]
    room = left_of(resolved.memory, base)
    theirs = partial(compare_with_peft, out / ADAPTER, base, probes, listener.say, room)
    summary["peft"] = None if summary["misread_by_peft"] else extras.get("PEFT's own reading", theirs)
    if doubt(summary):
        write_text(out / ADAPTER / "README.md", card(adapter, decision.choices, summary))
    summary["seconds"]["check"] = round(time.monotonic() - checking, 2)
    write_json(out / SUMMARY, summary)
    if extras.get("report", lambda: write_report([out], out / REPORT)) is None:
        write_json(out / SUMMARY, summary)  # with what was passed over
    else:
        listener.say(f"report: {out / REPORT}")
    return Result(summary, out)


def _about_data(opened: Opened) -> dict[str, Any]:
    """The data report, and one example as the model sees it: pieces of text, each with whether it is trained."""
    skipped = [str(problem) for problem in opened.examples.skipped]
    return {**asdict(opened.report), "skipped": skipped, "example": opened.renderer.pieces(opened.rows["train"][0])}


def _decides(opened: Opened, processes: Processes, began: str = "") -> dict[str, Any]:
    """What decides the results of a run beside its settings and what it has frozen. began: the digest of the data of
    the run that is resumed, which may be in an older format."""
    return {
        "base_identity": opened.base.identity,
        "data_digest": began if opened.examples.has_digest(began) else opened.examples.digest(),
        "processes": processes.count,
    }


def _provenance(opened: Opened, processes: Processes) -> dict[str, Any]:
    return {
        **_decides(opened, processes),
        "frozen": asdict(opened.frozen),
        "began": datetime.now(UTC).isoformat(timespec="seconds"),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {opened.base.device.type}",
        "versions": versions(),
    }


def _summary(
    opened: Opened, standing: Standing, comparison: Comparison, out: Path, seconds: dict[str, float], opens: int
) -> dict[str, Any]:
    examples = opened.examples
    return {
        "base": opened.base.name,
        "base_identity": opened.base.identity,
        "adapter_dir": str(out / ADAPTER),
        "n_train": len(examples.train),
        "n_valid": len(examples.valid),
        **scores_json(comparison),
        "test_openings": opens,
        **standing.told(),
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "dtype": str(opened.base.dtype).removeprefix("torch."),
    }


def _routing(opened: Opened, questions: int, listener: Listener) -> bytes | None:
    """What a router learns from, of the examples that were trained and validated on; nothing where the base cannot
    tell, which is said."""
    if not questions:
        return None
    examples = opened.examples
    try:
        found = Features.of(opened.base, examples.train, examples.valid, questions, listener.watch)
    except BaseError as error:
        listener.say(f"no questions are kept for a router: {error}")
        return None
    return found.to_bytes() if found else None


def _scores(summary: Mapping[str, Any]) -> dict[str, Any]:
    """What the adapter folder says of how it was scored."""
    kept = ("n_train", "n_valid", "n_test", "nll", "facts", "off_desk_declined", "natural_stops")
    return {"scores": {key: summary[key] for key in kept}}


def _write(
    out: Path, adapter: Adapter, text: str = "", scores: Mapping[str, Any] | None = None, routing: bytes | None = None
) -> None:
    """The adapter folder; what was written is read back and must be the same value."""
    peft.write(adapter, out / ADAPTER, text, {**(scores or {}), "versions": versions()}, routing)
    if peft.read(out / ADAPTER) != adapter:
        raise FormatError(
            f"{out / ADAPTER}: what was read back differs from what was written: check the disk, and train again"
        )
