"""`lorafit eval`: compares an adapter with its base, or with another adapter, on examples; returns a summary."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.formats import peft
from lorafit.adapters.rendering import Rendering
from lorafit.data.examples import Example
from lorafit.data.prepared import Chosen, choose, is_single, sifted
from lorafit.data.render import Renderer, Row
from lorafit.errors import AdapterError, InputError, LorafitError, SettingsError
from lorafit.evaluation.forgetting import forgetting, general_rows, general_text
from lorafit.files import require_new, write_text
from lorafit.heads import head_of_adapter, opened_for
from lorafit.heads.head import Test
from lorafit.jobs.listener import Listener, Silent
from lorafit.jobs.machine import keep_freed_memory, peak_gb
from lorafit.jobs.prepare import opened_base, prepare_again, render_all
from lorafit.report.result import Result
from lorafit.runs.folder import RUN, count_opening, read_run, remembered
from lorafit.runs.scores import answer_lines, scores_of
from lorafit.runs.summary import EvaluationSummary
from lorafit.runs.tested import scored_in, was_scored
from lorafit.settings import require_meant, settings_from
from lorafit.tasks.runner import Runner


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
    """Score an adapter against its base, or against another adapter; returns the summary. It has more than six
    parameters; those that are set by name are optional.

    The examples that the adapter's run was trained on, if they can be read, decide whether answers count as few, and a
    simple classifier learns from them.

    Args:
        base_name: The base; None for the one that the adapter names.
        adapter_folder: An adapter folder, or a run.
        data: A file, all of which is scored, or a folder, of which `split` is scored.
        settings: Fields of TrainSettings that matter for an evaluation: few_shot, dtype, max_length, columns, skip_bad,
            general. The examples of few_shot are taken from the training examples of the folder, or else from those of
            the run.
        against: The folder of another adapter to compare with; None for the base.
        split: The part of a folder that is scored.
        answers: A new file for the answers, one JSON object per line. If it is given, every question is answered.
        accept_unknown_base: Attach adapters that do not say which base they belong to.
        listener: Receives messages and progress.
        chosen: The result of `choose` for the data; None to read them here.
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
    head = head_of_adapter(adapter)
    writes = head.opening is None
    if not writes:
        require_meant(settings_from({name: value for name, value in settings.items() if value}), head.idle, head.model)
    other = peft.read(peft.adapter_folder(against)) if against else None
    if other:
        _require_comparable(adapter, adapter_folder, other, against)
    tested = adapter
    if adapter.classes and other and other.classes and other.classes.weights != adapter.classes.weights:
        tested = replace(adapter, classes=replace(adapter.classes, weights=()))
        listener.say("the two weigh labels differently: here every text counts alike")
    chosen = chosen or choose(data, split, resolved, listener)
    picked, single = chosen.scored, is_single(data)
    shots_from: tuple[Example, ...] = () if single or split == "train" else chosen.all.train
    shots_wanted = bool(settings.get("few_shot"))
    known, shots_from = _known_to(adapter_folder.parent, chosen.split, shots_from, shots_wanted, listener)
    runs = [adapter_folder.parent, *([peft.adapter_folder(against).parent] if against else [])]
    seen = [_remarked(run, chosen.split, listener) for run in runs]
    name = str(base_name) if base_name else adapter.base_name
    if name is None:
        raise AdapterError(f"{adapter_folder}: does not say which base it belongs to: name it with --base")
    base = opened_base(name, resolved, listener, head=opened_for(adapter))
    before = base.integrity()
    renderer = head.renderer_of(base, tested)
    if isinstance(renderer, Renderer) and other and other.rendering and other.rendering.now != renderer.now:
        listener.say(
            f"the base's template includes the time, and {against} was trained with another time: both adapters get "
            f"{renderer.now}"
        )
    rows: dict[str, list[Row]] = {}
    picked = sifted(
        picked, lambda e: rows.update(render_all(head, renderer, e, resolved.max_length)), resolved.skip_bad, listener
    )
    loaded = time.monotonic()
    runner = Runner.of(base, rows["train"], head.task_of(tested))
    test = Test(
        runner,
        renderer,
        picked.train,
        rows["train"],
        known,
        shots_from,
        resolved.few_shot,
        listener.watch,
        answer_all=answers is not None,
        accept_unknown_base=accept_unknown_base,
    )
    comparison = head.compare(test, adapter, other)
    for run in runs:
        _count(run, chosen.split, listener)
    if answers is not None:
        write_text(answers, answer_lines(picked.train, comparison))
        listener.say(f"{len(comparison.asked)} answers written to {answers}")
    texts = dict(general_text(named) for named in dict.fromkeys((None, resolved.general))) if writes else {}
    general = {
        source: general_rows(base.tokenizer, text, base.context, base.vocabulary) for source, text in texts.items()
    }
    lost = forgetting(
        runner,
        adapter,
        general,
        lambda done, of: listener.watch("forgetting", done, of, "texts"),
        against=other,
        accept_unknown_base=accept_unknown_base,
    )
    done = time.monotonic()
    return Result(
        EvaluationSummary(
            base=base.name,
            adapter_dir=str(adapter_folder),
            against=str(against) if against else None,
            split=None if single else split,
            seen_in_training=seen[0],
            seen_by_other=seen[1] if against else None,
            general=lost,
            base_unchanged=base.integrity() == before,
            trainable_parameters=adapter.plan.parameters,
            dtype=str(base.dtype).removeprefix("torch."),
            seconds={"load": round(loaded - start, 2), "evaluate": round(done - loaded, 2)},
            peak_rss_gb=peak_gb(),
            **scores_of(comparison),
        )
    )


