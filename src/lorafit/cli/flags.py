"""Flags made from the settings, so that a setting is declared once."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable, Sequence
from functools import wraps
from pathlib import Path
from typing import Annotated, Any

import typer

from lorafit.errors import SettingsError
from lorafit.settings import BY_RULE, RunFile, read_run_file

JSON = Annotated[bool, typer.Option("--json", help="Make the last line of output one JSON object.")]
BASE = Annotated[str | None, typer.Argument(metavar="BASE", help=RunFile.model_fields["base"].description)]
DATA = Annotated[str | None, typer.Argument(metavar="DATA", help=RunFile.model_fields["data"].description)]
NAMED = Annotated[
    list[str] | None,
    typer.Argument(metavar="[NAME=ADAPTER]...", help="Adapters by name: each is a run or an adapter folder."),
]
OUT = Annotated[
    str | None,
    typer.Option(
        "--out",
        "-o",
        help=f"{RunFile.model_fields['out'].description} [default: {RunFile.model_fields['out'].default}]",
    ),
]
CONFIG = Annotated[
    Path | None, typer.Option("--config", "-c", help="A TOML file of settings ('lorafit settings'); flags override it.")
]
UNKNOWN_BASE = Annotated[
    bool, typer.Option("--accept-unknown-base", help="Accept an adapter that does not name its base.")
]


def by_name(given: Sequence[str] | None, what: str) -> dict[str, str]:
    """The values of a repeated option NAME=WHAT, by name."""
    found = {}
    for one in given or []:
        name, equals, value = one.partition("=")
        if not equals or not name or not value:
            raise SettingsError(f"{one}: not NAME={what}: give a name, an equals sign, and what it names")
        found[name] = value
    return found


def require_folder_of_adapters(folder: Path | None) -> None:
    if folder is not None and not folder.is_dir():
        raise SettingsError(f"--adapters {folder}: there is no such folder: make it, and put adapters into it")


def with_settings(*chosen: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace the parameter `settings` of a verb by one flag per setting. The verb receives the settings that were
    given as flags or in the file of its parameter `config`; the file may also give `base`, `data` and `out`. A
    parameter `typed` receives the names of the settings that were given as flags.

    Args:
        chosen: The settings that get a flag; by default all.
    """
    names = chosen or tuple(name for name in RunFile.model_fields if name not in {"base", "data", "out"})

    def change(command: Callable[..., None]) -> Callable[..., None]:
        own = [
            p
            for p in inspect.signature(command, eval_str=True).parameters.values()
            if p.name not in {"settings", "typed"}
        ]
        flags = [_flag(name) for name in names]

        @wraps(command)
        def run(**kwargs: Any) -> None:
            config = kwargs.pop("config", None)
            named = read_run_file(config) if config else {}
            for name in ("base", "data", "out"):
                default = named.pop(name, RunFile.model_fields[name].default)
                if name in kwargs and kwargs[name] is None:
                    kwargs[name] = default
            missing = [p.name for p in own if p.annotation in (BASE, DATA) and kwargs[p.name] is None]
            if missing and not kwargs.get("resume"):  # a resumed run knows both
                raise SettingsError(
                    " and ".join(name.upper() for name in missing)
                    + ": missing: name "
                    + ("it" if len(missing) == 1 else "them")
                    + " on the command line, or in a file "
                    "given with -c"
                )
            given = {name: kwargs.pop(name) for name in names}
            typed = {name: value for name, value in given.items() if value is not None}
            if "typed" in inspect.signature(command).parameters:
                kwargs["typed"] = frozenset(typed)
            command(**kwargs, settings=named | typed)

        taken = [*own, _CONFIG, *flags]
        run.__signature__ = inspect.Signature(taken)  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in taken}
        return run

    return change


_CONFIG = inspect.Parameter("config", inspect.Parameter.KEYWORD_ONLY, default=None, annotation=CONFIG)


def _flag(name: str) -> inspect.Parameter:
    field = RunFile.model_fields[name]
    plain = [kind for kind in typing.get_args(field.annotation) if kind is not type(None)] or [field.annotation]
    kind: Any = field.annotation if typing.get_origin(field.annotation) is typing.Literal else plain[0]
    if typing.get_origin(kind) is tuple:
        kind = list[str]
    default = "by rule" if name in BY_RULE else field.default
    if kind is bool:
        default = None  # off, as any switch
    text = f"{field.description}" + (f" [default: {default}]" if default is not None else "")
    flag = "--" + name.replace("_", "-")
    flag = f"{flag}/--no-{flag[2:]}" if kind is bool else flag
    option = typer.Option(flag, help=text, show_default=False, rich_help_panel="Settings")
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )
