"""The command line: one file per verb, each a thin shell over one library function. Imports of weight are in the
verbs, so that --help answers at once."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

import lorafit
from lorafit.cli import bases, chat, data, demo, doctor, evaluate, explain, plan, show, train
from lorafit.errors import InputError, Interrupted, LorafitError

app = typer.Typer(
    name="lorafit",
    help="Fit low-rank adapters to your task, prove that they help, leave the base untouched.\n\nFirst: lorafit demo",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _reported(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb, with errors told in words and by exit status: 2 bad input, 1 our fault, 130 interrupted."""

    @wraps(verb)
    def run(*args: Any, **kwargs: Any) -> None:
        try:
            verb(*args, **kwargs)
        except LorafitError as error:
            _say(str(error))
            sys.exit(2 if isinstance(error, InputError) else 130 if isinstance(error, Interrupted) else 1)
        except OSError as error:
            if error.filename is None:
                raise
            _say(f"{error.filename}: {error.strerror}: check the path and its permissions")
            sys.exit(2)
        except KeyboardInterrupt:
            _say("interrupted")
            sys.exit(130)

    return run


def _say(text: str) -> None:
    from lorafit.cli.console import end_bars

    end_bars()
    print(f"lorafit: {text}", file=sys.stderr)


def _version(asked: bool) -> None:
    if asked:
        print(f"lorafit {lorafit.__version__}")
        raise typer.Exit


@app.callback()
def _start(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and leave.", is_eager=True, callback=_version)
    ] = False,
) -> None: ...


for _name, _verb in (
    ("data", data.data),
    ("plan", plan.plan),
    ("train", train.train),
    ("eval", evaluate.evaluate),
    ("chat", chat.chat),
    ("show", show.show),
    ("demo", demo.demo),
    ("doctor", doctor.doctor),
    ("bases", bases.bases),
    ("explain", explain.explain),
):
    app.command(_name)(_reported(_verb))


def main() -> None:
    """Entry point of the command. A terminal or pipe that lacks a character shows another in its place."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app()
