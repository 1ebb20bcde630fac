"""lorafit bases: the bases that open without a download, and their size on disk."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from lorafit.cli.flags import JSON

_REMAINS = {
    "broken": "broken: it does not open under its name",
    "unfinished": "left by a conversion that was interrupted, unless one is running",
}


def bases(
    remove: Annotated[
        str | None, typer.Option(help="Delete lorafit's converted copy of this base; it is made again when needed.")
    ] = None,
    json: JSON = False,
) -> None:
    """List the bases on this machine, where they are and how much disk they take."""
    from lorafit.bases import gguf
    from lorafit.cli.console import Terminal
    from lorafit.files import free_bytes, shown

    terminal = Terminal(json)
    gone = gguf.remove(remove) if remove is not None else []
    for path in gone:
        terminal.say(f"removed {path}")
    from lorafit.jobs.doctor import bases_at_hand

    found = bases_at_hand()
    for one in found:
        terminal.say(f"{one.name}  {one.where if one.bytes is None else shown(one.bytes)}")
        if one.bytes is not None:
            terminal.say(f"    {one.where}")
        if one.kind in _REMAINS:
            terminal.say(f"    {_REMAINS[one.kind]}: lorafit bases --remove {one.name}")
    cache = gguf.cache_folder()
    ours = sum(one.bytes or 0 for one in found if one.kind != "hub")
    terminal.say(
        f"converted copies take {shown(ours)} in {cache}, {shown(free_bytes(cache))} are free; lorafit bases --remove "
        "NAME deletes one; it is made again when needed"
    )
    terminal.say("other bases: any model folder in transformers' layout, any .gguf file, any ORG/NAME of the hub")
    terminal.finish(
        {
            "bases": [asdict(one) for one in found],
            "cache": str(cache),
            "cache_bytes": ours,
            "removed": [str(path) for path in gone],
        }
    )
