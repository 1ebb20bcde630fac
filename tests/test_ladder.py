"""The ladder: what is shipped is not worse, and what cannot be told is said."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from conftest import capitals, write_rows
from torch import Tensor, nn

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.formats import peft
from lorafit.adapters.plan import uniform
from lorafit.adapters.state import TrainState
from lorafit.attachment.adapters import attach
from lorafit.attachment.attention import packing
from lorafit.attachment.pure import fresh
from lorafit.attachment.watching import observing
from lorafit.bases.base import Base
from lorafit.data.examples import Check, Example, Message
from lorafit.data.render import Row, render, renderer_for
from lorafit.errors import AdapterError, RunError
from lorafit.evaluation.answers import prompts_of
from lorafit.evaluation.questions import Questions
from lorafit.files import write_json
from lorafit.generation.greedy import generate
from lorafit.jobs.listener import Silent
from lorafit.jobs.train import run_training
from lorafit.jobs.trim import Validation, ladder_of, moments_of, run_trimming
from lorafit.planning.ladder import TOLERATED, Ladder, climb_down, rung
from lorafit.planning.rules import all_linear
from lorafit.runs.folder import read_run
from lorafit.tasks.completion import COMPLETION
from lorafit.tasks.forward import batch_of, token_nll
from lorafit.tasks.runner import Runner
from lorafit.tasks.task import ForwardMode
from lorafit.testing import random_adapter

SHARES = (0.5, 0.25, 0.125, 0.0625)


def climbed(costs: dict[float, float], noise: float, n: int = 200, seed: int = 0) -> Ladder:
    """Validation NLL of a whole of about 1 nat that gained 1 nat, and rungs that cost so many, differing by noise."""
    draw = np.random.default_rng(seed)
    whole = draw.gamma(4, 0.25, n)
    groups = [None] * n
    rungs = [
        rung(share, 10, (whole + cost + draw.normal(0, noise, n)).tolist(), whole.tolist(), groups)
        for share, cost in costs.items()
    ]
    return climb_down(whole.tolist(), float(whole.mean()) + 1, rungs, groups)


def test_the_smallest_that_costs_nothing_is_shipped() -> None:
    assert climbed(dict.fromkeys(SHARES, 0.0), 0.01).chosen == 0.0625


def test_a_known_loss_of_one_percent_is_refused() -> None:
    found = climbed(dict.fromkeys(SHARES, 0.01), 0.01)
    assert found.chosen == 1.0
    assert found.reason.startswith("untrimmed: 50% of the adapter already costs +0.01")


def test_it_is_refused_at_the_rung_where_it_comes_in() -> None:
    found = climbed({0.5: 0.0, 0.25: 0.0, 0.125: 0.01, 0.0625: 0.0}, 0.01)
    assert found.chosen == 0.25, "a smaller rung that looks well is chance: the order is fixed"
    assert re.search(r"the next smaller one may cost \+0\.0\d\d", found.reason)


def test_what_cannot_be_told_says_how_many_examples_may_decide() -> None:
    whole, spread = [1.0] * 60, [(-1) ** i * 0.1 for i in range(60)]  # differences of mean zero
    small = [one + off for one, off in zip(whole, spread, strict=True)]
    found = climb_down(whole, 2.0, [rung(0.5, 1, small, whole, [None] * 60)], [None] * 60)
    assert found.chosen == 1.0
    named = re.search(r"validation cannot decide: .* about ([\d,]+) independent examples instead of 60", found.reason)
    assert named is not None
    assert int(named[1].replace(",", "")) == pytest.approx((1.645 * 0.1 / 0.005) ** 2, rel=0.25)
    few = [rung(0.5, 1, [1.0 + 50 * off for off in spread], whole, [None] * 60)]
    assert "more than a hundred times as many" in climb_down(whole, 2.0, few, [None] * 60).reason


def test_too_few_examples_decide_nothing_and_the_number_wanted_is_named() -> None:
    assert climbed({0.5: 0.0}, 0.001, 5).reason == (
        "untrimmed: 5 independent validation examples are too few: at least 10 are needed"
    )


def test_where_nothing_could_be_cut_that_is_said() -> None:
    assert climbed({}, 0.0).reason == "untrimmed: half of the adapter would be less than one direction of a pair"


def one_rung(whole: float, base: float, half: float) -> Ladder:
    """Twenty examples of this NLL under the whole adapter, with half of its parameters, and under the base."""
    groups = [None] * 20
    return climb_down([whole] * 20, base, [rung(0.5, 1, [half] * 20, [whole] * 20, groups)], groups)


def test_what_may_be_given_up_is_a_share_of_what_was_gained() -> None:
    """0.01 nats are nearly half of the NLL after a training that succeeded, and nearly all of a small gain."""
    succeeded = one_rung(whole=0.013, base=3.84, half=0.023)
    assert succeeded.chosen == 0.5
    assert "0.5% of the gain of 3.8270 nats may be given up, which is 0.0191" in succeeded.reason
    assert succeeded.reason.startswith("without 50% of the LoRA parameters, the validation NLL changes by +0.0100")
    hardly = one_rung(whole=2.40, base=2.411, half=2.41)
    assert hardly.chosen == 1.0
    assert hardly.reason.startswith("untrimmed: 50% of the adapter already costs +0.0100")


def test_where_nothing_was_gained_nothing_is_given_up() -> None:
    found = one_rung(whole=2.4, base=2.3, half=2.41)
    assert found.chosen == 1.0
    assert "validation shows no gain over the base" in found.reason


def test_a_loss_of_just_the_margin_passes_as_seldom_as_the_certainty_says() -> None:
    passed = sum(climbed({0.5: TOLERATED}, 0.02, 40, seed).chosen < 1 for seed in range(300))
    assert passed / 300 < 0.09  # 5 %, and what 300 draws may be off; the margin moves a little with the mean


def answering(right: int, half: int, quarter: int) -> Ladder:
    """100 questions, so many of them answered right by the whole, its half and its quarter, all of the same NLL."""
    rungs = [
        replace(rung(share, 1, [1.0] * 20, [1.0] * 20, [None] * 20), right=n)
        for share, n in ((0.5, half), (0.25, quarter))
    ]
    return climb_down([1.0] * 20, 3.0, rungs, [None] * 20, 100, right)


def test_no_right_answer_is_given_up_however_little_the_nll_costs() -> None:
    refused = answering(99, 96, 99)
    assert refused.chosen == 1.0
    assert refused.reason == (
        "untrimmed: of 100 validation questions, 50% of the adapter answers 96 right and the whole adapter 99, and "
        "trimming must not lose a right answer; the NLL would change by +0.0000"
    )
    chosen = answering(99, 99, 98)
    assert chosen.chosen == 0.5
    assert "validation questions it answers 99 right, the whole adapter 99, the next smaller one 98" in chosen.reason
    assert (chosen.asked, chosen.right) == (100, 99)
    assert answering(96, 99, 97).chosen == 0.25


def test_the_loss_that_passes_one_time_in_twenty_is_the_one_that_is_named() -> None:
    draw = np.random.default_rng(0)
    passed = [answering(116, 116 - int(draw.binomial(116, 0.026)), 0).chosen < 1 for _ in range(2000)]
    assert sum(passed) / 2000 == pytest.approx(0.05, abs=0.015)


class Told:
    """Stands for questions: keeps who was asked, by number of parameters, and says in turn how many are right."""

    def __init__(self, *right: int):
        self.examples, self.asked, self._right = range(100), [], [*right]

    def right(self, adapter: Adapter, progress: object) -> int:
        self.asked.append(adapter.plan.parameters)
        return self._right.pop(0)


def test_questions_are_asked_of_the_whole_and_of_rungs_whose_nll_may_be_shipped(tiny_base: Base) -> None:
    """Half and a quarter compute what the whole does: only a quarter of its directions do anything."""
    rows = render(renderer_for(tiny_base, system="Geography"), scored(12, None), 512)
    whole = random_adapter(tiny_base, uniform(all_linear(tiny_base), 4, 8.0))
    tensors = {key: tensor.clone() for key, tensor in whole.tensors.items()}
    for slot in whole.plan.slots:
        tensors[f"{slot.site.path}.B"][:, 1:] = 0
    whole, runner = replace(whole, tensors=tensors), Runner(tiny_base, COMPLETION, ForwardMode(True, False))
    with attach(tiny_base, whole):
        nll = runner.nll(rows)

    def climbed(nll: list[float], told: Any) -> Ladder:
        held = Validation(rows, nll, sum(nll) / len(nll) + 1, [None] * len(nll), told)
        return ladder_of(runner, whole, rows, held, Silent())[0]

    told, size = Told(90, 90, 89), whole.plan.parameters
    ladder = climbed(nll, told)
    assert (ladder.chosen, ladder.right, ladder.asked) == (0.5, 90, 100)
    assert told.asked == [size, size // 4, size // 4]
    told = Told(0)
    assert climbed(nll, told).chosen < 1
    assert told.asked == [size], "where the whole answers nothing right, nothing can be lost"
    told = Told()
    assert climbed([one - 1 for one in nll], told).right is None
    assert told.asked == [], "where the NLL refuses a rung, nobody need answer"


def scored(n: int, check: Check | None) -> list[Example]:
    return [
        Example((Message("user", row["prompt"]), Message("assistant", row["completion"])), "here", check=check)
        for row in capitals(n)
    ]


def test_only_questions_of_which_it_is_known_what_is_right_are_asked(tiny_base: Base) -> None:
    renderer = renderer_for(tiny_base, system="Geography")

    def among(examples: list[Example], known: list[Example]) -> int:
        found = Questions.among(tiny_base, renderer, examples, render(renderer, examples, 512), known)
        return 0 if found is None else len(found.examples)

    free, checked = scored(12, None), scored(12, Check(("town",), (), 100))
    few = [replace(one, messages=(one.messages[0], Message("assistant", "Yes."))) for one in free]
    assert among(free, free) == 0
    assert among([*checked, *free], free) == 12
    assert among(few, few) == 12
    assert among(few, free) == 0
    assert among(scored(210, Check(("town",), (), 100)), free) == 105


def test_right_answers_are_counted_of_what_the_adapter_really_says(tiny_base: Base) -> None:
    renderer = renderer_for(tiny_base, system="Geography")
    examples = scored(6, Check(("town",), (), 100))
    said = generate(tiny_base, renderer, prompts_of(renderer, examples), 8)
    examples = [
        replace(one, check=Check((), (), 1000, exact=answer.text)) for one, answer in zip(examples, said, strict=True)
    ]
    plan = uniform(all_linear(tiny_base), 2, 4.0)
    questions = Questions(tiny_base, renderer, tuple(examples), 8, None)
    assert questions.right(fresh(tiny_base, plan, 0), lambda *_: None) == 6
    assert questions.right(random_adapter(tiny_base, plan, size=1.0), lambda *_: None) < 6


@pytest.fixture
def rows(tiny_base: Base) -> list[Row]:
    examples = [
        Example((Message("user", row["prompt"]), Message("assistant", row["completion"])), "here")
        for row in capitals(6)
    ]
    return render(renderer_for(tiny_base, system="Geography"), examples, 512)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("packed", [False, True])
def test_moments_are_those_of_what_flows_through_each_pair(
    tiny_base: Base, rows: list[Row], packed: bool, recompute: bool
) -> None:
    """Against the same read off the modules' own inputs and gradients, site by site."""
    adapter, way = random_adapter(tiny_base, uniform(all_linear(tiny_base), 3, 6.0)), ForwardMode(True, packed)
    found = moments_of(Runner(tiny_base, COMPLETION, way, recompute=recompute), adapter, rows)
    kept: dict[str, tuple[Tensor, Tensor]] = {}

    def keep(path: str) -> None:
        def hook(module: nn.Module, given: tuple[Tensor, ...], output: Tensor) -> None:
            output.retain_grad()
            kept[path] = given[0].detach().flatten(0, -2), output

        handles.append(tiny_base.model.get_submodule(path).register_forward_hook(hook))

    handles: list[torch.utils.hooks.RemovableHandle] = []
    for site in all_linear(tiny_base):
        keep(site.path)
    batch = batch_of(tiny_base, rows, way)
    with attach(tiny_base, TrainState(adapter)), packing(tiny_base, packed):
        token_nll(tiny_base, batch, way).mean().backward()
    for handle in handles:
        handle.remove()
    assert found.keys() == kept.keys()
    for path, (x, output) in kept.items():
        assert output.grad is not None
        u = x @ adapter.tensors[f"{path}.A"].T
        v = output.grad.flatten(0, -2) @ adapter.tensors[f"{path}.B"]
        for moment, values in ((found[path].inputs, u), (found[path].outputs, v)):
            assert moment is not None
            torch.testing.assert_close(
                moment, (values.T @ values).double(), rtol=1e-3, atol=1e-7 + 1e-4 * float(moment.abs().max())
            )


