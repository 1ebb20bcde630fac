"""Tasks: what an adapter is trained to give, from the data to the words of the report. One file per task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorafit.bases import locate
from lorafit.errors import AdapterError
from lorafit.heads import classification, completion
from lorafit.heads.head import Head as Head

if TYPE_CHECKING:
    from lorafit.adapters.adapter import Adapter

HEADS: dict[str, Head] = {head.name: head for head in (completion.HEAD, classification.HEAD)}


def head_of_adapter(adapter: Adapter) -> Head:
    """The task of an adapter. Raises AdapterError for one that a later version of lorafit has."""
    name = adapter.classes.task if adapter.classes else completion.HEAD.name
    if name not in HEADS:
        raise AdapterError(f"this adapter is for the task '{name}', which this lorafit does not know: use a newer one")
    return HEADS[name]


def opened_with(head: Head, labels: Sequence[str]) -> dict[str, Any]:
    """The arguments with which `open_base` opens a base for a task with these outputs."""
    return {"labels": len(labels), "opening": head.opening} if head.opening else {}


def opened_for(adapter: Adapter) -> dict[str, Any]:
    """The arguments with which `open_base` opens the base of an adapter."""
    return opened_with(head_of_adapter(adapter), adapter.classes.labels if adapter.classes else ())


def head_for(task: str, base: str) -> Head:
    """The task of a run. task: as set; `auto` for the one that the base can do."""
    if task == "auto":
        return classification.HEAD if locate.encodes(base) else completion.HEAD
    return HEADS[task]
