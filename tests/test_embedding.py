"""Sentence embeddings: pairs, the laws, PEFT, scores, and a whole run."""

from __future__ import annotations

import json
import random
import signal
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, capitals, tiny_gpt2, tiny_llama, write_rows
from peft import PeftConfig, PeftModel
from transformers import AutoModel, BertConfig, BertModel
from typer.testing import CliRunner

from lorafit import read_adapter
from lorafit.adapters.adapter import Adapter
from lorafit.adapters.formats import peft
from lorafit.attachment.adapters import attach
from lorafit.bases.base import Base, open_base
from lorafit.cli import app
from lorafit.data.examples import Example, Message
from lorafit.data.reading import read_examples
from lorafit.data.targets import Pair
from lorafit.errors import AdapterError, DataError, Interrupted
from lorafit.heads import HEADS, head, head_for, opened_for, opened_with
from lorafit.heads.embedding import HEAD
from lorafit.heads.pairs import OTHERS, TEMPERATURE, Contrast, PairRow, PairTexts, compare_pairs, drawn, embed
from lorafit.heads.reading import classes_of
from lorafit.jobs.evaluate import run_evaluation
from lorafit.jobs.listener import Silent
from lorafit.jobs.refine import run_refining
from lorafit.jobs.show import shown
from lorafit.jobs.train import run_training
from lorafit.jobs.trim import cut
from lorafit.planning import decide
from lorafit.report.page import write_report
from lorafit.settings import TrainSettings
from lorafit.tasks.runner import Runner
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
    "learning_rate": 0.003,
    "epochs": 6.0,
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
    root = tmp_path_factory.mktemp("bases")

    def folder(family: str) -> Path:
        if not (root / family).exists():
            FAMILIES[family]().save_pretrained(root / family)
            byte_tokenizer().save_pretrained(root / family)
        return root / family

    return folder


def echoes(n: int = 240) -> list[dict[str, object]]:
    """A word, and its letters in capitals, which a base that was not trained does not know to belong together."""
    draw = random.Random(4)
    rows: list[dict[str, object]] = []
    for _ in range(n):
        word = "".join(draw.sample("abcdefghijkl", 5))
        rows.append({"anchor": word, "positive": word.upper()})
    return rows


def pair(anchor: str, positive: str, where: str = "data:1") -> Example:
    return Example((Message("user", anchor), Message("assistant", positive)), where, target=Pair())


EXAMPLES = [pair("a card", "money"), pair("late", "the parcel is not here"), pair("hello", "good day")]


def moved(base: Base) -> tuple[Adapter, Contrast, list[PairRow]]:
    renderer = PairTexts(base, classes_of(base, (), HEAD.name, "FEATURE_EXTRACTION"))
    rows = renderer.rows(EXAMPLES, 100)
    adapter = random_adapter(base, decide(base, rows, TrainSettings(rank=3)).plan, size=0.2, classes=renderer.classes)
    return adapter, Contrast(renderer.classes), rows


@EVERY_FAMILY
def test_it_keeps_the_laws_of_tasks(folders: Folders, family: str) -> None:
    base = open_base(folders(family), torch.float32, **opened_with(HEAD, ()))
    adapter, task, rows = moved(base)
    assert adapter.plan.whole == ()
    check_task(TaskCase(base, task, rows, adapter.plan))


@EVERY_FAMILY
def test_peft_computes_the_same_with_the_folder(folders: Folders, tmp_path: Path, family: str) -> None:
    base = open_base(folders(family), torch.float32, **opened_with(HEAD, ()))
    adapter, _, _ = moved(base)
    texts = ["a card", "the parcel is not here"]
    bare, ours = embed(base, None, texts), embed(base, adapter, texts)
    peft.write(adapter, tmp_path / "adapter")
    again = peft.read(tmp_path / "adapter")
    assert (again, again.classes) == (adapter, adapter.classes)
    model = PeftModel.from_pretrained(AutoModel.from_pretrained(folders(family)), str(tmp_path / "adapter")).eval()
    assert PeftConfig.from_pretrained(str(tmp_path / "adapter")).task_type == "FEATURE_EXTRACTION"
    with torch.no_grad():
        states = [model(base.tokenizer(text, return_tensors="pt")["input_ids"]).last_hidden_state[0] for text in texts]
    theirs = torch.stack([torch.nn.functional.normalize(one.mean(0), dim=0) for one in states])
    assert (theirs - ours).abs().max() <= 1e-4
    assert (theirs - bare).abs().max() >= 1e-3


