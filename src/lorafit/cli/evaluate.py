"""lorafit eval: a paired comparison on held-out examples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import typer

from lorafit.cli.flags import DATA, JSON, UNKNOWN_BASE, with_settings


@with_settings("few_shot", "dtype", "max_length", "columns", "skip_bad", "general")
def evaluate(
    adapter: Annotated[Path, typer.Argument(help="A run, or an adapter folder (PEFT's layout).")],
    data: DATA = None,
    *,
    base: Annotated[str | None, typer.Option(help="The base; by default the adapter's.")] = None,
    against: Annotated[Path | None, typer.Option(help="Another adapter to compare with, instead of the base.")] = None,
    split: Annotated[Literal["train", "valid", "test"], typer.Option(help="The split of a folder to use.")] = "test",
    answers: Annotated[
        Path | None, typer.Option(help="Answer every question, and write the answers to this file (JSON lines).")
    ] = None,
    accept_unknown_base: UNKNOWN_BASE = False,
    json: JSON = False,
    settings: dict[str, Any],
    typed: frozenset[str],
) -> None:
    """Compare an adapter with its base, or with another adapter, example by example, with intervals.

    \b
    lorafit eval runs/mine more.jsonl
    lorafit eval runs/mine more.jsonl --against runs/other
    lorafit eval runs/mine folder --answers answers.jsonl
    """
    from lorafit.cli.console import Terminal
    from lorafit.cli.paths import require
    from lorafit.data.prepared import choose, is_single
    from lorafit.errors import BaseChangedError
    from lorafit.files import require_new
    from lorafit.runs.summary import EvaluationSummary
    from lorafit.settings import settings_from

    assert data is not None  # with_settings sees to it
    if answers is not None:
        require_new(answers, "--answers")
    require(base=base, data=data, adapters=(adapter, against), settings=settings)
    if "few_shot" not in typed and (split == "train" or is_single(data)):
        settings = {**settings, "few_shot": 0}  # a file for training may ask for shots that these data do not have
    terminal = Terminal(json)
    chosen = choose(data, split, settings_from(settings), terminal)
    from lorafit.jobs.evaluate import run_evaluation

    found = run_evaluation(
        base,
        adapter,
        data,
        settings,
        against=against,
        split=split,
        answers=answers,
        accept_unknown_base=accept_unknown_base,
        listener=terminal,
        chosen=chosen,
    )
    summary = EvaluationSummary.from_json(found)
    terminal.results(summary)
    terminal.finish(summary.to_json())
    if not summary.base_unchanged:
        raise BaseChangedError(
            "the base in memory changed while it was evaluated: do not use these scores; check the memory of this "
            "machine, and that nothing else in the process writes to the model"
        )
