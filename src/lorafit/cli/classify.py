"""lorafit classify: labels for new texts."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from lorafit.cli.flags import JSON, UNKNOWN_BASE, with_settings


@with_settings("columns", "dtype", "skip_bad")
def classify(
    adapter: Annotated[Path, typer.Argument(help="A classifier: a run, or an adapter folder.")],
    texts: Annotated[
        Path, typer.Argument(help="A file with a column 'text', or a .txt file with a text on each line.")
    ],
    *,
    # Not called `out`, which is a run's folder: a file of settings (-c) may name one.
    to: Annotated[
        Path | None, typer.Option("--out", "-o", help="A new .csv or .jsonl file; by default a table on stdout.")
    ] = None,
    base: Annotated[str | None, typer.Option(help="The base; by default the adapter's.")] = None,
    accept_unknown_base: UNKNOWN_BASE = False,
    json: JSON = False,
    settings: dict[str, Any],
) -> None:
    """Give each text of a file its most likely label, with the classifier's confidence (docs/classification.md).

    The result has all columns of the file, and the columns predicted and confidence; a .jsonl file also has the
    probability of every label.

    \b
    lorafit classify runs/reviews new.csv --out labels.csv
    lorafit classify runs/reviews new.csv --columns text=review
    """
    from lorafit.adapters.folder import require_classifies
    from lorafit.cli.console import Terminal
    from lorafit.cli.paths import require
    from lorafit.data.texts import read_texts
    from lorafit.settings import settings_from

    require(base=base, adapters=(adapter,))
    require_classifies(adapter)
    read_texts(
        texts, settings_from(settings).columns or ()
    )  # mistakes in the file are reported before torch is imported
    terminal = Terminal(json or to is None)
    from lorafit.jobs.classify import as_csv, run_classifying

    found = run_classifying(
        adapter,
        texts,
        settings,
        base=base,
        out=to,
        accept_unknown_base=accept_unknown_base,
        listener=terminal,
    )
    terminal.say(", ".join(f"{label} {n:,}" for label, n in found["labels"].items()))
    if to is not None:
        terminal.say(f"{found['n']:,} labels written to {to}")
    if json:
        terminal.finish(found)
    elif to is None:
        sys.stdout.write(as_csv(found["texts"]))
