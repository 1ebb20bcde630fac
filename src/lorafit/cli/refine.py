"""lorafit refine: one more round of training with one change."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorafit.cli.flags import JSON


def refine(run: Annotated[Path, typer.Argument(help="A finished run.")], json: JSON = False) -> None:
    """Train once more with the change that the run's curves suggest, and keep the result if validation improves.

    The change is more steps if the loss was still falling, fewer if validation had turned, or a higher rank if the
    adapter uses all of its rank. The test is not opened. Repeat the command for another round; it says when nothing is
    left to try.

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
        kept = "the result is now the adapter" if found["accepted"] else "the adapter stays as it was"
        terminal.say(f"round {found['number']}, {found['kind']}: {found['verdict']}; {kept}")
    terminal.finish(found)
