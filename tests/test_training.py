"""Training: exact gradients, one seed, bit-identical resume, and what is kept of a run."""

from __future__ import annotations

import gc
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import nullcontext
from dataclasses import replace
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import byte_tokenizer, capitals, tiny_gpt2, tiny_llama, write_rows
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import GenerationConfig, LlamaForCausalLM

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.formats import peft
from lorafit.adapters.plan import uniform
from lorafit.adapters.state import TrainState
from lorafit.attachment.adapters import attach
from lorafit.attachment.pure import fresh
from lorafit.bases.base import Base, open_base
from lorafit.data.batches import collate, epoch_order
from lorafit.data.examples import Example, Message
from lorafit.data.render import Row, render, renderer_for
from lorafit.digests import digest_of_format_1
from lorafit.errors import AdapterError, DivergedError, FormatError, RunError, SettingsError
from lorafit.generation.greedy import generate
from lorafit.jobs.train import run_training
from lorafit.planning.rules import all_linear
from lorafit.tasks.completion import COMPLETION
from lorafit.tasks.forward import token_nll
from lorafit.tasks.probe import mode_of
from lorafit.tasks.runner import Runner
from lorafit.tasks.task import PLAIN, ForwardMode
from lorafit.testing import random_adapter
from lorafit.training import optimizer as adamw
from lorafit.training.loop import same_bits, train, train_steps
from lorafit.training.recipe import Recipe

CPU = torch.device("cpu")
APART = ForwardMode(separate_head=True, packed=False)
SHORT = Recipe(learning_rate=1e-2, batch_size=4, steps=6, warmup=1, validate_every=3)


pytestmark = pytest.mark.usefixtures("one_thread")


def examples_of(rows: Sequence[dict[str, object]]) -> list[Example]:
    turns = [(Message("user", str(r["prompt"])), Message("assistant", str(r["completion"]))) for r in rows]
    return [Example(messages, f"test:{i}") for i, messages in enumerate(turns)]


def rows_of(base: Base, n: int) -> list[Row]:
    """Rows whose answers differ much in length, so that a mean of means would show."""
    rows = capitals(n)
    return render(
        renderer_for(base), examples_of([{**r, "completion": "x" * (i * i)} for i, r in enumerate(rows, 1)]), 512
    )


def start_of(base: Base, rank: int = 4, seed: int = 0, variant: str = "lora") -> Adapter:
    return fresh(base, uniform(base.sites, rank, 32.0, variant), seed)


# Gradients


def accumulated(base: Base, adapter: Adapter, parts: Sequence[Sequence[Row]]) -> torch.Tensor:
    state = TrainState(adapter)
    with attach(base, state):
        Runner(base, COMPLETION, APART).gradient([collate(part, 256, CPU) for part in parts])
    assert state.master.grad is not None
    return state.master.grad


def plain_loss(base: Base, rows: Sequence[Row]) -> torch.Tensor:
    """Mean cross entropy over the trained tokens of one full batch, by the textbook."""
    batch = collate(rows, 256, CPU)
    logits = base.model(input_ids=batch.ids, use_cache=False).logits
    labels = batch.ids.masked_fill(~batch.trained, -100)
    return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten(), ignore_index=-100)


@pytest.fixture
def uneven(tiny_base: Base) -> tuple[Base, Adapter, list[Row]]:
    return tiny_base, random_adapter(tiny_base, uniform(tiny_base.sites, 4, 8.0)), rows_of(tiny_base, 6)


def assert_near(found: torch.Tensor, expected: torch.Tensor, within: float) -> None:
    assert (found - expected).norm() <= within * expected.norm()


@pytest.mark.parametrize("cuts", [(1,), (5,), (2, 3), (1, 2, 3, 4, 5)], ids=str)
def test_gradient_is_the_same_however_a_step_is_divided(
    uneven: tuple[Base, Adapter, list[Row]], cuts: tuple[int, ...]
) -> None:
    base, adapter, rows = uneven
    edges = [0, *cuts, len(rows)]
    parts = [rows[a:b] for a, b in pairwise(edges)]
    assert_near(accumulated(base, adapter, parts), accumulated(base, adapter, [rows]), 1e-5)


