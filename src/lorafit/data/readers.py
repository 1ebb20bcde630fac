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
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.errors import Problem
from lorafit.files import did_you_mean

PIECE = 2000  # characters of plain text that make one example, rounded up to whole paragraphs


@dataclass(frozen=True)
class Record:
    """One row of a file. `where` is `file:line`."""

    where: str
    fields: dict[str, Any]


def kinds() -> tuple[str, ...]:
    """Endings of the files that are read; each may be followed by .gz."""
    return tuple(READERS)


def read_records(path: Path, problems: list[Problem]) -> list[Record]:
    """All records of one file, by its ending; one of another ending is read as jsonl."""
    before = len(problems)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        problems.append(Problem(str(path), "there is no such file", did_you_mean(path, "check the path")))
        return []
    except OSError as error:
        problems.append(Problem(str(path), f"cannot be read ({error.strerror})", "check its permissions"))
        return []
    ending = path.suffix
    if ending == ".gz":
        ending = path.with_suffix("").suffix
        try:
            raw = gzip.decompress(raw)
        except (OSError, EOFError, zlib.error) as error:
            problems.append(Problem(str(path), f"cannot be unpacked ({error})", "copy it again, it may be half a copy"))
            return []
    if raw[:4] == b"PK\x03\x04":  # so do workbooks begin
        workbook = ending.startswith((".xls", ".ods"))
        fix = "save the sheet as 'CSV UTF-8'" if workbook else "unpack it, and give what is in it"
        problems.append(Problem(str(path), "a workbook, not a csv file" if workbook else "a zip archive", fix))
        return []
    if ending != ".parquet" and b"\x00" in raw[:4096]:
        wide = raw[:2] in (codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)
        fix = "save it as UTF-8" if wide else f"give one of {', '.join(READERS)}"
        problems.append(Problem(str(path), "UTF-16, not UTF-8" if wide else "a binary file", fix))
        return []
    if ending not in READERS and not raw.removeprefix(codecs.BOM_UTF8).lstrip().startswith(b"{"):
        fix = f"copy it to {path.stem}.txt if it is plain text to be learnt whole, or give one of {', '.join(READERS)}"
        problems.append(Problem(str(path), f"of no kind that is read ({ending or 'its name has no ending'})", fix))
        return []
    records = list(READERS.get(ending, _jsonl)(path, raw, problems))
    if not records and len(problems) == before:
        problems.append(Problem(str(path), "no examples in it", "write at least one"))
    return records


def _text(path: Path, raw: bytes, problems: list[Problem]) -> str | None:
    """The file as text; the first line that is not UTF-8 is named."""
    raw = raw.removeprefix(codecs.BOM_UTF8)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line = raw.count(b"\n", 0, error.start) + 1
        problems.append(_not_utf8(f"{path}:{line}", raw[error.start]))
        return None


def _not_utf8(where: str, byte: int) -> Problem:
    """The first byte that cannot be, and what it would be in the encoding that most such files have."""
    letter = bytes([byte]).decode("cp1252", errors="ignore")
    meant = f", which is {letter} in Windows-1252" if letter else ""
    fix = "save the file as UTF-8 (Excel: 'CSV UTF-8'; a shell: iconv -f WINDOWS-1252 -t UTF-8 OLD > NEW)"
    return Problem(where, f"not UTF-8 (byte 0x{byte:02x}{meant})", fix)


