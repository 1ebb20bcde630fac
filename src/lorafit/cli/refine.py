"""lorafit refine: one more round of the loop."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorafit.cli.flags import JSON


def refine(run: Annotated[Path, typer.Argument(help="A finished run.")], json: JSON = False) -> None:
    """One round: what the run's curves say should be tried, trained anew, and kept if validation shows it is better.

    More steps where everything was still falling, fewer where validation had turned, more rank where half of it would
    cost. The test is not opened. Say it again for the next round; it tells when nothing is left to try.

    \b
    lorafit refine runs/mine
    """
    from lorafit.cli.console import Terminal
    from lorafit.runs.folder import read_finished, require_run

    require_run(run)
    read_finished(run)
    from lorafit.jobs.refine import run_refining

    terminal = Terminal(json)
    found = run_refining(run, terminal)
    if found["number"] is None:
        terminal.say(found["verdict"])
    else:
        kept = "is now the adapter" if found["accepted"] else "is not taken, the adapter stays as it was"
        terminal.say(f"round {found['number']}, {found['kind']}: {found['verdict']}; what it made {kept}")
    terminal.finish(found)
