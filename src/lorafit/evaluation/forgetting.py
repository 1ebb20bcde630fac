"""Measures forgetting: the NLL of general text with the adapter and without it."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from importlib.resources import files
from pathlib import Path
from typing import Any

from lorafit.adapters.adapter import Adapter
from lorafit.attachment.adapters import attach
from lorafit.data.render import Row
from lorafit.errors import SettingsError
from lorafit.evaluation.compare import nll_score
from lorafit.evaluation.scores import NllScore
from lorafit.files import text_of
from lorafit.tasks.runner import Runner

LONGEST, MOST = 256, 100  # the most tokens of a row; the most rows of a text
BUILTIN = "general.txt"


def general_text(named: str | None = None) -> tuple[str, list[str]]:
    """The source of the general text, and its paragraphs. named: a file; None for the built-in pages."""
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
    """A row for every paragraph, several for a long one, and at most MOST in all, spread evenly. All tokens but the
    first count.

    Args:
        tokenizer: The base's tokenizer.
        paragraphs: The text.
        context: The most tokens that the model reads; None for no limit.
        vocabulary: The number of token ids for which the model has an embedding; None for all.

    Raises:
        SettingsError: The text has a token without an embedding.
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
    runner: Runner,
    adapter: Adapter,
    general: Mapping[str, Sequence[Row]],
    watch: Callable[[int, int], None] = lambda done, of: None,
    *,
    against: Adapter | None = None,
    accept_unknown_base: bool = False,
) -> dict[str, NllScore]:
    """NLL of general text without the adapter and with it.

    Args:
        runner: The adapter's base, and how it is run.
        adapter: The adapter.
        general: Rows of general text, by source.
        watch: Called with the number of texts that are scored, and of all texts.
        against: Another adapter to compare with; None for the bare base.
        accept_unknown_base: Attach adapters that do not say which base they belong to.

    Returns:
        The paired scores of base and adapter, by source.
    """
    done = 0
    watch(0, 2 * len(general))

    def scored(by: Adapter | None) -> dict[str, list[float]]:
        nonlocal done
        nll = {}
        with attach(runner.base, by, accept_unknown_base=accept_unknown_base) if by else nullcontext():
            for source, rows in general.items():
                nll[source] = runner.nll(rows)
                done += 1
                watch(done, 2 * len(general))
        return nll

    before, after = scored(against), scored(adapter)
    return {source: nll_score(before[source], after[source], [None] * len(before[source])) for source in general}
