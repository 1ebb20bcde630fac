"""Serving many adapters: lorafit's engine beside vLLM on the CPU, PEFT, llama.cpp for one stream, and bare bases.

    make bench-serve                        16 and 32 requests, 1 to 16 adapters, about an hour on two cores
    python bench/serve.py --quick           16 requests of 16 tokens, once: that it runs
    python bench/serve.py --arms lorafit    without peers
    python bench/serve.py --list            the workloads by number, for --only
    python bench/serve.py --http            servers instead of engines: see serve_http.py

Every arm is a process of its own that opens the same base in the same dtype and the same adapters, and serves one
workload when it is its turn; the median of the turns counts. No question is asked twice: what a cache of beginnings can
know is the system prompt. Each adapter is trained to say a code of its own, so that
an answer by the wrong one is seen. All requests of a workload are asked at once; greedy, a fixed number of tokens. The
last line of stdout is one JSON object; --record appends the tables to bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import serve_http
from results import circumstances, markdown, record
from rich.console import Console
from rich.table import Table
from serve_arms import ARMS, BARE, Arm, serves, started
from serve_work import BASE, BUILD, COUNT, RANKS, Workload, asked_of, code_of, train_codes

INSIDE = ("switch_ms", "load", "step_ms", "profile_base", "profile_mixed")


def workloads(quick: bool) -> list[Workload]:
    if quick:
        return [Workload(1, 16), Workload(tokens=16), Workload(tokens=16, adapters=8)]
    made = [Workload(requests=1), Workload(requests=1, adapters=1)]
    made += [Workload(adapters=n) for n in (0, 1, 8, 16)] + [Workload(adapters=n, kind="mixed") for n in (8, 16)]
    made += [Workload(adapters=n, long=True) for n in (0, 8)]
    return made + [Workload(requests=32, adapters=n) for n in (0, 8)]


def judged(workload: Workload, told: dict[str, Any], tokenizer: Any) -> dict[str, float]:
    """Speed of one turn, and whose codes were said."""
    served, gaps, own, wrong = told["served"], [], 0, 0
    for i, one in enumerate(served):
        gaps += np.diff(one["at"]).tolist()
        if workload.adapters:
            text = tokenizer.decode(one["ids"])
            codes = [code_of(workload.kind, n) for n in range(COUNT)]
            own += codes[i % workload.adapters] in text
            wrong += any(code in text for n, code in enumerate(codes) if n != i % workload.adapters)
    firsts = [one["at"][0] for one in served]
    return {
        "tok_s": sum(len(one["ids"]) for one in served) / told["seconds"],
        "first_p50": float(np.percentile(firsts, 50)),
        "first_p99": float(np.percentile(firsts, 99)),
        "between_p50": float(np.percentile(gaps, 50)),
        "between_p99": float(np.percentile(gaps, 99)),
        "memory": float(told["memory"]),
        "own": own / len(served),
        "wrong": float(wrong),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--turns", type=int, default=3, help="of each lorafit arm, after a short one to warm up")
    parser.add_argument("--peer-turns", type=int, default=1, help="of each other arm, after a short one to warm up")
    parser.add_argument("--list", action="store_true", help="say the workloads, and end")
    parser.add_argument("--only", nargs="+", type=int, help="these workloads alone, by number, from 0")
    parser.add_argument("--quick", action="store_true", help="that it runs, not what it gives")
    parser.add_argument("--arms", nargs="+", choices=ARMS, help="by default all; with --http lorafit, vllm-base, vllm")
    parser.add_argument(
        "--dtype", choices=("fp32", "bf16"), help="of the base and the adapters; by default the faster here"
    )
    parser.add_argument("--record", action="store_true", help="append the tables to bench/RESULTS.md")
    serve_http.add_flags(parser)
    given = parser.parse_args()
    if given.http:
        serve_http.run(given)
        return
    if given.list:
        print("\n".join(f"{i:2} {one.name}" for i, one in enumerate(workloads(given.quick))))
        return
    import torch

    import lorafit.evaluation
    from lorafit.bases.base import fastest_dtype, open_outline

    dtype = given.dtype or ("bf16" if fastest_dtype() == torch.bfloat16 else "fp32")
    outline = open_outline(BASE)
    about = circumstances()
    chosen = workloads(given.quick)
    chosen = chosen if given.only is None else [chosen[i] for i in given.only]
    BUILD.mkdir(parents=True, exist_ok=True)
    flags = os.environ.get("PIP_FLAGS", "").split()
    folders = {
        name: folder
        for kind in sorted({one.kind for one in chosen if one.adapters})
        for name, folder in train_codes(kind).items()
    }
    arms: list[Arm] = []
    text = str(Path(lorafit.evaluation.__file__).with_name("general.txt"))
    short = [one["prompt"] for one in asked_of(Workload(), outline.tokenizer)]
    for name in given.arms or ARMS:
        if not any(serves(name, one) for one in chosen):
            continue
        job = {
            "more": 1000 if name == "lorafit-1000" else 0,
            "eight_bit": name == "lorafit-8bit",
            "model": str(outline.folder),
            "dtype": dtype,
            "slots": 16,
            "room": 1024,
            "most_rank": max(RANKS),
            "adapters": {} if name in BARE else {key: str(folder) for key, folder in folders.items()},
            "inside": name == "lorafit" and bool(folders) and not given.quick,
            "prompts": short,
            "text": text,
        }
        arms.append(started(name, job, flags))
    for workload in chosen:
        turns = {arm: given.turns if arm.name.startswith("lorafit") else given.peer_turns for arm in arms}
        for turn in range(1 if given.quick else max(turns.values()) + 1):
            warm_up, requests = turn == 0 and not given.quick, asked_of(workload, outline.tokenizer, turn)
            for arm in arms:
                if arm.failed is None and serves(arm.name, workload) and turn <= turns[arm]:
                    arm.serve(workload, [{**one, "tokens": 4} for one in requests] if warm_up else requests)
                    if warm_up and arm.failed is None:
                        arm.found[workload.name].clear()
        print(f"done: {workload.name}", file=sys.stderr, flush=True)
    told = {
        arm.name: {w.name: [judged(w, one, outline.tokenizer) for one in arm.found.get(w.name, ())] for w in chosen}
        for arm in arms
    }
    report(given, about, dtype, chosen, told, {arm.name: arm for arm in arms})


def report(
    given: argparse.Namespace,
    about: dict[str, Any],
    dtype: str,
    works: list[Workload],
    told: dict[str, dict[str, list[dict[str, float]]]],
    arms: dict[str, Arm],
) -> None:
    head = [
        "arm",
        "tokens/s",
        "first token p50 / p99 (s)",
        "between p50 / p99 (ms)",
        "memory (GB)",
        "own code",
        "wrong",
    ]
    console, text = Console(), []
    middle: dict[str, dict[str, float]] = {}
    for work in works:
        lines = []
        for name, found in told.items():
            if not (turns := found[work.name]):
                continue
            m = {key: median(turn[key] for turn in turns) for key in turns[0]}
            middle.setdefault(name, {})[work.name] = m["tok_s"]
            lines.append(
                [
                    ARMS[name],
                    f"{m['tok_s']:.0f}",
                    f"{m['first_p50']:.2f} / {m['first_p99']:.2f}",
                    f"{1000 * m['between_p50']:.0f} / {1000 * m['between_p99']:.0f}",
                    f"{m['memory'] / 1e9:.1f}",
                    f"{m['own']:.0%}" if work.adapters else "-",
                    f"{sum(turn['wrong'] for turn in turns):.0f}",
                ]
            )
        table = Table(*head, title=work.name)
        for line in lines:
            table.add_row(*line)
        console.print(table)
        text.append(f"### {work.name}\n\n{markdown(head, lines)}")
    tokens = 16 if given.quick else 64
    base, mixed = Workload(tokens=tokens).name, Workload(tokens=tokens, adapters=8).name

    def of(arm: str, name: str) -> float | None:
        return middle.get(arm, {}).get(name)

    def ratio(a: float | None, b: float | None) -> float | None:
        return round(a / b, 3) if a and b else None

    one = Workload(1, tokens).name
    result = {
        "benchmark": "serve",
        **about,
        "quick": given.quick,
        "dtype": dtype,
        "versions": {name: arm.about.get("versions") for name, arm in arms.items()},
        "failed": {name: arm.failed for name, arm in arms.items() if arm.failed},
        "base_tok_s": of("lorafit", base),
        "mixed_tok_s": of("lorafit", mixed),
        "mixed_vs_own_base": ratio(of("lorafit", mixed), of("lorafit", base)),
        "mixed_vs_vllm_mixed": ratio(of("lorafit", mixed), of("vllm", mixed)),
        "mixed_vs_vllm_base": ratio(of("lorafit", mixed), of("vllm-base", base)),
        "base_vs_vllm_base": ratio(of("lorafit", base), of("vllm-base", base)),
        "mixed_vs_peft_mixed": ratio(of("lorafit", mixed), of("peft", mixed)),
        "registered": arms["lorafit-1000"].about.get("registered") if "lorafit-1000" in arms else None,
        f"single_stream_vs_plain_{dtype}": ratio(of("lorafit", one), of("transformers", one)),
        f"single_stream_vs_llamacpp_{dtype}": ratio(of("lorafit", one), of("llamacpp", one)),
        f"single_stream_8bit_vs_plain_{dtype}": ratio(of("lorafit-8bit", one), of("transformers", one)),
        "single_stream_8bit_vs_llamacpp_q8": ratio(of("lorafit-8bit", one), of("llamacpp-q8", one)),
        "nll_8bit": arms["lorafit-8bit"].about.get("nll") if "lorafit-8bit" in arms else None,
        **{key: arms["lorafit"].about.get(key) if "lorafit" in arms else None for key in INSIDE},
        "tok_s": middle,
    }
    print(json.dumps(result))
    if given.record:
        ratios = ", ".join(f"{key} {value}" for key, value in result.items() if "_vs_" in key)
        failed = "".join(f"\n\n{ARMS[name]} did not run: {why}." for name, why in result["failed"].items())
        record("Serving", result, f"{dtype}. {ratios}.{failed}\n\n" + "\n\n".join([*text, *inside(result)]))


def inside(result: dict[str, Any]) -> list[str]:
    """What was measured inside the engine, in words and a table."""
    said = []
    if result["nll_8bit"]:
        said.append(
            "8-bit weights: NLL {plain:.4f} → {eight_bit:.4f} nats over {tokens} tokens ({change:+.2%}).".format(
                **result["nll_8bit"]
            )
        )
    if result["registered"]:
        said.append(
            "A decode step of 16 rows, 8 adapters: {without_ms:.1f} ms, with 1,000 more registered {with_ms:.1f} ms, "
            "the medians of six turns each in one process.".format(**result["registered"])
        )
    if result["switch_ms"] is not None:
        load = result["load"]
        said.append(
            f"Switching to another adapter: {result['switch_ms']:.2f} ms. While adapters come and go, "
            f"four streams of {load['usual_p50']:.0f} ms a token (at most {load['usual_most']:.0f}) wait at most "
            f"{load['meanwhile_most']:.0f} ms; a load takes {load['load_ms']:.0f} ms."
        )
    if result["profile_base"]:
        base, mixed = result["profile_base"], result["profile_mixed"]
        lines = [[part, f"{base.get(part, 0):.1f}", f"{ms:.1f}"] for part, ms in mixed.items()]
        said.append("A decode step of 16 rows, in ms:\n\n" + markdown(["part", "base", "8 × rank 8"], lines))
    return said


if __name__ == "__main__":
    main()
