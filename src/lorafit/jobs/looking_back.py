"""Measurements after training, on validation only: how small the adapter may be, which sites mattered, forgetting."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.formats import peft
from lorafit.data.split import FEWEST, groups_of
from lorafit.evaluation.forgetting import forgetting
from lorafit.files import make_folder, read_json, write_json
from lorafit.jobs.extras import Extras
from lorafit.jobs.listener import Listener
from lorafit.jobs.prepare import Opened
from lorafit.jobs.run import Run
from lorafit.jobs.scoring import questions_of
from lorafit.jobs.search import some, spread_over
from lorafit.jobs.trim import Validation, ladder_of, write_moments
from lorafit.planning import Decision
from lorafit.planning.importance import ablations, examples_for, first_order, parts_of
from lorafit.planning.ladder import Ladder, kept_whole
from lorafit.planning.rules import with_choice
from lorafit.planning.trim import untrimmable
from lorafit.runs.folder import FORGETTING, IMPORTANCE, LADDER, MOMENTS, RUNGS, SCORES, WHOLE
from lorafit.runs.summary import Forgotten
from lorafit.training.loop import Trained
from lorafit.training.recipe import Recipe

TRIMMING = "trimming"


def trim_trained(run: Run, trained: Trained, recipe: Recipe, extras: Extras) -> tuple[Ladder, Adapter]:
    """Trim the trained adapter; returns the ladder and the adapter that is shipped, which is the whole one if trimming
    fails. The run's folder keeps the ladder for `lorafit trim`, and the whole adapter if a smaller one is shipped."""
    opened, settings, out = run.opened, run.settings, run.out
    whole, before = trained.adapter, trained.history[0][1]
    why = "untrimmed, as you set (--trim)" if settings.trim == "none" else untrimmable(whole)
    if why:
        return kept_whole(trained.each, before, why), whole
    groups = [example.group for example in opened.examples.valid]
    if (n := len(set(groups_of(groups)))) < FEWEST:
        why = f"untrimmed: {n} independent validation examples are too few: at least {FEWEST} are needed"
        return kept_whole(trained.each, before, why), whole

    def climbed() -> tuple[Ladder, Adapter]:
        questions = questions_of(opened, settings)
        held = Validation(opened.rows["valid"], trained.each, before, groups, questions)
        runner = opened.runner.within(recipe.micro_tokens, recipe.recompute)
        ladder, small, moments = ladder_of(runner, whole, opened.rows["train"], held, extras.listener)
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


def with_ladder(decision: Decision, ladder: Ladder, adapter: Adapter) -> Decision:
    """The decision with the result of trimming as its last choice."""
    value = f"{ladder.chosen:.4g} of the LoRA parameters" if ladder.chosen < 1 else "all of it"
    uncut = sum(slot.site.count > 1 for slot in adapter.plan.slots)
    reason = ladder.reason + (f"; {uncut} sites of experts are not cut" if uncut and ladder.chosen < 1 else "")
    return with_choice(decision, "trim", f"{value}, {adapter.plan.bytes / 1e6:.1f} MB", reason, "--trim")


def sites_that_mattered(opened: Opened, recipe: Recipe, whole: Adapter, out: Path, listener: Listener) -> None:
    """Measure which sites of the untrimmed adapter mattered, and write the result into the run, once."""
    path, digest = out / SCORES / IMPORTANCE, whole.digest()
    if path.exists() and read_json(path).get("adapter") == digest:
        return
    runner = opened.runner.within(recipe.micro_tokens, recipe.recompute)
    parts = parts_of([slot.site.path for slot in whole.plan.slots])
    count = examples_for(len(parts), recipe.steps, recipe.batch_size, len(opened.examples.valid))
    every = [example.group for example in opened.examples.valid]
    places = spread_over(count, every)
    few, groups = some(opened.rows["valid"], places), [every[i] for i in places]
    first = first_order(runner, whole, few)
    taken = ablations(
        runner,
        whole,
        few,
        parts,
        groups,
        lambda done, of: listener.watch("which sites mattered", done, of, "parts"),
    )
    make_folder(out / SCORES)
    mattered = {"adapter": digest, "examples": count, "first_order": first, "ablations": [asdict(one) for one in taken]}
    write_json(path, mattered)


def forgotten(opened: Opened, shipped: Adapter, out: Path, listener: Listener) -> Forgotten | None:
    """Measure how the shipped adapter changes the NLL of general text; the result is returned and written into the run.
    None for a classifier, which writes no text."""
    if not opened.general:
        return None
    lost = forgetting(
        opened.runner,
        shipped,
        opened.general,
        lambda done, of: listener.watch("forgetting", done, of, "texts"),
    )
    make_folder(out / SCORES)
    write_json(out / SCORES / FORGETTING, asdict(found := Forgotten(lost)))
    return found
