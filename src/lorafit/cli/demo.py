"""lorafit demo: a whole run on the built-in base and data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorafit.cli.flags import JSON


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="The run folder to write.")] = Path("runs/demo"),
    json: JSON = False,
) -> None:
    """Train an adapter on the handbook of an invented company, and test what it has learnt.

    On two cores this takes five minutes if the processor multiplies bf16, and up to 25 minutes otherwise. It prints an
    estimate before it trains.
    """
    from lorafit.cli.console import Terminal
    from lorafit.cli.paths import require
    from lorafit.cli.train import conclude
    from lorafit.jobs.demo import BASE, require_demo, run_demo

    terminal = Terminal(json)
    require(base=BASE)
    require_demo(out)
    conclude(terminal, run_demo(out, terminal), out, ["train smollm2-135m YOUR.jsonl --out runs/mine"])
