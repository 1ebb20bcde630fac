"""Scale: what many adapters on several machines take and give, by a simulator with the engine's own rules.

    python bench/scale.py            the tables of docs/scale.md, half a minute
    python bench/scale.py --check    measures the costs of a step here, simulates a run, lets the engine do it; minutes
    python bench/scale.py --docs     writes the tables into docs/scale.md

--check keeps what it measured in bench/scale_costs.json, from which the tables of the small base are made; those of the
1B and 8B shapes are computed from bytes and arithmetic alone (`GPU`). The last line of stdout is one JSON object;
--record appends the check to bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from results import circumstances, markdown, record
from scale_sim import Costs, Kind, Route, Seen, Traffic, name_of, simulate

HERE = Path(__file__).parent
COSTS = HERE / "scale_costs.json"
PAGE = HERE.parent / "docs" / "scale.md"
LOAD = 0.7  # of what machines can do
SETTLING = 0.2  # of the requests, that are not counted


@dataclass(frozen=True)
class Shape:
    """A decoder of Llama's kind. tied: the output head is the embedding."""

    hidden: int
    blocks: int
    heads: int
    kept: int  # heads of keys and values
    inner: int
    vocabulary: int
    tied: bool

    @property
    def widths(self) -> list[tuple[int, int]]:
        """(d_in, d_out) of the linear layers of a block."""
        kept = self.hidden // self.heads * self.kept
        attention = [(self.hidden, self.hidden), (self.hidden, kept), (self.hidden, kept), (self.hidden, self.hidden)]
        return [*attention, (self.hidden, self.inner), (self.hidden, self.inner), (self.inner, self.hidden)]

    @property
    def read(self) -> int:
        """Numbers that a step reads: blocks and head."""
        return self.blocks * sum(a * b for a, b in self.widths) + self.vocabulary * self.hidden

    @property
    def held(self) -> int:
        return self.read + (0 if self.tied else self.vocabulary * self.hidden)

    @property
    def kept_a_token(self) -> int:
        """Numbers of keys and values of a token."""
        return 2 * self.blocks * self.kept * self.hidden // self.heads

    def adapter(self, rank: int) -> int:
        """Numbers of an adapter on all linear layers: r · Σ (d_in + d_out)."""
        return rank * self.blocks * sum(a + b for a, b in self.widths)


SHAPES = {
    "SmolLM2-135M": Shape(576, 30, 9, 3, 1536, 49152, True),
    "1B": Shape(2048, 16, 32, 8, 8192, 128256, True),
    "8B": Shape(4096, 32, 32, 8, 14336, 128256, False),
}


@dataclass(frozen=True)
class Device:
    """What it reaches: bytes and operations a second, of its memory, from the host's, from disk; around: seconds of a
    step that go to neither."""

    memory: float
    bytes_s: float
    flop_s: float
    host_s: float
    disk_s: float
    around: float

    def costs(self, shape: Shape, rank: int, context: int, width: int) -> Costs:
        """On paper: every byte is read once a step, every operation done once. width: bytes of a number; adapters are
        kept on the host as they were written, 4 bytes a number."""
        adapter = shape.adapter(rank)
        flops = 2 * (shape.read + adapter) / self.flop_s
        return Costs(
            step=self.around + width * shape.read / self.bytes_s,
            row=width * context * shape.kept_a_token / self.bytes_s + flops,
            adapter=width * adapter / self.bytes_s,
            token=flops,
            warm=4 * adapter / self.host_s,
            disk=4 * adapter / self.disk_s,
        )


# Assumed: an accelerator of 80 GB at some 60 % of 3.35 TB/s and 30 % of 1e15 operations/s.
GPU = Device(memory=80e9, bytes_s=2e12, flop_s=3e14, host_s=2.5e10, disk_s=2e9, around=0.005)
RANK = 8


