"""lorafit plan: the plan of a run, with a reason for each number."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lorafit.cli.flags import BASE, DATA, JSON, with_settings


@with_settings()
def plan(
    base: BASE = None,
    data: DATA = None,
    *,
    picture: Annotated[Path | None, typer.Option(help="Draw the layer card to this file, as PNG.")] = None,
    json: JSON = False,
    settings: dict[str, Any],
) -> None:
    """Print the plan of a run with its reasons: layers, rank, learning rate, steps, time, memory. It trains nothing.

    \b
    lorafit plan smollm2-135m my.jsonl
    lorafit plan -c my.toml
    """
    from lorafit.cli.console import Terminal
    from lorafit.cli.paths import require

    assert base is not None and data is not None  # with_settings sees to it
    require(base=base, data=data, settings=settings, trains=True)
    show_plan(Terminal(json), base, data, settings, picture)


def show_plan(terminal: Any, base: str, data: str, settings: dict[str, Any], picture: Path | None = None) -> None:
    """Show the plan and its cost, what validation can detect, and the layer card."""
    from lorafit.data.prepared import prepare
    from lorafit.files import require_new
    from lorafit.settings import settings_from

    if picture is not None:
        require_new(picture, "--picture")
    prepared = prepare(data, settings_from(settings), terminal)
    from lorafit.jobs.plan import run_planning
    from lorafit.report.words import clock

    found = run_planning(base, data, settings, terminal, prepared)
    cost, steps = found["forecast"], found["recipe"]["steps"]
    terminal.say(
        f"training takes about {clock(cost['seconds'])} here: {steps} steps of {cost['step']:.2f} s, validations of "
        f"{cost['validation']:.1f} s (measured on a few); the evaluation takes about {clock(cost['evaluation'])}"
    )
    terminal.say(
        f"the run needs at most about {cost['peak_gb']:.1f} GB of memory and {cost['disk'] / 1e6:.0f} MB of disk"
    )
    if (search := found["search"])["seconds"]:
        terminal.say(f"the search before training takes about {clock(search['seconds'])}: {search['reason']}")
    terminal.evidence(found)
    if picture is not None:
        if found["card"] is None:
            terminal.say(f"no layer card is drawn: a run of {found['recipe']['steps']} steps is too short for one")
        else:
            from lorafit.files import whole_file
            from lorafit.report import charts

            with whole_file(picture) as file:
                file.write_bytes(charts.png(charts.layer_card(found["card"])))
            terminal.say(f"the layer card is drawn in {picture}")
    terminal.finish(found)
