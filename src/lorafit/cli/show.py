"""lorafit show: print anything lorafit writes or opens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorafit.cli.flags import JSON


def show(
    path: Annotated[Path, typer.Argument(help="A run, an adapter folder, a plan.json, or a base.")], json: JSON = False
) -> None:
    """Print a run, an adapter, a plan or a base in a few lines.

    \b
    lorafit show runs/mine
    lorafit show smollm2-135m
    """
    from lorafit.cli.console import Terminal
    from lorafit.shown import shown

    terminal = Terminal(json)
    found: dict[str, Any] = shown(path)
    for key, value in found.items():
        terminal.say(f"{key:>22}  {value}")
    if found["kind"] == "run" and found["state"] == "finished":
        from lorafit.run import read_summary

        terminal.results(read_summary(path) or {})
    terminal.finish(found)
