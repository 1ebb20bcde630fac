"""The order of rows: shuffled, beside batches of rows of one length. `python bench/order.py`

lorafit sorted the rows of 16 batches by their length until a step's rows were alike in length, and often in kind. Both
orders train from the same start on the same rows with the same seed, and differ in nothing else. Rows are packed, so
the order costs no time in either.

Trainings of 10 and 24 steps have batches of 8, those of 450 steps batches of 4 and the rate of the demo. A finished
training is kept in --store: the same command goes on where it was stopped.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import random
import statistics
from collections.abc import Sequence
from pathlib import Path
from typing import Any
from unittest.mock import patch

from results import circumstances, markdown, record
from rich.console import Console
from rich.table import Table

from lorafit import Recipe, fresh, open_base, read_examples, render, renderer_for, train, uniform
from lorafit.data.batches import epoch_order
from lorafit.data.examples import Example, Message
from lorafit.data.render import Row
from lorafit.files import write_json
from lorafit.jobs.machine import keep_freed_memory
from lorafit.planning.rules import all_linear
from lorafit.training import loop

DATA = Path(os.environ.get("LORAFIT_DATA", "../shared/data"))
RANK, ALPHA, WINDOW = 8, 32.0, 16
# Steps: batch size, learning rate, steps of warm-up.
RECIPES = {10: (8, 1e-3, 2), 24: (8, 1e-3, 2), 450: (4, 1.3e-3, 18)}
SETS = {"help desk": "the built-in data", "restaurants": "lists of facts to sentences (E2E NLG)"}
ORDERS = ("shuffled", "of one length")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="smollm2-135m")
    parser.add_argument("--sets", nargs="+", choices=SETS, default=list(SETS))
    parser.add_argument("--steps", nargs="+", type=int, choices=RECIPES, default=list(RECIPES))
    parser.add_argument("--seeds", type=int, default=4)
    parser.add_argument("--store", type=Path, default=Path("runs/bench-order"), help="finished trainings")
    parser.add_argument("--record", action="store_true", help="append the table to bench/RESULTS.md")
    asked = parser.parse_args()
    about = circumstances()
    keep_freed_memory()
    base = open_base(asked.base)
    sites = all_linear(base)
    renderer = renderer_for(base, system="Help desk")
    asked.store.mkdir(parents=True, exist_ok=True)

    rows: list[dict[str, Any]] = []
    for name in asked.sets:
        drawn, held = (render(renderer, some, 512) for some in examples_of(name))
        for steps in asked.steps:
            pairs = []
            for seed in range(asked.seeds):
                ends = []
                for order in ORDERS:
                    key = {"base": asked.base, "dtype": str(base.dtype), "set": name, "steps": steps, "seed": seed}
                    path = asked.store / f"{name} {steps} {seed} {order}.json".replace(" ", "-")
                    kept = json.loads(path.read_text(encoding="utf-8")) if path.exists() else None
                    if kept is None or kept["key"] != key:
                        batch, rate, warmup = RECIPES[steps]
                        recipe = Recipe(rate, batch, steps, warmup, validate_every=steps, seed=seed)
                        start = fresh(base, uniform(sites, RANK, ALPHA), seed)
                        with patch.object(loop, "epoch_order", ORDER_OF[order]):
                            done = train(base, start, drawn, held, recipe)
                        kept = {"key": key, "nll": done.history[-1][1], "seconds": done.seconds}
                        write_json(path, kept)
                        print(f"{name}, {steps} steps, seed {seed}, {order}: NLL {kept['nll']:.4f}", flush=True)
                    ends.append(kept["nll"])
                pairs.append(ends)
            rows.append({"set": name, "steps": steps, "nll": pairs})

    head = ["set, steps", *ORDERS, "shuffled over the other, by seed", "mean", "better"]
    lines = [line_of(row) for row in rows]
    table = Table(*head)
    for line in lines:
        table.add_row(*line)
    Console().print(table)
    dtype = str(base.dtype).removeprefix("torch.")
    print(json.dumps({"benchmark": "order", **about, "dtype": dtype, "rows": rows}))
    if asked.record:
        told = "; ".join(f"{name}: {SETS[name]}" for name in asked.sets)
        text = (
            f"Validation NLL at the end, mean over {asked.seeds} seeds, {dtype}, rank {RANK}, alpha {ALPHA:g}; 10 and "
            f"24 steps of 8 rows at 1e-3, 450 steps of 4 rows at 1.3e-3. The other order sorts the rows of {WINDOW} "
            f"batches by length. {told}."
        )
        record("The order of rows", {**about, "machine": about["machine"]}, f"{text}\n\n{markdown(head, lines)}")


def line_of(row: dict[str, Any]) -> list[str]:
    pairs = row["nll"]
    apart = [a - b for a, b in pairs]
    return [
        f"{row['set']}, {row['steps']}",
        *(f"{statistics.fmean(pair[i] for pair in pairs):.4f}" for i in range(2)),
        ", ".join(f"{one:+.4f}" for one in apart),
        f"{statistics.fmean(apart):+.4f}",
        f"{sum(one < 0 for one in apart)} of {len(apart)}",
    ]


def examples_of(name: str) -> tuple[Sequence[Example], Sequence[Example]]:
    """Examples for training and for validation; of restaurants as many as the help desk has, no list in both."""
    builtin = read_examples("builtin")
    if name == "help desk":
        return builtin.train, builtin.valid
    with gzip.open(DATA / "e2e_nlg" / "trainset_rebuilt.csv.gz", "rt", encoding="utf-8") as file:
        texts: dict[str, list[str]] = {}
        for line in csv.DictReader(file):
            texts.setdefault(line["mr"], []).append(line["ref"])
    made = [
        Example((Message("user", mr), Message("assistant", text)), "trainset_rebuilt.csv.gz", group=mr)
        for mr, some in texts.items()
        for text in some[:2]
    ]
    held, drawn = made[: len(builtin.valid)], made[len(builtin.valid) :]
    random.Random(0).shuffle(drawn)
    return drawn[: len(builtin.train)], held


def of_one_length(rows: Sequence[Row], batch_size: int, seed: int, epoch: int, *_: bool) -> list[list[int]]:
    """The order before: batches of neighbours in length within 16 batches, and these shuffled."""
    shuffled = [i for batch in epoch_order(rows, batch_size, seed, epoch, packed=True) for i in batch]
    window = WINDOW * batch_size
    batches = []
    for start in range(0, len(shuffled), window):
        part = sorted(shuffled[start : start + window], key=lambda i: len(rows[i].ids))
        batches += [part[i : i + batch_size] for i in range(0, len(part), batch_size)]
    random.Random(seed * 1000 + epoch).shuffle(batches)
    return batches


ORDER_OF = {"shuffled": epoch_order, "of one length": of_one_length}

if __name__ == "__main__":
    main()
