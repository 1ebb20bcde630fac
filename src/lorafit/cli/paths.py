"""What a verb is given is looked at before a library of weight is imported: a misspelt path is reported at once."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from lorafit.adapters.folder import adapter_folder, require_adapter_folder
from lorafit.bases import locate
from lorafit.data.columns import columns_named
from lorafit.data.reading import require_data
from lorafit.files import text_of
from lorafit.runs.tracking import require_tracker
from lorafit.settings import settings_from


def require(
    *,
    base: str | None = None,
    data: str | Path | None = None,
    adapters: Iterable[str | Path | None] = (),
    settings: Mapping[str, Any] | None = None,
) -> None:
    """Check arguments that a library function would refuse later. None is nothing to check.

    Args:
        base: the name of a base.
        data: examples: a file, a folder, or the built-in set.
        adapters: adapter folders, or runs.
        settings: fields of TrainSettings.

    Raises:
        LorafitError: what the library function would raise.
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
    if base is not None:
        locate.require(base)
    if data is not None:
        require_data(data)
