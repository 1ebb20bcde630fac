"""The rows of `bench/train.py`, rendered once for all arms by lorafit's renderer."""

from __future__ import annotations

import csv
import gzip
import os
import random
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

from lorafit import Message, Renderer, read_examples, render
from lorafit.data.examples import Example

Pair = tuple[list[int], list[bool]]


class Absent(Exception):
    """A data set that is not here; says which, and how to name its folder."""


@dataclass(frozen=True)
class DataSet:
    """batch: examples per step. longest: tokens of a row. valid: rows that the arms are scored on."""

    about: str
    system: str
    batch: int
    longest: int
    valid: int
    read: Callable[[], tuple[Sequence[Example], Sequence[Example]]]


def _folder(name: str) -> Path:
    folder = Path(os.environ.get("LORAFIT_DATA", "../shared/data")) / name
    if not folder.is_dir():
        raise Absent(f"{folder} is not there: name the folder that holds {name} in LORAFIT_DATA")
    return folder


def _asked(prompt: str, completion: str, where: str) -> Example:
    return Example((Message("user", prompt), Message("assistant", completion)), where)


def _restaurants() -> tuple[Sequence[Example], Sequence[Example]]:
    """E2E NLG: a list of facts → a sentence, one sentence for each list."""
    folder = _folder("e2e_nlg")

    def read(lines: Iterable[str], name: str) -> list[Example]:
        texts = {row["mr"]: row["ref"] for row in csv.DictReader(lines)}
        return [_asked(mr, text, f"{name}:{i}") for i, (mr, text) in enumerate(sorted(texts.items()))]

    with gzip.open(folder / "trainset_rebuilt.csv.gz", "rt", encoding="utf-8") as file:
        train = read(file, "train")
    with (folder / "devset.csv").open(encoding="utf-8") as file:
        return train, read(file, "dev")


def _articles() -> tuple[Sequence[Example], Sequence[Example]]:
    """OneStop: the first two thirds of an article for elementary readers → the rest."""
    examples = []
    folder = _folder("onestop") / "Texts-SeparatedByReadingLevel" / "Ele-Txt"
    for path in sorted(folder.glob("*.txt")):
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        lines = [line.strip() for line in text.splitlines() if line.strip()]
        cut = max(1, 2 * len(lines) // 3)
        examples.append(_asked("\n".join(lines[:cut]), "\n".join(lines[cut:]), path.name))
    return [e for i, e in enumerate(examples) if i % 5], examples[::5]


def _help_desk() -> tuple[Sequence[Example], Sequence[Example]]:
    examples = read_examples("builtin")
    return examples.train, examples.valid


DATA = {
    "e2e": DataSet("E2E NLG: lists of facts to sentences", "Describe the restaurant.", 8, 512, 24, _restaurants),
    "long": DataSet("OneStop: articles continued", "Continue the article.", 2, 768, 4, _articles),
    "builtin": DataSet("the built-in help desk", "Help desk", 8, 512, 24, _help_desk),
}


def rows_of(name: str, renderer: Renderer, wanted: int, batch: int, valid: int) -> tuple[list[Pair], list[Pair]]:
    """Rows to train on, `wanted` or as many whole batches as there are, and rows to score; drawn with a seed."""
    data = DATA[name]
    chosen = []
    for examples, n in zip(data.read(), (wanted, valid), strict=True):
        pairs: dict[tuple[int, ...], Pair] = {}  # no row twice: arms tell rows apart by their ids
        for example in random.Random(0).sample(list(examples), len(examples)):
            (row,) = render(renderer, [example], 1 << 16)
            if len(row.ids) <= data.longest:
                pairs[row.ids] = (list(row.ids), list(row.trained))
            if len(pairs) == n:
                break
        chosen.append(list(pairs.values()))
    train, scored = chosen
    return train[: len(train) // batch * batch], scored


def random_rows(batch: int, lengths: tuple[int, int], vocabulary: int, wanted: int) -> list[Pair]:
    """Rows of random ids for a base with random weights; the last third of each is trained."""
    draw = random.Random(0)
    rows = []
    for _ in range(wanted // batch * batch):
        n = draw.randint(*lengths)
        rows.append(([draw.randrange(vocabulary) for _ in range(n)], [3 * i >= 2 * n for i in range(n)]))
    return rows
