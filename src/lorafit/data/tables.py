"""Reads records from tables of text, in the dialect of the csv format that fits their first rows best."""

from __future__ import annotations

import csv
import io
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from lorafit.data.fields import is_harmless, is_heading, is_known
from lorafit.data.records import BOM, Record, text_of_file
from lorafit.errors import Problem

TAB, DELIMITERS = "\t", ",;\t|"
_LINE = re.compile(r"([^\r\n]*)(\r+\n|\r|\n|\Z)")
LOOKED_AT, PEEK = 200, 1 << 20  # rows and characters that decide the dialect of a table


def table_reader(delimiters: str) -> Callable[[Path, bytes, list[Problem]], Iterator[Record]]:
    """A reader of tables with one of these delimiters, a header and rows; quoted cells may hold line breaks."""

    def read(path: Path, raw: bytes, problems: list[Problem]) -> Iterator[Record]:
        text = text_of_file(path, raw, problems)
        if not text or not text.replace(BOM, "").strip():
            return
        changed = _changed_lines(raw)
        text = text.replace(BOM, "")
        above = len(text) - len(text.lstrip("\n"))
        text = text.lstrip("\n")
        head, _, below = text.partition("\n")
        if re.fullmatch(r"sep=.\s*", head):  # a spreadsheet's own first line
            dialect, text, above = _dialect(head[4], below), below, above + 1
        else:
            dialect = _dialect(delimiters, text)
            while text.startswith("#") and (dialect_below := _dialect_below_comment(delimiters, text, below)):
                dialect, text, above = dialect_below, below, above + 1
                below = text.partition("\n")[2]
        if re.match(r"[^\n]*\|[^\n]*\n[\s|:]*-[-\s|:]*(?:\n|$)", text):
            fix = "save it as csv, without the bars around it and the line of dashes"
            problems.append(Problem(f"{path}:{above + 1}", "a table as Markdown has it", fix, whole=True))
            return
        faults: list[Problem] = []
        records = list(_rows(path, text, above, dialect, faults, changed))
        if dialect.delimiter == TAB and (faults or _holds_breaks(records)):  # most tsv files quote nothing
            unquoted_faults: list[Problem] = []
            plain = replace(dialect, quoting=csv.QUOTE_NONE)
            unquoted = list(_rows(path, text, above, plain, unquoted_faults, changed))
            if not unquoted_faults or len(unquoted_faults) < len(faults):
                records, faults = unquoted, unquoted_faults
        problems += faults
        yield from records

    return read


def _holds_breaks(records: list[Record]) -> bool:
    """Whether a cell holds a tab or a line break, which end a cell in a file that quotes nothing."""
    return any("\t" in str(cell) or "\n" in str(cell) for record in records for cell in record.fields.values())


@dataclass(frozen=True)
class Dialect:
    """How a table is written.

    Args:
        delimiter: the character between two cells.
        blanks: whether spaces after a delimiter belong to no cell.
        quoting: a constant of the csv module.
    """

    delimiter: str
    blanks: bool = False
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL

    def rows(self, text: str) -> Any:
        """An iterator over the cells of each row; it raises csv.Error."""
        csv.field_size_limit(1 << 30)
        return csv.reader(
            io.StringIO(text, newline=""),
            delimiter=self.delimiter,
            strict=True,
            quoting=self.quoting,
            skipinitialspace=self.blanks,
        )

    def first(self, text: str) -> list[str]:
        """The cells of the first line; none where it is not a row."""
        try:
            return list(next(self.rows(text.partition("\n")[0]), []))
        except csv.Error:
            return []


def _dialect(delimiters: str, text: str) -> Dialect:
    """The dialect in which most of the first rows have as many cells as the header, the more cells the better. Quoted
    cells with a space before them count against a dialect."""

    def fit(dialect: Dialect) -> tuple[int, int]:
        first: list[list[str]] = []
        try:
            first.extend(islice(dialect.rows(text[:PEEK]), LOOKED_AT))
        except csv.Error:
            if len(text) <= PEEK or not first:  # else the end of a quoted cell may be cut off
                return (-1, 0)
        header, *rows = [row for row in first if row] or [[]]
        even = [row for row in rows if len(row) == len(header) > 1]
        odd = [row for row in [header, *rows] if any(re.match(r"\s+\".*\"\s*$", cell, re.DOTALL) for cell in row)]
        return (len(even) - len(odd), len(header))

    return max((Dialect(mark, blanks) for blanks in (False, True) for mark in delimiters), key=fit)


def _dialect_below_comment(delimiters: str, text: str, below: str) -> Dialect | None:
    """The dialect of the table below a first line that is a comment; None where that line is the header: it has as many
    cells as the next line that is not a comment, and is as likely to name fields."""
    table = re.sub(r"(?:#[^\n]*\n)*", "", below, count=1)
    dialect = _dialect(delimiters, table)
    first, header = dialect.first(text), dialect.first(table)
    if len(first) == len(header) and (any(map(is_known, first)) or not any(map(is_known, header))):
        return None
    return dialect


