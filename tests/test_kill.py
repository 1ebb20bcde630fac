"""Resume is bit-identical: runs are killed by SIGKILL, at chosen places and anywhere, and end as if never killed."""

from __future__ import annotations

import functools
import json
import multiprocessing
import os
import random
import signal
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import capitals, write_rows
from safetensors import safe_open

from lorafit.jobs import train as train_job
from lorafit.jobs.listener import Silent
from lorafit.jobs.train import run_training
from lorafit.runs.folder import LAST, METRICS, clear_left_by_kills
from lorafit.tasks import runner
from lorafit.training import checkpoint, journal
from lorafit.training.loop import Moment

pytestmark = pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="needs Linux's /proc, and fork")

STEPS, EVERY = 24, 4  # what SETTINGS come to
SETTINGS: dict[str, Any] = {
    "epochs": 4.0,
    "batch_size": 4,
    "rank": 4,
    "learning_rate": 3e-3,
    "patience": 99,
    "validations": 6,
    "few_shot": 0,
}
CLOCK = {"seconds", "beside"}  # how long things took


# The process that is killed


@dataclass(frozen=True)
class Kill:
    """Where to die: at `place`, when it is reached after `step` has been trained in this process (-1: at once).

    share: of a file that is written by then, or of the rows of a validation that are done. later: calls of functions
    that are made by then. cadence: checkpoints after every step, as time allows, or with validations alone.
    """

    place: str
    step: int = -1
    share: float = 0.5
    later: int = 0
    cadence: float = 1e9

    def __str__(self) -> str:
        return f"{self.place}, from step {self.step} on"


PLACES = [
    "before a backward",
    "after a backward",
    "before an update",
    "after an update",
    "before a line",
    "in a line",
    "in a validation",
    "in a write",
    "before a fsync",
    "after a fsync",
    "before a rename",
    "after a rename",
    "anywhere",
]
ENDS = ["before the rename of adapter", "after the rename of answers.jsonl", "before the rename of summary.json"]


class Doomed(Silent):
    """Listens to a run, and has the functions it passes through tell where it is; dies at one place."""

    def __init__(self, kill: Kill):
        self.kill, self.step, self.calls = kill, -1, 0

    def at(self, place: str) -> None:
        if place == self.kill.place and self.step >= self.kill.step:
            os.kill(os.getpid(), signal.SIGKILL)

    def moment(self, moment: Moment) -> None:
        if moment.valid_nll is None:
            self.step = moment.step
        self.at("before a line")
        if self.kill.place == "anywhere" and self.step >= self.kill.step:
            sys.setprofile(self.called)

    def called(self, *event: object) -> None:
        self.calls += 1
        if self.calls > self.kill.later:
            self.at("anywhere")

    def watch(self, what: str, done: int, of: int, unit: str = "examples") -> None:
        if what == "validation" and done >= self.kill.share * of:
            self.at("in a validation")

    def arm(self) -> None:
        self.around(torch.autograd, "backward", lambda *_: "a backward")
        self.around(torch.optim.AdamW, "step", lambda *_: "an update")
        self.around(os, "fsync", lambda to: "a fsync" if f".{LAST}." in path_of(to) else "")
        self.around(Path, "replace", lambda _, to: "a rename" if Path(to).name == LAST else f"the rename of {to.name}")
        self.around(Path, "rename", lambda _, to: f"the rename of {Path(to).name}")
        save_file, write_text, opened = checkpoint.save_file, journal.write_text, Path.open

        def half_a_file(tensors: Any, path: Path, said: Any) -> None:
            save_file(tensors, path, said)
            if self.kill.place == "in a write" and self.step >= self.kill.step:
                os.truncate(path, int(self.kill.share * path.stat().st_size))
            self.at("in a write")

        def half_a_line(path: Path, mode: str = "r", *more: Any, **named: Any) -> Any:
            file = opened(path, mode, *more, **named)
            if path.name == METRICS and mode == "a" and self.kill.place == "in a line" and self.step >= self.kill.step:
                file.write('{"step": 3, "train')
                file.flush()
                self.at("in a line")
            return file

        def not_yet(path: Path, text: str) -> None:
            self.at("before lines are dropped")
            write_text(path, text)

        checkpoint.save_file, journal.write_text, Path.open = half_a_file, not_yet, half_a_line  # type: ignore

    def around(self, owner: Any, name: str, place: Callable[..., str]) -> None:
        real = getattr(owner, name)

        @functools.wraps(real)
        def told(*given: Any, **named: Any) -> Any:
            where = place(*given)
            self.at(f"before {where}")
            result = real(*given, **named)
            self.at(f"after {where}")
            return result

        setattr(owner, name, told)


def path_of(descriptor: int) -> str:
    return str(Path(f"/proc/self/fd/{descriptor}").readlink())


