"""Names of fields: what a column with another name most likely is, what may be passed over, and what must not be.

A field that holds something is used, harmless by its name, or refused: nothing that carries meaning is passed over in
silence.
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

from lorafit.data.targets import number_in

UNUSED = "unused"  # the FIELD of --columns whose columns are passed over
TARGETS = frozenset({"score", "labels", "entities", "anchor", "positive"})  # of tasks with another head
BASIC = TARGETS | {"messages", "conversations", "prompt", "completion", "instruction", "output", "text", "label"}
FIELDS = BASIC | {"input", "system", "check", "group", "tools", "reasoning_content"}  # basic fields decide the form
OPTIONAL = ("system", "check", "group")  # fields of a row of any form (of plain text, no system)
REASONING_FIELDS = ("reasoning_content",)  # of a row that is one question and its answer
TURNS = frozenset({"messages", "conversations"})
SPOKEN = TURNS | {"prompt", "completion"}  # fields that may hold a list of messages
PACKED = TURNS | {"check", "tools", "functions", "labels", "entities"}  # fields that the cell of a table holds as JSON
SPEAKERS = frozenset({"role", "from"})  # fields with the role of a message
MARKS = ("weight", "train", "training", "trainable", "loss", "loss_weight")  # whether a row or message is to be learnt
TRUTH = {"1": True, "1.0": True, "true": True, "0": False, "0.0": False, "false": False}
BLANK = string.whitespace + "\u00a0\u200b\u200c\u200d\u2060\ufeff"  # characters that show nothing


def _names(text: str) -> frozenset[str]:
    return frozenset(text.split())


ALSO = {  # other names of these fields, in public data sets
    "messages": _names("conversation dialog dialogue chat turns"),
    "prompt": _names("instruction question query source mr problem document original_text ask user"),
    "input": _names("context passage schema"),
    "completion": _names(
        "output answer response reply target ref reference summary reference_summary solution assistant"
    ),
    "text": _names("sentence utterance review content body comment message"),
    "reasoning_content": _names("reasoning thinking thought thoughts cot chain_of_thought rationale"),
    "label": _names("intent category class sentiment emotion rating stars topic label_text label_name"),
    "system": _names("system_prompt system_message system_instruction system_instructions"),
}

# Names of a better and a worse answer in sets of preferences; of two answers, of which a third column says which is the
# better; and of the verdict on one answer.
PREFERRED = {
    "chosen": "rejected",
    "chosen_response": "rejected_response",
    "preferred_output": "non_preferred_output",
    "preferred_response": "non_preferred_response",
    "response_j": "response_k",
    "winner": "loser",
}
TWO_ANSWERS = tuple(
    (f"{noun}_{first}", f"{noun}_{second}")
    for noun in ("response", "answer", "completion", "output", "reply", "summary")
    for first, second in ("ab", "01", "12")
)
_PAIRS = (*PREFERRED.items(), *TWO_ANSWERS)
_OF_PAIRS = frozenset(name for pair in _PAIRS for name in pair)
VERDICTS = ("label", "kto_tag", "desirable", "is_desirable", "correct", "is_correct")

# Which row it is, its place, when it was made, how long it is: never part of a text.
PLACES = _names(
    "id ids idx index nr no row uid uuid guid hash sha md5 checksum url urls uri link links license licence file "
    "filename file_name path file_path page pages line source_file doc_name document_name doi isbn split created "
    "created_at updated updated_at modified date time datetime timestamp posted posted_on published published_on "
    "created_on updated_on date_created last_modified last_updated length encoding mime_type"
)
# Who made it, in which language, out of which collection: an answer does not depend on these, but plain text may be
# about them. What judges an answer (score, rating, votes, quality, confidence) is not harmless: low values mark answers
# that should not be learnt, and next to plain text the value is the answer. Nor is what may explain an answer or belong
# to a question (note, comment).
HARMLESS = PLACES | _names(
    "key source sources origin author authors by at annotator annotators worker contributor dataset data_source subset "
    "config section year month lead_time duration language lang languages locale version model model_name generator "
    "created_by meta metadata batch fold source_name source_type source_dataset site website publisher publication "
    "editor reviewer labeler labeller rater username user_name revision commit release snapshot"
)
_NUMBERS, _PLACED = ("_id", "_ids", "_idx", "_index"), ("_uuid", "_hash", "_url", "_date", "_time", "_at", "_timestamp")
ENDS_OF_HARMLESS = (*_NUMBERS, *_PLACED)
ROWS = _names(
    "row record example sample item doc document text article page paper post entry line file book sentence paragraph "
    "passage chunk"
)
_UNIT = "tokens?|words?|chars?|characters?|turns?|sentences?|lines?|messages?|bytes"
COUNTS = re.compile(
    rf"(?:num|n|nb|number_of|count_of)_(?:{_UNIT})|(?:{_UNIT})_(?:count|length|len)|.+_(?:{_UNIT})_count"
)
# What a row is about: a question says it too, plain text may not. The subject of a mail is not among these: it is part
# of the question (HEADINGS).
DESCRIPTIONS = _names(
    "category categories topic topics domain subjects tag tags type kind task task_type difficulty level desk "
    "department team queue channel wording"
)
HEADINGS = frozenset({"subject", "subject_line", "email_subject", "mail_subject"})  # part of the question
HARMLESS_OF_TEXT = PLACES | {"title"} | {f"{noun}{end}" for noun in ROWS for end in _NUMBERS}  # encyclopedias: a title
HARMLESS_OF_MESSAGES = HARMLESS | {"name", "annotations"}

_TOOL = ("a call of a tool, which is learnt only as part of a message", "write the row as messages")
_TOOLS = ("tools, which are learnt only with messages", "write the row as messages")
_MEDIA = ("pictures, sounds or films, which are not read", "leave the row out (--skip-bad)")
_EARLIER = ("earlier turns, which would be left out", "write the conversation as messages")
_PREFERENCE = (
    "a preference (a better and a worse answer), and learning from preferences is not there yet",
    "leave the row out (--skip-bad)",
)
_ONLY_IN_PAIRS = ("winner", "loser", "response_j", "response_k")  # no preference where one of the pair is missing
MEANING = {
    **dict.fromkeys(("tool_calls", "tool_call", "function_call", "tool_call_id"), _TOOL),
    **dict.fromkeys(("tools", "functions", "parallel_tool_calls"), _TOOLS),
    **dict.fromkeys(("image", "images", "video", "videos", "audio", "audios"), _MEDIA),
    **dict.fromkeys(("history", "chat_history", "conversation_history", "previous", "earlier"), _EARLIER),
    **dict.fromkeys((name for pair in PREFERRED.items() for name in pair if name not in _ONLY_IN_PAIRS), _PREFERENCE),
}


def fields_of(row: Mapping[str, Any], renamed: Mapping[str, str]) -> dict[str, Any]:
    """The fields of a row under the names that the forms know.

    Args:
        row: the columns of a row.
        renamed: the field of each column that was named by a flag. It replaces a column with the field's name.

    Returns:
        The fields, without unused ones and without empty ones that decide no form.
    """
    taken = {field for column, field in renamed.items() if column in row}
    kept = {name: value for name, value in row.items() if name in renamed or name not in taken}
    fields = {renamed.get(name, name): value for name, value in kept.items() if renamed.get(name) != UNUSED}
    taken = {"score", "label", "labels", "entities"} & fields.keys()
    if "text" in fields and not taken and number_in(fields.get("target")) is not None:
        fields["score"] = fields.pop("target")
    fields |= {name: unpacked(fields[name]) for name in PACKED & fields.keys()}
    fields |= {name: turns for name in SPOKEN & fields.keys() if (turns := turns_in(fields[name]))}
    for column, field in renamed.items():
        name, in_messages, key = column.partition("[].")
        if field == UNUSED and in_messages and name in SPOKEN & fields.keys():
            fields[name] = _without(fields[name], key)
    asks = isinstance(fields.get("check"), dict | list)  # also if it is empty: that is reported
    return {
        name: value
        for name, value in fields.items()
        if name in BASIC or (asks and name == "check") or not is_empty(value)
    }


def _without(turns: Any, key: str) -> Any:
    if not isinstance(turns, list):
        return turns
    return [{k: v for k, v in turn.items() if k != key} if isinstance(turn, dict) else turn for turn in turns]


def unpacked(value: Any) -> Any:
    """The value of a cell that holds JSON, or a value as Python prints it; any other value as it is."""
    if isinstance(value, str) and value.strip()[:1] in ("{", "["):
        with suppress(ValueError, RecursionError):
            return json.loads(value)
        with suppress(ValueError, SyntaxError, MemoryError, RecursionError):
            return ast.literal_eval(value.strip())
    return value


def turns_in(value: Any) -> list[dict[str, Any]] | None:
    """The messages that a value holds, as a list, as the text of a list, or as one message; None for other values."""
    if isinstance(value, dict):
        value = [value]
    turns = unpacked(value) if isinstance(value, str) and value.lstrip().startswith("[") else value
    if isinstance(turns, list) and turns and all(isinstance(turn, dict) and SPEAKERS & set(turn) for turn in turns):
        return turns
    return None


def filled(value: Any) -> bool:
    """Whether a value says anything: a null, a blank text, and a list or object of these do not."""
    if isinstance(value, str):
        return value.strip(BLANK) not in ("", "[]", "{}")
    if isinstance(value, float):
        return not math.isnan(value)
    if isinstance(value, (dict, list)):
        return any(map(filled, value.values() if isinstance(value, dict) else value))
    return value is not None


def is_empty(value: Any) -> bool:
    """Whether a field or a message holds nothing at all. The text `[]` is not empty: it may be an answer."""
    return not value.strip(BLANK) if isinstance(value, str) else not filled(value)


def truth_of(value: Any) -> bool | None:
    """The truth that a number, a boolean or a text stands for; None for anything else."""
    return TRUTH.get(str(value).strip().lower()) if isinstance(value, (bool, int, float, str)) else None


@lru_cache(maxsize=4096)
def meaning_of(path: str) -> tuple[str, str] | None:
    """What a field that must not be passed over holds or points at (`image_url`), and what to do; None for others."""
    name = _plain(path.rpartition("[].")[2])
    stem = next((name.removesuffix(end) for end in ENDS_OF_HARMLESS if name.endswith(end)), name)
    return MEANING.get(name) or MEANING.get(stem)


def is_known(name: str) -> bool:
    """Whether this is a name of a field, ours or another's."""
    plain = name.strip().lower()
    return plain in FIELDS or is_preferred(name) or any(plain in names for names in ALSO.values())


