"""The forms that a row may have, recognised by its fields, and the example that it becomes.

A row under the names that the forms know goes in; an `Example`, or every problem of the row at once, comes out.
"""

from __future__ import annotations

import difflib
import json
import math
import re
import shlex
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import pairwise
from typing import Any

import regex

from lorafit.data.equality import json_form
from lorafit.data.examples import TEXT, Check, Example, Message
from lorafit.data.fields import (
    BASIC,
    MARKS,
    OPTIONAL,
    REASONING_FIELDS,
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
    CONTENT_FIELDS,
    ROLE_FIELDS,
    THINKS,
    is_text,
    kind_of,
    read_message,
    read_turns,
    sides_of,
    with_reasoning,
)
from lorafit.data.records import Record
from lorafit.data.targets import LARGEST, Names, Number, Pair, Span, Spans, Target, is_finite, shown_spans
from lorafit.data.tools import CALL_FIELDS, TOOL_FIELDS, Wrong, known_calls, read_tools
from lorafit.errors import Problem

Row = Mapping[str, Any]
LABELLED = "text and label"
MARKED = "text and entities"
ENTITY = '{"start": 0, "end": 6, "label": "PLACE"}'  # as a fix shows it
CLOSING = re.compile(r"\s*(?:<[^<>]*>|\[/?\w+\]|#+)?\s*")  # what a template writes after an answer
MOST_AROUND = 300  # characters that a template writes around a question and its answer


@dataclass(frozen=True)
class Form:
    """A form of rows.

    Args:
        needed: fields that a row of this form has.
        read: reads the messages of a row, None for a message with a problem.
        optional: other fields that it reads.
        target: reads what a text is to be given; None for other forms.
        fits: whether a row with the needed fields is of this form.
    """

    needed: frozenset[str]
    read: Callable[[Row, Wrong], Iterable[Message | None]]
    optional: frozenset[str] = frozenset(OPTIONAL)
    target: Callable[[Row], Target] | None = None
    fits: Callable[[Row], bool] = lambda row: True

    @cached_property
    def used(self) -> frozenset[str]:
        return self.needed | self.optional


def form_of(row: Row) -> str | None:
    """The name of the first form whose fields all hold something; failing that, the first whose fields are all there.
    None for a conversation with two answers to choose from."""
    # A label that is not a number (NaN) counts as held: it is reported, not taken for a missing label. No labels at all
    # are an empty list.
    held = {
        name
        for name in BASIC & row.keys()
        if not is_empty(row[name])
        or (name in ("label", "score") and isinstance(row[name], float))
        or (name in ("labels", "entities") and row[name] == [])
    }
    of = (name for fields in (held, row.keys()) for name, form in FORMS.items() if form.needed <= fields)
    name = next((name for name in of if FORMS[name].fits(row)), None)
    if name and FORMS[name].needed <= TURNS and preferences_in(row):
        last = sides_of(row[next(iter(FORMS[name].needed))])[-1:]
        return name if last == ["assistant"] else None
    return name


def judges(rows: Sequence[Row]) -> bool:
    """Whether `label` in these rows is 1 for a good answer and 0 for a bad one: it holds nothing else."""
    labels = {str(row["label"]).strip() for row in rows if filled(row.get("label"))}
    return bool(labels) and labels <= {"0", "1", "0.0", "1.0"}


def parsed(
    record: Record, row: Row, form: str, problems: list[Problem], unknown: dict[str, Record], judged: bool = False
) -> Example | None:
    """Read the example that a record holds.

    Args:
        record: the row of a file.
        row: its fields under the names that the forms know.
        form: the form of the row.
        problems: receives every problem of the row.
        unknown: receives the name of every field that nothing reads and that is not harmless, with the first such
            record.
        judged: whether a number in `label` judges the answer, as `judges` reports it.

    Returns:
        The example; None where there was a problem.
    """

    def wrong(what: str, fix: str, field: str = "") -> None:
        if field == "score" and field not in record.fields and "target" in record.fields:
            field = "target"  # as the file calls it
        problems.append(Problem(f"{record.where}: {field}" if field else record.where, what, fix))

    before = len(problems)
    messages = tuple(message for message in FORMS[form].read(row, wrong) if message is not None)
    tools: tuple[str, ...] = ()
    if FORMS[form].optional >= TOOLS:
        tools = read_tools(row, wrong)
        messages = _check_calls(row, messages, tools, wrong)
    if form != "text" and messages and "system" in row:
        messages = _with_system(row["system"], messages, wrong)
    for name in REASONING_FIELDS if messages else ():
        if name in FORMS[form].optional and name in row:
            messages = (*messages[:-1], with_reasoning(messages[-1], row[name], name, wrong) or messages[-1])
    check, group = _check(row.get("check"), wrong), row.get("group")
    if check is not None and messages and messages[-1].calls:
        wrong("a check of an answer that is a call", "leave it out: a call is right where it equals this one", "check")
    if type(group) is int:
        group = str(group)
    if record.shifted and form == MARKED and row["entities"]:
        what = (
            "line ends of another system, or a byte order mark, in its cells, so that characters are counted otherwise"
        )
        wrong(what, "write this row in a jsonl file, or count again in a file with line feeds alone", "entities")
    if group is not None and not isinstance(group, str):
        wrong(f"not text but {kind_of(group)}", "write a string, or leave it out", "group")
    extra = unread(row, form)
    strange = []
    for path, value in extra.items():
        verdict = ruling(path, value, form, messages, judged)
        if isinstance(verdict, tuple):
            wrong(*verdict, path)
        elif not verdict:
            strange.append(path)
    if len(problems) > before:
        return None
    for path in strange:
        unknown.setdefault(path, record)
    label = messages[-1].content if form == LABELLED else None
    target = of_form(row) if (of_form := FORMS[form].target) else None
    return Example(messages, record.where, check, group, tuple(sorted(extra)), label, tools, target)


