"""Classifiers: PEFT computes the same, the base stays as it is, and a tiny one learns."""

from __future__ import annotations

import csv
import json
import math
import random
import signal
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from shutil import copytree
from typing import Any

import httpx
import pytest
import torch
import uvicorn
from conftest import byte_tokenizer, capitals, summary_with, tiny_gpt2, tiny_llama, write_rows
from peft import PeftConfig, PeftModel
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from transformers import (
    AutoModelForSequenceClassification,
    BertConfig,
    BertModel,
    DistilBertConfig,
    DistilBertModel,
    PreTrainedModel,
    RobertaConfig,
    RobertaModel,
)
from typer.testing import CliRunner

from lorafit import read_adapter
from lorafit.adapters.adapter import Adapter
from lorafit.adapters.formats import peft
from lorafit.adapters.plan import Plan
from lorafit.adapters.rendering import Classes
from lorafit.adapters.state import TrainState
from lorafit.attachment.adapters import attach
from lorafit.attachment.checks import require_fits
from lorafit.attachment.pure import fresh, merged
from lorafit.bases.base import Base, open_base
from lorafit.cli import app
from lorafit.data.examples import Example, Examples, Message
from lorafit.data.prepared import prepare
from lorafit.data.reading import read_examples
from lorafit.data.render import Renderer, Row
from lorafit.data.report import describe
from lorafit.data.split import complete
from lorafit.errors import (
    AdapterError,
    BaseError,
    DataError,
    InputError,
    Interrupted,
    NotServedError,
    RunError,
    SettingsError,
    TargetError,
)
from lorafit.evaluation.classes import class_scores, compare_classes
from lorafit.generation.greedy import generate
from lorafit.heads import head_for
from lorafit.jobs.chat import Chat
from lorafit.jobs.classify import run_classifying
from lorafit.jobs.evaluate import run_evaluation
from lorafit.jobs.listener import Silent
from lorafit.jobs.refine import run_refining
from lorafit.jobs.show import shown
from lorafit.jobs.train import run_training
from lorafit.jobs.trim import cut, run_trimming
from lorafit.planning import decide
from lorafit.report.page import write_report
from lorafit.report.words import terms
from lorafit.server import classifiers, keys
from lorafit.server.address import hosts_of
from lorafit.server.app import make_classifier_app
from lorafit.server.classifiers import ClassifierService
from lorafit.server.run import TimedProtocol
from lorafit.server.store import Store
from lorafit.serving import Engine
from lorafit.serving.pool import Pool
from lorafit.settings import TrainSettings, settings_from
from lorafit.tasks.classification import Classification, LabelledRow, LabelRenderer, balanced, classify, labelled_rows
from lorafit.tasks.runner import Runner
from lorafit.tasks.task import PLAIN
from lorafit.testing import random_adapter
from lorafit.training.loop import Moment
from lorafit.variants import VARIANTS

# PEFT 0.21.2 asks transformers 5 for a property by its old name when it prepares a model.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

LABELS = ("billing", "other", "shipping")
ROUNDING = 1e-4  # relative, of a gradient in fp32 whose sums are taken in another order
SIZES: dict[str, Any] = {
    "vocab_size": 261,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 256,
}
DISTIL: dict[str, Any] = {"vocab_size": 261, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2}


def seeded(make: Callable[[], PreTrainedModel]) -> PreTrainedModel:
    torch.manual_seed(0)
    return make().eval()


FAMILIES: dict[str, Callable[[], PreTrainedModel]] = {
    "llama": tiny_llama,
    "gpt2": tiny_gpt2,
    "bert": lambda: seeded(lambda: BertModel(BertConfig(**SIZES))),
    "distilbert": lambda: seeded(lambda: DistilBertModel(DistilBertConfig(**DISTIL, pad_token_id=256))),
    "roberta": lambda: seeded(lambda: RobertaModel(RobertaConfig(**SIZES))),
}
EVERY_FAMILY = pytest.mark.parametrize("family", FAMILIES)
Folders = Callable[[str], Path]


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Folders:
    """The folder of a tiny base of each family, as its body is saved."""
    root = tmp_path_factory.mktemp("bases")

    def folder(family: str) -> Path:
        if not (root / family).exists():
            FAMILIES[family]().save_pretrained(root / family)
            byte_tokenizer().save_pretrained(root / family)
        return root / family

    return folder


Opened = Callable[[str], Base]


@pytest.fixture(scope="session")
def opened(folders: Folders) -> Opened:
    return lambda family: open_base(folders(family), torch.float32, labels=len(LABELS))


def plan_of(base: Base, variant: str = "lora", rank: int = 3) -> Plan:
    rows: list[Row] = [row(base, "some text")]
    return decide(base, rows, TrainSettings(variant=variant, rank=rank)).plan


def task_of(base: Base, weights: tuple[float, ...] = ()) -> Classification:
    return Classification(replace(LabelRenderer.of(base, LABELS).classes, weights=weights))


def row(base: Base, text: str, label: int = 0) -> LabelledRow:
    ids = tuple(base.tokenizer(text)["input_ids"])
    return LabelledRow(ids, (*[False] * (len(ids) - 1), True), 0, label=label)


TEXTS = ("a card was charged", "late", "where is my parcel, please?", "a dog", "no street of that name is here")


def rows_of(base: Base) -> list[Row]:
    return [replace(row(base, text, i % 3), example=i) for i, text in enumerate(TEXTS)]


def logits_of(base: Base, rows: Sequence[Row]) -> Tensor:
    task = task_of(base)
    with torch.no_grad():
        return task.body(base, task.batch(base, rows, PLAIN), PLAIN)


def moved(base: Base, variant: str = "lora") -> Adapter:
    """Of every site and the head, all of it away from its start."""
    classes = task_of(base).classes
    return replace(random_adapter(base, plan_of(base, variant), size=0.2), classes=classes)


# PEFT as the oracle


@EVERY_FAMILY
@pytest.mark.parametrize("variant", VARIANTS)
def test_peft_computes_the_same_with_the_folder(
    opened: Opened, folders: Folders, tmp_path: Path, family: str, variant: str
) -> None:
    base = opened(family)
    adapter, rows = moved(base, variant), rows_of(base)
    bare = logits_of(base, rows)
    with attach(base, adapter):
        ours = logits_of(base, rows)
    peft.write(adapter, tmp_path / "adapter")
    model = AutoModelForSequenceClassification.from_pretrained(
        folders(family), num_labels=len(LABELS), pad_token_id=task_of(base).classes.pad
    )
    theirs = PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()
    config = PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert (config.task_type, config.modules_to_save) == ("SEQ_CLS", list(base.head))
    batch = task_of(base).batch(base, rows, PLAIN)
    with torch.no_grad():
        found = theirs(input_ids=batch.ids, attention_mask=batch.mask).logits
    assert (found - ours).abs().max() <= 1e-4
    assert (found - bare).abs().max() >= 1e-2


