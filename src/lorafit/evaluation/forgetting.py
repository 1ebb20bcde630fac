"""Forgetting: NLL of general text with the adapter and without, and what a weaker or stronger one would trade."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from lorafit.adapter import Adapter
from lorafit.attachment import attach
from lorafit.base import Base
from lorafit.data.render import Row
from lorafit.errors import SettingsError
from lorafit.evaluation.compare import nll_score
from lorafit.evaluation.nll import example_nll
from lorafit.files import text_of
from lorafit.records import NllScore
from lorafit.tasks.completion import Way

SCALES = (0.5, 0.75, 1.25)  # beside 1
LONGEST, MOST = 256, 100  # tokens of a piece; pieces read of a text
BUILTIN = "general.txt"


@dataclass(frozen=True)
class Trade:
    """An adapter that counts `scale` times: mean NLL of the validation examples, and of each general text."""

    scale: float
    validation: float
    general: dict[str, float]


@dataclass(frozen=True)
class Forgetting:
    """general: base against adapter on each general text, by its source. trades: by scale, that of the adapter itself
    among them; validated: on so many validation examples."""

    general: dict[str, NllScore]
    trades: tuple[Trade, ...]
    validated: int


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


def general_rows(tokenizer: Any, paragraphs: Sequence[str], context: int | None) -> list[Row]:
    """A row for every paragraph, several for a long one, MOST in all, spread; all tokens but the first count."""
    width = min(LONGEST, context or LONGEST)
    pieces = [
        ids[start : start + width]
        for paragraph in paragraphs
        for ids in [tokenizer(paragraph, add_special_tokens=True)["input_ids"]]
        for start in range(0, len(ids), width)
    ]
    whole = [ids for ids in pieces if len(ids) > 1]
    spread = whole[:: -(-len(whole) // MOST)] if whole else []
    return [Row(tuple(ids), (False, *[True] * (len(ids) - 1)), i) for i, ids in enumerate(spread)]


def forgetting(
    base: Base, adapter: Adapter, general: Mapping[str, Sequence[Row]], valid: Sequence[Row], way: Way,
    watch: Callable[[int, int], None] = lambda done, of: None,
) -> Forgetting:  # fmt: skip
    """general: rows by source. valid: validation rows on which the scales are compared; where a variant has more than A
    and B there is but one scale, for what it adds has none."""
    scales = sorted({1.0, *SCALES}) if all(slot.is_pair for slot in adapter.plan.slots) else [1.0]
    texts = {"": valid, **general}
    steps, done = len(general) + len(texts) * len(scales), 0
    watch(0, steps)

    def scored(on: Sequence[Row]) -> list[float]:
        nonlocal done
        found = example_nll(base, on, way=way)
        done += 1
        watch(done, steps)
        return found

    before = {source: scored(rows) for source, rows in general.items()}
    found: dict[float, dict[str, list[float]]] = {}
    for scale in scales:
        with attach(base, scaled(adapter, scale)):
            found[scale] = {source: scored(rows) for source, rows in texts.items()}
    trades = []
    for scale, each in found.items():
        means = {source: sum(values) / len(values) for source, values in each.items()}
        trades.append(Trade(scale, means.pop(""), means))
    scores = {source: nll_score(before[source], found[1.0][source], [None] * len(before[source])) for source in general}
    return Forgetting(scores, tuple(trades), len({row.example for row in valid}))


def scaled(adapter: Adapter, by: float) -> Adapter:
    """The adapter whose pairs count `by` times what they did."""
    slots = tuple(replace(slot, alpha=by * slot.alpha) for slot in adapter.plan.slots)
    return replace(adapter, plan=replace(adapter.plan, slots=slots))
