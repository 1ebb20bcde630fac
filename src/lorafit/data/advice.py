"""What to type where a file has fields of other names: flags that were tried on the row before they are proposed."""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorafit.data.columns import Template, joined
from lorafit.data.examples import Example
from lorafit.data.fields import (
    ALSO,
    FIELDS,
    MARKS,
    OF_ANSWERS,
    OPTIONAL,
    TURNS,
    UNUSED,
    VERDICTS,
    fields_of,
    filled,
    is_harmless,
    is_heading,
    is_preferred,
    meaning_of,
    preferences_in,
    truth_of,
    turns_in,
)
from lorafit.data.forms import FORMS, form_of, judges, parsed, ruling, unread
from lorafit.data.messages import sides_of
from lorafit.data.readers import Record
from lorafit.errors import Problem

MAY_MEAN = "which may carry meaning"
ASKED = ("prompt", "instruction", "text")  # fields that the subject of a mail stands above


@dataclass(frozen=True)
class Proposal:
    """Flags with which a row becomes an example: they were tried on it.

    columns: as --columns has them. passed: what may be lost with each column that is passed over, by its name. marks:
    columns that say which rows are not to be learnt, and that are read. instead: a flag that was given, and that these
    flags replace; "" for none.
    """

    columns: tuple[str, ...]
    passed: Mapping[str, str]
    marks: tuple[str, ...]
    instead: str = ""

    @property
    def flags(self) -> str:
        skip = " --skip-bad" if self.marks else ""
        return _written(self.columns) + skip + (f" in place of {_written([self.instead])}" if self.instead else "")

    @property
    def remark(self) -> str:
        """What the flags do besides; "" where they do nothing besides."""
        over = "; ".join(f"'{name}', {what}" for name, what in self.passed.items())
        out = " and ".join(f"'{name}'" for name in self.marks)
        told = [f"{what} {names}" for what, names in (("passed over:", over), ("left out: rows by", out)) if names]
        return f" ({'; '.join(told)})" if told else ""


def formless(where: str, records: Sequence[Record], renamed: Mapping[str, str]) -> Problem:
    """The problem of one row, or of a whole file, of which no row has a form.

    Args:
        where: the place to name.
        records: the row, or the rows of the file.
        renamed: the field of each column that was named by a flag.
    """
    row = fields_of(records[0].fields, renamed)
    names = [name for column in records[0].fields if (name := renamed.get(column, column)) != UNUSED]
    fields = ", ".join(names[:8]) or "none"
    what = f"of no form that is known (fields: {fields})"
    if pair := preferences_in(row):
        what = f"pairs of a preferred and a rejected answer, and learning from preferences is not there yet ({fields})"
    judged = judges([fields_of(record.fields, renamed) for record in records])
    found = next((one for record in records[:20] if (one := _proposal(record, renamed, judged))), None)
    for mark in found.marks if found and len(records) > 1 else ():
        if all(truth_of(record.fields.get(mark)) is False for record in records):
            return Problem(where, what, f"every row is marked as not to be learnt by '{mark}': give rows that are")
    known = f"rename what is called otherwise, or add {found.flags}{found.remark}" if found else ""
    return Problem(where, what, known if found else _without_flags(records[0], renamed, pair))


def hold_examples(records: Sequence[Record]) -> bool:
    """Whether one of the first rows has a form, or would have one with the flags that are proposed."""
    return any(form_of(fields_of(one.fields, {})) or _proposal(one, {}, judged=False) for one in records[:20])


def unread_fields(unknown: Mapping[str, Record], renamed: Mapping[str, str]) -> Problem:
    """The problem of a file with fields that nothing reads and that may carry meaning.

    Args:
        unknown: the first record that has each field.
        renamed: the field of each column that was named by a flag.
    """
    record = next(iter(unknown.values()))
    names = ", ".join(f"'{name}'" for name in unknown)
    unused = _written([f"{UNUSED}={_doubled(_column(name, renamed))}" for name in unknown])
    found = _proposal(record, renamed, judged=False)
    learnt = f"{found.flags} to learn from it{found.remark}, or " if found else ""
    return Problem(
        record.where,
        f"nothing reads {names}, {MAY_MEAN}",
        f"add {learnt}{unused} to pass it over",
        whole=True,
    )


