"""Names of fields: what a column of another name most likely is, what may be passed over, what must not be.

A field that holds something is used, or harmless by its name, or refused. Nothing that carries meaning is passed over
in silence.
"""

from __future__ import annotations

import ast
import json
import math
import re
import string
from collections.abc import Mapping
from contextlib import suppress
from functools import lru_cache
from typing import Any

UNUSED = "unused"  # the FIELD of --columns whose columns are passed over
BASIC = frozenset({"messages", "conversations", "prompt", "completion", "instruction", "output", "text", "label"})
FIELDS = BASIC | {"input", "system", "check", "group", "tools", "reasoning_content"}  # basic: a form is told by them
OPTIONAL = ("system", "check", "group")  # fields of a row of any form (of plain text, no system)
OF_ANSWERS = ("reasoning_content",)  # of a row that is one question with its answer
TURNS = frozenset({"messages", "conversations"})
SPOKEN = TURNS | {"prompt", "completion"}  # fields that may hold a list of messages
PACKED = TURNS | {"check", "tools", "functions"}  # fields that the cell of a table holds as JSON
SPEAKERS = frozenset({"role", "from"})  # fields by which a message says who speaks
MARKS = ("weight", "train", "training", "trainable", "loss", "loss_weight")  # whether something is to be learnt
TRUTH = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
BLANK = string.whitespace + "\u00a0\u200b\u200c\u200d\u2060\ufeff"  # what shows nothing

ALSO = {  # what others call these fields, in the public data sets met so far
    "messages": ("conversation", "dialog", "dialogue", "chat", "turns"),
    "prompt": (
        "instruction",
        "question",
        "query",
        "source",
        "mr",
        "problem",
        "document",
        "original_text",
        "ask",
        "user",
    ),
    "input": ("context", "passage", "schema"),
    "completion": (
        "output",
        "answer",
        "response",
        "reply",
        "target",
        "ref",
        "reference",
        "summary",
        "reference_summary",
        "solution",
        "assistant",
    ),
    "text": ("sentence", "utterance", "review", "content", "body", "comment", "message"),
    "reasoning_content": ("reasoning", "thinking", "thought", "thoughts", "cot", "chain_of_thought", "rationale"),
    "label": (
        "intent",
        "category",
        "class",
        "sentiment",
        "emotion",
        "rating",
        "stars",
        "topic",
        "label_text",
        "label_name",
    ),
    "system": ("system_prompt", "system_message", "system_instruction", "system_instructions"),
}

# What sets of preferences call a better answer and the worse one; two answers of which a third column says which is the
# better one; and what says of one answer whether it is a good one.
PREFERRED = {
    "chosen": "rejected",
    "chosen_response": "rejected_response",
    "preferred_output": "non_preferred_output",
    "preferred_response": "non_preferred_response",
    "response_j": "response_k",
    "winner": "loser",
}
TWO_ANSWERS = tuple(
    (f"{noun}_{one}", f"{noun}_{other}")
    for noun in ("response", "answer", "completion", "output", "reply", "summary")
    for one, other in ("ab", "01", "12")
)
_PAIRS = (*PREFERRED.items(), *TWO_ANSWERS)
_OF_PAIRS = frozenset(name for pair in _PAIRS for name in pair)
VERDICTS = ("label", "kto_tag", "desirable", "is_desirable", "correct", "is_correct")

