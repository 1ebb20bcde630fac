"""Memory: what it is spent on, predicted; and less of it, at the price of time."""

from __future__ import annotations

import json
import re
import runpy
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer, capitals, plain_module, tiny_gpt2, tiny_llama, write_rows
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, LlamaModel

from lorafit.adapters.plan import uniform
from lorafit.adapters.state import TrainState
from lorafit.attachment.adapters import attach
from lorafit.attachment.attention import packing
from lorafit.attachment.blocks import recomputing
from lorafit.attachment.pure import fresh
from lorafit.bases.base import Base
from lorafit.data.render import Row
from lorafit.errors import AttachError, SettingsError
from lorafit.evaluation.decoding import bytes_held
from lorafit.jobs import machine, prepare
from lorafit.jobs.machine import free_in_container, room_of
from lorafit.jobs.plan import run_planning
from lorafit.layers.site import Site
from lorafit.planning import Decision
from lorafit.planning.memory import MARGIN, Answering, Footprint, Room, Work, fit, footprint, kept, peak, steps_of
from lorafit.planning.rules import all_linear
from lorafit.settings import bytes_of, settings_from
from lorafit.tasks.completion import COMPLETION
from lorafit.tasks.forward import batch_of
from lorafit.tasks.probe import PROBED
from lorafit.tasks.runner import Runner
from lorafit.tasks.task import ForwardMode
from lorafit.training.recipe import Recipe

MODELS = {"llama": tiny_llama, "gpt2": tiny_gpt2}


def rows_of(*lengths: int) -> list[Row]:
    return [
        Row(tuple((7 * i + k) % 200 for k in range(n)), (False, *[True] * (n - 1)), i) for i, n in enumerate(lengths)
    ]


def gradient(base: Base, way: ForwardMode, recompute: bool, dropout: float = 0.0, variant: str = "lora") -> Tensor:
    """The gradient of every factor over four micro-batches, of factors that all act."""
    plan = uniform(all_linear(base), 4, 32, variant)
    state = TrainState(fresh(base, plan, 0), dropout=dropout)
    torch.manual_seed(1)
    with torch.no_grad():
        state.master.add_(0.05 * torch.randn_like(state.master))
    batches = [batch_of(base, rows_of(9 + k, 30, 12), way) for k in range(4)]
    with attach(base, state), packing(base, way.packed), recomputing(base, recompute):
        torch.manual_seed(2)
        Runner(base, COMPLETION, way).gradient(batches)
    assert state.master.grad is not None
    return state.master.grad


@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("variant", ["lora", "dora"])
@pytest.mark.parametrize("model", MODELS)
def test_blocks_computed_twice_give_the_same_gradient(model: str, variant: str, packed: bool, dropout: float) -> None:
    base = Base.of(MODELS[model](), model)
    way = ForwardMode(True, packed)
    plain, twice = (gradient(base, way, recompute, dropout, variant) for recompute in (False, True))
    assert plain.abs().max() > 0.01
    torch.testing.assert_close(plain, twice, rtol=0, atol=1e-6)


def test_blocks_are_computed_twice() -> None:
    base = Base.of(tiny_llama(), "llama")
    calls = 0

    def count(*_: object) -> None:
        nonlocal calls
        calls += 1

    base.model.get_submodule("model.layers.1.mlp.act_fn").register_forward_hook(count)
    gradient(base, ForwardMode(True, True), recompute=False)
    assert calls == 4
    gradient(base, ForwardMode(True, True), recompute=True)
    assert calls == 4 + 8


def test_a_model_is_as_it_was_after_recomputing() -> None:
    base = Base.of(tiny_llama(), "llama")
    with pytest.raises(KeyError), recomputing(base):
        raise KeyError
    assert not [name for name, module in base.model.named_modules() if "forward" in vars(module)]


def test_a_model_without_known_blocks_is_refused() -> None:
    with pytest.raises(AttachError, match="declares no blocks"), recomputing(Base.of(plain_module(), "plain")):
        pass


LOOK = Footprint(
    state=10e6,
    token=1e6,
    pair=0,
    long_token=1e6,
    block_input=2e4,
    blocks=20,
    working=1e4,
    looking=1e4,
    logits=1e3,
    most_logits=1e8,
)
PACKED = ForwardMode(True, True)
HELD = 500_000_000


def fitted(
    memory: str | None, free: int | None = None, look: Footprint = LOOK, answering: Answering = lambda left: 0
) -> tuple[Decision, int]:
    recipe = Recipe(1e-3, 32, 10, 1, 5)
    rows = {"train": rows_of(*[60] * 320), "valid": rows_of(60), "test": rows_of(60)}
    decision = Decision(uniform([Site("a", "linear", 8, 8)], 2, 32), recipe, ())
    steps = steps_of(rows["train"], recipe, fixed=False, packed=True)
    work = Work(Runner(Base.of(tiny_llama(), "llama"), COMPLETION, PACKED), rows, steps)
    return fit(decision, work, lambda _: look, answering, Room(HELD, free), memory)


