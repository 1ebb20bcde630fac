"""Choosing: the layer card, placements, halving, what came of the search, and rounds; on tiny bases and by hand."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from itertools import permutations
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
import pytest
import torch
from conftest import capitals, write_rows

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.formats import peft
from lorafit.adapters.plan import Plan, uniform
from lorafit.attachment.adapters import attach
from lorafit.attachment.pure import fresh
from lorafit.bases.base import Base
from lorafit.data.render import Row
from lorafit.errors import DivergedError, Interrupted, RunError, SettingsError
from lorafit.evaluation.forgetting import forgetting, general_rows, general_text
from lorafit.evaluation.statistics import detectable
from lorafit.jobs import refine, search
from lorafit.jobs.listener import Silent
from lorafit.jobs.plan import run_planning
from lorafit.jobs.prepare import open_all
from lorafit.jobs.refine import run_refining
from lorafit.jobs.train import run_training
from lorafit.jobs.trim import cut as run_cut
from lorafit.planning import Decision
from lorafit.planning.halving import FEW_RATES, MOST, RATES, Arm, Tried, better, cost, first_rung, rates_for, survivors
from lorafit.planning.halving import steps_needed as needed
from lorafit.planning.importance import ablations, first_order, parts_of, without
from lorafit.planning.ladder import Ladder, Rung
from lorafit.planning.placement import placements
from lorafit.planning.refine import Change, Evidence, judged, next_change
from lorafit.planning.signal import SHARE, Card, Signal, block_of, card_of, kinds_of
from lorafit.report.story import read_story
from lorafit.report.why import why
from lorafit.runs.folder import openings, read_summary
from lorafit.runs.summary import RunSummary
from lorafit.settings import TrainSettings, settings_from
from lorafit.tasks.completion import COMPLETION
from lorafit.tasks.forward import batch_of, token_nll
from lorafit.tasks.runner import Runner
from lorafit.tasks.task import PLAIN
from lorafit.training.loop import train
from lorafit.training.recipe import Recipe

RECIPE = Recipe(learning_rate=1e-2, batch_size=4, steps=400, warmup=4, validate_every=100)
LONG: dict[str, Any] = {"epochs": 28, "rank": 4, "dtype": "fp32", "val_share": 0.3, "batch_size": 4, "validations": 2}


pytestmark = pytest.mark.usefixtures("one_thread")


class Hears(Silent):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


@pytest.fixture
def rows(tiny_base: Base) -> list[Row]:
    rng = np.random.default_rng(0)
    made = []
    for i in range(40):
        ids = tuple(rng.integers(0, 250, 10 + i % 7).tolist())
        made.append(Row(ids, tuple(k > 4 for k in range(len(ids))), i))
    return made


@pytest.fixture
def plan(tiny_base: Base) -> Plan:
    return uniform([site for site in tiny_base.sites if site.path not in tiny_base.head_paths()], 4, 8.0)


# The layer card


def test_the_card_is_the_mean_product_of_gradients_of_different_batches(
    tiny_base: Base, rows: list[Row], plan: Plan
) -> None:
    start = fresh(tiny_base, plan, 0)
    card = card_of(Runner(tiny_base, COMPLETION, PLAIN), start, rows, RECIPE)
    assert card is not None and card.batches == 16
    size = card.rows // card.batches
    drawn = np.random.default_rng(searching_seed()).permutation(len(rows))[: card.rows].tolist()
    dense: list[dict[str, torch.Tensor]] = []
    for k in range(card.batches):
        batch = batch_of(tiny_base, [rows[i] for i in drawn[k * size : (k + 1) * size]], PLAIN)
        weights = {slot.site.path: tiny_base.model.get_parameter(f"{slot.site.path}.weight") for slot in plan.slots}
        for weight in weights.values():
            weight.requires_grad_(True)
        gradients = torch.autograd.grad(token_nll(tiny_base, batch, PLAIN).mean(), list(weights.values()))
        dense.append(dict(zip(weights, gradients, strict=True)))
        for weight in weights.values():
            weight.requires_grad_(False)
    for one, slot in zip(card.sites, plan.slots, strict=True):
        a = start.tensors[f"{one.path}.A"]
        inside = [gradient[one.path] @ a.T for gradient in dense]
        pairs = [float((g * h).sum()) for g, h in permutations(inside, 2)]
        sketched = slot.site.d_in / float(a.square().sum()) * sum(pairs) / len(pairs)
        assert one.energy == pytest.approx(sketched, rel=1e-3, abs=1e-9)


def searching_seed() -> int:
    from lorafit.data.split import seed_of

    return seed_of(RECIPE.seed, "card")


def test_over_many_draws_the_sketch_is_the_energy_of_the_dense_gradient(tiny_base: Base, plan: Plan) -> None:
    g = torch.Generator().manual_seed(0)
    slot = plan.slots[0]
    gradient = torch.randn(slot.site.d_out, slot.site.d_in, generator=g)
    found = []
    for seed in range(300):
        a = fresh(tiny_base, plan, seed).tensors[f"{slot.site.path}.A"]
        found.append(float((gradient @ a.T).square().sum() * slot.site.d_in / a.square().sum()))
    assert np.mean(found) == pytest.approx(float(gradient.square().sum()), rel=0.03)


def test_the_card_takes_no_more_than_its_share_of_the_run(tiny_base: Base, rows: list[Row], plan: Plan) -> None:
    start = fresh(tiny_base, plan, 0)
    for steps in (50, 100, 400):
        recipe = replace(RECIPE, steps=steps)
        card = card_of(Runner(tiny_base, COMPLETION, PLAIN), start, rows, recipe)
        assert card is not None and card.rows <= SHARE * steps * recipe.batch_size
    assert card_of(Runner(tiny_base, COMPLETION, PLAIN), start, rows, replace(RECIPE, steps=40)) is None


@pytest.mark.parametrize(
    ("path", "block"), [("model.layers.11.mlp.up_proj", 11), ("h.0.attn.c_attn", 0), ("lm_head", None), ("blocks.2", 2)]
)
def test_blocks_are_known_by_the_number_in_the_path(path: str, block: int | None) -> None:
    assert block_of(path) == block


# Placements


def card_with(plan: Plan, energies: dict[str, float]) -> Card:
    """A card on which the sites whose path holds a name have its energy."""
    sites = []
    for slot in plan.slots:
        path, size = slot.site.path, slot.site.d_in + slot.site.d_out
        energy = next((energy for name, energy in energies.items() if name in path), 0.0)
        sites.append(Signal(path, block_of(path), energy, size))
    return Card(tuple(sites), 16, 16)


def test_placements_have_equal_parameters_and_what_has_little_pull_is_not_tried(plan: Plan) -> None:
    found = {one.name: one for one in placements(plan, card_with(plan, {"self_attn": 0.1, "mlp": 5.0}))}
    assert list(found) == ["all sites", "self_attn only", "mlp only", "upper half", "first of the card"]
    assert found["self_attn only"].plan is None and "less than half" in found["self_attn only"].reason
    for name in ("mlp only", "first of the card"):
        made = found[name].plan
        assert made is not None and made.parameters == pytest.approx(plan.parameters, rel=0.15)
        assert all("mlp" in slot.site.path for slot in made.slots)
        assert {slot.alpha for slot in made.slots} == {8.0}  # at the same alpha one rate serves every rank
    upper = found["upper half"].plan
    assert upper is not None and {block_of(slot.site) for slot in upper.slots} == {1}
    assert {slot.rank for slot in upper.slots} == {4}


def test_noise_below_zero_counts_as_no_pull(plan: Plan) -> None:
    card = card_with(plan, {"self_attn": -3.0, "mlp": 1.0})
    assert card.share([one.path for one in card.sites if "mlp" in one.path]) == 1.0


# Halving


def tried(rate: float, each: Sequence[float] | None, parameters: int = 10) -> Tried:
    return Tried(Arm(f"rate {rate:g}", rate, parameters), 20, None if each is None else tuple(each))


def around(mean: float, seed: int = 0, spread: float = 0.01) -> list[float]:
    """Examples that differ much from each other, and little from arm to arm."""
    rng = np.random.default_rng(seed)
    return (np.linspace(1, 5, 40) + mean + spread * rng.standard_normal(40)).tolist()


NONE = [None] * 40


def test_no_search_costs_more_than_half_of_the_run() -> None:
    for steps in range(1, 3000):
        rates = rates_for(steps)
        if len(rates) > 1:
            assert cost(len(rates), first_rung(len(rates), steps)) <= MOST * steps
    assert rates_for(needed(2) - 1) == (1.0,)
    assert rates_for(needed(2)) == FEW_RATES
    assert rates_for(needed(4)) == RATES


def test_the_better_half_goes_on() -> None:
    arms = [tried(1.0, around(0.3)), tried(3.0, around(0.1)), tried(0.3, around(0.2)), tried(9.0, None)]
    assert [one.arm.rate for one in survivors(arms)] == [3.0, 0.3]
    assert survivors([tried(1.0, None), tried(2.0, None)]) == []


def test_of_two_that_validation_cannot_tell_apart_the_lower_rate_is_taken() -> None:
    low, high = tried(1.0, around(0.001, 1)), tried(3.0, around(0.0, 2))
    assert min(low, high, key=lambda one: one.nll) is high
    chosen, reason = better(high, low, NONE)
    assert chosen is low and "cannot tell" in reason and "lower rate" in reason


def test_of_two_that_differ_the_better_is_taken_with_its_interval() -> None:
    low, high = tried(1.0, around(0.1, 1)), tried(3.0, around(0.0, 2))
    chosen, reason = better(high, low, NONE)
    assert chosen is high and "worse by +0.1" in reason and "95 % interval" in reason


def test_at_one_rate_the_smaller_plan_is_taken() -> None:
    small, large = tried(1.0, around(0.001, 1), 5), tried(1.0, around(0.0, 2), 10)
    chosen, reason = better(large, small, NONE)
    assert chosen is small and "smaller plan" in reason


def test_what_would_be_noticed_halves_with_four_times_the_examples() -> None:
    rng = np.random.default_rng(0)
    few, many = (detectable(rng.standard_normal(n).tolist()) for n in (100, 400))
    assert few is not None and many is not None
    assert few == pytest.approx(2 * many, rel=0.15)
    assert many == pytest.approx(2.80 / 20, rel=0.1)
    assert detectable([1.0] * 9) is None


# The search in a run


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", capitals(40))


@pytest.fixture(scope="module")
def finished(tiny_folder: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run long enough for two rates, with the search that also asks where."""
    out = tmp_path_factory.mktemp("runs") / "run"
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("lorafit.jobs.train.compare_with_peft", lambda *_: None)
        run_training(str(tiny_folder), str(data), out, {**LONG, "epochs": 70, "search": "thorough"})
    return out


