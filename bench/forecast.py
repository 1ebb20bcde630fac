"""What `plan` foretells of memory and time, against runs that took place, on data and batch sizes of every kind.

    LORAFIT_DATA=... python bench/forecast.py [--record]

Each run is a process of its own, a whole run of a few steps, and is planned as `lorafit plan` does in a process before
it. Memory is the process's peak over what it holds once everything is imported; time is
that of the steps. Nothing is fitted to these runs: the forecast measures a few small steps on its own. Prints a table
and, last, one line of JSON; --record appends the table to bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import csv
import gzip
import json
import os
import random
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from results import circumstances, markdown, record
from rich.console import Console
from rich.table import Table

BASE = "smollm2-135m"
HEAD = ["data, settings", "tokens at a time", "GB foretold", "measured", "s a step foretold", "measured"]
CASES: list[tuple[str, dict[str, Any]]] = [  # data, and settings that make a whole run of a few steps
    ("handbook", {"batch_size": 4, "epochs": 0.03}),
    ("handbook", {"batch_size": 16, "rank": 16, "epochs": 0.04}),
    ("restaurants", {"batch_size": 4, "epochs": 0.05}),
    ("restaurants", {"batch_size": 12, "memory": "1.6GB", "epochs": 0.08}),
    ("contracts", {"batch_size": 2, "epochs": 0.05}),
    ("contracts", {"batch_size": 8, "memory": "1.9GB", "epochs": 0.07}),
]


def files(data: Path, into: Path) -> dict[str, str]:
    """The data sets as lorafit reads them: short rows, middling ones, and rows of very different lengths."""
    texts: dict[str, list[str]] = {}
    with gzip.open(data / "e2e_nlg" / "trainset_rebuilt.csv.gz", "rt", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            texts.setdefault(row["mr"], []).append(row["ref"])
    lists = random.Random(0).sample(sorted(texts), 300)
    restaurants = [{"prompt": mr, "completion": text, "group": mr} for mr in lists for text in texts[mr][:2]]
    clauses = json.loads((data / "legal_summarization" / "all_v1.json").read_text(encoding="utf-8")).values()
    contracts = [
        {
            "prompt": one["original_text"].strip()[:2500],
            "completion": one["reference_summary"].strip(),
            "group": one["doc"],
        }
        for one in clauses
    ]
    made = {"handbook": "builtin"}
    for name, rows in (("restaurants", restaurants), ("contracts", contracts)):
        path = into / f"{name}.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
        made[name] = str(path)
    return made


def one(verb: str, data: str, settings: dict[str, Any]) -> dict[str, Any]:
    """Plan, or train; in a process of its own."""
    from lorafit.jobs.listener import Silent
    from lorafit.jobs.machine import keep_freed_memory, peak_gb
    from lorafit.jobs.plan import forecast
    from lorafit.jobs.prepare import open_all
    from lorafit.settings import settings_from
    from lorafit.training.loop import train

    imported = peak_gb() or 0.0
    keep_freed_memory()
    given = {**settings, "validations": 1, "dtype": "fp32", "skip_bad": True}
    opened = open_all(BASE, data, settings_from(given), Silent())
    recipe = opened.decision.recipe
    taken = {"micro_tokens": recipe.micro_tokens, "recompute": recipe.recompute}
    if verb == "plan":
        cost = forecast(opened, settings_from(settings))
        return {**taken, "gb": cost.peak_gb - imported, "step": cost.step}
    done = train(opened.base, opened.start, opened.rows["train"], opened.rows["valid"], recipe)
    step = done.tokens / recipe.steps / done.tokens_per_second
    return {**taken, "gb": (peak_gb() or 0.0) - imported, "step": step}


def asked(verb: str, data: str, settings: dict[str, Any]) -> dict[str, Any]:
    command = [sys.executable, __file__, "--one", json.dumps([verb, data, settings])]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description="Forecasts of memory and time against runs.")
    parser.add_argument("--record", action="store_true", help="append the numbers to bench/RESULTS.md")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(*json.loads(given.one))))
        return
    about = circumstances()
    lines: list[list[str]] = []
    found: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as folder:
        paths = files(Path(os.environ.get("LORAFIT_DATA", "../shared/data")), Path(folder))
        for name, settings in CASES:
            told, real = (asked(verb, paths[name], settings) for verb in ("plan", "train"))
            said = ", ".join(f"{key} {value}" for key, value in settings.items())
            twice = ", twice" if told["recompute"] else ""
            pairs = (f"{value:.2f}" for key in ("gb", "step") for value in (told[key], real[key]))
            lines.append([f"{name}, {said}", f"{told['micro_tokens']}{twice}", *pairs])
            print("  ".join(lines[-1]), file=sys.stderr, flush=True)
            found.append({"memory": told["gb"] / real["gb"] - 1, "time": told["step"] / real["step"] - 1})
    table = Table(*HEAD)
    for line in lines:
        table.add_row(*line)
    Console().print(table)
    worst = {f"{key}_error": round(sorted((each[key] for each in found), key=abs)[-1], 3) for key in ("memory", "time")}
    result = {"benchmark": "forecast", **about, **worst, "runs": len(found)}
    print(json.dumps(result))
    if given.record:
        record(
            "Memory and time foretold",
            result,
            f"SmolLM2-135M in fp32. Memory over the imports, of a process of its own.\n\n{markdown(HEAD, lines)}\n\n"
            f"Furthest off: memory {worst['memory_error']:+.0%}, time {worst['time_error']:+.0%}.",
        )


if __name__ == "__main__":
    main()