def unread(row: Row, form: str) -> dict[str, Any]:
    """The values of fields that the form does not read, by name; those of messages as `messages[].name`."""
    used = FORMS[form].used
    extra = {name: value for name, value in row.items() if name not in used and filled(value)}
    known = (*ROLE_FIELDS, *CONTENT_FIELDS, *MARKS, *CALL_FIELDS, *THINKS)
    for name in FORMS[form].needed & SPOKEN:
        for turn in row[name] if isinstance(row[name], list) else ():
            if isinstance(turn, dict):
                extra |= {f"{name}[].{k}": value for k, value in turn.items() if k not in known and filled(value)}
    return extra


def _check_calls(row: Row, messages: tuple[Message, ...], tools: tuple[str, ...], wrong: Wrong) -> tuple[Message, ...]:
    """The messages with their calls checked against the row's tools, and against its `parallel_tool_calls`."""
    if not any(message.calls for message in messages):
        return messages
    place = next((name for name in ("messages", "conversations") if name in row), "prompt")
    several = next((len(message.calls) for message in messages if len(message.calls) > 1), 0)
    if several and truth_of(row.get("parallel_tool_calls")) is False:
        what = f"{several} calls in one message, where parallel_tool_calls is false"
        wrong(what, "set it to true, or give each call a message", place)
    return tuple(known_calls(messages, tools, [place] * len(messages), wrong))


def ruling(path: str, value: Any, form: str, messages: tuple[Message, ...], judged: bool) -> tuple[str, str] | bool:
    """Decide about a field that the form does not read.

    Args:
        path: the field; one of a message as `messages[].name`.
        value: what it holds.
        form: of its row.
        messages: of the row; empty where they could not be read.
        judged: whether a number in `label` judges the answer.

    Returns:
        Whether the field may be passed over; or what is wrong and what to do, for one that must not be.
    """
    if meaning := meaning_of(path):
        return meaning[0], f"{meaning[1]}, or {_passing(path)} to pass it over" if messages else meaning[1]
    if path in MARKS and (truth := truth_of(value)) is not None:
        return truth or _left_out("a row marked as not to be learnt", path, value)
    if is_harmless(path, value, form) or _repeats(value, messages):
        return True
    by_number = judged and path == "label"
    is_verdict = by_number or path != "label" or str(value).strip().lower() in ("true", "false")
    if path in VERDICTS and form != "text" and is_verdict and (truth := truth_of(value)) is not None:
        bad = "an answer marked as bad, as unpaired preferences have it, which would be learnt"
        what, fix = _left_out(bad, path, value)
        return truth or (what, f"{fix}, or {_passing(path)} if it says something else" if by_number else fix)
    return False


def _passing(path: str) -> str:
    return f"add --columns {shlex.quote(f'{UNUSED}={path}')}"


def _left_out(what: str, mark: str, value: Any) -> tuple[str, str]:
    """The problem of a row that its mark keeps from being learnt, and what to do."""
    good = "true" if str(value).strip().lower() == "false" else "1"
    return f"{what} ({mark} {json.dumps(value)})", f"keep the rows with {good}, and leave this one out (--skip-bad)"


def _repeats(value: Any, messages: tuple[Message, ...]) -> bool:
    """Whether a text repeats the messages: one of them, or question and answer as one text."""
    if not isinstance(value, str):
        return False
    texts = [message.content.strip() for message in messages]
    if value.strip() in texts:
        return True
    return len(texts) > 1 and all(texts[-2:]) and _is_made_of(value, [*re.split(r"\n\s*\n", texts[-2]), texts[-1]])


