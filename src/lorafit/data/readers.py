"""Reads records from files, with a reader for each type of file; JSON and plain text are read here.

A path goes in; records, and a `Problem` for everything that cannot be a record, come out.
"""

from __future__ import annotations

import codecs
import gzip
import json
import re
import zlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from lorafit.data.iob import is_iob, read_iob
from lorafit.data.parquet import read_parquet
from lorafit.data.records import BOM, LINE_END, Record, not_utf8, text_of_file
from lorafit.data.tables import DELIMITERS, TAB, delimiter_of, table_reader
from lorafit.errors import Problem
from lorafit.files import did_you_mean

PIECE = 2000  # characters of plain text in one example, rounded up to whole paragraphs
_MARKED_LINE = re.compile(rb"^\xef\xbb\xbf|(?<=[\r\n])\xef\xbb\xbf|(?<=\xef\xbb\xbf)\xef\xbb\xbf")
ARCHIVES = (".bz2", ".xz", ".zst", ".7z", ".rar", ".tar", ".tgz", ".lz4")


def kinds() -> tuple[str, ...]:
    """Endings of the supported files; each may be followed by .gz."""
    return tuple(READERS)


def read_records(path: Path, problems: list[Problem], columns: Mapping[str, str] | None = None) -> list[Record]:
    """Read all records of a file.

    Args:
        path: the file; its ending decides how it is read. A file of JSON objects may have any ending.
        problems: receives everything that cannot be a record.
        columns: the field of each column that has another name. A text whose entities are counted in characters is
            kept as it is.
    """
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
    if raw[:4] == b"PK\x03\x04":  # workbooks are archives too
        workbook = ending.startswith((".xls", ".ods"))
        fix = "save the sheet as 'CSV UTF-8'" if workbook else "unpack it, and give what is in it"
        return refuse("a workbook, not a csv file" if workbook else "a zip archive", fix)
    if ending != ".parquet" and b"\x00" in raw[:4096]:
        encoding = next((name for mark, name in WIDE.items() if raw.startswith(mark)), None)
        fix = "save it as UTF-8" if encoding else f"give one of {', '.join(READERS)}"
        return refuse(f"{encoding}, not UTF-8" if encoding else "a binary file", fix)
    given = raw
    if ending in TEXTS:
        raw = raw.replace(codecs.BOM_UTF8, b"")
    elif ending != ".parquet":
        raw = _MARKED_LINE.sub(b"", raw)  # joined files have some in the middle; those within a text are counted
    begins = raw.lstrip()[:1]
    if ending not in READERS and begins != b"{":
        fix = f"copy it to {path.stem}.txt if it is plain text to be learnt whole, or give one of {', '.join(READERS)}"
        return refuse(f"unsupported file type ({ending or 'its name has no ending'})", fix)
    if ending in TEXTS and _is_json(raw):
        called = "plain text" if ending == ".txt" else "tokens and tags" if ending in (".conll", ".iob") else "a table"
        return refuse(f"JSON in a file that is called {called}", f"rename it to {path.stem}.jsonl")
    if ending in (".txt", ".tsv") and is_iob(raw.decode(errors="replace")):
        return refuse("tokens with their tags, one a line", f"rename it to {path.stem}.conll")
    if ending == ".txt" and (delimiter := delimiter_of(raw.decode(errors="replace"))):
        fix = f"rename it to {path.stem}.{'tsv' if delimiter == TAB else 'csv'}"
        return refuse("a table in a file that is called plain text", fix)
    is_table = ending in (".csv", ".tsv")  # whose reader tells which rows its marks are in
    records = list(READERS.get(ending, _jsonl)(path, given if is_table else raw, problems))
    if ending not in TEXTS:  # values of JSON and parquet may hold other line ends and marks
        records = [Record(record.where, _cleaned(record.fields, columns or {})) for record in records]
    if not records and len(problems) == before:
        return refuse("no examples in it", "write at least one")
    return records


def _is_json(raw: bytes) -> bool:
    """Whether the first line is a JSON object, or the beginning of a list of objects."""
    text = raw.lstrip()
    if re.match(rb'\[\s*\{\s*"', text):
        return True
    try:
        return isinstance(json.loads(text.partition(b"\n")[0]), dict)
    except (ValueError, RecursionError):
        return False


