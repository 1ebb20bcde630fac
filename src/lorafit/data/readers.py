"""Files of examples become records, one reader per kind of file: jsonl, json, csv, tsv, parquet, plain text.

A record is a mapping of fields with the place it came from. What cannot be a record goes to `problems`.
"""

from __future__ import annotations

import codecs
import csv
import gzip
import importlib.util
import io
import json
import re
import zlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from lorafit.data.fields import is_harmless, is_heading, is_known
from lorafit.errors import Problem
from lorafit.files import did_you_mean

TAB, DELIMITERS = "\t", ",;\t|"
LOOKED_AT, PEEK = 200, 1 << 20  # rows and characters by which the dialect of a table is told
PIECE = 2000  # characters of plain text that make one example, rounded up to whole paragraphs
LINE_END = re.compile(r"\r+\n|\r")  # of other systems
MARK = "\ufeff"  # the byte order mark
ARCHIVES = (".bz2", ".xz", ".zst", ".7z", ".rar", ".tar", ".tgz", ".lz4")


@dataclass(frozen=True)
class Record:
    """One row of a file. `where` is `file:line`, or `file:row N, line L` where cells above hold line breaks."""

    where: str
    fields: dict[str, Any]


def kinds() -> tuple[str, ...]:
    """Endings of the files that are read; each may be followed by .gz."""
    return tuple(READERS)


def read_records(path: Path, problems: list[Problem]) -> list[Record]:
    """All records of one file, by its ending; one of another ending is read as jsonl."""
    before = len(problems)

    def refuse(what: str, fix: str) -> list[Record]:
        problems.append(Problem(str(path), what, fix, whole=True))
        return []

    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        if path.is_symlink():
            return refuse(f"a link to {path.readlink()}, which is not there", "correct the link, or remove it")
        return refuse("there is no such file", did_you_mean(path, "check the path"))
    except IsADirectoryError:
        return refuse("a folder, where a file is meant", "move what is in it one level up, or rename it")
    except OSError as error:
        return refuse(f"cannot be read ({error.strerror})", "check its permissions")
    ending = path.suffix.lower()
    if ending == ".gz":
        ending = path.with_suffix("").suffix.lower()
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            return refuse(f"cannot be unpacked ({error})", "copy it again, it may be half a copy")
    if raw[:2] == b"\x1f\x8b":
        return refuse("packed by gzip, which its name does not say", f"rename it to {path.name}.gz")
    if ending in ARCHIVES:
        return refuse("a packed file", "unpack it, and give what is in it")
    if raw[:4] == b"PK\x03\x04":  # so do workbooks begin
        workbook = ending.startswith((".xls", ".ods"))
        fix = "save the sheet as 'CSV UTF-8'" if workbook else "unpack it, and give what is in it"
        return refuse("a workbook, not a csv file" if workbook else "a zip archive", fix)
    if ending != ".parquet" and b"\x00" in raw[:4096]:
        wide = next((name for mark, name in WIDE.items() if raw.startswith(mark)), None)
        fix = "save it as UTF-8" if wide else f"give one of {', '.join(READERS)}"
        return refuse(f"{wide}, not UTF-8" if wide else "a binary file", fix)
    if ending != ".parquet":
        raw = raw.replace(codecs.BOM_UTF8, b"")  # joined files have some in the middle
    begins = raw.lstrip()[:1]
    if ending not in READERS and begins != b"{":
        fix = f"copy it to {path.stem}.txt if it is plain text to be learnt whole, or give one of {', '.join(READERS)}"
        return refuse(f"of no kind that is read ({ending or 'its name has no ending'})", fix)
    if ending in TEXTS and _is_json(raw):
        meant = "plain text" if ending == ".txt" else "a table"
        return refuse(f"JSON in a file that is called {meant}", f"rename it to {path.stem}.jsonl")
    if ending == ".txt" and (delimiter := _delimiter_of(raw.decode(errors="replace"))):
        fix = f"rename it to {path.stem}.{'tsv' if delimiter == TAB else 'csv'}"
        return refuse("a table in a file that is called plain text", fix)
    found = READERS.get(ending, _jsonl)(path, raw, problems)
    # The text of a table is clean by now; values of JSON and parquet may hold other line ends and marks.
    records = list(found) if ending in TEXTS else [Record(one.where, _clean(one.fields)) for one in found]
    if not records and len(problems) == before:
        return refuse("no examples in it", "write at least one")
    return records


def _is_json(raw: bytes) -> bool:
    """Whether the first line is a JSON object, or a list of objects begins."""
    begins = raw.lstrip()
    if re.match(rb'\[\s*\{\s*"', begins):
        return True
    try:
        return isinstance(json.loads(begins.partition(b"\n")[0]), dict)
    except (ValueError, RecursionError):
        return False