def delimiter_of(text: str) -> str:
    """The delimiter of a text that is a table: all names of its header are known, and every row has as many cells; ""
    for any other text."""
    dialect = _dialect(DELIMITERS, text)
    header = dialect.first(text.lstrip("\n"))
    if len(header) < 2 or not any(map(is_known, header)):
        return ""
    if not all(is_known(name) or is_harmless(name, name, None) or is_heading(name) for name in header):
        return ""
    try:
        rows = [row for row in dialect.rows(text) if row]
    except csv.Error:
        return ""
    return dialect.delimiter if len(rows) > 1 and all(len(row) == len(header) for row in rows) else ""


def _changed_lines(raw: bytes) -> bytes:
    """What becomes of each line of a file: 1 where its end is one of another system and becomes a line feed, 2 where it
    loses a byte order mark in its middle. Nothing for a file that stays as it is."""
    text = raw.decode()
    if "\r" not in text and BOM not in text[1:]:
        return b""
    lines = _LINE.findall(text)
    return bytes((end not in ("\n", "")) + 2 * (BOM in line[1:]) for line, end in lines)


def _rows(
    path: Path, text: str, above: int, dialect: Dialect, problems: list[Problem], changed: bytes
) -> Iterator[Record]:
    """The records of a table.

    Args:
        path: of the file, for places.
        text: from the header on.
        above: lines of the file before the header.
        dialect: of the table.
        problems: receives every row that cannot be a record.
        changed: as `_changed_lines` has it.
    """
    rows = dialect.rows(text)
    started = row = above  # row: as in a spreadsheet, where a cell of several lines takes one row
    hashes = text.count("\n# ")
    lines = text.split("\n") if 0 < hashes <= max(2, text.count("\n") // 50) else []  # where few rows begin with #
    try:
        names: list[str] = next(rows, [])
        row += 1
        blanks_after = any(name != name.rstrip() for name in names[:-1])
        blanks_before = any(name != name.lstrip() for name in names[1:])
        header = [name.strip() or f"column {i}" for i, name in enumerate(names, 1)]
        twice = sorted({name for name in header if header.count(name) > 1})
        if twice:
            what = f"two columns are named '{twice[0]}'"
            fix = "give every column a name of its own in the first line"
            problems.append(Problem(f"{path}:{above + 1}", what, fix, whole=True))
            return
        started = above + rows.line_num
        for cells in rows:
            row += 1
            where, begins, started = _place(path, row, started + 1), started, above + rows.line_num
            if not any(map(str.strip, cells)):
                continue
            if lines and lines[begins - above].startswith("# "):
                fix = "remove the line, or put its first cell in quotes if it is an example"
                problems.append(Problem(where, "begins with #, as comments do", fix))
                continue
            if blanks_after or blanks_before:  # in the header, so that they belong to no cell
                cells = [cell.strip() if blanks_after else cell.lstrip() for cell in cells]
            if len(cells) == len(header) > 1 and cells[0].strip() == header[0] and [*map(str.strip, cells)] == header:
                problems.append(Problem(where, "the header once more", "remove the line"))
            elif len(cells) == len(header):
                ends, marks = changed[begins : started - 1], changed[begins:started]  # its last line end is no cell's
                shifted = any(1 & one for one in ends) or any(2 & one for one in marks)
                yield Record(where, dict(zip(header, cells, strict=True)), shifted)
            else:
                what = f"{len(cells)} cells under {len(header)} column{'s' * (len(header) != 1)}"
                problems.append(Problem(where, what, _uneven(cells, header, dialect.delimiter)))
    except csv.Error as error:
        fix = "write a quote inside quotes twice"
        what = f"not a table ({error}), perhaps a quote that is not closed"
        problems.append(Problem(_place(path, row + 1, started + 1), what, fix, whole=True))


def _place(path: Path, row: int, line: int) -> str:
    """The place of a row of a table: its line, and its number too where the two differ."""
    return f"{path}:{line}" if row == line else f"{path}:row {row}, line {line}"


def _uneven(cells: list[str], header: list[str], delimiter: str) -> str:
    """What to do about a row with more or fewer cells than the header."""
    named = "a tab" if delimiter == TAB else f"'{delimiter}'"
    if len(cells) > len(header) > 1 and not any(map(str.strip, cells[len(header) :])):
        return f"remove the {named.removeprefix('a ')} at its end"
    if len(cells) < len(header):
        return f"cells are missing at its end: write {named} for each of them, even if it is empty"
    if len(header) == 1:
        return (
            f"if the first line, '{header[0][:40]}', is a title, remove it: the names of the columns come first; "
            f"else put cells that hold {named} in quotes"
        )
    return f"put cells that hold {named} or a line break in quotes"
