"""From what was named to what is ready: data checked, base opened, examples rendered, the way to train decided."""

from __future__ import annotations

import time
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache, partial
from pathlib import Path

import torch

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.formats.oddities import misread_by_peft
from lorafit.attachment.blocks import free_blocks
from lorafit.attachment.checks import require_fired
from lorafit.attachment.pure import fresh
from lorafit.attachment.watching import fired
from lorafit.bases.base import DTYPES, Base, fastest_dtype, open_base, require_base
from lorafit.data.examples import Examples, asks_once
from lorafit.data.languages import strange_language
from lorafit.data.render import Renderer, Row, render, renderer_for
from lorafit.data.report import DataReport
from lorafit.errors import DataError, Problem
from lorafit.evaluation.decoding import bytes_held
from lorafit.evaluation.forgetting import general_rows, general_text
from lorafit.jobs.listener import Listener
from lorafit.jobs.machine import Meter, room_of
from lorafit.planning import Choice, Decision, decide
from lorafit.planning.memory import as_begun, fit, footprint, room_to_answer, steps_of, with_losses
from lorafit.prepared import Prepared, prepare, sifted
from lorafit.runs.folder import Environment
from lorafit.settings import TrainSettings
from lorafit.tasks.completion import PLAIN, Way, batch_of, token_nll
from lorafit.tasks.probe import beginnings, way_of
from lorafit.training.recipe import Recipe


@dataclass(frozen=True)
class Opened:
    """A base with data checked and rendered for it, and the decision how to train on them.

    start: the adapter before training. general: rows of general text, by source. peak: bytes that the
    run holds at most, estimated; None for a run that is gone on with."""

    base: Base
    examples: Examples
    report: DataReport
    renderer: Renderer
    rows: dict[str, list[Row]]
    general: dict[str, list[Row]]
    decision: Decision
    frozen: Environment
    start: Adapter
    way: Way
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
) -> Opened:
    """Check the data, open the base, render, decide. Whatever is wrong is raised before anything is written.

    began: what a run has frozen that is gone on with. What depends on this machine and this moment is found out here,
    if `began` does not say it, and goes into Environment. processes: how many share its memory. prepared: what
    `prepare` made of the data, which are read here where it is not given.
    """
    start = time.monotonic()
    base_name, data = str(base_name), str(data)
    texts = dict(general_text(named) for named in dict.fromkeys((None, settings.general)))
    require_base(base_name)
    examples, report = prepared or prepare(data, settings, listener)
    base = opened_base(base_name, settings, listener, began)
    now = began.now if began else datetime.now().isoformat(timespec="seconds")
    examples, renderer, rows = rendered(base, examples, settings, listener, now)
    probe = batch_of(base, beginnings(rows["train"]), PLAIN)
    seen = fired(base, lambda: token_nll(base, probe, PLAIN))
    decision = decide(base, rows["train"], settings, seen)
    require_fired(decision.plan, seen)
    rendering = replace(renderer.rendering, single=asks_once(examples.train))
    before = fresh(base, decision.plan, settings.seed, rendering)
    way = Way(began.apart, began.packed) if began else way_of(base, rows["train"])
    decision = replace(decision, choices=(*decision.choices, _laying(way)))
    if began is None:
        decision, peak = fitted(base, before, rows, decision, settings, way, processes)
    else:
        decision, peak = as_begun(decision, began.micro_tokens, began.recompute), None
    listener.plan(decision.choices)
    if said := misread_by_peft(base.model, [slot.site.path for slot in decision.plan.slots]):
        listener.say(said)
    names = {dtype: name for name, dtype in DTYPES.items()}
    recipe = decision.recipe
    frozen = began or Environment(
        names[base.dtype],
        torch.get_num_threads(),
        way.apart,
        way.packed,
        recipe.micro_tokens,
        recipe.recompute,
        renderer.now,
    )
    general = {name: general_rows(base.tokenizer, text, base.context, base.vocabulary) for name, text in texts.items()}
    return Opened(
        base, examples, report, renderer, rows, general, decision, frozen, before, way, peak, time.monotonic() - start
    )


