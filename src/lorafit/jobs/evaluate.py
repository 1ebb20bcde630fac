"""An adapter and its base, or two adapters, compared on examples given later."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lorafit.adapters.formats import peft
from lorafit.adapters.rendering import Rendering
from lorafit.data.examples import Example
from lorafit.data.render import Row, renderer_for
from lorafit.errors import AdapterError, DataError, InputError, LorafitError, SettingsError
from lorafit.evaluation.compare import compare
from lorafit.evaluation.forgetting import forgetting, general_rows, general_text
from lorafit.files import require_new, write_text
from lorafit.jobs.listener import Listener, Silent
from lorafit.jobs.machine import keep_freed_memory, peak_gb
from lorafit.jobs.prepare import opened_base, render_all
from lorafit.prepared import Chosen, choose, is_single, prepare, sifted
from lorafit.report.result import Result
from lorafit.runs.folder import RUN, count_opening, read_run, remembered, tested
from lorafit.runs.scores import answer_lines, scores_json, was_scored
from lorafit.settings import settings_from
from lorafit.tasks.probe import way_of


def run_evaluation(
    base_name: str | Path | None,
    adapter_folder: str | Path,
    data: str | Path,
    settings: Mapping[str, Any] = MappingProxyType({}),
    *,
    against: str | Path | None = None,
    split: str = "test",
    answers: str | Path | None = None,
    accept_unknown_base: bool = False,
    listener: Listener | None = None,
    chosen: Chosen | None = None,
) -> dict[str, Any]:
    """Score an adapter against its base, or another adapter, on examples; returns the summary.

    settings: fields of TrainSettings that bear on an evaluation: few_shot (by default as many as in a run, where the
    folder has training examples; given for other data, examples of what the run was trained on), dtype, max_length,
    columns, skip_bad. What the run was trained on, where it can be read, also tells whether answers are few, and is
    what a simple classifier learns from. A single file is scored whole; of a folder, `split`. The base is the one
    the adapter names, unless given. With `answers` every question is answered, and the answers go there, one JSON
    object a line; a file that is there already is refused. chosen: what `choose` made of the data, which are read here
    where it is not given.
    """
    listener = listener or Silent()
    answers, data = None if answers is None else Path(answers), str(data)
    if answers is not None:
        require_new(answers, "--answers")
    keep_freed_memory()
    start = time.monotonic()
    resolved = settings_from(settings)
    adapter_folder = peft.adapter_folder(adapter_folder)
    adapter = peft.read(adapter_folder)
    other = peft.read(peft.adapter_folder(against)) if against else None
    if other and other.rendering and not _alike(other.rendering, adapter.rendering):
        raise AdapterError(
            f"{against}: was trained with another system prompt or chat template than {adapter_folder}, "
            "or with other settings of it: evaluate each against the base, no one rendering is what "
            "both have learnt"
        )
    chosen = chosen or choose(data, split, resolved, listener)
    picked, single = chosen.scored, is_single(data)
    shots_from: tuple[Example, ...] = () if single or split == "train" else chosen.all.train
    shots_missing = bool(settings.get("few_shot")) and not shots_from
    try:
        known = _trained_on(adapter_folder.parent, chosen.split)
    except (LorafitError, OSError):
        if shots_missing:
            raise
        known = shots_from  # what is known serves the counts, which do without
    if shots_missing:
        shots_from = known
        listener.say(f"--few-shot takes its examples from what {adapter_folder.parent} was trained on")
    runs = [adapter_folder.parent, *([peft.adapter_folder(against).parent] if against else [])]
    seen = [_remarked(run, chosen.split, listener) for run in runs]
    name = str(base_name) if base_name else adapter.base_name
    if name is None:
        raise AdapterError(f"{adapter_folder}: does not say which base it belongs to: name it with --base")
    base = opened_base(name, resolved, listener)
    before = base.integrity()
    renderer = renderer_for(base, like=adapter.rendering, reasoning=adapter.rendering is None)  # as it is served
    if other and other.rendering and other.rendering.now != renderer.now:
        listener.say(
            f"the base's template tells the time, which was another when {against} was trained: both are told "
            f"{renderer.now}"
        )
    rows: dict[str, list[Row]] = {}
    picked = sifted(
        picked, lambda e: rows.update(render_all(renderer, e, resolved.max_length)), resolved.skip_bad, listener
    )
    loaded = time.monotonic()
    way = way_of(base, rows["train"])
    comparison = compare(
        base,
        adapter,
        renderer,
        picked.train,
        rows["train"],
        against=other,
        shots_from=shots_from,
        shots=resolved.few_shot,
        known=known,
        answer_all=answers is not None,
        watch=listener.watch,
        accept_unknown_base=accept_unknown_base,
        way=way,
    )
    for run in runs:
        _count(run, chosen.split, listener)
    if answers is not None:
        write_text(answers, answer_lines(picked.train, comparison))
        listener.say(f"{len(comparison.asked)} answers written to {answers}")
    texts = dict(general_text(named) for named in dict.fromkeys((None, resolved.general)))
    general = {
        source: general_rows(base.tokenizer, text, base.context, base.vocabulary) for source, text in texts.items()
    }
    lost = forgetting(
        base,
        adapter,
        general,
        way,
        lambda done, of: listener.watch("forgetting", done, of, "texts"),
        against=other,
        accept_unknown_base=accept_unknown_base,
    )
    done = time.monotonic()
    return Result(
        {
            "base": base.name,
            "adapter_dir": str(adapter_folder),
            "against": str(against) if against else None,
            "split": None if single else split,
            "seen_in_training": seen[0],
            "seen_by_other": seen[1] if against else None,
            **scores_json(comparison),
            "general": {source: asdict(score) for source, score in lost.items()},
            "base_unchanged": base.integrity() == before,
            "trainable_parameters": adapter.plan.parameters,
            "dtype": str(base.dtype).removeprefix("torch."),
            "seconds": {"load": round(loaded - start, 2), "evaluate": round(done - loaded, 2)},
            "peak_rss_gb": peak_gb(),
        }
    )


def _trained_on(run: Path, asked: Sequence[Example]) -> tuple[Example, ...]:
    """The examples a run was trained on, without those that are asked now. Raises SettingsError where there are
    none."""
    where = "--few-shot takes its examples from the folder's train.jsonl, or from what the run was trained on"
    if not (run / RUN).exists():
        raise SettingsError(f"{where}, and {run} is no run: give a run, or leave --few-shot out")
    was = read_run(run)
    try:
        given = prepare(was["data"], settings_from(was["settings"]), Silent())[0].train
    except DataError as error:
        raise SettingsError(
            f"{where}, and {was['data']} cannot be read as it was then ({error}): restore it, or leave --few-shot out"
        ) from error
    known = remembered(run, [example.question for example in given]) or []
    now = {" ".join(example.question.lower().split()) for example in asked}
    left = tuple(
        example
        for example, trained in zip(given, known, strict=False)
        if trained and " ".join(example.question.lower().split()) not in now
    )
    if not left:
        raise SettingsError(
            f"{where}: of that, in {was['data']}, nothing is left that is not asked here: leave --few-shot out"
        )
    return left


def _alike(one: Rendering, other: Rendering | None) -> bool:
    """Whether both render the same, but for the time that they tell."""
    return other is not None and replace(one, now=other.now) == other


def _remarked(run: Path, chosen: Sequence[Example], listener: Listener) -> int | None:
    """Say what of the examples the run knows already: how many it was trained or validated on, None where there is
    no run."""
    known = remembered(run, [example.question for example in chosen])
    seen = None if known is None else sum(known)
    if seen:
        listener.say(
            f"{seen} of these {len(chosen)} questions were trained or validated on in {run}: this measures memory"
        )
    return seen


def _count(run: Path, chosen: Sequence[Example], listener: Listener) -> None:
    """Count a look at the test of a run, where examples of it were scored."""
    known = tested(run)
    again = sum(was_scored(example, known) for example in chosen)
    if not again:
        return
    try:
        opened = f"now opened {count_opening(run)} times"
    except (OSError, InputError) as error:
        opened = f"which could not be counted there ({error})"
    listener.say(
        f"{again} of these {len(chosen)} examples are of the test of {run}, {opened}: choose by other "
        "examples, or it is no test any more"
    )
