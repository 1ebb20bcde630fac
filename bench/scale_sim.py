"""The simulator of `bench/scale.py`: many adapters on several machines, by discrete events.

A machine does what the engine does (serving/engine.py, pool.py; turns are the engine's own): a step gives every row its
next token and reads pieces of prompts beside them, as many tokens as add `stall` seconds; a place that is free goes to
the adapter that was served least; an adapter that is not hot is read by another thread, one at a time, while others go
before it; what is in use stays, the least recently used goes. Not simulated: beginnings that prompts have in common,
what reading an adapter takes from a step on the same cores, contexts that grow, the network, a queue that is full.
"""

from __future__ import annotations

import hashlib
import heapq
import math
import random
from bisect import bisect
from collections import Counter, OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import accumulate, count
from typing import Any, Literal

import numpy as np

from lorafit.serving.pace import LEAST, MOST
from lorafit.serving.turns import Turns

LOOK = 0.05  # seconds after which an engine with nothing to do looks again for an adapter that is being read
BOUND = 1.25  # times the mean load that a machine may have before an adapter's next one is asked
POINTS = 64  # of each machine on the ring

Place = Literal["hot", "warm", "disk"]
Route = Literal["random", "least", "adapter"]


@dataclass(frozen=True)
class Costs:
    """Seconds. step: one without rows; row, adapter: that each row, each different adapter adds; piece, token: that
    prompts add, once and for each token; warm, disk: of making an adapter hot from there."""

    step: float
    row: float = 0.0
    adapter: float = 0.0
    piece: float = 0.0
    token: float = 0.0
    warm: float = 0.0
    disk: float = 0.0

    def of(self, rows: int, adapters: float, prompt: int = 0) -> float:
        """A step with so many rows, different adapters, and tokens of prompts."""
        more = self.piece + self.token * prompt if prompt else 0.0
        return self.step + self.row * rows + self.adapter * adapters + more

    def of_request(self, prompt: float, answer: float, slots: int, adapters: float) -> float:
        """What a request takes of a machine all of whose slots answer, that many different adapters' at a time."""
        return answer * self.of(slots, adapters) / slots + self.piece + self.token * prompt


@dataclass(frozen=True)
class Kind:
    """Of machine. hot, warm: adapters that fit."""

    slots: int = 16
    hot: int = 1 << 30
    warm: int = 1 << 30
    stall: float = 0.25


@dataclass(frozen=True)
class Traffic:
    """adapters: the i-th is asked for in proportion to i^-skew (Zipf). prompt, answer: mean tokens, log-normal, the
    logarithm's standard deviation being `spread`, four times the mean at most."""

    adapters: int
    skew: float = 1.0
    prompt: int = 32
    answer: int = 64
    spread: float = 0.5

    def shares(self) -> list[float]:
        weights = [(i + 1) ** -self.skew for i in range(self.adapters)]
        whole = sum(weights)
        return [weight / whole for weight in weights]

    def distinct(self, rows: int) -> float:
        """Different adapters among so many rows, on average."""
        return sum(1 - (1 - share) ** rows for share in self.shares())

    def jobs(self, rate: float | None, number: int, seed: int = 0) -> list[Job]:
        """That many requests, `rate` a second on average (Poisson); None: all at once."""
        draw, at = random.Random(seed), 0.0
        names, sums = [name_of(i) for i in range(self.adapters)], list(accumulate(self.shares()))
        made = []
        for _ in range(number):
            at += draw.expovariate(rate) if rate else 0.0
            name = draw.choices(names, cum_weights=sums)[0] if names else None
            made.append(Job(at, name, self._tokens(draw, self.prompt), self._tokens(draw, self.answer)))
        return made

    def _tokens(self, draw: random.Random, mean: int) -> int:
        drawn = mean * math.exp(draw.gauss(-(self.spread**2) / 2, self.spread))
        return max(1, min(4 * mean, round(drawn)))


def name_of(number: int) -> str:
    return f"a{number}"


@dataclass(eq=False)
class Job:
    """A request: asked at a moment, for an adapter (None: the bare base), tokens of prompt and answer. What became of
    it: the machine, where its adapter was found, when it got its place, its first token and its last."""

    at: float
    name: str | None
    prompt: int
    answer: int
    machine: int = -1
    place: Place = "hot"
    left: int = 0
    done: int = 0
    began: float = math.nan
    first: float = math.nan
    ended: float = math.nan