def _is_made_of(text: str, parts: list[str]) -> bool:
    """Whether a text is these parts in order and little else: what a template writes before a part, which ends in a
    mark, and a closing mark after the last."""
    at = around = 0
    for part in parts:
        begins = text.find(part, at)
        while 0 <= begins - at <= MOST_AROUND and not _may_precede(text[at:begins]):
            begins = text.find(part, begins + 1)
        around += begins - at
        if begins < 0 or around > MOST_AROUND:
            return False
        at = begins + len(part)
    return bool(CLOSING.fullmatch(text, at))


def _may_precede(text: str) -> bool:
    """Whether a template may write this before a part of a text: nothing, or what ends in a mark."""
    return not text.strip() or text.rstrip(" \t")[-1] in "\n:>]"


def _with_system(system: Any, messages: tuple[Message, ...], wrong: Wrong) -> tuple[Message, ...]:
    message = read_message("system", system, "system", wrong)
    if message is None or messages[0].role != "system":
        return messages if message is None else (message, *messages)
    if message.content.strip() != messages[0].content.strip():
        wrong("another system prompt than that of the messages", "leave one of the two", "system")
    return messages


def _conversation(field: str) -> Callable[[Row, Wrong], Iterable[Message | None]]:
    return lambda row, wrong: read_turns({field: row[field]}, wrong)


def _pair(row: Row, wrong: Wrong) -> Iterable[Message | None]:
    """A question and an answer: two texts, or lists of messages that make one conversation."""
    roles = {"prompt": "user", "completion": "assistant"}
    if any(isinstance(row[name], list) for name in roles):
        turns = {
            name: [{"role": role, "content": row[name]}] if isinstance(row[name], str) else row[name]
            for name, role in roles.items()
        }
        return read_turns(turns, wrong)
    return [read_message(role, row[name], name, wrong) for name, role in roles.items()]


def _alpaca(row: Row, wrong: Wrong) -> Iterable[Message | None]:
    question, more = read_message("user", row["instruction"], "instruction", wrong), row.get("input")
    if more is not None and not isinstance(more, str):
        wrong(f"not text but {kind_of(more)}", "write a string, or leave it out", "input")
    elif more and is_text(more, "input", wrong) and question:
        question = Message("user", f"{question.content}\n\n{more}")
    return question, read_message("assistant", row["output"], "output", wrong)


def _labelled(row: Row, wrong: Wrong) -> Iterable[Message | None]:
    label = row["label"]
    if isinstance(label, float) and not math.isfinite(label):
        wrong(f"not a label but {label}", "write a label, or remove the line", "label")
    elif isinstance(label, (int, float)):  # as parquet files and JSON keep them
        label = json.dumps(int(label) if label == int(label) and not isinstance(label, bool) else label)
    elif isinstance(label, str):
        label = label.strip()
    return read_message("user", row["text"], "text", wrong), read_message("assistant", label, "label", wrong)


def _scored(row: Row, wrong: Wrong) -> Iterable[Message | None]:
    """A text and its number, which is an answer too."""
    text, value = read_message("user", row["text"], "text", wrong), row["score"]
    if not is_finite(value):
        wrong(f"not a number but {value!r}", "write a number, or remove the line", "score")
        return text, None
    if abs(float(value)) >= LARGEST:
        wrong(f"a number of {LARGEST:g} or more ({value})", "write it in a larger unit, or remove the line", "score")
        return text, None
    return text, Message("assistant", _number_of(row).text)


def _number_of(row: Row) -> Number:
    return Number(float(row["score"]))


def _named(row: Row, wrong: Wrong) -> Iterable[Message | None]:
    """A text and its labels, which are an answer too."""
    text, given = read_message("user", row["text"], "text", wrong), row["labels"]
    if isinstance(given, str):
        wrong(f"not a list but {given[:40]!r}", 'write a list of names, ["billing", "late"]', "labels")
        return text, None
    odd = next((one for one in given if not (isinstance(one, str) or type(one) is int) or not str(one).strip()), None)
    if odd is not None or None in given:
        wrong(f"a label that is no name but {odd!r}", 'write a list of names, ["billing", "late"]', "labels")
        return text, None
    names = [str(one).strip() for one in given]
    if twice := next((name for name in names if names.count(name) > 1), None):
        wrong(f"the label {twice!r} twice", "write it once", "labels")
        return text, None
    return text, Message("assistant", _names_of(row).text)


def _names_of(row: Row) -> Names:
    return Names(tuple(sorted(str(one).strip() for one in row["labels"])))


