"""The main job: check → plan → train → evaluate → write, from a file of examples to a proven adapter."""

from __future__ import annotations

import ctypes
import hashlib
import importlib.util
import json
import os
import platform
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Protocol

import safetensors
import torch
import transformers

import lorafit
from lorafit.adapter import Adapter
from lorafit.attachment import fired, fresh, require_fired
from lorafit.base import Base, fastest_dtype, open_base, require_base
from lorafit.data.examples import Example, Examples, read_examples
from lorafit.data.render import Renderer, Row, render, renderer_for
from lorafit.data.report import DataReport, describe
from lorafit.data.split import complete, require_apart
from lorafit.errors import AdapterError, DataError, FormatError, LorafitError, Problem, RunError, SettingsError
from lorafit.evaluation.answers import is_right
from lorafit.evaluation.compare import Comparison, compare
from lorafit.evaluation.nll import batch_of
from lorafit.evaluation.statistics import FEWEST, groups_of, wilson
from lorafit.files import make_folder, read_json, write_json
from lorafit.formats import peft
from lorafit.planning import Choice, Decision, decide
from lorafit.report.card import card
from lorafit.settings import TrainSettings, settings_from
from lorafit.tasks.completion import completion_logits
from lorafit.training.loop import Moment, Trained, train

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
RUN, PLAN, SUMMARY = "run.json", "plan.json", "summary.json"
TRAINED_ON = Path("scores") / "trained_on.json"
WRITTEN = {RUN, PLAN, SUMMARY, "metrics.jsonl", "scores", "checkpoints", "adapter"}  # all there is in a run folder


class Listener(Protocol):
    """Who is told of what goes on. Every method may do nothing."""

    def say(self, text: str) -> None: ...
    def watch(self, what: str, done: int, of: int) -> None: ...
    def moment(self, moment: Moment) -> None: ...
    def data(self, report: DataReport) -> None: ...
    def plan(self, choices: Sequence[Choice]) -> None: ...
    def example(self, row: Row, renderer: Renderer) -> None: ...


class Silent:
    """A Listener that does nothing."""

    def say(self, text: str) -> None: ...
    def watch(self, what: str, done: int, of: int) -> None: ...
    def moment(self, moment: Moment) -> None: ...
    def data(self, report: DataReport) -> None: ...
    def plan(self, choices: Sequence[Choice]) -> None: ...
    def example(self, row: Row, renderer: Renderer) -> None: ...


@dataclass(frozen=True)
class Opened:
    """A base with data checked and rendered for it, and the decision how to train on them."""

    base: Base
    examples: Examples
    renderer: Renderer
    rows: dict[str, list[Row]]
    decision: Decision
    seconds: float


def open_all(base_name: str, data: str, settings: TrainSettings, listener: Listener) -> Opened:
    """Check the data, open the base, render, decide. Whatever is wrong is raised before anything is written."""
    start = time.monotonic()
    require_base(base_name)
    examples, _ = prepare(data, settings, listener)
    dtype = fastest_dtype() if settings.dtype == "auto" else DTYPES[settings.dtype]
    base = open_base(base_name, dtype, listener.say)
    listener.say(f"base {base.name}, {str(dtype).removeprefix('torch.')}"
                 + (" (the faster here, measured)" if settings.dtype == "auto" else ""))  # fmt: skip
    renderer = renderer_for(base, examples.system if settings.system is None else settings.system)
    if renderer.system is None and (added := renderer.preamble()):
        listener.say(f"the base's template puts this before every conversation: {added!r}; --system replaces it")
    rows: dict[str, list[Row]] = {}
    examples = _sifted(examples, lambda e: rows.update(render_all(renderer, e, settings.max_length)), settings.skip_bad,
                       listener)  # fmt: skip
    listener.example(rows["train"][0], renderer)
    probe = batch_of(base, rows["train"][:2])
    seen = fired(base, lambda: completion_logits(base.model, probe, split_head=False))
    decision = decide(base, rows["train"], settings, seen)
    require_fired(decision.plan, seen)
    listener.plan(decision.choices)
    return Opened(base, examples, renderer, rows, decision, time.monotonic() - start)


