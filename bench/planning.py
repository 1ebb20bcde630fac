"""Does choosing by evidence pay? The procedure against what people do instead, at its price.

    LORAFIT_DATA=... python bench/planning.py [--quick] [--thorough] [--sets NAME...] [--store DIR] [--minutes N]
                                              [--record]

On three data sets and a base of 15 million parameters (stories15m), whose cells take half a minute each:

(a) the procedure as it comes: all linear layers at the rule's rank, the rate found by halving, then trimming; with
    --thorough also the one that searches placement and rank, of one seed
(b) (a) untrimmed: uniform, the rate found by the same halving
(c) the plan of (b) with its rank dealt out at random over the sites, at equal parameters, at the rate of (b)
(d) PEFT's raw defaults: q_proj and v_proj, rank 8, alpha 8, rate 2e-4 without a search; and q_proj and v_proj at as
    many parameters as (b), at the rate of (b)
(e) a grid of 3 rates × 2 ranks × 2 placements, 12 cells of one seed; the winner by validation
(f) full fine-tuning, the best of three rates by validation, on one set

(a), (b) and the winner of (e) have three seeds of training, which draw the factors and the order of examples, the
others one; the data and their splits stay. All cells take the same steps, examples a step, schedule and rows.

What is scored: the NLL of the test answers, mean over seeds for each example, compared example by example, examples of
one source drawn together; 95 % intervals by bootstrap. What is claimed, stated before the first cell was run:

1. regret: (a) is worse than the winner of (e) by at most 0.5 % of its NLL, upper end of the interval
2. defaults: (a) is better than PEFT's raw defaults by at least 2 %, the interval clear of 0
3. trim: a quarter of (a)'s parameters costs at most 0.5 % of NLL, upper end of the interval
4. price: search (fast) and trim take at most half of a run

Cells are kept in a store, a JSON file each, named by a digest of its settings: stopped, it goes on where it was; with
--minutes it stops by itself. Prints tables and, last, one line of JSON; --record appends them to bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import copy
import csv
import gzip
import hashlib
import json
import os
import random
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cache, partial
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch
from results import circumstances, markdown, record
from rich.console import Console
from rich.table import Table

from lorafit.adapters.adapter import Adapter
from lorafit.adapters.plan import Plan, uniform
from lorafit.attachment.adapters import attach
from lorafit.attachment.attention import packing
from lorafit.attachment.pure import fresh
from lorafit.data.batches import epoch_order
from lorafit.evaluation.statistics import paired_bootstrap
from lorafit.files import write_json
from lorafit.jobs.listener import Silent
from lorafit.jobs.prepare import Opened, open_all
from lorafit.jobs.run import Run
from lorafit.jobs.scoring import questions_of
from lorafit.jobs.search import looked, search
from lorafit.jobs.trim import Validation, ladder_of
from lorafit.layers.site import select
from lorafit.planning.halving import rates_for
from lorafit.planning.trim import trimmed
from lorafit.settings import settings_from
from lorafit.tasks.completion import COMPLETION
from lorafit.tasks.runner import Runner
from lorafit.tasks.task import ForwardMode
from lorafit.training.loop import train
from lorafit.training.optimizer import rate_at
from lorafit.training.recipe import Recipe

DATA = Path(os.environ.get("LORAFIT_DATA", "../shared/data"))
SETS = ("restaurants", "requests", "instructions")
SEEDS = (0, 1, 2)
SETTINGS = {
    "batch_size": 4,
    "dtype": "fp32",
    "skip_bad": True,
    "max_length": 256,
    "few_shot": 0,
    "validations": 2,
    "patience": 9,
}
SIZES = {"restaurants": (480, 60), "requests": (240, 120), "instructions": (720, 90)}  # of train; of valid and of test
STEPS = 110  # two rates are searched then: a third of the rule's, and that
GRID_RATES, GRID_RANKS = (1 / 3, 1.0, 3.0), (8, 32)
FULL_RATES = (3e-5, 1e-4, 3e-4)
GRID_PLACES = {"all": None, "mlp": ["mlp.*"]}
TARGETS, DEFAULT_RANK, DEFAULT_ALPHA, DEFAULT_RATE = ["q_proj", "v_proj"], 8, 8.0, 2e-4  # PEFT's


def rows_of(name: str) -> list[dict[str, Any]]:
    """What examples a set has, in a seeded order."""
    made: list[dict[str, Any]] = []
    if name == "restaurants":
        with gzip.open(DATA / "e2e_nlg" / "trainset_rebuilt.csv.gz", "rt", encoding="utf-8") as file:
            texts: dict[str, list[str]] = {}
            for row in csv.DictReader(file):
                texts.setdefault(row["mr"], []).append(row["ref"])
        made = [{"prompt": mr, "completion": text, "group": mr} for mr, some in texts.items() for text in some[:2]]
    elif name == "requests":
        with (DATA / "bitext_support" / "Bitext_Sample_Customer_Service_Training_Dataset.csv").open(
            encoding="utf-8"
        ) as file:
            made = [
                {"prompt": row["utterance"], "completion": f"{row['category'].lower()}: {row['intent']}"}
                for row in csv.DictReader(file)
            ]
    else:
        with (DATA / "instruct" / "rasbt_instruction-data.json").open(encoding="utf-8") as file:
            made = [
                {"instruction": r["instruction"], "input": r["input"], "output": r["output"]} for r in json.load(file)
            ]
    random.Random(0).shuffle(made)
    return made


@cache
def opened(name: str) -> Opened:
    """The set, split by source into train, valid and test, on its base."""
    n_train, n_held = SIZES[name]
    by_source: dict[str, list[dict[str, Any]]] = {}
    for i, row in enumerate(rows_of(name)):
        by_source.setdefault(row.get("group", str(i)), []).append(row)
    rest = [row for some in by_source.values() for row in some]
    cuts = (n_held, n_held, n_train)
    with tempfile.TemporaryDirectory() as folder:
        for split, n in zip(("test", "valid", "train"), cuts, strict=True):
            taken, rest = rest[:n], rest[n:]
            path = Path(folder) / f"{split}.jsonl"
            path.write_text("".join(json.dumps(row) + "\n" for row in taken), encoding="utf-8")
        settings = settings_from({**SETTINGS, "epochs": STEPS * 4 / n_train})
        return open_all(str(DATA / "models" / "stories15m"), folder, settings, Silent())


# Cells


class Store:
    """Cells by the digest of their settings; one that is not there is computed, unless time is up."""

    def __init__(self, folder: Path, until: float):
        self.folder, self.until = folder, until
        folder.mkdir(parents=True, exist_ok=True)

    def cell(self, key: dict[str, Any], compute: Callable[[], dict[str, Any]]) -> dict[str, Any]:
        path = self.folder / f"{hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]}.json"
        if path.exists():
            found: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
            return found
        if time.monotonic() > self.until:
            raise SystemExit("time is up: the store keeps what there is, the same command goes on")
        began = time.monotonic()
        made = {"key": key, **compute(), "seconds": round(time.monotonic() - began, 1)}
        write_json(path, made)
        print(f"{made['seconds']:>7.1f} s  valid {made['valid_nll']:.4f}  {json.dumps(key)[:150]}", flush=True)
        return made


def scored(one: Opened, adapter: Adapter) -> dict[str, Any]:
    with attach(one.base, adapter):
        valid, test = (one.runner.nll(one.rows[split]) for split in ("valid", "test"))
    return {"valid": valid, "test": test, "valid_nll": float(np.mean(valid)), "parameters": adapter.plan.parameters}


def trained(one: Opened, plan: Plan, recipe: Recipe) -> Adapter:
    start = fresh(one.base, plan, recipe.seed, one.start.rendering)
    return train(one.base, start, one.rows["train"], one.rows["valid"], recipe, runner=one.runner).adapter


def plain(one: Opened, plan: Plan, rate: float, seed: int) -> dict[str, Any]:
    recipe = replace(one.decision.recipe, learning_rate=rate, seed=seed)
    return {**scored(one, trained(one, plan, recipe)), "steps": recipe.steps}


def procedure(one: Opened, how: str, seed: int) -> dict[str, Any]:
    """Search, train, trim, as the product does; also what each way of cutting costs at every share."""
    recipe = replace(one.decision.recipe, seed=seed)
    settings = settings_from({**SETTINGS, "seed": seed, "search": how})
    one = replace(
        one,
        decision=replace(one.decision, recipe=recipe),
        start=fresh(one.base, one.decision.plan, seed, one.start.rendering),
    )
    with tempfile.TemporaryDirectory() as folder:
        began = time.monotonic()
        known, card, _ = looked(one, Path(folder), Silent())
        decision = search(Run(one, settings, Path(folder), Silent()), known, card)
        searching = time.monotonic() - began
        stored = Path(folder) / "search" / "tried.json"
        arms = json.loads(stored.read_text(encoding="utf-8")) if stored.exists() else []
    began = time.monotonic()
    with attach(one.base, one.start):
        before = fmean(one.runner.nll(one.rows["valid"]))
    scoring = time.monotonic() - began
    began = time.monotonic()
    whole = trained(one, decision.plan, decision.recipe)
    training = time.monotonic() - began
    result = scored(one, whole)
    began = time.monotonic()
    groups = [example.group for example in one.examples.valid]
    questions = questions_of(one, settings)
    held = Validation(one.rows["valid"], result["valid"], before, groups, questions)
    runner = one.runner.within(recipe.micro_tokens, recipe.recompute)
    ladder, small, moments = ladder_of(runner, whole, one.rows["train"], held, Silent())
    trimming = time.monotonic() - began
    ways = {
        "plain": {},
        "inputs": {path: replace(each, outputs=None) for path, each in moments.items()},
        "both": moments,
    }
    cuts = {
        f"{name} {share}": scored(one, trimmed(whole, share, way or None)[0])["test"]
        for name, way in ways.items()
        for share in (0.5, 0.25)
    }
    shipped = scored(one, small) if small else result
    choices = {c.name: c.value for c in decision.choices}
    return {
        "valid": shipped["valid"],
        "test": shipped["test"],
        "valid_nll": shipped["valid_nll"],
        "whole": result,
        "cuts": cuts,
        "chosen_share": ladder.chosen,
        "ladder": ladder.reason,
        "parameters": shipped["parameters"],
        "rate": decision.recipe.learning_rate,
        "sites": len(decision.plan.slots),
        "rank": choices["rank"],
        "arms": [arm["name"] for arm in arms],
        "steps": recipe.steps + sum(arm["steps"] for arm in arms),
        # The search scores the base for the run, which scores it itself where there was no search.
        "search_seconds": searching - scoring,
        "train_seconds": training,
        "trim_seconds": trimming,
    }


def at_parameters(one: Opened, targets: Sequence[str], parameters: int, alpha: float) -> Plan:
    """These sites at about so many parameters."""
    sites = select(one.base.sites, targets)
    each = sum(site.d_in + site.d_out for site in sites)
    return uniform(sites, min(round(parameters / each), min(min(s.d_in, s.d_out) for s in sites)), alpha)


def dealt(plan: Plan, seed: int) -> Plan:
    """The parameters of a plan dealt out over its sites at random: each unit of rank goes to some site."""
    draw = random.Random(seed)
    left, ranks = plan.parameters, dict.fromkeys((slot.site.path for slot in plan.slots), 0)
    while True:
        slot = draw.choice(plan.slots)
        left -= slot.site.d_in + slot.site.d_out
        if left < 0:
            return Plan(tuple(replace(s, rank=ranks[s.site.path]) for s in plan.slots if ranks[s.site.path]))
        ranks[slot.site.path] = min(ranks[slot.site.path] + 1, slot.site.d_in, slot.site.d_out)


def full(one: Opened, rate: float, seed: int) -> dict[str, Any]:
    """Every weight of a copy of the base trained, by the same schedule, on the same batches; the best by validation."""
    recipe, rows = replace(one.decision.recipe, learning_rate=rate, seed=seed), one.rows["train"]
    model = copy.deepcopy(one.base.model)
    mode = one.runner.mode
    base = replace(one.base, model=model)
    runner = Runner(base, COMPLETION, ForwardMode(False, mode.packed))  # the other has a frozen head
    for parameter in model.parameters():
        parameter.requires_grad_(True)
    optimizer = torch.optim.AdamW(model.parameters(), lr=rate, weight_decay=0.0, fused=True)
    order = [
        batch
        for epoch in range(recipe.steps)
        for batch in epoch_order(rows, recipe.batch_size, seed, epoch, packed=mode.packed)
    ]
    best: dict[str, Any] = {"valid_nll": float("inf")}
    for step in range(recipe.steps):
        with packing(base, mode.packed):
            runner.gradient_of([rows[i] for i in order[step]])
        torch.nn.utils.clip_grad_norm_(model.parameters(), recipe.clip)
        for group in optimizer.param_groups:
            group["lr"] = rate_at(step, recipe.steps, recipe.warmup, rate)
        optimizer.step()
        optimizer.zero_grad()
        if (step + 1) % recipe.validate_every == 0 or step + 1 == recipe.steps:
            valid, test = (replace(runner, mode=mode).nll(one.rows[split]) for split in ("valid", "test"))
            if np.mean(valid) < best["valid_nll"]:
                best = {"valid": valid, "test": test, "valid_nll": float(np.mean(valid))}
    return {**best, "parameters": sum(p.numel() for p in model.parameters()), "steps": recipe.steps}


# Arms


def arms_of(name: str, seeds: Sequence[int], thorough: bool, store: Store) -> dict[str, list[dict[str, Any]]]:
    """Every arm's cells, one for each seed."""
    one = opened(name)
    same = {"set": name, "steps": STEPS, "sizes": SIZES[name], "settings": SETTINGS}
    plan, rule = one.decision.plan, one.decision.recipe.learning_rate

    def cells(
        arm: str, compute: Callable[[int], dict[str, Any]], over: Sequence[int] = seeds, **key: Any
    ) -> list[dict[str, Any]]:
        return [store.cell({**same, "arm": arm, "seed": seed, **key}, partial(compute, seed)) for seed in over]

    def at(made: Plan, rate: float) -> Callable[[int], dict[str, Any]]:
        return lambda seed: plain(one, made, rate, seed)

    few = seeds[:1]
    found = {"a": cells("a", lambda seed: procedure(one, "fast", seed), search="fast")}
    found["b"] = [{**cell, **cell["whole"]} for cell in found["a"]]
    rate = found["a"][0]["rate"]
    grid = []
    for by in GRID_RATES:
        for rank in GRID_RANKS:
            for place, targets in GRID_PLACES.items():
                sites = [slot.site for slot in plan.slots] if targets is None else select(one.base.sites, targets)
                setting: dict[str, Any] = {"rate": by * rule, "rank": rank, "place": place}
                made = uniform(sites, rank, 32.0)
                grid.append((setting, made, cells("e", at(made, by * rule), few, **setting)[0]))
    setting, made, first = min(grid, key=lambda entry: float(entry[2]["valid_nll"]))
    more = cells("e", at(made, setting["rate"]), seeds[1:], **setting)
    label = f"e, winner of {len(grid)}: {setting['place']}, rank {setting['rank']}, {setting['rate']:.1e}"
    found[label] = [first, *more]
    found["c"] = cells("c", at(dealt(plan, 0), rate), few, rate=rate)
    found["d"] = cells(
        "d", at(uniform(select(one.base.sites, TARGETS), DEFAULT_RANK, DEFAULT_ALPHA), DEFAULT_RATE), few
    )
    found["d, equal"] = cells("d equal", at(at_parameters(one, TARGETS, plan.parameters, 32.0), rate), few, rate=rate)
    if name == SETS[0]:
        tuned = [cells("f", partial(full, one, rate), few, rate=rate)[0] for rate in FULL_RATES]
        found["f"] = [min(tuned, key=lambda cell: cell["valid_nll"])]
    if thorough:
        found["a, thorough"] = cells("a thorough", lambda seed: procedure(one, "thorough", seed), few)
    return found