def test_gradient_is_that_of_plain_full_batch_cross_entropy(uneven: tuple[Base, Adapter, list[Row]]) -> None:
    base, adapter, rows = uneven
    state = TrainState(adapter)
    with attach(base, state):
        plain_loss(base, rows).backward()
    assert state.master.grad is not None
    assert_near(accumulated(base, adapter, [rows[:1], rows[1:]]), state.master.grad, 1e-5)


def test_mean_of_means_would_have_been_noticed(uneven: tuple[Base, Adapter, list[Row]]) -> None:
    base, adapter, rows = uneven
    state = TrainState(adapter)
    with attach(base, state):
        for part in (rows[:1], rows[1:]):
            (plain_loss(base, part) / 2).backward()
    assert state.master.grad is not None
    exact = accumulated(base, adapter, [rows[:1], rows[1:]])
    assert (state.master.grad - exact).norm() > 0.05 * exact.norm()


def test_loss_told_is_the_mean_over_all_trained_tokens(uneven: tuple[Base, Adapter, list[Row]]) -> None:
    base, adapter, rows = uneven
    state = TrainState(adapter)
    with attach(base, state):
        told = Runner(base, COMPLETION, APART).gradient([collate([row], 256, CPU) for row in rows])
        assert told == pytest.approx(float(plain_loss(base, rows).detach()), rel=1e-5)


@pytest.mark.parametrize("variant", ["lora", "dora"])
def test_every_b_has_a_gradient_at_the_first_step_and_every_a_at_the_second(tiny_base: Base, variant: str) -> None:
    rows = rows_of(tiny_base, 4)
    state = TrainState(fresh(tiny_base, uniform(all_linear(tiny_base), 4, 32.0, variant), seed=0))
    optimizer = adamw.make_optimizer(state)
    moved = []
    with attach(tiny_base, state):
        for _ in range(2):
            Runner(tiny_base, COMPLETION, APART).gradient([collate(rows, 256, CPU)])
            moved.append({key for key, gradient in state.gradients().items() if gradient.abs().sum() > 0})
            adamw.step(state, optimizer, 1e-2, 0.0, 1.0)
    every = set(state.adapter.tensors)
    assert moved[0] == {key for key in every if not key.endswith(".A")}
    assert moved[1] == every


# The head


def test_running_the_head_on_trained_positions_only_gives_the_same_nll(tiny_base: Base) -> None:
    batch = collate(rows_of(tiny_base, 5), 256, CPU)
    with torch.no_grad():
        apart, whole = (token_nll(tiny_base, batch, way) for way in (APART, PLAIN))
    assert torch.allclose(apart, whole, rtol=1e-5, atol=1e-6)
    assert len(apart) == batch.n_trained


class ScalesItsLogits(LlamaForCausalLM):
    def forward(self, *args: Any, **kwargs: Any) -> Any:
        out = super().forward(*args, **kwargs)
        out.logits = out.logits * 0.5
        return out


def test_evaluation_keeps_no_logits(tiny_base: Base) -> None:
    """Only sums outlive a batch: the memory of an evaluation does not grow with its examples."""
    rows = capital_rows(tiny_base, 12)
    vocabulary = tiny_base.model.config.vocab_size

    def logits() -> list[torch.Tensor]:
        tensors = [x for x in gc.get_objects() if type(x) is torch.Tensor]  # isinstance would wake lazy objects
        return [x for x in tensors if x.ndim > 1 and x.shape[-1] == vocabulary]

    before, seen = logits(), []  # what other tests keep is held here, so that no new tensor takes its identity
    known = {id(x) for x in before}

    def look(done: int, of: int) -> None:
        seen.append([tuple(x.shape) for x in logits() if id(x) not in known])

    long = [replace(row, ids=row.ids * 8, trained=row.trained * 8) for row in rows]
    Runner.of(tiny_base, long).nll(long, look)
    assert len(seen) > 1
    assert not any(seen)


def test_a_plain_head_is_known_as_plain(tiny_base: Base) -> None:
    assert mode_of(tiny_base, rows_of(tiny_base, 2)).separate_head


def test_a_model_that_scales_its_logits_after_the_head_is_noticed(tiny_base: Base) -> None:
    model = ScalesItsLogits(tiny_llama().config).eval()
    assert not mode_of(replace(tiny_base, model=model), rows_of(tiny_base, 2)).separate_head


# One seed