def is_heading(name: str) -> bool:
    """Whether a column with this name holds the line above a question, such as the subject of a mail."""
    return _plain(name) in HEADINGS


def is_preferred(name: str) -> bool:
    """Whether sets of preferences give the better answer this name."""
    return _plain(name) in PREFERRED


def preferences_in(row: Mapping[str, Any]) -> tuple[str, str] | None:
    """The columns of a row that hold a better and a worse answer, or two answers to choose from; None for no such
    columns."""
    names = {_plain(name): name for name in row if _plain(name) in _OF_PAIRS and filled(row[name])}
    return next(((names[a], names[b]) for a, b in _PAIRS if {a, b} <= names.keys()), None)


def is_harmless(path: str, value: Any, form: str | None) -> bool:
    """Whether a field may be passed over because of its name, in a row of this form. A column without a name may if it
    holds a number."""
    by_name = _harmless_name(path, form)
    return str(value).strip().replace(".", "", 1).isdigit() if by_name is None else by_name


@lru_cache(maxsize=4096)
def _harmless_name(path: str, form: str | None) -> bool | None:
    """Whether a name is harmless in a row of this form; None for a column without a name."""
    in_message, name = "[]." in path, _plain(path.rpartition("[].")[2])
    if not name or name.startswith(("unnamed", "column_", "index_level")):
        return None
    if meaning_of(path):
        return False
    if form == "text":
        return name in HARMLESS_OF_TEXT or name.endswith(_PLACED) or bool(COUNTS.fullmatch(name))
    if name.endswith(ENDS_OF_HARMLESS) or COUNTS.fullmatch(name):
        return True
    return name in (HARMLESS_OF_MESSAGES if in_message else HARMLESS | DESCRIPTIONS)


@lru_cache(maxsize=4096)
def _plain(name: str) -> str:
    return "_".join("".join(c if c.isalnum() else " " for c in name.lower()).split())