LABELS = {
    "a": "(a) the procedure",
    "a, thorough": "(a) the same, thorough",
    "b": "(b) (a) untrimmed",
    "c": "(c) ranks dealt at random",
    "d": "(d) PEFT's raw defaults",
    "d, equal": "(d) q, v at equal parameters, rate of (b)",
    "f": f"(f) full fine-tuning, best of {len(FULL_RATES)} rates",
}


def mean_test(cells: Sequence[dict[str, Any]]) -> np.ndarray[Any, Any]:
    """NLL of each test example, mean over seeds."""
    whole: np.ndarray[Any, Any] = np.asarray([cell["test"] for cell in cells], dtype=np.float64)
    return np.asarray(whole.mean(axis=0))


def against(these: np.ndarray[Any, Any], those: np.ndarray[Any, Any], groups: Sequence[str | None]) -> list[float]:
    """Mean difference as a share of the NLL of `those`, and its interval."""
    drawn = paired_bootstrap((these - those).tolist(), groups)
    assert drawn is not None  # the sets are large enough
    return [value / float(those.mean()) for value in (drawn.mean, drawn.low, drawn.high)]


def percent(values: Sequence[float]) -> str:
    return f"{values[0]:+.1%} ({values[1]:+.1%} to {values[2]:+.1%})"


