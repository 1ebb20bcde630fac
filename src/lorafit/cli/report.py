"""lorafit report: a page about one run, or several compared."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorafit.cli.flags import JSON


def report(
    runs: Annotated[list[Path], typer.Argument(metavar="RUN...", help="Run folders.")],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", "-o", help="The page to write. [default: report.html in the run; for several runs comparison.html]"
        ),
    ] = None,
    json: JSON = False,
) -> None:
    """Write a page about a run (scores, curves, answers, reasons, data), or compare several runs.

    \b
    lorafit report runs/mine
    lorafit report runs/mine runs/other --out both.html
    """
    from lorafit.cli.console import Terminal
    from lorafit.report.place import require_place
    from lorafit.runs.folder import REPORT, require_run

    for run in runs:
        require_run(run)
    chosen = out or (runs[0] / REPORT if len(runs) == 1 else Path("comparison.html"))
    require_place(runs, chosen)
    from lorafit.report.page import write_report

    terminal = Terminal(json)
    write_report(runs, chosen)
    terminal.say(f"written to {chosen}: open it in a browser; it needs no other file")
    terminal.finish({"report": str(chosen), "runs": [str(run) for run in runs]})