def _marked(row: Row, wrong: Wrong) -> Iterable[Message | None]:
    """A text and its entities, which are an answer too."""
    text = read_message("user", row["text"], "text", wrong)
    if text is None:
        return text, None
    if isinstance(row["entities"], str):
        wrong(f"not a list but {row['entities'][:40]!r}", f"write a list, [{ENTITY}]", "entities")
        return text, None
    before, spans = 0, []
    for i, one in enumerate(row["entities"]):
        span, what = _span_of(one, text.content)
        if span is not None:
            spans.append(span)
        else:
            wrong(what, f"write {ENTITY}, in characters", f"entities[{i}]")
            before += 1
    spans.sort(key=lambda span: span.start)
    for a, b in pairwise(spans):
        if b.start < a.end:
            names = (f"{text.content[s.start : s.end]!r} ({s.start} to {s.end}, {s.label})" for s in (a, b))
            wrong(f"entities that overlap: {' and '.join(names)}", "leave one of them", "entities")
            before += 1
    return text, None if before else Message("assistant", shown_spans(text.content, tuple(spans)))


def _span_of(one: Any, text: str) -> tuple[Span | None, str]:
    """The span that an object or a list of three holds; or None and what is wrong with it."""
    parts = [one.get(name) for name in ("start", "end", "label")] if isinstance(one, dict) else one
    if not isinstance(parts, list) or len(parts) != 3:
        return None, "not an entity"
    start, end, label = parts
    if type(start) is not int or type(end) is not int or not isinstance(label, str) or not label.strip():
        return None, "an entity without whole numbers as start and end, or without a label"
    if not 0 <= start < end <= len(text):
        return None, f"an entity from {start} to {end} in a text of {len(text)} characters"
    if not text[start:end].strip():
        return None, f"an entity of nothing but blanks ({start} to {end})"
    held = text[start:end]  # blanks around it are no part of it
    return Span(start + len(held) - len(held.lstrip()), end - len(held) + len(held.rstrip()), label.strip()), ""


def _spans_of(row: Row) -> Spans:
    found = (_span_of(one, row["text"])[0] for one in row["entities"])
    return Spans(tuple(sorted((span for span in found if span), key=lambda span: span.start)))


def _paired(row: Row, wrong: Wrong) -> Iterable[Message | None]:
    """Two texts that belong together; the second is an answer too."""
    anchor, positive = (read_message("user", row[name], name, wrong) for name in ("anchor", "positive"))
    return anchor, Message("assistant", positive.content) if positive else None


def _plain(row: Row, wrong: Wrong) -> Iterable[Message | None]:
    return (read_message(TEXT, row["text"], "text", wrong),)


TOOLS = frozenset(TOOL_FIELDS)
FORMS = {
    "messages": Form(frozenset({"messages"}), _conversation("messages"), TOOLS | {*OPTIONAL}),
    "sharegpt": Form(frozenset({"conversations"}), _conversation("conversations"), TOOLS | {*OPTIONAL}),
    "prompt and completion": Form(frozenset({"prompt", "completion"}), _pair, TOOLS | {*OPTIONAL, *REASONING_FIELDS}),
    "alpaca": Form(frozenset({"instruction", "output"}), _alpaca, frozenset({"input", *OPTIONAL, *REASONING_FIELDS})),
    LABELLED: Form(frozenset({"text", "label"}), _labelled),
    "text and number": Form(frozenset({"text", "score"}), _scored, target=_number_of),
    "text and labels": Form(
        frozenset({"text", "labels"}), _named, target=_names_of, fits=lambda row: isinstance(row["labels"], (list, str))
    ),
    MARKED: Form(
        frozenset({"text", "entities"}),
        _marked,
        target=_spans_of,
        fits=lambda row: isinstance(row["entities"], (list, str)),
    ),
    "anchor and positive": Form(frozenset({"anchor", "positive"}), _paired, target=lambda row: Pair()),
    "text": Form(frozenset({"text"}), _plain, frozenset({"check", "group"})),
}


CHECKS = ("contains", "lacks", "max_words", "declines", "exact", "json", "number", "pattern")
MOST_WORDS = 100  # of an answer, where its check sets no limit and does not say the whole of it
NO_LIMIT = 10**9


def _check(value: Any, wrong: Wrong) -> Check | None:
    """Read a check; None where there is none, or where there was a problem."""
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
    given = {name: part for name, part in value.items() if part is not None}  # tables write null for what is not there
    lists = [given.get("contains", []), given.get("lacks", [])]
    whole = {name: given[name] for name in ("exact", "json", "number", "pattern") if name in given}
    longest = NO_LIMIT if {"exact", "json"} & {*whole} else MOST_WORDS
    words, declines = given.get("max_words", longest), given.get("declines", False)
    texts = all(isinstance(held, list) and all(isinstance(t, str) and t.strip() for t in held) for held in lists)
    if not texts or not (lists[0] or whole) or type(words) is not int or words < 1 or not isinstance(declines, bool):
        wrong("not a check", fix, "check")
        return None
    for name, part in whole.items():
        if (fault := _fault(name, part)) is not None:
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
    """What is wrong with the part of a check that concerns the answer as a whole."""
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
