"""What `bench/train.py` says at the end: a table, one JSON object, and where asked for a section of RESULTS.md."""

from __future__ import annotations

from collections.abc import Mapping
from statistics import fmean, median, stdev
from typing import Any

from results import markdown, record
from rich.console import Console
from rich.table import Table
from train_arms import Measured
from train_child import ABOUT, PEFT_ARMS

HEAD = ["", "examples/s", "tokens/s", "trained/s", "spread", "peak MB", "NLL", "over lorafit"]
Scores = Mapping[str, list[float]]


def arm_json(one: Measured, nlls: Scores) -> dict[str, Any]:
    """Medians over an arm's windows; None for what was not measured."""

    def rate(field: str) -> float | None:
        return round(median(w[field] / w["seconds"] for w in one.windows), 3) if one.windows else None

    speeds = [w["tokens"] / w["seconds"] for w in one.windows]
    job = one.job
    own = nlls.get(job.arm)
    return {
        "about": ABOUT[job.arm],
        "switches": PEFT_ARMS[job.arm].switches() if job.arm in PEFT_ARMS else None,
        "dtype": job.dtype,
        "examples_per_second": rate("examples"),
        "tokens_per_second": rate("tokens"),
        "trained_tokens_per_second": rate("trained"),
        "spread": round((max(speeds) - min(speeds)) / median(speeds), 3) if speeds else None,
        "peak_bytes": max((int(w["peak"]) for w in one.windows), default=None),
        "peft": one.finished.get("peft"),
        "memory_by": one.finished.get("memory"),
        "windows": len(one.windows),
        "steps_per_window": job.steps,
        "examples_per_step": job.batch,
        "valid_nll": round(fmean(own), 5) if own else None,
        "ready_seconds": one.ready_seconds and round(one.ready_seconds, 1),
        "compile_seconds": one.finished.get("compile_seconds"),
        "failed": one.failed,
    }


def data_json(measured: Mapping[str, Measured], nlls: Scores, in_turns: bool) -> dict[str, Any]:
    """The ratios the benchmark is for, and the arms they come from. Of real tokens per second: the median over windows
    of lorafit's over that of the other arm in the same turn, for the machine is not as fast in every turn. Of medians
    where arms did not alternate, or had fewer windows."""
    arms = {name: arm_json(one, nlls) for name, one in measured.items()}
    speeds = {name: [w["tokens"] / w["seconds"] for w in one.windows] for name, one in measured.items()}

    def speedup(other: str | None) -> float | None:
        ours, theirs = speeds.get("lorafit", []), speeds.get(other or "", [])
        if not ours or not theirs:
            return None
        if not in_turns or len(ours) != len(theirs):
            return round(median(ours) / median(theirs), 3)
        return round(median(own / their for own, their in zip(ours, theirs, strict=True)), 3)

    def memory(other: str | None) -> float | None:
        mine, theirs = (arms.get(name or "", {}).get("peak_bytes") for name in ("lorafit", other))
        return round(mine / theirs, 3) if mine and theirs else None

    peft = [name for name in arms if name in PEFT_ARMS and arms[name]["tokens_per_second"]]
    best = max(peft, key=lambda name: float(arms[name]["tokens_per_second"]), default=None)
    return {
        "ratio_vs_peft_fp32": speedup("peft-fp32"),
        "ratio_vs_peft_best": speedup(best),
        "ratio_vs_floor": speedup("floor"),
        "ratio_vs_floor_compiled": speedup("floor-compiled"),
        "memory_vs_peft_best": memory(best),
        "peft_best": best,
        "base_nll": round(fmean(nlls["base"]), 5) if nlls.get("base") else None,
        "nll_over_lorafit": {name: paired(nlls[name], nlls["lorafit"]) for name in nlls if name in PEFT_ARMS}
        if "lorafit" in nlls
        else {},
        "floor_cost": floor_cost(measured.get("floor")),
        "arms": arms,
    }


def paired(theirs: list[float], ours: list[float]) -> dict[str, float] | None:
    """Mean paired difference over the validation examples, and twice its standard error: the noise of these examples
    alone, without that of another order of rows."""
    differences = [a - b for a, b in zip(theirs, ours, strict=True)]
    if len(differences) < 2:
        return None
    return {"mean": round(fmean(differences), 5), "two_se": round(2 * stdev(differences) / len(differences) ** 0.5, 5)}


