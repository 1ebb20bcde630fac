"""The command line: one file per verb, each a thin shell over one library function. Large libraries are imported inside
the verbs, so that --help answers at once."""

from __future__ import annotations

import errno
import io
import os
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

from lorafit.cli import (
    bases,
    chat,
    classify,
    data,
    demo,
    doctor,
    evaluate,
    explain,
    key,
    plan,
    refine,
    report,
    route,
    serve,
    settings,
    show,
    train,
    trim,
)
from lorafit.errors import LorafitError
from lorafit.version import __version__

WORDS = {  # phrases of the library that parses the flags, and their replacements
    r"Input should be a valid integer.*": "not a whole number",
    r"Input should be a valid number.*": "not a number",
    r"Input should be greater than or equal to (.*)": r"choose at least \1",
    r"Value error, (.*)": r"\1",
}


_TRAIN = "lorafit train BASE DATA trains an adapter"
_CHAT = "lorafit chat RUN asks an adapter, lorafit serve BASE NAME=RUN serves it"
_SHOW = "lorafit bases lists bases, lorafit show FOLDER describes a run or an adapter"
_FOLDER = (
    "RUN/adapter is already in PEFT's format, which vLLM and transformers read; lorafit explain export names other "
    "programs"
)
MEANT = {  # verbs of other programs, and messages that name the verbs of lorafit
    **dict.fromkeys(("list", "ls", "models", "runs"), _SHOW),
    **dict.fromkeys(("info", "status", "inspect"), _SHOW),
    "merge": f"merged weights are made in Python, lorafit.merged(base, adapter), as new tensors; {_FOLDER}",
    **dict.fromkeys(("export", "convert", "save", "push"), _FOLDER),
    **dict.fromkeys(("fit", "finetune", "fine-tune", "tune", "sft", "run", "start"), _TRAIN),
    "resume": "lorafit train --resume --out RUN resumes a run",
    **dict.fromkeys(
        ("evaluate", "test", "score", "benchmark"), "lorafit eval RUN DATA compares an adapter with its base"
    ),
    **dict.fromkeys(("ask", "generate", "predict", "infer", "inference", "prompt"), _CHAT),
    **dict.fromkeys(("label", "classification", "annotate"), "lorafit classify RUN FILE labels new texts"),
    **dict.fromkeys(("check", "validate", "dataset"), "lorafit data FILE checks examples"),
    **dict.fromkeys(("server", "deploy", "api"), _CHAT),
    **dict.fromkeys(("config", "init"), "lorafit settings > my.toml writes every setting to a file"),
    **dict.fromkeys(
        ("download", "pull"), "a base of the hub is fetched when it is first used, as by lorafit doctor ORG/NAME"
    ),
    "compare": "lorafit eval RUN DATA --against OTHER compares two adapters, lorafit report RUN OTHER two runs",
    **dict.fromkeys(("prune", "compress", "shrink"), "lorafit trim RUN --out FOLDER makes an adapter smaller"),
    **dict.fromkeys(("docs", "man", "guide"), "lorafit explain lists the guide, and answers questions from it"),
    "version": "lorafit --version",
}


class _Verbs(typer.core.TyperGroup):
    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        return super().parse_args(ctx, [*args[1:], "--help"] if args[:1] == ["help"] else args)

    def resolve_command(self, ctx: Any, args: list[str]) -> Any:
        word = args[0]
        if word not in self.commands:
            if meant := MEANT.get(word.lower()):
                ctx.fail(f"there is no verb '{word}': {meant}")
            if Path(word).exists():
                else_is = f", lorafit show {word} says what else it is" if Path(word).is_dir() else ""
                ctx.fail(f"'{word}' is no verb: lorafit data {word} checks examples{else_is}")
        return super().resolve_command(ctx, args)

    def invoke(self, ctx: Any) -> Any:
        try:
            return super().invoke(ctx)
        except typer.BadParameter as error:
            for theirs, ours in WORDS.items():
                error.message = re.sub(theirs, ours, error.message)
            raise


app = typer.Typer(
    name="lorafit",
    cls=_Verbs,
    help="Fit low-rank adapters to your task, prove that they help, and leave the base untouched.\n\n"
    "Start with: lorafit demo",
    context_settings={"help_option_names": ["-h", "--help"]},
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)


def _reported(verb: Callable[..., None]) -> Callable[..., None]:
    """The verb, with its errors as messages and exit status: 2 for bad input, 1 for a fault of lorafit, 130 for an
    interrupt."""

    @wraps(verb)
    def run(*args: Any, **kwargs: Any) -> None:
        shares = verb is train.train and not kwargs["dry_run"]
        if not shares and "TORCHELASTIC_RUN_ID" in os.environ and os.environ["WORLD_SIZE"] != "1":
            if os.environ["RANK"] == "0":
                _say("torchrun: only training shares its work among processes: start this without torchrun")
            sys.exit(2)
        try:
            verb(*args, **kwargs)
        except LorafitError as error:
            _say(str(error))
            sys.exit(error.status)
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
        print(f"lorafit {__version__}")
        raise typer.Exit


@app.callback()
def _start(
    version: Annotated[
        bool, typer.Option("--version", help="Print the version and exit.", is_eager=True, callback=_version)
    ] = False,
) -> None: ...


for _name, _verb, _summary in (
    ("demo", demo.demo, "Train and test an adapter on built-in data."),
    ("doctor", doctor.doctor, "Check this machine: what will be slow."),
    ("bases", bases.bases, "List the bases on this machine and their size."),
    ("data", data.data, "Check and describe your examples."),
    ("plan", plan.plan, "Show what a run would do and cost, and why."),
    ("train", train.train, "Train an adapter on your examples, and test it."),
    ("eval", evaluate.evaluate, "Compare an adapter with its base on other data."),
    ("classify", classify.classify, "Give new texts the labels of a classifier."),
    ("chat", chat.chat, "Talk to an adapter and its base."),
    ("serve", serve.serve, "Serve adapters through OpenAI's API."),
    ("route", route.route, "Show which adapter a question goes to."),
    ("report", report.report, "Write a page about a run, or compare runs."),
    ("show", show.show, "Show what is in a run, adapter, plan or base."),
    ("trim", trim.trim, "Make an adapter smaller."),
    ("refine", refine.refine, "Train one more round; keep it if it is better."),
    ("settings", settings.settings, "Print every setting, as a file."),
    ("explain", explain.explain, "Ask the guide: what LoRA is, what to choose."),
):
    app.command(_name, short_help=_summary)(_reported(_verb))

_keys = typer.Typer(help="Manage the keys of a server.", no_args_is_help=True, rich_markup_mode=None)
_keys.command("create", short_help="Make a key for lorafit serve.")(_reported(key.create))
app.add_typer(_keys, name="key", short_help="Manage the keys of a server.")


class _Stream:
    """A standard stream whose reader may end, such as a terminal or a pipe into `head`. The output is then dropped, and
    the run continues; other errors, such as a full disk, are raised."""

    def __init__(self, stream: io.TextIOWrapper):
        self._stream = stream

    def write(self, text: str) -> int:
        with _deserted():
            self._stream.write(text)
        return len(text)

    def flush(self) -> None:
        with _deserted():
            self._stream.flush()

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


@contextmanager
def _deserted() -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EPIPE, errno.EIO):
            raise


def main() -> None:
    """The entry point of the command. Characters that the terminal or pipe lacks are replaced."""
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="replace")
            setattr(sys, name, _Stream(stream))
    app()