def fitted(
    base: Base,
    start: Adapter,
    rows: dict[str, list[Row]],
    decision: Decision,
    settings: TrainSettings,
    way: Way,
    processes: int = 1,
) -> tuple[Decision, int]:
    """The decision with how much is run at a time, and the bytes that its run will hold at most: see `fit`.

    Args:
        base: The base, with nothing attached.
        start: An adapter of the decision's plan.
        rows: Of every split.
        decision: How to train; what it says of memory is decided again.
        settings: Of the run.
        way: How rows are run.
        processes: How many share this machine's memory.

    Raises:
        SettingsError: even the least is more than the settings allow.
    """
    recipe = replace(decision.recipe, micro_tokens=Recipe.micro_tokens, recompute=Recipe.recompute)
    decision, train = replace(decision, recipe=recipe), rows["train"]
    plain = footprint(base, start, train, way, settings.dropout)
    look = cache(lambda twice: with_losses(plain, base, start, train, way, twice, Meter(base)))
    steps = steps_of(train, recipe, free_blocks(base, decision.plan) > 0, way.packed)
    answering = partial(bytes_held, base, room_to_answer(base, rows, settings.few_shot))
    return fit(decision, look, answering, rows, steps, way, room_of(base, processes), settings.memory)


def _laying(way: Way) -> Choice:
    """How rows are laid into a batch."""
    if way.packed:
        return Choice(
            "rows",
            "one behind the other",
            "measured here: each computes what it computes alone, and no padding is computed",
            "",
        )
    return Choice(
        "rows",
        "padded to one width",
        "measured here: one behind the other, this base would not compute what each computes alone",
        "",
    )


def opened_base(name: str, settings: TrainSettings, listener: Listener, began: Environment | None = None) -> Base:
    """The base in the dtype that is frozen or set, or in the one measured to be faster; told, for the scores depend
    on it."""
    if began:
        dtype, why = DTYPES[began.dtype], " (as the run began)"
    elif settings.dtype == "auto":
        dtype, why = fastest_dtype(), " (the faster here, measured)"
    else:
        dtype, why = DTYPES[settings.dtype], ""
    base = open_base(name, dtype, listener.say, listener.watch)
    listener.say(f"base {base.name}, {str(dtype).removeprefix('torch.')}{why}")
    return base


def rendered(
    base: Base, examples: Examples, settings: TrainSettings, listener: Listener, now: str | None = None
) -> tuple[Examples, Renderer, dict[str, list[Row]]]:
    """The examples that this base can take, with their renderer and their rows; the first row is shown. now: the time
    that the template is told; None: that of the moment."""
    conversations = [example for split in examples.by_name().values() for example in split if not example.is_text]
    reasoned = sum(example.reasoned for example in conversations)
    renderer = renderer_for(
        base,
        examples.system if settings.system is None else settings.system,
        now=now,
        settings=settings.template_settings,
        reasoning=reasoned > 0,
    )
    if not renderer.system and (added := renderer.preamble()):
        listener.say(f"the base's template puts this before every conversation: {added!r}; --system replaces it")
    if renderer.now:
        listener.say(f"the base's template tells the time: {renderer.now}, in this run and by its adapter for ever")
    if reasoned:
        listener.say(
            f"{reasoned} of {len(conversations)} conversations have their reasoning: it is learnt before the "
            "answer, which is scored on its own"
        )
    rows: dict[str, list[Row]] = {}
    examples = sifted(
        examples, lambda e: rows.update(render_all(renderer, e, settings.max_length)), settings.skip_bad, listener
    )
    if said := strange_language(base.tokenizer, examples.train, "\n".join(general_text()[1])):
        listener.say(said)
    listener.example(rows["train"][0], renderer)
    return examples, renderer, rows


def render_all(renderer: Renderer, examples: Examples, max_length: int) -> dict[str, list[Row]]:
    """The rows of every split. Raises DataError naming every example of every split that cannot be one."""
    rows: dict[str, list[Row]] = {}
    problems: list[Problem] = []
    for name, split in examples.by_name().items():
        try:
            rows[name] = render(renderer, split, max_length)
        except DataError as error:
            problems += error.problems
    if problems:
        raise DataError(problems)
    return rows
