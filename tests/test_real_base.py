"""End to end on the real small base, through the command line, on a piece of the built-in data."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest
import torch

from lorafit.bases.base import Base
from lorafit.data.reading import BUILTIN, BUILTIN_FOLDER, read_examples
from lorafit.data.render import render, renderer_for
from lorafit.files import read_json
from lorafit.jobs.demo import SETTINGS
from lorafit.planning import decide
from lorafit.planning.rules import all_linear, hidden_size, learning_rate_by_width, rank_by_capacity
from lorafit.report.words import same_as_peft
from lorafit.runs.summary import PeftCheck
from lorafit.settings import settings_from


def lorafit(*words: str | Path) -> tuple[dict[str, Any], str]:
    """The last line of what it prints, as an object, and all of it."""
    command = [sys.executable, "-m", "lorafit", *map(str, words), "--json"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), " ".join(done.stdout.split())


@pytest.fixture(scope="module")
def piece(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One desk's first rows: 80 to train on, 8 to validate and 12 to test."""
    folder = tmp_path_factory.mktemp("piece")
    for split, count in (("train", 80), ("valid", 8), ("test", 12)):
        lines = (BUILTIN_FOLDER / f"{split}.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
        (folder / f"{split}.jsonl").write_text("".join(lines[:count]), encoding="utf-8")
    return folder


@pytest.fixture(scope="module")
def trained(real_base: Base, piece: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[dict[str, Any], str]:
    out = tmp_path_factory.mktemp("runs") / "run"
    return lorafit("train", "smollm2-135m", piece, "--out", out, "--epochs", "1", "--system", "Help desk")


@pytest.fixture(scope="module")
def summary(trained: tuple[dict[str, Any], str]) -> dict[str, Any]:
    return trained[0]


@pytest.mark.slow
def test_what_a_run_says_is_ahead_is_what_it_takes(trained: tuple[dict[str, Any], str]) -> None:
    """Of a run this short one micro-batch is tried, whose rows are as long as most: a third off is what that can be."""
    took, said = trained[0]["seconds"], trained[1]
    told = re.search(r"about (\d+):(\d+) of training and (\d+):(\d+) of evaluation are ahead", said)
    assert told, said
    minutes, seconds, more, rest = map(int, told.groups())
    assert 60 * minutes + seconds == pytest.approx(took["train"], rel=1 / 3, abs=3)
    assert 60 * more + rest == pytest.approx(took["trim"] + took["evaluate"], rel=1 / 3, abs=3)


def test_the_adapter_is_better_than_its_base(summary: dict[str, Any]) -> None:
    assert summary["nll"]["ci95"][1] < 0


def test_the_base_is_unchanged(summary: dict[str, Any]) -> None:
    assert summary["base_unchanged"] is True


def test_the_answers_end_by_themselves(summary: dict[str, Any]) -> None:
    assert summary["natural_stops"] >= 0.95


def test_peft_computes_the_same(summary: dict[str, Any]) -> None:
    pytest.importorskip("peft")
    assert same_as_peft(PeftCheck(**summary["peft"]))
    assert summary["peft"]["adapter_effect"] >= 100 * summary["peft"]["max_logit_difference"]


@pytest.mark.slow
def test_evaluating_again_gives_the_same_numbers(summary: dict[str, Any], piece: Path) -> None:
    dtype = {"float32": "fp32", "bfloat16": "bf16"}[summary["dtype"]]  # measured anew, it could be the other
    again = lorafit("eval", summary["adapter_dir"], piece, "--dtype", dtype)[0]
    assert again["nll"]["adapter"] == pytest.approx(summary["nll"]["adapter"], rel=1e-6)
    assert again["facts"]["adapter"] == summary["facts"]["adapter"]


def test_the_rules_resolve_to_the_published_numbers(real_base: Base) -> None:
    sites = all_linear(real_base)
    assert len(sites) == 210
    assert sum(site.d_in + site.d_out for site in sites) == 305_280
    assert learning_rate_by_width(hidden_size(real_base)) == pytest.approx(1.3e-3)
    assert rank_by_capacity(25_000, 305_280) == 8
    assert rank_by_capacity(305_280 * 10, 305_280) == 32


def test_the_recorded_control_was_trained_as_the_demo_is(real_base: Base) -> None:
    recorded = read_json(BUILTIN_FOLDER / "control.json")
    settings = settings_from(SETTINGS)
    rows = render(renderer_for(real_base, settings.system), read_examples(BUILTIN).train, settings.max_length)
    assert recorded["recipe"] == asdict(decide(real_base, rows, settings).recipe), "make control"


def test_flipping_any_one_bit_of_the_real_base_shows(real_base: Base) -> None:
    before = real_base.integrity()
    weight = dict(real_base.model.named_parameters())["model.layers.17.mlp.up_proj.weight"]
    bits = weight.detach().view(torch.int32)
    with torch.no_grad():
        bits[5, 7] ^= 1
        changed = real_base.integrity()
        bits[5, 7] ^= 1
    assert changed != before
    assert real_base.integrity() == before
