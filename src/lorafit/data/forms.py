"""The forms a row may have, told by its fields, and the example it becomes. Every problem of a row at once."""

from __future__ import annotations

import difflib
import json
import math
import re
import shlex
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import regex

from lorafit.data.equality import json_form
from lorafit.data.examples import TEXT, Check, Example, Message
from lorafit.data.fields import (
    BASIC,
    MARKS,
    OF_ANSWERS,
    OPTIONAL,
    SPOKEN,
    TURNS,
    UNUSED,
    VERDICTS,
    filled,
    is_empty,
    is_harmless,
    meaning_of,
    preferences_in,
    truth_of,
)
from lorafit.data.messages import (
    BY,
    SAYS,
    THINKS,
    Wrong,
    encodable,
    kind_of,
    read_turns,
    said,
    sides_of,
    with_reasoning,
)
from lorafit.data.readers import Record
from lorafit.data.tools import OF_CALLS, OF_ROWS, known_calls, read_tools
from lorafit.errors import Problem

Row = Mapping[str, Any]
LABELLED = "text and label"
CLOSING = re.compile(r"\s*(?:<[^<>]*>|\[/?\w+\]|#+)?\s*")  # what a template puts behind an answer
MOST_AROUND = 300  # characters that a template puts around a question and its answer


@dataclass(frozen=True)
class Form:
    """needed, optional: fields that the form reads. read: the messages of a row, with its problems told."""

    needed: frozenset[str]
    read: Callable[[Row, Wrong], tuple[Message, ...]]
    optional: frozenset[str] = frozenset(OPTIONAL)

    @cached_property
    def used(self) -> frozenset[str]:
        return self.needed | self.optional


def form_of(row: Row) -> str | None:
    """The first form whose fields all hold something; failing that, the first whose fields are all there. A
    conversation that two answers may end is of none."""
    # A label that is a number and none is told, and not taken for no label.
    held = {
        name
        for name in BASIC & row.keys()
        if not is_empty(row[name]) or (name == "label" and isinstance(row[name], float))
    }
    found = next((form for there in (held, row.keys()) for form, one in FORMS.items() if one.needed <= there), None)
    if found and FORMS[found].needed <= TURNS and preferences_in(row):
        ends = sides_of(row[next(iter(FORMS[found].needed))])[-1:]
        return found if ends == ["assistant"] else None
    return found


def judges(rows: Sequence[Row]) -> bool:
    """Whether `label` in these rows is 1 for a good answer and 0 for a bad one: it holds nothing else."""
    found = {str(row["label"]).strip() for row in rows if filled(row.get("label"))}
    return bool(found) and found <= {"0", "1", "0.0", "1.0"}


def parsed(
    record: Record, row: Row, form: str, problems: list[Problem], unknown: dict[str, Record], judged: bool = False
) -> Example | None:
    """The example that a record holds.

    Args:
        record: the row of a file.
        row: its fields under the names that the forms know.
        form: the form of the row.
        problems: gets every problem of the row.
        unknown: gets the name of every field that nothing reads and that is not harmless, with the first such record.
        judged: whether a number in `label` says that the answer is a good or a bad one, as `judges` has it.

    Returns:
        The example; None, with its problems told, where there is none.
    """

    def wrong(what: str, fix: str, field: str = "") -> None:
        problems.append(Problem(f"{record.where}: {field}" if field else record.where, what, fix))

    before = len(problems)
    messages = FORMS[form].read(row, wrong)
    tools: tuple[str, ...] = ()
    if FORMS[form].optional >= TOOLS:
        tools = read_tools(row, wrong)
        messages = _called(row, messages, tools, wrong)
    if form != "text" and messages and "system" in row:
        messages = _with_system(row["system"], messages, wrong)
    for name in OF_ANSWERS if messages else ():
        if name in FORMS[form].optional and name in row:
            messages = (*messages[:-1], with_reasoning(messages[-1], row[name], name, wrong) or messages[-1])
    check, group = _check(row.get("check"), wrong), row.get("group")
    if check is not None and messages and messages[-1].calls:
        wrong("a check of an answer that is a call", "leave it out: a call is right where it equals this one", "check")
    if type(group) is int:
        group = str(group)
    if group is not None and not isinstance(group, str):
        wrong(f"not text but {kind_of(group)}", "write a string, or leave it out", "group")
    extra = unread(row, form)
    strange = []
    for path, value in extra.items():
        ruled = ruling(path, value, form, messages, judged)
        if isinstance(ruled, tuple):
            wrong(*ruled, path)
        elif not ruled:
            strange.append(path)
    if len(problems) > before:
        return None
    for path in strange:
        unknown.setdefault(path, record)
    label = messages[-1].content if form == LABELLED else None
    return Example(messages, record.where, check, group, tuple(sorted(extra)), label, tools)


