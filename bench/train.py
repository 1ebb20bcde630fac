"""Training throughput and memory: lorafit beside PEFT in the transformers Trainer, and the floor of both.

    make bench-train                       all data sets, about 40 minutes on two cores
    python bench/train.py --quick          that it runs, not what it gives
    python bench/train.py --gpu            bases of 1B and 8B shape with random weights

Every arm is a process of its own; arms take turns window by window, and the median of the windows counts. Rate, alpha,
schedule, rank, targets, examples per step, steps, rows and the numbers the pairs begin with are equal for lorafit and
PEFT. Each passes over the same rows once, in an order of its own (lorafit and group_by_length put rows of like length
together), so rates are of real tokens: padding never counts. The last line of stdout is one JSON object.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import sys
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from train_child import ABOUT, DTYPES, PEFT_ARMS, Job

ARMS = ("peft-fp32", "peft-fp32-best", "peft-bf16-best", "lorafit", "floor", "floor-compiled")
GPU_ARMS = ("peft-bf16-best", "peft-bf16-autocast", "peft-bf16-liger", "lorafit", "floor", "floor-compiled")
DATA_NAMES = ("e2e", "long", "builtin")


@dataclass(frozen=True)
class Shape:
    """A base with random weights. together: whether all arms fit on the device at once, and so can alternate."""

    about: str
    config: dict[str, Any]
    needs_gpu: bool = True
    together: bool = True


def _llama(hidden: int, inner: int, layers: int, heads: int, kv: int, vocabulary: int, tied: bool) -> dict[str, Any]:
    return {
        "hidden_size": hidden,
        "intermediate_size": inner,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv,
        "vocab_size": vocabulary,
        "tie_word_embeddings": tied,
        "max_position_embeddings": 8192,
        "bos_token_id": None,
        "eos_token_id": 0,
        "pad_token_id": 0,
    }


SHAPES = {
    "tiny": Shape("tiny, random weights", _llama(64, 128, 2, 4, 2, 512, True), needs_gpu=False),
    "1b": Shape("Llama 3.2 1B's shape, random weights", _llama(2048, 8192, 16, 32, 8, 128256, True)),
    "8b": Shape("Llama 3.1 8B's shape, random weights", _llama(4096, 14336, 32, 32, 8, 128256, False), together=False),
}
SHAPE_ROWS = {"short": (16, (48, 112)), "long": (4, (768, 1536))}  # examples per step, lengths between


def main() -> None:
    asked = parse()
    if asked.arm:
        run_arm(asked)
        return
    from train_report import show

    with tempfile.TemporaryDirectory(prefix="lorafit-bench-") as work:
        plans = list(shape_plans(asked, Path(work)) if asked.gpu else data_plans(asked, Path(work)))
        if not plans:
            sys.exit("nothing to measure: none of the data sets asked for is here")
        result, titles = measure_all(asked, plans)
    for name, found in result["datasets"].items():
        show(titles[name], found)
    print(json.dumps(result, allow_nan=False))
    if asked.record:
        from train_report import record_all

        record_all(result, titles, settings_line(plans[0].jobs[0]))


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    add = parser.add_argument
    add("--data", nargs="+", choices=DATA_NAMES, help=f"data sets [default: {' '.join(DATA_NAMES)}]")
    add("--arms", nargs="+", choices=list(ABOUT), help=f"[default: {' '.join(ARMS)}]")
    add("--windows", type=int, help="windows per arm, whose median counts [default: 5]")
    add("--steps", type=int, help="optimizer steps in a window [default: 2, on a GPU 10]")
    add("--warmup", type=int, help="steps before the first window [default: 2, on a GPU 5]")
    add("--batch", type=int, help="examples per step [default: 8, long rows 2]")
    add("--dtype", choices=["auto", *DTYPES], default="auto", help="of lorafit and the floors [default: the faster]")
    add("--base", default="smollm2-135m", help="base to train on [default: smollm2-135m]")
    add("--quick", action="store_true", help="3 windows of one step on the built-in data, without the slow arms")
    add("--gpu", action="store_true", help="bases with random weights instead of data sets")
    add("--shapes", nargs="+", choices=list(SHAPES), default=["1b", "8b"], help="with --gpu [default: 1b 8b]")
    add("--peft-python", help="an interpreter that has PEFT [default: one set up in .cache/bench/peft]")
    add("--record", action="store_true", help="append the tables to bench/RESULTS.md")
    add("--arm", help=argparse.SUPPRESS)
    add("--job", type=Path, help=argparse.SUPPRESS)
    add("--adapters", nargs="*", default=[], help=argparse.SUPPRESS)
    asked = parser.parse_args()
    if asked.arm:
        return asked
    quick = asked.quick
    asked.arms = asked.arms or (["peft-fp32-best", "lorafit", "floor"] if quick else GPU_ARMS if asked.gpu else ARMS)
    asked.data = asked.data or (["builtin"] if quick else DATA_NAMES)
    asked.windows = asked.windows or (3 if quick else 5)
    asked.steps = asked.steps or (1 if quick else 10 if asked.gpu else 2)
    asked.warmup = asked.warmup or (1 if quick else 5 if asked.gpu else 2)
    return asked


def run_arm(asked: argparse.Namespace) -> None:
    """This process is an arm, or the one that scores."""
    job = Job.read(asked.job)
    if asked.arm == "score":
        from train_lorafit import score

        score(job, asked.adapters)
    elif asked.arm in PEFT_ARMS:
        from train_peft import run

        run(job)
    elif asked.arm == "lorafit":
        from train_lorafit import run

        run(job)
    else:
        from train_floor import run

        run(job)


@dataclass(frozen=True)
class DataPlan:
    """One data set, or one shape with one kind of rows, and the jobs of its arms."""

    name: str
    title: str
    jobs: tuple[Job, ...]
    together: bool = True


def data_plans(asked: argparse.Namespace, root: Path) -> Iterator[DataPlan]:
    """Render each data set and write the adapter that all arms begin with. A set that is not here is passed over."""
    import torch
    from train_rows import DATA, Absent, rows_of

    from lorafit import fresh, open_base, renderer_for, uniform
    from lorafit.adapters.formats import peft
    from lorafit.bases.base import fastest_dtype, matrix_speed

    fastest = next(name for name, dtype in DTYPES.items() if dtype == fastest_dtype())
    device = "cuda" if torch.cuda.is_available() else "cpu"
    bf16_is_slow = device == "cpu" and matrix_speed(torch.bfloat16) < matrix_speed(torch.float32)
    base = open_base(asked.base, torch.float32, report=lambda line: print(line, file=sys.stderr))
    for name in asked.data:
        data, work = DATA[name], root / name
        batch = asked.batch or data.batch
        renderer = renderer_for(base, system=data.system)
        try:
            wanted = batch * (asked.warmup + asked.windows * asked.steps)
            rows, valid = rows_of(name, renderer, wanted, batch, data.valid)
        except Absent as missing:
            print(f"{name} is left out: {missing}", file=sys.stderr)
            continue
        dtype = fastest if asked.dtype == "auto" else asked.dtype
        job = Job(
            "",
            dtype,
            device,
            str(base.folder),
            None,
            str(work / "start"),
            rows,
            valid,
            batch,
            asked.warmup,
            asked.windows,
            asked.steps,
            str(work),
        )
        sites = [site for site in base.sites if site.path not in base.head_paths()]
        peft.write(fresh(base, uniform(sites, job.rank, job.alpha), job.seed, renderer.rendering), work / "start")
        lengths = sorted(len(ids) for ids, _ in rows)
        title = f"{data.about}: {lengths[0]} to {lengths[-1]} tokens, {batch} examples a step"
        yield DataPlan(name, title, tuple(job_of(arm, job, bf16_is_slow) for arm in asked.arms))


def shape_plans(asked: argparse.Namespace, root: Path) -> Iterator[DataPlan]:
    """Jobs on bases with random weights. Ends the program where they need a GPU and there is none."""
    import torch
    from train_rows import random_rows

    device = "cuda" if torch.cuda.is_available() else "cpu"
    heavy = [name for name in asked.shapes if SHAPES[name].needs_gpu]
    if heavy and device == "cpu":
        sys.exit(
            f"bench/train.py --gpu: no CUDA device here, and {' and '.join(heavy)} would take days without one: "
            "run it on a machine with a GPU, or try the code with --shapes tiny"
        )
    for name in asked.shapes:
        for kind, (batch, lengths) in SHAPE_ROWS.items():
            batch = asked.batch or batch
            shape, work = SHAPES[name], root / f"{name}-{kind}"
            wanted = batch * (asked.warmup + asked.windows * asked.steps)
            rows = random_rows(batch, lengths, shape.config["vocab_size"], wanted)
            job = Job(
                "",
                "bf16" if asked.dtype == "auto" else asked.dtype,
                device,
                None,
                shape.config,
                None,
                rows,
                rows[:2],
                batch,
                asked.warmup,
                asked.windows,
                asked.steps,
                str(work),
            )
            title = f"{shape.about}: {lengths[0]} to {lengths[1]} tokens, {batch} examples a step"
            yield DataPlan(f"{name}-{kind}", title, tuple(job_of(a, job, False) for a in asked.arms), shape.together)


def job_of(arm: str, job: Job, bf16_is_slow: bool) -> Job:
    """The job of one arm. A bf16 arm that would take most of the time, and win nothing, gets fewer, smaller windows."""
    dtype = PEFT_ARMS[arm].dtype if arm in PEFT_ARMS else job.dtype
    job = replace(job, arm=arm, out=str(Path(job.out) / arm), dtype=dtype)
    Path(job.out).mkdir(parents=True)
    if arm in PEFT_ARMS and job.dtype == "bf16" and bf16_is_slow:
        job = replace(job, batch=max(1, job.batch // 4), warmup=1, windows=2, steps=1)
        job = replace(job, rows=job.rows[: job.batch * job.all_steps])
    return job


def measure_all(asked: argparse.Namespace, plans: Sequence[DataPlan]) -> tuple[dict[str, Any], dict[str, str]]:
    """Run all arms of all plans; the result as it is printed, and the title of each table."""
    import torch
    from results import circumstances
    from train_arms import Measured, Progress, measure, peft_python, score
    from train_report import data_json

    about = circumstances()
    peft = ""
    if any(arm in PEFT_ARMS for arm in asked.arms):
        peft = asked.peft_python or peft_python(shlex.split(os.environ.get("PIP_FLAGS", "")), torch.cuda.is_available())
    progress = Progress()
    for plan in plans:
        for job in plan.jobs:
            progress.expect(plan.name, job)
    datasets = {}
    for plan in plans:
        work = Path(plan.jobs[0].out).parent
        groups = [plan.jobs] if plan.together else [(job,) for job in plan.jobs]
        measured: dict[str, Measured] = {}
        for group in groups:
            measured |= measure(plan.name, group, peft, work, progress)
        full = max(job.all_steps * job.batch for job in plan.jobs)
        adapters = {
            arm: one.finished["adapter"]
            for arm, one in measured.items()
            if "adapter" in one.finished and one.job.all_steps * one.job.batch == full
        }
        scoring = replace(plan.jobs[0], dtype="fp32")
        nlls = score(scoring, adapters, work) if adapters and scoring.base else {}
        datasets[plan.name] = data_json(measured, nlls, plan.together)
        for arm, one in measured.items():
            datasets[plan.name]["arms"][arm]["short"] = one.job.all_steps * one.job.batch < full
    versions = {one["arms"][arm]["peft"] for one in datasets.values() for arm in one["arms"] if arm in PEFT_ARMS}
    told = ", ".join(sorted(filter(None, versions))) or None
    result = {"benchmark": "train", **about, "peft": told, "datasets": datasets}
    return result, {plan.name: plan.title for plan in plans}


def settings_line(job: Job) -> str:
    """What is equal in all arms, in words."""
    return (
        f"Rank {job.rank}, alpha {job.alpha}, all linear layers of the blocks; AdamW at {job.learning_rate:g}, "
        f"{job.rate_warmup} steps up and then linearly down, clip 1; {job.all_steps} steps, of which {job.warmup} "
        f"before the windows. Medians of {job.windows} windows of {job.steps} steps, arms in turn; tokens are real "
        "ones, without padding; memory is the peak above the imports, the base included."
    )


if __name__ == "__main__":
    main()