@EVERY_FAMILY
def test_what_is_read_back_is_what_was_written(opened: Opened, tmp_path: Path, family: str) -> None:
    adapter = moved(opened(family))
    peft.write(adapter, tmp_path / "adapter")
    again = peft.read(tmp_path / "adapter")
    assert (again, again.classes, again.plan) == (adapter, adapter.classes, adapter.plan)


def test_labels_in_another_order_are_another_adapter(opened: Opened) -> None:
    adapter = moved(opened("bert"))
    assert adapter.classes is not None
    other = replace(adapter, classes=replace(adapter.classes, labels=tuple(reversed(LABELS))))
    assert other != adapter


# The base


@EVERY_FAMILY
def test_attached_fresh_only_the_head_is_new(opened: Opened, family: str) -> None:
    """With the base's own head, which is zero, in place of the one that was drawn, its bits are those of the base."""
    base = opened(family)
    start, rows = fresh(base, plan_of(base), 0), rows_of(base)
    bare = logits_of(base, rows)
    own = {
        f"{one.path}.{name}": base.model.get_parameter(f"{one.path}.{name}")
        for one in start.plan.whole
        for name, _ in one.parameters
    }
    with attach(base, replace(start, tensors={**start.tensors, **own})):
        assert torch.equal(logits_of(base, rows), bare)
    with attach(base, start) as attached:
        assert not torch.equal(logits_of(base, rows), bare)
        with attached.off():
            assert torch.equal(logits_of(base, rows), bare)


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_its_identity_is_that_of_the_same_folder_as_a_language_model(
    opened: Opened, folders: Folders, family: str
) -> None:
    assert opened(family).identity == open_base(folders(family), torch.float32).identity


def test_opened_twice_it_is_the_same_in_every_bit(opened: Opened) -> None:
    assert opened("distilbert").integrity() == opened("distilbert").integrity()


@EVERY_FAMILY
def test_merged_it_computes_what_it_does_attached(opened: Opened, family: str) -> None:
    base = opened(family)
    adapter, rows = moved(base), rows_of(base)
    with attach(base, adapter):
        attached = logits_of(base, rows)
    task = task_of(base)
    batch = task.batch(base, rows, PLAIN)
    base.model.config.pad_token_id = task.classes.pad
    with torch.no_grad():
        found = torch.func.functional_call(
            base.model, merged(base, adapter), kwargs={"input_ids": batch.ids, "attention_mask": batch.mask}
        ).logits
    assert (found - attached).abs().max() <= 1e-4


def test_roberta_counts_positions_from_behind_its_padding(opened: Opened) -> None:
    """512 positions of which the first 257 stand for padding: a text of 255 tokens is read, and no longer one."""
    base = opened("roberta")
    assert base.context == 255
    assert logits_of(base, [row(base, "a" * 255)]).isfinite().all()


# The step


def gradient(base: Base, rows: Sequence[Row], parts: Sequence[Sequence[int]] | None, **settings: Any) -> Tensor:
    state = TrainState(moved(base))
    runner = Runner.of(base, rows, task_of(base, **settings))
    with runner.training(state):
        runner.gradient_of(rows, parts)
    assert state.master.grad is not None
    return state.master.grad


@EVERY_FAMILY
def test_a_gradient_does_not_depend_on_how_the_step_is_divided_or_padded(opened: Opened, family: str) -> None:
    base = opened(family)
    rows = rows_of(base)
    whole = gradient(base, rows, [range(5)])
    for parts in ([[0, 1], [2, 3, 4]], [[i] for i in range(5)], [[4, 0], [3, 1, 2]]):
        assert (gradient(base, rows, parts) - whole).norm() <= ROUNDING * whole.norm()


@EVERY_FAMILY
@pytest.mark.parametrize("variant", ["lora", "pissa"])
def test_a_head_computes_in_the_dtype_of_its_base(folders: Folders, family: str, variant: str) -> None:
    """Its bias and norms too: a pair's vectors stay in fp32."""
    base = open_base(folders(family), torch.bfloat16, labels=3)
    rows = rows_of(base)
    state = TrainState(fresh(base, plan_of(base, variant), 0))
    with Runner.of(base, rows, task_of(base)).training(state):
        assert math.isfinite(Runner.of(base, rows, task_of(base)).gradient_of(rows))
    assert state.master.grad is not None and state.master.grad.abs().max() > 0


def test_a_head_is_no_target(opened: Opened) -> None:
    base = opened("bert")
    with pytest.raises(TargetError):
        decide(base, rows_of(base), settings_from({"targets": ("classifier",)}))
    plan = decide(base, rows_of(base), settings_from({"targets": ("*",), "rank": 2})).plan
    assert not {slot.site.path for slot in plan.slots} & {one.path for one in plan.whole}


def test_weights_give_the_weighted_mean_of_the_loss(opened: Opened) -> None:
    """By hand: every label weighs n / (labels · examples of it), so that the mean has weight 1 an example."""
    base = opened("bert")
    weights = balanced(LABELS, [example(text, LABELS[i % 3]) for i, text in enumerate(TEXTS)])
    assert weights == pytest.approx((5 / 6, 5 / 6, 5 / 3))
    rows, labels = rows_of(base)[:3], [0, 1, 2]  # a step whose weights do not add up to its rows
    task = task_of(base, weights=weights)
    adapter = moved(base)
    with attach(base, adapter):
        likely = logits_of(base, rows).softmax(-1)
    nll = [-math.log(float(likely[i, k])) for i, k in enumerate(labels)]
    by_hand = sum(weights[k] * value for k, value in zip(labels, nll, strict=True)) / sum(weights[k] for k in labels)
    state = TrainState(adapter)
    runner = Runner.of(base, rows, task)
    with runner.training(state):
        assert runner.gradient_of(rows, [[0, 1], [2]]) == pytest.approx(by_hand, rel=1e-5)
    with attach(base, adapter):
        assert runner.nll(rows) == pytest.approx([weights[k] * value for k, value in enumerate(nll)], rel=1e-5)


def test_labels_with_weights_are_validated_and_tested_by_them(opened: Opened) -> None:
    """Every label counts alike, so the best guess that reads nothing is a guess at random."""
    base = opened("bert")
    examples = [example(text, LABELS[i % 3]) for i, text in enumerate(TEXTS)]
    weights = balanced(LABELS, examples)
    adapter = replace(moved(base), classes=task_of(base, weights).classes)
    rows = labelled_rows(LabelRenderer.of(base, LABELS), examples, 100)
    found = compare_classes(Runner.of(base, rows, task_of(base, weights)), adapter, examples, rows, known=examples)
    with attach(base, adapter):
        plain = Runner.of(base, rows, task_of(base)).nll(rows)
    by_hand = [(weights[i % 3] * math.log(3), weights[i % 3] * value) for i, value in enumerate(plain)]
    assert [one for pair in found.nll_of_each for one in pair] == pytest.approx([one for p in by_hand for one in p])
    assert found.classes and found.classes.weighted and found.classes.learnt_from == len(examples)
    said = terms(summary_with(classes=asdict(found.classes)))
    assert said.rival == "a guess that reads no text" and "most frequent label" in said.base
    assert said.nll == "NLL of the labels, nats per text, labels weighing alike"
    some = examples[:2]  # of another mix of labels: a guess is still a guess
    few = compare_classes(Runner.of(base, rows[:2], task_of(base, weights)), adapter, some, rows[:2], known=examples)
    assert few.nll.base == pytest.approx(math.log(3))
    assert Classes.from_json(adapter.classes.to_json()) == adapter.classes  # type: ignore[union-attr]


