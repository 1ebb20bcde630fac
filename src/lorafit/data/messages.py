"""Messages, read alike in examples that are learnt and in requests that are answered.

Lists of messages as OpenAI or sharegpt write them go in; `Message`s, or a report of every problem, come out.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any, TypeGuard

from lorafit.data.examples import Message
from lorafit.data.fields import BLANK, MARKS, filled, is_empty, meaning_of, truth_of, unpacked
from lorafit.data.tools import CALL_FIELDS, CALLS, Wrong, bound, claim, read_calls

CALLERS = ("function_call", "tool_call")  # roles of messages that are nothing but calls, as sharegpt has them
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "model", *CALLERS), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "tool_response", "ipython"), "tool"),
}
TEXT_PARTS = ("text", "input_text", "output_text")  # types of a part of a message that is text
ROLE_FIELDS, CONTENT_FIELDS = ("role", "from"), ("content", "value")  # OpenAI's names, and sharegpt's
THINKS = ("reasoning_content", "reasoning", "thinking")  # fields of a message with the reasoning of an answer
THOUGHT = ("<think>", "</think>")  # around the reasoning, where it stands in the answer itself
KINDS: dict[type, str] = {type(None): "null", bool: "true or false", dict: "an object", list: "a list", int: "a number"}


def role_of(name: str) -> str | None:
    """The role that a name means, in upper or lower case; None for a name that means none."""
    return ROLES.get(name.strip().lower())


_THOUGHT = re.compile(r"\s*{}(.*?){}(.*)".format(*map(re.escape, THOUGHT)), re.DOTALL)


def with_thought(reasoning: str, answer: str) -> str:
    """An answer with its reasoning before it, as one text."""
    return f"{THOUGHT[0]}\n{reasoning}\n{THOUGHT[1]}\n\n{answer}"


def thought_of(text: str) -> tuple[str, str]:
    """The reasoning that an answer begins with ("" for none), and the answer itself."""
    parts = _THOUGHT.match(text)
    return (parts[1].strip(), parts[2].strip()) if parts else ("", text)


def joined(texts: Iterable[str]) -> str:
    """The content of a message that is given in parts."""
    return "".join(texts)


def kind_of(value: Any) -> str:
    """What JSON calls a value of this type."""
    return KINDS.get(int if isinstance(value, float) else type(value), type(value).__name__)


def read_turns(turns_by_field: Mapping[str, Any], wrong: Wrong) -> tuple[Message, ...]:
    """Read the messages of one conversation, up to the last answer that is to be learnt.

    Args:
        turns_by_field: one or more lists of messages by the name of their field, in order.
        wrong: receives every problem.

    Returns:
        The messages, without empty system messages; of no use where there was a problem.
    """
    messages: list[Message | None] = []
    places: list[str] = []
    for name, turns in turns_by_field.items():
        if isinstance(turns, str) and turns.strip()[:1] in ("[", "{"):
            wrong("text that is neither JSON nor a list as Python prints it", "write it with json.dumps", name)
            return ()
        if not isinstance(turns, list) or not turns:
            wrong("not a list of messages", 'write [{"role": "user", "content": "..."}, ...]', name)
            return ()
        last = len(turns) if name == [*turns_by_field][-1] else 0
        messages += [_read_turn(turn, name, i, wrong, is_last=i == last - 1) for i, turn in enumerate(turns)]
        places += [f"{name}[{i}]" for i in range(len(turns))]
    read = [message for message in messages if message is not None]
    if len(read) < len(messages):
        return ()
    spoken = [message for message in bound(read, places, wrong) if message.content or message.role != "system"]
    return _up_to_last_learnt(spoken, next(iter(turns_by_field)), wrong)


def last_question(messages: Sequence[Message]) -> list[Message]:
    """The system prompt, the last question of a conversation, and the calls that follow it: all that an adapter knows
    that was trained on single questions."""
    asked = max((i for i, message in enumerate(messages) if message.role == "user"), default=0)
    return [*(message for message in messages[:asked] if message.role == "system"), *messages[asked:]]


def sides_of(turns: Any) -> list[str | None]:
    """The role of each message of a list, None where it has no known role; no roles for anything but a list."""
    names = [
        turn.get(field_of(turn, ROLE_FIELDS) or ROLE_FIELDS[0]) if isinstance(turn, dict) else None
        for turn in (turns if isinstance(turns, list) else ())
    ]
    return [role_of(name) if isinstance(name, str) else None for name in names]


def _read_turn(turn: Any, name: str, i: int, wrong: Wrong, is_last: bool) -> Message | None:
    """Read the message at index `i` of the field `name`, which may be the last of its conversation; None where there
    was a problem. One without content is an empty system message, or an answer that is not learnt."""
    place = f"{name}[{i}]"
    if not isinstance(turn, dict):
        wrong("not an object", 'write {"role": "user", "content": "..."}', place)
        return None
    role_field = field_of(turn, ROLE_FIELDS)
    content_field = field_of(turn, CONTENT_FIELDS) or ("value" if "from" in turn else "content")
    if role_field is None:
        fields = ", ".join(list(turn)[:6])
        wrong(f"a turn without 'role' (it has {fields})", "rename its fields to role and content", name)
        return None
    role_name, content_place = turn[role_field], f"{place}.{content_field}"
    role = role_of(role_name) if isinstance(role_name, str) else None
    if role is None:
        what = f"unknown role {json.dumps(role_name, default=str)}"
        wrong(what, "use system, user, assistant, tool", f"{place}.{role_field}")
        return None
    called = {key: turn[key] for key in CALLS if filled(turn.get(key))}
    if role != "assistant" and called:
        wrong(f"a call in a message of the {role}", "give it to the assistant", f"{place}.{next(iter(called))}")
        return None
    content = _join_parts(turn.get(content_field))
    if role_name.strip().lower() in CALLERS and not called:
        called, content = {"tool_calls": unpacked(content)}, ""
        if not isinstance(called["tool_calls"], dict | list):
            wrong("not a call as JSON", 'write {"name": ..., "arguments": {...}}', content_place)
            return None
    calls = read_calls(called, place, wrong)
    if calls is None:
        return None
    meanings = (meaning_of(key) for key, value in turn.items() if key not in CALL_FIELDS and filled(value))
    message: Message | None
    thought, words = thought_of(content) if calls and isinstance(content, str) else ("", content)
    if calls and not filled(words):
        message = with_reasoning(Message(role, ""), thought, content_place, wrong)
    elif role == "tool" and (content is None or (isinstance(content, str) and encodable(content))):
        message = Message(role, content or "")  # a tool may have nothing to say
    elif not filled(content) and any(meanings):
        return None  # such as a picture without words: reported with all fields that must not be passed over
    elif role == "user" and isinstance(content, str) and is_empty(content):
        message = Message(role, content)
    elif role == "assistant" and is_empty(content) and not (is_last or any(truth_of(turn.get(m)) for m in MARKS)):
        return _add_reasoning(Message(role, "", learnt=False), turn, place, wrong)
    else:
        message = read_message(role, content, content_place, wrong)
    answers = claim(turn) if role == "tool" else None
    marks = {mark: turn[mark] for mark in MARKS if role == "assistant" and filled(turn.get(mark))}
    for mark, value in marks.items():
        if truth_of(value) is None:
            what = f"{json.dumps(value, default=str)}, where an answer is learnt or not"
            wrong(what, "write 0 or 1", f"{place}.{mark}")
            return None
    message = message and _add_reasoning(message, turn, place, wrong)
    learnt = all(truth_of(value) for value in marks.values())
    return message and replace(message, learnt=learnt, calls=calls, answers=answers)


def _add_reasoning(message: Message, turn: Mapping[str, Any], place: str, wrong: Wrong) -> Message | None:
    """The message with the reasoning in the other fields of its turn; None where there was a problem."""
    for name in THINKS:
        if not filled(turn.get(name)):
            continue
        if message.role != "assistant":
            wrong(f"reasoning of the {message.role}, and only answers have one", "remove it", f"{place}.{name}")
            return None
        reasoned = with_reasoning(message, turn[name], f"{place}.{name}", wrong)
        if reasoned is None:
            return None
        message = reasoned
    return message


def with_reasoning(message: Message, reasoning: Any, field: str, wrong: Wrong) -> Message | None:
    """The answer with this reasoning; None where there was a problem."""
    if not is_text(reasoning, field, wrong):
        return None
    if message.reasoning not in ("", reasoning.strip()):
        wrong("another reasoning than the answer has already", "leave one of the two", field)
        return None
    return replace(message, reasoning=reasoning.strip())


def is_text(value: Any, field: str, wrong: Wrong) -> TypeGuard[str]:
    """Whether a value is a text of whole characters; anything else is a problem."""
    if not isinstance(value, str):
        wrong(f"not text but {kind_of(value)}", "write a string", field)
    elif not encodable(value):
        wrong("holds half of a character (a lone surrogate, \\ud800 to \\udfff)", "write the whole character", field)
    else:
        return True
    return False


def field_of(turn: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The first of the names under which the turn holds something; failing that, the first that it has."""
    present = [name for name in names if name in turn]
    return next((name for name in present if turn[name] is not None), next(iter(present), None))


