"""What --columns says: which column is which field, and columns joined into one text (`Team: {Team}\\n{Reply}`)."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from decimal import Decimal
from typing import Any

from lorafit.data.fields import FIELDS, PACKED, TURNS, UNUSED, filled
from lorafit.data.readers import Record
from lorafit.errors import Problem, SettingsError

_BRACE = re.compile(r"\{\{|\}\}|\{([^{}]+)\}|[{}]")
_NO_TEXT: dict[type, str] = {list: "a list", dict: "an object", bytes: "bytes"}
_ESCAPES = {"n": "\n", "t": "\t", "\\": "\\"}


@dataclass(frozen=True)
class Template:
    """texts: what stands before each column and after the last, one more than there are columns."""

    texts: tuple[str, ...]
    columns: tuple[str, ...]

    @staticmethod
    def of(given: str) -> Template:
        r"""Read a template: a column in braces stands for what it holds, {{ and }} for braces, \n for a line break, \t
        for a tab and \\ for a backslash. Raises ValueError for a brace that stands alone."""
        texts, columns, end = [""], [], 0
        for found in _BRACE.finditer(given):
            texts[-1] += given[end : found.start()]
            end = found.end()
            if found[1]:
                columns.append(found[1])
                texts.append("")
            elif len(found[0]) == 2:
                texts[-1] += found[0][0]
            else:
                raise ValueError(f"a '{found[0]}' that stands alone")
        texts[-1] += given[end:]
        if columns:  # the name of a column is taken as it stands
            texts = [re.sub(r"\\([nt\\])", lambda one: _ESCAPES[one[1]], text) for text in texts]
        return Template(tuple(texts), tuple(columns))

    def made_of(self, record: Record, field: str, problems: list[Problem]) -> str | None:
        """The text of a record; None where a column holds nothing or no text, each told."""
        found, before = [self.texts[0]], len(problems)
        for column, text in zip(self.columns, self.texts[1:], strict=True):
            value = record.fields.get(column)
            if not filled(value):
                problems.append(
                    Problem(
                        f"{record.where}: {column}",
                        f"empty, and '{field}' is made of it",
                        "write it, or leave the row out (--skip-bad)",
                    )
                )
            elif kind := _NO_TEXT.get(type(value)):
                problems.append(
                    Problem(
                        f"{record.where}: {column}",
                        f"{kind}, and '{field}' is made of it",
                        "name a column of text or numbers",
                    )
                )
            found += [_written(value), text]
        return "".join(found) if len(problems) == before else None


def _written(value: Any) -> str:
    """A value as people write it: numbers and true as JSON has them, `2031-05-09 14:30:00` for a time."""
    if isinstance(value, (bool, int, float)):
        return json.dumps(value)
    return f"{value:f}" if isinstance(value, Decimal) else str(value)


def columns_named(given: Sequence[str]) -> tuple[dict[str, str], dict[str, Template]]:
    """What each text of the form FIELD=COLUMN or FIELD=TEMPLATE says.

    Args:
        given: the texts. The field `unused` may be given to any number of columns. A template holds columns in braces.

    Returns:
        The field of each column that is named, and the template of each field that is made of columns.

    Raises:
        SettingsError: a text of another form, an unknown field, a field or column that is named twice, a brace that
            stands alone, or a template for what is no text.
    """
    named: dict[str, str] = {}
    templates: dict[str, Template] = {}
    for one in given:
        field, _, column = one.partition("=")
        if field not in FIELDS | {UNUSED} or not column:
            known = ", ".join(sorted(FIELDS))
            raise SettingsError(
                f"--columns {one}: write FIELD=COLUMN, such as prompt=question; FIELD is one of {known}, or "
                f"{UNUSED} for a column that is passed over"
            )
        try:
            template = Template.of(column)
        except ValueError as error:
            raise SettingsError(
                f"--columns {one}: {error}: write {{COLUMN}} for a column, {{{{ or }}}} for a brace itself"
            ) from error
        column = column if template.columns else template.texts[0]
        if column in named or (field in {*named.values(), *templates} and field != UNUSED):
            twice = column if column in named else field
            raise SettingsError(f"--columns {one}: '{twice}' is named twice: leave one of them")
        if not template.columns:
            named[column] = field
        elif field in TURNS | PACKED | {UNUSED}:
            raise SettingsError(
                f"--columns {one}: '{field}' is no text, which could be made of columns: name one column"
            )
        else:
            templates[field] = template
    return named, templates


def joined(
    records: Sequence[Record], templates: Mapping[str, Template], named: Mapping[str, str], problems: list[Problem]
) -> list[Record]:
    """The records with the fields that templates make, and without the columns these are made of.

    Args:
        records: of one split.
        templates: by the field that each makes.
        named: columns that are named besides, which stay.
        problems: gets every column of every row that cannot be used; such rows are left out.
    """
    if not templates:
        return list(records)
    used = {column for template in templates.values() for column in template.columns} - set(named)
    found = []
    for record in records:
        made = {field: template.made_of(record, field, problems) for field, template in templates.items()}
        if None not in made.values():
            kept = {name: value for name, value in record.fields.items() if name not in used}
            found.append(Record(record.where, {**kept, **made}))
    return found
