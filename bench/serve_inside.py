"""What `bench/serve.py` measures inside lorafit's engine: where a step's time goes, what a switch and a load cost the
others, what 8-bit weights cost in NLL."""

from __future__ import annotations

import threading
import time
from collections.abc import Sequence
from itertools import pairwise
from pathlib import Path
from statistics import median

import torch
import torch.nn.functional as F

from lorafit.attachment.adapters import adapting
from lorafit.bases.base import Base
from lorafit.serving import Engine, Request, Version
from lorafit.serving.mixing import Mixer
from lorafit.serving.native import SPENT, kernels
from lorafit.serving.products import Products


def times_of(engine: Engine, request: Request) -> list[float]:
    """Seconds from asking to each token."""
    began, at = time.perf_counter(), []
    for piece in engine.submit(request):
        at += [time.perf_counter() - began] * len(piece.tokens)
    return at


def switch_ms(engine: Engine, prompt: Sequence[int], names: Sequence[str]) -> float:
    """How much later a first token comes where the request before was another adapter's, in ms: the prompt is known to
    the slots of both."""
    firsts: dict[bool, list[float]] = {True: [], False: []}
    order = [names[i // 2 % 2] for i in range(82)]  # a a b b a a ...: every second one is a switch
    for i, name in enumerate(order):
        (first,) = times_of(engine, Request(tuple(prompt), name, max_tokens=1))
        if i > 1:
            firsts[name != order[i - 1]].append(first)
    return 1000 * (median(firsts[True]) - median(firsts[False]))


def stall_ms(engine: Engine, prompt: Sequence[int], folders: Sequence[Path]) -> dict[str, float]:
    """How much longer than usual four others wait for a token while adapters are loaded, replaced and unloaded."""
    gaps: list[tuple[float, float]] = []

    def listen() -> None:
        at = times_of(engine, Request(tuple(prompt), max_tokens=160, ignore_end=True))
        gaps.extend((asked + b, b - a) for a, b in pairwise(at[8:]))

    asked = time.perf_counter()
    listeners = [threading.Thread(target=listen) for _ in range(4)]
    for one in listeners:
        one.start()
    while engine.stats().running < 4:
        time.sleep(0.01)
    time.sleep(3)
    busy, took = [], []
    for folder in [*folders[:3], *folders[:3]]:
        start = time.perf_counter()
        engine.load("loaded-meanwhile", folder)
        busy.append((start, time.perf_counter() + 0.3))
        took.append(time.perf_counter() - start)
        time.sleep(0.5)
    start = time.perf_counter()
    engine.unload("loaded-meanwhile")
    busy.append((start, time.perf_counter() + 0.3))
    for one in listeners:
        one.join()
    meanwhile = [gap for at, gap in gaps if any(a <= at <= b for a, b in busy)]
    quiet = [gap for at, gap in gaps if not any(a <= at <= b for a, b in busy)]
    return {
        "usual_p50": 1000 * median(quiet),
        "usual_most": 1000 * max(quiet),
        "meanwhile_most": 1000 * max(meanwhile),
        "stall_ms": 1000 * (max(meanwhile) - median(quiet)),
        "load_ms": 1000 * median(took),
    }


def profile(engine: Engine, prompts: Sequence[Sequence[int]], names: Sequence[str | None]) -> dict[str, float]:
    """ms of a decode step by part, the mean of 40 steps."""
    decoder = engine._steps.decoder
    if decoder is None:
        return {}
    requests = [Request(tuple(p), n, max_tokens=60, ignore_end=True) for p, n in zip(prompts, names, strict=True)]
    answers = [engine.submit(request) for request in requests]
    for answer in answers:  # all are past their prompts
        next(iter(answer))
    time.sleep(0.5)
    before, started = decoder.spent.copy(), engine.stats()
    while engine.stats().steps < started.steps + 40:
        time.sleep(0.02)
    after, ended = decoder.spent.copy(), engine.stats()
    for answer in answers:
        answer.cancel()
    for answer in answers:
        answer.result()
    count = ended.steps - started.steps
    told = {name: 1000 * float(ms) / count for name, ms in zip(SPENT, after - before, strict=True)}
    model = 1000 * (ended.model_seconds - started.model_seconds) / count
    whole = 1000 * (ended.seconds - started.seconds) / count
    rest = {"around the kernel, in Python": model - sum(told.values()), "drawing and telling tokens": whole - model}
    return {**told, **rest, "a step": whole}


def registered(
    engine: Engine, prompts: Sequence[Sequence[int]], names: Sequence[str], versions: Sequence[Version]
) -> dict[str, float]:
    """ms of a decode step with these versions registered beside, and without: in turns, for a processor's speed drifts
    by more within minutes than this could cost."""
    found: dict[str, list[float]] = {"without": [], "with": []}
    for turn in range(13):
        with_them = turn % 2 == 1
        for version in versions:
            if with_them:
                engine.adapters.publish(version)
            elif turn:
                engine.adapters.remove(version.name)
        step = profile(engine, prompts, names)["a step"]
        if turn:  # the first warms up
            found["with" if with_them else "without"].append(step)
    without, beside = (median(found[key]) for key in ("without", "with"))
    return {"without_ms": without, "with_ms": beside, "ratio": without / beside}


def nll_change(base: Base, text: str) -> dict[str, float]:
    """Mean negative log-likelihood of a text's tokens (nats), by the base and by its 8-bit weights."""
    ids = base.tokenizer(text, return_tensors="pt")["input_ids"]
    found = kernels(base.dtype, base.device)
    assert found is not None
    mixer, told = Mixer(Products(base, found, True), base.device), {}
    with torch.inference_mode():
        told["plain"] = _nll(base, ids)
        with adapting(base, mixer.change):
            told["eight_bit"] = _nll(base, ids)
    return {**told, "tokens": ids.shape[1], "change": told["eight_bit"] / told["plain"] - 1}


def _nll(base: Base, ids: torch.Tensor) -> float:
    """In windows of 512 tokens, in pieces of 32: as many as go through the 8-bit weights."""
    total, count, model = 0.0, 0, base.model
    for start in range(0, ids.shape[1] - 1, 512):
        cache, part = None, ids[:, start : start + 513]
        for at in range(0, part.shape[1] - 1, 32):
            piece = part[:, at : min(at + 32, part.shape[1] - 1)]
            out = model(piece, past_key_values=cache, use_cache=True)
            cache, wanted = out.past_key_values, part[0, at + 1 : at + 1 + piece.shape[1]]
            total += float(F.cross_entropy(out.logits[0].float(), wanted, reduction="sum"))
            count += len(wanted)
    return total / count