def test_the_rate_that_won_is_the_runs(finished: Path) -> None:
    stored = json.loads((finished / "search" / "tried.json").read_text(encoding="utf-8"))
    told = json.loads((finished / "plan.json").read_text(encoding="utf-8"))
    rates = [one for one in stored if one["cell"].startswith("rate-")]
    assert [one["rate"] / rates[0]["rate"] for one in rates] == pytest.approx(
        [1.0, 3.0]
    )  # a third of the rule's, and that
    assert told["recipe"]["learning_rate"] in {one["rate"] for one in rates}
    choices = {choice["name"]: choice for choice in told["choices"]}
    assert "searched among" in choices["learning rate"]["reason"]
    assert len({len(one["each"]) for one in stored}) == 1


def test_thorough_asks_where_and_how_large_too(finished: Path) -> None:
    stored = json.loads((finished / "search" / "tried.json").read_text(encoding="utf-8"))
    names = {one["name"] for one in stored if one["cell"].startswith("place-1-")}
    assert "all sites" in names and len(names) >= 2
    assert len({one["rate"] for one in stored if one["cell"].startswith("place-")}) == 1


def test_why_says_what_was_measured_chosen_and_left(finished: Path) -> None:
    told = dict(why(read_story(finished)))
    assert set(told) >= {
        "What these data can show",
        "The search: learning rate and layers",
        "Which layers mattered",
        "How small the adapter can be",
        "What was forgotten",
    }
    assert "2 learning rates were tried" in told["The search: learning rate and layers"]
    assert all(text.endswith(".") for text in told.values())