def _require_comparable(adapter: Adapter, folder: Path, other: Adapter, against: str | Path | None) -> None:
    """Raise AdapterError if the two adapters read or answer the same examples in different ways."""
    if other.rendering and not _alike(other.rendering, adapter.rendering):
        raise AdapterError(
            f"{against}: was trained with another system prompt or chat template than {folder}, or with other settings "
            "of it: evaluate each against the base, because no single rendering fits both"
        )
    if _labels(other) != _labels(adapter):
        raise AdapterError(
            f"{against}: tells other labels apart than {folder}, has them in another order, or has another task: "
            "evaluate each on its own"
        )


def _labels(adapter: Adapter) -> tuple[object, ...] | None:
    classes = adapter.classes
    return (classes.labels, classes.pad, classes.task, classes.scale) if classes else None


def _known_to(
    run: Path, asked: Sequence[Example], shots_from: tuple[Example, ...], shots_wanted: bool, listener: Listener
) -> tuple[tuple[Example, ...], tuple[Example, ...]]:
    """The examples that the adapter was trained on, if they can be read, and the examples that shots are taken from."""
    try:
        known = _trained_on(run, asked)
    except (LorafitError, OSError):
        if shots_wanted and not shots_from:
            raise
        return shots_from, shots_from  # the counts can do without the training examples
    if shots_wanted and not shots_from:
        listener.say(f"--few-shot takes its examples from what {run} was trained on")
        return known, known
    return known, shots_from


def _trained_on(run: Path, asked: Sequence[Example]) -> tuple[Example, ...]:
    """The examples that a run was trained on, without those that are asked now. Raises SettingsError if none are
    left."""
    where = "--few-shot takes its examples from the folder's train.jsonl, or from what the run was trained on"
    if not (run / RUN).exists():
        raise SettingsError(f"{where}, and {run} is no run: give a run, or leave --few-shot out")
    was = read_run(run)
    given = prepare_again(run, was["data"], settings_from(was["settings"]), Silent(), "leave --few-shot out")[0].train
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
    """Whether two renderings are the same except for the time."""
    return other is not None and replace(one, now=other.now) == other


def _remarked(run: Path, chosen: Sequence[Example], listener: Listener) -> int | None:
    """How many of the examples the run was trained or validated on, which is also reported; None if there is no
    run."""
    known = remembered(run, [example.question for example in chosen])
    seen = None if known is None else sum(known)
    if seen:
        listener.say(
            f"{seen} of these {len(chosen)} questions were trained or validated on in {run}: this measures memory"
        )
    return seen


def _count(run: Path, chosen: Sequence[Example], listener: Listener) -> None:
    """Count an opening of a run's test split if some of its examples were scored, and report it."""
    known = scored_in(run)
    again = sum(was_scored(example, known) for example in chosen)
    if not again:
        return
    try:
        opened = f"now opened {count_opening(run)} times"
    except (OSError, InputError) as error:
        opened = f"which could not be counted there ({error})"
    listener.say(
        f"{again} of these {len(chosen)} examples are of the test of {run}, {opened}: make choices on other "
        "examples, or it is no longer a test"
    )