def test_the_loss_is_that_by_hand(folders: Folders) -> None:
    base = open_base(folders("bert"), torch.float32, **opened_with(HEAD, ()))
    adapter, task, rows = moved(base)
    anchors, partners = ([getattr(e, name) for e in EXAMPLES] for name in ("asked", "answer"))
    near = embed(base, adapter, anchors) @ embed(base, adapter, partners).T / TEMPERATURE
    by_hand = [
        float(-near[i].log_softmax(0)[i]) for i in range(3)
    ]  # of three, the two others are all that can be drawn
    with attach(base, adapter), torch.no_grad():
        assert task.nll(base, task.batch(base, rows, PLAIN), PLAIN).tolist() == pytest.approx(by_hand, rel=1e-4)


def test_no_text_is_told_to_be_unlike_a_partner_of_its_own() -> None:
    same = [pair("a", "x"), pair("a", "y"), pair("b", "x"), pair("c", "z"), pair("d", "a")]
    for example, others in zip(same, drawn(same), strict=True):
        answers = [same[i].answer for i in others]
        assert len(answers) == len({*answers}) <= OTHERS
        assert not {*answers} & {e.answer for e in same if e.asked == example.asked} and example.asked not in answers
    many = [pair(f"{i}", f"partner {i}") for i in range(50)]
    assert drawn(many) == drawn(many) and all(len(others) == OTHERS for others in drawn(many))


def test_a_text_of_several_rows_is_embedded_once(folders: Folders) -> None:
    base = open_base(folders("bert"), torch.float32, **opened_with(HEAD, ()))
    _, task, rows = moved(base)
    batch = task.batch(base, rows, PLAIN)
    assert (len(batch.ids), batch.rows, batch.candidates.shape) == (6, 3, (3, 3))


def test_places_are_those_by_hand(folders: Folders, monkeypatch: pytest.MonkeyPatch) -> None:
    """Vectors by which the partner is first, second (behind a partner of another), and first but for its own other."""
    base = open_base(folders("bert"), torch.float32, **opened_with(HEAD, ()))
    adapter, task, _ = moved(base)
    examples = [pair("p", "1"), pair("q", "2"), pair("r", "3"), pair("r", "1")]
    renderer = PairTexts(base, task.classes)
    rows = renderer.rows(examples, 100)
    east, north = torch.tensor([1.0, 0]), torch.tensor([0, 1.0])
    between, corpus = (east + north) / 2**0.5, {"1": 0, "2": 1, "3": 2}
    vectors = torch.stack([east, east, between, between, east, north, between])  # of p, q, r, r; of 1, 2, 3
    monkeypatch.setattr("lorafit.heads.pairs._embedded", lambda *_: vectors)
    test = head.Test(Runner(base, task, PLAIN), renderer, examples, rows, (), (), 0, lambda *_: None)
    found = compare_pairs(test, adapter)
    assert len(corpus) == 3 and found.measures is not None
    places = [1, 3, 1, 2]  # q: 1 and 3 are nearer than 2; the second r: 2 is as near as 1, and 3 is its own
    scores = {one.name: one.adapter for one in found.measures.scores}
    assert scores["recall@1"] == pytest.approx(sum(p == 1 for p in places) / 4)
    assert scores["MRR"] == pytest.approx(sum(1 / p for p in places) / 4)
    assert found.adapter.answers == ("1", "1", "3", "3")


# A whole run


