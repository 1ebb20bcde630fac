"""lorafit plan: what a run would do, each number with its reason."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from lorafit.cli.flags import JSON, with_settings


@with_settings()
def plan(
    base: Annotated[str, typer.Argument(help="A model folder, a .gguf file, or smollm2-135m.")],
    data: Annotated[
        str, typer.Argument(help="A file of examples, a folder with train, valid and test files, or 'builtin'.")
    ],
    *,
    json: JSON = False,
    settings: dict[str, Any],
) -> None:
    """Print the plan of a run with its reasons: sites, rank, learning rate, steps. Trains nothing."""
    from dataclasses import asdict

    from lorafit.cli.console import Terminal
    from lorafit.pipeline import open_all
    from lorafit.settings import settings_from

    terminal = Terminal(json)
    opened = open_all(base, data, settings_from(settings), terminal)
    decision = opened.decision
    terminal.finish({
        "base": opened.base.name,
        "trainable_parameters": decision.plan.parameters,
        "bytes": decision.plan.bytes,
        "flops_per_token": decision.plan.flops_per_token,
        "recipe": asdict(decision.recipe),
        "choices": [asdict(choice) for choice in decision.choices],
        **decision.plan.to_json(),
    })  # fmt: skip
