"""Prepares a job: the names of a base and of data go in; the open base, the rendered rows and the decision come out."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache, partial
from pathlib import Path
from types import MappingProxyType
from typing import Any

import torch

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.formats.oddities import misread_by_peft
from lorafit.attachment.checks import require_fired
from lorafit.attachment.pure import fresh
from lorafit.attachment.watching import fired
from lorafit.bases.base import DTYPES, Base, fastest_dtype, open_base, require_base
from lorafit.data.examples import Examples
from lorafit.data.languages import strange_language
from lorafit.data.prepared import DataListener, Prepared, prepare, sifted
from lorafit.data.render import Renderer, Row
from lorafit.data.report import DataReport
from lorafit.errors import DataError, Problem, RunError
from lorafit.evaluation.decoding import bytes_held
from lorafit.evaluation.forgetting import general_rows, general_text
from lorafit.files import read_json
from lorafit.heads import head_for, opened_with, why
from lorafit.heads.head import Head, RowMaker
from lorafit.jobs.listener import Listener
from lorafit.jobs.machine import Meter, room_of
from lorafit.planning import Choice, Decision, decide
from lorafit.planning.memory import Answering, Work, as_begun, fit, footprint, room_to_answer, steps_of, with_losses
from lorafit.runs.folder import DATA, Environment
from lorafit.settings import TrainSettings, require_meant
from lorafit.tasks.completion import COMPLETION
from lorafit.tasks.runner import Runner
from lorafit.tasks.task import PLAIN, ForwardMode
from lorafit.training.recipe import Recipe


@dataclass(frozen=True)
class Opened:
    """A base with data checked and rendered for it, and the decision how to train on them.

    start: the adapter before training. general: rows of general text, by source. peak: the estimated peak memory of
    the run in bytes; None for a resumed run."""

    base: Base
    examples: Examples
    report: DataReport
    renderer: RowMaker
    rows: dict[str, list[Row]]
    general: dict[str, list[Row]]
    decision: Decision
    frozen: Environment
    start: Adapter
    runner: Runner
    peak: int | None
    seconds: float


def open_all(
    base_name: str | Path,
    data: str | Path,
    settings: TrainSettings,
    listener: Listener,
    began: Environment | None = None,
    processes: int = 1,
    prepared: Prepared | None = None,
    set_by: str = "you",
) -> Opened:
    """Check the data, open the base, render, decide. Errors are raised before anything is written. It has more than six
    parameters; the last four are optional.

    Args:
        base_name: The base, as `open_base` takes it.
        data: A file, a folder, or `builtin`.
        settings: The run's settings.
        listener: Receives messages and progress.
        began: The environment of a run that is resumed; None to measure it on this machine now.
        processes: How many processes share this machine's memory.
        prepared: The result of `prepare` for the data; None to read them here.
        set_by: Who set the settings, for the reasons of the choices.
    """
    start = time.monotonic()
    base_name, data = str(base_name), str(data)
    head = head_for(settings.task, base_name)  # by the base alone, before the data are read
    require_meant(settings, head.idle, head.model)
    texts = dict(general_text(named) for named in dict.fromkeys((None, settings.general)))
    require_base(base_name, head.opening)
    examples, report = prepared or prepare(data, settings, listener)
    head = head_for(settings.task, base_name, examples)
    if reason := why(settings.task, base_name, examples):
        require_meant(settings, head.idle, head.model)
        require_base(base_name, head.opening)
        listener.say(f"task: {head.name}, because {reason} (--task names another)")
    writes = head.opening is None
    texts = texts if writes else {}
    labels = head.labels(examples)
    base = opened_base(base_name, settings, listener, began, opened_with(head, labels))
    now = began.now if began else datetime.now().isoformat(timespec="seconds")
    examples, renderer, rows = rendered(base, head, labels, examples, settings, listener, now)
    setup = head.setup(renderer, examples, settings, resumed=began is not None)
    task = setup.task
    plain = Runner(base, task, PLAIN)
    some = head.looked_at(rows["train"])
    seen = fired(base, lambda: plain.body(some))
    decision = decide(base, rows["train"], settings, seen, set_by)
    require_fired(decision.plan, seen)
    before = fresh(base, decision.plan, settings.seed, setup.rendering, setup.classes)
    mode = ForwardMode(began.apart, began.packed) if began else task.mode(base, rows["train"])
    runner = Runner(base, task, mode)
    if writes:
        decision = replace(decision, choices=(*decision.choices, _laying(mode)))
    if began is None:
        decision, peak = fitted(runner, before, rows, decision, settings, processes)
    else:
        decision, peak = as_begun(decision, began.micro_tokens, began.recompute), None
    listener.plan(decision.choices)
    if warning := misread_by_peft(base.model, decision.plan.slots):
        listener.say(warning)
    names = {dtype: name for name, dtype in DTYPES.items()}
    recipe = decision.recipe
    frozen = began or Environment(
        names[base.dtype],
        torch.get_num_threads(),
        runner.mode.separate_head,
        runner.mode.packed,
        recipe.micro_tokens,
        recipe.recompute,
        renderer.now if isinstance(renderer, Renderer) else None,
    )
    general = {name: general_rows(base.tokenizer, text, base.context, base.vocabulary) for name, text in texts.items()}
    return Opened(
        base,
        examples,
        report,
        renderer,
        rows,
        general,
        decision,
        frozen,
        before,
        runner,
        peak,
        time.monotonic() - start,
    )


def require_same_classes(run: Path, adapter: Adapter, opened: Opened) -> None:
    """Raise RunError if the labels of a run's adapter, or their weights, are not those with which it is opened now."""
    if adapter.classes != opened.start.classes:
        raise RunError(
            f"{run}: another version of lorafit trained this classifier, which weighted its labels in another way, so "
            "validation before and after cannot be compared: train again with another --out"
        )


