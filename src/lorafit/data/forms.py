"""The forms a row may have, told by its fields, and the example it becomes. Every problem of a row at once."""

from __future__ import annotations

import difflib
import json
import math
import shlex
import string
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from typing import Any

from lorafit.data.examples import TEXT, Check, Example, Message
from lorafit.data.readers import Record
from lorafit.errors import Problem, SettingsError

ROLES = ("system", "user", "assistant")


def renamed_columns(columns: Sequence[str]) -> dict[str, str]:
    """Field by column name."""
    found: dict[str, str] = {}
    for given in columns:
        field, _, column = given.partition("=")
        if field not in FIELDS or not column:
            known = ", ".join(sorted(FIELDS))
            raise SettingsError(
                f"--columns {given}: write FIELD=COLUMN, such as prompt=question; FIELD is one of {known}"
            )
        if column in found or field in found.values():
            twice = column if column in found else field
            raise SettingsError(f"--columns {given}: '{twice}' is named twice: leave one of them")
        found[column] = field
    return found


def fields_of(record: Record, renamed: dict[str, str]) -> dict[str, Any]:
    """The fields of a record under the names that the forms know. What is named by a flag stands before a column that
    has the name by itself."""
    if not renamed:
        return record.fields
    named = {name: value for name, value in record.fields.items() if name in renamed or name not in renamed.values()}
    return {renamed.get(name, name): value for name, value in named.items()}


def form_of(row: dict[str, Any]) -> str | None:
    """The first form whose fields are all there."""
    return next((form for form, (needed, _) in FORMS.items() if needed <= set(row)), None)


def formless(where: str, row: dict[str, Any]) -> Problem:
    """A problem of one row, or of a whole file in which no row has a form."""
    fields = ", ".join(list(row)[:8]) or "none"
    return Problem(where, f"of no form that is known (fields: {fields})", _reform(row))


def _reform(row: dict[str, Any]) -> str:
    """What makes a known form of the row: flags ready to type, where its names tell what is meant."""
    meant = {name: _meant(name, value) for name, value in row.items()}
    if "completion" not in meant.values() and {"input", "output"} <= set(row) and "instruction" not in row:
        meant |= {"input": "prompt", "output": "completion"}
    if "instruction" in row and "output" not in row:
        meant |= {name: "output" for name, field in meant.items() if field == "completion"}
    for needed, _ in FORMS.values():
        if needed <= set(meant.values()):
            named: dict[str, str] = {}
            for name, field in meant.items():
                if field in needed and field not in row:
                    named.setdefault(field, name)
            return f"rename what is called otherwise, or add {_flags(named)}"
    for name, value in row.items():
        inside = value[0] if isinstance(value, list) and value else value
        if isinstance(inside, dict) and any(_meant(field, said) for field, said in inside.items() if field != "text"):
            return f"write the fields of '{name}' into the row itself"
    for needed, _ in FORMS.values():
        if needed & set(row):
            return f"add {' and '.join(sorted(needed - set(row)))}"
    if len(row) == 2:
        asked, answered = row
        fix = f"add {_flags({'prompt': asked, 'completion': answered})}"
        return f"{fix} if {asked} is what is asked and {answered} the answer"
    return f"say which column is what, as in {_flags({'prompt': 'QUESTION', 'completion': 'ANSWER'})}"


def _meant(name: str, value: Any) -> str | None:
    """The field that a column of another name or spelling most likely is; turns are a list, and no list is text."""
    plain = name.strip().lower()
    known = sorted(FIELDS & TURNS if isinstance(value, list) else FIELDS - TURNS)
    near = difflib.get_close_matches(plain, known, n=1, cutoff=0.8)
    return near[0] if near else next((field for field, names in ALSO.items() if plain in names), None)


def _flags(named: Mapping[str, str]) -> str:
    return " ".join(f"--columns {shlex.quote(f'{field}={name}')}" for field, name in named.items())


Wrong = Callable[..., None]
"""wrong(what, fix, field): tell a problem of the record at hand."""


