"""The main job on a tiny base, and the statistics by which it is judged."""

from __future__ import annotations

import errno
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import numpy as np
import pytest
import torch
from conftest import NotATransformer, byte_tokenizer, capitals, tiny_mixtral, write_rows
from rich.console import Console
from torch import nn
from transformers import Gemma3nForCausalLM, Gemma3nTextConfig

from lorafit import read_adapter
from lorafit.adapters.formats import peft
from lorafit.adapters.plan import Plan, uniform
from lorafit.attachment.adapters import attach
from lorafit.attachment.checks import require_fired
from lorafit.attachment.pure import merged
from lorafit.attachment.watching import fired
from lorafit.bases.base import Base, open_base
from lorafit.cli.console import Terminal
from lorafit.cli.train import conclude
from lorafit.data.checks import is_right, occurs
from lorafit.data.examples import Check, Example, Message
from lorafit.data.prepared import prepare
from lorafit.data.render import Row
from lorafit.errors import AdapterError, BaseChangedError, DataError, FormatError, RunError, SettingsError, TargetError
from lorafit.evaluation.answers import few_shots, shuffled_answers
from lorafit.evaluation.statistics import paired_bootstrap, student, wilson
from lorafit.files import whole_folder, write_json
from lorafit.guide import search
from lorafit.jobs import demo
from lorafit.jobs.evaluate import run_evaluation
from lorafit.jobs.extras import Extras
from lorafit.jobs.listener import Silent
from lorafit.jobs.peft_oracle import compare_with_peft
from lorafit.jobs.plan import run_planning
from lorafit.jobs.show import shown
from lorafit.jobs.train import run_training
from lorafit.layers.site import select
from lorafit.planning import Choice, decide
from lorafit.report.page import write_report
from lorafit.report.words import verdict
from lorafit.runs.folder import open_run, openings, read_run, remember_questions, require_disk, sole_writer
from lorafit.runs.summary import RunSummary
from lorafit.settings import TrainSettings, settings_from
from lorafit.tasks.task import PLAIN
from lorafit.training.loop import Moment

ADAPTER_FILES = ("README.md", "lorafit.json", "adapter_config.json", "adapter_model.safetensors")
SETTINGS: dict[str, Any] = {"epochs": 3.0, "rank": 16, "dtype": "fp32", "val_share": 0.3}


pytestmark = pytest.mark.usefixtures("one_thread")


def checked_capitals() -> list[dict[str, object]]:
    """Capitals with a check each, every second one a question to decline."""
    rows = capitals(36)
    for i, row in enumerate(rows):
        row["check"] = {"contains": [str(row["completion"]).split()[-1].rstrip(".")], "declines": i % 2 == 0}
    return rows


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", checked_capitals())


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """A whole run, with the check by PEFT."""
    out = tmp_path_factory.mktemp("runs") / "run"
    return out, run_training(str(tiny_folder), str(data), out, SETTINGS)


@pytest.fixture
def no_peft(monkeypatch: pytest.MonkeyPatch) -> None:
    """Spare a run the process in which PEFT checks it."""
    monkeypatch.setattr("lorafit.jobs.train.compare_with_peft", lambda *_: None)


@pytest.fixture
def unfinished(finished: tuple[Path, dict[str, Any]], tmp_path: Path, no_peft: None) -> Path:
    """The same run, stopped after training and before its summary was written."""
    out = Path(copytree(finished[0], tmp_path / "run"))
    (out / "summary.json").unlink()
    return out


@pytest.mark.parametrize(
    "more",
    [
        {"variant": "pissa"},
        pytest.param({"variant": "rslora"}, marks=pytest.mark.slow),  # LoRA with another scale
        {"targets": ["embed_tokens", "q_proj"]},
    ],
    ids=str,
)
def test_a_run_of_every_method_and_kind_is_whole(
    tiny_folder: Path, data: Path, tmp_path: Path, more: dict[str, Any]
) -> None:
    summary = run_training(str(tiny_folder), str(data), tmp_path / "run", {**SETTINGS, **more})
    assert summary["passed_over"] == {} and summary["peft"]["max_logit_difference"] <= 1e-4
    assert summary["nll"]["ci95"][1] < 0 and summary["base_unchanged"]
    adapter = peft.read(tmp_path / "run")
    assert {slot.variant for slot in adapter.plan.slots} == {more.get("variant", "lora")}


def test_a_pattern_names_no_embedding_and_its_name_does(tiny_base: Base) -> None:
    paths = {
        wanted: {slot.site.name for slot in decide(tiny_base, ROWS, TrainSettings(targets=(wanted,))).plan.slots}
        for wanted in ("*", "embed_tokens")
    }
    assert "embed_tokens" not in paths["*"] and paths["embed_tokens"] == {"embed_tokens"}


def test_weight_decay_is_refused_where_it_would_undo_the_base(tiny_base: Base) -> None:
    with pytest.raises(SettingsError, match=r"--weight-decay 0\.1: with pissa"):
        decide(tiny_base, ROWS, TrainSettings(variant="pissa", weight_decay=0.1))


def new_rows() -> list[dict[str, object]]:
    return [{"prompt": f"What follows {n}?", "completion": str(n + 1)} for n in range(12)]


