"""Curves and scores in the tracking program that a user has, each asked by its own library."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from conftest import capitals, summary_with, write_rows

from lorafit.errors import SettingsError
from lorafit.evaluation.scores import Counts, Share
from lorafit.jobs.listener import Silent
from lorafit.jobs.tracked import Tracked
from lorafit.jobs.train import run_training
from lorafit.runs.tracking import TRACKERS, require_tracker
from lorafit.training.loop import Moment

SETTINGS = {"epochs": 1.0, "rank": 2, "dtype": "fp32", "val_share": 0.3, "few_shot": 0, "search": "none"}
NEEDED = ("tensorboard", "absl-py", "grpcio", "markdown", "protobuf", "werkzeug", "markupsafe")
SUMMARY = summary_with()
READ = """
import json, sys
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
found = EventAccumulator(sys.argv[1]).Reload()
print(json.dumps({name: [(one.step, one.value) for one in found.Scalars(name)] for name in found.Tags()["scalars"]}))
"""


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """An environment in which tensorboard can be imported, fetched into a folder of its own where it is not there."""
    if importlib.util.find_spec("tensorboard") is not None:
        return dict(os.environ)
    folder = tmp_path_factory.mktemp("library")
    command = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(folder), *NEEDED]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        pytest.skip(f"tensorboard cannot be fetched: {done.stderr.strip().splitlines()[-1:]}")
    paths = [str(folder), *filter(None, [os.environ.get("PYTHONPATH")])]
    return {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}


def test_tensorboard_is_given_the_curve_and_the_scores_of_a_run(
    library: Mapping[str, str], tiny_folder: Path, tmp_path: Path
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", capitals())
    command = [
        sys.executable,
        "-m",
        "lorafit",
        "train",
        str(tiny_folder),
        str(rows),
        "--out",
        str(tmp_path / "run"),
        "--rank",
        "2",
        "--epochs",
        "1",
        "--validations",
        "1",
        "--dtype",
        "fp32",
        "--few-shot",
        "0",
        "--search",
        "none",
        "--report-to",
        "tensorboard",
        "--json",
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, env=dict(library))
    assert done.returncode == 0, done.stderr
    summary = json.loads(done.stdout.splitlines()[-1])
    read = [sys.executable, "-c", READ, str(tmp_path / "run" / "tensorboard")]
    said = subprocess.run(read, capture_output=True, text=True, check=True, env=dict(library)).stdout
    scalars = json.loads(said.splitlines()[-1])
    assert [step for step, _ in scalars["train/nll"]] == list(range(1, summary["steps"] + 1))
    assert scalars["valid/nll"] == [[step, pytest.approx(nll)] for step, nll in summary["validation"]]
    assert scalars["test/nll_adapter"] == [[summary["steps"], pytest.approx(summary["nll"]["adapter"])]]
    assert set(scalars) >= {"train/learning_rate", "train/tokens_per_second", "test/nll_base", "adapter/parameters"}


@pytest.mark.parametrize("name", [name for name in TRACKERS if importlib.util.find_spec(name) is None])
def test_a_program_that_is_not_installed_is_refused_before_anything_is_opened_with_its_extra(
    name: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafit.jobs.prepare.open_base", lambda *_: pytest.fail("a base was opened"))
    rows = write_rows(tmp_path / "rows.jsonl", capitals())
    with pytest.raises(SettingsError, match=rf"--report-to {name}: .* is not installed: pip install '\.\[{name}\]'"):
        run_training(tiny_folder, rows, tmp_path / "run", {**SETTINGS, "report_to": name})
    assert not (tmp_path / "run").exists()


def test_none_needs_no_library() -> None:
    require_tracker("none")


class Hears(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []
        self.moments = 0

    def say(self, text: str) -> None:
        self.said.append(text)

    def moment(self, moment: Moment) -> None:
        self.moments += 1


class Fails:
    """A tracker whose network is gone after the first step."""

    def __init__(self) -> None:
        self.logged: list[tuple[int, dict[str, float]]] = []

    def log(self, values: Mapping[str, float], step: int) -> None:
        if self.logged:
            raise OSError("no route to host\nand more")
        self.logged.append((step, dict(values)))

    def end(self) -> None:
        raise OSError("no route to host")


def moment(step: int, **given: Any) -> Moment:
    values = {"train_nll": 2.0, "valid_nll": None, "seconds_left": 1.0, "tokens_per_second": float("nan")}
    return Moment(step=step, steps=3, learning_rate=0.5, **{**values, **given})


def test_a_program_that_fails_is_reported_once_and_never_ends_a_run() -> None:
    tracker, heard = Fails(), Hears()
    followed = Tracked(tracker, "wandb", heard)
    for step in (1, 2, 3):
        followed.moment(moment(step))
    followed.scores(SUMMARY)
    followed.end()
    assert tracker.logged == [(1, {"train/nll": 2.0, "train/learning_rate": 0.5})]  # what is no number is left out
    assert heard.said == ["--report-to wandb: no route to host: it is left out, the run continues"]
    assert heard.moments == 3


@pytest.mark.parametrize("tells", [True, False])
def test_the_shares_that_were_counted_are_handed_over_where_they_tell_how_good_answers_are(tells: bool) -> None:
    tracker = Fails()
    shares = {"base": 0.25, "adapter": 0.75, "most_frequent": 0.5}
    counts = Counts(
        by="check" if tells else "equality",
        n=4,
        json=0,
        distinct=4,
        few=False,
        equal={},
        against={},
        most_frequent=None,
        recall=(),
        confusions=(),
        other=0,
        classifier_missing=None,
        classifier_learnt=None,
        right={who: Share(share, (0.0, 1.0)) for who, share in shares.items()},
    )
    Tracked(tracker, "wandb", Hears()).scores(replace(SUMMARY, counts=counts))
    ((_, logged),) = tracker.logged
    shares = {name: value for name, value in logged.items() if name.startswith("test/right_")}
    told = {"test/right_base": 0.25, "test/right_adapter": 0.75, "test/right_most_frequent": 0.5}
    assert shares == (told if tells else {})


@pytest.mark.parametrize("name", ["trackio", "wandb", "mlflow"])
def test_other_programs_take_what_they_are_given(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(name, reason=f"{name} is not installed: pip install '.[{name}]'")
    monkeypatch.chdir(tmp_path)
    for variable, value in {
        "WANDB_MODE": "offline",
        "MLFLOW_TRACKING_URI": f"sqlite:///{tmp_path}/mlflow.db",  # MLflow 3 takes no folder
        "TRACKIO_DIR": str(tmp_path / "trackio"),
    }.items():
        monkeypatch.setenv(variable, value)
    (tmp_path / "run").mkdir()
    heard = Hears()
    followed = Tracked(TRACKERS[name](tmp_path / "run", {"rank": 2, "base": "tiny"}), name, heard)
    followed.moment(moment(0, train_nll=None, valid_nll=3.0))
    followed.moment(moment(1))
    followed.scores(SUMMARY)
    followed.end()
    assert heard.said == []
