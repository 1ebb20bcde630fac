"""lorafit plan: what a run would do, each number with its reason."""

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
    picture: Annotated[Path | None, typer.Option(help="Draw the layer card there, as PNG.")] = None,
    json: JSON = False,
    settings: dict[str, Any],
) -> None:
    """Print the plan of a run with its reasons: sites, rank, learning rate, steps, time, memory. Trains nothing.

    \b
    lorafit plan smollm2-135m my.jsonl
    lorafit plan -c my.toml
    """
    from lorafit.cli.console import Terminal
    from lorafit.cli.paths import require

    assert base is not None and data is not None  # with_settings sees to it
    require(base=base, data=data, settings=settings)
    show_plan(Terminal(json), base, data, settings, picture)


def show_plan(terminal: Any, base: str, data: str, settings: dict[str, Any], picture: Path | None = None) -> None:
    """The plan and what it costs, what validation can show, and the layer card."""
    from lorafit.files import require_new
    from lorafit.prepared import prepare
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
        f"{cost['validation']:.1f} s (a few were tried); the evaluation after it about {clock(cost['evaluation'])}"
    )
    folder = f"{cost['disk'] / 1e6:.0f} MB in the run folder"
    terminal.say(f"the run holds at most about {cost['peak_gb']:.1f} GB of memory, {folder} at most")
    if (search := found["search"])["seconds"]:
        terminal.say(f"the search before it takes about {clock(search['seconds'])}: {search['reason']}")
    terminal.evidence(found)
    if picture is not None:
        if found["card"] is None:
            terminal.say(f"no layer card is drawn: {found['recipe']['steps']} steps are too short a run for one")
        else:
            from lorafit.files import whole_file
            from lorafit.report import charts

            with whole_file(picture) as file:
                file.write_bytes(charts.png(charts.layer_card(found["card"])))
            terminal.say(f"the layer card is drawn in {picture}")
    terminal.finish(found)
