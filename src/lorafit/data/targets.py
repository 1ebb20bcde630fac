"""What belongs to a text, other than an answer or a label: a number, several labels, entities, or another text."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from typing import Any

LARGEST = 1e30  # the numbers that are learnt are smaller: their squares can be summed
NOTHING = "(none)"  # how no label at all is written


@dataclass(frozen=True)
class Number:
    """A number that belongs to a text."""

    value: float = 0.0

    @property
    def text(self) -> str:
        return written(self.value)


@dataclass(frozen=True)
class Names:
    """The labels of a text, sorted, each once; none, one or several."""

    names: tuple[str, ...] = ()

    @property
    def text(self) -> str:
        return ", ".join(self.names) or NOTHING


@dataclass(frozen=True)
class Span:
    """A part of a text, from the character `start` up to the one before `end`, with its label."""

    start: int
    end: int
    label: str


@dataclass(frozen=True)
class Spans:
    """The entities of a text, in order, without overlap."""

    spans: tuple[Span, ...] = ()


@dataclass(frozen=True)
class Pair:
    """A text has a partner, which is its answer."""


Target = Number | Names | Spans | Pair
CALLED: dict[type[Target], str] = {
    Number: "texts with a number",
    Names: "texts with a list of labels",
    Spans: "texts with entities",
    Pair: "pairs of texts",
}
FIELD: dict[type[Target], str] = {Number: "score", Names: "labels", Spans: "entities", Pair: "positive"}


def shown_spans(text: str, spans: tuple[Span, ...]) -> str:
    """The entities of a text as people read them."""
    return "; ".join(f"{text[one.start : one.end]}: {one.label}" for one in spans) or NOTHING


def written(value: float) -> str:
    """A number in as few digits as say it."""
    return json.dumps(int(value) if value == int(value) and abs(value) < 1e15 else value)


def number_in(value: Any) -> float | None:
    """The number that a value of a file holds, also NaN; None for anything else."""
    if isinstance(value, bool) or not isinstance(value, (int, float, str)):
        return None
    try:
        return float(value)
    except (ValueError, OverflowError):
        return None


def is_finite(value: Any) -> bool:
    """Whether a value of a file holds a finite number."""
    number = number_in(value)
    return number is not None and math.isfinite(number)