@pytest.fixture(scope="session")
def finished(folders: Folders, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    root = tmp_path_factory.mktemp("run")
    data = write_rows(root / "pairs.jsonl", echoes())
    return root / "run", dict(run_training(folders("bert"), data, root / "run", SETTINGS))


def test_it_learns_and_is_compared_with_its_base(finished: tuple[Path, dict[str, Any]]) -> None:
    out, summary = finished
    scores = {one["name"]: one for one in summary["measures"]["scores"]}
    assert [*scores] == ["recall@1", "recall@10", "MRR"]
    assert scores["MRR"]["difference"][0] > 0 and scores["recall@10"]["adapter"] > scores["recall@10"]["base"]
    assert summary["nll"]["ci95"][1] < 0
    assert summary["base_unchanged"] and summary["passed_over"] == {}
    assert summary["peft"]["max_logit_difference"] <= 1e-4 < summary["peft"]["adapter_effect"]
    assert json.loads((out / "run.json").read_text("utf-8"))["settings"]["task"] == "auto"


class Stopping(Silent):
    """Ctrl-C at the second moment that is told."""

    def __init__(self) -> None:
        self.moments = 0

    def moment(self, moment: Moment) -> None:
        self.moments += 1
        if self.moments == 2:
            signal.raise_signal(signal.SIGINT)


def test_a_run_that_was_stopped_ends_in_the_same_bits(
    finished: tuple[Path, dict[str, Any]], folders: Folders, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafit.jobs.train.compare_with_peft", lambda *_: None)
    data = write_rows(tmp_path / "pairs.jsonl", echoes())
    with pytest.raises(Interrupted):
        run_training(folders("bert"), data, tmp_path / "run", SETTINGS, listener=Stopping())
    summary = run_training(None, None, tmp_path / "run", {}, resume=True)
    assert read_adapter(tmp_path / "run" / "adapter") == read_adapter(finished[0] / "adapter")
    assert summary["measures"] == finished[1]["measures"]


def test_it_is_evaluated_trimmed_refined_shown_and_reported(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    out = Path(copytree(finished[0], tmp_path / "run"))
    found = run_evaluation(None, out, write_rows(tmp_path / "more.jsonl", echoes(264)[240:]), {"dtype": "fp32"})
    assert found["measures"]["n"] == 24
    cut(out, "50%", tmp_path / "half")
    assert read_adapter(tmp_path / "half").classes == read_adapter(out / "adapter").classes
    assert run_refining(out)
    assert (shown(out)["task"], shown(out / "adapter")["task"]) == ("embedding", "embedding")
    page = write_report(out, tmp_path / "report.html").read_text(encoding="utf-8")
    done = CliRunner().invoke(app, ["show", str(out)])
    for text in (page, " ".join(done.output.split()), (out / "adapter" / "README.md").read_text(encoding="utf-8")):
        assert "recall@10" in text and "MRR" in text and "its base" in text


def test_the_code_on_its_card_runs(
    finished: tuple[Path, dict[str, Any]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(finished[0] / "adapter")
    for block in Path("README.md").read_text(encoding="utf-8").split("```python\n")[1:]:
        exec(block.partition("```")[0], {})
    ours, theirs = map(float, capsys.readouterr().out.strip().splitlines())
    assert ours == pytest.approx(theirs, abs=0.02)  # one of them is in bf16


# Data, and bad input


def test_pairs_are_read_and_the_task_is_found(folders: Folders, tmp_path: Path) -> None:
    examples = read_examples(write_rows(tmp_path / "pairs.jsonl", echoes(4)))
    assert {e.target for e in examples.train} == {Pair()}
    for family in ("bert", "llama"):
        assert head_for("auto", str(folders(family)), examples) is HEADS["embedding"]


def test_what_cannot_be_learnt_is_named_all_at_once(folders: Folders, tmp_path: Path) -> None:
    odd: list[dict[str, object]] = [{"anchor": "", "positive": "x"}, {"anchor": "y", "positive": " "}, {"anchor": "z"}]
    with pytest.raises(DataError) as caught:
        read_examples(write_rows(tmp_path / "odd.jsonl", [*echoes(3), *odd]))
    assert [one.where.rpartition("odd.jsonl:")[2] for one in caught.value.problems] == ["4: anchor", "5: positive", "6"]
    long = write_rows(tmp_path / "long.jsonl", [*echoes(48), {"anchor": "x" * 600, "positive": "y"}])
    with pytest.raises(DataError, match=r"long.jsonl:49: anchor: has 600 tokens: this base reads at most 512"):
        run_training(folders("bert"), long, tmp_path / "run", {**SETTINGS, "val_share": 0.1})
    same = write_rows(tmp_path / "same.jsonl", [{**one, "positive": "SAME"} for one in echoes(48)])
    with pytest.raises(DataError, match="all training examples have the same text as positive"):
        run_training(folders("bert"), same, tmp_path / "run", SETTINGS)
    talk = write_rows(tmp_path / "talk.jsonl", capitals())
    with pytest.raises(DataError, match="has no pair of texts, but an embedding model needs one"):
        run_training(folders("bert"), talk, tmp_path / "run", {**SETTINGS, "task": "embedding"})


def test_it_is_not_scored_on_data_of_another_task(finished: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    talk = write_rows(tmp_path / "talk.jsonl", capitals())
    with pytest.raises(DataError, match=r"talk.jsonl:1: has no positive: give anchor and positive on every line"):
        run_evaluation(None, finished[0], talk, {"dtype": "fp32"})


def test_another_adapter_gives_no_vectors(folders: Folders, finished: tuple[Path, dict[str, Any]]) -> None:
    adapter = read_adapter(finished[0] / "adapter")
    base = open_base(folders("bert"), torch.float32, **opened_for(adapter))
    assert adapter.classes is not None
    with pytest.raises(AdapterError, match="gives no vectors"):
        embed(base, replace(adapter, classes=replace(adapter.classes, task="regression")), ["a"])
    with pytest.raises(DataError, match="text 2: has 600 tokens"):
        embed(base, adapter, ["a", "x" * 600])
    vectors = embed(base, adapter, ["a", "b"])
    assert torch.allclose(vectors.norm(dim=1), torch.ones(2), atol=1e-5)