def parsed(record: Record, renamed: dict[str, str], problems: list[Problem]) -> Example | None:
    """The example a record holds; None, with its problems told, where it holds none."""

    def wrong(what: str, fix: str, field: str = "") -> None:
        problems.append(Problem(f"{record.where}: {field}" if field else record.where, what, fix))

    row = fields_of(record, renamed)
    before = len(problems)
    form = form_of(row)
    if form is None:
        problems.append(formless(record.where, row))
        return None
    row = {**row, **{name: _unpacked(row[name]) for name in PACKED & set(row)}}
    beside = sorted(set(row) & ANSWERING) if form == "text" else []
    if beside:
        wrong(f"both text and {beside[0]}: plain text has no question and no answer",
              f"leave {beside[0]} out, or add --columns prompt=text if text is what is asked")  # fmt: skip
    messages = FORMS[form][1](row, wrong)
    system = row.get("system")
    if system and form != "text" and messages and messages[0].role != "system":
        messages = (*_said("system", system, "system", wrong), *messages)
    check, group = (None if row.get(name) == "" else row.get(name) for name in ("check", "group"))  # an empty cell
    check = _check(check, wrong)
    if type(group) is int:
        group = str(group)
    if group is not None and not isinstance(group, str):
        wrong(f"not text but {_kind(group)}", "write a string, or leave it out", "group")
    if len(problems) > before:
        return None
    label = messages[-1].content if form == LABELLED else None
    return Example(messages, record.where, check, group, _passed_over(row, form), label)


def _unpacked(value: Any) -> Any:
    """What a cell of a table holds as JSON; anything else as it is."""
    if isinstance(value, str) and value.strip()[:1] in ("{", "["):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
    return value


def _kind(value: Any) -> str:
    """What JSON calls a value of this type."""
    return KINDS.get(type(value), type(value).__name__)


def _messages(row: dict[str, Any], wrong: Wrong) -> tuple[Message, ...]:
    return _turns(row["messages"], "messages", "role", "content", {role: role for role in ROLES}, wrong)


def _sharegpt(row: dict[str, Any], wrong: Wrong) -> tuple[Message, ...]:
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
    return _turns(row["conversations"], "conversations", "from", "value", roles, wrong)


def _turns(turns: Any, name: str, by: str, says: str, roles: dict[str, str], wrong: Wrong) -> tuple[Message, ...]:
    if not isinstance(turns, list) or not turns:
        wrong("not a list of messages", f'write [{{"{by}": "{next(iter(roles))}", "{says}": "..."}}, ...]', name)
        return ()
    found = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            wrong("not an object", f'write {{"{by}": "user", "{says}": "..."}}', f"{name}[{i}]")
        elif by not in turn:
            there = ", ".join(list(turn)[:6])
            wrong(f"a turn without '{by}' (it has {there})", f"rename its fields to {by} and {says}", name)
        elif turn.get("weight") == 0:
            wrong("an answer not to be learnt (weight 0): all are", "end the conversation before it, or remove weight",
                  f"{name}[{i}].weight")  # fmt: skip
        elif not isinstance(turn.get(by), str) or turn[by] not in roles:
            said = json.dumps(turn.get(by), default=str)
            wrong(f"unknown role {said}", f"use {', '.join(roles)}", f"{name}[{i}].{by}")
        else:
            found += _said(roles[turn[by]], turn.get(says), f"{name}[{i}].{says}", wrong)
    if len(found) == len(turns):
        _order(found, name, by, wrong)
    return tuple(found)


def _said(role: str, content: Any, field: str, wrong: Wrong) -> list[Message]:
    """The message, or none with the problem told."""
    if not isinstance(content, str):
        wrong(f"not text but {_kind(content)}", "write a string", field)
    elif not _encodable(content):
        wrong("holds half of a character (a lone surrogate, \\ud800 to \\udfff)", "write the whole character", field)
    elif not content.strip(BLANK):
        what = "an empty answer: nothing to learn" if role == "assistant" else "empty"
        wrong(what, "fill it in, or remove the line", field)
    else:
        return [Message(role, content)]
    return []


def _pair(row: dict[str, Any], wrong: Wrong) -> tuple[Message, ...]:
    asked = _said("user", row["prompt"], "prompt", wrong)
    return (*asked, *_said("assistant", row["completion"], "completion", wrong))


def _alpaca(row: dict[str, Any], wrong: Wrong) -> tuple[Message, ...]:
    asked, more = _said("user", row["instruction"], "instruction", wrong), row.get("input")
    if more is not None and not isinstance(more, str):
        wrong(f"not text but {_kind(more)}", "write a string, or leave it out", "input")
    elif more and more.strip() and asked and _encodable(more):
        asked = [Message("user", f"{asked[0].content}\n\n{more}")]
    return (*asked, *_said("assistant", row["output"], "output", wrong))


def _labelled(row: dict[str, Any], wrong: Wrong) -> tuple[Message, ...]:
    label = row["label"]
    if isinstance(label, float) and not math.isfinite(label):
        wrong("not a label but a number that is none", "write one, or remove the line", "label")
    elif isinstance(label, (int, float)):  # as parquet files and JSON keep them
        label = json.dumps(int(label) if label == int(label) and not isinstance(label, bool) else label)
    elif isinstance(label, str):
        label = label.strip()
    return (*_said("user", row["text"], "text", wrong), *_said("assistant", label, "label", wrong))


