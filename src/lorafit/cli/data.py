"""lorafit data: check and describe examples before any model is opened."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from lorafit.cli.flags import DATA, JSON, with_settings


@with_settings("columns", "skip_bad", "system", "template", "seed", "val_share", "max_length")
def data(
    data: DATA = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Count tokens and show one example as this base sees them; 'none' for no base. [default: smollm2-135m]"
        ),
    ] = None,
    *,
    json: JSON = False,
    settings: dict[str, Any],
) -> None:
    """Check examples and describe them: counts, lengths, duplicates, overlap, one example as the model sees it.

    \b
    lorafit data my.jsonl
    lorafit data folder --base none --skip-bad
    """
    from lorafit.base import open_outline, require_base
    from lorafit.cli.console import Terminal
    from lorafit.pipeline import prepare, rendered
    from lorafit.settings import settings_from
    from lorafit.sources.builtin import is_at_hand

    assert data is not None  # with_settings sees to it
    base = base or "smollm2-135m"
    terminal, chosen = Terminal(json), settings_from(settings)
    shows = base != "none" and (base != "smollm2-135m" or is_at_hand(base))
    if shows:
        require_base(base)
    examples, report = prepare(data, chosen, terminal)
    tokens: dict[str, dict[str, int]] = {}
    if shows:
        rows = rendered(open_outline(base, terminal.say, terminal.watch), examples, chosen, terminal)[2]
        for name, split in rows.items():
            lengths = [len(row.ids) for row in split]
            tokens[name] = {"all": sum(lengths), "longest": max(lengths), "trained": sum(r.n_trained for r in split)}
            terminal.say(
                "{}: {:,} tokens, at most {:,} in an example, {:,} trained".format(name, *tokens[name].values())
            )
    terminal.say("the data are in order")
    terminal.finish({**asdict(report), "tokens": tokens})