# Which row it is, where it lies, when it was made, how long it is: nothing that any text says.
PLACES = frozenset(
    {
        "id",
        "ids",
        "idx",
        "index",
        "nr",
        "no",
        "row",
        "uid",
        "uuid",
        "guid",
        "hash",
        "sha",
        "md5",
        "checksum",
        "url",
        "urls",
        "uri",
        "link",
        "links",
        "license",
        "licence",
        "file",
        "filename",
        "file_name",
        "path",
        "file_path",
        "page",
        "pages",
        "line",
        "source_file",
        "doc_name",
        "document_name",
        "doi",
        "isbn",
        "split",
        "created",
        "created_at",
        "updated",
        "updated_at",
        "modified",
        "date",
        "time",
        "datetime",
        "timestamp",
        "posted",
        "posted_on",
        "published",
        "published_on",
        "created_on",
        "updated_on",
        "date_created",
        "last_modified",
        "last_updated",
        "length",
        "encoding",
        "mime_type",
    }
)
# Who made it, in which language, out of which collection: nothing that an answer depends on, but what a text alone may
# be told by. What judges an answer (score, rating, votes, quality, confidence) is not among them: low ones mark answers
# that are not to be learnt, and beside a text alone it is the answer. Nor is what may explain an answer or belong to a
# question (note, comment).
HARMLESS = PLACES | {
    "key",
    "source",
    "sources",
    "origin",
    "author",
    "authors",
    "by",
    "at",
    "annotator",
    "annotators",
    "worker",
    "contributor",
    "dataset",
    "data_source",
    "subset",
    "config",
    "section",
    "year",
    "month",
    "lead_time",
    "duration",
    "language",
    "lang",
    "languages",
    "locale",
    "version",
    "model",
    "model_name",
    "generator",
    "created_by",
    "meta",
    "metadata",
    "batch",
    "fold",
    "source_name",
    "source_type",
    "source_dataset",
    "site",
    "website",
    "publisher",
    "publication",
    "editor",
    "reviewer",
    "labeler",
    "labeller",
    "rater",
    "username",
    "user_name",
    "revision",
    "commit",
    "release",
    "snapshot",
}
_NUMBERS, _PLACED = ("_id", "_ids", "_idx", "_index"), ("_uuid", "_hash", "_url", "_date", "_time", "_at", "_timestamp")
ENDS_OF_HARMLESS = (*_NUMBERS, *_PLACED)
ROWS = (
    "row",
    "record",
    "example",
    "sample",
    "item",
    "doc",
    "document",
    "text",
    "article",
    "page",
    "paper",
    "post",
    "entry",
    "line",
    "file",
    "book",
    "sentence",
    "paragraph",
    "passage",
    "chunk",
)
_UNIT = "tokens?|words?|chars?|characters?|turns?|sentences?|lines?|messages?|bytes"
COUNTS = re.compile(
    rf"(?:num|n|nb|number_of|count_of)_(?:{_UNIT})|(?:{_UNIT})_(?:count|length|len)|.+_(?:{_UNIT})_count"
)
# What a row is about: told by its question too, but not by a text that is learnt alone. The subject of a mail is not
# among these: it is a part of the question (HEADINGS).
DESCRIPTIONS = frozenset(
    {
        "category",
        "categories",
        "topic",
        "topics",
        "domain",
        "subjects",
        "tag",
        "tags",
        "type",
        "kind",
        "task",
        "task_type",
        "difficulty",
        "level",
        "desk",
        "department",
        "team",
        "queue",
        "channel",
        "wording",
    }
)
HEADINGS = frozenset({"subject", "subject_line", "email_subject", "mail_subject"})  # written by who asks
HARMLESS_OF_TEXT = PLACES | {"title"} | {f"{noun}{end}" for noun in ROWS for end in _NUMBERS}  # encyclopedias: a title
HARMLESS_OF_MESSAGES = HARMLESS | {"name", "annotations"}

_TOOL = ("a call of a tool, which is learnt as part of a message alone", "write the row as messages")
_TOOLS = ("tools, which are learnt beside messages alone", "write the row as messages")
_MEDIA = ("pictures, sounds or films, which are not read", "leave the row out (--skip-bad)")
_EARLIER = ("earlier turns, which would be left out", "write the conversation as messages")
_PREFERENCE = (
    "a preference (a better and a worse answer), and learning from preferences is not there yet",
    "leave the row out (--skip-bad)",
)
_OFTEN_ELSE = ("winner", "loser", "response_j", "response_k")  # alone: only side by side are they a preference
MEANING = {
    **dict.fromkeys(("tool_calls", "tool_call", "function_call", "tool_call_id"), _TOOL),
    **dict.fromkeys(("tools", "functions", "parallel_tool_calls"), _TOOLS),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _MEDIA),
    **dict.fromkeys(("history", "chat_history", "conversation_history", "previous", "earlier"), _EARLIER),
    **dict.fromkeys((one for pair in PREFERRED.items() for one in pair if one not in _OFTEN_ELSE), _PREFERENCE),
}


