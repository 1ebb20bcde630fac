"""Whole runs in either number format by force, and the choice between them by what is measured."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import capitals, write_rows

from lorafit import run_evaluation, run_training
from lorafit.bases import base
from lorafit.settings import settings_from

SETTINGS: dict[str, Any] = {"epochs": 3.0, "rank": 4, "val_share": 0.3, "few_shot": 0}
NAMES = {"fp32": "float32", "bf16": "bfloat16"}


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", capitals(36))


@pytest.fixture
def measured(monkeypatch: pytest.MonkeyPatch) -> dict[torch.dtype, float]:
    """GFLOP/s of a machine that is not this one; no GPU."""
    speeds = {torch.float32: 100.0, torch.bfloat16: 100.0}
    monkeypatch.setattr(base, "matrix_speed", speeds.__getitem__)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    return speeds


def recorded(out: Path) -> str:
    """What a run has written down that it ran in."""
    run = json.loads((out / "run.json").read_text(encoding="utf-8"))
    summary = json.loads((out / "summary.json").read_text(encoding="utf-8"))
    assert NAMES[run["frozen"]["dtype"]] == summary["dtype"]
    return str(summary["dtype"])


@pytest.mark.parametrize("dtype", NAMES)
def test_a_whole_run_in_either_format_learns_and_leaves_the_base_alone(
    dtype: str, tiny_folder: Path, rows: Path, tmp_path: Path
) -> None:
    out = tmp_path / "run"
    summary = run_training(str(tiny_folder), str(rows), out, {**SETTINGS, "dtype": dtype})
    assert recorded(out) == NAMES[dtype]
    assert summary["base_unchanged"] is True
    assert summary["nll"]["ci95"][1] < 0
    if summary["peft"] is not None:
        assert summary["peft"]["max_logit_difference"] <= max(1e-4, 1e-5 * summary["peft"]["adapter_effect"])
    again = run_evaluation(None, out / "adapter", str(rows), {"dtype": dtype})
    assert again["nll"]["difference"] < 0


@pytest.mark.parametrize(("bf16", "taken"), [(50.0, "fp32"), (105.0, "fp32"), (150.0, "bf16")])
def test_bf16_is_taken_only_where_it_wins_by_a_tenth(
    bf16: float, taken: str, measured: dict[torch.dtype, float]
) -> None:
    measured[torch.bfloat16] = bf16
    assert str(base.fastest_dtype()) == f"torch.{NAMES[taken]}"


def test_where_bf16_is_slow_a_run_left_to_itself_is_in_fp32(
    tiny_folder: Path, rows: Path, tmp_path: Path, measured: dict[torch.dtype, float]
) -> None:
    measured[torch.bfloat16] = 50.0
    assert settings_from(SETTINGS).dtype == "auto"
    run_training(str(tiny_folder), str(rows), tmp_path / "run", SETTINGS)
    assert recorded(tmp_path / "run") == "float32"


def test_where_bf16_is_fast_a_run_left_to_itself_is_in_bf16(
    tiny_folder: Path, rows: Path, tmp_path: Path, measured: dict[torch.dtype, float]
) -> None:
    measured[torch.bfloat16] = 200.0
    run_training(str(tiny_folder), str(rows), tmp_path / "run", SETTINGS)
    assert recorded(tmp_path / "run") == "bfloat16"


@pytest.mark.parametrize(("asked", "slow"), [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_what_is_asked_for_is_taken_however_slow(
    asked: str, slow: torch.dtype, tiny_folder: Path, rows: Path, tmp_path: Path, measured: dict[torch.dtype, float]
) -> None:
    measured[slow] = 1.0
    settings = {**SETTINGS, "epochs": 0.3, "dtype": asked}
    run_training(str(tiny_folder), str(rows), tmp_path / "run", settings)
    assert recorded(tmp_path / "run") == NAMES[asked]
