"""Reads --columns, which names the column of a field, or joins columns into one text (`Team: {Team}\\n{Reply}`)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from decimal import Decimal
from typing import Any

from lorafit.data.fields import FIELDS, PACKED, TURNS, UNUSED, filled
from lorafit.data.records import Record
from lorafit.errors import Problem, SettingsError

_BRACE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")
_NO_TEXT: dict[type, str] = {list: "a list", dict: "an object", bytes: "bytes"}
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


@dataclass(frozen=True)
class Template:
    """A text made of columns. texts: before each column and after the last, one more than there are columns."""

    texts: tuple[str, ...]
    columns: tuple[str, ...]

    @staticmethod
    def of(given: str) -> Template:
        r"""Read a template: {column} stands for its value, {{ and }} for braces, \n for a line break, \t for a tab, \\
        for a backslash. Raises ValueError for a single brace."""
        texts, columns, end = [""], [], 0
        for brace in _BRACE.finditer(given):
            texts[-1] += given[end : brace.start()]
            end = brace.end()
            if brace[1]:
                columns.append(brace[1])
                texts.append("")
            elif len(brace[0]) == 2:
                texts[-1] += brace[0][0]
            else:
                raise ValueError(f"a single '{brace[0]}'")
        texts[-1] += given[end:]
        if columns:  # else it is the name of a column, without escapes
            texts = [re.sub(r"\\([nt\\])", lambda escape: _ESCAPES[escape[1]], text) for text in texts]
        return Template(tuple(texts), tuple(columns))

    def made_of(self, record: Record, field: str, problems: list[Problem]) -> str | None:
        """The text of a record; None, and a problem for each, where columns are empty or hold no text."""
        parts, before = [self.texts[0]], len(problems)
        for column, text in zip(self.columns, self.texts[1:], strict=True):
            value, where = record.fields.get(column), f"{record.where}: {column}"
            if not filled(value):
                fix = "write it, or leave the row out (--skip-bad)"
                problems.append(Problem(where, f"empty, and '{field}' is made of it", fix))
            elif kind := _NO_TEXT.get(type(value)):
                fix = "name a column of text or numbers"
                problems.append(Problem(where, f"{kind}, and '{field}' is made of it", fix))
            parts += [_written(value), text]
        return "".join(parts) if len(problems) == before else None


def _written(value: Any) -> str:
    """A value as people write it: numbers and true as in JSON, a time as `2031-05-09 14:30:00`."""
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    return f"{value:f}" if isinstance(value, Decimal) else str(value)


def columns_named(given: Sequence[str]) -> tuple[dict[str, str], dict[str, Template]]:
    """Read texts of the form FIELD=COLUMN or FIELD=TEMPLATE.

    Args:
        given: the texts. The field `unused` may have any number of columns. A template holds columns in braces.

    Returns:
        The field of each column that is named, and the template of each field that is made of columns.

    Raises:
        SettingsError: for a text of another form, an unknown field, a field or column that is named twice, a single
            brace, or a template for a field that is not text.
    """
    named: dict[str, str] = {}
    templates: dict[str, Template] = {}
    for text in given:
        field, _, column = text.partition("=")
        if field not in FIELDS | {UNUSED} or not column:
            known = ", ".join(sorted(FIELDS))
            raise SettingsError(
                f"--columns {text}: write FIELD=COLUMN, such as prompt=question; FIELD is one of {known}, or "
                f"{UNUSED} for a column that is passed over"
            )
        try:
            template = Template.of(column)
        except ValueError as error:
            fix = "write {COLUMN} for a column, {{ or }} for a brace itself"
            raise SettingsError(f"--columns {text}: {error}: {fix}") from error
        column = column if template.columns else template.texts[0]
        if column in named or (field in {*named.values(), *templates} and field != UNUSED):
            twice = column if column in named else field
            raise SettingsError(f"--columns {text}: '{twice}' is named twice: leave one of them")
        if not template.columns:
            named[column] = field
        elif field in TURNS | PACKED | {UNUSED}:
            raise SettingsError(f"--columns {text}: '{field}' is no text that columns could make: name one column")
        else:
            templates[field] = template
    return named, templates


def joined(
    records: Sequence[Record], templates: Mapping[str, Template], named: Mapping[str, str], problems: list[Problem]
) -> list[Record]:
    """The records with the fields that templates make, without the columns that these are made of.

    Args:
        records: of one split.
        templates: by the field that each makes.
        named: the field of each column that is also named on its own, and stays.
        problems: receives every column of a row that cannot be used; such rows are left out.
    """
    if not templates:
        return list(records)
    used = {column for template in templates.values() for column in template.columns} - set(named)
    made_records = []
    for record in records:
        made = {field: template.made_of(record, field, problems) for field, template in templates.items()}
        if None not in made.values():
            kept = {name: value for name, value in record.fields.items() if name not in used}
            made_records.append(replace(record, fields={**kept, **made}))
    return made_records