def verdicts(name: str, arms: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The claims on one set: numbers, and whether each holds."""
    groups = [example.group for example in opened(name).examples.test]
    winner = next(label for label in arms if label.startswith("e, "))
    tests = {label: mean_test(cells) for label, cells in arms.items()}
    regret, defaults = against(tests["a"], tests[winner], groups), against(tests["a"], tests["d"], groups)
    regret_b = against(tests["b"], tests[winner], groups)
    whole = tests["b"]
    cuts = {
        cut: against(np.mean([cell["cuts"][cut] for cell in arms["a"]], axis=0), whole, groups)
        for cut in arms["a"][0]["cuts"]
    }
    search_price, trim_price = (
        max(c[f"{what}_seconds"] / c["train_seconds"] for c in arms["a"]) for what in ("search", "trim")
    )
    return {
        "regret": regret,
        "regret_of_b": regret_b,
        "against_defaults": defaults,
        "cuts": cuts,
        "price_fast": search_price,
        "price_trim": trim_price,
        "shipped_shares": [cell["chosen_share"] for cell in arms["a"]],
        "holds": {
            "regret": regret[2] <= 0.005,
            "defaults": defaults[0] <= -0.02 and defaults[2] < 0,
            "trim": cuts["both 0.25"][2] <= 0.005,
            "price": search_price + trim_price <= 0.5,
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description="Choosing by evidence against what people do instead.")
    parser.add_argument("--quick", action="store_true", help="one set, one seed")
    parser.add_argument("--sets", nargs="+", choices=SETS, help="these alone, as to fill one store from two processes")
    parser.add_argument("--thorough", action="store_true", help="also the procedure that searches placement and rank")
    parser.add_argument("--store", type=Path, default=Path("build/planning"), help="where cells are kept")
    parser.add_argument("--minutes", type=float, default=1e9, help="stop after so long; the same command goes on")
    parser.add_argument("--record", action="store_true", help="append the tables to bench/RESULTS.md")
    given = parser.parse_args()
    if not DATA.is_dir():
        raise SystemExit(f"needs the data sets in {DATA}: name their folder in LORAFIT_DATA")
    about = circumstances()
    store = Store(given.store, time.monotonic() + 60 * given.minutes)
    sets, seeds = (SETS[:1], SEEDS[:1]) if given.quick else (tuple(given.sets or SETS), SEEDS)
    torch.set_num_threads(1)  # a base so small gains little from a second; two sets side by side gain all of it
    console = Console()
    told: dict[str, dict[str, Any]] = {}
    text: list[str] = []
    for name in sets:
        arms = arms_of(name, seeds, given.thorough, store)
        found = told[name] = verdicts(name, arms)
        groups = [example.group for example in opened(name).examples.test]
        winner = mean_test(next(cells for label, cells in arms.items() if label.startswith("e, ")))
        head = ["arm", "test NLL", "between seeds", "to the grid's winner", "parameters", "steps in all"]
        lines = []
        for label, cells in sorted(arms.items()):
            each = [float(np.mean(cell["test"])) for cell in cells]
            spent = sum(cell["steps"] for cell in cells) / len(cells)
            spent = spent * len(GRID_RATES) * len(GRID_RANKS) * len(GRID_PLACES) if label.startswith("e, ") else spent
            lines.append(
                [
                    LABELS.get(label, f"({label[0]}){label[2:]}"),
                    f"{np.mean(each):.4f}",
                    f"{np.std(each, ddof=1):.4f}" if len(each) > 1 else "-",
                    percent(against(mean_test(cells), winner, groups)),
                    f"{round(np.mean([cell['parameters'] for cell in cells])):,}",
                    f"{spent * (len(FULL_RATES) if label == 'f' else 1):.0f}",
                ]
            )
        table = Table(*head, title=name)
        for line in lines:
            table.add_row(*line)
        console.print(table)
        cut = "; ".join(f"{which}: {percent(values)}" for which, values in found["cuts"].items())
        said = ", ".join(f"{claim} {'holds' if holds else 'fails'}" for claim, holds in found["holds"].items())
        below = (
            f"(a) against the winner of the grid {percent(found['regret'])}, against PEFT's defaults "
            f"{percent(found['against_defaults'])}. Cut to a share: {cut}. Search (fast) took "
            f"{found['price_fast']:.2f} of a run, trim {found['price_trim']:.2f}. {said}."
        )
        console.print(below)
        text.append(f"### {name}\n\n{markdown(head, lines)}\n\n{below}")
    result = {"benchmark": "planning", **about, "quick": given.quick, "rates": list(rates_for(STEPS)), "sets": told}
    print(json.dumps(result))
    if given.record:
        title = "Choosing by evidence" + (", quick" if given.quick else "")
        claims = (__doc__ or "").split("stated before the first cell was run:\n\n")[1].split("\n\nCells")[0]
        record(title, result, f"What was claimed beforehand:\n\n{claims}\n\n" + "\n\n".join(text))


if __name__ == "__main__":
    main()