def _jsonl(path: Path, raw: bytes, problems: list[Problem]) -> Iterator[Record]:
    lines = raw.removeprefix(codecs.BOM_UTF8).split(b"\n")  # not splitlines: JSON strings may hold other separators
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        where = f"{path}:{number}"
        try:
            row = json.loads(line.decode())
        except UnicodeDecodeError as error:
            problems.append(_not_utf8(where, line[error.start]))
        except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
            said = _why(error)
            if number == len(lines):
                fix = "write the last line again"
                problems.append(Problem(where, f"not JSON ({said}), and the file ends here: half-written?", fix))
            else:
                problems.append(Problem(where, f"not JSON ({said})", "write one JSON object per line"))
        else:
            yield from _object(where, row, problems)


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
    """A list of objects; each is named by the line on which it begins. Many files of this ending hold JSON lines."""
    text = _text(path, raw, problems)
    if text is None:
        return
    if not text.lstrip().startswith("["):
        first = text.strip().partition("\n")[0]
        if not first.endswith("}") and _is_json(text):
            keys = ", ".join(list(json.loads(text))[:5])
            what = f"one JSON object (its keys: {keys} ...), not a list of examples"
            problems.append(Problem(str(path), what, "write a list of objects, [{...}, {...}], or one object per line"))
        else:
            yield from _jsonl(path, raw, problems)
        return
    decoder, position, line, counted = json.JSONDecoder(), text.index("[") + 1, 1, 0
    gap = re.compile(r"[\s,]*")
    while True:
        position = gap.match(text, position).end()  # type: ignore[union-attr] # matches the empty string too
        line, counted = line + text.count("\n", counted, position), position
        if text[position : position + 1] == "]":
            return
        try:
            row, position = decoder.raw_decode(text, position)
        except (ValueError, RecursionError) as error:
            said = _why(error)
            what = "the list is cut off" if position >= len(text) else f"not JSON ({said})"
            problems.append(Problem(f"{path}:{line}", what, "write a list of JSON objects: [{...}, {...}]"))
            return
        yield from _object(f"{path}:{line}", row, problems)


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except (ValueError, RecursionError):
        return False
    return True


def _table(delimiters: str) -> Callable[[Path, bytes, list[Problem]], Iterator[Record]]:
    def read(path: Path, raw: bytes, problems: list[Problem]) -> Iterator[Record]:
        """A header, then rows; a cell may hold line breaks inside quotes."""
        text = _text(path, raw, problems)
        if not text or not text.strip():
            return
        head = text.partition("\n")[0]
        delimiter = max(delimiters, key=head.count)  # a comma, or what spreadsheets of other countries write
        csv.field_size_limit(1 << 30)
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, strict=True)
        started = 0
        try:
            header = [name.strip() for name in next(rows)]
            twice = sorted({name for name in header if header.count(name) > 1})
            if twice or "" in header:
                what = f"two columns are named '{twice[0]}'" if twice and twice[0] else "a column without a name"
                problems.append(Problem(f"{path}:1", what, "give every column a name of its own in the first line"))
                return
            started = rows.line_num
            for cells in rows:
                where, started = f"{path}:{started + 1}", rows.line_num
                if not any(cell.strip() for cell in cells):
                    continue
                if len(cells) != len(header):
                    what = f"{len(cells)} cells under {len(header)} columns"
                    problems.append(Problem(where, what, "put cells that hold a comma or line break in quotes"))
                else:
                    yield Record(where, dict(zip(header, cells, strict=True)))
        except csv.Error as error:
            fix = "write a quote inside quotes twice"
            what = f"not a table ({error}), perhaps a quote that is not closed"
            problems.append(Problem(f"{path}:{started + 1}", what, fix))

    return read


def _parquet(path: Path, raw: bytes, problems: list[Problem]) -> Iterator[Record]:
    if importlib.util.find_spec("pyarrow") is None:
        problems.append(Problem(str(path), "parquet needs its reader", "pip install pyarrow"))
        return
    import pyarrow
    import pyarrow.parquet

    try:
        rows = pyarrow.parquet.read_table(io.BytesIO(raw)).to_pylist()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        problems.append(Problem(str(path), f"not parquet, or damaged ({error})", "copy it again"))
        return
    for number, row in enumerate(rows, 1):
        yield Record(f"{path}:row {number}", {key: value for key, value in row.items() if value is not None})


def _paragraphs(path: Path, raw: bytes, problems: list[Problem]) -> Iterator[Record]:
    """Plain text in pieces of whole paragraphs, of about PIECE characters; of whole lines, where paragraphs are
    longer than that."""
    text = _text(path, raw, problems)
    if text is None:
        return
    piece, begins = "", 1
    for number, line in enumerate(text.replace("\r\n", "\n").split("\n"), 1):
        if len(piece) >= (2 * PIECE if line.strip() else PIECE):
            yield Record(f"{path}:{begins}", {"text": piece.strip()})
            piece = ""
        if not piece:
            begins = number
        if piece or line.strip():
            piece += line + "\n"
    if piece:
        yield Record(f"{path}:{begins}", {"text": piece.strip()})


READERS: dict[str, Callable[[Path, bytes, list[Problem]], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": _table(",;\t"),
    ".tsv": _table("\t"),
    ".parquet": _parquet,
    ".txt": _paragraphs,
}
