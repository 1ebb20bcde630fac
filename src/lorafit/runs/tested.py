"""The examples that a run was tested on, known by fingerprints, in every format of earlier versions."""

from __future__ import annotations

import hashlib
import json
from collections import Counter
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any

from lorafit.data.examples import Example
from lorafit.digests import canonical
from lorafit.errors import FormatError
from lorafit.runs.folder import ANSWERS, SCORES

Record = Mapping[str, Any]
NOW, BEFORE = (
    "example",
    "example_before",
)  # fields of a record: its fingerprint, and that of the earlier format if it differs


def example_digest(example: Example, written: Callable[[object], str] = canonical) -> str:
    """The fingerprint of everything in an example: system prompt, earlier turns, question, answer and tools. written:
    converts tools and calls to text; earlier versions used `repr`."""
    parts: list[object] = [(turn.role, turn.content, *filter(None, [turn.reasoning])) for turn in example.messages]
    parts += [written(part) for part in example.with_tools]
    return hashlib.sha256(json.dumps(parts).encode()).hexdigest()[:16]


def record_of(example: Example) -> dict[str, Any]:
    """The beginning of an example's record: fingerprint, question, reference and group."""
    now, before = example_digest(example), example_digest(example, repr)
    content = {"question": example.asked, "reference": example.answer, "group": example.group}
    return {NOW: now, **({BEFORE: before} if before != now else {}), **content}


def was_scored(example: Example, known: Set[str]) -> bool:
    """Whether an example is among the `known` ones, the result of `scored_in`."""
    record = record_of(example)
    return bool(known & {record[NOW], record.get(BEFORE, ""), _text(record)})


def scored_in(out: Path) -> frozenset[str]:
    """The fingerprints of this run's test examples; empty if there is no run, or if it has not been tested."""
    path = out / SCORES / ANSWERS
    lines = path.read_text(encoding="utf-8").split("\n")[:-1] if path.exists() else []
    try:
        return frozenset(record.get(NOW) or _text(record) for record in map(json.loads, lines))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise FormatError(
            f"{path}: damaged ({error}): move it elsewhere; further openings of this test are then not counted"
        ) from error


def matched(ours: Sequence[Record], theirs: Sequence[Record]) -> list[tuple[Record, Record]]:
    """Pairs of the records of two runs on the same example, in any order; empty if their tests differ."""
    formats: list[Callable[[Record], str]] = [
        lambda record: record[NOW],
        lambda record: record.get(BEFORE) or record[NOW],
    ]
    if not all(NOW in record for record in (*ours, *theirs)):  # the first version stored no fingerprint
        formats = [_text]
    for known_by in formats:
        a, b = _by(known_by, ours), _by(known_by, theirs)
        if a.keys() == b.keys():
            return [(a[key], b[key]) for key in a]
    return []


def _text(record: Record) -> str:
    return f"{record['question']}\0{record['reference']}"


def _by(known_by: Callable[[Record], str], records: Sequence[Record]) -> dict[tuple[str, int], Record]:
    """Records by fingerprint and a counter, which tells equal fingerprints apart."""
    before: Counter[str] = Counter()
    named = {}
    for name, record in sorted(((known_by(record), record) for record in records), key=lambda item: item[0]):
        named[name, before[name]] = record
        before[name] += 1
    return named