def _clean(value: Any) -> Any:
    """The same with one kind of line end and without byte order marks."""
    if isinstance(value, str):
        return LINE_END.sub("\n", value.replace(MARK, "")) if "\r" in value or MARK in value else value
    if isinstance(value, dict):
        return {_clean(name): _clean(held) for name, held in value.items()}
    return [_clean(held) for held in value] if isinstance(value, list) else value


def _text(path: Path, raw: bytes, problems: list[Problem]) -> str | None:
    """The file as text with one kind of line end; the first line that is not UTF-8 is named."""
    try:
        text = raw.decode()
        text = text.replace("\r\n", "\n")  # alone it is four times as fast as with the rarer ones
        return LINE_END.sub("\n", text) if "\r" in text else text
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        problems.append(_not_utf8(f"{path}:{line}", raw[error.start], whole=True))
        return None


def _not_utf8(where: str, byte: int, whole: bool = False) -> Problem:
    """The first byte that cannot be, and what it would be in the encoding that most such files have."""
    letter = bytes([byte]).decode("cp1252", errors="ignore")
    meant = f", which is {letter} in Windows-1252" if letter else ""
    fix = "save the file as UTF-8 (Excel: 'CSV UTF-8'; a shell: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW)"
    return Problem(where, f"not UTF-8 (byte 0x{byte:02x}{meant})", fix, whole)


def _jsonl(path: Path, raw: bytes, problems: list[Problem]) -> Iterator[Record]:
    if raw.lstrip()[:1] == b"[":
        yield from _json(path, raw, problems)
        return
    if re.match(rb"\s*\{\s*[\r\n]", raw):
        fix = "write one JSON object per line (jq -c . OLD > NEW)"
        problems.append(Problem(f"{path}:1", "JSON objects over several lines", fix, whole=True))
        return
    lines = re.split(rb"\r\n|\n|\r", raw)  # not splitlines: JSON strings may hold other separators
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = _loaded(line.decode())
        except UnicodeDecodeError as error:
            problems.append(_not_utf8(where, line[error.start]))
        except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
            problems.append(Problem(where, *_not_json(line.decode(), error, last=number == len(lines))))
        else:
            yield from _object(where, row, problems)


def _not_json(line: str, error: ValueError | RecursionError, last: bool) -> tuple[str, str]:
    """What is wrong with a line that is no JSON, and what to do."""
    if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
        behind = line[error.pos :].strip()
        if behind == ",":
            return "a comma behind the object", "write one JSON object per line, without commas between them"
        if behind.startswith("{"):
            return "one JSON object after another", "put a line break between them (jq -c . OLD > NEW)"
    if re.match(r"\s*\{\s*'", line):
        return "not JSON, but an object as Python prints it", "write it with json.dumps"
    if last and not line.rstrip().endswith("}"):
        return f"not JSON ({_why(error)}), and the file ends here: half-written?", "write the last line again"
    return f"not JSON ({_why(error)})", "write one JSON object per line"


def _loaded(text: str) -> Any:
    """JSON, where a field that stands twice in an object is an error and not the second one."""

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the field '{next(n for n in names if names.count(n) > 1)}' stands twice in one object")
        return found

    return json.loads(text, object_pairs_hook=once)


def _why(error: ValueError | RecursionError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg.removesuffix(' at')} at column {error.colno}"
    return str(error).partition(";")[0]


def _object(where: str, row: Any, problems: list[Problem]) -> Iterator[Record]:
    if isinstance(row, dict):
        yield Record(where, row)
    else:
        fix = 'write {"messages": [...]} or {"prompt": ..., "completion": ...}'
        problems.append(Problem(where, "not a JSON object", fix))


def _json(path: Path, raw: bytes, problems: list[Problem]) -> Iterator[Record]:
    """A list of objects, each named by its number. Many files of this ending hold JSON lines."""
    text = _text(path, raw, problems)
    if text is None:
        return
    fix = "write a list of objects, [{...}, {...}], or one object per line"
    listed = text.lstrip().startswith("[")
    try:
        found = _loaded(text)
    except (ValueError, RecursionError) as error:
        if not listed:
            yield from _jsonl(path, raw, problems)
            return
        cut = isinstance(error, json.JSONDecodeError) and error.pos >= len(text.rstrip())
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        what = "the list is cut off" if cut else f"not JSON ({_why(error)})"
        problems.append(Problem(f"{path}{line}", what, fix, whole=True))
        return
    if isinstance(found, list):
        for number, row in enumerate(found, 1):
            yield from _object(f"{path}:row {number}", row, problems)
    elif isinstance(found, dict) and "\n" not in text.strip():
        yield Record(f"{path}:1", found)
    elif isinstance(found, dict):
        keys = ", ".join(list(found)[:5])
        lists = [name for name, held in found.items() if isinstance(held, list)]
        inside = f"give '{lists[0]}', the list in it, as a file of its own" if lists else fix
        if found and all(isinstance(held, dict) for held in found.values()):
            inside = "write the objects under its keys as a list, [{...}, {...}]"
        what = f"one JSON object (its keys: {keys} ...), not a list of examples"
        problems.append(Problem(str(path), what, inside, whole=True))
    else:
        problems.append(Problem(str(path), f"no list of examples but {json.dumps(found)[:40]}", fix, whole=True))