def unread(row: Row, form: str) -> dict[str, Any]:
    """What the fields hold that the form does not read, by name; those of messages as `messages[].name`."""
    used = FORMS[form].used
    found = {name: value for name, value in row.items() if name not in used and filled(value)}
    for name in FORMS[form].needed & SPOKEN:
        for turn in row[name] if isinstance(row[name], list) else ():
            if isinstance(turn, dict):
                found |= {
                    f"{name}[].{key}": value
                    for key, value in turn.items()
                    if key not in (*BY, *SAYS, *MARKS, *OF_CALLS, *THINKS) and filled(value)
                }
    return found


def _called(row: Row, messages: tuple[Message, ...], tools: tuple[str, ...], wrong: Wrong) -> tuple[Message, ...]:
    """The messages with their calls held against the row's tools, and against its word on parallel calls."""
    if not any(message.calls for message in messages):
        return messages
    place = next((name for name in ("messages", "conversations") if name in row), "prompt")
    several = next((one for one in messages if len(one.calls) > 1), None)
    if truth_of(row.get("parallel_tool_calls")) is False and several is not None:
        wrong(
            f"{len(several.calls)} calls in one message, where parallel_tool_calls is false",
            "set it to true, or give each call a message",
            place,
        )
    return tuple(known_calls(messages, tools, [place] * len(messages), wrong))


def ruling(path: str, value: Any, form: str, messages: tuple[Message, ...], judged: bool) -> tuple[str, str] | bool:
    """Whether a field that the form does not read may be passed over; or what it says that must not be, and what to do.

    Args:
        path: the field, those of messages as `messages[].name`.
        value: what it holds.
        form: of its row.
        messages: that the row holds without it; none where there are none.
        judged: whether a number in `label` judges the answer.
    """
    if meaning := meaning_of(path):
        return meaning[0], f"{meaning[1]}, or {_passing(path)} to pass it over" if messages else meaning[1]
    if path in MARKS and (truth := truth_of(value)) is not None:
        return truth or _left_out("a row marked as not to be learnt", path, value)
    if is_harmless(path, value, form) or _repeats(value, messages):
        return True
    by_number = judged and path == "label"
    verdict = path in VERDICTS and form != "text" and (by_number or path != "label" or _is_truth(value))
    if verdict and (truth := truth_of(value)) is not None:
        bad = "an answer marked as bad, as unpaired preferences have it, which would be learnt"
        what, fix = _left_out(bad, path, value)
        return truth or (what, f"{fix}, or {_passing(path)} if it says something else" if by_number else fix)
    return False


def _passing(path: str) -> str:
    return f"add --columns {shlex.quote(f'{UNUSED}={path}')}"


def _left_out(what: str, mark: str, value: Any) -> tuple[str, str]:
    """What a row is that its mark keeps from being learnt, and what to do."""
    good = "true" if str(value).strip().lower() == "false" else "1"
    return f"{what} ({mark} {json.dumps(value)})", f"keep the rows with {good}, and leave this one out (--skip-bad)"


def _is_truth(value: Any) -> bool:
    return isinstance(value, bool) or (isinstance(value, str) and value.strip().lower() in ("true", "false"))


def _repeats(value: Any, messages: tuple[Message, ...]) -> bool:
    """Whether a text says only what the messages say: one of them again, or question and answer as one text."""
    if not isinstance(value, str):
        return False
    told = [message.content.strip() for message in messages]
    if value.strip() in told:
        return True
    return len(told) > 1 and all(told[-2:]) and _is_of(value, [*re.split(r"\n\s*\n", told[-2]), told[-1]])


def _is_of(text: str, parts: list[str]) -> bool:
    """Whether a text is these parts in order and little else: what a template puts before a part, which ends in a mark,
    and a closing mark behind the last."""
    at = around = 0
    for part in parts:
        begins = text.find(part, at)
        while 0 <= begins - at <= MOST_AROUND and not _opens(text[at:begins]):
            begins = text.find(part, begins + 1)
        around += begins - at
        if begins < 0 or around > MOST_AROUND:
            return False
        at = begins + len(part)
    return bool(CLOSING.fullmatch(text, at))


def _opens(before: str) -> bool:
    """Whether a part of a text may follow this: nothing, or what ends in a mark."""
    return not before.strip() or before.rstrip(" \t")[-1] in "\n:>]"


def _with_system(system: Any, messages: tuple[Message, ...], wrong: Wrong) -> tuple[Message, ...]:
    one = said("system", system, "system", wrong)
    if one is None or messages[0].role != "system":
        return messages if one is None else (one, *messages)
    if one.content.strip() != messages[0].content.strip():
        wrong("another system prompt than that of the messages", "leave one of the two", "system")
    return messages


def _messages(row: Row, wrong: Wrong) -> tuple[Message, ...]:
    return read_turns({"messages": row["messages"]}, wrong)


def _sharegpt(row: Row, wrong: Wrong) -> tuple[Message, ...]:
    return read_turns({"conversations": row["conversations"]}, wrong)


