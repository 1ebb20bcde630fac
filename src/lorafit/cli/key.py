"""lorafit key: who may ask a server what."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def create(
    name: Annotated[str, typer.Argument(help="Whose key it is: told in the log, never the key.")],
    keys: Annotated[Path, typer.Option(help="The file of keys, as hashes.")],
    scope: Annotated[list[str] | None, typer.Option(help="What it may: infer, admin; may be repeated.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="A pattern of names it may ask, the base's among them; may be repeated.")
    ] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Requests a minute.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens a minute, of prompts and answers.")] = None,
) -> None:
    """Make a key for lorafit serve, and print it: this once, for the file holds its hash alone.

    \b
    lorafit key create website --keys keys.json --adapter returns --requests 600
    """
    from lorafit.server import keys as known

    print(known.create(keys, name, scope or ["infer"], adapter or ["*"], requests, tokens))
    print(f"kept as a hash in {keys}: a server that reads it takes the key within seconds", file=sys.stderr)