def digest_of(base: Base, seed: int, recipe: Recipe = SHORT) -> str:
    rows = rows_of(base, 9)
    return train(base, start_of(base, seed=seed), rows[:6], rows[6:], replace(recipe, seed=seed)).adapter.digest()


def test_the_same_seed_gives_the_same_adapter_bit_for_bit(tiny_base: Base) -> None:
    recipe = replace(SHORT, dropout=0.2)
    torch.manual_seed(1)
    one = digest_of(tiny_base, 5, recipe)
    torch.manual_seed(2)
    assert digest_of(tiny_base, 5, recipe) == one


def test_another_seed_gives_another_adapter(tiny_base: Base) -> None:
    assert digest_of(tiny_base, 5) != digest_of(tiny_base, 6)


def test_the_seed_covers_the_first_values_of_a(tiny_base: Base) -> None:
    key = f"{tiny_base.sites[0].path}.A"
    first, same, other = (start_of(tiny_base, seed=seed).tensors[key] for seed in (1, 1, 2))
    assert torch.equal(first, same)
    assert not torch.equal(first, other)


def test_the_seed_covers_the_order_of_the_data(tiny_base: Base) -> None:
    rows = rows_of(tiny_base, 9)
    assert epoch_order(rows, 2, 1, 0) == epoch_order(rows, 2, 1, 0)
    assert epoch_order(rows, 2, 1, 0) != epoch_order(rows, 2, 2, 0)


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_the_seed_covers_dropout(tiny_base: Base, dropout: float) -> None:
    """One row and one start leave nothing to draw but dropout."""
    rows = rows_of(tiny_base, 2)
    start, recipe = start_of(tiny_base), replace(SHORT, dropout=dropout)
    one, other = (train(tiny_base, start, rows[:1], rows[1:], replace(recipe, seed=s)).adapter for s in (1, 2))
    assert (one == other) == (dropout == 0.0)


def test_training_leaves_the_global_generator_where_it_was(tiny_base: Base) -> None:
    before = torch.random.get_rng_state()
    digest_of(tiny_base, 5, replace(SHORT, dropout=0.2))
    assert torch.equal(torch.random.get_rng_state(), before)


# Stopping and going on

SETTINGS = {
    "epochs": 40.0,
    "batch_size": 4,
    "rank": 4,
    "dropout": 0.1,
    "dtype": "fp32",
    "patience": 99,
    "validations": 8,
}
WITHOUT_PEFT = "import sys; sys.modules['peft'] = None\n"  # spares every run the check by PEFT
# Under nohup a hangup is ignored, and so it is by what runs there: whoever runs the tests so must not change them.
HANGS_UP = "import signal; hasattr(signal, 'SIGHUP') and signal.signal(signal.SIGHUP, signal.SIG_DFL)\n"
COMMAND = WITHOUT_PEFT + HANGS_UP + "from lorafit.cli import main; main()"
HANGS_AT_STEP_70 = """
import sys, time
from pathlib import Path
from lorafit.training import loop
hanging, real, calls = Path(sys.argv.pop()), loop.Runner.gradient, []
def hangs(*given):
    calls.append(1)
    if len(calls) == 70:
        hanging.touch()
        time.sleep(120)
    return real(*given)
loop.Runner.gradient = hangs
"""


def flags() -> list[str]:
    return [part for name, value in SETTINGS.items() for part in (f"--{name.replace('_', '-')}", str(value))]


class Runs:
    """The same run, in processes of their own that can be stopped, and in this one."""

    def __init__(self, base: Path, folder: Path):
        self.base, self.folder = base, folder
        self.data = write_rows(folder / "rows.jsonl", capitals(24))

    def begin(self, name: str, *extra: str, code: str = COMMAND, last: str | None = None) -> subprocess.Popen[str]:
        out = str(self.folder / name)
        command = [sys.executable, "-c", code, "train", str(self.base), str(self.data), "--out", out, *flags(), *extra]
        return subprocess.Popen(
            [*command, *([last] if last else [])],
            env={**os.environ, "OMP_NUM_THREADS": "1"},
            text=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
        )

    def here(self, name: str, resume: bool = False) -> str:
        run_training(str(self.base), str(self.data), self.folder / name, SETTINGS, resume=resume)
        return self.digest(name)

    def digest(self, name: str) -> str:
        return peft.read(self.folder / name / "adapter").digest()

    def lines(self, name: str) -> list[dict[str, Any]]:
        path = self.folder / name / "metrics.jsonl"
        text = path.read_text(encoding="utf-8") if path.exists() else ""
        return [json.loads(line) for line in text.splitlines(keepends=True) if line.endswith("\n")]

    def wait_for_lines(self, name: str, count: int, process: subprocess.Popen[str]) -> None:
        wait_until(lambda: len(self.lines(name)) >= count, process)

    def told(self, name: str) -> list[tuple[int, str]]:
        """Step and kind of every line of metrics."""
        return [(line["step"], "valid" if "valid_nll" in line else "train") for line in self.lines(name)]


