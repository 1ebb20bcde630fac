"""What an earlier version wrote is read for ever: a run that ended, one that was stopped, a server's registry.

They were written by the version before the rooms of the package moved (commit 48708b6), on one thread: 36 rows, a base
of two blocks, rank 1, a refinement that was accepted, a Ctrl-C at step 9 of 16. Left out is what nothing reads again:
the report, and the checkpoint of the run that ended. FOLDER stands for the folder that held it all.
"""

from __future__ import annotations

import json
from pathlib import Path
from shutil import copytree
from typing import Any

import httpx
import pytest
import torch
from safetensors.torch import load_file
from test_server import served

from lorafit import Base, open_base, read_adapter, run_evaluation, run_training
from lorafit.errors import RunError
from lorafit.jobs.show import shown
from lorafit.jobs.trim import cut, run_trimming
from lorafit.report.page import write_report
from lorafit.runs.folder import read_run, read_summary, standing_folder

pytestmark = pytest.mark.usefixtures("one_thread")

EARLIER = Path(__file__).parent / "earlier_runs"


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """Both runs, their base and their data, with the paths they have here."""
    home = Path(copytree(EARLIER, tmp_path / "home"))
    for path in [*home.rglob("*.json"), *home.rglob("*.md")]:
        path.write_text(path.read_text(encoding="utf-8").replace("FOLDER", home.as_posix()), encoding="utf-8")
    return home


def recorded(home: Path) -> dict[str, Any]:
    summary = read_summary(home / "ended")
    assert summary is not None
    return summary.to_json()


def recorded_answers(home: Path) -> dict[str, str]:
    """What the adapter answered to each question of the test, when the run ended."""
    lines = (home / "ended/scores/answers.jsonl").read_text(encoding="utf-8").splitlines()
    return {one["question"]: one["adapter"] for one in map(json.loads, lines)}


def test_a_run_that_ended_is_shown(home: Path) -> None:
    run, adapter = shown(home / "ended"), shown(home / "ended/adapter")
    assert (run["state"], run["best step"], run["test openings"]) == ("finished", 16, 1)
    assert run["parameters"] == adapter["parameters"] == recorded(home)["parameters"]
    assert (adapter["base identity"], adapter["system prompt"]) == (
        read_run(home / "ended")["base_identity"],
        "Answer.",
    )


def test_its_adapter_is_the_one_of_the_round_that_was_accepted(home: Path) -> None:
    adapter = read_adapter(home / "ended")
    assert standing_folder(home / "ended") == home / "ended/rounds/1"
    assert adapter == read_adapter(home / "ended/rounds/1/adapter")
    assert {slot.rank for slot in adapter.plan.slots} == {2}


def test_its_adapter_has_the_scores_that_it_recorded(home: Path) -> None:
    asked = recorded_answers(home)
    rows = (home / "data.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    test = home / "test.jsonl"
    test.write_text("".join(row for row in rows if json.loads(row)["prompt"] in asked), encoding="utf-8")
    settings = {"dtype": "fp32", "few_shot": 3}
    found = run_evaluation(None, home / "ended", test, settings, answers=home / "answers.jsonl")
    before = recorded(home)
    assert found["n_test"] == before["n_test"] == len(asked)
    for name, value in before["nll"].items():
        assert found["nll"][name] == pytest.approx(value, rel=1e-4)
    assert {name: found["facts"][name] for name in before["facts"]} == before["facts"]
    lines = (home / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    assert {one["question"]: one["adapter"] for one in map(json.loads, lines)} == asked


def test_its_report_is_written(home: Path) -> None:
    write_report([home / "ended"], home / "report.html")
    page = (home / "report.html").read_text(encoding="utf-8")
    assert all(f"{recorded(home)['nll'][name]:.3f}" in page for name in ("base", "adapter"))
    assert recorded(home)["rounds"][0]["verdict"] in page


def test_its_adapter_is_cut_and_its_ladder_is_climbed(home: Path) -> None:
    """By the moments that were kept, and by validation."""
    assert cut(home / "ended", "50%", home / "half")["of"] == recorded(home)["parameters"]
    assert {slot.rank for slot in read_adapter(home / "half").plan.slots} <= {1, 2}
    ladder = run_trimming(home / "ended", home / "small")
    before = recorded(home)["ladder"]
    assert ladder["nll"] == pytest.approx(before["nll"], rel=1e-4)
    for now, then in zip(ladder["rungs"], before["rungs"], strict=True):
        assert now["parameters"] == then["parameters"] and now["nll"] == pytest.approx(then["nll"], rel=1e-4)


def test_a_server_goes_on_with_what_it_served_and_answers_as_the_run_did(home: Path) -> None:
    """Its registry, the folder that came in, and the copy of it that is version 1."""
    root = home / "served"
    for name in ("capitals", ".lorafit/versions/capitals@1"):
        copytree(home / "ended/adapter", root / name)
    (home / "registry.json").rename(root / ".lorafit/registry.json")

    def opened() -> Base:
        return open_base(home / "base", torch.float32)

    with served(root, base=opened) as running:
        for question, answer in [*recorded_answers(home).items()][:4]:
            asked = {"messages": [{"role": "user", "content": question}], "max_tokens": len(answer)}
            found = httpx.post(f"{running.url}/v1/chat/completions", json={**asked, "model": "capitals@1"}, timeout=60)
            assert found.json()["choices"][0]["message"]["content"] == answer
        assert running.service.store is not None
        for _ in range(2):
            running.service.store.look()
        listed = running.service.store.engine.adapters.listed()
        assert [(version.name, version.number, live) for version, live in listed] == [("capitals", 1, True)]


def test_a_run_that_was_stopped_is_resumed_to_its_end(home: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Settings, data and base are those of the run that ended, and so is what comes of it. A checkpoint stands for one
    version of torch, for another computes other bits: there the run is refused, by that name."""
    monkeypatch.setattr("lorafit.jobs.train.compare_with_peft", lambda *_: None)
    monkeypatch.setattr("lorafit.jobs.train.write_report", lambda *_: None)
    trained_with = read_run(home / "stopped")["versions"]["torch"]
    if torch.__version__ != trained_with:
        with pytest.raises(RunError, match=f"torch: '{trained_with}' when it was saved"):
            run_training(None, None, home / "stopped", {}, resume=True)
        return
    summary = run_training(None, None, home / "stopped", {}, resume=True)
    assert summary["nll"]["adapter"] == pytest.approx(recorded(home)["nll"]["adapter"], rel=1e-4)
    now, then = (load_file(home / name / "adapter/adapter_model.safetensors") for name in ("stopped", "ended"))
    assert now.keys() == then.keys()
    for key, tensor in then.items():
        torch.testing.assert_close(now[key], tensor, rtol=1e-3, atol=1e-4)
