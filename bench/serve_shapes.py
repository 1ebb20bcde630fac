"""The engine on a base of a common shape with random weights: tokens/s with 1, 8, 64 and 512 different adapters.

    python bench/serve_shapes.py --record                 1B and 8B shapes, on the GPU where there is one
    python bench/serve_shapes.py --shapes tiny --requests 16 --adapters 1 8     that it runs

Weights are random, so nothing is said of answers: what is measured is time. Every request has as many tokens; their
adapters take turns. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import time
from statistics import median
from typing import Any

import torch
from results import circumstances, markdown, record
from rich.console import Console
from rich.table import Table
from transformers import AutoModelForCausalLM, LlamaConfig

from lorafit.adapters.plan import uniform
from lorafit.bases.base import Base
from lorafit.serving import Engine, Request
from lorafit.testing import random_adapter

# hidden, blocks, heads, heads of keys and values, hidden of the feed-forward, vocabulary
SHAPES = {
    "tiny": (64, 2, 4, 2, 128, 512),
    "1B": (2048, 16, 32, 8, 8192, 128256),
    "8B": (4096, 32, 32, 8, 14336, 128256),
}


def base_of(shape: str, device: str) -> Base:
    hidden, blocks, heads, kept, inner, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        hidden_size=hidden,
        num_hidden_layers=blocks,
        num_attention_heads=heads,
        vocab_size=vocabulary,
        num_key_value_heads=kept,
        intermediate_size=inner,
        max_position_embeddings=2048,
    )
    torch.manual_seed(0)
    with torch.device(device):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16).eval()
    return Base.of(model, shape)


def tokens_a_second(engine: Engine, given: argparse.Namespace, names: list[str]) -> float:
    prompts = [tuple(1 + (7 * i + j) % 500 for j in range(given.prompt)) for i in range(given.requests)]
    rates = []
    for turn in range(given.turns + 1):
        began = time.perf_counter()
        asked = [
            Request(prompt, names[i % len(names)] if names else None, max_tokens=given.tokens, ignore_end=True)
            for i, prompt in enumerate(prompts)
        ]
        results = [answer.result() for answer in [engine.submit(one) for one in asked]]
        if turn:  # the first warms up
            rates.append(sum(len(one.tokens) for one in results) / (time.perf_counter() - began))
    return median(rates)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["1B", "8B"])
    parser.add_argument("--adapters", nargs="+", type=int, default=[1, 8, 64, 512])
    parser.add_argument("--requests", type=int, default=512, help="at once")
    parser.add_argument("--prompt", type=int, default=16, help="tokens")
    parser.add_argument("--tokens", type=int, default=32, help="of each answer")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--turns", type=int, default=3)
    parser.add_argument("--record", action="store_true", help="append the table to bench/RESULTS.md")
    given = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    result: dict[str, Any] = {"benchmark": "serve_shapes", **circumstances(), "tok_s": {}}
    lines = []
    for shape in given.shapes:
        base = base_of(shape, device)
        plan = uniform([site for site in base.sites if ".layers." in site.path], given.rank, 2.0 * given.rank)
        with Engine(base, slots=given.requests, room=given.prompt + given.tokens, hot_bytes=1 << 40) as engine:
            rates = {"base": tokens_a_second(engine, given, [])}
            made: list[str] = []
            for count in sorted(given.adapters):
                for i in range(len(made), count):
                    engine.load(f"a{i}", random_adapter(base, plan, i, size=0.02))
                    made.append(f"a{i}")
                rates[str(count)] = tokens_a_second(engine, given, made)
        result["tok_s"][shape] = rates
        lines += [[shape, name, f"{rate:.0f}", f"{rate / rates['base']:.2f}"] for name, rate in rates.items()]
    head = ["shape", "adapters", "tokens/s", "of base"]
    table = Table(*head)
    for line in lines:
        table.add_row(*line)
    Console().print(table)
    print(json.dumps(result))
    if given.record:
        words = (
            f"bf16, {device}, {given.requests} requests of {given.prompt} + {given.tokens} tokens, rank {given.rank}."
        )
        record("Serving, by shape", result, f"{words}\n\n{markdown(head, lines)}")


if __name__ == "__main__":
    main()