@pytest.mark.parametrize("weights", [[1.0], [1.0, -1.0, 1.0], [1, 2, 3], "abc", [1.0, 2.0, float("nan")]])
def test_damaged_weights_are_refused(weights: Any) -> None:
    with pytest.raises(TypeError, match=r"classes\.weights"):
        Classes.from_json({"labels": list(LABELS), "pad": 0, "weights": weights})


def example(text: str, label: str | None) -> Example:
    return Example((Message("user", text), Message("assistant", label or "")), "data:1", label=label)


# Scores


def test_scores_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="an oracle: pip install scikit-learn")
    generator = torch.Generator().manual_seed(3)
    likely = (2 * torch.randn(200, 5, generator=generator)).softmax(-1)
    likely[:, 4] = 0  # a label that is never given, and one that no example has
    truth = [label if label != 3 else 4 for label in torch.randint(0, 5, (200,), generator=generator).tolist()]
    given = likely.argmax(-1).tolist()
    found = class_scores(Classes(tuple("abcde"), 0), truth, likely)
    precision, recall, f1, n = metrics.precision_recall_fscore_support(truth, given, labels=range(5), zero_division=0)
    assert found.accuracy == pytest.approx(metrics.accuracy_score(truth, given))
    assert found.macro_f1 == pytest.approx(metrics.f1_score(truth, given, average="macro"))
    assert [one.precision or 0 for one in found.per_label] == pytest.approx(precision)
    assert [one.recall or 0 for one in found.per_label] == pytest.approx(recall)
    assert [one.f1 for one in found.per_label] == pytest.approx(f1)
    assert [one.n for one in found.per_label] == list(n)
    assert found.confusion is not None
    assert [list(line) for line in found.confusion] == metrics.confusion_matrix(truth, given, labels=range(5)).tolist()
    assert (found.per_label[4].precision, found.per_label[3].recall) == (None, None)


def test_the_calibration_error_is_that_by_hand() -> None:
    """Bins of a tenth: 0.62 and 0.68, one right of two; 0.95, right. (2·|0.65 − 0.5| + 1·|0.95 − 1|) / 3."""
    likely = torch.tensor([[0.62, 0.38], [0.32, 0.68], [0.95, 0.05]])
    found = class_scores(Classes(("a", "b"), 0), [0, 0, 0], likely)
    assert found.calibration_error == pytest.approx((2 * 0.15 + 0.05) / 3)
    assert [(one.n, one.right) for one in found.bins] == [(2, 0.5), (1, 1.0)]


def test_of_many_labels_no_matrix_is_kept() -> None:
    many = tuple(map(str, range(61)))
    assert class_scores(Classes(many, 0), [0, 1], torch.eye(61)[:2]).confusion is None
    assert class_scores(Classes(many[:60], 0), [0, 1], torch.eye(60)[:2]).confusion is not None


# A whole run

SETTINGS: dict[str, Any] = {
    "task": "classification",
    "dtype": "fp32",
    "search": "none",
    "rank": 4,
    "batch_size": 4,
    "learning_rate": 0.005,
    "epochs": 4.0,
    "val_share": 0.25,
}


def voices(n: int = 96) -> list[dict[str, object]]:
    """Letters, every second line in capitals: what a tiny base can tell apart."""
    draw, rows = random.Random(1), []
    for i in range(n):
        text = "".join(draw.choice("abcdefghijklm nopqrstuvwxyz") for _ in range(draw.randint(6, 14)))
        rows.append({"text": text.upper() if i % 2 else text, "label": ("calm", "loud")[i % 2]})
    return rows


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "voices.jsonl", voices())


