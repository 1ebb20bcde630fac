"""Checks the arguments of a verb before large libraries are imported, so that a misspelt path is reported at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lorafit.adapters.folder import adapter_folder, require_adapter_folder, require_writes
from lorafit.bases import locate
from lorafit.data.columns import columns_named
from lorafit.data.reading import require_data
from lorafit.files import text_of
from lorafit.heads import head_for
from lorafit.runs.tracking import require_tracker
from lorafit.settings import require_meant, settings_from


def require(
    *,
    base: str | None = None,
    data: str | Path | None = None,
    adapters: Iterable[str | Path | None] = (),
    settings: Mapping[str, Any] | None = None,
    trains: bool = False,
    writes: bool = False,
) -> None:
    """Check arguments that a library function would refuse later. None is not checked.

    Args:
        base: The name of a base.
        data: Examples: a file, a folder, or the built-in set.
        adapters: Adapter folders, or runs.
        settings: Fields of TrainSettings.
        trains: Whether the settings are for a new run, in which each must have an effect.
        writes: Whether the adapters must write text.

    Raises:
        LorafitError: The error that the library function would raise.
    """
    if settings is not None:
        resolved = settings_from(settings)
        require_tracker(resolved.report_to)
        columns_named(resolved.columns or ())
        if resolved.general:
            text_of(Path(resolved.general), "--general")
    for adapter in adapters:
        if adapter is not None:
            require_adapter_folder(adapter_folder(adapter))
            if writes:
                require_writes(adapter)
    if base is not None:
        resolved = settings_from(settings or {})
        head = head_for("completion" if settings is None else resolved.task, base)
        locate.require(base, head.opening)
        if trains:
            require_meant(resolved, head.idle, head.model)
    if data is not None:
        require_data(data)