def fields_of(row: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a row under the names that the forms know, without those that are unused, and those that say
    nothing and by which no form is told. What is named by a flag stands before a column that has the name by itself."""
    found = dict(row)
    if renamed:
        taken = {field for column, field in renamed.items() if column in row}
        named = {name: value for name, value in row.items() if name in renamed or name not in taken}
        found = {renamed.get(name, name): value for name, value in named.items() if renamed.get(name) != UNUSED}
    found |= {name: unpacked(found[name]) for name in PACKED & found.keys()}
    found |= {name: turns for name in SPOKEN & found.keys() if (turns := turns_in(found[name]))}
    unused = {name for name, field in renamed.items() if field == UNUSED and "[]." in name}
    for name in SPOKEN & set(found) if unused else ():
        found[name] = _without(
            found[name], {key for one, _, key in (path.partition("[].") for path in unused) if one == name}
        )
    told = {"check"} if isinstance(found.get("check"), dict | list) else set()  # one that asks for nothing is told
    return {name: value for name, value in found.items() if name in BASIC or name in told or not is_empty(value)}


def _without(turns: Any, keys: set[str]) -> Any:
    if not isinstance(turns, list):
        return turns
    return [{k: v for k, v in turn.items() if k not in keys} if isinstance(turn, dict) else turn for turn in turns]


def unpacked(value: Any) -> Any:
    """What a cell of a table holds as JSON, or as Python prints it; anything else as it is."""
    if isinstance(value, str) and value.strip()[:1] in ("{", "["):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            return ast.literal_eval(value.strip())
    return value


def turns_in(value: Any) -> list[dict[str, Any]] | None:
    """The messages that a value holds, as a list, as the text of one, or as one message; None for anything else."""
    if isinstance(value, dict):
        value = [value]
    held = unpacked(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    whole = isinstance(held, list) and held and all(isinstance(one, dict) and SPEAKERS & set(one) for one in held)
    return held if whole else None


def filled(value: Any) -> bool:
    """Whether a value says anything: a null, a blank text, a list or object of such do not."""
    if isinstance(value, str):
        return value.strip(BLANK) not in ("", "[]", "{}")
    if isinstance(value, float):
        return not math.isnan(value)
    if isinstance(value, dict):
        return any(filled(held) for held in value.values())
    if isinstance(value, list):
        return any(filled(held) for held in value)
    return value is not None


def is_empty(value: Any) -> bool:
    """Whether a field or a message holds nothing at all. A text that is `[]` is one, and may be the answer."""
    return not value.strip(BLANK) if isinstance(value, str) else not filled(value)


def truth_of(value: Any) -> bool | None:
    """What a mark says, whether as a number, as true or false, or as text; None for anything else."""
    return TRUTH.get(str(value).strip().lower()) if isinstance(value, (bool, int, float, str)) else None


@lru_cache(maxsize=4096)
def meaning_of(path: str) -> tuple[str, str] | None:
    """What a field holds that must not be passed over, or points at (`image_url`), and what to do; None for other
    fields."""
    name = _plain(path.rpartition("[].")[2])
    stem = next((name.removesuffix(end) for end in ENDS_OF_HARMLESS if name.endswith(end)), name)
    return MEANING.get(name) or MEANING.get(stem)


def is_known(name: str) -> bool:
    """Whether one of the fields is called so, here or elsewhere."""
    plain = name.strip().lower()
    return plain in FIELDS or is_preferred(name) or any(plain in names for names in ALSO.values())


def is_heading(name: str) -> bool:
    """Whether a column so called holds the line above a question, such as the subject of a mail."""
    return _plain(name) in HEADINGS


def is_preferred(name: str) -> bool:
    """Whether sets of preferences call the better answer so."""
    return _plain(name) in PREFERRED


def preferences_in(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """The columns of a row that hold a better and a worse answer, or two of which another says which is the better one;
    None where it has none."""
    names = {_plain(name): name for name in row if _plain(name) in _OF_PAIRS and filled(row[name])}
    return next(((names[one], names[other]) for one, other in _PAIRS if {one, other} <= names.keys()), None)


def is_harmless(path: str, value: Any, form: str | None) -> bool:
    """Whether a field may be passed over because of its name, in a row of this form. A column without a name may, where
    it counts."""
    by_name = _harmless_name(path, form)
    return str(value).strip().replace(".", "", 1).isdigit() if by_name is None else by_name


@lru_cache(maxsize=4096)
def _harmless_name(path: str, form: str | None) -> bool | None:
    """The same by the name alone; None for no name."""
    of_message, name = "[]." in path, _plain(path.rpartition("[].")[2])
    if not name or name.startswith(("unnamed", "column_", "index_level")):
        return None
    if meaning_of(path):
        return False
    if form == "text":
        return name in HARMLESS_OF_TEXT or name.endswith(_PLACED) or bool(COUNTS.fullmatch(name))
    if name.endswith(ENDS_OF_HARMLESS) or COUNTS.fullmatch(name):
        return True
    return name in (HARMLESS_OF_MESSAGES if of_message else HARMLESS | DESCRIPTIONS)


@lru_cache(maxsize=4096)
def _plain(name: str) -> str:
    return "_".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