def prepare(data: str, settings: TrainSettings, listener: Listener) -> tuple[Examples, DataReport]:
    """Read, check, describe; make sure that what is held out is, and complete the splits."""
    examples = read_examples(data, settings.columns or (), settings.skip_bad)
    for problem in examples.skipped:
        listener.say(f"left out: {problem}")
    for check in (_require_passing, require_apart):
        examples = _sifted(examples, check, settings.skip_bad, listener)
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


def _sifted(examples: Examples, check: Callable[[Examples], None], skip_bad: bool, listener: Listener) -> Examples:
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


def _require_passing(examples: Examples) -> None:
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


def run_training(
    base_name: str,
    data: str,
    out: Path,
    settings: Mapping[str, Any],
    *,
    resume: bool = False,
    listener: Listener | None = None,
    extra: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """The whole job into the run folder `out`; returns the summary that is also written there.

    settings: fields of TrainSettings that are set; the rest is left to the rules. With `resume` those the run began
    with are used again, and one that contradicts them is refused. extra: goes into run.json.
    """
    listener = listener or Silent()
    resolved = _open_run(out, base_name, data, settings, resume)
    keep_freed_memory()
    try:
        opened = open_all(base_name, data, resolved, listener)
    except BaseException:
        if not resume:
            with suppress(OSError):
                out.rmdir()  # it was empty when this run took it
        raise
    make_folder(out)
    with _room_to_write(out):
        return _run(base_name, data, out, resolved, opened, resume, listener, extra or {})


def _run(
    base_name: str, data: str, out: Path, resolved: TrainSettings, opened: Opened, resume: bool,
    listener: Listener, extra: Mapping[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """From the plan on: everything here writes into the run folder."""
    base, decision = opened.base, opened.decision
    before = base.integrity()
    asked = {"base": base_name, "data": data, "settings": resolved.model_dump(mode="json")}
    if resume:
        _require_same(out, opened)
    else:
        write_json(out / RUN, {**asked, **_provenance(opened), **extra})
    if not (out / PLAN).exists():
        write_json(out / PLAN, {**decision.plan.to_json(), "recipe": asdict(decision.recipe),
                                "choices": [asdict(choice) for choice in decision.choices]})  # fmt: skip
    start = fresh(base, decision.plan, resolved.seed, opened.renderer.rendering)
    rows = opened.rows
    listener.say("training; Ctrl-C saves and stops")
    trained = train(base, start, rows["train"], rows["valid"], decision.recipe,
                    folder=out, resume=resume, tell=listener.moment)  # fmt: skip
    listener.say(f"trained: best validation at step {trained.best_step} of {decision.recipe.steps}")
    evaluating = time.monotonic()
    opens = _count_opening(out)
    comparison = compare(base, trained.adapter, opened.renderer, opened.examples.test, rows["test"],
                         shots_from=opened.examples.train, shots=resolved.few_shot, watch=listener.watch)  # fmt: skip
    write_json(out / TRAINED_ON, _prints([*opened.examples.train, *opened.examples.valid]))
    seconds = {"load": opened.seconds, "train": trained.seconds, "evaluate": time.monotonic() - evaluating}
    summary = _summary(opened, trained, comparison, out, seconds, opens)
    _write(out, trained.adapter, decision.choices, summary, comparison)
    listener.say(f"adapter written to {out / 'adapter'} and read back: equal bit for bit")
    checking = time.monotonic()
    probes = [list(row.ids) for row in rows["test"][:: max(1, len(rows["test"]) // 8)][:8]]
    summary["base_unchanged"] = base.integrity() == before
    summary["peft"] = compare_with_peft(out / "adapter", base, probes, listener)
    summary["seconds"]["check"] = round(time.monotonic() - checking, 2)
    summary["peak_rss_gb"] = _peak_gb()
    write_json(out / SUMMARY, summary)
    return summary


@contextmanager
def _room_to_write(out: Path) -> Iterator[None]:
    """Turn a full or vanished disk into a RunError: what was written before is whole, and the run can go on."""
    try:
        yield
    except LorafitError:
        raise
    except (OSError, safetensors.SafetensorError) as error:
        raise RunError(
            f"{out}: could not be written ({error}): make room there; what was saved is whole, --resume goes on"
        ) from error


def _open_run(out: Path, base_name: str, data: str, given: Mapping[str, Any], resume: bool) -> TrainSettings:
    """Settings of a new run in `out`, or of the one that is resumed there. Raises RunError or SettingsError."""
    known = out / RUN
    if resume:
        if not known.exists():
            raise RunError(f"{out}: there is no run to resume here: leave --resume out to begin one")
        if (out / SUMMARY).exists():
            raise RunError(f"{out}: this run is finished: see lorafit show {out}")
        asked = read_run(out)
        stored = settings_from(asked["settings"])
        settings_from(given)  # a name or value that cannot be is told as in a new run
        now = {"base": base_name, "data": data, **given}
        began = {"base": asked["base"], "data": asked["data"], **stored.model_dump(mode="json")}
        odd = [f"{key}: {began[key]!r} when it began, {value!r} now" for key, value in now.items()
               if began[key] != (list(value) if isinstance(value, tuple) else value)]  # fmt: skip
        if odd:
            raise SettingsError(f"{out}: not the run that is here: " + "; ".join(odd) + ": leave these out")
        used = {str(dtype): name for name, dtype in DTYPES.items()}[asked["dtype"]]
        return stored.model_copy(update={"dtype": used})  # auto would measure anew, and may find otherwise
    if known.exists():
        state = "finished" if (out / SUMMARY).exists() else "unfinished"
        hint = "" if state == "finished" else " go on with --resume, or"
        raise RunError(f"{out}: holds a run already ({state}):{hint} name another folder with --out")
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise RunError(f"{out}: is not empty and not a run: name another folder with --out")
    settings = settings_from(given)
    make_folder(out)
    return settings


def _provenance(opened: Opened) -> dict[str, Any]:
    return {
        **_decides(opened),
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {opened.base.device.type}",
        "versions": versions(),
    }


def _decides(opened: Opened) -> dict[str, Any]:
    """What decides the results of a run beside its settings."""
    return {
        "base_identity": opened.base.identity,
        "data_digest": opened.examples.digest(),
        "dtype": str(opened.base.dtype),
        "threads": torch.get_num_threads(),
    }


def _require_same(out: Path, opened: Opened) -> None:
    """Raise RunError naming what differs from what the run in `out` began with."""
    began, now = read_run(out), _decides(opened)
    odd = [
        f"{key}: {began.get(key)} when it began, {value} now" for key, value in now.items() if began.get(key) != value
    ]
    if odd:
        raise RunError(f"{out}: cannot go on, for something has changed since\n  " + "\n  ".join(odd)
                       + "\nrestore it, or start anew with another --out")  # fmt: skip


def read_run(out: Path) -> dict[str, Any]:
    """run.json of a run folder. Raises FormatError where it is not one of ours."""
    asked = read_json(out / RUN)
    if not isinstance(asked, dict) or not {"base", "data", "settings", "dtype"} <= set(asked):
        raise FormatError(f"{out / RUN}: not written by lorafit, or damaged: name another folder")
    return asked


def versions() -> dict[str, str]:
    """Of lorafit and what computes its results."""
    return {
        "lorafit": lorafit.__version__,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "safetensors": safetensors.__version__,
    }


def _count_opening(out: Path) -> int:
    """How often the test split of this run has been opened, this time included; kept in the run folder."""
    path = out / "scores" / "test_openings.json"
    path.parent.mkdir(exist_ok=True)
    count = (read_json(path)["openings"] if path.exists() else 0) + 1
    write_json(path, {"openings": count})
    return count


def scores_json(comparison: Comparison) -> dict[str, Any]:
    """The part of a summary that says how good: the same keys for a run and for an evaluation alone."""
    base, few, adapter = comparison.base, comparison.base_few_shot, comparison.adapter
    nll = asdict(comparison.nll)
    nll.pop("n")
    return {
        "n_test": comparison.nll.n,
        "nll": nll,
        "facts": {
            "base": base.accuracy,
            "base_few_shot": few.accuracy if few else None,
            "adapter": adapter.accuracy,
            "shuffled_control": None,
            "ci95": list(wilson(adapter.right * adapter.groups / adapter.n, adapter.groups)) if adapter.n else None,
            "n": adapter.n,
            "few_shot_examples": comparison.shots,
        },
        "off_desk_declined": adapter.declined / adapter.off_desk_n if adapter.off_desk_n else None,
        "natural_stops": adapter.natural_stops / len(adapter.answers) if adapter.answers else None,
        "samples": [asdict(sample) for sample in comparison.samples],
    }


def _summary(
    opened: Opened, trained: Trained, comparison: Comparison, out: Path, seconds: dict[str, float], opens: int
) -> dict[str, Any]:
    examples = opened.examples
    return {
        "base": opened.base.name,
        "base_identity": opened.base.identity,
        "adapter_dir": str(out / "adapter"),
        "n_train": len(examples.train),
        "n_valid": len(examples.valid),
        **scores_json(comparison),
        "test_openings": opens,
        "trained_tokens": trained.trained_tokens,
        "trainable_parameters": opened.decision.plan.parameters,
        "best_step": trained.best_step,
        "steps": trained.steps,
        "validation": [list(entry) for entry in trained.history],
        "seconds": {name: round(value, 2) for name, value in seconds.items()},
        "tokens_per_second": round(trained.tokens_per_second, 1),
        "dtype": str(opened.base.dtype).removeprefix("torch."),
    }


def _write(
    out: Path, adapter: Adapter, choices: Sequence[Choice], summary: dict[str, Any], comparison: Comparison
) -> None:
    """Adapter folder and scores; what was written is read back and must be the same value."""
    kept = ("n_train", "n_valid", "n_test", "nll", "facts", "off_desk_declined", "natural_stops")
    said = {"scores": {key: summary[key] for key in kept}, "versions": versions()}
    peft.write(adapter, out / "adapter", card(adapter, choices, summary), said)
    if peft.read(out / "adapter") != adapter:
        raise FormatError(f"{out / 'adapter'}: what was read back differs from what was written: check the disk, "
                          "and train again")  # fmt: skip
    write_json(out / "scores" / "test.json", asdict(comparison))


def _prints(examples: Sequence[Example]) -> list[str]:
    """A fingerprint of each question, by which a later evaluation knows those that were trained on."""
    return [hashlib.sha256(" ".join(e.question.lower().split()).encode()).hexdigest()[:16] for e in examples]


def _seen_in_training(adapter_folder: Path, examples: Sequence[Example]) -> int | None:
    """How many of the questions the run of this adapter was trained or validated on; None where there is no run."""
    known = adapter_folder.parent / TRAINED_ON
    if not known.exists():
        return None
    trained = set(read_json(known))
    return sum(one in trained for one in _prints(examples))


def compare_with_peft(
    folder: Path, base: Base, rows: Sequence[Sequence[int]], listener: Listener
) -> dict[str, float] | None:
    """Largest logit difference between PEFT's reading of the folder and ours in fp32, and the adapter's own effect.

    Runs in a process of its own; None, with the reason told, where PEFT cannot be asked.
    """
    if importlib.util.find_spec("peft") is None or base.folder is None:
        listener.say("PEFT is not installed, so it was not asked to read the adapter (pip install peft==0.21.2)")
        return None
    listener.say("asking PEFT to read the adapter and compute the same")
    command = [sys.executable, "-m", "lorafit.with_peft", str(folder.resolve()), str(base.folder.resolve())]
    done = subprocess.run(command, input=json.dumps(rows), capture_output=True, text=True, check=False)
    if done.returncode:
        reason = (done.stderr.strip().splitlines() or ["no reason given"])[-1]
        listener.say(f"PEFT did not read the adapter: {reason}")
        return None
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found


def same_as_peft(found: Mapping[str, float]) -> bool:
    """Law 5: within 1e-4 in fp32, or within a hundred-thousandth of what the adapter moves where that is more."""
    return found["max_logit_difference"] <= max(1e-4, 1e-5 * found["adapter_effect"])


def run_evaluation(
    base_name: str | None,
    adapter_folder: Path,
    data: str,
    *,
    against: Path | None = None,
    split: str = "test",
    few_shot: int = 0,
    dtype: str = "auto",
    max_length: int = 1024,
    accept_unknown_base: bool = False,
    columns: Sequence[str] = (),
    skip_bad: bool = False,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Score an adapter against its base, or another adapter, on examples; returns the summary.

    A single file is scored whole; of a folder, `split`. The base is the one the adapter names, unless given.
    """
    listener = listener or Silent()
    keep_freed_memory()
    start = time.monotonic()
    adapter_folder = peft.adapter_folder(adapter_folder)
    adapter = peft.read(adapter_folder)
    other = peft.read(peft.adapter_folder(against)) if against else None
    if other and other.rendering and other.rendering != adapter.rendering:
        raise AdapterError(f"{against}: was trained with another system prompt or chat template than {adapter_folder}: "
                           "evaluate each against the base, no one rendering is what both have learnt")  # fmt: skip
    examples = read_examples(data, columns, skip_bad)
    for problem in examples.skipped:
        listener.say(f"left out: {problem}")
    single = Path(data).is_file()
    chosen = examples.train if single else examples.by_name()[split]
    if not chosen:
        raise DataError([Problem(data, f"has no {split} split", "name another with --split, or give one file")])
    if few_shot and (single or split == "train"):
        raise SettingsError("--few-shot takes its examples from train.jsonl: give a folder that has one, and not "
                            "--split train, or the base would be shown the questions it is asked")  # fmt: skip
    seen = _seen_in_training(adapter_folder, chosen)
    if seen:
        listener.say(f"{seen} of these {len(chosen)} questions were trained or validated on: this measures memory")
    name = base_name or adapter.base_name
    if name is None:
        raise AdapterError(f"{adapter_folder}: does not say which base it belongs to: name it with --base")
    picked = _sifted(Examples(chosen), _require_passing, skip_bad, listener)
    base = open_base(name, None if dtype == "auto" else DTYPES[dtype], listener.say)
    before = base.integrity()
    renderer = renderer_for(base, adapter.rendering.system if adapter.rendering else None)
    if adapter.rendering:
        renderer.require(adapter.rendering)
    rows: dict[str, list[Row]] = {}
    picked = _sifted(picked, lambda e: rows.update(render_all(renderer, e, max_length)), skip_bad, listener)
    loaded = time.monotonic()
    comparison = compare(base, adapter, renderer, picked.train, rows["train"], against=other, shots_from=examples.train,
                         shots=few_shot, watch=listener.watch, accept_unknown_base=accept_unknown_base)  # fmt: skip
    done = time.monotonic()
    return {
        "base": base.name,
        "adapter_dir": str(adapter_folder),
        "against": str(against) if against else None,
        "split": None if single else split,
        "seen_in_training": seen,
        **scores_json(comparison),
        "base_unchanged": base.integrity() == before,
        "trainable_parameters": adapter.plan.parameters,
        "seconds": {"load": round(loaded - start, 2), "evaluate": round(done - loaded, 2)},
        "peak_rss_gb": _peak_gb(),
    }


def keep_freed_memory() -> None:
    """Tell glibc to keep freed blocks instead of handing them back to the kernel.

    Every step frees and asks for the same large blocks; mapping them anew each time costs up to a third of the
    step. Affects the whole process, so a run does it, never an import. Elsewhere than on glibc it does nothing.
    """
    if platform.libc_ver()[0] != "glibc":
        return
    trim_threshold, mmap_threshold = -1, -3  # M_TRIM_THRESHOLD, M_MMAP_THRESHOLD of malloc.h
    libc = ctypes.CDLL(None)
    libc.mallopt(mmap_threshold, 1 << 30)
    libc.mallopt(trim_threshold, (1 << 31) - 1)


def _peak_gb() -> float | None:
    """Largest resident memory of this process so far, in GB; None where the system does not tell."""
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return round(peak * (1 if sys.platform == "darwin" else 1024) / 1e9, 2)