def test_a_search_that_was_stopped_goes_on_and_ends_the_same(
    tiny_folder: Path, data: Path, finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafit.jobs.train.compare_with_peft", lambda *_: None)
    settings, out, real, arms = {**LONG, "epochs": 70, "search": "thorough"}, tmp_path / "run", search.carry_out, []
    first, second = Hears(), Hears()

    def stops(*args: Any) -> Any:
        arms.append(args[1].folder)
        if len(arms) == 2:
            raise Interrupted("stopped here: repeat the command with --resume")
        return real(*args)

    monkeypatch.setattr(search, "carry_out", stops)
    with pytest.raises(Interrupted):
        run_training(str(tiny_folder), str(data), out, settings, listener=first)
    monkeypatch.setattr(search, "carry_out", real)
    run_training(None, None, out, {}, resume=True, listener=second)
    for heard in (first, second):  # before the first arm, and of a resume what is left
        told = [
            line.partition(" ")[2].split(",")[0] for line in heard.said if line.startswith(("the search", "search:"))
        ]
        assert told[0].startswith("search before training takes at most about "), heard.said
        assert len(told) > 1
    assert sum("of evaluation are ahead" in line for line in second.said) == 1
    for name in ("search/tried.json", "adapter/adapter_model.safetensors", "ladder/rungs.json"):
        assert (out / name).read_bytes() == (finished / name).read_bytes(), name


def test_what_a_search_has_tried_is_not_ahead_any_more(
    tiny_folder: Path, data: Path, finished: Path, tmp_path: Path
) -> None:
    settings = settings_from({**LONG, "epochs": 70})
    opened = open_all(str(tiny_folder), str(data), settings, Silent())
    whole = search.search_steps(opened, settings, None)
    assert 0 < whole < opened.decision.recipe.steps / 2
    assert search.search_steps(opened, settings, None, tmp_path) == whole
    (tmp_path / "search").mkdir()
    (tmp_path / "search" / "tried.json").write_text('[{"steps": 20}]', encoding="utf-8")
    assert search.search_steps(opened, settings, None, tmp_path) == whole - 20
    (tmp_path / "search" / "tried.json").write_text('[{"steps": 2000}]', encoding="utf-8")
    assert search.search_steps(opened, settings, None, tmp_path) == 0


def test_a_short_run_is_not_searched_and_says_from_when_on(tiny_folder: Path, data: Path) -> None:
    found = run_planning(str(tiny_folder), str(data), {**LONG, "epochs": 3})
    assert found["search"]["rates"] == [found["recipe"]["learning_rate"]]
    assert f"{needed(2)} steps are needed to try two rates" in found["search"]["reason"]


def test_too_few_validation_examples_are_named_with_how_many_would_do(tiny_folder: Path, data: Path) -> None:
    found = run_planning(str(tiny_folder), str(data), {**LONG, "val_share": 0.1})
    assert "at least 10 are needed" in found["search"]["reason"]
    assert found["evidence"]["detectable"] is None


@pytest.mark.slow
def test_thorough_keeps_a_rate_and_a_rank_that_are_set(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafit.jobs.train.compare_with_peft", lambda *_: None)
    settings = {**LONG, "search": "thorough", "learning_rate": 3e-3, "epochs": 70, "trim": "none"}
    run_training(str(tiny_folder), str(data), tmp_path / "run", settings)
    stored = json.loads((tmp_path / "run" / "search" / "tried.json").read_text(encoding="utf-8"))
    assert {one["cell"][:6] for one in stored} == {"place-"}
    assert {one["rate"] for one in stored} == {3e-3}
    assert {slot.rank for slot in peft.read(tmp_path / "run" / "adapter").plan.slots} == {4}


def test_examples_are_spread_over_groups_before_any_comes_twice() -> None:
    groups = [*"abcdefghij", *["k"] * 90]
    assert search.spread_over(11, groups) == [*range(11)]
    assert len(search.spread_over(40, groups)) == 40
    assert search.spread_over(4, [None] * 8) == [0, 2, 4, 6]
    assert search.spread_over(99, [None] * 8) == [*range(8)]


@pytest.mark.parametrize(
    ("paths", "kinds"),
    [
        (
            ["h.0.attn.c_proj", "h.0.mlp.c_proj", "h.0.mlp.c_fc", "h.1.mlp.c_fc"],
            ["attn.c_proj", "mlp.c_proj", "c_fc", "c_fc"],
        ),
        (
            ["model.layers.0.self_attn.q_proj", "model.layers.11.self_attn.q_proj", "lm_head"],
            ["q_proj", "q_proj", "lm_head"],
        ),
    ],
)
def test_kinds_of_module_are_told_apart_by_their_part_where_names_are_not_enough(
    paths: list[str], kinds: list[str]
) -> None:
    assert [*kinds_of(paths).values()] == kinds


def test_a_rate_that_is_set_is_not_searched(tiny_folder: Path, data: Path) -> None:
    found = run_planning(str(tiny_folder), str(data), {**LONG, "learning_rate": 1e-3})
    assert found["search"]["rates"] == [1e-3]


def test_where_every_arm_diverges_a_lower_rate_is_asked_for(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def diverges(*_: Any) -> Any:
        raise DivergedError("it did")

    monkeypatch.setattr(search, "carry_out", diverges)
    with pytest.raises(DivergedError, match=r"every arm of the search diverged.*give a lower --learning-rate"):
        run_training(str(tiny_folder), str(data), tmp_path / "run", LONG)


# What is measured afterwards


@pytest.fixture
def trained(tiny_base: Base, rows: list[Row], plan: Plan) -> Adapter:
    recipe = Recipe(learning_rate=2e-2, batch_size=8, steps=20, warmup=1, validate_every=20)
    return train(tiny_base, fresh(tiny_base, plan, 0), rows[:30], rows[30:], recipe).adapter


def test_the_first_order_effect_is_the_slope_of_the_loss_in_the_pair(
    tiny_base: Base, rows: list[Row], trained: Adapter
) -> None:
    effects = first_order(Runner(tiny_base, COMPLETION, PLAIN), trained, rows)
    path, step = max(effects, key=lambda one: abs(effects[one])), 1e-2

    def loss(by: float) -> float:
        tensors = {n: t * by if n == f"{path}.B" else t for n, t in trained.tensors.items()}
        with attach(tiny_base, replace(trained, tensors=tensors)), torch.no_grad():
            return float(token_nll(tiny_base, batch_of(tiny_base, rows, PLAIN), PLAIN).double().mean())

    slope = (loss(1 + step) - loss(1 - step)) / (2 * step)
    assert effects[path] == pytest.approx(-slope, rel=0.02)


def test_an_ablation_is_the_adapter_without_the_part(tiny_base: Base, rows: list[Row], trained: Adapter) -> None:
    parts = parts_of([slot.site.path for slot in trained.plan.slots])
    assert {"block 0", "block 1", "q_proj", "down_proj"} <= set(parts)
    runner = Runner(tiny_base, COMPLETION, PLAIN)
    found = {one.name: one for one in ablations(runner, trained, rows[30:], parts, [None] * 10)}
    with attach(tiny_base, trained):
        whole = Runner(tiny_base, COMPLETION, PLAIN).nll(rows[30:])
    with attach(tiny_base, without(trained, parts["block 1"])):
        less = Runner(tiny_base, COMPLETION, PLAIN).nll(rows[30:])
    assert found["block 1"].rise == pytest.approx(np.mean(less) - np.mean(whole), abs=1e-7)
    assert found["block 1"].rise != 0
    assert found["block 1"].ci95 is not None


def test_forgetting_is_the_difference_on_general_text(tiny_base: Base, trained: Adapter) -> None:
    source, paragraphs = general_text()
    text = general_rows(tiny_base.tokenizer, paragraphs, 64)
    assert len(text) >= len(paragraphs) >= 20
    score = forgetting(Runner(tiny_base, COMPLETION, PLAIN), trained, {source: text})[source]
    before = Runner(tiny_base, COMPLETION, PLAIN).nll(text)
    assert score.base == pytest.approx(np.mean(before))
    assert score.difference == pytest.approx(score.adapter - score.base)
    assert score.difference != 0  # of a base with random weights, either way
    with attach(tiny_base, trained):
        assert score.adapter == pytest.approx(np.mean(Runner(tiny_base, COMPLETION, PLAIN).nll(text)))


@pytest.mark.parametrize(
    ("content", "what"),
    [(None, "there is no such file"), (b"\xff\xfe\x00", "cannot be read as text"), (b"a b\n\nc", "holds no paragraph")],
)
def test_a_general_text_that_cannot_be_used_is_refused_before_anything_is_opened(
    tmp_path: Path, content: bytes | None, what: str
) -> None:
    path = tmp_path / "letters.txt"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(SettingsError, match=f"--general .*letters.txt: {what}"):
        run_planning("no base", "no data", {"general": str(path)})


# Rounds


def evidence(validation: list[float], training: list[float], half: float | None = None) -> Evidence:
    n = len(training)
    every = n // (len(validation) - 1)
    rungs = () if half is None else (Rung(0.5, 5, 1.0, half, half),)
    return Evidence(
        n,
        [(i * every, v) for i, v in enumerate(validation)],
        [(i + 1, v) for i, v in enumerate(training)],
        Ladder(1.0, 0.005, rungs, 1.0, ""),
    )


DOWN = np.linspace(3, 1, 60).tolist()


def test_a_run_that_was_still_falling_gets_more_steps_and_then_more_rank() -> None:
    told = evidence([3.0, 2.0, 1.5, 1.2], DOWN, 0.1)
    first = next_change(told, 8)
    assert not isinstance(first, str) and (first.kind, first.steps, first.growth) == ("more steps", 120, 1)
    second = next_change(told, 8, {"more steps"})
    assert not isinstance(second, str) and (second.kind, second.steps, second.growth) == ("more rank", 60, 2)
    assert next_change(told, 8, {"more steps", "more rank"}) == "more steps were tried; a higher rank was tried"


def test_a_half_that_answers_fewer_questions_right_shows_that_the_rank_is_used() -> None:
    flat = [3.0, 1.2, 1.2, 1.199]
    told = evidence(flat, DOWN, 0.001)
    assert "half of the rank was no worse" in str(next_change(told, 8))
    (half,) = told.ladder.rungs
    fewer = replace(told, ladder=replace(told.ladder, rungs=(replace(half, right=9),), asked=12, right=10))
    found = next_change(fewer, 8)
    assert not isinstance(found, str) and found.kind == "more rank"
    assert "costs +0.0010 on validation and answers 9 questions right instead of 10" in found.reason


def test_a_run_whose_validation_turned_early_gets_fewer_steps() -> None:
    found = next_change(evidence([3.0, 1.0, 1.5, 1.9], DOWN), 8)
    assert not isinstance(found, str) and (found.kind, found.steps) == ("fewer steps", 20)


def test_a_run_that_came_to_rest_with_rank_to_spare_is_left_alone() -> None:
    found = next_change(evidence([3.0, 1.5, 1.2, 1.199], DOWN, 0.001), 8)
    assert isinstance(found, str) and "half of the rank was no worse" in found


def test_a_round_must_be_better_by_a_test_that_grows_stricter() -> None:
    change = next_change(evidence([3.0, 2.0, 1.5, 1.2], DOWN), 8)
    assert not isinstance(change, str)
    before = around(0.0, 1, 0.1)
    after = [b - 0.04 for b in around(0.0, 2, 0.1)]
    rounds = [judged(k, change, 8, before, after, NONE) for k in (1, 2, 3, 4, 5)]
    assert [one.error for one in rounds[:3]] == pytest.approx([0.05, 0.0125, 0.05 / 9])
    bounds = [one.bound for one in rounds if one.bound is not None]
    assert bounds == sorted(bounds)
    assert rounds[0].accepted and not rounds[-1].accepted
    same = judged(1, change, 8, before, before, NONE)
    assert not same.accepted


@pytest.fixture
def short(tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A run that ended too early."""
    monkeypatch.setattr("lorafit.jobs.train.compare_with_peft", lambda *_: None)
    out = tmp_path / "run"
    run_training(str(tiny_folder), str(data), out, {**LONG, "epochs": 8, "memory": "64GB"})
    return out


@pytest.fixture
def refined(short: Path) -> Path:
    """The same after two rounds."""
    copytree(short / "adapter", short.parent / "first")
    for _ in range(2):
        run_refining(short)
    return short


def test_rounds_chain_and_the_better_adapter_takes_the_place_with_the_test_left_shut(refined: Path) -> None:
    history = json.loads((refined / "rounds" / "history.json").read_text(encoding="utf-8"))
    assert [one["number"] for one in history] == [1, 2]
    assert history[0]["kind"] == "more steps" and history[0]["accepted"]
    assert history[1]["before"] == pytest.approx(history[0]["after"], rel=1e-6)
    assert openings(refined) == 1
    last = max(one["number"] for one in history if one["accepted"])
    assert peft.read(refined / "adapter") == peft.read(refined / "rounds" / str(last) / "adapter")
    assert peft.read(refined / "rounds" / "0" / "adapter") == peft.read(refined.parent / "first")
    run_cut(refined, "50%", refined.parent / "half")
    standing, half = peft.read(refined / "adapter"), peft.read(refined.parent / "half")
    assert half.plan.parameters <= standing.plan.parameters  # of the one that stands, by its own moments
    assert "before round" in (refined / "adapter" / "README.md").read_text(encoding="utf-8")
    summary = json.loads((refined / "summary.json").read_text(encoding="utf-8"))
    assert summary["steps"] == json.loads((refined / "rounds" / str(last) / "plan.json").read_text())["recipe"]["steps"]
    assert not [*refined.glob("rounds/*/checkpoints")]
    told = dict(why(read_story(refined)))["What further rounds have brought"]
    assert "Round 1, more steps" in told and "was not opened again" in told


@pytest.mark.slow
def test_rounds_of_train_end_before_the_test_is_opened_once(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, refined: Path
) -> None:
    out = tmp_path / "rounds"
    summary = run_training(str(tiny_folder), str(data), out, {**LONG, "epochs": 8, "rounds": 2})
    assert openings(out) == 1
    kept = ("number", "kind", "accepted", "after")
    history = json.loads((refined / "rounds" / "history.json").read_text(encoding="utf-8"))
    assert [[one[key] for key in kept[:3]] for one in summary["rounds"]] == [[o[k] for k in kept[:3]] for o in history]
    assert peft.read(out / "adapter") == peft.read(refined / "adapter")


def test_a_round_that_fails_ends_no_run(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("no verdict")

    monkeypatch.setattr("lorafit.jobs.train.compare_with_peft", lambda *_: None)
    monkeypatch.setattr("lorafit.jobs.refine.judged", broken)
    summary = run_training(str(tiny_folder), str(data), tmp_path / "run", {**LONG, "epochs": 8, "rounds": 2})
    assert summary["passed_over"] == {"round 1": "RuntimeError: no verdict"}
    assert peft.read(tmp_path / "run" / "adapter").plan.parameters == summary["parameters"]


def test_a_round_whose_adapter_was_not_put_in_its_place_is_put_there_by_the_next(refined: Path) -> None:
    """Killed between the history and the adapter."""
    history = json.loads((refined / "rounds" / "history.json").read_text(encoding="utf-8"))
    last = max(one["number"] for one in history if one["accepted"])
    peft.write(peft.read(refined / "rounds" / "0" / "adapter"), refined / "adapter")
    run_refining(refined)
    history = json.loads((refined / "rounds" / "history.json").read_text(encoding="utf-8"))
    last = max(one["number"] for one in history if one["accepted"])
    assert peft.read(refined / "adapter") == peft.read(refined / "rounds" / str(last) / "adapter")


def judging(monkeypatch: pytest.MonkeyPatch, accepted: bool) -> None:
    """Every further round trains one step more, and is accepted or refused."""
    real = judged
    monkeypatch.setattr(refine, "judged", lambda *given: replace(real(*given), accepted=accepted))
    monkeypatch.setattr(
        refine, "next_change", lambda known, *_: Change(f"{known.steps + 1} steps", known.steps + 1, 1, "of a test")
    )


def summary_of(run: Path) -> RunSummary:
    summary = read_summary(run)
    assert summary is not None
    return summary


def test_a_round_killed_before_its_summary_is_in_it_after_the_next_one_that_is_refused(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = (short / "summary.json").read_bytes()
    judging(monkeypatch, accepted=True)
    run_refining(short)
    whole = summary_of(short)
    (short / "summary.json").write_bytes(before)
    judging(monkeypatch, accepted=False)
    run_refining(short)
    found = summary_of(short)
    assert found.rounds is not None and [one["accepted"] for one in found.rounds] == [True, False]
    assert replace(found, rounds=whole.rounds) == whole
    assert found.parameters == peft.read(short / "adapter").plan.parameters


def test_the_scores_stay_those_of_the_adapter_before_the_first_round_that_was_accepted(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judging(monkeypatch, accepted=True)
    for _ in range(2):
        run_refining(short)
    assert summary_of(short).scores_of_round == 1
    assert "before round 1" in (short / "adapter" / "README.md").read_text(encoding="utf-8")
    assert "before round 1" in (short / "report.html").read_text(encoding="utf-8")


def test_the_scores_of_train_are_those_of_the_last_of_its_own_rounds(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafit.jobs.train.compare_with_peft", lambda *_: None)
    judging(monkeypatch, accepted=True)
    out = tmp_path / "run"
    run_training(str(tiny_folder), str(data), out, {**LONG, "epochs": 8, "rounds": 1})
    tested = peft.read(out / "adapter")
    judging(monkeypatch, accepted=False)
    run_refining(out)
    assert summary_of(out).scores_of_round is None
    assert not (out / "rounds" / "0").exists()
    judging(monkeypatch, accepted=True)
    run_refining(out)
    assert summary_of(out).scores_of_round == 3
    assert peft.read(out / "rounds" / "0" / "adapter") == tested


def test_a_round_that_memory_has_no_room_for_is_left_out_in_words(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[tuple[int, str | None]] = []

    def fitted(base: Base, start: Adapter, rows: object, decision: Decision, settings: TrainSettings, *_: Any) -> None:
        assert start.plan == decision.plan
        asked.append((max(slot.rank for slot in start.plan.slots), settings.memory))
        raise SettingsError("--memory 64GB: too little")

    monkeypatch.setattr(refine, "next_change", lambda known, *_: Change("more rank", known.steps, 2, "it is used"))
    monkeypatch.setattr(refine, "fitted", fitted)
    verdict = run_refining(short)["verdict"]
    assert asked == [(2 * LONG["rank"], "64GB")]
    assert "more rank would be next, for it is used, and is left out: --memory 64GB: too little" in verdict
    assert not (short / "rounds").exists()


def test_a_round_that_needs_more_than_is_free_is_left_out_in_words(
    short: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with monkeypatch.context() as patch:
        patch.setattr("lorafit.runs.folder.free_bytes", lambda folder: 1000)
        assert "are free on that disk" in run_refining(short)["verdict"]
    run = json.loads((short / "run.json").read_text(encoding="utf-8"))
    (short / "run.json").write_text(json.dumps({**run, "settings": {**run["settings"], "memory": None}}))
    monkeypatch.setattr(refine, "fitted", lambda base, start, rows, decision, *_: (decision, 10**15))
    assert "are free here" in run_refining(short)["verdict"]
    assert not (short / "rounds").exists()


def test_a_stopped_round_goes_on_with_what_it_ran_at_a_time(short: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def fits(tokens: int) -> Any:
        return lambda base, start, rows, decision, *_: (
            replace(decision, recipe=replace(decision.recipe, micro_tokens=tokens)),
            0,
        )

    ran: list[int] = []

    def stopped(opened: object, order: Any, *_: Any) -> None:
        ran.append(order.recipe.micro_tokens)
        raise Interrupted("stopped")

    monkeypatch.setattr(refine, "carry_out", stopped)
    for tokens in (64, 128):
        monkeypatch.setattr(refine, "fitted", fits(tokens))
        with pytest.raises(Interrupted):
            run_refining(short)
    assert ran == [64, 64]


def test_with_too_few_validation_examples_no_round_is_trained(
    tiny_folder: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("lorafit.jobs.train.compare_with_peft", lambda *_: None)
    out = tmp_path / "run"
    run_training(str(tiny_folder), str(data), out, {**LONG, "epochs": 8, "val_share": 0.1})
    assert "at least 10 are needed" in run_refining(out)["verdict"]
    assert not (out / "rounds" / "1").exists()


def test_refining_what_is_no_finished_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(RunError, match="no run: name a folder that lorafit train wrote"):
        run_refining(tmp_path)