@dataclass
class Clock:
    """What happens next."""

    now: float = 0.0
    _events: list[tuple[float, int, Callable[[], None]]] = field(default_factory=list)
    _order: count[int] = field(default_factory=count)

    def later(self, seconds: float, call: Callable[[], None]) -> None:
        heapq.heappush(self._events, (self.now + seconds, next(self._order), call))

    def run(self) -> None:
        while self._events:
            self.now, _, call = heapq.heappop(self._events)
            call()


class Memory:
    """Which adapters are hot, which warm, the least recently used first. most: there were at a time."""

    def __init__(self, kind: Kind, names: Sequence[str]):
        """names: the least asked for first, all loaded in this order before the first request."""
        self._kind, self._users = kind, Counter[str]()
        self.hot, self.warm = (
            OrderedDict.fromkeys(names[max(0, len(names) - most) :]) for most in (kind.hot, kind.warm)
        )
        self.most = {"hot": len(self.hot), "warm": len(self.warm)}

    def place(self, name: str | None) -> Place:
        return "hot" if name is None or name in self.hot else "warm" if name in self.warm else "disk"

    def heat(self, name: str) -> None:
        """It is used, and hot from now on."""
        for held, most in ((self.hot, self._kind.hot), (self.warm, self._kind.warm)):
            held[name] = None
            held.move_to_end(name)
            self._let_go(held, most, name)
        self.most = {"hot": max(self.most["hot"], len(self.hot)), "warm": max(self.most["warm"], len(self.warm))}

    def touch(self, name: str) -> None:
        """It is used."""
        for held in (self.hot, self.warm):
            if name in held:
                held.move_to_end(name)

    def enter(self, name: str, users: int) -> None:
        """So many requests more need it."""
        self._users[name] += users
        if not self._users[name]:
            self._let_go(self.hot, self._kind.hot, name)

    def _let_go(self, held: OrderedDict[str, None], most: int, kept: str) -> None:
        if (over := len(held) - most) > 0:
            idle = (name for name in held if name != kept and not self._users[name])
            for name in [name for name, _ in zip(idle, range(over), strict=False)]:
                del held[name]


class Machine:
    """One engine."""

    def __init__(self, kind: Kind, costs: Costs, clock: Clock):
        self.kind, self.costs, self.clock = kind, costs, clock
        self.memory = Memory(kind, ())
        self.rows: list[Job] = []
        self._turns: Any = Turns()  # of jobs, of which it asks the name alone
        self._reading = self._stepping = self._looking = False

    @property
    def load(self) -> int:
        """Requests that wait or are answered."""
        return len(self.rows) + len(self._turns)

    def submit(self, job: Job) -> None:
        job.place = self.memory.place(job.name)
        if job.name is not None:
            self.memory.enter(job.name, 1)
        self._turns.add(job, [row.name for row in self.rows])
        if not self._stepping:
            self._turn()

    def _turn(self) -> None:
        while len(self.rows) < self.kind.slots:
            job = next(self._turns.offers(self._can_begin), None)
            if job is None:
                break
            self._begin(job)
        if self.rows:
            shares = self._shares()
            adapters = len({job.name for job in shares} - {None})
            singles = sum(job.left == 1 for job in shares)
            self._stepping = True
            seconds = self.costs.of(singles, adapters, sum(shares.values()) - singles)
            self.clock.later(seconds, partial(self._end, shares))
        elif len(self._turns) and not self._looking:
            self._looking = True
            self.clock.later(LOOK, self._look)

    def _look(self) -> None:
        self._looking = False
        if not self._stepping:
            self._turn()

    def _can_begin(self, job: Job) -> bool:
        place = self.memory.place(job.name)
        if job.name is None or place == "hot":
            return True
        if not self._reading:
            self._reading = True
            seconds = self.costs.warm if place == "warm" else self.costs.disk
            self.clock.later(seconds, partial(self._read, job.name))
        return False

    def _read(self, name: str) -> None:
        self._reading = False
        self.memory.heat(name)

    def _begin(self, job: Job) -> None:
        self._turns.take(job)
        if job.name is not None:
            self.memory.touch(job.name)
        job.began, job.left = self.clock.now, job.prompt
        self.rows.append(job)
        self._turns.charge(job.name, job.prompt)

    def _shares(self) -> dict[Job, int]:
        """How many tokens of each request go into this step."""
        shares = {job: 1 for job in self.rows if job.left == 1}
        budget = MOST
        if shares and self.costs.token:
            budget = max(LEAST, min(MOST, int(self.kind.stall / self.costs.token)))
        for job in self.rows:
            if job.left > 1 and budget > 0:
                shares[job] = min(job.left, budget)
                budget -= shares[job]
        return shares

    def _end(self, shares: dict[Job, int]) -> None:
        """Of a step."""
        now = self.clock.now
        for job, tokens in shares.items():
            job.left -= tokens
            if job.left:
                continue
            job.first = job.first if job.done else now
            job.done, job.left = job.done + 1, 1
            self._turns.charge(job.name, 1)
            if job.done == job.answer:
                job.ended = now
                self.rows.remove(job)
                if job.name is not None:
                    self.memory.enter(job.name, -1)
        self._stepping = False
        self._turn()