def wait_until(is_so: Callable[[], bool], process: subprocess.Popen[str]) -> None:
    end = time.monotonic() + 90
    while not is_so():
        assert process.poll() is None, process.communicate()[1]
        assert time.monotonic() < end
        time.sleep(0.01)


@pytest.fixture(scope="module")
def runs(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return Runs(tiny_folder, tmp_path_factory.mktemp("runs"))


@pytest.fixture(autouse=True, scope="module")
def without_peft() -> Iterator[None]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorafit.jobs.train.compare_with_peft", lambda *_: None)
        yield


@pytest.fixture(scope="module")
def whole(runs: Runs) -> str:
    """Digest of the run that is never stopped."""
    return runs.here("whole")


# That a closed terminal saves the step in progress is a test of its own, further down.
@pytest.mark.parametrize(
    "sent", [signal.SIGINT, signal.SIGTERM, pytest.param(signal.SIGHUP, marks=pytest.mark.slow)], ids=str
)
def test_a_run_stopped_by_ctrl_c_says_how_to_go_on_and_ends_bit_identical(
    runs: Runs, whole: str, sent: signal.Signals
) -> None:
    name = f"stopped-{sent.name}"
    process = runs.begin(name)
    runs.wait_for_lines(name, 40, process)
    process.send_signal(sent)
    _, said = process.communicate(timeout=60)
    assert (process.returncode, len(runs.lines(name)) < len(runs.lines("whole"))) == (130, True), said
    assert "--resume" in said
    again = runs.begin(name, "--resume")
    _, said = again.communicate(timeout=120)
    assert again.returncode == 0, said
    assert runs.digest(name) == whole
    assert runs.told(name) == runs.told("whole")


def test_a_run_whose_terminal_is_closed_saves_the_step_in_progress(runs: Runs) -> None:
    """The reader of its words is gone, and so is the terminal, which sends SIGHUP, often twice."""
    process = runs.begin("closed")
    runs.wait_for_lines("closed", 40, process)
    assert process.stderr is not None
    process.stderr.close()
    process.send_signal(signal.SIGHUP)
    process.send_signal(signal.SIGHUP)
    process.wait(60)
    assert process.returncode == 130
    saved = runs.folder / "closed" / "checkpoints" / "last.safetensors"
    with safe_open(saved, framework="pt") as file:
        step = json.loads(file.metadata()["progress"])["step"]
    assert step == max(at for at, _ in runs.told("closed"))


def test_a_killed_run_goes_on_bit_identical_with_no_step_told_twice(runs: Runs, whole: str) -> None:
    process = runs.begin("killed")
    runs.wait_for_lines("killed", 50, process)
    process.kill()
    process.communicate(timeout=60)
    assert process.returncode == -signal.SIGKILL
    assert len(runs.lines("killed")) < len(runs.lines("whole"))
    assert runs.here("killed", resume=True) == whole
    assert runs.told("killed") == runs.told("whole")


def test_a_second_ctrl_c_ends_at_once_and_leaves_what_resumes(runs: Runs, whole: str) -> None:
    hanging = runs.folder / "hanging"
    process = runs.begin("twice", code=HANGS_AT_STEP_70 + COMMAND, last=str(hanging))
    wait_until(hanging.exists, process)
    process.send_signal(signal.SIGINT)
    time.sleep(0.5)
    assert process.poll() is None  # the first one waits for the step in progress
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=20)
    assert process.returncode == 130
    assert runs.here("twice", resume=True) == whole


