"""lorafit route: the adapter to which a question would go."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lorafit.cli.flags import JSON, NAMED, by_name, require_folder_of_adapters
from lorafit.errors import AdapterError, FormatError


def route(
    text: Annotated[str, typer.Argument(help="A question.")],
    adapter: NAMED = None,
    adapters: Annotated[Path | None, typer.Option(help="A folder of adapters, one folder NAME/ each.")] = None,
    base: Annotated[str | None, typer.Option(help="The base; by default the adapters'.")] = None,
    learn: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=DATA",
            help="Examples of the questions of an adapter that another program trained: the router learns from them. "
            "May be repeated.",
        ),
    ] = None,
    json: JSON = False,
) -> None:
    """Show which adapter `model: "auto"` sends a question to, and how sure the router is.

    \b
    lorafit route "How long may I keep the ladder?" --adapters adapters/
    lorafit route "My screen is black." it=runs/it returns=elsewhere/returns --learn returns=returns.jsonl
    """
    from lorafit.cli.console import Terminal
    from lorafit.cli.paths import require
    from lorafit.data.prepared import Unheard, prepare
    from lorafit.settings import settings_from

    terminal = Terminal(json)
    require_folder_of_adapters(adapters)
    named = {folder.name: folder for folder in sorted(adapters.iterdir()) if _is_adapter(folder)} if adapters else {}
    named |= {name: Path(folder) for name, folder in by_name(adapter, "ADAPTER").items()}
    given = by_name(learn, "DATA")
    require(base=base, adapters=named.values(), writes=True)
    if unknown := sorted({*given} - {*named}):
        raise AdapterError(f"--learn {unknown[0]}: there is no adapter of this name: give {unknown[0]}=ADAPTER too")
    for data in given.values():
        require(data=data)
    learnt = {name: prepare(data, settings_from({}), Unheard())[0] for name, data in given.items()}
    from lorafit.jobs.route import run_routing

    found = run_routing([text], named, base, learnt, terminal)
    told = found["texts"][0]
    width = max(map(len, told["scores"]))
    for name, score in sorted(told["scores"].items(), key=lambda item: -item[1]):
        terminal.say(f"  {name:<{width}} {score:>7.1%}  {'█' * round(30 * score)}")
    if told["adapter"]:
        terminal.say(f"goes to {told['adapter']}, which reaches the threshold of {found['threshold']:.0%}")
    else:
        terminal.say(f"goes to the base: no adapter reaches the threshold of {found['threshold']:.0%}")
    for name, why in found["left_out"].items():
        terminal.say(f"{name} is left out: {why}")
    terminal.finish(found)


def _is_adapter(folder: Path) -> bool:
    """Whether a server would serve this folder; it ignores everything else."""
    from lorafit.adapters.folder import adapter_folder, require_adapter_folder

    try:
        require_adapter_folder(adapter_folder(folder))
    except FormatError:
        return False
    return not folder.name.startswith(".")