class Router:
    """Which machine a request goes to. adapter: the first on the ring after the adapter's own point whose load is below
    BOUND times the mean (consistent hashing with bounded loads, Mirrokni et al. 2018, arXiv 1608.01350)."""

    def __init__(self, route: Route, machines: Sequence[Machine], seed: int = 0):
        self._route, self._machines, self._draw = route, machines, random.Random(seed)
        points = sorted((_point(f"{m} {i}"), m) for m in range(len(machines)) for i in range(POINTS))
        self._points, self._owners = [point for point, _ in points], [owner for _, owner in points]
        self._orders: dict[str, list[int]] = {}

    def pick(self, name: str | None) -> int:
        loads = [machine.load for machine in self._machines]
        if self._route == "random":
            return self._draw.randrange(len(loads))
        if self._route == "least" or name is None:
            return loads.index(min(loads))
        most = math.ceil(BOUND * (sum(loads) + 1) / len(loads))
        return next(m for m in self._order(name) if loads[m] < most)

    def home(self, name: str) -> int | None:
        """The machine an adapter's requests go to first; None: any."""
        return self._order(name)[0] if self._route == "adapter" else None

    def _order(self, name: str) -> list[int]:
        """All machines, in the order they stand on the ring from this name's point on."""
        if name not in self._orders:
            start = bisect(self._points, _point(name))
            self._orders[name] = list(dict.fromkeys([*self._owners[start:], *self._owners[:start]]))
        return self._orders[name]


def _point(text: str) -> int:
    return int.from_bytes(hashlib.sha256(text.encode()).digest()[:8], "big")


@dataclass(frozen=True)
class Seen:
    """Of requests. tok_s: tokens of answers a second; first, waited: seconds from asking to the first token, and to a
    place in a batch; hot, warm, disk: shares of requests whose adapter was there when they came."""

    tok_s: float
    first_p50: float
    first_p99: float
    waited_p50: float
    waited_p99: float
    hot: float
    warm: float
    disk: float

    @staticmethod
    def of(jobs: Sequence[Job]) -> Seen:
        took = max(job.ended for job in jobs) - min(job.at for job in jobs)
        first, waited = [job.first - job.at for job in jobs], [job.began - job.at for job in jobs]
        places = Counter(job.place for job in jobs)
        return Seen(
            sum(job.answer for job in jobs) / took,
            *(float(np.percentile(values, p)) for values in (first, waited) for p in (50, 99)),
            *(places[place] / len(jobs) for place in ("hot", "warm", "disk")),
        )


def simulate(
    jobs: Sequence[Job], machines: int, kind: Kind, costs: Costs, names: Sequence[str], route: Route = "least"
) -> list[Machine]:
    """Let jobs be answered; what became of each is written into it. names: of all adapters, the rarest first: so each
    machine has loaded them before, its own last."""
    clock = Clock()
    fleet = [Machine(kind, costs, clock) for _ in range(machines)]
    router = Router(route, fleet)
    for number, machine in enumerate(fleet):
        machine.memory = Memory(kind, sorted(names, key=lambda name: router.home(name) in (None, number)))

    def come(job: Job) -> None:
        job.machine = router.pick(job.name)
        fleet[job.machine].submit(job)

    for job in jobs:
        clock.later(job.at, partial(come, job))
    clock.run()
    return fleet