@dataclass(frozen=True)
class Case:
    """A kind of machine with a base on it, and how requests for it are. hot, warm: bytes."""

    shape: str
    costs: Costs
    width: int  # bytes of a number
    slots: int
    room: int
    hot: float
    warm: float
    traffic: Traffic
    requests: int

    def of(self, adapters: int, skew: float) -> Traffic:
        given = self.traffic
        return Traffic(adapters, skew, given.prompt, given.answer, given.spread)

    @property
    def adapter(self) -> int:
        return SHAPES[self.shape].adapter(RANK)

    @property
    def kind(self) -> Kind:
        return Kind(self.slots, int(self.hot / (self.width * self.adapter)), int(self.warm / (4 * self.adapter)))

    def rate(self, traffic: Traffic) -> float:
        """Requests a second that one machine can answer, all of whose adapters are hot."""
        distinct = traffic.distinct(self.slots)
        return 1 / self.costs.of_request(traffic.prompt, traffic.answer, self.slots, distinct)

    def run(self, traffic: Traffic, machines: int, route: Route, load: float) -> tuple[Seen, dict[str, int]]:
        """What requests saw that came at this share of what the machines can do; and the most adapters that a machine
        held hot and warm."""
        jobs = traffic.jobs(load * machines * self.rate(traffic), self.requests * machines)
        names = [name_of(i) for i in reversed(range(traffic.adapters))]
        fleet = simulate(jobs, machines, self.kind, self.costs, names, route)
        held = {place: max(machine.memory.most[place] for machine in fleet) for place in ("hot", "warm")}
        return Seen.of(jobs[int(SETTLING * len(jobs)) :]), held


