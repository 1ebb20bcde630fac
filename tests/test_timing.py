"""The faster of two ways, chosen by the time each was measured to take."""

from __future__ import annotations

import time

import pytest

from lorafit.serving import timing
from lorafit.serving.timing import FIRST, SECOND, Timings, compared

# Milliseconds of a step of SmolLM2 in bf16 on a processor that has units for products of whole tiles: in one call its
# products take 5 to 12 and the rest one; by layers they take 10.0 to 10.6, and the calls between them 50.
TILES = Timings((1, 4, 8, 16, 128), (6.0, 7.0, 8.0, 13.0, 97.0), (60.0, 60.0, 60.0, 60.6, 70.0))
# Of one without: the calls cost less than the arithmetic, and torch's products of many rows are the faster.
PLAIN = Timings((1, 16, 64, 512), (62.0, 145.0, 500.0, 3800.0), (80.0, 175.0, 460.0, 2360.0))
CROSSING = Timings((1, 2, 8, 32, 256), (5.0, 9.0, 9.0, 40.0, 300.0), (8.0, 8.0, 10.0, 30.0, 400.0))  # more than once


def test_products_that_are_a_hair_slower_do_not_make_a_whole_step_slower() -> None:
    assert TILES.at(16) == (13.0, 60.6)
    assert all(TILES.faster(rows) for rows in (1, 8, 9, 16, 17, 32)) and not TILES.faster(128)


@pytest.mark.parametrize("timings", [TILES, PLAIN, CROSSING])
def test_what_is_chosen_is_never_slower_and_has_no_jump(timings: Timings) -> None:
    both = [timings.at(rows) for rows in range(1, 514)]
    chosen = [pair[0 if timings.faster(rows) else 1] for rows, pair in enumerate(both, 1)]
    assert chosen == [min(pair) for pair in both]
    assert len({timings.faster(rows) for rows in range(1, 513)}) == 2, "one way is always faster: nothing is shown"
    for rows in range(512):
        steps = [abs(later - earlier) for earlier, later in zip(both[rows], both[rows + 1], strict=True)]
        assert abs(chosen[rows + 1] - chosen[rows]) <= max(steps) + 1e-9


def test_between_what_was_timed_the_time_is_on_a_line_and_beyond_it_grows_with_the_rows() -> None:
    timings = Timings((4, 8), (1.0, 3.0), (2.0, 2.0))
    assert [timings.at(rows) for rows in (1, 4, 6, 8, 16)] == [(1, 2), (1, 2), (2, 2), (3, 2), (6, 4)]
    assert [timings.faster(rows) for rows in (1, 4, 6, 7, 8, 16, 1 << 20)] == [True] * 3 + [False] * 4
    assert all(FIRST.faster(rows) and not SECOND.faster(rows) for rows in (1, 2, 512))


def ways_taking(clock: list[float], slow: float) -> tuple[object, list[str]]:
    """Two ways on a clock that only they move; the first time of each takes twice as long."""
    order: list[str] = []

    def ways(rows: int) -> tuple[object, object, float]:
        def run(name: str, seconds: float) -> None:
            order.append(name)
            clock[0] += seconds * (1 if name in order[:-1] else 2)

        return lambda: run(f"first {rows}", 0.001 * rows), lambda: run(f"second {rows}", slow), 0.5

    return ways, order


def test_two_ways_take_turns_and_the_fastest_of_each_counts(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    ways, order = ways_taking(clock, 0.01)
    timings = compared(ways, (16, 1))  # type: ignore[arg-type]
    assert order == ["first 16", "second 16"] * timing.RUNS + ["first 1", "second 1"] * timing.RUNS
    assert timings.rows == (1, 16)
    assert timings.first == pytest.approx((0.002, 0.032)) and timings.second == pytest.approx((0.02, 0.02))


def test_what_is_slow_to_time_is_timed_twice_and_the_rest_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    ways, order = ways_taking(clock, timing.BUDGET)
    timings = compared(ways, (16, 128, 1))  # type: ignore[arg-type]
    assert order == ["first 16", "second 16"] * 2 and timings.rows == (16,)
    assert timings.faster(1) and timings.faster(512)