@pytest.mark.parametrize(
    ("memory", "tokens", "recompute"),
    [(None, 1024, False), ("4GB", 1024, False), ("1.2GB", 512, False), ("840MB", 256, False), ("620MB", 1024, True)],
)
def test_the_fastest_settings_that_stay_under_the_limit_are_taken(
    memory: str | None, tokens: int, recompute: bool
) -> None:
    decision, peak = fitted(memory)
    assert (decision.recipe.micro_tokens, decision.recipe.recompute) == (tokens, recompute)
    assert memory is None or HELD + MARGIN * (peak - HELD) <= (bytes_of(memory) or 0)
    assert decision.choices[-1].flag == "--memory"


def test_without_a_setting_what_is_free_is_the_limit() -> None:
    assert fitted(None, free=800_000_000)[0].recipe.micro_tokens == 512
    assert fitted(None, free=10_000)[0].choices[-1].reason.startswith("more than is free")


def test_what_a_run_holds_includes_decoding_its_answers() -> None:
    def answering(left: int | None) -> int:
        return 3_000_000_000 if left is None else max(200_000_000, min(3_000_000_000, left))

    assert fitted(None, answering=answering)[1] == HELD + 3_000_000_000
    decision, most = fitted("840MB", answering=answering)
    assert decision.recipe.micro_tokens == 256, "it decodes fewer answers at a time, and trains as it would"
    assert most <= 840_000_000
    with pytest.raises(SettingsError, match=r"raise it to"):
        fitted("650MB", answering=answering)