def gpu(shape: str, slots: int, prompt: int, answer: int, requests: int) -> Case:
    """What is left of the memory beside base and slots is for hot adapters."""
    one, width, room = SHAPES[shape], 2, 1024
    left = GPU.memory - width * (one.held + slots * room * one.kept_a_token)
    return Case(
        shape,
        GPU.costs(one, RANK, prompt + answer // 2, width),
        width,
        slots,
        room,
        left,
        256e9,
        Traffic(0, 0, prompt, answer),
        requests,
    )


def here(known: Mapping[str, Any]) -> Case:
    """The small base as it was measured: the engine's own settings, but for the room of a slot."""
    width = 2 if known["dtype"] == "bf16" else 4
    return Case("SmolLM2-135M", Costs(**known["costs"]), width, 16, 1024, 4 << 30, 0, Traffic(0, 0, 32, 64), 1000)


# Tables

Rows = list[list[str]]
ONE_HEAD = [
    "adapters",
    "skew",
    "different in a step",
    "tokens/s at most",
    "first token p50 / p99 (s)",
    "hot / warm / disk",
    "hot, warm (GB)",
]
ONE = ((16, 1.0), (256, 1.0), (1024, 1.0), (4096, 0.0), (4096, 0.5), (4096, 1.0), (4096, 1.5))
FLEET_HEAD = [
    "skew",
    "machines",
    "sent to",
    "tokens/s",
    "first token p50 / p99 (s)",
    "waited p99 (s)",
    "hot / warm / disk",
]
ROUTES: tuple[Route, ...] = ("random", "least", "adapter")
FLEET = [
    (skew, machines, route)
    for skew in (1.0, 0.0)
    for machines in (1, 4, 8)
    for route in ROUTES
    if machines > 1 or route == "least"
]
WORDS = {"random": "any", "least": "the least loaded", "adapter": "the adapter's"}
ADAPTERS = 4096  # of several machines


def places(seen: Seen) -> str:
    return f"{seen.hot:.0%} / {seen.warm:.0%} / {seen.disk:.0%}"


def one_machine(case: Case) -> Rows:
    rows = []
    for adapters, skew in ONE:
        traffic = case.of(adapters, skew)
        seen, held = case.run(traffic, 1, "least", LOAD)
        hot, warm = case.width * case.adapter * held["hot"], 4 * case.adapter * held["warm"]
        rows.append(
            [
                f"{adapters:,}",
                f"{skew:g}",
                f"{traffic.distinct(case.slots):.1f}",
                f"{case.rate(traffic) * traffic.answer:,.0f}",
                f"{seen.first_p50:.2f} / {seen.first_p99:.2f}",
                places(seen),
                f"{hot / 1e9:.1f}, {warm / 1e9:.1f}",
            ]
        )
    return rows


def several(case: Case) -> Rows:
    rows = []
    for skew, machines, route in FLEET:
        seen, _ = case.run(case.of(ADAPTERS, skew), machines, route, LOAD)
        first = f"{seen.first_p50:.2f} / {seen.first_p99:.2f}"
        rows.append(
            [
                f"{skew:g}",
                str(machines),
                WORDS[route],
                f"{seen.tok_s:,.0f}",
                first,
                f"{seen.waited_p99:.2f}",
                places(seen),
            ]
        )
    return rows


def paper() -> Rows:
    """Bytes of adapters and bases, by the formulas."""
    rows = []
    for name, shape in SHAPES.items():
        adapter, base = 2 * shape.adapter(RANK), 2 * shape.read
        eight, many = (1 + k * adapter / base for k in (8, 64))
        rows.append(
            [
                name,
                f"{2 * shape.held / 1e9:.2f}",
                f"{2 * shape.kept_a_token / 1e3:.0f}",
                f"{adapter / 1e6:.1f}",
                f"{eight:.3f}",
                f"{many:.2f}",
                f"{int(1e9 / adapter):,}",
            ]
        )
    return rows


PAPER_HEAD = [
    "shape, bf16",
    "base (GB)",
    "keys and values (KB a token)",
    "adapter of rank 8 (MB)",
    "floor, 8 in a step",
    "floor, 64 in a step",
    "adapters in a GB",
]
CHECK_HEAD = ["64 adapters, 16 hot, 32 warm", "simulated", "measured"]


def checked(check: Mapping[str, Mapping[str, float]]) -> Rows:
    rows = []
    for label, key, form in (
        ("tokens/s", "tok_s", "{:.0f}"),
        ("first token p50 (s)", "first_p50", "{:.2f}"),
        ("first token p99 (s)", "first_p99", "{:.2f}"),
        ("waited p50 (s)", "waited_p50", "{:.2f}"),
        ("waited p99 (s)", "waited_p99", "{:.2f}"),
        ("hot", "hot", "{:.0%}"),
        ("warm", "warm", "{:.0%}"),
        ("on disk", "disk", "{:.0%}"),
    ):
        rows.append([label, *(form.format(check[side][key]) for side in ("simulated", "measured"))])
    return rows


COSTS_HEAD = ["ms", "SmolLM2-135M, measured", "1B, computed", "8B, computed"]


def priced(cases: Sequence[Case]) -> Rows:
    words = {
        "step": "a step",
        "row": "each row more",
        "adapter": "each different adapter more",
        "piece": "prompts beside, once",
        "token": "each token of a prompt",
        "warm": "hot from memory",
        "disk": "hot from disk",
    }
    return [[word, *(f"{1000 * getattr(case.costs, key):.3g}" for case in cases)] for key, word in words.items()]


def tables() -> dict[str, str]:
    """All of docs/scale.md, by name."""
    known = json.loads(COSTS.read_text(encoding="utf-8"))
    own = here(known)
    computed = {"1B": gpu("1B", 256, 256, 128, 1500), "8B": gpu("8B", 256, 256, 128, 1500)}
    made = {
        "paper": markdown(PAPER_HEAD, paper()),
        "costs": markdown(COSTS_HEAD, priced([own, *computed.values()])),
        "check": markdown(CHECK_HEAD, checked(known["check"])),
        "one SmolLM2-135M": markdown(ONE_HEAD, one_machine(own)),
        "several SmolLM2-135M": markdown(FLEET_HEAD, several(own)),
    }
    for name, case in computed.items():
        made[f"one {name}"] = markdown(ONE_HEAD, one_machine(case))
    made["several 8B"] = markdown(FLEET_HEAD, several(computed["8B"]))
    return made


def page(text: str, made: Mapping[str, str]) -> str:
    """A page with these tables between their marks."""
    for name, table in made.items():
        begin, end = f"<!-- bench/scale.py: {name} -->", "<!-- end -->"
        text = re.sub(f"{re.escape(begin)}.*?{end}", f"{begin}\n{table}\n{end}", text, flags=re.DOTALL)
    return text


# The check


def check(given: argparse.Namespace) -> dict[str, Any]:
    """Costs of the real engine, and one run of it beside the simulator's."""
    import torch
    from scale_check import calibrated, opened, served
    from serve_work import BASE

    from lorafit.bases.base import fastest_dtype, open_base

    dtypes = {"fp32": torch.float32, "bf16": torch.bfloat16}
    name = given.dtype or ("bf16" if fastest_dtype() == torch.bfloat16 else "fp32")
    base = open_base(given.base or BASE, dtypes[name])
    slots, hot, warm = 16, 16, 32
    traffic = Traffic(64, 1.0, 32, 64)
    with opened(base, RANK, traffic.adapters, slots, 1024, hot, warm) as engine:
        costs, missed = calibrated(engine)
        rate = LOAD / costs.of_request(traffic.prompt, traffic.answer, slots, traffic.distinct(slots))
        jobs = traffic.jobs(rate, given.requests)
        served(engine, traffic, jobs)
        measured = Seen.of(jobs)
    jobs = traffic.jobs(rate, given.requests)
    simulate(jobs, 1, Kind(slots, hot, warm), costs, [name_of(i) for i in reversed(range(traffic.adapters))])
    return {
        "dtype": name,
        "costs": asdict(costs),
        "missed": missed,
        "rate": rate,
        "requests": given.requests,
        "check": {"simulated": asdict(Seen.of(jobs)), "measured": asdict(measured)},
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--check", action="store_true", help="measure costs here, and compare a run with the engine's")
    parser.add_argument("--docs", action="store_true", help="write the tables into docs/scale.md")
    parser.add_argument("--base", help="of the check: another than the built-in one, whose costs are not kept")
    parser.add_argument("--dtype", choices=("fp32", "bf16"), help="of the check; by default the faster here")
    parser.add_argument("--requests", type=int, default=400, help="of the check")
    parser.add_argument("--record", action="store_true", help="append the check to bench/RESULTS.md")
    given = parser.parse_args()
    result: dict[str, Any] = {"benchmark": "scale", **circumstances()}
    if given.check:
        found = check(given)
        result |= found
        table = markdown(CHECK_HEAD, checked(found["check"]))
        costs = ", ".join(f"{key} {1000 * value:.3g}" for key, value in found["costs"].items())
        words = (
            f"{found['dtype']}, rank {RANK}, skew 1, {found['requests']} requests, {found['rate']:.2f} a second. "
            f"Costs of a step in ms: {costs}; median error {found['missed']:.1%}."
        )
        print(f"{words}\n\n{table}")
        if not given.base:
            COSTS.write_text(json.dumps({**found, "machine": result["machine"]}, indent=1) + "\n", encoding="utf-8")
        if given.record:
            record("Scale, simulated and measured", result, f"{words}\n\n{table}")
    else:
        made = tables()
        for name, table in made.items():
            print(f"{name}\n\n{table}\n")
        if given.docs:
            PAGE.write_text(page(PAGE.read_text(encoding="utf-8"), made), encoding="utf-8")
        result["tables"] = made
    print(json.dumps(result))


if __name__ == "__main__":
    main()
