"""The model card: an adapter and its scores go in; the README.md of the adapter folder comes out."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

from lorafit.adapters.adapter import Adapter
from lorafit.bases import hub
from lorafit.heads import HEADS
from lorafit.heads.head import PeftPlace
from lorafit.planning import Choice
from lorafit.report.words import ASIDE, headline, interval, of_a_hundred, table, terms
from lorafit.report.words import lines as scores
from lorafit.runs.summary import RunSummary


def card(adapter: Adapter, choices: Sequence[Choice], summary: RunSummary) -> str:
    """The card as Markdown, with the front matter that hubs and PEFT read."""
    nll = summary.nll
    variant = adapter.plan.slots[0].variant
    wanted = hub.parse(adapter.base_name or "")
    wanted = wanted if wanted and wanted.is_commit else None
    lines = [
        "---",
        "library_name: peft",
        f"base_model: {wanted.id if wanted else adapter.base_name}",
        f"pipeline_tag: {HEADS[summary.task].pipeline}",
        f"tags: [lora, lorafit, {variant}]" if variant != "lora" else "tags: [lora, lorafit]",
        "---",
        "",
        f"# A {variant} adapter for {_short(adapter.base_name)}",
        "",
        f"Trained by lorafit on {summary.n_train:,} examples; scored on {summary.n_test:,} that this "
        f"run used for no choice (opened {summary.test_openings} time{'s' * (summary.test_openings != 1)}).",
        "",
        f"**{headline(summary)}.**",
        "",
        *_before(summary),
        _cells("on held-out examples", [line.name for line in scores(summary)]),
        "|---|" + len(scores(summary)) * "--:|",
        *(_cells(what, cells) for what, cells in table(summary)),
    ]
    if any(line.equal for line in scores(summary)):
        lines += ["", f"Equal to the reference: {ASIDE}."]
    if sentence := of_a_hundred(summary):
        lines += ["", f"{sentence[0].upper()}{sentence[1:]}."]
    lines += [
        "",
        f"Paired difference in NLL {nll.difference:+.3f} ({interval(nll.ci95)}).",
        "",
        "## How to use it",
        "",
        *HEADS[summary.task].use(adapter.classes),
        "",
        *_in_peft(adapter, summary, wanted),
        "",
        "## What was chosen, and why",
        "",
        *(f"- **{choice.name}**: {choice.value}: {choice.reason}" for choice in choices),
        "",
        "## Limits",
        "",
        f"{terms(summary).limits} Use it with the base named above and no other: these are the weights with "
        f"digest `{(adapter.base or 'unknown')[:16]}`.",
        "",
    ]
    if adapter.rendering and adapter.rendering.single:
        said = "It was trained on single questions: ask each question on its own, without the conversation before it."
        lines[-1:] = [said, ""]
    if adapter.rendering and adapter.rendering.system:
        lines[-1:] = [f"System prompt it was trained with: `{adapter.rendering.system}`", ""]
    if adapter.rendering and adapter.rendering.now:
        lines += [f"The base's chat template contains the time; in training it was `{adapter.rendering.now}`.", ""]
    if adapter.rendering and adapter.rendering.settings:
        settings = ", ".join(f"{name}={json.dumps(value)}" for name, value in adapter.rendering.settings)
        lines += [f"Settings of the base's chat template: `{settings}`", ""]
    return "\n".join(lines)


def _cells(what: str, cells: Sequence[str]) -> str:
    return f"| {' | '.join([what, *cells])} |"


def _in_peft(adapter: Adapter, summary: RunSummary, wanted: hub.Wanted | None) -> list[str]:
    """How to open the adapter in PEFT, or why PEFT cannot read it."""
    if misread := summary.misread_by_peft:
        return [f"{misread}."]
    at = f'"{wanted.id}", revision="{wanted.revision}"' if wanted else "base"
    shown = f"`base` is its folder: `lorafit show {adapter.base_name}` prints it"
    folder = None if wanted else str(adapter.base_name)
    return HEADS[summary.task].use_in_peft(adapter.classes, PeftPlace(at, folder, shown))


def _short(name: str | None) -> str:
    """The name of a base; for a folder, the last part of its path."""
    return Path(name).name if name and Path(name).is_absolute() else str(name)


def _before(summary: RunSummary) -> list[str]:
    """A note that the scores are those of an earlier adapter; empty if they are not."""
    if summary.scores_of_round is None:
        return []
    return [
        f"These scores are of the adapter before round {summary.scores_of_round}. This adapter is better on "
        "validation; the test was not opened again.",
        "",
    ]
