"""lorafit demo: the whole story on the built-in base and data."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorafit.cli.flags import JSON


def demo(
    out: Annotated[Path, typer.Option("--out", "-o", help="The run folder to write.")] = Path("runs/demo"),
    json: JSON = False,
) -> None:
    """Teach the built-in base the help desk of an invented company, and prove it, in under eight minutes."""
    from lorafit.cli.console import Terminal
    from lorafit.cli.train import conclude
    from lorafit.jobs.demo import run_demo

    terminal = Terminal(json)
    conclude(terminal, run_demo(out, terminal), out, ["train smollm2-135m YOUR.jsonl --out runs/mine"])
