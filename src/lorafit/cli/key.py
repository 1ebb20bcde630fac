"""lorafit key: keys with the rights to use a server."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def create(
    name: Annotated[str, typer.Argument(help="A name for the key; logs show the name, never the key.")],
    keys: Annotated[Path, typer.Option(help="The file of keys; it stores only hashes.")],
    scope: Annotated[list[str] | None, typer.Option(help="Its scopes: infer, admin; may be repeated.")] = None,
    adapter: Annotated[
        list[str] | None, typer.Option(help="A pattern of adapters (or the base) it may use; may be repeated.")
    ] = None,
    requests: Annotated[int | None, typer.Option(min=1, help="Requests per minute.")] = None,
    tokens: Annotated[int | None, typer.Option(min=1, help="Tokens per minute, of prompts and answers.")] = None,
) -> None:
    """Create a key for lorafit serve and print it. It is shown only once: the file stores its hash.

    \b
    lorafit key create website --keys keys.json --adapter returns --requests 600
    """
    from lorafit.server import keys as known

    print(known.create(keys, name, scope or ["infer"], adapter or ["*"], requests, tokens))
    print(f"stored as a hash in {keys}; a running server accepts the key within seconds", file=sys.stderr)