def test_steps_leave_the_base_to_others_in_between_and_end_as_train_does(tiny_base: Base) -> None:
    rows = rows_of(tiny_base, 6)
    whole = train(tiny_base, start_of(tiny_base), rows[:4], rows[4:], SHORT)
    bare = Runner.of(tiny_base, rows)
    before, other = bare.nll(rows), random_adapter(tiny_base, uniform(tiny_base.sites, 2, 8.0))
    steps, moments = train_steps(tiny_base, start_of(tiny_base), rows[:4], rows[4:], SHORT), []
    while True:
        try:
            moments.append(next(steps))
        except StopIteration as end:
            trained = end.value
            break
        with attach(tiny_base, other):
            assert bare.nll(rows) != before
        assert bare.nll(rows) == before
    assert (trained.adapter, trained.history) == (whole.adapter, whole.history)
    assert [moment.step for moment in moments if moment.train_nll is not None] == list(range(1, SHORT.steps + 1))


def test_steps_that_are_closed_are_saved_and_resumed_from_there(tiny_base: Base, tmp_path: Path) -> None:
    rows = rows_of(tiny_base, 6)
    whole = train(tiny_base, start_of(tiny_base), rows[:4], rows[4:], SHORT)
    steps = train_steps(tiny_base, start_of(tiny_base), rows[:4], rows[4:], SHORT, folder=tmp_path)
    done = next(moment.step for moment in steps if moment.step == 2 and moment.train_nll is not None)
    steps.close()
    again = []
    resumed = train(
        tiny_base, start_of(tiny_base), rows[:4], rows[4:], SHORT, folder=tmp_path, resume=True, tell=again.append
    )
    assert resumed.adapter == whole.adapter
    assert min(moment.step for moment in again if moment.train_nll is not None) == done + 1


def test_resuming_with_another_setting_is_refused_by_name(runs: Runs, whole: str) -> None:
    (runs.folder / "whole" / "summary.json").rename(runs.folder / "whole" / "summary.away")
    try:
        with pytest.raises(SettingsError, match="rank: 4 when it began, 2 now"):
            run_training(str(runs.base), str(runs.data), runs.folder / "whole", {**SETTINGS, "rank": 2}, resume=True)
    finally:
        (runs.folder / "whole" / "summary.away").rename(runs.folder / "whole" / "summary.json")


Begun = tuple[Base, Adapter, list[Row], Recipe]
OTHERS: dict[str, Callable[[Base, Adapter, list[Row], Recipe], Begun]] = {
    "base": lambda b, a, r, c: (replace(b, identity="f" * 64), replace(a, base="f" * 64), r, c),
    "rows": lambda b, a, r, c: (b, a, r[1:], c),
    "recipe": lambda b, a, r, c: (b, a, r, replace(c, learning_rate=2e-2)),
    "start": lambda b, a, r, c: (b, random_adapter(b, a.plan), r, c),
    "trainable": lambda b, a, r, c: (b, start_of(b, rank=2), r, c),
}


@pytest.mark.parametrize("what", OTHERS)
def test_a_checkpoint_of_another_run_is_refused_naming_what_differs(tiny_base: Base, tmp_path: Path, what: str) -> None:
    rows = rows_of(tiny_base, 6)
    begun = (tiny_base, start_of(tiny_base), rows[:4], SHORT)
    train(*begun[:3], rows[4:], SHORT, folder=tmp_path)
    base, adapter, train_rows, recipe = OTHERS[what](*begun)
    with pytest.raises(RunError) as caught:
        train(base, adapter, train_rows, rows[4:], recipe, folder=tmp_path, resume=True)
    named = [line.split(":")[0].strip() for line in str(caught.value).splitlines()[1:-1]]
    assert what in named
    assert set(named) <= {what, "start"}  # a start carries its base and its shapes


def damage_cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


def damage_other_file(path: Path) -> None:
    path.write_bytes(b"not a checkpoint at all")


def damage_no_header(path: Path) -> None:
    save_file(load_file(path), path)


def damage_no_best(path: Path) -> None:
    tensors = load_file(path)
    tensors.pop("best")
    save_file(tensors, path, {"progress": json.dumps({"run": {}})})


@pytest.mark.parametrize("damage", [damage_cut, damage_other_file, damage_no_header, damage_no_best])
def test_a_damaged_checkpoint_is_refused(tiny_base: Base, tmp_path: Path, damage: Callable[[Path], None]) -> None:
    rows = rows_of(tiny_base, 6)
    train(tiny_base, start_of(tiny_base), rows[:4], rows[4:], SHORT, folder=tmp_path)
    damage(tmp_path / "checkpoints" / "last.safetensors")
    with pytest.raises(FormatError, match=r"last\.safetensors.*damaged"):
        train(tiny_base, start_of(tiny_base), rows[:4], rows[4:], SHORT, folder=tmp_path, resume=True)


