"""Proposes flags for a file whose fields have other names than ours, after trying them on a row.

Records that have no form, or fields that nothing reads, go in; a `Problem` that says what to type comes out.
"""

from __future__ import annotations

import difflib
import shlex
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorafit.data.columns import Template, joined
from lorafit.data.fields import (
    ALSO,
    FIELDS,
    MARKS,
    OPTIONAL,
    REASONING_FIELDS,
    TARGETS,
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
from lorafit.data.records import Record
from lorafit.errors import Problem

MAY_MEAN = "which may carry meaning"
HEADED = ("prompt", "instruction", "text")  # fields that the subject of a mail is put above


@dataclass(frozen=True)
class Proposal:
    """Flags with which a row becomes an example: they were tried on it.

    Args:
        columns: as --columns takes them.
        passed: what may be lost with each column that is passed over, by its name.
        marks: columns that say which rows are not to be learnt, and that are read.
        instead: a given flag that these flags replace; "" for none.
    """

    columns: tuple[str, ...]
    passed: Mapping[str, str]
    marks: tuple[str, ...]
    instead: str = ""

    @property
    def flags(self) -> str:
        """The flags as they are typed."""
        skip = " --skip-bad" if self.marks else ""
        return _written(self.columns) + skip + (f" in place of {_written([self.instead])}" if self.instead else "")

    @property
    def remark(self) -> str:
        """What the flags leave out; "" where they leave nothing out."""
        fields = "; ".join(f"'{name}', {what}" for name, what in self.passed.items())
        marks = " and ".join(f"'{name}'" for name in self.marks)
        parts = [f"{what} {names}" for what, names in (("passed over:", fields), ("left out: rows by", marks)) if names]
        return f" ({'; '.join(parts)})" if parts else ""


def formless(where: str, records: Sequence[Record], renamed: Mapping[str, str]) -> Problem:
    """The problem of a row that has no form, or of a file none of whose rows has one.

    Args:
        where: the place to name.
        records: the row, or the rows of the file.
        renamed: the field of each column that was named by a flag.
    """
    row = fields_of(records[0].fields, renamed)
    names = [name for column in records[0].fields if (name := renamed.get(column, column)) != UNUSED]
    fields = ", ".join(names[:8]) or "none"
    what = f"not a known form (fields: {fields})"
    if pair := preferences_in(row):
        what = f"pairs of a preferred and a rejected answer, and learning from preferences is not there yet ({fields})"
    judged = judges([fields_of(record.fields, renamed) for record in records])
    proposals = (_proposal(record, renamed, judged) for record in records[:20])
    proposal = next(filter(None, proposals), None)
    for mark in proposal.marks if proposal and len(records) > 1 else ():
        if all(truth_of(record.fields.get(mark)) is False for record in records):
            return Problem(where, what, f"every row is marked as not to be learnt by '{mark}': give rows that are")
    known = f"rename the fields, or add {proposal.flags}{proposal.remark}" if proposal else ""
    return Problem(where, what, known if proposal else _without_flags(records[0], renamed, pair))


def hold_examples(records: Sequence[Record]) -> bool:
    """Whether one of the first rows has a form, or would have one with the flags that are proposed."""
    return any(form_of(fields_of(r.fields, {})) or _proposal(r, {}, judged=False) for r in records[:20])


def unread_fields(unknown: Mapping[str, Record], renamed: Mapping[str, str]) -> Problem:
    """The problem of a file with fields that nothing reads and that may carry meaning.

    Args:
        unknown: the first record that has each field.
        renamed: the field of each column that was named by a flag.
    """
    record = next(iter(unknown.values()))
    names = ", ".join(f"'{name}'" for name in unknown)
    unused = _written([f"{UNUSED}={_escaped(_column(name, renamed))}" for name in unknown])
    proposal = _proposal(record, renamed, judged=False)
    learnt = f"{proposal.flags} to learn from it{proposal.remark}, or " if proposal else ""
    fix = f"add {learnt}{unused} to pass it over"
    return Problem(record.where, f"nothing reads {names}, {MAY_MEAN}", fix, whole=True)


def _column(field: str, renamed: Mapping[str, str]) -> str:
    """The column that a flag names as this field; the field itself where no flag does."""
    return next((column for column, name in renamed.items() if name == field), field)


def _escaped(column: str) -> str:
    """The name of a column as --columns takes it, with doubled braces."""
    return column.replace("{", "{{").replace("}", "}}")


def _written(columns: Sequence[str]) -> str:
    return " ".join(f"--columns {shlex.quote(column)}" for column in columns)


def _proposal(record: Record, renamed: Mapping[str, str], judged: bool) -> Proposal | None:
    """Flags with which the record becomes an example, with all of its fields if possible; None where no flags do."""
    for columns in _candidates(fields_of(record.fields, renamed)):
        named = {column: field for field, column in columns.items() if column != field}
        if (set(renamed) | set(renamed.values())) & {*named, *named.values()}:
            continue
        if proposal := _with_heading(record, columns, renamed, judged):
            return proposal
        if named and (proposal := _tried(record, named, renamed, judged)):
            return proposal
    return None


def _with_heading(
    record: Record, columns: Mapping[str, str], renamed: Mapping[str, str], judged: bool
) -> Proposal | None:
    """A proposal that puts the subject of a mail above the question; None where the record has no subject, or where the
    question is made of columns already.

    Args:
        record: the row.
        columns: the column of each field; where a flag names it, the field itself.
        renamed: the field of each column that was named by a flag.
        judged: whether a number in `label` judges the answer.
    """
    field = next((name for name in HEADED if name in columns), "")
    heading = next((name for name in record.fields if is_heading(name) and name not in renamed), "")
    if not (field and heading and filled(record.fields[heading])) or (field == "text" and "label" not in columns):
        return None
    column = _column(columns[field], renamed)
    text = record.fields.get(column)
    if not isinstance(text, str) or renamed.get(column) == column or {"{", "}"} & {*heading, *column}:
        return None
    template = f"{{{heading}}}\\n\\n{{{column}}}"
    rows = joined([record], {field: Template.of(template)}, {}, [])
    rest = {column: name for column, name in renamed.items() if name != field}
    named = {column: name for name, column in columns.items() if name not in (column, field)}
    proposal = _tried(rows[0], named, rest, judged) if rows else None
    if proposal is None:
        return None
    instead = f"{field}={_escaped(column)}" if column in renamed else ""
    return replace(proposal, columns=(f"{field}={template}", *proposal.columns), instead=instead)


def _tried(record: Record, named: Mapping[str, str], renamed: Mapping[str, str], judged: bool) -> Proposal | None:
    """A proposal to name these columns; None where the record becomes no example with it.

    Args:
        record: the row.
        named: the field of each column that is proposed.
        renamed: the field of each column that was named by a flag.
        judged: whether a number in `label` judges the answer.
    """
    whole = {**renamed, **named}
    row = fields_of(record.fields, whole)
    form = form_of(row)
    if form is None:
        return None
    extra = unread(row, form)
    used = fields_of(record.fields, {**whole, **dict.fromkeys(extra, UNUSED)})
    example = parsed(record, used, form, [], {}) if form_of(used) == form else None
    if example is None or extra.keys() & {*whole.values()}:  # what was named is not read
        return None
    pair = preferences_in(record.fields)
    passed, marks = {}, []
    for path, value in extra.items():
        verdict = ruling(path, value, form, example.messages, judged)
        if isinstance(verdict, tuple) and path in (*MARKS, *VERDICTS):
            marks.append(path)
        elif verdict is not True:
            worse = pair is not None and path == pair[1]
            passed[path] = "the worse answer" if worse else meaning[0] if (meaning := meaning_of(path)) else MAY_MEAN
    columns = [f"{field}={_escaped(column)}" for column, field in named.items()]
    columns += [f"{UNUSED}={_escaped(path)}" for path in passed]
    return Proposal(tuple(columns), passed, tuple(marks))


def _candidates(row: Mapping[str, Any]) -> Iterator[dict[str, str]]:
    """Columns by the field that they may be meant for; the most informative choice first."""
    fields = {name: _likely_field(name, value) for name, value in row.items() if filled(value)}

    def columns_for(field: str) -> list[str]:  # columns with one of our names before others
        return sorted((name for name, likely in fields.items() if likely == field), key=lambda name: name not in FIELDS)

    turns, prompts, inputs = columns_for("messages"), columns_for("prompt"), columns_for("input")
    answers, texts = columns_for("completion"), columns_for("text")
    labels = sorted(columns_for("label"), key=lambda name: not isinstance(row[name], str))  # a name before a number
    optional = {field: columns for field in (*OPTIONAL, *REASONING_FIELDS) if (columns := columns_for(field))}
    alpaca = "instruction" in row
    forms: list[dict[str, list[str]]] = [
        {"messages": turns},
        {"instruction": prompts, "input": inputs, "output": answers},
        {"instruction": prompts, "output": answers} if alpaca else {"prompt": prompts, "completion": answers},
        {"prompt": turns, "completion": answers},
        {"prompt": texts, "completion": answers},
        {"text": texts, "label": labels},
        {"prompt": inputs, "completion": answers},
        {"text": texts},
        *({field: columns} for field, columns in optional.items()),
    ]
    for form in forms:
        if all(form.values()):
            choice = {field: columns[0] for field, columns in form.items()}
            if more := {field: columns[0] for field, columns in optional.items() if field not in choice}:
                yield choice | more
            yield choice


def _likely_field(name: str, value: Any) -> str | None:
    """The field that a column of another name or spelling most likely is."""
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
    near = difflib.get_close_matches(plain, sorted(FIELDS - TURNS - TARGETS), n=1, cutoff=0.8)
    field = near[0] if near else plain
    if field in OPTIONAL:
        return field
    also = next((ours for ours, names in ALSO.items() if field == ours or field in names), None)
    return "completion" if preferred else also


def _without_flags(record: Record, renamed: Mapping[str, str], pair: tuple[str, str] | None) -> str:
    """How to give a row a form, where the names of its fields do not say what is meant.

    Args:
        record: the row.
        renamed: the field of each column that was named by a flag.
        pair: its columns with a better and a worse answer; None where it has none.
    """
    row = fields_of(record.fields, renamed)
    for name, value in row.items():
        inner = value[0] if isinstance(value, list) and value else value
        fields = [_likely_field(*item) for item in inner.items()] if isinstance(inner, dict) else []
        if isinstance(inner, dict) and {form_of(inner), *fields} - {None, "text"}:
            return f"write the fields of '{name}' into the row itself"
    if pair and is_preferred(pair[0]):
        return (
            f'write \'{pair[0]}\' as messages, [{{"role": "user", "content": ...}}, {{"role": "assistant", '
            f"\"content\": ...}}], and leave '{pair[1]}' out"
        )
    if pair:
        return "write the better answer of each row as completion, and leave the other out"
    for form in FORMS.values():
        if form.needed & set(row):
            return f"add {' and '.join(sorted(form.needed - set(row)))}"
    texts = [
        name
        for name, value in row.items()
        if isinstance(value, str) and not (is_harmless(name, value, None) or is_heading(name) or meaning_of(name))
    ]
    if len(texts) == 2:
        question, answer = texts
        headed = _with_heading(record, {"prompt": question, "completion": answer}, renamed, judged=False)
        tried = headed or _tried(record, {question: "prompt", answer: "completion"}, renamed, judged=False)
        if tried:
            return f"add {tried.flags} if {question} is what is asked and {answer} the answer{tried.remark}"
    return f"name the columns, as in {_written(['prompt=QUESTION', 'completion=ANSWER'])}"
