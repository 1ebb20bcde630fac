"""Several processes: the result of one, the same in each, and a run that goes on after one of them was killed."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import capitals, write_rows
from test_training import APART, CPU, SHORT, rows_of, start_of, wait_until

from lorafit.adapters.formats import peft
from lorafit.adapters.plan import uniform
from lorafit.adapters.state import TrainState
from lorafit.attachment.adapters import attach
from lorafit.bases.base import Base
from lorafit.data.batches import collate
from lorafit.errors import RunError, SettingsError
from lorafit.jobs.train import run_training
from lorafit.tasks.completion import COMPLETION
from lorafit.tasks.runner import Runner
from lorafit.testing import random_adapter
from lorafit.training.loop import train
from lorafit.training.processes import ALONE, Processes, shares

SETTINGS = {
    "epochs": 40.0,
    "batch_size": 4,
    "rank": 4,
    "dtype": "fp32",
    "patience": 99,
    "validations": 8,
    "learning_rate": 2e-3,
}
PROGRAM = """
import hashlib, os, sys
from pathlib import Path
from types import SimpleNamespace
sys.modules["peft"] = None  # spares every run the check by PEFT
from lorafit.training import loop, optimizer
marks, rank, real = Path(os.environ["MARKS"]), os.environ["RANK"], optimizer.step
(marks / f"pid{rank}").write_text(str(os.getpid()))
def step(state, *given):
    norm = real(state, *given)
    with (marks / f"masters{rank}").open("a") as file:
        file.write(hashlib.sha256(state.master.detach().numpy().tobytes()).hexdigest() + "\\n")
    return norm
loop.adamw = SimpleNamespace(**{**vars(optimizer), "step": step})  # not of the steps that tell how long it takes
from lorafit.cli import main
main()
"""


@dataclass
class Launched:
    """A run that torchrun has started: the launcher, what all of it says, and marks its processes leave."""

    launcher: subprocess.Popen[str]
    said_in: Path
    marks: Path

    def said(self) -> str:
        return self.said_in.read_text(encoding="utf-8")

    def end(self) -> int:
        """The launcher's exit status."""
        try:
            return self.launcher.wait(120)
        finally:
            if self.launcher.poll() is None:
                os.killpg(self.launcher.pid, signal.SIGTERM)

    def pid(self, rank: int) -> int:
        return int((self.marks / f"pid{rank}").read_text())

    def masters(self, rank: int) -> list[str]:
        """Digest of the factors after every step."""
        return (self.marks / f"masters{rank}").read_text().splitlines()


class Runs:
    """Runs on one base and the same examples, of any number of processes."""

    def __init__(self, base: Path, folder: Path):
        self.base, self.folder = base, folder
        self.data = write_rows(folder / "rows.jsonl", capitals(25))  # 21 to train on: one a pass is a step by itself
        self.program = folder / "program.py"
        self.program.write_text(PROGRAM)

    def launch(self, name: str, *extra: str, processes: int = 2) -> Launched:
        marks = self.folder / "marks" / str(len(list((self.folder).glob("marks/*"))))
        marks.mkdir(parents=True)
        flags = [part for key, value in SETTINGS.items() for part in (f"--{key.replace('_', '-')}", str(value))]
        torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(processes)]
        verb = ["train", str(self.base), str(self.data), "--out", str(self.folder / name), *flags, *extra]
        with (marks / "said").open("w") as said:
            launcher = subprocess.Popen(
                [*torchrun, str(self.program), *verb],
                stdout=said,
                stderr=subprocess.STDOUT,
                text=True,
                env={**os.environ, "OMP_NUM_THREADS": "1", "MARKS": str(marks)},
                start_new_session=True,
            )
        return Launched(launcher, marks / "said", marks)

    def whole(self, name: str, *extra: str, processes: int = 2) -> Launched:
        run = self.launch(name, *extra, processes=processes)
        assert run.end() == 0, run.said()
        return run

    def stop(self, run: Launched, name: str, lines: int, rank: int | None, number: signal.Signals) -> int:
        """Send a signal when `lines` lines of metrics are written, to one process or, None, as a terminal does to the
        launcher; returns the step of the state that is left."""
        metrics = self.folder / name / "metrics.jsonl"
        wait_until(lambda: metrics.exists() and len(metrics.read_text().splitlines()) >= lines, run.launcher)
        os.kill(run.launcher.pid if rank is None else run.pid(rank), number)
        assert run.end() != 0
        header = (self.folder / name / "checkpoints" / "last.safetensors").read_bytes()[:4000]
        found = re.search(rb'\\"step\\": (\d+)', header)
        assert found
        return int(found[1])

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        return dict(peft.read(self.folder / name / "adapter").tensors)

    def validation(self, name: str) -> list[Any]:
        summary = json.loads((self.folder / name / "summary.json").read_text())
        return list(summary["validation"])

    def steps(self, name: str) -> list[int]:
        lines = (self.folder / name / "metrics.jsonl").read_text().splitlines()
        return [said["step"] for said in map(json.loads, lines) if "train_nll" in said]


