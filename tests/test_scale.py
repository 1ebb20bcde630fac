"""The simulator of bench/scale.py keeps to what is known without it, and docs/scale.md says what it prints."""

from __future__ import annotations

import importlib
import math
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest

from lorafit.bases.base import Base

BENCH = Path(__file__).parents[1] / "bench"


@pytest.fixture
def sim(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCH))
    return importlib.import_module("scale_sim")


def rarest_first(sim: ModuleType, adapters: int) -> list[str]:
    return [sim.name_of(i) for i in reversed(range(adapters))]


@pytest.mark.parametrize("route", ["random", "least", "adapter"])
def test_every_request_is_answered_once_and_nothing_stays_in_use(sim: ModuleType, route: str) -> None:
    traffic = sim.Traffic(40, 0.5, prompt=20, answer=10)
    jobs = traffic.jobs(20, 400)
    costs = sim.Costs(0.02, 0.001, 0.001, 0.002, 0.0005, warm=0.02, disk=0.1)
    fleet = sim.simulate(jobs, 3, sim.Kind(slots=4, hot=6, warm=12), costs, rarest_first(sim, 40), route)
    assert all(job.done == job.answer and job.at <= job.began < job.first <= job.ended for job in jobs)
    assert {job.machine for job in jobs} == {0, 1, 2}
    assert [machine.load for machine in fleet] == [0, 0, 0]
    assert all(len(machine.memory.hot) <= 6 and len(machine.memory.warm) <= 12 for machine in fleet)
    seen = sim.Seen.of(jobs)
    assert seen.hot + seen.warm + seen.disk == pytest.approx(1)


def test_one_slot_and_equal_requests_wait_as_a_queue_of_that_kind_does(sim: ModuleType) -> None:
    traffic, service, share = sim.Traffic(0, 0, prompt=1, answer=1, spread=0), 0.01, 0.7
    jobs = traffic.jobs(share / service, 40_000)
    sim.simulate(jobs, 1, sim.Kind(slots=1), sim.Costs(service), [])
    waited = np.mean([job.began - job.at for job in jobs])
    assert waited == pytest.approx(share * service / (2 * (1 - share)), rel=0.1), "M/D/1"


def test_a_full_machine_makes_as_many_tokens_as_the_formula_says(sim: ModuleType) -> None:
    traffic, costs = sim.Traffic(0, 0, prompt=1, answer=64, spread=0), sim.Costs(0.02, 0.003)
    jobs = traffic.jobs(None, 160)
    sim.simulate(jobs, 1, sim.Kind(slots=16), costs, [])
    assert sim.Seen.of(jobs).tok_s == pytest.approx(16 / (0.02 + 16 * 0.003), rel=0.01)
    assert 64 / costs.of_request(0, 64, 16, 0) == pytest.approx(16 / (0.02 + 16 * 0.003))


def test_with_room_for_all_every_adapter_is_hot_and_with_little_as_many_as_least_recently_used_keeps(
    sim: ModuleType,
) -> None:
    traffic, costs = sim.Traffic(64, 1.0, prompt=4, answer=2), sim.Costs(0.001, warm=0.001)
    hits = {}
    for room in (64, 16):
        jobs = traffic.jobs(5, 8000)
        sim.simulate(jobs, 1, sim.Kind(hot=room), costs, rarest_first(sim, 64))
        hits[room] = sim.Seen.of(jobs).hot
    assert hits[64] == 1
    shares = np.array(traffic.shares())
    low, high = 0.0, 1e6  # Che's approximation: an adapter stays for the time in which 16 others are asked for
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (low, middle) if (1 - np.exp(-shares * middle)).sum() > 16 else (middle, high)
    assert hits[16] == pytest.approx(float((shares * (1 - np.exp(-shares * low))).sum()), abs=0.02)


@pytest.mark.parametrize("route", ["least", "adapter"])
def test_more_machines_are_no_slower(sim: ModuleType, route: str) -> None:
    traffic, costs = sim.Traffic(32, 1.0, prompt=16, answer=16), sim.Costs(0.02, 0.002, 0.001, 0, 0.0005, 0.02)
    firsts = []
    for machines in (1, 2, 4):
        jobs = traffic.jobs(10, 500)
        sim.simulate(jobs, machines, sim.Kind(slots=4, hot=8), costs, rarest_first(sim, 32), route)
        firsts.append(sim.Seen.of(jobs).first_p99)
    assert firsts == sorted(firsts, reverse=True)


def test_an_adapter_stays_at_its_machine_until_that_has_more_than_its_part(sim: ModuleType) -> None:
    fleet = [sim.Machine(sim.Kind(slots=1), sim.Costs(1.0), sim.Clock()) for _ in range(4)]
    router = sim.Router("adapter", fleet)
    home = router.home("returns")
    picked = []
    for _ in range(40):
        loads = [machine.load for machine in fleet]
        picked.append(router.pick("returns"))
        assert loads[picked[-1]] < math.ceil(sim.BOUND * (sum(loads) + 1) / 4)
        fleet[picked[-1]].submit(sim.Job(0, None, 1, 1))
    assert picked[0] == home and set(picked) == {0, 1, 2, 3}
    others = sim.Router("adapter", fleet[:3])
    names = [sim.name_of(i) for i in range(400)]
    moved = sum(router.home(name) != others.home(name) for name in names if router.home(name) != 3)
    assert moved == 0, "a machine that goes takes only its own adapters' homes with it"


def test_the_engine_is_measured_and_finds_adapters_where_the_simulator_does(
    sim: ModuleType, tiny_base: Base, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, one_thread: None
) -> None:
    check = importlib.import_module("scale_check")
    monkeypatch.setattr(check, "BUILD", tmp_path)
    monkeypatch.setattr(check, "STEPS", 4)
    monkeypatch.setattr(check, "PROMPTS", (32, 128))
    traffic = sim.Traffic(24, 1.0, prompt=8, answer=4)
    with check.opened(tiny_base, 2, 24, 16, 256, 16, 20) as engine:
        costs, _ = check.calibrated(engine)
        assert 0 < costs.of(1, 0) < costs.of(16, 16, 128) and costs.warm > 0 and costs.disk > 0
        jobs = traffic.jobs(20, 60)
        check.served(engine, traffic, jobs)
    again = traffic.jobs(20, 60)
    sim.simulate(again, 1, sim.Kind(16, 16, 20), costs, rarest_first(sim, 24))
    assert [job.done for job in jobs] == [job.done for job in again]
    seen, simulated = sim.Seen.of(jobs), sim.Seen.of(again)
    assert simulated.hot == pytest.approx(seen.hot, abs=0.2), "a busy machine holds them longer"
    assert seen.disk > 0 and simulated.disk > 0


def test_the_tables_of_the_page_are_there_and_those_of_bytes_are_what_is_computed(sim: ModuleType) -> None:
    scale = importlib.import_module("scale")
    text = scale.PAGE.read_text(encoding="utf-8")
    assert scale.page(text, {"paper": scale.markdown(scale.PAPER_HEAD, scale.paper())}) == text
    assert scale.SHAPES["SmolLM2-135M"].adapter(8) == 2_442_240, "what training reports"


@pytest.mark.slow
def test_all_tables_of_the_page_are_what_the_simulator_prints(sim: ModuleType) -> None:
    scale = importlib.import_module("scale")
    text, made = scale.PAGE.read_text(encoding="utf-8"), scale.tables()
    assert all(f"<!-- bench/scale.py: {name} -->" in text for name in made)
    assert scale.page(text, made) == text
