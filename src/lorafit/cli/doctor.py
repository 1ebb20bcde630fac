"""lorafit doctor: what this machine has, what will be slow, whether a base opens."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from lorafit.cli.flags import JSON


def doctor(
    base: Annotated[str | None, typer.Argument(help="A base to open and run, too.")] = None, json: JSON = False
) -> None:
    """Look at this machine and, where one is named, at a base. Exit status 0: can train; 2: something is broken."""
    from lorafit.cli.console import Terminal
    from lorafit.doctor import BROKEN, SLOW, examine

    terminal = Terminal(json)
    findings = examine(base, terminal.say, terminal.watch)
    for one in findings:
        mark = {SLOW: "slow", BROKEN: "broken"}.get(one.state, "")
        terminal.say(f"{one.what:>16}  {one.value}" + (f"\n{mark:>16}  {one.advice}" if one.advice else ""))
    broken = any(one.state == BROKEN for one in findings)
    terminal.finish({"ok": not broken, "findings": [asdict(one) for one in findings]})
    if broken:
        raise typer.Exit(2)