def _column(field: str, renamed: Mapping[str, str]) -> str:
    """The column of a field that was named by a flag; another is named as it stands."""
    return next((column for column, one in renamed.items() if one == field), field)


def _doubled(column: str) -> str:
    """The name of a column as --columns has it, where a brace stands for itself."""
    return column.replace("{", "{{").replace("}", "}}")


def _written(columns: Sequence[str]) -> str:
    return " ".join(f"--columns {shlex.quote(column)}" for column in columns)


def _proposal(record: Record, renamed: Mapping[str, str], judged: bool) -> Proposal | None:
    """Flags with which the record becomes an example, of all its fields if it can; None where none do."""
    for fields in _candidates(fields_of(record.fields, renamed)):
        named = {column: field for field, column in fields.items() if column != field}
        taken = set(renamed) | set(renamed.values())
        if taken & {*named, *named.values()}:
            continue
        if found := _headed(record, fields, renamed, judged):
            return found
        if named and (found := _tried(record, named, renamed, judged)):
            return found
    return None


def _headed(record: Record, fields: Mapping[str, str], renamed: Mapping[str, str], judged: bool) -> Proposal | None:
    """A proposal that puts the subject of a mail above what is asked; None where the record has none, or where what is
    asked is made of columns already.

    Args:
        record: the row.
        fields: the column, or the field of one that was named by a flag, by the field that it is meant for.
        renamed: the field of each column that was named by a flag.
        judged: whether a number in `label` judges the answer.
    """
    field = next((name for name in ASKED if name in fields), "")
    heading = next((name for name in record.fields if is_heading(name) and name not in renamed), "")
    if not (field and heading and filled(record.fields[heading])) or (field == "text" and "label" not in fields):
        return None
    column = _column(fields[field], renamed)
    text = record.fields.get(column)
    if not isinstance(text, str) or renamed.get(column) == column or {"{", "}"} & {*heading, *column}:
        return None
    template = f"{{{heading}}}\\n\\n{{{column}}}"
    rows = joined([record], {field: Template.of(template)}, {}, [])
    rest = {column: of for column, of in renamed.items() if of != field}
    named = {one: of for of, one in fields.items() if of not in (one, field)}
    found = _tried(rows[0], named, rest, judged) if rows else None
    if found is None:
        return None
    instead = f"{field}={_doubled(column)}" if column in renamed else ""
    return replace(found, columns=(f"{field}={template}", *found.columns), instead=instead)


def _tried(record: Record, named: Mapping[str, str], renamed: Mapping[str, str], judged: bool) -> Proposal | None:
    """These columns as a proposal; None where the record becomes no example with them.

    Args:
        record: the row.
        named: the field of each column that is to be named.
        renamed: that of each column that is named already.
        judged: whether a number in `label` judges the answer.
    """
    whole = {**renamed, **named}
    row = fields_of(record.fields, whole)
    form = form_of(row)
    if form is None:
        return None
    extra = unread(row, form)
    example = _example(record, {**whole, **dict.fromkeys(extra, UNUSED)}, form)
    if example is None or extra.keys() & {*whole.values()}:  # what was named is not read
        return None
    pair = preferences_in(record.fields)
    passed, marks = {}, []
    for path, value in extra.items():
        ruled = ruling(path, value, form, example.messages, judged)
        if isinstance(ruled, tuple) and path in (*MARKS, *VERDICTS):
            marks.append(path)
        elif ruled is not True:
            worse = pair is not None and path == pair[1]
            passed[path] = "the worse answer" if worse else meaning[0] if (meaning := meaning_of(path)) else MAY_MEAN
    columns = [f"{field}={_doubled(column)}" for column, field in named.items()]
    columns += [f"{UNUSED}={_doubled(path)}" for path in passed]
    return Proposal(tuple(columns), passed, tuple(marks))