def _table(delimiters: str) -> Callable[[Path, bytes, list[Problem]], Iterator[Record]]:
    def read(path: Path, raw: bytes, problems: list[Problem]) -> Iterator[Record]:
        """A header, then rows; a cell may hold line breaks inside quotes."""
        text = _text(path, raw, problems)
        if not text or not text.strip():
            return
        above = len(text) - len(text.lstrip("\n"))
        text = text.lstrip("\n")
        head, _, below = text.partition("\n")
        if re.fullmatch(r"sep=.\s*", head):  # a spreadsheet's own first line
            dialect, text, above = _dialect(head[4], below), below, above + 1
        else:
            dialect = _dialect(delimiters, text)
            while text.startswith("#") and (beneath := _commented(delimiters, text, below)):
                dialect, text, above = beneath, below, above + 1
                below = text.partition("\n")[2]
        if re.match(r"[^\n]*\|[^\n]*\n[\s|:]*-[-\s|:]*(?:\n|$)", text):
            what, fix = (
                "a table as Markdown has it",
                "save it as csv, without the bars around it and the line of dashes",
            )
            problems.append(Problem(f"{path}:{above + 1}", what, fix, whole=True))
            return
        found: list[Problem] = []
        records = list(_rows(path, text, above, dialect, found))
        if dialect.delimiter == TAB and (found or _joined(records)):  # most of these files quote nothing
            bare: list[Problem] = []
            again = list(_rows(path, text, above, replace(dialect, quoting=csv.QUOTE_NONE), bare))
            if not bare or len(bare) < len(found):
                records, found = again, bare
        problems += found
        yield from records

    return read


def _joined(records: list[Record]) -> bool:
    """Whether a cell holds what ends one in a file that quotes nothing."""
    return any("\t" in str(cell) or "\n" in str(cell) for record in records for cell in record.fields.values())


@dataclass(frozen=True)
class Dialect:
    """How a table is written. blanks: whether blanks after a delimiter belong to no cell."""

    delimiter: str
    blanks: bool = False
    quoting: Literal[0, 3] = csv.QUOTE_MINIMAL

    def rows(self, text: str) -> Any:
        """A reader of the cells of each row, which raises csv.Error."""
        csv.field_size_limit(1 << 30)
        return csv.reader(
            io.StringIO(text, newline=""),
            delimiter=self.delimiter,
            strict=True,
            quoting=self.quoting,
            skipinitialspace=self.blanks,
        )

    def first(self, text: str) -> list[str]:
        """The cells of the first line; none where it has none."""
        try:
            return list(next(self.rows(text.partition("\n")[0]), []))
        except csv.Error:
            return []


def _dialect(delimiters: str, text: str) -> Dialect:
    """The dialect in which most of the first rows have as many cells as the header, the more the better; none of them
    a quoted text with a blank before it."""

    def fit(dialect: Dialect) -> tuple[int, int]:
        found: list[list[str]] = []
        try:
            found.extend(islice(dialect.rows(text[:PEEK]), LOOKED_AT))
        except csv.Error:
            if len(text) <= PEEK or not found:  # else what was cut off may be the end of a quoted cell
                return (-1, 0)
        header, *rows = [row for row in found if row] or [[]]
        even = [row for row in rows if len(row) == len(header) > 1]
        odd = [row for row in [header, *rows] if any(re.match(r"\s+\".*\"\s*$", cell, re.DOTALL) for cell in row)]
        return (len(even) - len(odd), len(header))

    return max((Dialect(one, blanks) for blanks in (False, True) for one in delimiters), key=fit)


def _commented(delimiters: str, text: str, below: str) -> Dialect | None:
    """The dialect of what is below a first line that is a comment; None where that line is the header: it has as many
    cells as the next line that is no comment, and no name of a field that only that one has."""
    table = re.sub(r"(?:#[^\n]*\n)*", "", below, count=1)
    dialect = _dialect(delimiters, table)
    first, header = dialect.first(text), dialect.first(table)
    if len(first) == len(header) and (any(map(is_known, first)) or not any(map(is_known, header))):
        return None
    return dialect