def run_here(
    base: Path, data: Path, out: Path, settings: dict[str, Any], resume: bool, kill: Kill | None, threads: int
) -> None:
    """What a process of its own does: everything that is replaced here dies with it."""
    torch.set_num_threads(threads)
    runner.EVALUATION_TOKENS = 128  # several forwards in each validation
    train_job.compare_with_peft = lambda *_: None
    train_job.write_report = lambda *_: None
    listener = Doomed(kill or Kill("nowhere"))
    if kill:
        journal.CHECKPOINT_SHARE = kill.cadence
        listener.arm()
    run_training(str(base), str(data), out, settings, resume=resume, listener=listener)
    assert torch.get_num_threads() == threads


def unlike(row: dict[str, object]) -> dict[str, object]:
    """An answer of another kind: training makes it likelier for some steps, and then unlikelier."""
    return {**row, "completion": f"{str(row['completion'])[::-1]} So {row['prompt']}"}


class Runs:
    """The same run again and again, each in a process of its own."""

    def __init__(self, base: Path, folder: Path, settings: dict[str, Any], valid: int = 8):
        self.base, self.folder, self.settings = base, folder, settings
        self.data, rows = folder / "data", capitals(40)
        for name, split in (
            ("train", rows[:24]),
            ("valid", [unlike(row) for row in rows[24 : 24 + valid]]),
            ("test", rows[24 + valid : 27 + valid]),
        ):
            write_rows(self.data / f"{name}.jsonl", split)
        self.forks = multiprocessing.get_context("forkserver")  # forked from a process that has never computed
        self.forks.set_forkserver_preload(["lorafit.jobs.train", "transformers.models.llama.modeling_llama"])

    def run(self, out: Path, resume: bool = False, kill: Kill | None = None, threads: int = 1) -> int | None:
        """How the process ended."""
        given = (self.base, self.data, out, self.settings, resume, kill, threads)
        process = self.forks.Process(target=run_here, args=given)
        process.start()
        process.join(60)
        process.kill()
        return process.exitcode

    def killed(self, name: str, kills: Sequence[Kill], threads: int = 1) -> Path:
        """A run that each of these has ended, and that has then been let go on to its end."""
        out = self.folder / name
        for i, kill in enumerate(kills):
            assert self.run(out, resume=i > 0, kill=kill) == -signal.SIGKILL, f"did not die {kill}"
        assert self.run(out, resume=True, threads=threads) == 0
        return out


def bits(out: Path) -> dict[str, Any]:
    """All that a run leaves, except how long things took and how often the test was looked at."""
    with safe_open(out / "checkpoints" / LAST, framework="pt") as file:
        progress = json.loads(file.metadata()["progress"])
        tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 (not a dict)
    lines = [json.loads(line) for line in (out / METRICS).read_text(encoding="utf-8").splitlines()]
    return {
        "files": sorted(str(path.relative_to(out)) for path in out.rglob("*")),
        "adapter": {p.name: p.read_bytes() for p in (out / "adapter").iterdir() if p.name != "README.md"},
        "tensors": {name: (t.dtype, t.shape, t.numpy().tobytes()) for name, t in tensors.items()},
        "progress": {name: value for name, value in progress.items() if name not in CLOCK},
        "metrics": [{name: value for name, value in line.items() if name not in CLOCK} for line in lines],
    }


@pytest.fixture(scope="module")
def runs(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tiny_folder, tmp_path_factory.mktemp("kills"), SETTINGS)