def floor_cost(floor: Measured | None) -> dict[str, float] | None:
    """A floor's step in operations and bytes, and what of each it reached a second."""
    if floor is None or "cost" not in floor.finished:
        return None
    cost = dict(floor.finished["cost"])
    speed = median(w["tokens"] / w["seconds"] for w in floor.windows)
    return {
        **{name: round(value) for name, value in cost.items()},
        "gflops_per_second": round(cost["flops"] / cost["tokens"] * speed / 1e9, 2),
        "gbytes_per_second": round(cost["bytes"] / cost["tokens"] * speed / 1e9, 2),
    }


def cells(found: Mapping[str, Any]) -> list[list[str]]:
    """A data set's table."""
    lines: list[list[str]] = []
    for name, arm in found["arms"].items():
        if arm["tokens_per_second"] is None:
            lines.append([ABOUT[name], "failed", *[""] * (len(HEAD) - 2)])
            continue
        over = found["nll_over_lorafit"].get(name)
        lines.append(
            [
                ABOUT[name] + (" *" if arm["short"] else ""),
                f"{arm['examples_per_second']:.3g}",
                f"{arm['tokens_per_second']:.1f}",
                f"{arm['trained_tokens_per_second']:.1f}",
                f"{100 * arm['spread']:.0f} %",
                f"{arm['peak_bytes'] / 1e6:,.0f}",
                "" if arm["valid_nll"] is None else f"{arm['valid_nll']:.4f}",
                "" if over is None else f"{over['mean']:+.4f} ± {over['two_se']:.4f}",
            ]
        )
    return lines


def notes(found: Mapping[str, Any]) -> list[str]:
    """What a table does not say by itself."""
    speeds = [
        f"{what} {value:.2f}"
        for what, value in (
            ("PEFT fp32", found["ratio_vs_peft_fp32"]),
            (f"PEFT's best ({found['peft_best']})", found["ratio_vs_peft_best"]),
            ("the floor", found["ratio_vs_floor"]),
            ("the compiled floor", found["ratio_vs_floor_compiled"]),
        )
        if value is not None
    ]
    lines = [f"speed of lorafit over that of: {'; '.join(speeds)}" if speeds else ""]
    if found["memory_vs_peft_best"] is not None:
        lines.append(f"memory of lorafit over PEFT's best: {found['memory_vs_peft_best']:.2f}")
    if found["nll_over_lorafit"]:
        lines.append(
            f"base NLL {found['base_nll']:.4f}; ± is twice the standard error over the validation examples; arms take "
            "the rows in different orders (in the same order the same numbers come out, a test says)"
        )
    for name, arm in found["arms"].items():
        if arm["switches"]:
            lines.append(f"{arm['about']}: {', '.join(arm['switches'])}")
        if arm["failed"]:
            lines.append(f"{name}: {arm['failed']}")
        if arm["short"]:
            lines.append(
                f"* {name}: bf16 is the slower here, so {arm['windows']} windows of {arm['steps_per_window']} "
                f"steps of {arm['examples_per_step']} examples, not scored"
            )
        if arm["compile_seconds"] is not None:
            lines.append(f"{name}: {arm['compile_seconds']:.0f} s of compiling, outside the windows")
    if cost := found["floor_cost"]:
        lines.append(
            f"floor, a step of {cost['tokens']:,} tokens: {cost['flops'] / 1e9:,.1f} GFLOP (linear "
            f"{cost['flops_linear'] / 1e9:,.1f}, attention {cost['flops_attention'] / 1e9:,.1f}, head "
            f"{cost['flops_head'] / 1e9:,.1f}), at {cost['gflops_per_second']:,.1f} GFLOP/s; {cost['bytes'] / 1e9:.2f} "
            f"GB if each tensor moved once (weights {cost['bytes_weights'] / 1e9:.2f}), at "
            f"{cost['gbytes_per_second']:.2f} GB/s"
        )
    return [line for line in lines if line]


def show(title: str, found: Mapping[str, Any]) -> None:
    """Print one data set's table and notes, within 100 columns."""
    console = Console(width=100, highlight=False)
    table = Table(title=title, title_justify="left", box=None, padding=(0, 1))
    for i, name in enumerate(HEAD):
        table.add_column(name, justify="right" if i else "left", no_wrap=i > 0)
    for cell in cells(found):
        table.add_row(*cell)
    console.print(table)
    for line in notes(found):
        console.print(line, markup=False)
    console.print()


def record_all(result: Mapping[str, Any], titles: Mapping[str, str], settings: str) -> None:
    """Append the tables to RESULTS.md."""
    parts = [f"PEFT {result['peft']}. {settings}" if result["peft"] else settings]
    for name, found in result["datasets"].items():
        parts += [titles[name], markdown(HEAD, cells(found)), "\n".join(f"- {line}" for line in notes(found))]
    record("Training against PEFT and the floor", result, "\n\n".join(parts))
