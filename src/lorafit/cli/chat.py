"""lorafit chat: a conversation in the terminal."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer


def chat(
    adapter: Annotated[Path | None, typer.Argument(help="An adapter folder, or a run; none: the bare base.")] = None,
    base: Annotated[str | None, typer.Option(help="The base; by default the adapter's, else smollm2-135m.")] = None,
    system: Annotated[str | None, typer.Option(help="System prompt; by default the one it was trained with.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    accept_unknown_base: Annotated[
        bool, typer.Option("--accept-unknown-base", help="Attach an adapter that does not say whose it is.")
    ] = False,
) -> None:
    """Talk to an adapter and its base, rendered as it was trained. /help says what else can be typed.

    \b
    lorafit chat runs/mine
    """
    from lorafit.base import open_base
    from lorafit.chat import HELP, Chat
    from lorafit.cli.console import Terminal
    from lorafit.errors import InputError
    from lorafit.formats import peft

    terminal = Terminal(False)
    name = base or (adapter and peft.read(peft.adapter_folder(adapter)).base_name) or "smollm2-135m"
    talk = Chat(open_base(name, None, terminal.say, terminal.watch), system, max_new_tokens, accept_unknown_base)
    if adapter is not None:
        talk.add(adapter)
    asked = sys.stdin.isatty()
    if asked:
        _edit_lines()
        terminal.say(f"answering: {' and '.join(talk.speaking)}\n{HELP}")
    while True:
        try:
            line = input("> " if asked else "").strip()
        except (EOFError, KeyboardInterrupt):
            break
        if not line:
            continue
        if line in {"/quit", "/exit"}:
            break
        try:
            if line.startswith("/"):
                terminal.say(talk.command(line))
            else:
                talk.ask(line, _write, lambda who: _write(f"{who}: " if len(talk.speaking) > 1 else ""), _end)
        except KeyboardInterrupt:
            _write("\n")
        except InputError as error:  # a mistake in one line does not end the conversation
            terminal.say(str(error))


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _end() -> None:
    _write("\n")


def _edit_lines() -> None:
    """Arrow keys and earlier lines at the prompt, where the system has readline."""
    try:
        import readline  # noqa: F401
    except ImportError:
        return
