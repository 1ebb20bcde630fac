"""lorafit show: print anything lorafit writes or opens."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorafit.cli.flags import JSON


def show(
    path: Annotated[Path, typer.Argument(help="A run, an adapter folder, a plan.json, or a base.")],
    why: Annotated[
        bool,
        typer.Option("--why", help="For a run: what was measured and chosen, in words, and how certain it is."),
    ] = False,
    json: JSON = False,
) -> None:
    """Describe a run, an adapter, a plan or a base in a few lines.

    \b
    lorafit show runs/mine
    lorafit show runs/mine --why
    lorafit show smollm2-135m
    """
    from lorafit.cli.console import Terminal
    from lorafit.jobs.show import require_shown, shown

    terminal = Terminal(json)
    require_shown(path)
    found: dict[str, Any] = shown(path)
    for key, value in found.items():
        terminal.say(f"{key:>22}  {value}")
    if found["kind"] == "run" and found["state"] == "finished":
        from lorafit.runs.folder import read_summary

        if summary := read_summary(path):
            terminal.results(summary)
    if why:
        from lorafit.report.story import read_story
        from lorafit.report.why import why as reasons

        found["why"] = [{"heading": heading, "text": text} for heading, text in reasons(read_story(path))]
        for part in found["why"]:
            terminal.say(f"\n{part['heading']}\n{part['text']}")
    terminal.finish(found)
