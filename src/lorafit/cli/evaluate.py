"""lorafit eval: a paired comparison on held-out examples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lorafit.cli.flags import JSON


def evaluate(
    adapter: Annotated[Path, typer.Argument(help="An adapter folder (PEFT's layout).")],
    data: Annotated[
        str, typer.Argument(help="A file of examples, a folder with train, valid and test files, or 'builtin'.")
    ],
    base: Annotated[str | None, typer.Option(help="The base; by default the one the adapter names.")] = None,
    against: Annotated[Path | None, typer.Option(help="Another adapter to compare with, instead of the base.")] = None,
    split: Annotated[Literal["train", "valid", "test"], typer.Option(help="Which split of a folder.")] = "test",
    few_shot: Annotated[int, typer.Option(min=0, help="Examples in the base's prompt, as a second baseline.")] = 0,
    dtype: Annotated[Literal["auto", "fp32", "bf16"], typer.Option(help="Of the base; auto measures.")] = "auto",
    max_length: Annotated[int, typer.Option(min=8, help="Longest example, in tokens.")] = 1024,
    accept_unknown_base: Annotated[
        bool, typer.Option("--accept-unknown-base", help="Attach an adapter that does not say whose it is.")
    ] = False,
    columns: Annotated[
        list[str] | None, typer.Option(help="FIELD=COLUMN, e.g. prompt=question. Once for each.")
    ] = None,
    skip_bad: Annotated[bool, typer.Option("--skip-bad", help="Leave out rows that cannot be used.")] = False,
    json: JSON = False,
) -> None:
    """Compare an adapter with its base, or with another adapter, example by example, with intervals."""
    from lorafit.cli.console import Terminal
    from lorafit.errors import BaseChangedError
    from lorafit.pipeline import run_evaluation

    terminal = Terminal(json)
    summary = run_evaluation(
        base, adapter, data, against=against, split=split, few_shot=few_shot, dtype=dtype, max_length=max_length,
        accept_unknown_base=accept_unknown_base, columns=columns or (), skip_bad=skip_bad, listener=terminal,
    )  # fmt: skip
    terminal.results(summary)
    terminal.finish(summary)
    if not summary["base_unchanged"]:
        raise BaseChangedError(
            "the base in memory changed while it was evaluated: do not use these scores; check the memory of this "
            "machine, and that nothing else in the process writes to the model"
        )