@pytest.fixture(scope="module", autouse=True)
def one_thread_without_peft() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorafit.jobs.train.compare_with_peft", lambda *_: None)
        yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def runs(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tiny_folder, tmp_path_factory.mktemp("processes"))


@pytest.fixture(scope="module")
def one(runs: Runs) -> str:
    """The run of one process."""
    run_training(str(runs.base), str(runs.data), runs.folder / "one", SETTINGS)
    return "one"


@pytest.fixture(scope="module")
def two(runs: Runs) -> Launched:
    """The run of two processes that is never stopped, in `two`."""
    return runs.whole("two")


# The same result


def test_two_processes_end_with_the_adapter_of_one(runs: Runs, one: str, two: Launched) -> None:
    expected, found = runs.tensors(one), runs.tensors("two")
    assert expected.keys() == found.keys()
    worst = max(float((found[key] - tensor).norm() / tensor.norm()) for key, tensor in expected.items())
    assert 0 < worst < 1e-4  # 0 would mean that one process did it all


def test_two_processes_validate_as_one_does(runs: Runs, one: str, two: Launched) -> None:
    expected, found = runs.validation(one), runs.validation("two")
    assert [step for step, _ in found] == [step for step, _ in expected]
    assert [nll for _, nll in found] == pytest.approx([nll for _, nll in expected], rel=1e-5)
    assert expected[-1][1] < expected[0][1] - 0.2  # else this shows nothing


def test_both_processes_hold_the_same_factors_after_every_step(runs: Runs, two: Launched) -> None:
    assert two.masters(0) == two.masters(1)
    assert len(set(two.masters(0))) == runs.steps("two")[-1] == 240


def test_the_first_process_alone_speaks(two: Launched) -> None:
    assert two.said().count("training on 2 processes") == 1
    assert two.said().count("report: ") == 1


# Stopped, killed, and gone on with


@pytest.fixture(scope="module")
def killed(runs: Runs) -> tuple[Launched, int]:
    """A run that loses its second process, with the step of the state left; it is gone on with, to its end."""
    run = runs.launch("killed")
    step = runs.stop(run, "killed", 100, 1, signal.SIGKILL)
    runs.whole("killed", "--resume")
    return run, step


def test_a_killed_process_ends_the_run_with_the_last_whole_step_saved(killed: tuple[Launched, int]) -> None:
    run, step = killed
    assert (
        f"another process of the run has ended, stopped after step {step} of 240: repeat the command with --resume"
        in run.said()
    )
    assert len(run.masters(0)) == step > 90


def test_the_rest_of_a_killed_run_ends_it_bit_identical(
    runs: Runs, two: Launched, killed: tuple[Launched, int]
) -> None:
    assert peft.read(runs.folder / "killed" / "adapter") == peft.read(runs.folder / "two" / "adapter")
    assert runs.steps("killed") == runs.steps("two")
    assert runs.validation("killed") == runs.validation("two")


@pytest.mark.slow
def test_ctrl_c_stops_all_after_the_same_step_and_they_go_on_bit_identical(runs: Runs, two: Launched) -> None:
    run = runs.launch("stopped")
    step = runs.stop(run, "stopped", 60, None, signal.SIGINT)
    assert f"stopped after step {step} of 240: repeat the command with --resume" in run.said()
    assert len(run.masters(0)) == len(run.masters(1)) == step
    runs.whole("stopped", "--resume")
    assert peft.read(runs.folder / "stopped" / "adapter") == peft.read(runs.folder / "two" / "adapter")


@pytest.mark.slow
def test_where_the_first_process_is_killed_the_last_checkpoint_serves(runs: Runs, two: Launched) -> None:
    run = runs.launch("headless")
    runs.stop(run, "headless", 100, 0, signal.SIGKILL)
    runs.whole("headless", "--resume")
    assert peft.read(runs.folder / "headless" / "adapter") == peft.read(runs.folder / "two" / "adapter")


@pytest.mark.slow
def test_a_signal_to_one_process_stops_all(runs: Runs) -> None:
    run = runs.launch("asked")
    step = runs.stop(run, "asked", 60, 1, signal.SIGTERM)
    assert f"stopped after step {step} of 240" in run.said()


@pytest.mark.slow
def test_one_process_that_torchrun_starts_is_a_plain_run(runs: Runs, one: str) -> None:
    runs.whole("launched", processes=1)
    assert peft.read(runs.folder / "launched" / "adapter") == peft.read(runs.folder / one / "adapter")


@pytest.mark.slow
def test_dropout_is_drawn_anew_in_each_process_and_the_same_when_resumed(runs: Runs) -> None:
    runs.whole("dropping", "--dropout", "0.3")
    run = runs.launch("dropped", "--dropout", "0.3")
    runs.stop(run, "dropped", 100, 1, signal.SIGKILL)
    runs.whole("dropped", "--resume", "--dropout", "0.3")
    assert peft.read(runs.folder / "dropped" / "adapter") == peft.read(runs.folder / "dropping" / "adapter")