def _in_parts(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content)


def _join_parts(content: Any) -> Any:
    """Parts of text as one text; any other content as it is."""
    if not _in_parts(content) or any(part["type"] not in TEXT_PARTS for part in content):
        return content
    texts = [part.get(field_of(part, ("text", "value")) or "text") for part in content]
    return joined(texts) if all(isinstance(text, str) for text in texts) else content


def read_message(role: str, content: Any, field: str, wrong: Wrong) -> Message | None:
    """A message with this content, which may be empty for a system message; None where there was a problem."""
    content = _join_parts(content)
    odd = [i for i, part in enumerate(content) if part["type"] not in TEXT_PARTS] if _in_parts(content) else []
    if odd:
        what = f"a part of type {json.dumps(content[odd[0]]['type'], default=str)}, which is not learnt"
        wrong(what, "write only text, or leave the row out (--skip-bad)", f"{field}[{odd[0]}]")
        return None
    if not is_text(content, field, wrong):
        return None
    if role == "assistant" and (parts := thought_of(content))[1].strip(BLANK):
        reasoning, answer = parts
        return Message(role, answer, reasoning=reasoning)
    if role != "assistant" and content.strip(BLANK):
        return Message(role, content)
    if role == "system":
        return Message(role, "")
    what = "an empty answer: nothing to learn" if role == "assistant" else "empty"
    wrong(what, "fill it in, or remove the line", field)
    return None


def encodable(text: str) -> bool:
    """Whether a text holds only whole characters."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _up_to_last_learnt(turns: list[Message], name: str, wrong: Wrong) -> tuple[Message, ...]:
    """The messages up to the last answer that is learnt: what follows has no part in learning it. An answer before any
    question is kept and not learnt, for no request asks for it. Any other order is taken, as the server takes it."""
    first = next((i for i, turn in enumerate(turns) if turn.role != "system"), 0)
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    learnt = [i for i in answers if turns[i].learnt and i != first]
    if not answers:
        wrong("no assistant message: nothing to learn", "add the answer, or remove the line", name)
    elif turns[-1].role != "assistant":
        wrong(f"ends with a {turns[-1].role} message", "end with the assistant's answer", name)
    elif answers == [first]:
        wrong("nothing is asked before the answer", "begin with a user message", name)
    elif not learnt:
        wrong("every answer is marked as not to be learnt", "give the one to learn weight 1, or remove the line", name)
    kept = turns[: learnt[-1] + 1 if learnt else None]
    if kept and kept[first].role == "assistant":
        kept[first] = replace(kept[first], learnt=False)
    return tuple(kept)