def _plain(row: dict[str, Any], wrong: Wrong) -> tuple[Message, ...]:
    return tuple(_said(TEXT, row["text"], "text", wrong))


LABELLED = "text and label"
FORMS: dict[str, tuple[frozenset[str], Callable[[dict[str, Any], Wrong], tuple[Message, ...]]]] = {
    "messages": (frozenset({"messages"}), _messages),
    "sharegpt": (frozenset({"conversations"}), _sharegpt),
    "prompt and completion": (frozenset({"prompt", "completion"}), _pair),
    "alpaca": (frozenset({"instruction", "output"}), _alpaca),
    LABELLED: (frozenset({"text", "label"}), _labelled),
    "text": (frozenset({"text"}), _plain),
}
ALSO = {  # what others call these fields, in the public data sets met so far
    "prompt": ("question", "query", "source", "mr", "problem", "document", "original_text", "ask", "user"),
    "completion": ("answer", "response", "reply", "target", "ref", "reference", "summary", "reference_summary",
                   "solution", "assistant"),
    "text": ("sentence", "utterance", "review", "content", "body", "comment", "message"),
    "label": ("intent", "category", "class", "sentiment", "topic"),
}  # fmt: skip
ANSWERING = frozenset().union(*(needed for needed, _ in FORMS.values())) - {"text", "label"}
FIELDS = frozenset({"input", "system", "check", "group", "text", "label"}) | ANSWERING
TURNS = frozenset({"messages", "conversations"})
PACKED = TURNS | {"check"}  # may stand as JSON in the cell of a table
KINDS: dict[type, str] = {type(None): "null", bool: "true or false", dict: "an object", list: "a list", int: "a number",
                          float: "a number"}  # fmt: skip
BLANK = string.whitespace + "\u00a0\u200b\u200c\u200d\u2060\ufeff"  # what shows nothing


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _passed_over(row: dict[str, Any], form: str) -> tuple[str, ...]:
    """Names of fields that nothing was read from."""
    used = FORMS[form][0] | {"check", "group"} | ({"input"} if form == "alpaca" else set())
    used |= {"system"} if form != "text" else set()
    inner = {f"messages[].{field}" for turn in row["messages"] for field in set(turn) - {"role", "content"}
             } if form == "messages" else set()  # fmt: skip
    return tuple(sorted(set(row) - used | inner))


def _order(turns: list[Message], name: str, by: str, wrong: Wrong) -> None:
    roles = [turn.role for turn in turns]
    if "assistant" not in roles:
        wrong("no assistant message: nothing to learn", "add the answer, or remove the line", name)
    elif roles[-1] != "assistant":
        wrong(f"ends with a {roles[-1]} message", "end with the assistant's answer", name)
    if "system" in roles[1:]:
        wrong("a system message that is not the first", "put it first", f"{name}[{roles.index('system', 1)}].{by}")
    spoken = [role for role in roles if role != "system"]
    if spoken and spoken[0] == "assistant":
        wrong("begins with an answer", "begin with a user message", f"{name}[0].{by}")
    for i in range(1, len(spoken)):
        if spoken[i] == spoken[i - 1]:
            wrong(f"two {spoken[i]} messages in a row", "join them into one", name)
            break


def _check(value: Any, wrong: Wrong) -> Check | None:
    if value is None:
        return None
    fix = 'write {"contains": ["21 days"], "lacks": ["14 days"], "max_words": 30}'
    keys = ("contains", "lacks", "max_words", "declines")
    strange = [name for name in value if name not in keys] if isinstance(value, dict) else []
    if strange:
        near = difflib.get_close_matches(strange[0], keys, n=1)
        wrong(f"not a check, for it has '{strange[0]}'", f"did you mean {near[0]}?" if near else fix, "check")
        return None
    if not isinstance(value, dict):
        wrong("not a check", fix, "check")
        return None
    lists = [value.get("contains", []), value.get("lacks", [])]
    words, declines = value.get("max_words", 100), value.get("declines", False)
    texts = all(isinstance(one, list) and all(isinstance(t, str) and t.strip() for t in one) for one in lists)
    if not texts or not lists[0] or type(words) is not int or words < 1 or not isinstance(declines, bool):
        wrong("not a check", fix, "check")
        return None
    return Check(tuple(lists[0]), tuple(lists[1]), words, declines)