def test_a_run_that_an_earlier_version_began_is_resumed(
    tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its checkpoint has the digest of its rows as Python printed them."""
    rows = rows_of(tiny_base, 6)
    with monkeypatch.context() as patch:
        patch.setattr("lorafit.training.loop.digest_of", digest_of_format_1)
        trained = train(tiny_base, start_of(tiny_base), rows[:4], rows[4:], SHORT, folder=tmp_path)
    again = train(tiny_base, start_of(tiny_base), rows[:4], rows[4:], SHORT, folder=tmp_path, resume=True)
    assert again.adapter == trained.adapter
    with pytest.raises(RunError, match="rows: "):
        train(tiny_base, start_of(tiny_base), rows[1:4], rows[4:], SHORT, folder=tmp_path, resume=True)


def test_on_a_gpu_algorithms_that_give_the_same_bits_are_taken() -> None:
    for device, taken in (("cpu", False), ("cuda", True)):
        with same_bits(torch.device(device)):
            assert torch.are_deterministic_algorithms_enabled() is taken
            assert torch.is_deterministic_algorithms_warn_only_enabled() is taken
        assert not torch.are_deterministic_algorithms_enabled()


def test_training_asks_for_the_same_bits_on_its_device(tiny_base: Base, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[torch.device] = []
    monkeypatch.setattr("lorafit.training.loop.same_bits", lambda device: nullcontext(asked.append(device)))
    rows = rows_of(tiny_base, 6)
    train(tiny_base, start_of(tiny_base), rows[:4], rows[4:], SHORT)
    assert asked == [tiny_base.device]


def test_validations_are_told_of_while_they_go_on(tiny_base: Base) -> None:
    rows = rows_of(tiny_base, 6)
    told: list[tuple[int, int]] = []
    train(tiny_base, start_of(tiny_base), rows[:4], rows[4:], SHORT, watch=lambda done, of: told.append((done, of)))
    assert told == [(0, 2)] * 3  # three validations of two rows in one batch, whose end comes with the result


def test_one_validation_more_comes_early_and_changes_nothing_else(
    tiny_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = rows_of(tiny_base, 6)
    recipe = replace(SHORT, steps=16, validate_every=8)
    trained = train(tiny_base, start_of(tiny_base), rows[:4], rows[4:], recipe)
    assert [step for step, _ in trained.history] == [0, 1, 8, 16]
    assert [recipe.validations_after(step) for step in (0, 1, 8, 16)] == [3, 2, 1, 0]
    assert replace(recipe, validate_every=16).early == 0, "an arm of a search is scored where it ends"
    monkeypatch.setattr("lorafit.training.recipe.EARLY", 99)
    plain = train(tiny_base, start_of(tiny_base), rows[:4], rows[4:], recipe)
    assert tuple(one for one in trained.history if one[0] != 1) == plain.history


# What is kept of a run

OVERFITS = Recipe(learning_rate=2e-2, batch_size=4, steps=60, warmup=1, validate_every=4, patience=99)


def capital_rows(base: Base, n: int) -> list[Row]:
    return render(renderer_for(base), examples_of(capitals(n)), 512)


def test_the_best_by_validation_is_the_adapter(tiny_base: Base) -> None:
    rows = capital_rows(tiny_base, 12)
    trained = train(tiny_base, start_of(tiny_base), rows[:4], rows[4:], OVERFITS)
    curve = [nll for _, nll in trained.history]
    with attach(tiny_base, trained.adapter):
        values = Runner.of(tiny_base, rows[4:]).nll(rows[4:])
    assert curve[-1] > min(curve) + 0.1  # else this test shows nothing
    assert sum(values) / len(values) == min(curve)


def test_training_stops_after_patience_validations_without_a_better_one(tiny_base: Base) -> None:
    rows = capital_rows(tiny_base, 12)
    trained = train(tiny_base, start_of(tiny_base), rows[:4], rows[4:], replace(OVERFITS, patience=2))
    best = [step for step, _ in trained.history].index(trained.best_step)
    assert len(trained.history) == best + 1 + 2
    assert trained.steps == trained.history[-1][0] < OVERFITS.steps


def test_a_run_that_stopped_early_does_not_train_on_when_resumed(tiny_base: Base, tmp_path: Path) -> None:
    rows = capital_rows(tiny_base, 12)
    recipe = replace(OVERFITS, patience=2)
    first, again = (
        train(tiny_base, start_of(tiny_base), rows[:4], rows[4:], recipe, folder=tmp_path, resume=resume)
        for resume in (False, True)
    )
    assert again.history == first.history
    assert again.adapter == first.adapter


@pytest.mark.parametrize(
    ("rate", "what"), [(1.0, "validation NLL rose"), (1e4, "the gradient has vanished"), (1e30, "no longer a number")]
)
def test_divergence_is_an_error_that_proposes_a_rate(tiny_base: Base, rate: float, what: str) -> None:
    rows = capital_rows(tiny_base, 8)
    recipe = Recipe(learning_rate=rate, batch_size=4, steps=30, warmup=1, validate_every=5)
    with pytest.raises(DivergedError, match=f"{what}.*--learning-rate {rate / 3:.1e}".replace("+", r"\+")):
        train(tiny_base, start_of(tiny_base), rows[:5], rows[5:], recipe)


def test_answers_end_by_themselves_and_a_batch_answers_as_each_alone(tiny_base: Base) -> None:
    """The tokenizer's pad token is its end of turn: masked by pad, the end would never be learnt."""
    assert tiny_base.tokenizer.pad_token_id == tiny_base.tokenizer.eos_token_id
    examples, renderer = examples_of(capitals(12)), renderer_for(tiny_base)
    rows = render(renderer, examples, 512)
    recipe = Recipe(learning_rate=1e-2, batch_size=12, steps=200, warmup=5, validate_every=100)
    trained = train(tiny_base, start_of(tiny_base, rank=16), rows, rows, recipe)
    assert trained.history[-1][1] < 0.1
    prompts = [renderer.prompt_ids(example.messages[:-1]) for example in examples]
    with attach(tiny_base, trained.adapter):
        together = generate(tiny_base, renderer, prompts, 40)
        alone = [generate(tiny_base, renderer, [prompt], 40)[0] for prompt in prompts]
    assert together == alone
    assert all(answer.stopped for answer in together)
    assert [answer.text for answer in together] == [example.answer for example in examples]


def test_what_all_prompts_begin_with_is_computed_once_and_changes_no_answer(tmp_path: Path) -> None:
    """Learnt positions too (GPT-2), and prompts of unequal length, one of them the beginning of another."""
    tiny_gpt2().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    base = open_base(tmp_path, torch.float32)
    renderer = renderer_for(base)
    prompts = [list(b"What everyone is asked first: " + rest) for rest in (b"a", b"b, at length, twice", b"a?", b"cc")]
    with attach(base, random_adapter(base, uniform(base.sites, 4, 32), size=0.3)):
        together = generate(base, renderer, prompts, 24)
        alone = [generate(base, renderer, [prompt], 24)[0] for prompt in prompts]
    assert together == alone
    assert len({answer.text for answer in together}) > 1


def test_decoding_is_greedy_whatever_the_base_is_used_to(tmp_path: Path) -> None:
    """transformers mixes what generation_config.json says into every call (Qwen ships a penalty on repetition)."""
    tiny_llama().save_pretrained(tmp_path)
    byte_tokenizer().save_pretrained(tmp_path)
    base = open_base(tmp_path, torch.float32)
    prompts = [list(b"one two one two one"), list(b"once upon a time, once")]
    with attach(base, random_adapter(base, uniform(base.sites, 4, 32), size=0.3)):
        plain = generate(base, renderer_for(base), prompts, 24)
        habits = GenerationConfig(
            repetition_penalty=1.5,
            no_repeat_ngram_size=2,
            num_beams=3,
            do_sample=True,
            eos_token_id=256,
            suppress_tokens=list(range(120)),
        )
        base.model.generation_config = habits
        assert generate(base, renderer_for(base), prompts, 24) == plain
    assert base.model.generation_config is habits


def test_a_loop_that_writes_past_the_version_counter_trains_all_the_same(tiny_folder: Path) -> None:
    """`p.data -= ...` leaves the counter as it is: under bf16 the views must be made anew all the same."""
    base = open_base(tiny_folder, torch.bfloat16)
    state = TrainState(random_adapter(base, uniform(base.sites, 4, 32)), CPU)
    rows = rows_of(base, 3)
    losses = []
    with attach(base, state):
        for _ in range(4):
            losses.append(Runner(base, COMPLETION, APART).gradient([collate(rows, 256, CPU)]))
            state.master.data -= 0.05 * state.master.grad
            state.master.grad = None
    assert len(set(losses)) == 4


def test_a_first_step_without_any_gradient_is_an_error(tiny_base: Base) -> None:
    """Elsewhere such a training runs to its end and learns nothing (peft#282, trl#6700)."""
    rows = rows_of(tiny_base, 4)
    frozen = start_of(tiny_base)
    silent = Adapter(frozen.plan, {k: torch.zeros_like(t) for k, t in frozen.tensors.items()}, frozen.base)
    with pytest.raises(AdapterError, match="no factor receives a gradient"):
        train(tiny_base, silent, rows, rows, SHORT)


# The state

OPTIMIZERS: dict[str, Callable[[Any], torch.optim.Optimizer]] = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1),
    "adam": lambda p: torch.optim.Adam(p, lr=0.1),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.1, fused=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=True),
    "adamw for-loop": lambda p: torch.optim.AdamW(p, lr=0.1, foreach=False),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_whichever_optimizer_steps_the_next_forward_uses_the_new_values(
    tiny_folder: Path, name: str, dtype: torch.dtype
) -> None:
    base = open_base(tiny_folder, dtype)
    state = TrainState(random_adapter(base, uniform(base.sites, 4, 8.0)))
    optimizer = OPTIMIZERS[name](state.parameters())
    batch = collate(rows_of(base, 3), 256, CPU)
    with attach(base, state):
        Runner(base, COMPLETION, APART).gradient([batch])
        with torch.no_grad():
            before = token_nll(base, batch, APART)
        optimizer.step()
        with torch.no_grad():
            after = token_nll(base, batch, APART)
    with attach(base, state.freeze()), torch.no_grad():
        expected = token_nll(base, batch, APART)
    assert torch.equal(after, expected)
    assert not torch.equal(after, before)


def test_later_steps_do_not_reach_a_frozen_adapter(tiny_base: Base) -> None:
    state = TrainState(start_of(tiny_base))
    frozen = state.freeze()
    before = frozen.digest()
    state.load(torch.ones_like(state.master))
    assert frozen.digest() == before
    assert state.freeze() != frozen


def test_weight_decay_touches_matrices_and_no_vectors(tiny_base: Base) -> None:
    state = TrainState(random_adapter(tiny_base, uniform(all_linear(tiny_base), 4, 8.0, "dora")))
    before = state.freeze()
    state.master.grad = torch.zeros_like(state.master)
    adamw.step(state, adamw.make_optimizer(state), rate=0.1, weight_decay=0.5, clip=1.0)
    for key, tensor in state.freeze().tensors.items():
        old = before.tensors[key]
        assert torch.equal(tensor, old) if key.endswith(".m") else torch.equal(tensor, old * (1 - 0.1 * 0.5)), key


def test_under_a_bf16_base_the_master_and_its_gradient_are_fp32(tiny_folder: Path) -> None:
    base = open_base(tiny_folder, torch.bfloat16)
    state = TrainState(start_of(base))
    with attach(base, state):
        Runner(base, COMPLETION, APART).gradient([collate(rows_of(base, 3), 256, CPU)])
    assert state.master.grad is not None
    assert (state.master.dtype, state.master.grad.dtype) == (torch.float32, torch.float32)


def test_updates_too_small_for_bf16_add_up_in_the_master(tiny_folder: Path) -> None:
    base = open_base(tiny_folder, torch.bfloat16)
    state = TrainState(start_of(base))
    state.load(torch.ones_like(state.master))
    optimizer = torch.optim.SGD(state.parameters(), lr=1e-4)
    state.master.grad = torch.ones_like(state.master)
    for _ in range(100):
        optimizer.step()
    used = state.factors(torch.bfloat16, CPU)[base.sites[0].path]["B"]
    assert torch.tensor(1.0, dtype=torch.bfloat16) - 1e-4 == 1  # what a bf16 master would have kept
    assert used.dtype == torch.bfloat16
    assert torch.all((used - 0.99).abs() < 0.004)