@pytest.mark.slow
@pytest.mark.slow
def test_two_processes_search_and_go_on_in_rounds_as_one_does(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The first gives every training as an order that the other carries out."""
    runs = Runs(tiny_folder, tmp_path)
    write_rows(runs.data, capitals(60))
    settings = {
        "epochs": 12,
        "batch_size": 4,
        "rank": 4,
        "val_share": 0.2,
        "dtype": "fp32",
        "few_shot": 0,
        "rounds": 1,
        "validations": 1,
    }
    monkeypatch.setattr("test_processes.SETTINGS", settings)
    runs.whole("two")
    run_training(str(tiny_folder), str(runs.data), tmp_path / "one", settings)
    tried = [json.loads((tmp_path / name / "search" / "tried.json").read_text()) for name in ("one", "two")]
    assert len(tried[0]) == 2
    for mine, theirs in zip(*tried, strict=True):
        assert mine["each"] == pytest.approx(theirs["each"], rel=1e-3)
    rounds = [json.loads((tmp_path / name / "rounds" / "history.json").read_text()) for name in ("one", "two")]
    assert [one["kind"] for one in rounds[0]] == [one["kind"] for one in rounds[1]] == ["more steps"]
    assert rounds[0][0]["after"] == pytest.approx(rounds[1][0]["after"], rel=1e-2)


def test_a_mistake_is_told_once(runs: Runs) -> None:
    run = runs.launch("wrong", "--targets", "q_porj")
    assert run.end() != 0
    assert run.said().count("matches no site") == 1
    assert not (runs.folder / "wrong").exists()


def test_another_number_of_processes_cannot_go_on(tiny_base: Base, tmp_path: Path) -> None:
    rows = rows_of(tiny_base, 6)
    train(tiny_base, start_of(tiny_base), rows[:4], rows[4:], SHORT, folder=tmp_path)
    file = tmp_path / "checkpoints" / "last.safetensors"
    content = file.read_bytes()
    file.write_bytes(content.replace(b'\\"processes\\": 1', b'\\"processes\\": 2'))
    with pytest.raises(RunError, match="processes: 2 when it was saved, 1 now"):
        train(tiny_base, start_of(tiny_base), rows[:4], rows[4:], SHORT, folder=tmp_path, resume=True)


# Shares


@pytest.mark.parametrize("count", [1, 2, 3, 5])
def test_every_row_is_dealt_once_and_no_share_is_empty(count: int) -> None:
    lengths = [40, 8, 8, 8, 9, 30, 10]
    dealt = shares(lengths, count)
    assert sorted(place for share in dealt for place in share) == list(range(len(lengths)))
    assert all(dealt)
    tokens = [sum(lengths[place] for place in share) for share in dealt]
    assert max(tokens) - min(tokens) <= max(lengths)


def test_shares_have_about_the_same_number_of_tokens() -> None:
    lengths = [17 + 13 * i % 50 for i in range(40)]
    tokens = [sum(lengths[place] for place in share) for share in shares(lengths, 2)]
    assert max(tokens) - min(tokens) <= 0.02 * sum(tokens)


def test_fewer_rows_than_shares_leave_some_empty() -> None:
    assert shares([5, 7], 3) == [[1], [0], []]


def test_the_gradients_of_the_shares_add_up_to_that_of_the_step(tiny_base: Base) -> None:
    rows = rows_of(tiny_base, 6)
    adapter = random_adapter(tiny_base, uniform(tiny_base.sites, 4, 8.0))
    n = sum(row.n_trained for row in rows)

    def gradient(parts: list[list[int]], n: int | None) -> tuple[torch.Tensor, float]:
        state = TrainState(adapter)
        with attach(tiny_base, state):
            batches = [collate([rows[i] for i in part], 256, CPU) for part in parts]
            nll = Runner(tiny_base, COMPLETION, APART).gradient(batches, n)
        assert state.master.grad is not None
        return state.master.grad, nll

    whole, nll = gradient([list(range(6))], None)
    (one, nll_1), (two, nll_2) = (gradient([share], n) for share in shares([len(row.ids) for row in rows], 2))
    assert (one + two - whole).norm() <= 1e-5 * whole.norm()
    assert nll_1 + nll_2 == pytest.approx(nll, rel=1e-5)


def test_more_processes_than_examples_in_a_step_are_refused() -> None:
    with pytest.raises(SettingsError, match="--batch-size 1: 2 processes cannot share a step of 1: raise it to 2"):
        Processes(0, 2).require_work(1)


def test_one_process_exchanges_nothing() -> None:
    values = torch.tensor([1.0, 2.0])
    ALONE.sum(values)
    assert values.tolist() == [1.0, 2.0]
    assert ALONE.agreed(lambda: "chosen") == "chosen"
    assert ALONE.differing({"a": 1}) == []
    assert ALONE.share([3, 1, 2]) == [0, 2, 1]