@pytest.fixture(scope="session")
def finished(folders: Folders, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A whole run of a base that writes nothing, with the check by PEFT."""
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, run_training(folders("bert"), data, out, SETTINGS)


@pytest.fixture
def copied(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> Path:
    return Path(copytree(finished[0], tmp_path / "run"))


def test_it_learns(finished: tuple[Path, dict[str, Any]]) -> None:
    summary = finished[1]
    assert summary["classes"]["accuracy"] > 0.9
    assert summary["counts"]["right"]["most_frequent"]["share"] <= 0.6
    assert summary["nll"]["ci95"][1] < 0
    assert summary["base_unchanged"]
    assert summary["passed_over"] == {}
    assert summary["peft"]["max_logit_difference"] <= 1e-4


def test_a_run_that_was_stopped_ends_in_the_same_bits(
    finished: tuple[Path, dict[str, Any]], folders: Folders, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafit.jobs.train.compare_with_peft", lambda *_: None)
    with pytest.raises(Interrupted):
        run_training(folders("bert"), data, tmp_path / "run", SETTINGS, listener=Stopping())
    assert not (tmp_path / "run" / "adapter").exists()
    summary = run_training(None, None, tmp_path / "run", {}, resume=True)
    assert read_adapter(tmp_path / "run" / "adapter") == read_adapter(finished[0] / "adapter")
    assert summary["classes"] == finished[1]["classes"]


def test_a_run_that_weighs_its_labels_and_was_begun_by_another_version_says_how_to_end_it(
    folders: Folders, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The versions before weights were part of what a classifier is: the task was the labels and the padding."""
    monkeypatch.setattr("lorafit.jobs.train.compare_with_peft", lambda *_: None)
    out = tmp_path / "run"
    with pytest.raises(Interrupted):
        run_training(folders("bert"), data, out, {**SETTINGS, "label_weights": "balanced"}, listener=Stopping())
    file = out / "checkpoints" / "last.safetensors"
    with safe_open(file, framework="pt") as opened:
        progress = json.loads(opened.metadata()["progress"])
        tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (not a dict)
    task = json.loads(progress["run"]["task"])
    assert task["classes"].pop("weights")
    progress["run"] |= {"task": json.dumps(task), "start": "2:" + "0" * 64}
    save_file(tensors, file, {"progress": json.dumps(progress)})
    with pytest.raises(RunError) as caught:
        run_training(None, None, out, {}, resume=True)
    first, *differing, last = str(caught.value).split("\n")
    assert "saved by another version of lorafit, or with another adapter, although" in first
    assert [line.split(":")[0].strip() for line in differing] == ["task", "start"]
    assert last == "end it with that version, or with that adapter, or start again with another --out"


def test_a_finished_run_that_weighed_its_labels_only_in_training_is_not_refined_or_trimmed(
    copied: Path, tmp_path: Path
) -> None:
    run = json.loads((copied / "run.json").read_text(encoding="utf-8"))
    weighed = {**run, "settings": {**run["settings"], "label_weights": "balanced"}}
    (copied / "run.json").write_text(json.dumps(weighed), encoding="utf-8")
    for again in (lambda: run_refining(copied), lambda: run_trimming(copied, tmp_path / "small")):
        with pytest.raises(RunError, match=r"weighted its labels in another way, .*: train again with another --out"):
            again()


class Stopping(Silent):
    """Ctrl-C at the second moment that is told."""

    def __init__(self) -> None:
        self.moments = 0

    def moment(self, moment: Moment) -> None:
        self.moments += 1
        if self.moments == 2:
            signal.raise_signal(signal.SIGINT)


def test_evaluated_on_the_same_texts_it_has_the_same_scores(
    finished: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    held_out = prepare(str(data), settings_from(SETTINGS), Silent())[0].test
    rows = [{"text": e.messages[-2].text, "label": e.label} for e in held_out]
    found = run_evaluation(None, finished[0], write_rows(tmp_path / "test.jsonl", rows), {"dtype": "fp32"})
    assert found["classes"] == finished[1]["classes"]
    assert found["base_unchanged"]


def test_it_is_trimmed_by_half_and_keeps_its_head(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    found = cut(finished[0], "50%", tmp_path / "half")
    kept = finished[0] / "ladder" / "whole"
    whole, half = read_adapter(kept if kept.exists() else finished[0] / "adapter"), read_adapter(tmp_path / "half")
    assert found["parameters"] < 0.75 * whole.plan.parameters
    assert (half.classes, half.plan.whole) == (whole.classes, whole.plan.whole)
    heads = [f"{one.path}.{name}" for one in whole.plan.whole for name, _ in one.parameters]
    assert heads and all(torch.equal(half.tensors[key], whole.tensors[key]) for key in heads)


def test_its_ladder_is_climbed_again_with_the_same_answer(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    found = run_trimming(finished[0], tmp_path / "small")
    assert found["chosen"] == finished[1]["ladder"]["chosen"]


def test_a_round_of_refining_runs(copied: Path) -> None:
    found = run_refining(copied)
    assert read_adapter(copied / "adapter").classes is not None
    assert found


def test_it_is_shown_and_reported(copied: Path) -> None:
    facts = shown(copied / "adapter")
    assert (facts["kind"], facts["labels"]) == ("adapter", "calm, loud")
    assert shown(copied)["state"] == "finished"
    page = write_report(copied, copied / "again.html").read_text(encoding="utf-8")
    assert "</html>" in page


# Bad input


def refused(folders: Folders, data: Path, tmp_path: Path, **settings: Any) -> str:
    """What a run says that is refused; it has opened no base and written nothing."""
    with pytest.raises(InputError) as caught:
        own = {key: value for key, value in SETTINGS.items() if key != "val_share" or data.is_file()}
        run_training(folders("bert"), data, tmp_path / "run", {**own, **settings})
    assert not (tmp_path / "run").exists()
    return str(caught.value)


def splits(tmp_path: Path, **more: list[dict[str, object]]) -> Path:
    """A folder of three splits, with more rows in some."""
    rows = voices(48)
    for name, own in {"train": rows[:32], "valid": rows[32:40], "test": rows[40:]}.items():
        write_rows(tmp_path / "splits" / f"{name}.jsonl", own + more.get(name, []))
    return tmp_path / "splits"


def test_labels_that_training_lacks_are_all_named(folders: Folders, tmp_path: Path) -> None:
    odd: list[dict[str, object]] = [{"text": "hums along", "label": "hum"}, {"text": "sings high", "label": "song"}]
    data = splits(tmp_path, valid=odd[:1], test=odd[1:])
    said = refused(folders, data, tmp_path)
    advice = "correct it, or add examples of it to training"
    assert f"valid.jsonl:9: has label 'hum', which no training example has: {advice}" in said
    assert f"test.jsonl:9: has label 'song', which no training example has: {advice}" in said


def test_with_one_label_there_is_nothing_to_tell_apart(folders: Folders, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "one.jsonl", [{**one, "label": "calm"} for one in voices(48)])
    said = refused(folders, data, tmp_path)
    assert "one.jsonl:5: all training examples have the label 'calm'" in said
    assert said.endswith("add examples of another label")


def test_conversations_are_no_texts_with_labels(folders: Folders, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "talk.jsonl", capitals())
    said = refused(folders, data, tmp_path)
    assert said.startswith("24 problems in the data")
    assert (
        "talk.jsonl:1: has no label, but a classifier needs one" in said
        and "--task completion and a causal language model" in said
    )


def test_an_empty_text_is_named_by_its_line(folders: Folders, tmp_path: Path) -> None:
    data = write_rows(tmp_path / "empty.jsonl", [*voices(48), {"text": "", "label": "calm"}])
    assert "empty.jsonl:49" in refused(folders, data, tmp_path)


def test_a_text_that_is_too_long_is_named_by_its_line(folders: Folders, tmp_path: Path) -> None:
    data = splits(tmp_path, test=[{"text": "x" * 600, "label": "calm"}])
    assert "test.jsonl:9: has 600 tokens: this base reads at most 512" in refused(folders, data, tmp_path)


@pytest.mark.parametrize(
    ("setting", "value"),
    [("system", "You sort."), ("template", ["a=1"]), ("few_shot", 5), ("general", "x"), ("routing_questions", 0)],
)
def test_what_does_nothing_for_a_classifier_is_refused_where_it_is_set(
    folders: Folders, data: Path, tmp_path: Path, setting: str, value: Any
) -> None:
    said = refused(folders, data, tmp_path, **{setting: value})
    assert said == f"--{setting.replace('_', '-')}: does nothing for a classifier: leave it out"


def test_weights_of_labels_do_nothing_for_a_language_model(folders: Folders, data: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--label-weights: does nothing for a language model: leave it out"):
        run_training(folders("llama"), data, tmp_path / "run", {"label_weights": "balanced"})


def test_few_shot_is_refused_where_a_classifier_is_scored(finished: tuple[Path, dict[str, Any]], data: Path) -> None:
    with pytest.raises(SettingsError, match="--few-shot: does nothing for a classifier"):
        run_evaluation(None, finished[0], data, {"few_shot": 5})


def test_a_family_without_a_classifier_is_refused(folders: Folders, data: Path, tmp_path: Path) -> None:
    base = Path(copytree(folders("llama"), tmp_path / "mamba"))
    config = json.loads((base / "config.json").read_text(encoding="utf-8"))
    config |= {"model_type": "mamba", "architectures": ["MambaForCausalLM"]}
    (base / "config.json").write_text(json.dumps(config), encoding="utf-8")
    with pytest.raises(BaseError, match=r"holds MambaForCausalLM, of which no classifier of texts is made"):
        run_training(base, data, tmp_path / "run", SETTINGS)


def test_an_encoder_is_no_language_model_and_is_told_what_trains_it(
    folders: Folders, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(BaseError, match="no causal language model; with texts and labels, --task classification"):
        run_training(folders("bert"), data, tmp_path / "run", {"task": "completion"})


def test_an_encoder_is_a_classifier_by_itself(folders: Folders) -> None:
    assert head_for("auto", str(folders("bert"))).name == "classification"
    assert head_for("auto", str(folders("llama"))).name == "completion"


def test_the_last_example_of_a_label_stays_in_training() -> None:
    """As good as at random, it would be held out in two runs of five, and then the run refused."""
    for i in range(20):
        rare = [example(f"the one and only number {i}", "rare")]
        rows = [example(f"{one['text']} {i}", str(one["label"])) for one in voices(40)] + rare
        rows = [replace(one, where=f"data:{k}") for k, one in enumerate(rows)]
        found = complete(Examples(tuple(rows)), 0.2)
        assert rare[0].messages in [one.messages for one in found.train]
        assert (len(found.valid), len(found.test)) == (8, 8)


def test_where_every_label_is_of_one_example_they_are_answers_and_are_held_out_as_ever() -> None:
    rows = tuple(
        replace(example(str(one["text"]), f"label {k}"), where=f"data:{k}") for k, one in enumerate(voices(40))
    )
    found = complete(Examples(rows), 0.2)
    assert (len(found.valid), len(found.test)) == (8, 8)


def test_labels_that_differ_in_blanks_and_a_label_of_one_example_are_remarked(tmp_path: Path) -> None:
    rows = [*voices(20), {"text": "a", "label": "very calm"}, {"text": "b c", "label": "verycalm"}]
    rows += [{"text": "d e f", "label": "very calm"}, {"text": "g h", "label": "alone"}]
    found = describe(read_examples(write_rows(tmp_path / "rows.jsonl", rows)))
    remarks = {one.what: (one.examples, one.first.rpartition(":")[2]) for one in found.remarks}
    assert remarks["have a label that differs from a more frequent one only in case or spaces"] == (1, "22")
    assert remarks["have a label that no other example has"] == (1, "24")


def test_thousands_of_labels_are_scored_in_lists_that_stay_short() -> None:
    names = tuple(f"label {i}" for i in range(3000))
    truth = [i % 3000 for i in range(6000)]
    likely = torch.zeros(6000, 3000)
    likely[range(6000), truth] = 1
    began = time.monotonic()
    found = class_scores(Classes(names, 0), truth, likely)
    assert (found.accuracy, found.macro_f1, found.confusion) == (1.0, 1.0, None)
    assert time.monotonic() - began < 10


# A classifier where text is asked for


@pytest.mark.parametrize("verb", ["chat", "route"])
def test_a_verb_that_wants_text_refuses_it_before_a_base_is_opened(
    finished: tuple[Path, dict[str, Any]], verb: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafit.bases.base.open_base", lambda *_: pytest.fail("a base was opened"))
    run = str(finished[0])
    given = {"chat": [run], "route": ["A text.", f"voice={run}"]}[verb]
    done = CliRunner().invoke(app, [verb, *given])
    assert done.exit_code == 2
    assert "is a classifier, which gives a text one of its labels and writes none" in " ".join(done.output.split())


def test_the_pool_and_chat_refuse_its_folder(finished: tuple[Path, dict[str, Any]], tiny_base: Base) -> None:
    with pytest.raises(AdapterError, match="is a classifier"):
        Pool(tiny_base, 1 << 20, 1 << 20).add("voice", finished[0])
    with pytest.raises(AdapterError, match="is a classifier"):
        Chat(tiny_base).add(finished[0])


def test_in_a_folder_of_adapters_it_is_passed_over_with_the_reason(
    finished: tuple[Path, dict[str, Any]], tiny_base: Base, tmp_path: Path
) -> None:
    said: list[str] = []
    copytree(finished[0] / "adapter", tmp_path / "adapters" / "voice")
    with Engine(tiny_base, slots=1, timed=False) as engine:
        store = Store(engine, tmp_path / "adapters", said.append, lambda name: None)
        store.look()
        store.look()  # what has not changed since it was seen first is whole
        store.close()
        assert engine.adapters.listed() == []
    assert any("is a classifier" in line for line in said), said


def test_neither_the_engine_nor_an_adapter_in_memory_is_a_way_around(opened: Opened, tiny_base: Base) -> None:
    base = opened("llama")
    with pytest.raises(NotServedError, match="it is open as a classifier: open it without labels"):
        Engine(base)
    with pytest.raises(AdapterError, match="is a classifier"):
        Pool(tiny_base, 1 << 20, 1 << 20).add("voice", moved(base))


# Data seen by a base


def test_data_are_shown_as_an_encoder_sees_them(folders: Folders, data: Path) -> None:
    done = CliRunner().invoke(app, ["data", str(data), "--base", str(folders("bert"))])
    assert done.exit_code == 0, done.output
    assert " label: " in done.output and "train: " in done.output, done.output


# Labels that change


def relabelled(data: Path, tmp_path: Path) -> Path:
    rows = [json.loads(line) for line in data.read_text(encoding="utf-8").splitlines()]
    return write_rows(tmp_path / "other.jsonl", [{**one, "label": f"very {one['label']}"} for one in rows])


def test_a_run_is_not_resumed_on_other_labels(copied: Path, data: Path, tmp_path: Path) -> None:
    (copied / "summary.json").unlink()
    with pytest.raises(RunError, match="data"):
        run_training(None, relabelled(data, tmp_path), copied, {}, resume=True)


def test_scored_on_other_labels_every_line_is_named(
    finished: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    with pytest.raises(DataError) as caught:
        run_evaluation(None, finished[0], relabelled(data, tmp_path), {"dtype": "fp32"})
    assert len(caught.value.problems) == len(voices())
    assert "other.jsonl:1: has label 'very calm', which no training example has" in str(caught.value)


def test_labels_in_another_order_are_not_compared(
    finished: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    adapter = read_adapter(finished[0] / "adapter")
    assert adapter.classes is not None
    other = replace(adapter, classes=replace(adapter.classes, labels=("loud", "calm")))
    peft.write(other, tmp_path / "other")
    with pytest.raises(AdapterError, match="has them in another order"):
        run_evaluation(None, finished[0], data, {"dtype": "fp32"}, against=tmp_path / "other")


# New texts


NEW = [{"id": 7, "text": "hello there"}, {"id": 8, "text": "GOOD MORNING"}, {"id": 9, "text": "quiet, please"}]


def labels_of_file(path: Path) -> list[dict[str, Any]]:
    if path.suffix == ".csv":
        with path.open(encoding="utf-8", newline="") as file:
            return list(csv.DictReader(file))
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def test_new_texts_get_the_labels_that_python_gives_them(
    finished: tuple[Path, dict[str, Any]], folders: Folders, tmp_path: Path
) -> None:
    out = tmp_path / "labels.jsonl"
    found = run_classifying(finished[0], write_rows(tmp_path / "new.jsonl", NEW), {"dtype": "fp32"}, out=out)
    rows = labels_of_file(out)
    base = open_base(folders("bert"), torch.float32, labels=2)
    likely = classify(base, read_adapter(finished[0]), [str(one["text"]) for one in NEW])
    assert [{key: row[key] for key in ("id", "text")} for row in rows] == NEW
    assert [row["predicted"] for row in rows] == [("calm", "loud")[i] for i in likely.argmax(-1).tolist()]
    assert [row["confidence"] for row in rows] == pytest.approx(likely.max(-1).values.tolist(), abs=1e-5)
    shares = [row["probabilities"] for row in rows]
    assert [one["loud"] for one in shares] == pytest.approx(likely[:, 1].tolist(), abs=1e-5)
    assert (found["n"], sum(found["labels"].values()), found["out"]) == (3, 3, str(out))


@pytest.mark.parametrize(
    ("name", "content", "columns"),
    [
        ("new.csv", 'id,review\n7,hello there\n8,"GOOD MORNING ALL"\n', ["text=review"]),
        ("new.csv", 'id,head,review\n7,hello,there\n8,GOOD,"MORNING"\n', ["text={head} {review}"]),
        ("new.txt", "hello there\n\nGOOD MORNING\n", []),
    ],
)
def test_a_file_of_any_form_is_classified_with_its_columns_kept(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, name: str, content: str, columns: list[str]
) -> None:
    (tmp_path / name).write_text(content, encoding="utf-8")
    given = [part for one in columns for part in ("--columns", one)]
    out = tmp_path / "labels.csv"
    done = CliRunner().invoke(
        app, ["classify", str(finished[0]), str(tmp_path / name), *given, "--dtype", "fp32", "--out", str(out)]
    )
    assert done.exit_code == 0, done.output
    rows = labels_of_file(out)
    assert [row["predicted"] for row in rows] == ["calm", "loud"]
    assert all(0.5 <= float(row["confidence"]) <= 1 for row in rows)
    kept = content.splitlines()[0].split(",") if name.endswith(".csv") else ["text"]
    assert list(rows[0]) == [*kept, "predicted", "confidence"]
    assert f"2 labels written to {out}" in " ".join(done.output.split())


def test_without_a_file_to_write_only_the_table_goes_to_stdout(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    texts = write_rows(tmp_path / "new.jsonl", NEW)
    given = ["classify", str(finished[0]), str(texts), "--dtype", "fp32"]
    done = CliRunner().invoke(app, given)
    assert done.exit_code == 0, done.output
    rows = list(csv.DictReader(done.stdout.splitlines()))
    assert [row["id"] for row in rows] == ["7", "8", "9"]
    found = json.loads(CliRunner().invoke(app, [*given, "--json"]).stdout)
    assert [row["predicted"] for row in found["texts"]] == [row["predicted"] for row in rows]


def test_texts_that_cannot_be_labelled_are_named_by_line_and_nothing_is_written(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    texts = write_rows(tmp_path / "new.jsonl", [*NEW, {"text": "x" * 600}, {"text": " "}, {"other": 1}])
    out = tmp_path / "labels.jsonl"
    with pytest.raises(DataError) as caught:
        run_classifying(finished[0], texts, {"dtype": "fp32"}, out=out)
    assert [one.where for one in caught.value.problems] == [f"{texts}:5: text", f"{texts}:6: text"]
    short = write_rows(tmp_path / "short.jsonl", [*NEW, {"text": "x" * 600}])
    with pytest.raises(DataError, match=r"short.jsonl:4: has 600 tokens: this base reads at most 512"):
        run_classifying(finished[0], short, {"dtype": "fp32"}, out=out)
    assert not list(tmp_path.glob("*labels*"))
    found = run_classifying(finished[0], texts, {"dtype": "fp32", "skip_bad": True}, out=out)
    assert (found["n"], found["left_out"]) == (3, 3)
    assert [row["id"] for row in labels_of_file(out)] == [7, 8, 9]


def test_what_cannot_be_labelled_or_written_is_refused_before_a_base_is_opened(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafit.jobs.classify.opened_base", lambda *_, **__: pytest.fail("a base was opened"))
    texts = write_rows(tmp_path / "new.jsonl", NEW)
    odd = write_rows(tmp_path / "odd.jsonl", [{"text": "a", "confidence": 1}])
    other = write_rows(tmp_path / "other.jsonl", [{"review": "a"}])
    (tmp_path / "there.csv").write_text("mine", encoding="utf-8")
    writes = tmp_path / "writes"
    copytree(Path(__file__).parent / "adapters_of_format_1" / "lora", writes)
    for adapter, data, out, said in (
        (finished[0], texts, "labels.xlsx", r"labels.xlsx: .*end its name in .csv or .jsonl"),
        (finished[0], texts, "there.csv", "there.csv: is there already, and would be lost"),
        (finished[0], odd, "a.csv", "odd.jsonl: has a column 'confidence', which the result would replace: rename it"),
        (finished[0], other, "a.csv", "no column 'text': name one of its columns with --columns text=COLUMN: review"),
        (finished[0], tmp_path, "a.csv", "a folder, where a file is meant: give one file of texts"),
        (writes, texts, "a.csv", "is no classifier that lorafit trained"),
    ):
        with pytest.raises(InputError, match=said):
            run_classifying(adapter, data, out=tmp_path / out)
    with pytest.raises(SettingsError, match=r"--columns label=...: only the texts are read here"):
        run_classifying(finished[0], texts, {"columns": ["label=id"]})
    assert (tmp_path / "there.csv").read_text(encoding="utf-8") == "mine"


# Over HTTP


@contextmanager
def hosted(service: ClassifierService, keys: bool = False) -> Iterator[httpx.Client]:
    """A server of classifiers in a thread of this process."""
    app = make_classifier_app(service, hosts_of("127.0.0.1", [], keys), lambda entry: None)
    config = uvicorn.Config(app, host="127.0.0.1", port=0, http=TimedProtocol, ws="none", log_config=None)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
    try:
        with httpx.Client(base_url=url, timeout=60) as client:
            while client.get("/health").text == "loading":
                time.sleep(0.02)
            yield client
    finally:
        server.should_exit = True
        thread.join()


@pytest.fixture
def service(finished: tuple[Path, dict[str, Any]], folders: Folders) -> ClassifierService:
    def opened(labels: int) -> Base:
        return open_base(folders("bert"), torch.float32, labels=labels)

    return ClassifierService("bert", opened, {"voice": finished[0]}, say=lambda text: None)


def test_texts_are_classified_over_http_in_the_form_of_vllm(
    service: ClassifierService, finished: tuple[Path, dict[str, Any]], folders: Folders
) -> None:
    texts = ["hello there", "GOOD MORNING", "quiet, please"]
    base = open_base(folders("bert"), torch.float32, labels=2)
    likely = classify(base, read_adapter(finished[0]), texts)
    with hosted(service) as client:
        answer = client.post("/classify", json={"model": "voice", "input": texts})
        assert (answer.status_code, answer.headers["x-lorafit-adapter"]) == (200, "voice")
        found = answer.json()
        one = client.post("/classify", json={"model": "voice", "input": texts[0]}).json()
        card = client.get("/v1/models/voice").json()
        pages = client.get("/metrics").text
        assert client.get("/openapi.json").json()["paths"].keys() >= {"/classify", "/v1/models", "/health"}
    assert {"id", "object", "created", "model", "data", "usage"} == found.keys()
    assert (found["object"], found["model"], found["id"][:9]) == ("list", "voice", "classify-")
    assert [row["index"] for row in found["data"]] == [0, 1, 2]
    for row, shares in zip(found["data"], likely.tolist(), strict=True):
        assert row["probs"] == pytest.approx(shares, abs=1e-6)
        assert (row["label"], row["num_classes"]) == (("calm", "loud")[shares[1] > shares[0]], 2)
    tokens = sum(len(base.tokenizer(text)["input_ids"]) for text in texts)
    usage = {"prompt_tokens": tokens, "total_tokens": tokens, "completion_tokens": 0, "prompt_tokens_details": None}
    assert found["usage"] == usage
    assert one["data"][0]["probs"] == pytest.approx(found["data"][0]["probs"], abs=1e-5)
    assert (card["labels"], card["parent"], card["max_model_len"]) == (["calm", "loud"], "bert", 512)
    assert 'lorafit:requests_total{adapter="voice",model_name="bert"} 4.0' in pages


def test_a_request_for_labels_that_cannot_be_answered_says_why(service: ClassifierService) -> None:
    with hosted(service) as client:
        for path, body, status, said in (
            ("/classify", {"model": "voice", "input": ["a", "x" * 600]}, 400, "input[1]: has 600 tokens: this base"),
            ("/classify", {"model": "voice", "input": ["a", " "]}, 400, "text 1 is blank: give a text"),
            ("/classify", {"model": "voice", "input": []}, 400, "input"),
            ("/classify", {"model": "voice", "input": "a", "softmax": False}, 400, "softmax"),
            ("/classify", {"model": "voice", "input": "a", "truncate_prompt_tokens": 5}, 400, "not truncated"),
            ("/classify", {"model": "nobody", "input": "a"}, 404, "no model has this name"),
            ("/v1/chat/completions", {"model": "voice", "messages": []}, 404, "write none: ask /classify"),
        ):
            answer = client.post(path, json=body)
            assert answer.status_code == status, answer.text
            assert said in answer.json()["error"]["message"]
        assert client.post("/classify", json={"model": "voice", "input": "a"}).status_code == 200


def test_a_key_asks_only_the_classifiers_that_it_may_and_as_often(service: ClassifierService, tmp_path: Path) -> None:
    secret = keys.create(tmp_path / "keys.json", "one", ["infer"], ["voice"], requests=3)
    other = keys.create(tmp_path / "keys.json", "two", ["infer"], ["else"])
    keyed = replace(service, keys_file=tmp_path / "keys.json", phase="loading")
    with hosted(keyed, keys=True) as client:

        def ask(key: str, *texts: str) -> httpx.Response:
            headers = {"authorization": f"Bearer {key}"}
            return client.post("/classify", json={"model": "voice", "input": [*texts]}, headers=headers)

        assert client.post("/classify", json={"model": "voice", "input": "a"}).status_code == 401
        assert (ask(other, "a").status_code, ask(secret, "a", "b").status_code) == (404, 200)
        again = ask(secret, "a", "b")
        assert again.status_code == 429 and int(again.headers["retry-after"]) > 0


class Recorded:
    """What a service is asked to compute, by the number of rows. before: called with this number, in its thread."""

    def __init__(self, service: ClassifierService, before: Callable[[int], object] = lambda rows: None):
        self.calls: list[int] = []
        self._likely, self._before = service.likely, before
        service.likely = self  # type: ignore[method-assign]

    def __call__(self, name: str, rows: Sequence[Row]) -> list[list[float]]:
        self.calls.append(len(rows))
        self._before(len(rows))
        return self._likely(name, rows)


def until(condition: Callable[[], bool]) -> None:
    """Wait for what another thread does."""
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.01)


def asked(client: httpx.Client, *texts: str, key: str = "", timeout: float = 60) -> httpx.Response:
    headers = {"authorization": f"Bearer {key}"} if key else {}
    return client.post("/classify", json={"model": "voice", "input": [*texts]}, headers=headers, timeout=timeout)


def test_short_requests_come_between_the_parts_of_a_long_one(
    service: ClassifierService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifiers, "AT_A_TIME", 64)
    free = threading.Event()
    computed = Recorded(service, lambda rows: free.wait(20))
    texts = [chr(97 + i) * 30 for i in range(6)]  # two to a part
    with hosted(service) as client, ThreadPoolExecutor(2) as pool:
        long = pool.submit(asked, client, *texts)
        until(lambda: len(computed.calls) == 1)
        short = pool.submit(asked, client, "a")
        until(lambda: service.under_way == 2)
        time.sleep(0.2)  # it has arrived, and is to be tokenised
        free.set()
        assert (short.result().status_code, long.result().status_code) == (200, 200)
        assert computed.calls == [2, 1, 2, 2]
        rows = long.result().json()["data"]
        for row, text in zip(rows, texts, strict=True):
            assert row["probs"] == pytest.approx(asked(client, text).json()["data"][0]["probs"], abs=1e-5)


def test_texts_beyond_the_room_are_refused_for_now_and_short_ones_still_find_some(
    service: ClassifierService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifiers, "ROOM", 1000)
    free = threading.Event()
    computed = Recorded(service, lambda rows: free.wait(20))
    long = "é" * 225  # 450 bytes: within a half of the room, and a half of the rest is 275 then
    with hosted(service) as client, ThreadPoolExecutor(2) as pool:
        waiting = [pool.submit(asked, client, long)]
        until(lambda: len(computed.calls) == 1)
        refused = asked(client, long)
        assert refused.status_code == 503 and refused.headers["retry-after"] == "1", refused.text
        assert "texts of other requests wait: ask again later, or send fewer at once" in refused.text
        waiting.append(pool.submit(asked, client, "a"))
        until(lambda: service.under_way == 2)
        free.set()
        assert [one.result().status_code for one in waiting] == [200, 200]
        assert asked(client, long).status_code == 200
        assert asked(client, "x" * 501).status_code == 503
        assert asked(client, "x" * 499).status_code == 200  # also after refusals all is free again


def test_nothing_is_computed_for_a_client_that_has_gone(service: ClassifierService) -> None:
    free = threading.Event()
    computed = Recorded(service, lambda rows: free.wait(20))
    with hosted(service) as client, ThreadPoolExecutor(1) as pool:
        first = pool.submit(asked, client, "a")
        until(lambda: len(computed.calls) == 1)
        with httpx.Client(base_url=client.base_url) as other, pytest.raises(httpx.ReadTimeout):
            asked(other, "b", "c", timeout=0.5)
        free.set()
        assert first.result().status_code == 200
        until(lambda: service.under_way == 0)
        assert computed.calls == [1]
        assert 'lorafit:refused_requests_total{model_name="bert",status="499"} 1.0' in client.get("/metrics").text


def test_a_base_without_a_limit_gets_one_when_it_is_served(
    service: ClassifierService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Base, "context", None)
    monkeypatch.setattr(classifiers, "LONGEST", 100)
    with hosted(service) as client:
        refused = asked(client, "a", "x" * 101)
        assert refused.status_code == 400, refused.text
        assert "input[1]: has 101 tokens: this server reads at most 100, shorten it" in refused.text
        assert asked(client, "x" * 100).status_code == 200
        assert client.get("/v1/models/voice").json()["max_model_len"] == 100


def test_a_key_without_quota_buys_no_work_and_a_failure_costs_none(
    service: ClassifierService, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "keys.json"
    by_requests = keys.create(path, "one", ["infer"], requests=1)
    by_tokens = keys.create(path, "two", ["infer"], tokens=4)
    keyed = replace(service, keys_file=path, phase="loading")
    real, fails = keyed.rows, [True]

    def failing(rows: int) -> None:
        if fails:
            raise RuntimeError(f"{fails.pop()}: the device is lost")

    Recorded(keyed, failing)
    with hosted(keyed, keys=True) as client:
        for secret, text in ((by_requests, "a"), (by_tokens, "abcd")):
            fails[:] = [True]
            assert asked(client, text, key=secret).status_code == 500
            assert asked(client, text, key=secret).status_code == 200
            monkeypatch.setattr(keyed, "rows", lambda *_: pytest.fail("it is tokenised"))
            refused = asked(client, text, key=secret)
            assert refused.status_code == 429 and int(refused.headers["retry-after"]) > 0
            monkeypatch.setattr(keyed, "rows", real)


def test_a_request_of_more_tokens_than_a_minute_has_is_answered_when_all_are_there(
    service: ClassifierService, tmp_path: Path
) -> None:
    secret = keys.create(tmp_path / "keys.json", "one", ["infer"], tokens=4)
    keyed = replace(service, keys_file=tmp_path / "keys.json", phase="loading")
    with hosted(keyed, keys=True) as client:
        assert [asked(client, "abcdefgh", key=secret).status_code for _ in range(2)] == [200, 429]


def test_a_server_that_stops_waits_for_one_part_at_most(
    service: ClassifierService, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(classifiers, "AT_A_TIME", 8)
    computed = Recorded(service, lambda rows: service.close())  # would wait for the thread that it is called in
    with hosted(service) as client:
        stopped = asked(client, "a", "b" * 8, "c" * 8)
        assert stopped.status_code == 503 and "the server is stopping" in stopped.text
        assert stopped.headers["retry-after"] == "1"
        assert computed.calls == [1]


def test_classifiers_of_other_bases_or_numbers_of_labels_are_refused_when_the_server_starts(
    service: ClassifierService, opened: Opened, folders: Folders, tmp_path: Path
) -> None:
    peft.write(moved(opened("bert")), tmp_path / "three")
    peft.write(moved(opened("distilbert")), tmp_path / "elsewhere")
    for more, said in (
        ({"three": tmp_path / "three"}, "'voice' has 2 labels, and 'three' has 3: the base is opened for one number"),
        ({"not a name": tmp_path / "three"}, "not a name for an adapter"),
    ):
        failing = replace(service, adapters={**service.adapters, **more})
        with hosted(failing) as client:
            assert client.get("/health").text == "dead"
        assert said in str(failing.failed)
    alone = replace(
        service,
        opened=lambda labels: open_base(folders("bert"), torch.float32, labels=labels),
        adapters={"elsewhere": tmp_path / "elsewhere"},
    )
    with hosted(alone):
        assert "this adapter belongs to base" in str(alone.failed)


def test_what_serve_would_not_do_for_classifiers_is_refused_before_a_base_is_opened(
    finished: tuple[Path, dict[str, Any]], folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafit.bases.base.open_base", lambda *_: pytest.fail("a base was opened"))
    voice, writes = f"voice={finished[0]}", f"desk={Path(__file__).parent / 'adapters_of_format_1' / 'lora'}"
    for given, said in (
        ([voice, "--slots", "4", "--eight-bit"], "--slots, --eight-bit: does nothing for classifiers: leave it out"),
        ([voice, writes], "'voice' is a classifier, and 'desk' writes text: start a server for each kind"),
    ):
        done = CliRunner().invoke(app, ["serve", str(folders("bert")), *given])
        assert done.exit_code == 2
        assert said in " ".join(done.output.split())


def test_an_adapter_of_a_task_that_is_not_served_is_refused_before_a_base_is_opened(
    copied: Path, finished: tuple[Path, dict[str, Any]], folders: Folders, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafit.server.address.listening", lambda *_: pytest.fail("it listens"))
    path = copied / "adapter" / "lorafit.json"
    described = json.loads(path.read_text(encoding="utf-8"))
    described["classes"]["task"] = "regression"
    path.write_text(json.dumps(described), encoding="utf-8")
    score, voice = f"score={copied}", f"voice={finished[0]}"
    for given, said in (
        ([score], "is for the task 'regression', which writes no text"),
        (
            [voice, score],
            "'voice' is a classifier, and 'score' is for the task 'regression', which is not served: leave",
        ),
    ):
        done = CliRunner().invoke(app, ["serve", str(folders("llama" if given == [score] else "bert")), *given])
        assert done.exit_code == 2, done.output
        assert said in " ".join(done.output.split())


# From Python


@EVERY_FAMILY
def test_texts_are_classified_as_the_scores_have_them(opened: Opened, family: str) -> None:
    base = opened(family)
    adapter, rows = moved(base), rows_of(base)
    with attach(base, adapter):
        expected = logits_of(base, rows).softmax(-1)
    assert (classify(base, adapter, TEXTS) - expected).abs().max() <= 1e-5


def test_texts_that_cannot_be_classified_are_all_named(opened: Opened) -> None:
    base = opened("bert")
    with pytest.raises(DataError, match="text 2: has 600 tokens: this base reads at most 512") as caught:
        classify(base, moved(base), ["", "x" * 600, "fine"])
    assert [str(one.where) for one in caught.value.problems] == ["text 1", "text 2"]
    with pytest.raises(AdapterError, match="writes text and has no labels"):
        classify(base, replace(moved(base), classes=None), ["fine"])


def test_a_base_opened_as_a_classifier_says_what_it_is_not(opened: Opened, folders: Folders) -> None:
    base, other = opened("llama"), open_base(folders("llama"), torch.float32)
    with pytest.raises(BaseError, match="opened as a classifier, which writes no text: open it without labels"):
        generate(base, Renderer(base.tokenizer), [[1, 2]], 4)
    writes = random_adapter(other, plan_of(other))
    with pytest.raises(AdapterError, match=r"writes text, and .* was opened as a classifier: open it without labels"):
        require_fits(base, writes)


def test_a_head_of_other_labels_says_to_open_the_base_with_as_many(opened: Opened, folders: Folders) -> None:
    other = open_base(folders("bert"), torch.float32, labels=2)
    with pytest.raises(AdapterError, match=r"(?s)classifier.weight: .*open the base it was trained on with as many"):
        require_fits(other, moved(opened("bert")))