def _example(record: Record, renamed: Mapping[str, str], form: str) -> Example | None:
    row = fields_of(record.fields, renamed)
    problems: list[Problem] = []
    return parsed(record, row, form, problems, {}) if form_of(row) == form else None


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
        {"prompt": turns, "completion": answered},
        {"prompt": texts, "completion": answered},
        {"text": texts, "label": labels},
        {"prompt": given, "completion": answered},
        {"text": texts},
        *({field: of(field)} for field in (*OPTIONAL, *OF_ANSWERS)),
    ]
    for columns in forms:
        if all(columns.values()):
            found = {field: names[0] for field, names in columns.items()}
            if more := {field: of(field)[0] for field in (*OPTIONAL, *OF_ANSWERS) if of(field) and field not in found}:
                yield found | more
            yield found


def _meant(name: str, value: Any) -> str | None:
    """The field that a column of another name or spelling most likely is: of turns, which are a list, or of text."""
    plain = name.strip().lower()
    preferred = is_preferred(name)
    if meaning_of(name) and not preferred:
        return None
    if turns := turns_in(value):
        sides = sides_of(turns)
        if sides[-1] == "assistant" != sides[0]:
            return "messages"
        also = next((field for field in ("prompt", "completion") if plain == field or plain in ALSO[field]), None)
        return "completion" if preferred else also or "messages"
    if isinstance(value, (list, dict)):
        return None
    near = difflib.get_close_matches(plain, sorted(FIELDS - TURNS), n=1, cutoff=0.8)
    field = near[0] if near else plain
    if field in OPTIONAL:
        return field
    also = next((one for one, names in ALSO.items() if field == one or field in names), None)
    return "completion" if preferred else also


def _without_pair(pair: tuple[str, str]) -> str:
    """What makes examples of a better and a worse answer whose columns alone do not tell what was asked."""
    better, worse = pair
    if is_preferred(better):
        return (
            f'write \'{better}\' as messages, [{{"role": "user", "content": ...}}, {{"role": "assistant", '
            f"\"content\": ...}}], and leave '{worse}' out"
        )
    return "write the better answer of each row as completion, and leave the other out"


def _without_flags(record: Record, renamed: Mapping[str, str], pair: tuple[str, str] | None) -> str:
    """What makes a known form of a row whose names do not tell what is meant. pair: columns of two answers in it."""
    row = fields_of(record.fields, renamed)
    for name, value in row.items():
        inside = value[0] if isinstance(value, list) and value else value
        if isinstance(inside, dict) and form_of(inside) not in (None, "text"):
            return f"write the fields of '{name}' into the row itself"
        if isinstance(inside, dict) and any(_meant(key, held) not in (None, "text") for key, held in inside.items()):
            return f"write the fields of '{name}' into the row itself"
    if pair:
        return _without_pair(pair)
    for form in FORMS.values():
        if form.needed & set(row):
            return f"add {' and '.join(sorted(form.needed - set(row)))}"
    speaking = [
        name
        for name, value in row.items()
        if isinstance(value, str) and not (is_harmless(name, value, None) or is_heading(name) or meaning_of(name))
    ]
    if len(speaking) == 2:
        asked, answered = speaking
        headed = _headed(record, {"prompt": asked, "completion": answered}, renamed, judged=False)
        if found := headed or _tried(record, {asked: "prompt", answered: "completion"}, renamed, judged=False):
            return f"add {found.flags} if {asked} is what is asked and {answered} the answer{found.remark}"
    return f"say which column is what, as in {_written(['prompt=QUESTION', 'completion=ANSWER'])}"
