"""What to type where a file has fields of other names: flags that were tried on the row before they are proposed."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from lorafit.data.fields import (
    ALSO,
    FIELDS,
    OF_ANSWERS,
    OPTIONAL,
    TURNS,
    UNUSED,
    fields_of,
    filled,
    is_harmless,
    turns_in,
)
from lorafit.data.forms import FORMS, form_of, parsed, unread
from lorafit.data.readers import Record
from lorafit.errors import Problem


def formless(where: str, records: Sequence[Record], renamed: Mapping[str, str]) -> Problem:
    """The problem of one row, or of a whole file, of which no row has a form.

    Args:
        where: the place to name.
        records: the row, or the rows of the file.
        renamed: the field of each column that was named by a flag.
    """
    row = fields_of(records[0].fields, renamed)
    fields = ", ".join(list(row)[:8]) or "none"
    what = f"of no form that is known (fields: {fields})"
    if {"chosen", "rejected"} <= set(row):
        what = f"pairs of a preferred and a rejected answer, and learning from preferences is not there yet ({fields})"
    flags = next((flags for record in records[:20] if (flags := _flags(record, renamed))), None)
    return Problem(where, what, f"rename what is called otherwise, or add {flags}" if flags else _without_flags(row))


def unread_fields(unknown: Mapping[str, Record], renamed: Mapping[str, str]) -> Problem:
    """The problem of a file with fields that nothing reads and that may carry meaning.

    Args:
        unknown: the first record that has each field.
        renamed: the field of each column that was named by a flag.
    """
    record = next(iter(unknown.values()))
    names = ", ".join(f"'{name}'" for name in unknown)
    unused = _written([f"{UNUSED}={_column(name, renamed)}" for name in unknown])
    flags = _flags(record, renamed)
    learnt = flags is not None and f"{UNUSED}=" not in flags.split()[1]
    fix = f"add {flags} to learn from it, or {unused} to pass it over" if learnt else f"add {unused} to pass it over"
    return Problem(record.where, f"nothing reads {names}, which may carry meaning", fix, whole=True)


def _column(field: str, renamed: Mapping[str, str]) -> str:
    """The column of a field that was named by a flag; another is named as it stands."""
    return next((column for column, one in renamed.items() if one == field), field)


def _written(columns: Sequence[str]) -> str:
    """As flags; a brace in a name stands for itself."""
    doubled = (column.replace("{", "{{").replace("}", "}}") for column in columns)
    return " ".join(f"--columns {shlex.quote(column)}" for column in doubled)


def _flags(record: Record, renamed: Mapping[str, str]) -> str | None:
    """Flags with which the record becomes an example, of all its fields if it can; None where none do."""
    for fields in _candidates(fields_of(record.fields, renamed)):
        named = {column: field for field, column in fields.items() if column != field}
        if not named or set(named) & set(renamed.values()) or set(named.values()) & set(renamed.values()):
            continue
        whole = {**renamed, **named}
        row = fields_of(record.fields, whole)
        form = form_of(row)
        held = unread(row, form) if form else {}
        left = [path for path, value in held.items() if not is_harmless(path, value, form)]
        whole |= dict.fromkeys(left, UNUSED)
        row = fields_of(record.fields, whole)
        problems: list[Problem] = []
        if form and form_of(row) == form and parsed(record, row, form, problems, {}):
            return _written([*(f"{field}={column}" for column, field in named.items()),
                             *(f"{UNUSED}={path}" for path in left)])  # fmt: skip
    return None


def _candidates(row: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Columns by the field they may be meant for, what says most first."""
    meant = {name: _meant(name, value) for name, value in row.items() if filled(value)}

    def of(field: str) -> list[str]:  # what is called by one of our names before all others
        return sorted((name for name, one in meant.items() if one == field), key=lambda name: name not in FIELDS)

    turns, asked, given, answered, texts = (of(f) for f in ("messages", "prompt", "input", "completion", "text"))
    labels = sorted(of("label"), key=lambda name: not isinstance(row[name], str))  # a name before a number
    alpaca = "instruction" in row
    forms: list[dict[str, list[str]]] = [
        {"messages": turns},
        {"instruction": asked, "input": given, "output": answered},
        {"instruction": asked, "output": answered} if alpaca else {"prompt": asked, "completion": answered},
        {"prompt": texts, "completion": answered},
        {"text": texts, "label": labels},
        {"prompt": given, "completion": answered},
        {"messages": answered},
        {"text": texts},
        *({field: of(field)} for field in (*OPTIONAL, *OF_ANSWERS)),
    ]
    for columns in forms:
        if all(columns.values()):
            yield {field: found[0] for field, found in columns.items()}


def _meant(name: str, value: Any) -> str | None:
    """The field that a column of another name or spelling most likely is: of turns, which are a list, or of text."""
    plain = name.strip().lower()
    if turns_in(value):
        also = next((field for field in ("prompt", "completion") if plain == field or plain in ALSO[field]), None)
        return also or "messages"
    if isinstance(value, (list, dict)):
        return None
    near = difflib.get_close_matches(plain, sorted(FIELDS - TURNS), n=1, cutoff=0.8)
    field = near[0] if near else plain
    if field in OPTIONAL:
        return field
    return next((one for one, names in ALSO.items() if field == one or field in names), None)


def _without_flags(row: Mapping[str, Any]) -> str:
    """What makes a known form of a row whose names do not tell what is meant."""
    for name, value in row.items():
        inside = value[0] if isinstance(value, list) and value else value
        if isinstance(inside, dict) and form_of(inside) not in (None, "text"):
            return f"write the fields of '{name}' into the row itself"
        if isinstance(inside, dict) and any(_meant(key, held) not in (None, "text") for key, held in inside.items()):
            return f"write the fields of '{name}' into the row itself"
    for form in FORMS.values():
        if form.needed & set(row):
            return f"add {' and '.join(sorted(form.needed - set(row)))}"
    speaking = [name for name, value in row.items() if isinstance(value, str) and not is_harmless(name, value, None)]
    if len(speaking) == 2:
        asked, answered = speaking
        left = [name for name, value in row.items() if filled(value) and name not in speaking
                and not is_harmless(name, value, None)]  # fmt: skip
        flags = _written([f"prompt={asked}", f"completion={answered}", *(f"{UNUSED}={name}" for name in left)])
        return f"add {flags} if {asked} is what is asked and {answered} the answer"
    return f"say which column is what, as in {_written(['prompt=QUESTION', 'completion=ANSWER'])}"
