"""What the simulator of `bench/scale.py` is given and compared with: the real engine on this machine, in this process.

The costs of a step are fitted to steps of known make-up: rows that only decode, of none to 16 different adapters, and
prompts of known length. Then requests come to the engine as they come to the simulator.
"""

from __future__ import annotations

import random
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from statistics import median

import numpy as np
import torch
from scale_sim import Costs, Job, Place, Traffic, name_of

from lorafit.adapters.formats import peft
from lorafit.adapters.plan import Plan, uniform
from lorafit.bases.base import Base
from lorafit.serving import Engine, Request
from lorafit.testing import random_adapter

BUILD = Path(__file__).parents[1] / "build" / "scale"
STEPS = 24  # of each make-up that are measured
DECODING = ((1, 0), (4, 0), (8, 0), (16, 0), (1, 1), (4, 4), (8, 8), (16, 1), (16, 4), (16, 8), (16, 16))
PROMPTS = (32, 64, 128, 256, 512)


def plan_of(base: Base, rank: int) -> Plan:
    return uniform([site for site in base.sites if site.path not in base.head_paths()], rank, 2.0 * rank)


def opened(base: Base, rank: int, number: int, slots: int, room: int, hot: int, warm: int) -> Engine:
    """The engine with so many adapters, of which so many fit. They are random, written once and kept; the most asked
    for is loaded last."""
    plan = plan_of(base, rank)
    width = torch.finfo(base.dtype).bits // 8
    half = 0.5  # of one more, for what each takes beyond its numbers
    engine = Engine(
        base,
        slots=slots,
        room=room,
        hot_bytes=int((hot + half) * width * plan.parameters),
        warm_bytes=int((warm + half) * plan.bytes),
    )
    for i in reversed(range(number)):
        folder = BUILD / f"{base.name.replace('/', '-')}-r{rank}-{i}"
        if not folder.exists():
            peft.write(random_adapter(base, plan, i, size=0.02), folder)
        engine.load(name_of(i), folder)
    return engine


def tokens(draw: random.Random, engine: Engine, number: int) -> tuple[int, ...]:
    """A prompt that begins like no other."""
    return tuple(draw.randrange(engine.vocabulary) for _ in range(number))


# Costs


def calibrated(engine: Engine, seed: int = 0) -> tuple[Costs, float]:
    """The costs of the engine's steps, and the median share by which they miss those that were measured."""
    draw = random.Random(seed)
    made_of: list[tuple[float, ...]] = []
    seconds: list[float] = []
    decoding(engine, 4, 0, draw)  # warms up
    for rows, adapters in DECODING:
        made_of.append((1, rows, adapters, 0, 0))
        seconds.append(decoding(engine, rows, adapters, draw))
    for number in PROMPTS:
        made_of.append((1, 0, 0, 1, number))
        seconds.append(median(reading(engine, number, draw) for _ in range(3)))
    # Shares are fitted, not seconds: a step of one row counts as much as one of 512 tokens.
    design, wanted = np.array(made_of), np.array(seconds)
    fitted = _not_negative(design / wanted[:, None], np.ones(len(wanted)))
    missed = float(np.median(np.abs(design @ fitted / wanted - 1)))
    step, row, adapter, piece, token = map(float, fitted)
    for what, took, computed in zip(made_of, wanted, design @ fitted, strict=True):
        print(f"step of {what[1:]}: {1000 * took:.1f} ms, by the costs {1000 * computed:.1f}", file=sys.stderr)
    return Costs(step, row, adapter, piece, token, *heating(engine)), missed


def _not_negative(design: np.ndarray, wanted: np.ndarray) -> np.ndarray:
    """Least squares without negative costs: what comes out negative is left out, the most negative first."""
    kept = list(range(design.shape[1]))
    while True:
        found = np.linalg.lstsq(design[:, kept], wanted, rcond=None)[0]
        if found.min() >= 0:
            whole = np.zeros(design.shape[1])
            whole[kept] = found
            return whole
        del kept[int(found.argmin())]


def decoding(engine: Engine, rows: int, adapters: int, draw: random.Random) -> float:
    """Seconds of a step in which so many rows, of so many adapters, get their next token."""
    names = [name_of(i % adapters) if adapters else None for i in range(rows)]
    answers = [
        engine.submit(Request(tokens(draw, engine, 8), name, max_tokens=engine.room, ignore_end=True)) for name in names
    ]
    for answer in answers:  # all are past their prompts
        next(iter(answer))
    before = engine.stats()
    while (after := engine.stats()).steps < before.steps + STEPS and after.running == rows:
        time.sleep(0.01)
    for answer in answers:
        answer.cancel()
    for answer in answers:
        answer.result()
    return (after.seconds - before.seconds) / (after.steps - before.steps)


def reading(engine: Engine, number: int, draw: random.Random) -> float:
    """Seconds of a step that reads a prompt of so many tokens and nothing else."""
    before = engine.stats()
    engine.submit(Request(tokens(draw, engine, number), max_tokens=1)).result()
    while (after := engine.stats()).steps == before.steps:  # it is counted after the answer is told
        time.sleep(0.001)
    return (after.seconds - before.seconds) / (after.steps - before.steps)


def heating(engine: Engine) -> tuple[float, float]:
    """Seconds of making an adapter hot from memory, and from disk."""
    found: dict[str, list[float]] = {"warm": [], "disk": []}
    for i in range(8):
        version = engine.adapters.find(name_of(i))
        for place, times in found.items():
            version.loaded = None
            version.adapter = None if place == "disk" else version.adapter
            began = time.perf_counter()
            engine.adapters.heat(version)
            times.append(time.perf_counter() - began)
    return median(found["warm"]), median(found["disk"])


# A real run


def served(engine: Engine, traffic: Traffic, jobs: Sequence[Job], seed: int = 0) -> None:
    """Let the engine answer jobs as they come; what became of each is written into it."""
    draw = random.Random(seed)
    asked = [
        Request(tokens(draw, engine, job.prompt), job.name, max_tokens=job.answer, ignore_end=True) for job in jobs
    ]
    for i in reversed(range(traffic.adapters)):  # in memory as at the simulator's beginning
        engine.adapters.heat(engine.adapters.find(name_of(i)))
    began, answers = time.perf_counter(), []
    for job, request in zip(jobs, asked, strict=True):
        time.sleep(max(0.0, job.at - (time.perf_counter() - began)))
        assert job.name is not None
        version = engine.adapters.find(job.name)
        place: Place = "hot" if version.loaded else "warm" if version.adapter else "disk"
        at = time.perf_counter() - began
        answers.append((at, place, engine.submit(request)))
    for job, (at, place, answer) in zip(jobs, answers, strict=True):
        result = answer.result()
        job.at, job.place, job.done = at, place, len(result.tokens)
        job.began, job.first, job.ended = at + result.waited, at + result.first, at + result.seconds
