"""lorafit chat: a conversation in the terminal."""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lorafit.cli.flags import UNKNOWN_BASE

if TYPE_CHECKING:
    from lorafit.cli.console import Terminal
    from lorafit.server.client import Remote


def chat(
    adapter: Annotated[Path | None, typer.Argument(help="An adapter folder or a run; none: the bare base.")] = None,
    base: Annotated[str | None, typer.Option(help="The base; by default the adapter's, or smollm2-135m.")] = None,
    system: Annotated[
        str | None, typer.Option(help="System prompt, '' for none; by default the one from training.")
    ] = None,
    template: Annotated[
        list[str] | None, typer.Option(help="A setting of the chat template, for the bare base: NAME=VALUE.")
    ] = None,
    url: Annotated[str | None, typer.Option(help="Talk to a server instead, with the key in LORAFIT_KEY.")] = None,
    model: Annotated[str | None, typer.Option(help="With --url: the server's model to talk to.")] = None,
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Longest answer, in tokens.")] = 256,
    accept_unknown_base: UNKNOWN_BASE = False,
) -> None:
    """Talk to an adapter and its base, in the chat format of its training. /help lists the commands.

    \b
    lorafit chat runs/mine
    lorafit chat --url http://127.0.0.1:8000 --model returns
    """
    from lorafit.cli.console import Terminal
    from lorafit.cli.paths import require
    from lorafit.errors import InputError, SettingsError
    from lorafit.server.client import Remote
    from lorafit.settings import settings_from

    terminal = Terminal(False)
    if isinstance(sys.stdin, io.TextIOWrapper):
        sys.stdin.reconfigure(errors="surrogateescape")  # a line that is no text is refused, not the conversation
    if url is not None or model is not None:
        if url is None or adapter is not None or base is not None or template:
            raise SettingsError("--url: either a server answers or a base: give --url with --model, or a folder")
        _ask_server(Remote(url, model, os.environ.get("LORAFIT_KEY"), system, max_new_tokens), terminal)
        return
    require(base=base, adapters=(adapter,), writes=True)
    settings = settings_from({"template": template}).template_settings
    from lorafit.adapters.formats import peft
    from lorafit.bases.base import open_base
    from lorafit.jobs.chat import HELP, Chat

    name = base or (adapter and peft.read(peft.adapter_folder(adapter)).base_name) or "smollm2-135m"
    opened = open_base(name, None, terminal.say, terminal.watch)
    with Chat(opened, system, max_new_tokens, accept_unknown_base, settings) as talk:
        if adapter is not None:
            talk.add(adapter)
            if said := talk.remark():
                terminal.say(said)
        asked = sys.stdin.isatty()
        if asked:
            terminal.say(f"answering: {' and '.join(talk.speaking)}\n{HELP}")
        answered = refused = 0
        for line in _typed() if asked else map(str.strip, sys.stdin):
            if not line:
                continue
            if line in {"/quit", "/exit"}:
                break
            try:
                if line.startswith("/"):
                    terminal.say(talk.command(line))
                else:
                    talk.ask(line, _write, lambda who: _write(f"{who}: " if len(talk.speaking) > 1 else ""), _end)
                    answered += 1
            except KeyboardInterrupt:
                _write("\n")
            except InputError as error:  # a mistake in one line does not end the conversation
                terminal.say(str(error))
                refused += 1
        if refused and not (asked or answered):
            raise typer.Exit(2)


def _ask_server(talk: Remote, terminal: Terminal) -> None:
    from lorafit.errors import LorafitError

    if asked := sys.stdin.isatty():
        terminal.say(
            f"{talk.model} answers; the server has {', '.join(talk.models)}; /new starts over, /remember turns the "
            "memory of the conversation on or off, /quit exits"
        )
    if said := talk.remark():
        terminal.say(said)
    for line in _typed() if asked else map(str.strip, sys.stdin):
        if line in {"/quit", "/exit"}:
            break
        if line == "/new":
            talk.history.clear()
        elif line == "/remember":
            talk.remembers = not talk.remembers
            terminal.say(
                "it remembers the conversation" if talk.remembers else talk.remark() or "each is asked as sent"
            )
        elif line:
            try:
                talk.ask(line.encode(errors="replace").decode(), _write)
                _end()
            except KeyboardInterrupt:
                _end()
            except LorafitError as error:
                if not asked:
                    raise
                terminal.say(str(error))


def _write(piece: str) -> None:
    sys.stdout.write(piece)
    sys.stdout.flush()


def _end() -> None:
    _write("\n")


def _typed() -> Iterator[str]:
    """Lines from the keyboard, until Ctrl-D, or until a second Ctrl-C on an empty line."""
    at_prompt: Callable[[], str] = str  # nothing that could be known
    with suppress(ImportError):  # where the system has it: arrow keys and earlier lines, too
        import readline

        at_prompt = readline.get_line_buffer
    dropped = False
    while True:
        try:
            line = input("> ").strip()
        except EOFError:
            return
        except KeyboardInterrupt:
            if dropped and not at_prompt():
                return
            dropped = True
            _write("\n(line dropped; Ctrl-C again exits)\n")
            continue
        dropped = False
        yield line
