"""Flags made from TrainSettings, so that a setting is declared once."""

from __future__ import annotations

import inspect
import typing
from collections.abc import Callable
from functools import wraps
from typing import Annotated, Any

import typer

from lorafit.settings import TrainSettings

JSON = Annotated[bool, typer.Option("--json", help="Make the last line of output one JSON object.")]


def with_settings(*chosen: str) -> Callable[[Callable[..., None]], Callable[..., None]]:
    """Replace the parameter `settings` of a verb by one flag per setting (or per chosen one); it receives those that
    were given."""
    names = chosen or tuple(TrainSettings.model_fields)

    def change(command: Callable[..., None]) -> Callable[..., None]:
        @wraps(command)
        def run(**kwargs: Any) -> None:
            given = {name: kwargs.pop(name) for name in names}
            command(**kwargs, settings={name: value for name, value in given.items() if value is not None})

        own = [p for p in inspect.signature(command, eval_str=True).parameters.values() if p.name != "settings"]
        flags = [_flag(name) for name in names]
        run.__signature__ = inspect.Signature([*own, *flags])  # type: ignore[attr-defined]
        run.__annotations__ = {p.name: p.annotation for p in [*own, *flags]}
        return run

    return change


def _flag(name: str) -> inspect.Parameter:
    field = TrainSettings.model_fields[name]
    plain = [kind for kind in typing.get_args(field.annotation) if kind is not type(None)] or [field.annotation]
    kind: Any = field.annotation if typing.get_origin(field.annotation) is typing.Literal else plain[0]
    if typing.get_origin(kind) is tuple:
        kind = list[str]
    default = "by rule" if field.default is None and name not in {"system", "targets", "columns"} else field.default
    if kind is bool:
        default = None  # off, as any switch
    text = f"{field.description}" + (f" [default: {default}]" if default is not None else "")
    option = typer.Option("--" + name.replace("_", "-"), help=text, show_default=False, rich_help_panel="Settings")
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, option]
    )