def test_decoding_holds_no_more_than_it_may_and_answers_one_at_a_time_at_least(tiny_base: Base) -> None:
    least, most = bytes_held(tiny_base, 100, 0), bytes_held(tiny_base, 100)
    assert least < bytes_held(tiny_base, 100, (least + most) // 2) <= (least + most) // 2
    assert bytes_held(tiny_base, 100, 10 * most) == most


def test_the_longest_row_may_be_in_the_test() -> None:
    look = replace(LOOK, looking=1e5)
    rows = {"train": rows_of(*[60] * 320), "valid": rows_of(60), "test": rows_of(9000)}
    work = Work(Runner(Base.of(tiny_llama(), "llama"), COMPLETION, PACKED), rows, [[0]])
    assert peak(look, work, Recipe(1e-3, 32, 10, 1, 5)) >= look.state + 9000 * look.looking


def test_processes_that_share_a_machine_share_what_is_free_beside_their_bases(
    tiny_base: Base, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "_bytes_in", lambda path, name: 10_000)
    monkeypatch.setattr(machine, "free_in_container", lambda: None)
    monkeypatch.setattr(machine, "_held", lambda base: 1_000)
    assert (room_of(tiny_base).free, room_of(tiny_base, 3).free) == (10_000, (10_000 - 2 * 1_000) // 3)


def test_no_row_is_run_whole_before_it_is_planned_how_much_may_be(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run: list[int] = []
    forward = LlamaModel.forward

    def seen(model: LlamaModel, input_ids: Tensor | None = None, **given: Any) -> Any:
        assert input_ids is not None
        run.append(input_ids.numel())
        return forward(model, input_ids=input_ids, **given)

    def planned(*_: Any) -> None:
        raise KeyError

    monkeypatch.setattr(LlamaModel, "forward", seen)
    monkeypatch.setattr(prepare, "fitted", planned)
    rows = [{**row, "completion": f"{row['completion']} {'And so on. ' * 30}"} for row in capitals()]
    with pytest.raises(KeyError):
        run_planning(str(tiny_folder), str(write_rows(tmp_path / "long.jsonl", rows)), {"dtype": "fp32"})
    assert run and max(run) <= 2 * PROBED


def test_files_that_a_container_has_read_are_free_in_it(tmp_path: Path) -> None:
    assert free_in_container(tmp_path) is None
    for name, text in (("max", "1000"), ("current", "900"), ("stat", "anon 300\nactive_file 50\ninactive_file 500\n")):
        (tmp_path / f"memory.{name}").write_text(text)
    assert free_in_container(tmp_path) == 650
    (tmp_path / "memory.max").write_text("max\n")
    assert free_in_container(tmp_path) is None


def test_too_little_is_refused_and_what_is_named_instead_will_do() -> None:
    with pytest.raises(SettingsError, match="too little") as refused:
        fitted("505MB")
    named = re.search(r"takes ([\d.]+GB)", str(refused.value))
    assert named is not None
    assert fitted(named[1])[0].recipe.recompute


def test_a_model_without_blocks_runs_fewer_tokens_instead() -> None:
    decision, _ = fitted("600MB", look=replace(LOOK, blocks=0))
    assert (decision.recipe.micro_tokens, decision.recipe.recompute) == (64, False)


@pytest.mark.parametrize(
    ("text", "size"),
    [
        ("4GB", 4e9),
        ("1.5gb", 1.5e9),
        ("500 MB", 5e8),
        ("1GiB", 2**30),
        ("4", None),
        ("4G", None),
        ("0GB", None),
        ("much", None),
    ],
)
def test_a_size_has_a_unit(text: str, size: float | None) -> None:
    assert bytes_of(text) == size


def test_a_size_without_a_unit_is_refused_with_a_hint() -> None:
    with pytest.raises(SettingsError, match="--memory '4000000000': not a size with its unit: write it as 4GB"):
        settings_from({"memory": "4000000000"})


def test_what_a_forward_keeps_is_foretold_to_the_byte_for_other_rows() -> None:
    base = Base.of(tiny_llama(), "llama")
    adapter = fresh(base, uniform(all_linear(base), 4, 32), 0)
    runner = Runner(base, COMPLETION, PACKED)
    look = footprint(runner, adapter, rows_of(90, 100))
    state = TrainState(adapter)
    with runner.training(state):
        with torch.no_grad():
            kept(runner, state, rows_of(30), [8])
        lengths = [100, 100, 100, 70, 70]
        found = kept(runner, state, rows_of(90, 100), lengths)
    told = sum(look.token * n + look.pair * n * n for n in lengths)
    assert found == pytest.approx(told, rel=0.1)


RUN = """
import json, sys
from pathlib import Path
from lorafit.files import read_json
from lorafit.jobs.train import run_training
from lorafit.jobs.machine import peak_gb
from lorafit.runs.folder import LADDER, RUNGS
before = peak_gb()
out = Path(sys.argv[3])
summary = run_training(sys.argv[1], sys.argv[2], out, json.loads(sys.argv[4]))
plan = read_json(out / "plan.json")
print(json.dumps({"before": before, "peak": summary["peak_rss_gb"], "recipe": plan["recipe"], "said": plan["choices"],
                  "trimmed": (out / LADDER / RUNGS).exists()}))
"""


@pytest.fixture(scope="session")
def deep_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base of little weight whose blocks keep much: memory goes into what is kept for the backward."""
    torch.manual_seed(0)
    folder = tmp_path_factory.mktemp("bases") / "deep"
    LlamaForCausalLM(
        LlamaConfig(
            vocab_size=261,
            hidden_size=128,
            intermediate_size=384,
            num_hidden_layers=24,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=512,
            eos_token_id=256,
            bos_token_id=None,
            pad_token_id=256,
            tie_word_embeddings=True,
        )
    ).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


def ran(base: Path, tmp_path: Path, **settings: object) -> dict[str, Any]:
    data = write_rows(
        tmp_path / "data.jsonl", [{**row, "prompt": f"{row['prompt']} {'why ' * 12}"} for row in capitals(120)]
    )
    given = {"batch_size": 16, "epochs": 1, "dtype": "fp32", "few_shot": 0, "rank": 4, "validations": 1, **settings}
    words = [str(base), str(data), str(tmp_path / "run"), json.dumps(given)]
    done = subprocess.run([sys.executable, "-c", RUN, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere memory is not told as exactly")
def test_a_run_stays_under_the_memory_it_was_given(deep_folder: Path, tmp_path: Path) -> None:
    free = ran(deep_folder, tmp_path)
    limit = free["before"] + 0.55 * (free["peak"] - free["before"])
    (tmp_path / "again").mkdir()
    held = ran(deep_folder, tmp_path / "again", memory=f"{1000 * limit:.0f}MB")
    assert held["recipe"]["micro_tokens"] < free["recipe"]["micro_tokens"] or held["recipe"]["recompute"]
    assert free["trimmed"] and held["trimmed"], "trimming takes memory too"
    assert held["peak"] <= limit < free["peak"]


@pytest.mark.slow
@pytest.mark.parametrize("case", [1, 3], ids=["handbook in batches of 16", "restaurants in 1.6 GB"])
def test_memory_and_time_of_real_runs_are_within_a_fifth_of_the_forecast(
    case: int, real_base: Base, shared_data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = Path(__file__).parents[1] / "bench"
    monkeypatch.syspath_prepend(folder)
    bench = runpy.run_path(str(folder / "forecast.py"))
    name, settings = bench["CASES"][case]
    data = bench["files"](shared_data, tmp_path)[name]
    told, real = (bench["asked"](verb, data, settings) for verb in ("plan", "train"))
    assert told["gb"] == pytest.approx(real["gb"], rel=0.2)
    assert told["step"] == pytest.approx(real["step"], rel=0.2)
