"""The command line: one file per verb, each a thin shell over one library function. Imports of weight are in the
verbs, so that --help answers at once."""

from __future__ import annotations

import sys

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
app.command("data")(data.data)
app.command("plan")(plan.plan)
app.command("train")(train.train)
app.command("eval")(evaluate.evaluate)
app.command("show")(show.show)
app.command("demo")(demo.demo)


def main() -> None:
    """Entry point. Exit status: 0 good, 2 bad input, 1 our fault, 130 interrupted."""
    try:
        app()
    except LorafitError as error:
        print(f"lorafit: {error}", file=sys.stderr)
        sys.exit(2 if isinstance(error, InputError) else 130 if isinstance(error, Interrupted) else 1)
    except KeyboardInterrupt:
        print("lorafit: interrupted; what was saved is kept, a training run goes on with --resume", file=sys.stderr)
        sys.exit(130)
    except BrokenPipeError:
        sys.exit(0)