def prepare_again(run: Path, data: str, settings: TrainSettings, listener: DataListener, otherwise: str) -> Prepared:
    """The data of a run as it read them when it began: the fields that it ignored then are ignored again.

    Raises RunError if they cannot be read in this way. No flag would help then; `otherwise` says what does.
    """
    known = read_json(run / DATA) if (run / DATA).exists() else {}
    try:
        return prepare(data, settings, listener, known.get("passed_over", ()))
    except DataError as error:
        first, *more = error.problems
        raise RunError(
            f"{run}: its data cannot be read as they were when it began ({first.where}: {first.what}"
            f"{f', and {len(more)} problems more' * bool(more)}): restore them, or {otherwise}"
        ) from error


def fitted(
    runner: Runner,
    start: Adapter,
    rows: dict[str, list[Row]],
    decision: Decision,
    settings: TrainSettings,
    processes: int = 1,
) -> tuple[Decision, int]:
    """The decision with the size of a micro-batch that fits into memory, and the estimated peak in bytes: see `fit`.

    Args:
        runner: The base, with nothing attached, and how it is run.
        start: An adapter of the decision's plan.
        rows: The rows of every split.
        decision: How to train; its choices about memory are made again.
        settings: The run's settings.
        processes: How many processes share this machine's memory.

    Raises:
        SettingsError: Even the smallest micro-batch needs more memory than the settings allow.
    """
    recipe = replace(decision.recipe, micro_tokens=Recipe.micro_tokens, recompute=Recipe.recompute)
    decision, train, base = replace(decision, recipe=recipe), rows["train"], runner.base
    plain = footprint(runner, start, train, settings.dropout)
    look = cache(lambda twice: with_losses(plain, replace(runner, recompute=twice), start, train, Meter(base)))
    steps = steps_of(train, recipe, runner.free_blocks(decision.plan) > 0, runner.mode.packed)
    answering: Answering = lambda left: 0  # noqa: E731 (a classifier decodes nothing)
    if runner.task is COMPLETION:
        answering = partial(bytes_held, base, room_to_answer(base, rows, settings.few_shot))
    work = Work(runner, rows, steps)
    return fit(decision, work, look, answering, room_of(base, processes), settings.memory)


def _laying(mode: ForwardMode) -> Choice:
    """The choice that says how rows are put into a batch."""
    if mode.packed:
        return Choice(
            "rows",
            "packed one after another",
            "tested on this base: packed rows give the same results as single rows, and no time goes into padding",
            "",
        )
    return Choice(
        "rows",
        "padded to one width",
        "tested on this base: packed one after another, rows would not give the same results as single rows",
        "",
    )


def opened_base(
    name: str,
    settings: TrainSettings,
    listener: Listener,
    began: Environment | None = None,
    head: Mapping[str, Any] = MappingProxyType({}),
) -> Base:
    """The base in the dtype of the resumed run or of the settings, or in the faster one. The dtype is reported, because
    the scores depend on it. head: the arguments of `open_base` for a head; empty for a language model."""
    if began:
        dtype, why = DTYPES[began.dtype], " (as the run began)"
    elif settings.dtype == "auto":
        dtype, why = fastest_dtype(), " (the faster here, measured)"
    else:
        dtype, why = DTYPES[settings.dtype], ""
    base = open_base(name, dtype, listener.say, listener.watch, **head)
    listener.say(f"base {base.name}, {str(dtype).removeprefix('torch.')}{why}")
    return base


def rendered(
    base: Base,
    head: Head,
    labels: Sequence[str],
    examples: Examples,
    settings: TrainSettings,
    listener: Listener,
    now: str | None = None,
) -> tuple[Examples, RowMaker, dict[str, list[Row]]]:
    """The examples that this base can use, with their renderer and their rows; the first row is shown. It has more than
    six parameters, for all that rows depend on.

    Args:
        base: The base.
        head: The task.
        labels: The names of the head's outputs.
        examples: The examples of all splits.
        settings: The run's settings.
        listener: Receives messages.
        now: The time for a chat template; None for the present.
    """
    renderer = head.renderer(base, labels, examples, settings, now, listener.say)
    rows: dict[str, list[Row]] = {}
    examples = sifted(
        examples, lambda e: rows.update(render_all(head, renderer, e, settings.max_length)), settings.skip_bad, listener
    )
    listener.example(rows["train"][0], renderer)
    writes = head.opening is None
    if writes and (warning := strange_language(base.tokenizer, examples.train, "\n".join(general_text()[1]))):
        listener.say(warning)
    return examples, renderer, rows


def render_all(head: Head, renderer: RowMaker, examples: Examples, max_length: int) -> dict[str, list[Row]]:
    """The rows of every split. Raises DataError that names every example that cannot be rendered."""
    rows: dict[str, list[Row]] = {}
    problems: list[Problem] = []
    for name, split in examples.by_name().items():
        try:
            rows[name] = head.rows(renderer, split, max_length)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return rows