class Picks(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.mix, self.pick = nn.Linear(8, 8), nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            picked = self.pick(x) > 0
        found: Tensor = self.mix(x) * picked
        return found


def test_a_site_that_is_run_without_gradient_is_not_observed() -> None:
    base, seen = Base.of(Picks().eval(), "picks"), []
    state = TrainState(random_adapter(base, uniform(base.sites, 2, 4.0)))
    watched = observing(base, ["mix", "pick"], lambda *_: None, lambda path, *_: seen.append(path))
    with attach(base, state), watched:
        base.model(torch.ones(3, 8)).sum().backward()
    assert seen == ["mix"]


def test_nothing_is_left_on_the_model_after_observing(tiny_base: Base) -> None:
    with (
        pytest.raises(KeyError),
        observing(tiny_base, [site.path for site in tiny_base.sites], lambda *_: None, lambda *_: None),
    ):
        raise KeyError
    assert not any(module._forward_hooks for module in tiny_base.model.modules())


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run whose adapter uses half of its rank, with 18 validation examples."""
    out = tmp_path_factory.mktemp("ladder") / "run"
    data = write_rows(out.parent / "data.jsonl", capitals(60))
    settings = {
        "val_share": 0.3,
        "rank": 4,
        "epochs": 3,
        "validations": 1,
        "few_shot": 0,
        "dtype": "fp32",
        "trim": "none",
    }
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorafit.jobs.train.compare_with_peft", lambda *_: None)
        run_training(str(tiny_folder), str(data), out, settings)
    whole = peft.read(out / "adapter")
    halved = {key: tensor.clone() for key, tensor in whole.tensors.items()}
    for slot in whole.plan.slots:
        halved[f"{slot.site.path}.B"][:, 2:] = 0
    peft.write(replace(whole, tensors=halved), out / "adapter")
    return out


def test_what_is_shipped_scores_what_its_rung_says(run: Path, tiny_base: Base, tmp_path: Path) -> None:
    found = run_trimming(run, tmp_path / "small")
    assert found["rungs"][0]["difference"] == pytest.approx(0, abs=1e-5)
    assert found["chosen"] <= 0.5
    small, whole = peft.read(tmp_path / "small"), peft.read(run / "adapter")
    (shipped,) = [rung for rung in found["rungs"] if rung["share"] == found["chosen"]]
    assert small.plan.parameters == shipped["parameters"] <= found["chosen"] * whole.plan.parameters
    assert (small.base, small.rendering) == (whole.base, whole.rendering)
    told = json.loads((tmp_path / "small" / "lorafit.json").read_text())
    assert told["ladder"]["chosen"] == found["chosen"]
    with pytest.raises(RunError, match="is there already"):
        run_trimming(run, tmp_path / "small")


def test_an_adapter_that_cannot_be_trimmed_is_told_before_anything_is_opened(
    run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    copytree(run, tmp_path / "run")
    whole = peft.read(run / "adapter")
    idle = {key: torch.zeros_like(t) if key.endswith("B") else t for key, t in whole.tensors.items()}
    peft.write(replace(whole, tensors=idle), tmp_path / "run" / "adapter")
    monkeypatch.delattr("lorafit.jobs.trim.open_all")
    with pytest.raises(AdapterError, match="has no effect"):
        run_trimming(tmp_path / "run", tmp_path / "small")
    with pytest.raises(RunError, match="only a run has validation examples"):
        run_trimming(tmp_path / "run" / "adapter", tmp_path / "small")


def test_other_data_than_the_runs_are_refused(run: Path, tmp_path: Path) -> None:
    copytree(run, tmp_path / "run")
    asked = read_run(run)
    write_rows(tmp_path / "other.jsonl", capitals(50))
    write_json(tmp_path / "run" / "run.json", asked | {"data": str(tmp_path / "other.jsonl")})
    with pytest.raises(RunError, match="data have changed since it was trained"):
        run_trimming(tmp_path / "run", tmp_path / "small")