def _pair(row: Row, wrong: Wrong) -> tuple[Message, ...]:
    """A question and an answer: two texts, or lists of messages that make one conversation."""
    fields = {"prompt": "user", "completion": "assistant"}
    if any(isinstance(row[name], list) for name in fields):
        turns = {
            name: [{"role": role, "content": row[name]}] if isinstance(row[name], str) else row[name]
            for name, role in fields.items()
        }
        return read_turns(turns, wrong)
    return _told(*(said(role, row[name], name, wrong) for name, role in fields.items()))


def _told(*messages: Message | None) -> tuple[Message, ...]:
    return tuple(message for message in messages if message is not None)


def _alpaca(row: Row, wrong: Wrong) -> tuple[Message, ...]:
    asked, more = said("user", row["instruction"], "instruction", wrong), row.get("input")
    if more is not None and not isinstance(more, str):
        wrong(f"not text but {kind_of(more)}", "write a string, or leave it out", "input")
    elif more and asked and encodable(more):
        asked = Message("user", f"{asked.content}\n\n{more}")
    return _told(asked, said("assistant", row["output"], "output", wrong))


def _labelled(row: Row, wrong: Wrong) -> tuple[Message, ...]:
    label = row["label"]
    if isinstance(label, float) and not math.isfinite(label):
        wrong("not a label but a number that is none", "write one, or remove the line", "label")
    elif isinstance(label, (int, float)):  # as parquet files and JSON keep them
        label = json.dumps(int(label) if label == int(label) and not isinstance(label, bool) else label)
    elif isinstance(label, str):
        label = label.strip()
    return _told(said("user", row["text"], "text", wrong), said("assistant", label, "label", wrong))


def _plain(row: Row, wrong: Wrong) -> tuple[Message, ...]:
    return _told(said(TEXT, row["text"], "text", wrong))


TOOLS = frozenset(OF_ROWS)
_OF_TURNS = TOOLS | {*OPTIONAL}
FORMS = {
    "messages": Form(frozenset({"messages"}), _messages, _OF_TURNS),
    "sharegpt": Form(frozenset({"conversations"}), _sharegpt, _OF_TURNS),
    "prompt and completion": Form(frozenset({"prompt", "completion"}), _pair, _OF_TURNS | {*OF_ANSWERS}),
    "alpaca": Form(frozenset({"instruction", "output"}), _alpaca, frozenset({"input", *OPTIONAL, *OF_ANSWERS})),
    LABELLED: Form(frozenset({"text", "label"}), _labelled),
    "text": Form(frozenset({"text"}), _plain, frozenset({"check", "group"})),
}


CHECKS = ("contains", "lacks", "max_words", "declines", "exact", "json", "number", "pattern")
MOST_WORDS = 100  # of an answer, where its check sets no limit and does not say the whole of it
NO_LIMIT = 10**9


def _check(value: Any, wrong: Wrong) -> Check | None:
    if value is None:
        return None
    fix = 'write {"contains": ["21 days"], "lacks": ["14 days"], "max_words": 30}'
    strange = [name for name in value if name not in CHECKS] if isinstance(value, dict) else []
    if strange:
        near = difflib.get_close_matches(strange[0], CHECKS, n=1)
        wrong(f"not a check, for it has '{strange[0]}'", f"did you mean {near[0]}?" if near else fix, "check")
        return None
    if not isinstance(value, dict):
        wrong("not a check", fix, "check")
        return None
    given = {name: one for name, one in value.items() if one is not None}  # tables write what is not there as null
    lists = [given.get("contains", []), given.get("lacks", [])]
    whole = {name: given[name] for name in ("exact", "json", "number", "pattern") if name in given}
    longest = NO_LIMIT if {"exact", "json"} & {*whole} else MOST_WORDS
    words, declines = given.get("max_words", longest), given.get("declines", False)
    texts = all(isinstance(one, list) and all(isinstance(t, str) and t.strip() for t in one) for one in lists)
    if not texts or not (lists[0] or whole) or type(words) is not int or words < 1 or not isinstance(declines, bool):
        wrong("not a check", fix, "check")
        return None
    for name, one in whole.items():
        if (fault := _fault(name, one)) is not None:
            wrong(f"not a check, for its {name} is {fault}", "write one, or leave it out", "check")
            return None
    return Check(
        tuple(lists[0]),
        tuple(lists[1]),
        words,
        declines,
        whole.get("exact"),
        json_form(whole["json"]) if "json" in whole else None,
        float(whole["number"]) if "number" in whole else None,
        whole.get("pattern"),
    )


def _fault(name: str, value: Any) -> str | None:
    """What is wrong with what a check asks of an answer as a whole."""
    if name in ("exact", "pattern") and not isinstance(value, str):
        return "no text"
    if name in ("exact", "pattern") and not value.strip():
        return "empty"
    if name == "number" and (type(value) not in (int, float) or not math.isfinite(value)):
        return "no number"
    if name == "pattern":
        try:
            regex.compile(value)
        except regex.error as error:
            return f"no regular expression ({error})"
    return None
