"""lorafit doctor: checks of this machine and of a base."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from lorafit.cli.flags import JSON


def doctor(
    base: Annotated[str | None, typer.Argument(help="A base to open and run as well.")] = None, json: JSON = False
) -> None:
    """Check this machine and, if you name one, a base. Exit status 0: ready to train; 2: something is broken."""
    from lorafit.cli.console import Terminal
    from lorafit.errors import BaseError
    from lorafit.jobs.doctor import BROKEN, GOOD, Finding, machine, opened

    terminal = Terminal(json)

    def tell(findings: list[Finding]) -> None:
        for one in findings:
            mark = "" if one.state == GOOD else one.state
            terminal.say(f"{one.what:>16}  {one.value}" + (f"\n{mark:>16}  {one.advice}" if one.advice else ""))

    findings, refused = machine(), None
    tell(findings)
    if base is not None:
        try:
            of_base = opened(base, terminal.say, terminal.watch)
            tell(of_base)
        except BaseError as error:  # reported after the findings
            of_base, refused = [Finding("base", "cannot be opened", BROKEN, str(error))], error
        findings += of_base
    broken = any(one.state == BROKEN for one in findings)
    terminal.finish({"ok": not broken, "findings": [asdict(one) for one in findings]})
    if refused:
        raise refused
    if broken:
        raise typer.Exit(2)
