"""lorafit data: check and describe examples before any model is opened."""

from __future__ import annotations

from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from lorafit.cli.flags import DATA, JSON, with_settings

if TYPE_CHECKING:
    from lorafit.cli.console import Terminal
    from lorafit.data.examples import Examples
    from lorafit.settings import TrainSettings

OF_A_BASE = ("system", "template", "task")  # settings that say how a base sees examples


@with_settings("columns", "skip_bad", "val_share", *OF_A_BASE, "max_length")
def data(
    data: DATA = None,
    base: Annotated[
        str | None,
        typer.Option(
            help="Also count tokens and show one example as this base sees them; 'none': ignore the base of a -c file. "
            "[default: none]"
        ),
    ] = None,
    *,
    json: JSON = False,
    settings: dict[str, Any],
    typed: frozenset[str],
) -> None:
    """Check examples and describe them: counts, lengths, duplicates, overlap. It opens no model and needs no base.

    \b
    lorafit data my.jsonl
    lorafit data my.jsonl --base smollm2-135m     # also counts tokens and shows an example
    lorafit data folder --skip-bad
    """
    from lorafit.cli.console import Terminal
    from lorafit.cli.paths import require
    from lorafit.data.prepared import prepare
    from lorafit.errors import SettingsError
    from lorafit.settings import settings_from

    assert data is not None  # with_settings sees to it
    base = None if base == "none" else base
    if base is None and (idle := [f"--{name.replace('_', '-')}" for name in OF_A_BASE if name in typed]):
        raise SettingsError(f"{' and '.join(idle)}: no effect without a base: add --base BASE")
    terminal, chosen = Terminal(json), settings_from(settings)
    require(base=base, data=data, settings=settings, trains=True)
    examples, report = prepare(data, chosen, terminal)
    tokens = {} if base is None else _seen_by(base, examples, chosen, terminal)
    lengths = "; lengths were not checked: --base BASE counts tokens, and shows an example as a model sees it"
    terminal.say("the data are in order" + ("" if base else lengths))
    terminal.finish({**asdict(report), "tokens": tokens})


def _seen_by(base: str, examples: Examples, settings: TrainSettings, terminal: Terminal) -> dict[str, dict[str, int]]:
    """Show the examples as a base sees them, and count their tokens by split."""
    from lorafit.bases.base import open_outline
    from lorafit.heads import head_for
    from lorafit.jobs.prepare import rendered

    tokens: dict[str, dict[str, int]] = {}
    head = head_for(settings.task, base, examples)
    labels = head.labels(examples)
    outline = open_outline(base, terminal.say, terminal.watch, head.opening)
    rows = rendered(outline, head, labels, examples, settings, terminal)[2]
    for name, split in rows.items():
        lengths = [len(row.ids) for row in split]
        tokens[name] = {"all": sum(lengths), "longest": max(lengths), "trained": sum(r.n_trained for r in split)}
        terminal.say("{}: {:,} tokens, at most {:,} in an example, {:,} trained".format(name, *tokens[name].values()))
    return tokens
