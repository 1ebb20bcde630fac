"""Forgetting: NLL of general text with the adapter and without."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from importlib.resources import files
from pathlib import Path
from typing import Any

from lorafit.adapters.adapter import Adapter
from lorafit.attachment.adapters import attach
from lorafit.bases.base import Base
from lorafit.data.render import Row
from lorafit.errors import SettingsError
from lorafit.evaluation.compare import nll_score
from lorafit.evaluation.nll import example_nll
from lorafit.evaluation.scores import NllScore
from lorafit.files import text_of
from lorafit.tasks.completion import Way

LONGEST, MOST = 256, 100  # tokens of a piece; pieces read of a text
BUILTIN = "general.txt"


def general_text(named: str | None = None) -> tuple[str, list[str]]:
    """Where general text comes from, and its paragraphs: a file that is named, or our own few pages."""
    if named is None:
        text = files("lorafit.evaluation").joinpath(BUILTIN).read_text(encoding="utf-8")
        source = "the built-in pages"
    else:
        text, source = text_of(Path(named), "--general"), named
    paragraphs = [" ".join(part.split()) for part in text.split("\n\n") if len(part.split()) >= 5]
    if not paragraphs:
        raise SettingsError(f"--general {source}: holds no paragraph of five words or more: name a text of some pages")
    return source, paragraphs


def general_rows(
    tokenizer: Any, paragraphs: Sequence[str], context: int | None, vocabulary: int | None = None
) -> list[Row]:
    """A row for every paragraph, several for a long one, MOST in all, spread; all tokens but the first count.

    context: the most tokens the model reads. vocabulary: the token ids that it has a row for are below it; None: all.
    Raises SettingsError for a text with another.
    """
    width = min(LONGEST, context or LONGEST)
    pieces = [
        ids[start : start + width]
        for paragraph in paragraphs
        for ids in [tokenizer(paragraph, add_special_tokens=True)["input_ids"]]
        for start in range(0, len(ids), width)
    ]
    beyond = [i for ids in pieces for i in ids if vocabulary is not None and i >= vocabulary]
    if beyond:
        token = tokenizer.convert_ids_to_tokens(beyond[0])
        raise SettingsError(f"--general: holds {token!r}, for which the model of this base has no row: take it out")
    whole = [ids for ids in pieces if len(ids) > 1]
    spread = whole[:: -(-len(whole) // MOST)] if whole else []
    return [Row(tuple(ids), (False, *[True] * (len(ids) - 1)), i) for i, ids in enumerate(spread)]


def forgetting(
    base: Base,
    adapter: Adapter,
    general: Mapping[str, Sequence[Row]],
    way: Way,
    watch: Callable[[int, int], None] = lambda done, of: None,
    *,
    against: Adapter | None = None,
    accept_unknown_base: bool = False,
) -> dict[str, NllScore]:
    """NLL of general text without the adapter and with it.

    Args:
        base: the base the adapter belongs to.
        adapter: what may have made it forget.
        general: rows of text, by its source.
        way: how rows are computed.
        watch: called with the texts scored so far, of how many.
        against: what the adapter is compared with, in place of the bare base.
        accept_unknown_base: attach adapters that do not say which base they belong to.

    Returns:
        By source, base against adapter, paired by row.
    """
    done = 0
    watch(0, 2 * len(general))

    def scored(by: Adapter | None) -> dict[str, list[float]]:
        nonlocal done
        found = {}
        with attach(base, by, accept_unknown_base=accept_unknown_base) if by else nullcontext():
            for source, rows in general.items():
                found[source] = example_nll(base, rows, way=way)
                done += 1
                watch(done, 2 * len(general))
        return found

    before, after = scored(against), scored(adapter)
    return {source: nll_score(before[source], after[source], [None] * len(before[source])) for source in general}
