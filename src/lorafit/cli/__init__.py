"""The command line: one file per verb, each a thin shell over one library function. Imports of weight are in the
verbs, so that --help answers at once."""

from __future__ import annotations

import io
import sys
from collections.abc import Callable
from functools import wraps
from typing import Any

import typer

from lorafit.cli import data, demo, evaluate, plan, show, train
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
            print(f"lorafit: {error}", file=sys.stderr)
            sys.exit(2 if isinstance(error, InputError) else 130 if isinstance(error, Interrupted) else 1)
        except OSError as error:
            if error.filename is None:
                raise
            print(f"lorafit: {error.filename}: {error.strerror}: check the path and its permissions", file=sys.stderr)
            sys.exit(2)
        except KeyboardInterrupt:
            print("lorafit: interrupted; what was saved is kept, a run goes on with --resume", file=sys.stderr)
            sys.exit(130)

    return run


for _name, _verb in (
    ("data", data.data),
    ("plan", plan.plan),
    ("train", train.train),
    ("eval", evaluate.evaluate),
    ("show", show.show),
    ("demo", demo.demo),
):
    app.command(_name)(_reported(_verb))


def main() -> None:
    """Entry point of the command. A terminal or pipe that lacks a character shows another in its place."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
    app()