class Hears(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


# What a run leaves


def test_a_run_leaves_all_it_promises(finished: tuple[Path, dict[str, Any]]) -> None:
    out, _ = finished
    found = {str(path.relative_to(out)) for path in out.rglob("*") if path.is_file()}
    assert found == {
        "run.json",
        "data.json",
        "plan.json",
        "metrics.jsonl",
        "summary.json",
        "checkpoints/last.safetensors",
        "report.html",
        "report-curves.png",
        "report-examples.png",
        "report-layers.png",
        "report-scores.png",
        "report-forgetting.png",
        "scores/answers.jsonl",
        "scores/test_openings.json",
        "scores/trained_on.json",
        "scores/importance.json",
        "scores/forgetting.json",
        "search/card.json",
        "ladder/rungs.json",
        "ladder/moments.safetensors",
        *(f"ladder/whole/{name}" for name in ADAPTER_FILES),
        *(f"adapter/{name}" for name in (*ADAPTER_FILES, "routing_features.safetensors")),
    }


def test_the_summary_says_all_it_promises(finished: tuple[Path, dict[str, Any]], tiny_folder: Path) -> None:
    out, summary = finished
    assert summary["base"] == str(tiny_folder)
    assert summary["base_unchanged"] is True
    assert summary["adapter_dir"] == str(out / "adapter")
    assert summary["n_train"] + summary["n_valid"] + summary["n_test"] == 36
    assert set(summary["nll"]) == {"base", "adapter", "difference", "ci95"}
    assert {"base", "base_few_shot", "adapter", "shuffled_control", "ci95"} <= set(summary["facts"])
    assert set(summary["seconds"]) == {"load", "search", "train", "trim", "evaluate", "check"}
    for key in ("trained_tokens", "trainable_parameters", "tokens_per_second", "peak_rss_gb"):
        assert summary[key] > 0, key
    for key in ("off_desk_declined", "natural_stops"):
        assert 0 <= summary[key] <= 1, key


def test_the_summary_returned_is_the_one_written(finished: tuple[Path, dict[str, Any]]) -> None:
    out, summary = finished
    assert json.loads((out / "summary.json").read_text(encoding="utf-8")) == json.loads(json.dumps(summary))


def test_the_nll_difference_is_that_of_the_means_and_lies_in_its_interval(
    finished: tuple[Path, dict[str, Any]],
) -> None:
    nll = finished[1]["nll"]
    assert nll["difference"] == pytest.approx(nll["adapter"] - nll["base"])
    assert nll["ci95"][0] <= nll["difference"] <= nll["ci95"][1] < 0


def test_peft_computes_the_same_as_the_run(finished: tuple[Path, dict[str, Any]]) -> None:
    found = finished[1]["peft"]
    assert found["max_logit_difference"] <= 1e-4
    assert found["adapter_effect"] >= 1e-2


def test_the_adapter_that_is_written_is_of_this_base_and_this_plan(finished: tuple[Path, dict[str, Any]]) -> None:
    out, summary = finished
    adapter = peft.read(out / "adapter")
    whole = peft.read(out / "ladder" / "whole")
    assert adapter.base == whole.base == summary["base_identity"]
    assert adapter.rendering is not None and adapter.rendering.single, "each of its examples asks one question"
    assert whole.plan == Plan.from_json(json.loads((out / "plan.json").read_text(encoding="utf-8")))
    assert whole.plan.parameters == summary["trainable_parameters"]
    assert adapter.plan.parameters == summary["parameters"] <= summary["ladder"]["chosen"] * whole.plan.parameters


def test_the_card_carries_the_scores(finished: tuple[Path, dict[str, Any]]) -> None:
    out, summary = finished
    card = (out / "adapter" / "README.md").read_text(encoding="utf-8")
    assert f"{summary['nll']['adapter']:.3f}" in card
    assert "It was trained on single questions" in card


def test_eval_gives_the_scores_of_the_run_again(
    finished: tuple[Path, dict[str, Any]], tiny_folder: Path, data: Path, tmp_path: Path
) -> None:
    out, summary = finished
    examples, _ = prepare(str(data), settings_from(SETTINGS), Silent())
    lines = data.read_text(encoding="utf-8").splitlines(keepends=True)
    test = tmp_path / "test.jsonl"
    test.write_text("".join(lines[int(e.where.rpartition(":")[2]) - 1] for e in examples.test), encoding="utf-8")
    again = run_evaluation(None, out / "adapter", str(test), {"dtype": "fp32"})
    assert again["nll"]["adapter"] == pytest.approx(summary["nll"]["adapter"], rel=1e-5)
    assert again["facts"]["adapter"] == summary["facts"]["adapter"]
    assert again["base_unchanged"] is True


def test_eval_answers_every_question_in_order_when_asked_for_them(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    rows = [{"prompt": f"Say {n}", "completion": str(n), "group": f"g{n % 3}"} for n in range(40)]
    for split in ("train", "test"):
        write_rows(tmp_path / "data" / f"{split}.jsonl", [{**row, "prompt": row["prompt"] + split} for row in rows])
    written = tmp_path / "new" / "answers.jsonl"
    run_evaluation(None, finished[0] / "adapter", str(tmp_path / "data"), answers=written)
    lines = [json.loads(line) for line in written.read_text(encoding="utf-8").splitlines()]
    assert [(line["question"], line["reference"], line["group"]) for line in lines] == [
        (row["prompt"] + "test", row["completion"], row["group"]) for row in rows
    ]
    assert all(isinstance(line[who], str) for line in lines for who in ("base", "base_few_shot", "adapter"))
    assert len({line["nll"]["base"] for line in lines}) > 1


def test_eval_on_a_new_file_takes_its_few_shots_from_what_the_run_was_trained_on(
    finished: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    checked = [{**row, "check": {"contains": [row["completion"]]}} for row in new_rows()]
    new, few = write_rows(tmp_path / "new.jsonl", checked), {"few_shot": 2, "dtype": "fp32"}
    found = run_evaluation(None, finished[0], new, few)
    assert found["facts"]["few_shot_examples"] == 2
    assert found["facts"]["base_few_shot"] is not None
    with pytest.raises(SettingsError, match="nothing is left that is not asked here"):
        run_evaluation(None, finished[0], data, few)
    alone = Path(copytree(finished[0] / "adapter", tmp_path / "alone" / "adapter"))
    with pytest.raises(SettingsError, match="alone is no run: give a run"):
        run_evaluation(None, alone, new, few)


def test_eval_on_a_new_file_knows_what_the_run_was_trained_on_without_being_asked(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Without it, a run's few fixed replies were free text to it, and no classifier was compared with."""
    heard: list[list[str]] = []

    def hears(questions: object, answers: object, known: Sequence[Example], *rest: object) -> None:
        heard.append([one.question for one in known])

    monkeypatch.setattr("lorafit.evaluation.compare.counted", hears)
    new = write_rows(tmp_path / "new.jsonl", new_rows())
    run_evaluation(None, finished[0], new)
    alone = Path(copytree(finished[0] / "adapter", tmp_path / "alone" / "adapter"))
    run_evaluation(None, alone, new)
    assert heard[0] and {*heard[0]} <= {str(row["prompt"]) for row in checked_capitals()}
    assert heard[1] == []


def test_eval_on_the_tests_own_examples_opens_the_test_once_more(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path, data: Path
) -> None:
    run = Path(copytree(finished[0], tmp_path / "run"))
    before = openings(run)
    run_evaluation(None, run, str(write_rows(tmp_path / "new.jsonl", new_rows())))
    assert openings(run) == before
    heard = Hears()
    run_evaluation(None, run, str(data), listener=heard)
    assert openings(run) == before + 1
    assert any("of the test of" in text and f"opened {before + 1} times" in text for text in heard.said)
    assert f"opened {before + 1} times" in write_report([run], run / "report.html").read_text(encoding="utf-8")


def test_what_the_other_adapter_was_trained_on_is_remarked_too(
    finished: tuple[Path, dict[str, Any]], tmp_path: Path
) -> None:
    """The other one would win by memory."""
    rows = new_rows()
    other = Path(copytree(finished[0], tmp_path / "other"))
    remember_questions(other, [str(row["prompt"]) for row in rows[:3]])
    heard = Hears()
    found = run_evaluation(
        None, finished[0], str(write_rows(tmp_path / "new.jsonl", rows)), against=other, listener=heard
    )
    assert (found["seen_in_training"], found["seen_by_other"]) == (0, 3)
    assert any("3 of these 12 questions" in text and str(other) in text for text in heard.said)


def test_the_forecast_of_disk_is_what_a_run_takes_at_its_peak(
    tiny_folder: Path, data: Path, tmp_path: Path, no_peft: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A new checkpoint is written whole before the old one goes."""
    settings = {**SETTINGS, "rank": 32, "trim": "none"}  # so that tensors outweigh the text beside them
    taken, real = [], os.fsync

    def looked(file: int) -> None:
        taken.append(sum(path.stat().st_size for path in (tmp_path / "run").rglob("*") if path.is_file()))
        real(file)

    monkeypatch.setattr("lorafit.files.os.fsync", looked)
    run_training(str(tiny_folder), str(data), tmp_path / "run", settings)
    forecast = run_planning(str(tiny_folder), str(data), settings)["forecast"]["disk"]
    assert max(taken) == pytest.approx(forecast, rel=0.05)


# The base


class FlipsOneBit(Silent):
    """A fault of memory in the middle of a run: the lowest bit of one weight."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch):
        real = open_base

        def remembered(*given: Any) -> Base:
            self.base = real(*given)
            return self.base

        monkeypatch.setattr("lorafit.jobs.prepare.open_base", remembered)

    def moment(self, moment: Moment) -> None:
        if moment.step == 3 and moment.train_nll is not None:
            weight = self.base.model.get_parameter("model.layers.0.mlp.up_proj.weight")
            weight.data.view(torch.int32)[5, 7].bitwise_xor_(1)


def test_one_bit_flipped_in_mid_run_is_told_and_ends_the_command_with_an_error(
    tiny_folder: Path, data: Path, tmp_path: Path, no_peft: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    listener = FlipsOneBit(monkeypatch)
    summary = run_training(str(tiny_folder), str(data), tmp_path / "run", SETTINGS, listener=listener)
    assert summary["base_unchanged"] is False
    with pytest.raises(BaseChangedError, match="do not use"):
        conclude(Terminal(as_json=False), RunSummary.from_json(summary), tmp_path / "run", [])


class HasASpare(NotATransformer):
    """A module with a layer that its forward passes over."""

    def __init__(self) -> None:
        super().__init__()
        self.spare = nn.Linear(16, 16)


def test_a_named_site_that_takes_no_part_is_an_error() -> None:
    base = Base.of(HasASpare().eval(), "with a spare")
    seen = fired(base, lambda: base.model(torch.ones(1, 16)))
    require_fired(uniform(select(base.sites, ["blocks.*"]), 2, 4.0), seen)
    with pytest.raises(TargetError, match=r"1 named sites take no part.*: spare"):
        require_fired(uniform(select(base.sites, ["spare", "0"]), 2, 4.0), seen)


class WritesIntoItself(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(16, 16), nn.Linear(16, 16)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        h += x
        out: torch.Tensor = self.second(h)
        out[..., :8] *= 2
        return out


def test_a_site_whose_output_is_written_to_is_seen() -> None:
    base = Base.of(WritesIntoItself().eval().requires_grad_(False), "in place")
    assert fired(base, lambda: base.model(torch.ones(1, 3, 16))) == {"first", "second"}


class Picks(nn.Module):
    """What picks among its numbers gets no gradient, once by a block without and once by a comparison."""

    def __init__(self) -> None:
        super().__init__()
        self.mix, self.pick, self.rank = (nn.Linear(16, 16) for _ in range(3))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = torch.tanh(self.mix(x))
        with torch.no_grad():
            picked = self.pick(h) > 0
        return h * picked * (self.rank(h) < 1)


@pytest.mark.parametrize("frozen", [True, False])
def test_a_site_that_gets_no_gradient_cannot_learn_and_is_refused_where_it_is_named(frozen: bool) -> None:
    base = Base.of(Picks().eval().requires_grad_(not frozen), "picks")
    seen = fired(base, lambda: base.model(torch.ones(1, 3, 16)))
    assert seen == {"mix"}
    with pytest.raises(TargetError, match=r"2 named sites .* receive no gradient: pick, rank"):
        require_fired(uniform(base.sites, 2, 4.0), seen)


def test_sites_without_gradient_are_left_out_of_a_run_which_is_trimmed(
    tiny_folder: Path, data: Path, tmp_path: Path, no_peft: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As sparse attention runs what chooses its tokens. After training its sites broke the trimming."""

    def forward(self: Any, x: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            gate = self.act_fn(self.gate_proj(x))
        found: torch.Tensor = self.down_proj(gate * self.up_proj(x))
        return found

    monkeypatch.setattr("transformers.models.llama.modeling_llama.LlamaMLP.forward", forward)
    summary = run_training(str(tiny_folder), str(data), tmp_path / "run", SETTINGS)
    names = {slot.site.name for slot in read_adapter(tmp_path / "run" / "ladder" / "whole").plan.slots}
    assert names == {"q_proj", "k_proj", "v_proj", "o_proj", "up_proj", "down_proj"}
    assert not summary["passed_over"]
    assert summary["ladder"]["rungs"]


def test_a_misspelt_target_is_an_error_before_anything_is_written(
    tiny_folder: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(TargetError, match="'q_prj' matches no site: did you mean q_proj"):
        run_training(str(tiny_folder), str(data), tmp_path / "run", {**SETTINGS, "targets": ("q_prj", "v_proj")})
    assert not (tmp_path / "run").exists()


# The rules choose only among sites that take part and hold the rank


ROWS = [Row((1, 2, 3), (False, True, True), i) for i in range(40)]


def test_the_rules_pass_over_sites_that_take_no_part(tiny_base: Base) -> None:
    """A tower that text never passes through is no reason to refuse a base; a site named by the user is."""
    used = frozenset(site.path for site in tiny_base.sites if ".0." in site.path)
    decision = decide(tiny_base, ROWS, TrainSettings(), used)
    assert {slot.site.path for slot in decision.plan.slots} == used
    assert "7 more take no part" in decision.choices[0].reason
    named = decide(tiny_base, ROWS, TrainSettings(targets=("layers.1.*",)), used)
    with pytest.raises(TargetError, match="7 named sites take no part"):
        require_fired(named.plan, used)


def test_one_narrow_layer_does_not_cap_the_rank_of_all() -> None:
    """A gate of one output, as mixtures of experts have."""
    model = nn.Sequential(*(nn.Linear(32, 32) for _ in range(4)), nn.Linear(32, 1))
    for asked, rank in ((None, 32), (8, 8)):
        decision = decide(Base.of(model, "gated"), ROWS, TrainSettings(rank=asked))
        assert [(slot.site.path, slot.rank) for slot in decision.plan.slots] == [(str(i), rank) for i in range(4)]
        assert "1 more are narrower than the rank" in decision.choices[0].reason


# How much of a base is reached is said


def test_experts_that_are_left_out_are_told_with_their_share_and_how_to_name_them() -> None:
    model = tiny_mixtral()
    base = Base.of(model, "experts")
    total = sum(parameter.numel() for parameter in model.parameters())
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    attention = sum(parameter.numel() for name, parameter in model.named_parameters() if "self_attn" in name)
    reason = decide(base, ROWS, TrainSettings(rank=4)).choices[0].reason
    assert f"the adapted layers hold {100 * attention / total:.1f} % of the base's parameters" in reason
    assert f"adapted only if named: {100 * experts / total:.1f} % in MixtralExperts" in reason
    assert "--targets q_proj,k_proj,v_proj,o_proj,experts adapts the experts too" in reason


def test_the_share_is_told_of_named_sites_too_and_counts_a_tied_weight_once(tiny_base: Base) -> None:
    total = sum(parameter.numel() for parameter in tiny_base.model.parameters())
    reason = decide(tiny_base, ROWS, TrainSettings(rank=2, targets=("q_proj",))).choices[0].reason
    assert (
        reason == f"named: q_proj; the adapted layers hold {100 * 2 * 32 * 32 / total:.1f} % of the base's parameters"
    )
    assert tiny_base.reach(tiny_base.sites).missed == ()


# A base whose blocks hand on several hidden states of each token


def test_a_base_that_cannot_tell_questions_apart_is_trained_and_that_is_said(
    tmp_path: Path, data: Path, no_peft: None
) -> None:
    torch.manual_seed(0)
    model = Gemma3nForCausalLM(
        Gemma3nTextConfig(
            vocab_size=261,
            vocab_size_per_layer_input=261,
            hidden_size=32,
            intermediate_size=48,
            num_hidden_layers=5,
            num_attention_heads=4,
            num_key_value_heads=2,
            head_dim=8,
            hidden_size_per_layer_input=8,
            laurel_rank=4,
            num_kv_shared_layers=0,
            altup_num_inputs=4,
            eos_token_id=256,
            bos_token_id=256,
            pad_token_id=0,
        )
    )
    model.save_pretrained(tmp_path / "gemma")
    byte_tokenizer().save_pretrained(tmp_path / "gemma")
    hears = Hears()
    settings = {**SETTINGS, "epochs": 0.3, "few_shot": 0}
    run_training(str(tmp_path / "gemma"), str(data), tmp_path / "run", settings, listener=hears)
    assert any(
        "no features are stored for the router" in said and "more than one hidden state" in said for said in hears.said
    )
    assert peft.read(tmp_path / "run" / "adapter").plan.slots
    assert not (tmp_path / "run" / "adapter" / peft.ROUTING).exists()


# PEFT's answer is judged


@pytest.mark.parametrize(("difference", "same"), [(0.0, True), (9e-5, True), (2e-4, False), (7.3, False)])
def test_only_what_computes_the_same_is_said_to(
    finished: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str], difference: float, same: bool
) -> None:
    out, summary = finished
    summary = {**summary, "peft": {"max_logit_difference": difference, "adapter_effect": 9.9}}
    try:
        conclude(Terminal(False), RunSummary.from_json(summary), out, [])
    except AdapterError as error:
        assert not same
        assert "PEFT computes something else" in str(error)
    assert ("PEFT reads the adapter and computes the same" in capsys.readouterr().out) is same


def test_what_to_type_next_can_be_typed(
    finished: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str]
) -> None:
    conclude(Terminal(False), RunSummary.from_json(finished[1]), Path("my runs/first"), [])
    assert "chat 'my runs/first'\n" in capsys.readouterr().out


def test_an_answer_longer_than_the_screen_goes_on_below_itself(
    finished: tuple[Path, dict[str, Any]], capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    sample = dict.fromkeys(("question", "reference", "base", "adapter"), "word " * 40)
    terminal = Terminal()
    terminal.out = Console(width=80)
    terminal.results(RunSummary.from_json({**finished[1], "samples": [sample]}))
    lines = [line for line in capsys.readouterr().out.splitlines() if "word" in line]
    assert len(lines) > 8
    assert {line.index("word") for line in lines} == {15}


def test_a_base_without_a_folder_is_not_taken_for_a_missing_peft(
    tiny_base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare_with_peft(tmp_path, replace(tiny_base, folder=None), [[1]], Terminal().say) is None
    assert "not installed" not in capsys.readouterr().out


def test_a_peft_that_cannot_be_asked_is_told_and_costs_no_run(
    tiny_base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare_with_peft(tmp_path / "nothing", tiny_base, [[1, 2]], Terminal(False).say) is None
    assert "PEFT did not read the adapter: " in capsys.readouterr().out


def test_a_peft_that_would_take_more_memory_than_is_left_is_not_asked(
    tiny_base: Base, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert compare_with_peft(tmp_path / "nothing", tiny_base, [[1, 2]], Terminal(False).say, 1 << 20) is None
    assert "PEFT was not asked to read the adapter: to open the base in fp32 once more" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("place", "name"),
    [
        ("sites_that_mattered", "which sites mattered"),
        ("forgotten", "forgetting"),
        ("_routing", "what a router"),
        ("write_report", "report"),
    ],
)
def test_what_comes_after_the_scores_ends_no_run(
    place: str, name: str, unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A base whose hidden states have four dimensions broke the router's features, and hours of training were lost."""

    def broken(*_: object) -> None:
        raise RuntimeError("too many indices for tensor of dimension 4\nand a second line")

    monkeypatch.setattr(f"lorafit.jobs.train.{place}", broken)
    hears = Hears()
    summary = run_training(None, None, unfinished, {}, resume=True, listener=hears)
    ((named, reason),) = summary["passed_over"].items()
    assert (named.startswith(name), reason) == (True, "RuntimeError: too many indices for tensor of dimension 4")
    assert any(said.startswith(f"{named}: skipped because it failed") for said in hears.said)
    assert json.loads((unfinished / "summary.json").read_text(encoding="utf-8")) == json.loads(json.dumps(summary))
    assert read_adapter(unfinished / "adapter").plan.parameters == summary["parameters"]


def test_where_trimming_fails_the_whole_adapter_is_shipped_and_was_written_before(
    unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rmtree(unfinished / "adapter")
    rmtree(unfinished / "ladder")
    written = []

    def broken(*_: object) -> None:
        written.append(read_adapter(unfinished / "adapter"))
        raise RuntimeError("no hook here")

    monkeypatch.setattr("lorafit.jobs.looking_back.ladder_of", broken)
    summary = run_training(None, None, unfinished, {}, resume=True)
    assert summary["passed_over"] == {"trimming": "RuntimeError: no hook here"}
    assert summary["ladder"]["reason"] == "untrimmed: trimming failed (RuntimeError: no hook here)"
    assert [read_adapter(unfinished / "adapter")] == written
    assert summary["parameters"] == written[0].plan.parameters


@pytest.mark.parametrize(
    ("code", "ends"), [(errno.ENOSPC, True), (errno.EROFS, True), (errno.EAGAIN, False), (errno.ENOMEM, False)]
)
def test_a_failing_disk_ends_a_run_and_a_process_that_cannot_be_started_does_not(code: int, ends: bool) -> None:
    extras = Extras(Silent())

    def broken() -> None:
        raise OSError(code, os.strerror(code))

    if ends:
        with pytest.raises(OSError, match=re.escape(os.strerror(code))):
            extras.get("an extra", broken)
    else:
        assert extras.get("an extra", broken) is None
        assert os.strerror(code) in extras.passed_over["an extra"]


def test_where_peft_means_other_modules_it_is_not_asked_and_the_card_says_so(
    unfinished: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What it would compute says nothing against the adapter, which was condemned for it."""
    said = "PEFT would pass over 2 modules of this plan. For PEFT name others with --targets"
    asked, paths = [], []

    def misread(model: object, these: object) -> str:
        paths.append(these)
        return said

    monkeypatch.setattr("lorafit.jobs.train.misread_by_peft", misread)
    monkeypatch.setattr("lorafit.jobs.train.compare_with_peft", lambda *_: asked.append(1))
    summary = run_training(None, None, unfinished, {}, resume=True)
    assert (asked, summary["peft"], summary["misread_by_peft"]) == ([], None, said)
    assert paths == [read_adapter(unfinished / "adapter").plan.slots]
    card = (unfinished / "adapter" / "README.md").read_text(encoding="utf-8")
    assert f"{said}." in card and "Do not use" not in card and "PeftModel" not in card
    assert f"{said}." in (unfinished / "report.html").read_text(encoding="utf-8")
    conclude(Terminal(as_json=False), RunSummary.from_json(summary), unfinished, [])


def test_the_adapter_is_there_before_it_is_scored(unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    rmtree(unfinished / "adapter")

    def broken(*_: object, **__: object) -> None:
        raise RuntimeError("no answers")

    monkeypatch.setattr("lorafit.evaluation.compare.compare", broken)
    with pytest.raises(RuntimeError, match="no answers"):
        run_training(None, None, unfinished, {}, resume=True)
    assert read_adapter(unfinished / "adapter").plan.parameters > 0
    assert not (unfinished / "summary.json").exists()


# The run folder


def test_of_two_processes_in_one_run_folder_the_second_is_told(unfinished: Path) -> None:
    with sole_writer(unfinished), pytest.raises(RunError, match="another process is at work in this run"):
        run_training(None, None, unfinished, {}, resume=True)
    run_training(None, None, unfinished, {}, resume=True)


def test_a_disk_too_small_for_the_checkpoints_is_told_before_training(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafit.runs.folder.free_bytes", lambda folder: 1000)
    with pytest.raises(RunError, match=r"this run writes up to \d+\.\d MB, and 0\.0 MB are free on that disk"):
        run_training(str(tiny_folder), str(data), tmp_path / "run", SETTINGS)


def test_what_a_stopped_run_has_written_need_not_be_free_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "checkpoints" / "last.safetensors").write_bytes(bytes(600))
    (tmp_path / "checkpoints" / ".last.safetensors.a1b2c3d4").write_bytes(bytes(600))  # of a kill: it will be removed
    monkeypatch.setattr("lorafit.runs.folder.free_bytes", lambda folder: 700)
    require_disk(tmp_path, 1300)
    with pytest.raises(RunError, match=r"this run writes up to .* more, and"):
        require_disk(tmp_path, 1301)


def test_a_resumed_run_says_what_is_left_by_the_pace_it_had(unfinished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its checkpoint is of the last step: no training is ahead, and nothing is tried to find that out."""

    def forecast(*_: Any, **__: Any) -> None:
        raise AssertionError("steps are tried")

    monkeypatch.setattr("lorafit.jobs.ahead.forecast", forecast)
    heard = Hears()
    run_training(None, None, unfinished, {}, resume=True, listener=heard)
    (said,) = (line for line in heard.said if "are ahead" in line)
    assert said.startswith("about 0:00 of training and ")


def begin(tiny_folder: Path, data: Path, out: Path, resume: bool = False, **changes: Any) -> dict[str, Any]:
    return run_training(str(tiny_folder), str(data), out, {**SETTINGS, **changes}, resume=resume)


def test_a_folder_below_a_file_cannot_be_a_run(tiny_folder: Path, data: Path) -> None:
    with pytest.raises(RunError, match=r"cannot be written.*--out"):
        begin(tiny_folder, data, data / "run")


@pytest.mark.skipif(not hasattr(os, "geteuid") or os.geteuid() == 0, reason="root may write anywhere")
def test_a_folder_without_permission_cannot_be_a_run(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    tmp_path.chmod(0o500)
    try:
        with pytest.raises(RunError, match=r"cannot be written.*--out"):
            begin(tiny_folder, data, tmp_path / "run")
    finally:
        tmp_path.chmod(0o700)


def test_a_folder_that_holds_a_finished_run_is_left_alone(
    finished: tuple[Path, dict[str, Any]], tiny_folder: Path, data: Path
) -> None:
    with pytest.raises(RunError, match="holds a run already \\(finished\\)"):
        begin(tiny_folder, data, finished[0])


def test_a_folder_that_holds_an_unfinished_run_says_how_to_go_on(
    unfinished: Path, tiny_folder: Path, data: Path
) -> None:
    with pytest.raises(RunError, match=r"unfinished.*--resume"):
        begin(tiny_folder, data, unfinished)


def test_a_folder_that_holds_anything_else_is_left_alone(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").touch()
    with pytest.raises(RunError, match="not empty and not a run"):
        begin(tiny_folder, data, tmp_path)


def test_a_finished_run_is_not_resumed(finished: tuple[Path, dict[str, Any]], tiny_folder: Path, data: Path) -> None:
    with pytest.raises(RunError, match="this run is finished"):
        begin(tiny_folder, data, finished[0], resume=True)


def test_where_no_run_is_there_is_none_to_resume(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run to resume"):
        begin(tiny_folder, data, tmp_path, resume=True)


def test_each_opening_of_the_test_split_is_counted(
    finished: tuple[Path, dict[str, Any]], unfinished: Path, tiny_folder: Path, data: Path
) -> None:
    before = openings(unfinished)
    assert finished[1]["test_openings"] == 1
    assert begin(tiny_folder, data, unfinished, resume=True)["test_openings"] == before + 1


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"rank": 2}, "rank: 16 when it began, 2 now"),
        ({"seed": 1, "alpha": 8.0}, "seed: 0 .* 1 now; alpha: 32.0 .* 8.0 now"),
        ({"rnk": 2}, "--rnk"),
        ({"learning_rate": -1.0}, "--learning-rate"),
    ],
    ids=["another rank", "two at once", "an unknown name", "an impossible value"],
)
def test_resuming_with_another_setting_is_refused_by_name(
    unfinished: Path, tiny_folder: Path, data: Path, changes: dict[str, Any], said: str
) -> None:
    with pytest.raises(SettingsError, match=said):
        begin(tiny_folder, data, unfinished, resume=True, **changes)


def test_what_is_stored_may_be_typed_again_in_any_way(
    unfinished: Path, tiny_folder: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same command goes on; so does none of it, and the same data by another path."""
    asked = read_run(unfinished)
    write_json(unfinished / "run.json", asked | {"settings": asked["settings"] | {"targets": ["q_proj", "v_proj"]}})
    _, _, found, _ = open_run(unfinished, str(tiny_folder), str(data), {"targets": ["q_proj,v_proj"]}, True)
    assert found.targets == ("q_proj", "v_proj")
    write_json(unfinished / "run.json", asked)
    monkeypatch.chdir(data.parent)
    run_training(None, f"./{data.name}", unfinished, {}, resume=True)
    (unfinished / "summary.json").unlink()
    assert run_training(None, None, unfinished, {}, resume=True)["n_test"] > 0


def test_a_share_for_data_with_splits_of_its_own_is_refused(tmp_path: Path) -> None:
    rows = capitals(36)
    for i, name in enumerate(("train", "valid", "test")):
        write_rows(tmp_path / f"{name}.jsonl", rows[12 * i : 12 * i + 12])
    with pytest.raises(SettingsError, match=r"--val-share 0\.3: does nothing"):
        prepare(str(tmp_path), settings_from({"val_share": 0.3}), Silent())


def test_resuming_on_changed_data_is_refused_and_changes_nothing(
    unfinished: Path, tiny_folder: Path, data: Path
) -> None:
    before = (unfinished / "plan.json").read_bytes()
    content = data.read_text(encoding="utf-8")
    write_rows(data, checked_capitals()[:-3])
    try:
        with pytest.raises(RunError, match=r"data_digest: .* when it began"):
            begin(tiny_folder, data, unfinished, resume=True)
    finally:
        data.write_text(content, encoding="utf-8")
    assert (unfinished / "plan.json").read_bytes() == before


def test_a_run_whose_data_have_the_digest_of_an_earlier_version_is_resumed(
    unfinished: Path, tiny_folder: Path, data: Path
) -> None:
    asked = read_run(unfinished)
    examples, _ = prepare(str(data), settings_from(asked["settings"]), Silent())
    assert examples.digest() == asked["data_digest"]
    before = asked | {"data_digest": examples._digest_of_format_1()}
    write_json(unfinished / "run.json", before)
    assert begin(tiny_folder, data, unfinished, resume=True)["n_test"] > 0
    assert read_run(unfinished) == before


def before_subjects(run: Path, data: Path) -> Path:
    """A run of a version that passed over subjects, and its data."""
    rows = [{**row, "subject": "A question"} for row in map(json.loads, data.read_text(encoding="utf-8").splitlines())]
    found = write_rows(run.parent / "mails.jsonl", rows)
    write_json(run / "run.json", read_run(run) | {"data": str(found)})
    told = json.loads((run / "data.json").read_text(encoding="utf-8"))
    write_json(run / "data.json", told | {"passed_over": {"subject": len(rows)}})
    return found


def test_a_run_resumes_with_a_column_that_it_passed_over_when_it_began(unfinished: Path, data: Path) -> None:
    """It was told to add --columns, which --resume refuses."""
    mails = before_subjects(unfinished, data)
    with pytest.raises(DataError, match="nothing reads 'subject'"):
        prepare(str(mails), settings_from(SETTINGS), Silent())
    assert run_training(None, None, unfinished, {}, resume=True)["n_test"] > 0


def test_eval_takes_its_few_shots_from_data_with_such_a_column(
    finished: tuple[Path, dict[str, Any]], data: Path, tmp_path: Path
) -> None:
    run = Path(copytree(finished[0], tmp_path / "run"))
    before_subjects(run, data)
    new, few = write_rows(tmp_path / "new.jsonl", new_rows()), {"few_shot": 2, "dtype": "fp32"}
    assert run_evaluation(None, run, new, few)["facts"]["few_shot_examples"] == 2
    write_rows(tmp_path / "mails.jsonl", [{"prompt": "Where?", "completion": "", "mood": "?"}])
    said = r"run: its data cannot be read .*mails\.jsonl:1: completion: an empty answer.*: restore them, or {}$"
    with pytest.raises(RunError, match=said.format("leave --few-shot out")):
        run_evaluation(None, run, new, few)
    (run / "summary.json").unlink()
    with pytest.raises(RunError, match=said.format("start again with another --out")):
        run_training(None, None, run, {}, resume=True)


def test_resuming_on_another_test_split_is_refused(unfinished: Path, tiny_folder: Path, data: Path) -> None:
    """A run scored on other questions than it began with could choose its exam."""
    asked = json.loads((unfinished / "run.json").read_text(encoding="utf-8"))
    write_json(unfinished / "run.json", {**asked, "data_digest": "0" * 64})
    try:
        with pytest.raises(RunError, match=r"data_digest: 000.* when it began"):
            begin(tiny_folder, data, unfinished, resume=True)
    finally:
        write_json(unfinished / "run.json", asked)


@pytest.mark.parametrize("content", ["[]", "{}", '{"other": "tool"}'])
def test_a_run_json_of_another_kind_is_named(tmp_path: Path, content: str) -> None:
    (tmp_path / "run.json").write_text(content, encoding="utf-8")
    for look in (lambda: read_run(tmp_path), lambda: shown(tmp_path)):
        with pytest.raises(FormatError, match=r"run\.json: not written by lorafit"):
            look()


@pytest.mark.slow
def test_a_full_disk_is_told_and_what_was_saved_goes_on(tiny_folder: Path, data: Path, tmp_path: Path) -> None:
    """Files may not grow past a few kilobytes, as on a disk that has filled up; then they may again."""
    arguments = [
        "train",
        str(tiny_folder),
        str(data),
        "--out",
        str(tmp_path / "run"),
        "--rank",
        "4",
        "--epochs",
        "1",
        "--dtype",
        "fp32",
    ]
    limited = "import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, -1)); "
    code = limited + "from lorafit.cli import main; sys.argv[1:] = sys.argv[1:]; main()"
    done = subprocess.run([sys.executable, "-c", code, *arguments], capture_output=True, text=True, check=False)
    assert (done.returncode, "could not be written" in done.stderr) == (2, True), done.stderr
    assert not [path for path in (tmp_path / "run").rglob("*") if path.name.startswith(".")]
    again = subprocess.run(
        [sys.executable, "-m", "lorafit", *arguments, "--resume"], capture_output=True, text=True, check=False
    )
    assert again.returncode == 0, again.stderr
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
def test_what_is_written_is_as_private_as_the_user_wants(tmp_path: Path) -> None:
    before = os.umask(0o077)
    try:
        write_json(tmp_path / "a.json", 1)
        with whole_folder(tmp_path / "b") as building:
            write_json(building / "c.json", 1)
    finally:
        os.umask(before)
    modes = [
        oct(path.stat().st_mode & 0o777) for path in (tmp_path / "a.json", tmp_path / "b", tmp_path / "b" / "c.json")
    ]
    assert modes == ["0o600", "0o700", "0o600"]


@pytest.mark.skipif(os.name != "posix", reason="permissions are POSIX's")
@pytest.mark.parametrize("has_proc", [True, False])
def test_what_others_write_meanwhile_is_as_they_want_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, has_proc: bool
) -> None:
    """The process has one umask: whoever sets it to read it makes private what another thread writes just then."""
    mask = 0o027
    before = os.umask(mask)
    try:
        with monkeypatch.context() as patch:
            patch.setattr(os, "umask", lambda _: pytest.fail("it is set for all threads"))
            if not has_proc:
                patch.setattr("lorafit.files.STATUS", tmp_path / "no-such-file")
            write_json(tmp_path / "a.json", 1)
            with whole_folder(tmp_path / "b") as building:
                (building / "c").write_text("c")
    finally:
        os.umask(before)
    found = [oct((tmp_path / name).stat().st_mode & 0o777) for name in ("a.json", "b", "b/c")]
    assert found == ["0o640", "0o750", "0o640"]


def test_an_earlier_demo_is_cleared_away_and_nothing_else(tmp_path: Path) -> None:
    for name in ("run.json", "summary.json"):
        write_json(tmp_path / name, {"demo": True, "base": "", "data": "", "settings": {}, "frozen": {}})
    (tmp_path / "my_notes.txt").write_text("kept", encoding="utf-8")
    with pytest.raises(RunError, match=r"my_notes\.txt in addition to an earlier demo"):
        demo.run_demo(tmp_path, Silent())
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize(("extra", "who"), [({"demo": True}, "the demo"), (None, "you")])
def test_reasons_say_who_set_a_value(
    tiny_folder: Path, data: Path, tmp_path: Path, extra: dict[str, Any] | None, who: str
) -> None:
    class Planned(Silent):
        def plan(self, choices: Sequence[Choice]) -> None:
            self.reasons = {choice.name: choice.reason for choice in choices}
            raise RuntimeError("planned")

    hears = Planned()
    with pytest.raises(RuntimeError, match="planned"):
        run_training(str(tiny_folder), str(data), tmp_path / "run", {"rank": 2}, listener=hears, extra=extra)
    assert hears.reasons["rank"] == f"set by {who}"


def test_a_resumed_run_takes_the_dtype_and_the_way_it_began_with(
    tiny_folder: Path, data: Path, tmp_path: Path, no_peft: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Both are measured, and may be found otherwise on another day: then its checkpoint would not be gone on with."""
    monkeypatch.setattr("lorafit.jobs.prepare.fastest_dtype", lambda: torch.float32)
    first = begin(tiny_folder, data, tmp_path / "run", dtype="auto")
    (tmp_path / "run" / "summary.json").unlink()
    monkeypatch.setattr("lorafit.jobs.prepare.fastest_dtype", lambda: torch.bfloat16)
    monkeypatch.setattr("lorafit.tasks.completion.mode_of", lambda *_: PLAIN)
    again = begin(tiny_folder, data, tmp_path / "run", resume=True, dtype="auto")
    assert again["dtype"] == first["dtype"] == "float32"


FROZEN = {"dtype": "fp32", "threads": 1, "apart": True, "packed": True, "micro_tokens": 64, "recompute": False}


@pytest.mark.parametrize(
    "frozen",
    [
        {},
        {"dtype": "fp32"},
        {**FROZEN, "dtype": "fp8"},
        {**FROZEN, "threads": 0},
        {**FROZEN, "packed": "no"},
        {**FROZEN, "of": "later versions"},
        None,
    ],
)
def test_what_a_run_has_frozen_is_taken_whole_or_not_at_all(
    unfinished: Path, tiny_folder: Path, data: Path, frozen: object
) -> None:
    write_json(unfinished / "run.json", read_run(unfinished) | {"frozen": frozen})
    with pytest.raises(FormatError, match=r"run\.json: frozen: .*start again"):
        begin(tiny_folder, data, unfinished, resume=True)


def test_what_is_read_back_must_be_what_was_written(
    finished: tuple[Path, dict[str, Any]],
    unfinished: Path,
    tiny_folder: Path,
    data: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    real = peft.read(finished[0] / "adapter")
    stale = replace(real, tensors={key: torch.zeros_like(tensor) for key, tensor in real.tensors.items()})
    monkeypatch.setattr(peft, "read", lambda folder: stale)
    with pytest.raises(FormatError, match="differs from what was written"):
        begin(tiny_folder, data, unfinished, resume=True)


# Statistics


def test_an_interval_of_noise_covers_zero() -> None:
    found = paired_bootstrap(np.random.default_rng(1).normal(0, 1, 200).tolist())
    assert found.low < 0 < found.high


def test_an_interval_of_a_difference_is_the_textbooks() -> None:
    values = np.random.default_rng(1).normal(0.5, 1, 400)
    found = paired_bootstrap(values.tolist())
    error = values.std(ddof=1) / np.sqrt(400)
    assert found.mean == pytest.approx(values.mean())
    expected = (values.mean() - 1.96 * error, values.mean() + 1.96 * error)
    assert (found.low, found.high) == pytest.approx(expected, abs=0.02)


@pytest.mark.parametrize(
    ("df", "expected"), [(9, 2.262157), (14, 2.144787), (29, 2.045230), (99, 1.984217), (10**9, 1.959964)]
)
def test_the_quantile_of_student_is_the_tables(df: int, expected: float) -> None:
    assert student(df) == pytest.approx(expected, abs=2e-5)


@pytest.mark.parametrize(("n", "at_least"), [(10, 0.92), (30, 0.92)])
def test_intervals_of_few_examples_cover_nearly_as_often_as_those_of_many(n: int, at_least: float) -> None:
    """The plain percentile interval of 10 covers in 91 of 100."""
    rng = np.random.default_rng(3)
    drawn = [paired_bootstrap(rng.normal(0, 1, n).tolist()) for _ in range(300)]
    assert np.mean([one is not None and one.low <= 0 <= one.high for one in drawn]) > at_least


@pytest.mark.parametrize(("values", "groups"), [([-1.0], None), ([-1.0] * 9, None), ([-1.0, 2.0] * 9, ["a", "b"] * 9)])
def test_too_few_independent_examples_have_no_interval(values: list[float], groups: list[str] | None) -> None:
    """The bootstrap of one example has no width, and would call any difference proven."""
    assert paired_bootstrap(values, groups) is None
    assert verdict(None) == "too few examples to tell"


@pytest.mark.parametrize(
    ("ci95", "said"),
    [
        ((-2.0, -1.0), "better"),
        ((1.0, 2.0), "worse"),
        ((-1.0, 1.0), "not shown to differ"),
        ((0.0, 0.0), "the same: it changes nothing"),
    ],
)
def test_the_verdict_is_what_the_interval_allows(ci95: tuple[float, float], said: str) -> None:
    assert verdict(ci95) == said


def test_examples_written_five_times_give_the_interval_of_one_when_grouped() -> None:
    values = np.random.default_rng(1).normal(0, 1, 60)
    five, groups = np.tile(values, 5).tolist(), [str(i) for i in range(60)] * 5
    single, loose, grouped = paired_bootstrap(values.tolist()), paired_bootstrap(five), paired_bootstrap(five, groups)
    width: Callable[[Any], float] = lambda interval: interval.high - interval.low  # noqa: E731
    assert width(grouped) == pytest.approx(width(single), rel=0.05)
    assert width(loose) < 0.55 * width(grouped)


def test_an_example_without_a_group_is_a_group_of_its_own() -> None:
    values = np.random.default_rng(1).normal(0, 1, 50).tolist()
    assert paired_bootstrap(values, [None] * 50) == paired_bootstrap(values)


@pytest.mark.parametrize(
    ("right", "n", "low", "high"), [(8, 10, 0.4902, 0.9433), (0, 10, 0.0, 0.2775), (10, 10, 0.7225, 1.0), (0, 0, 0, 1)]
)
def test_wilson_gives_the_textbooks_interval(right: int, n: int, low: float, high: float) -> None:
    assert wilson(right, n) == pytest.approx((low, high), abs=1e-4)


# Answers


@pytest.mark.parametrize(
    ("phrase", "text", "expected"),
    [
        ("2 years", "It lasts 2 years.", True),
        ("2 years", "It lasts 12 years.", False),
        ("5 years", "It lasts 2.5 years.", False),
        ("2", "It lasts 2.5 years.", False),
        ("2", "It lasts 2, or 3.", True),
        ("2.5", "It lasts 2.5 years.", True),
        ("2 years", "2\n  YEARS", True),
        ("year", "years", False),
        ("C++", "in C++.", True),
        ("a.b", "axb", False),
    ],
)
def test_a_phrase_occurs_between_word_boundaries(phrase: str, text: str, expected: bool) -> None:
    assert occurs(phrase, text) is expected


CHECK = Check(contains=("21 days", "receipt"), lacks=("14 days",), max_words=8)


@pytest.mark.parametrize(
    ("answer", "expected"),
    [
        ("Within 21 days, with the receipt.", True),
        ("Within 21 days.", False),
        ("Within 21 days with receipt, not 14 days.", False),
        ("Within 21 days, and do bring along the receipt.", False),
        ("", False),
    ],
    ids=["right", "one is missing", "one is too many", "too long", "empty"],
)
def test_an_answer_is_right_when_it_contains_and_lacks_what_it_must(answer: str, expected: bool) -> None:
    assert is_right(answer, CHECK) is expected


def numbered(n: int, declining: tuple[int, ...] = ()) -> list[Example]:
    return [
        Example(
            (Message("user", f"question {i}"), Message("assistant", f"answer {i}")),
            f"x:{i}",
            Check((f"{i}",), (), 9, declines=i in declining),
        )
        for i in range(n)
    ]


@pytest.mark.parametrize("seed", range(5))
def test_shuffled_answers_keep_questions_and_checks_and_give_each_the_answer_of_another(seed: int) -> None:
    examples = numbered(12)
    shuffled = shuffled_answers(examples, seed)
    assert [e.question for e in shuffled] == [e.question for e in examples]
    assert [e.check for e in shuffled] == [e.check for e in examples]
    assert sorted(e.answer for e in shuffled) == sorted(e.answer for e in examples)
    assert all(one.answer != other.answer for one, other in zip(shuffled, examples, strict=True))


def test_few_shots_hold_one_that_declines() -> None:
    chosen = few_shots(numbered(12, declining=(5,)), 4)
    assert len({e.question for e in chosen}) == 4
    assert chosen[-1].question == "question 5"


def test_no_shots_asked_for_are_none() -> None:
    assert few_shots(numbered(3), 0) == []


def test_the_guides_way_to_a_merged_folder_answers_as_the_adapter_does(
    finished: tuple[Path, dict[str, Any]], tiny_folder: Path, tmp_path: Path
) -> None:
    """What `lorafit search export` says, typed."""
    said = search.answer("how do I export to GGUF").section
    assert said is not None
    base, adapter = open_base(tiny_folder, torch.float32), peft.read(finished[0] / "adapter")
    lines = re.findall(r"`(base\.[^`]+)`", said.text)
    assert len(lines) == 2
    for line in lines:
        exec(line, {"base": base, "adapter": adapter, "merged": merged, "folder": tmp_path / "merged"})
    ids = torch.tensor([base.tokenizer("Where is it?")["input_ids"]])
    with torch.no_grad(), attach(base, adapter):
        expected = base.model(ids).logits
    again = open_base(tmp_path / "merged", torch.float32)
    with torch.no_grad():
        torch.testing.assert_close(again.model(ids).logits, expected, rtol=1e-4, atol=1e-4)
