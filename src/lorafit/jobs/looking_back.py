"""After the run proper, on validation alone: how small the adapter may be, which sites mattered, what was forgotten."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.formats import peft
from lorafit.evaluation.forgetting import forgetting
from lorafit.evaluation.questions import Questions
from lorafit.evaluation.statistics import FEWEST, groups_of
from lorafit.files import make_folder, write_json
from lorafit.jobs.extras import Extras
from lorafit.jobs.listener import Listener
from lorafit.jobs.machine import left_of
from lorafit.jobs.prepare import Opened
from lorafit.jobs.search import some, spread_over
from lorafit.jobs.trim import ladder_of, write_moments
from lorafit.planning import Decision
from lorafit.planning.importance import ablations, examples_for, first_order, parts_of
from lorafit.planning.ladder import Ladder, kept_whole
from lorafit.planning.rules import told
from lorafit.planning.trim import untrimmable
from lorafit.runs.folder import FORGETTING, IMPORTANCE, LADDER, MOMENTS, RUNGS, SCORES, WHOLE
from lorafit.settings import TrainSettings
from lorafit.training.loop import Trained
from lorafit.training.recipe import Recipe

TRIMMING = "trimming"


def trim_trained(
    opened: Opened, trained: Trained, recipe: Recipe, settings: TrainSettings, out: Path, extras: Extras
) -> tuple[Ladder, Adapter]:
    """The ladder, and the adapter that is shipped: the whole, where trimming fails. The run keeps the ladder, by which
    `lorafit trim` takes another rung, and where a smaller one is shipped the whole."""
    whole, before = trained.adapter, trained.history[0][1]
    why = "untrimmed, as you set (--trim)" if settings.trim == "none" else untrimmable(whole)
    if why:
        return kept_whole(trained.each, before, why), whole
    groups = [example.group for example in opened.examples.valid]
    if (n := len(set(groups_of(groups)))) < FEWEST:
        why = f"untrimmed: {n} independent validation examples decide nothing, at least {FEWEST} are needed"
        return kept_whole(trained.each, before, why), whole

    def climbed() -> tuple[Ladder, Adapter]:
        questions = Questions.among(
            opened.base,
            opened.renderer,
            opened.examples.valid,
            opened.rows["valid"],
            opened.examples.train,
            left_of(settings.memory, opened.base),
        )
        ladder, small, moments = ladder_of(
            opened.base,
            whole,
            opened.rows,
            opened.way,
            recipe,
            trained.each,
            before,
            groups,
            questions,
            extras.listener,
        )
        make_folder(out / LADDER)
        write_moments(moments, out / LADDER / MOMENTS)
        if small is not None:
            peft.write(whole, out / LADDER / WHOLE)
        write_json(out / LADDER / RUNGS, asdict(ladder))
        extras.listener.say(f"trimming: {ladder.reason}")
        return ladder, small or whole

    if found := extras.get(TRIMMING, climbed):
        return found
    return kept_whole(trained.each, before, f"untrimmed: trimming failed ({extras.passed_over[TRIMMING]})"), whole


def told_ladder(decision: Decision, ladder: Ladder, adapter: Adapter) -> Decision:
    """The decision with what trimming came to, last among its choices."""
    value = f"{ladder.chosen:.4g} of the parameters" if ladder.chosen < 1 else "all of it"
    return told(decision, "trim", f"{value}, {adapter.plan.bytes / 1e6:.1f} MB", ladder.reason, "--trim")


def sites_that_mattered(opened: Opened, recipe: Recipe, whole: Adapter, out: Path, listener: Listener) -> None:
    """Which sites mattered, measured on the adapter as it was trained; into a file of the run."""
    base = opened.base
    parts = parts_of([slot.site.path for slot in whole.plan.slots])
    count = examples_for(len(parts), recipe.steps, recipe.batch_size, len(opened.examples.valid))
    every = [example.group for example in opened.examples.valid]
    places = spread_over(count, every)
    few, groups = some(opened.rows["valid"], places), [every[i] for i in places]
    first = first_order(base, whole, few, opened.way, recipe.micro_tokens, recipe.recompute)
    taken = ablations(
        base,
        whole,
        few,
        parts,
        opened.way,
        groups,
        lambda done, of: listener.watch("which sites mattered", done, of, "parts"),
    )
    make_folder(out / SCORES)
    mattered = {"examples": count, "first_order": first, "ablations": [asdict(one) for one in taken]}
    write_json(out / SCORES / IMPORTANCE, mattered)


def forgotten(opened: Opened, shipped: Adapter, out: Path, listener: Listener) -> dict[str, Any]:
    """What the adapter that is shipped has made the base forget; into a file of the run, and returned."""
    lost = forgetting(
        opened.base,
        shipped,
        opened.general,
        opened.way,
        lambda done, of: listener.watch("forgetting", done, of, "texts"),
    )
    make_folder(out / SCORES)
    told = {"general": {source: asdict(score) for source, score in lost.items()}}
    write_json(out / SCORES / FORGETTING, told)
    return told
