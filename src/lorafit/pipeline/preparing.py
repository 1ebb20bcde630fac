"""From what was named to what is ready: data checked, base opened, examples rendered, the way to train decided."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime
from functools import cache

import torch

from lorafit.adapter import Adapter
from lorafit.attachment import fired, free_blocks, fresh, require_fired
from lorafit.base import Base, fastest_dtype, open_base, require_base
from lorafit.data.examples import Examples
from lorafit.data.reading import read_examples
from lorafit.data.render import Renderer, Row, render, renderer_for
from lorafit.data.report import DataReport, describe
from lorafit.data.split import complete, require_apart
from lorafit.errors import DataError, Problem, SettingsError
from lorafit.evaluation.answers import is_right
from lorafit.evaluation.forgetting import general_rows, general_text
from lorafit.evaluation.statistics import FEWEST, groups_of
from lorafit.formats.oddities import misread_by_peft
from lorafit.pipeline.listener import Listener
from lorafit.pipeline.memory import Meter, room_of
from lorafit.planning import Choice, Decision, decide
from lorafit.planning.memory import as_begun, fit, footprint, steps_of, with_losses
from lorafit.records import Frozen
from lorafit.run import DTYPES
from lorafit.settings import TrainSettings
from lorafit.tasks.completion import PLAIN, Way, batch_of, token_nll
from lorafit.tasks.probe import way_of


@dataclass(frozen=True)
class Opened:
    """A base with data checked and rendered for it, and the decision how to train on them.

    start: the adapter before training. general: rows of general text, by source. peak: bytes that training
    holds at most, foretold; None for a run that is gone on with."""

    base: Base
    examples: Examples
    report: DataReport
    renderer: Renderer
    rows: dict[str, list[Row]]
    general: dict[str, list[Row]]
    decision: Decision
    frozen: Frozen
    start: Adapter
    way: Way
    peak: int | None
    seconds: float


def open_all(
    base_name: str, data: str, settings: TrainSettings, listener: Listener, began: Frozen | None = None,
    processes: int = 1,
) -> Opened:  # fmt: skip
    """Check the data, open the base, render, decide. Whatever is wrong is raised before anything is written.

    began: what a run has frozen that is gone on with. What depends on this machine and this moment is found out here,
    if `began` does not say it, and goes into Frozen. processes: how many share this machine's memory.
    """
    start = time.monotonic()
    texts = dict(general_text(named) for named in dict.fromkeys((None, settings.general)))
    require_base(base_name)
    examples, report = prepare(data, settings, listener)
    base = opened_base(base_name, settings, listener, began)
    now = began.now if began else datetime.now().isoformat(timespec="seconds")
    examples, renderer, rows = rendered(base, examples, settings, listener, now)
    probe = batch_of(base, rows["train"][:2], PLAIN)
    seen = fired(base, lambda: token_nll(base, probe, PLAIN))
    decision = decide(base, rows["train"], settings, seen)
    require_fired(decision.plan, seen)
    before = fresh(base, decision.plan, settings.seed, renderer.rendering)
    way = Way(began.apart, began.packed) if began else way_of(base, rows["train"])
    decision = replace(decision, choices=(*decision.choices, _laying(way)))
    if began is None:
        plain = footprint(base, before, rows["train"], way, settings.dropout)
        look = cache(lambda twice: with_losses(plain, base, before, rows["train"], way, twice, Meter(base)))
        steps = steps_of(rows["train"], decision.recipe, free_blocks(base, decision.plan) > 0, way.packed)
        decision, peak = fit(decision, look, rows, steps, way, room_of(base, processes), settings.memory)
    else:
        decision, peak = as_begun(decision, began.micro_tokens, began.recompute), None
    listener.plan(decision.choices)
    if said := misread_by_peft(base.model, [slot.site.path for slot in decision.plan.slots]):
        listener.say(said)
    names = {dtype: name for name, dtype in DTYPES.items()}
    recipe = decision.recipe
    frozen = began or Frozen(names[base.dtype], torch.get_num_threads(), way.apart, way.packed, recipe.micro_tokens,
                             recipe.recompute, renderer.now)  # fmt: skip
    general = {name: general_rows(base.tokenizer, text, base.context) for name, text in texts.items()}
    return Opened(
        base, examples, report, renderer, rows, general, decision, frozen, before, way, peak, time.monotonic() - start
    )


def _laying(way: Way) -> Choice:
    """How rows are laid into a batch."""
    if way.packed:
        return Choice("rows", "one behind the other", "measured here: each computes what it computes alone, and no "
                      "padding is computed", "")  # fmt: skip
    return Choice("rows", "padded to one width", "measured here: one behind the other, this base would not compute "
                  "what each computes alone", "")  # fmt: skip


def opened_base(name: str, settings: TrainSettings, listener: Listener, began: Frozen | None = None) -> Base:
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
    renderer = renderer_for(base, examples.system if settings.system is None else settings.system, now=now,
                            settings=settings.template_settings, reasoning=reasoned > 0)  # fmt: skip
    if not renderer.system and (added := renderer.preamble()):
        listener.say(f"the base's template puts this before every conversation: {added!r}; --system replaces it")
    if renderer.now:
        listener.say(f"the base's template tells the time: {renderer.now}, in this run and by its adapter for ever")
    if reasoned:
        listener.say(f"{reasoned} of {len(conversations)} conversations have their reasoning: it is learnt before the "
                     "answer, which is scored on its own")  # fmt: skip
    rows: dict[str, list[Row]] = {}
    examples = sifted(examples, lambda e: rows.update(render_all(renderer, e, settings.max_length)), settings.skip_bad,
                       listener)  # fmt: skip
    listener.example(rows["train"][0], renderer)
    return examples, renderer, rows


def prepare(data: str, settings: TrainSettings, listener: Listener) -> tuple[Examples, DataReport]:
    """Read, check, describe; make sure that what is held out is, and complete the splits."""
    examples = read_examples(data, settings.columns or (), settings.skip_bad)
    if all(examples.by_name().values()) and settings.val_share != TrainSettings().val_share:
        raise SettingsError(f"--val-share {settings.val_share}: does nothing, for {data} brings train, valid and test "
                            "of its own: leave it out")  # fmt: skip
    for problem in examples.skipped:
        listener.say(f"left out: {problem}")
    if examples.unread:
        listener.say(f"not read: {', '.join(examples.unread)}: the files of a folder are train, valid and test")
    different: list[int] = []
    examples = sifted(examples, require_passing, settings.skip_bad, listener)
    examples = sifted(examples, lambda e: different.append(require_apart(e)), settings.skip_bad, listener)
    if different[-1]:
        listener.say(
            f"{different[-1]} prompts of valid and test are near-identical to others, but with answers of their own, "
            "as it must be in data to text; elsewhere such a test may be easier than life"
        )
    examples = complete(examples, settings.seed, settings.val_share)
    report = describe(examples)
    listener.data(report)
    independent = len(set(groups_of([example.group for example in examples.test])))
    if independent < FEWEST:
        listener.say(
            f"only {independent} independent test example{'s' * (independent != 1)}: too few to tell whether an "
            f"adapter is better; at least {FEWEST} are needed, a hundred tell much (--val-share, or more data)"
        )
    return examples, report


def sifted(examples: Examples, check: Callable[[Examples], None], skip_bad: bool, listener: Listener) -> Examples:
    """The examples that pass the check: all of them, or with `skip_bad` what is left without the others, each told."""
    try:
        check(examples)
        return examples
    except DataError as error:
        left = examples.without(error.problems)
        emptied = any(split and not left.by_name()[name] for name, split in examples.by_name().items())
        if not skip_bad or emptied:
            raise
        for problem in error.problems:
            listener.say(f"left out: {problem}")
        check(left)
        return left


def require_passing(examples: Examples) -> None:
    """Raise DataError naming every example whose own answer does not pass its check: no answer to it could count."""
    problems = [
        Problem(f"{example.where}: check", "its own answer does not pass it",
                "correct the answer, or contains, lacks and max_words")
        for split in examples.by_name().values()
        for example in split
        if example.check is not None and not is_right(example.answer, example.check)
    ]  # fmt: skip
    if problems:
        raise DataError(problems)


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