def _cleaned(fields: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a record with clean texts; a text whose entities are counted in characters is kept as it is."""
    cleaned = {_clean(name): _clean(value) for name, value in fields.items()}
    if not any(columns.get(name, name) == "entities" for name in cleaned):
        return cleaned
    given = {_clean(name): value for name, value in fields.items()}
    return {n: given[n] if columns.get(n, n) == "text" else value for n, value in cleaned.items()}


def _clean(value: Any) -> Any:
    """The value with line ends of one kind and without byte order marks."""
    if isinstance(value, str):
        return LINE_END.sub("\n", value.replace(BOM, "")) if "\r" in value or BOM in value else value
    if isinstance(value, dict):
        return {_clean(name): _clean(held) for name, held in value.items()}
    return [_clean(held) for held in value] if isinstance(value, list) else value


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
            problems.append(not_utf8(where, line[error.start]))
        except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
            problems.append(Problem(where, *_not_json(line.decode(), error, last=number == len(lines))))
        else:
            yield from _object(where, row, problems)


def _not_json(line: str, error: ValueError | RecursionError, last: bool) -> tuple[str, str]:
    """What is wrong with a line that is not JSON, and what to do."""
    if isinstance(error, json.JSONDecodeError) and error.msg == "Extra data":
        rest = line[error.pos :].strip()
        if rest == ",":
            return "a comma behind the object", "write one JSON object per line, without commas between them"
        if rest.startswith("{"):
            return "one JSON object after another", "put a line break between them (jq -c . OLD > NEW)"
    if re.match(r"\s*\{\s*'", line):
        return "not JSON, but an object as Python prints it", "write it with json.dumps"
    if last and not line.rstrip().endswith("}"):
        return f"not JSON ({_why(error)}), and the file ends here: half-written?", "write the last line again"
    return f"not JSON ({_why(error)})", "write one JSON object per line"


def _loaded(text: str) -> Any:
    """JSON, where a field that stands twice in an object is an error."""

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        fields = dict(pairs)
        if len(fields) < len(pairs):
            names = [name for name, _ in pairs]
            raise ValueError(f"the field '{next(n for n in names if names.count(n) > 1)}' stands twice in one object")
        return fields

    return json.loads(text, object_pairs_hook=unique)


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
    """A list of objects, each named by its number; or JSON lines, which many files with this ending hold."""
    text = text_of_file(path, raw, problems)
    if text is None:
        return
    fix = "write a list of objects, [{...}, {...}], or one object per line"
    listed = text.lstrip().startswith("[")
    try:
        value = _loaded(text)
    except (ValueError, RecursionError) as error:
        if not listed:
            yield from _jsonl(path, raw, problems)
            return
        cut = isinstance(error, json.JSONDecodeError) and error.pos >= len(text.rstrip())
        line = f":{error.lineno}" if isinstance(error, json.JSONDecodeError) else ""
        what = "the list is cut off" if cut else f"not JSON ({_why(error)})"
        problems.append(Problem(f"{path}{line}", what, fix, whole=True))
        return
    if isinstance(value, list):
        for number, row in enumerate(value, 1):
            yield from _object(f"{path}:row {number}", row, problems)
    elif isinstance(value, dict) and "\n" not in text.strip():
        yield Record(f"{path}:1", value)
    elif isinstance(value, dict):
        keys = ", ".join(list(value)[:5])
        lists = [name for name, held in value.items() if isinstance(held, list)]
        fix = f"give '{lists[0]}', the list in it, as a file of its own" if lists else fix
        if value and all(isinstance(held, dict) for held in value.values()):
            fix = "write the objects under its keys as a list, [{...}, {...}]"
        what = f"one JSON object (its keys: {keys} ...), not a list of examples"
        problems.append(Problem(str(path), what, fix, whole=True))
    else:
        problems.append(Problem(str(path), f"no list of examples but {json.dumps(value)[:40]}", fix, whole=True))


def _paragraphs(path: Path, raw: bytes, problems: list[Problem]) -> Iterator[Record]:
    """Plain text in pieces of about PIECE characters: whole paragraphs, or whole lines of longer paragraphs."""
    text = text_of_file(path, raw, problems)
    if text is None:
        return
    piece, place = "", "1"
    for number, line in _lines(text):
        if len(piece) >= (2 * PIECE if line.strip() else PIECE):
            yield Record(f"{path}:{place}", {"text": piece.strip()})
            piece = ""
        if not piece:
            place = number
        if piece or line.strip():
            piece += line + "\n"
    if piece:
        yield Record(f"{path}:{place}", {"text": piece.strip()})


def _lines(text: str) -> Iterator[tuple[str, str]]:
    """Places and lines; a line longer than two pieces is cut into parts that end where sentences do."""
    for number, line in enumerate(text.split("\n"), 1):
        part, place, cut = "", f"{number}", 1
        for sentence in re.split(r"(?<=[.!?…]\s)|(?<=[。！？])", line) if len(line) > 2 * PIECE else [line]:
            if len(part) >= 2 * PIECE:
                yield place, part
                cut += 1
                part, place = "", f"{number} part {cut}"
            part += sentence
        yield place, part


WIDE = {  # encodings by the mark at the beginning of a file, longer marks first
    codecs.BOM_UTF32_LE: "UTF-32",
    codecs.BOM_UTF32_BE: "UTF-32",
    codecs.BOM_UTF16_LE: "UTF-16",
    codecs.BOM_UTF16_BE: "UTF-16",
}
TEXTS = (".csv", ".tsv", ".txt", ".conll", ".iob")
READERS: dict[str, Callable[[Path, bytes, list[Problem]], Iterator[Record]]] = {
    ".jsonl": _jsonl,
    ".ndjson": _jsonl,
    ".json": _json,
    ".csv": table_reader(DELIMITERS),
    ".tsv": table_reader(TAB),
    ".parquet": read_parquet,
    ".conll": read_iob,
    ".iob": read_iob,
    ".txt": _paragraphs,
}