@pytest.fixture(scope="module")
def whole(runs: Runs) -> dict[str, Any]:
    """What the run leaves that nothing has ended."""
    assert runs.run(runs.folder / "whole") == 0
    found = bits(runs.folder / "whole")
    curve = [nll for _, nll in found["progress"]["history"]]
    assert (found["progress"]["step"], len(curve), curve.index(min(curve))) == (STEPS, STEPS // EVERY + 1, 2)
    return found  # the best is neither where a run begins nor where it ends


def assert_same(found: dict[str, Any], whole: dict[str, Any]) -> None:
    for what, value in whole.items():
        assert found[what] == value, what


# Killed runs

IN_TRAINING = [
    Kill("in a validation"),  # the first, before there is a checkpoint
    Kill("after a backward", 6, cadence=0.0),
    Kill("in a validation", 14),
]
IN_A_CHECKPOINT = [
    Kill("in a write", 9, share=0.7),
    Kill("after a fsync", 13, cadence=0.0),
    Kill("before a rename", 18),
]


@pytest.mark.parametrize("kills", [IN_TRAINING, IN_A_CHECKPOINT], ids=["in training", "in a checkpoint"])
def test_a_killed_run_ends_bit_identical_and_leaves_nothing_behind(
    runs: Runs, whole: dict[str, Any], kills: list[Kill], request: pytest.FixtureRequest
) -> None:
    assert_same(bits(runs.killed(request.node.callspec.id, kills)), whole)


def drawn(seed: int) -> list[Kill]:
    """Five kills in one run, at places and steps that differ, one as it goes on, one at its very end. In three seeds
    every place has its turn."""
    draw, places = random.Random(seed), [*PLACES, "anywhere", "anywhere"]
    random.Random(seed // 3).shuffle(places)
    steps = sorted(draw.randrange(STEPS - EVERY) for _ in range(5))
    kills = [
        Kill(place, step, draw.uniform(0, 0.6), draw.randrange(4000), draw.choice([0.0, journal.CHECKPOINT_SHARE, 1e9]))
        for place, step in zip(islice(places, seed % 3 * 5, None), steps, strict=False)
    ]
    return [*kills, Kill("before lines are dropped"), Kill(ENDS[seed % 3])]


def test_every_place_has_its_turn_and_there_are_more_than_twenty() -> None:
    kills = [kill for seed in range(6) for kill in drawn(seed)]
    assert {kill.place for kill in kills} == {*PLACES, *ENDS, "before lines are dropped"}
    assert len(kills) == 42


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(6))
def test_a_run_killed_again_and_again_ends_bit_identical_and_leaves_nothing_behind(
    runs: Runs, whole: dict[str, Any], seed: int
) -> None:
    assert_same(bits(runs.killed(f"chain {seed}", drawn(seed))), whole)


@pytest.mark.slow
def test_a_run_with_dropout_draws_the_same_when_killed(tiny_folder: Path, tmp_path: Path) -> None:
    """Sites go one by one there, and together in the other runs."""
    runs = Runs(tiny_folder, tmp_path, {**SETTINGS, "dropout": 0.1})
    assert runs.run(tmp_path / "whole") == 0
    assert_same(bits(runs.killed("killed", drawn(0))), bits(tmp_path / "whole"))


@pytest.mark.slow
def test_a_run_that_reads_its_lowest_blocks_from_disk_does_so_when_killed(tiny_folder: Path, tmp_path: Path) -> None:
    upper = ["layers.1.self_attn.q_proj", "layers.1.mlp.down_proj"]
    runs = Runs(tiny_folder, tmp_path, {**SETTINGS, "targets": upper, "trunk_gb": 0.1})
    kills = [Kill("before a backward", 2), Kill("anywhere", 5, later=700), Kill("in a write", 8), Kill("in a line", 15)]
    assert runs.run(tmp_path / "whole") == 0
    assert runs.run(tmp_path / "seen", kill=kills[0]) == -signal.SIGKILL
    assert [*(tmp_path / "seen").glob("trunk-*.bin")]  # else this test shows nothing
    assert_same(bits(runs.killed("killed", kills)), bits(tmp_path / "whole"))


def test_a_run_killed_while_it_searches_ends_the_same(tiny_folder: Path, tmp_path: Path) -> None:
    settings = {**SETTINGS, "epochs": 18}
    del settings["learning_rate"]
    runs = Runs(tiny_folder, tmp_path, settings, valid=12)
    kills = [Kill("after a backward", 6, cadence=0.0), Kill("in a write", 15, share=0.5), Kill("after an update", 19)]
    assert runs.run(tmp_path / "whole") == 0
    tried = [
        json.loads((out / "search" / "tried.json").read_text(encoding="utf-8"))
        for out in (runs.killed("killed", kills), tmp_path / "whole")
    ]
    assert len(tried[0]) == 2
    assert tried[0] == tried[1]
    assert_same(bits(tmp_path / "killed"), bits(tmp_path / "whole"))


def test_a_run_goes_on_with_its_own_number_of_threads(runs: Runs, whole: dict[str, Any]) -> None:
    """Begun on one, gone on with where torch has two, and has two again afterwards."""
    assert_same(bits(runs.killed("threads", [Kill("after an update", 9)], threads=2)), whole)


def test_a_run_killed_before_it_has_begun_is_begun_again(runs: Runs) -> None:
    out = runs.folder / "early"
    assert runs.run(out, kill=Kill("before the rename of run.json")) == -signal.SIGKILL
    assert [path.name[:10] for path in out.iterdir()] == [".run.json."]
    assert runs.run(out, kill=Kill("in a validation")) == -signal.SIGKILL
    assert [path.name for path in out.iterdir() if path.name.startswith(".")] == []


def test_only_what_killed_writes_have_left_is_removed(tmp_path: Path) -> None:
    theirs = [
        ".gitignore",
        ".notes.txt.abcd1234",
        ".run.json.saved",
        "run.json",
        "checkpoints/last.safetensors",
        "scores/.run.json.abcd1234",
        "mine/.run.json.abcd1234",
        "adapter/README.md",
    ]
    ours = [
        ".run.json.abcd1234",
        ".probe.a_cd1234",
        ".adapter.abcd1234/adapter_model.safetensors",
        ".adapter.abcd1234.old/README.md",
        "checkpoints/.last.safetensors.abcd1234",
        "scores/.answers.jsonl.abcd1234",
    ]
    for name in (*theirs, *ours):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).touch()
    clear_left_by_kills(tmp_path)
    assert {str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file()} == set(theirs)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".adapter")]
