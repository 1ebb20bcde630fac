"""lorafit data: check and describe examples before any model is opened."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from lorafit.cli.flags import JSON, with_settings


@with_settings("system", "seed", "val_share")
def data(
    path: Annotated[str, typer.Argument(help="A jsonl file, a folder with train/valid/test.jsonl, or 'builtin'.")],
    base: Annotated[
        str, typer.Option(help="Show one example as this base sees it; 'none' for no base.")
    ] = "smollm2-135m",
    *,
    json: JSON = False,
    settings: dict[str, Any],
) -> None:
    """Check examples and describe them: counts, lengths, duplicates, overlap, one example as the model sees it."""
    from lorafit.base import is_at_hand, open_tokenizer
    from lorafit.cli.console import Terminal
    from lorafit.data.render import Renderer
    from lorafit.data.report import describe
    from lorafit.pipeline import prepare
    from lorafit.settings import settings_from

    terminal, chosen = Terminal(json), settings_from(settings)
    examples = prepare(path, chosen.seed, chosen.val_share, terminal)
    if base != "none" and (base != "smollm2-135m" or is_at_hand(base)):
        renderer = Renderer(open_tokenizer(base, terminal.say), chosen.system)
        terminal.example(renderer.rows(examples.train[0], 0)[0], renderer)
    terminal.say("the data are in order")
    terminal.finish(asdict(describe(examples)))
