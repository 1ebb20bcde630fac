"""Reads texts without labels: a file goes in; its texts, with their places and the columns of their rows, come out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.data.columns import columns_named, joined
from lorafit.data.fields import UNUSED, is_empty
from lorafit.data.messages import is_text
from lorafit.data.readers import read_records
from lorafit.data.records import Record, text_of_file
from lorafit.errors import DataError, Problem, SettingsError

TEXT = "text"
FILL_IN = "fill it in, or leave the row out (--skip-bad)"


@dataclass(frozen=True)
class Text:
    """A text of a file.

    Args:
        where: `file:line`.
        text: The text.
        row: The columns of its row, as the file has them.
    """

    where: str
    text: str
    row: Mapping[str, Any]


def read_texts(path: str | Path, columns: Sequence[str] = ()) -> tuple[list[Text], list[Problem]]:
    """Read the texts of one file, and the problems of rows that have none.

    A .txt file has one text on each line that is not blank. Every other file is read as examples are, and its column
    `text` is taken; all other columns are kept as they are.

    Args:
        path: A file of any type that examples may have.
        columns: `text=COLUMN` or `text=TEMPLATE`, as in `read_examples`.

    Raises:
        DataError: The file cannot be read, or no row has a text.
        SettingsError: `columns` names another field than text.
    """
    path, problems = Path(path).expanduser(), list[Problem]()
    renamed, templates = columns_named(columns)
    if other := sorted({*renamed.values(), *templates} - {TEXT, UNUSED}):
        raise SettingsError(
            f"--columns {other[0]}=...: only the texts are read here: give text=COLUMN, or leave it out"
        )
    if path.is_dir():
        raise DataError([Problem(str(path), "a folder, where a file is meant", "give one file of texts", whole=True)])
    records = read_records(path, problems)
    if path.suffix.lower() == ".txt" and not problems:
        records = list(_lines(path))
    column = next((name for name, field in renamed.items() if field == TEXT), TEXT)
    wanted = [name for template in templates.values() for name in template.columns] or [column]
    names = list(dict.fromkeys(name for record in records for name in record.fields))
    if records and (lost := [name for name in wanted if name not in names]):
        fix = f"name one of its columns with --columns text=COLUMN: {', '.join(names[:12])}"
        problems.append(Problem(str(path), f"no column '{lost[0]}'", fix, whole=True))
    if any(problem.whole for problem in problems):
        raise DataError(problems)
    texts = []
    for record in records:
        given = joined([record], templates, renamed, problems)
        if given and (text := _text(given[0], TEXT if templates else column, problems)) is not None:
            texts.append(Text(record.where, text, record.fields))
    if not texts:
        raise DataError(problems)
    return texts, problems


def _text(record: Record, column: str, problems: list[Problem]) -> str | None:
    """The text of a record; None, and a problem, if it has none."""

    def wrong(what: str, fix: str, field: str) -> None:
        problems.append(Problem(f"{record.where}: {field}", what, fix))

    value = record.fields.get(column)
    if is_empty(value):
        wrong("empty", FILL_IN, column)
        return None
    return value if is_text(value, column, wrong) else None


def _lines(path: Path) -> Iterator[Record]:
    """The lines of a file of plain text that are not blank."""
    text = text_of_file(path, path.read_bytes(), []) or ""
    for number, line in enumerate(text.removeprefix("\ufeff").split("\n"), 1):
        if not is_empty(line):
            yield Record(f"{path}:{number}", {TEXT: line})