def _delimiter_of(text: str) -> str:
    """What parts the cells of a text that is a table: every row has as many as the header, whose names are known; ""
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


def _rows(path: Path, text: str, above: int, dialect: Dialect, problems: list[Problem]) -> Iterator[Record]:
    """The records of a table. above: lines of the file before the header."""
    rows = dialect.rows(text)
    started = row = above  # row: as a spreadsheet counts, which shows a cell of several lines in one row
    hashes = text.count("\n# ")
    lines = text.split("\n") if 0 < hashes <= max(2, text.count("\n") // 50) else []  # where they are no usual cells
    try:
        written: list[str] = next(rows, [])
        row += 1
        stripped = any(name != name.rstrip() for name in written[:-1])
        skipped = any(name != name.lstrip() for name in written[1:])
        header = [name.strip() or f"column {i}" for i, name in enumerate(written, 1)]
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
            if stripped or skipped:  # as those of the header, blanks around a cell belong to no cell
                cells = [cell.strip() if stripped else cell.lstrip() for cell in cells]
            if len(cells) == len(header) > 1 and cells[0].strip() == header[0] and [*map(str.strip, cells)] == header:
                problems.append(Problem(where, "the header once more", "remove the line"))
            elif len(cells) == len(header):
                yield Record(where, dict(zip(header, cells, strict=True)))
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
    """What to do about a row with other cells than its header."""
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


def _parquet(path: Path, raw: bytes, problems: list[Problem]) -> Iterator[Record]:
    if importlib.util.find_spec("pyarrow") is None:
        problems.append(Problem(str(path), "parquet needs its reader", "pip install pyarrow", whole=True))
        return
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(raw)).read()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        problems.append(Problem(str(path), f"not parquet, or damaged ({error})", "copy it again", whole=True))
        return
    names = table.column_names
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        what, fix = f"two columns are named '{twice[0]}'", "give every column a name of its own"
        problems.append(Problem(str(path), what, fix, whole=True))
        return
    labels = _label_names(table.schema.metadata or {})
    columns = [_named(_values(column), labels.get(name)) for name, column in zip(names, table.columns, strict=True)]
    for number, cells in enumerate(zip(*columns, strict=True), 1):
        row = {name: value for name, value in zip(names, cells, strict=True) if value is not None}
        yield Record(f"{path}:row {number}", row)


def _values(column: Any) -> list[Any]:
    """The values of a column; those that Python has no type for, such as times to the nanosecond, as text."""
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError):
        values = column.cast("string").to_pylist()
    return values


def _label_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """The names of the labels of each column that holds their numbers, as `datasets` keeps them in the schema."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {name: feature["names"] for name, feature in features.items() if feature.get("_type") == "ClassLabel"}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _named(values: list[Any], names: list[str] | None) -> list[Any]:
    """Names for numbers of labels; -1 is a row without a label."""
    if names is None:
        return values
    numbers = [int(value) if isinstance(value, float) and value.is_integer() else value for value in values]
    return [
        names[value] if type(value) is int and 0 <= value < len(names) else None if value == -1 else value
        for value in numbers
    ]


def _paragraphs(path: Path, raw: bytes, problems: list[Problem]) -> Iterator[Record]:
    """Plain text in pieces of whole paragraphs, of about PIECE characters; of whole lines, where paragraphs are
    longer than that."""
    text = _text(path, raw, problems)
    if text is None:
        return
    piece, begins = "", "1"
    for number, line in _lines(text):
        if len(piece) >= (2 * PIECE if line.strip() else PIECE):
            yield Record(f"{path}:{begins}", {"text": piece.strip()})
            piece = ""
        if not piece:
            begins = number
        if piece or line.strip():
            piece += line + "\n"
    if piece:
        yield Record(f"{path}:{begins}", {"text": piece.strip()})


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """Lines with their places; one longer than two pieces in parts that end where sentences do."""
    for number, line in enumerate(text.split("\n"), 1):
        part, place, cut = "", f"{number}", 1
        for sentence in re.split(r"(?<=[.!?…]\s)|(?<=[。！？])", line) if len(line) > 2 * PIECE else [line]:
            if len(part) >= 2 * PIECE:
                yield place, part
                cut += 1
                part, place = "", f"{number} part {cut}"
            part += sentence
        yield place, part


WIDE = {  # marks at the beginning of a file, the longer first
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
TEXTS = (".csv", ".tsv", ".txt")
READERS: dict[str, Callable[[Path, bytes, list[Problem]], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _table(DELIMITERS),
    ".tsv": _table(TAB),
    ".parquet": _parquet,
    ".txt": _paragraphs,
}
