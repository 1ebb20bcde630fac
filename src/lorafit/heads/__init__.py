"""Tasks: what an adapter is trained to give, from the data to the words of the report. One file per task."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from lorafit.bases import locate
from lorafit.data.targets import CALLED
from lorafit.errors import AdapterError
from lorafit.heads import classification, completion, embedding, entities, multilabel, regression
from lorafit.heads.head import Head as Head

if TYPE_CHECKING:
    from lorafit.adapters.adapter import Adapter
    from lorafit.data.examples import Examples

OF_TARGETS = (regression.HEAD, multilabel.HEAD, entities.HEAD, embedding.HEAD)
"""The tasks that are found by what the examples are to be given."""

HEADS: dict[str, Head] = {head.name: head for head in (completion.HEAD, classification.HEAD, *OF_TARGETS)}


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


def head_for(task: str, base: str, examples: Examples | None = None) -> Head:
    """The task of a run.

    Args:
        task: As set; `auto` for what the data are for, and the base can do.
        base: The name of the base.
        examples: The examples; None if they are not read yet, and only the base decides.
    """
    return HEADS[task] if task != "auto" else _found(base, examples)[0]


def why(task: str, base: str, examples: Examples) -> str | None:
    """The reason for the task of a run that was found; None for one that was set, and for answers, the usual one."""
    return _found(base, examples)[1] if task == "auto" else None


def _found(base: str, examples: Examples | None) -> tuple[Head, str | None]:
    every = [example for split in examples.by_name().values() for example in split] if examples else []
    for head in OF_TARGETS:
        if every and all(isinstance(example.target, head.target) for example in every):
            return head, f"the data are {CALLED[head.target]}"
    if locate.encodes(base):
        return classification.HEAD, "the base is an encoder, which writes no text"
    return completion.HEAD, None
