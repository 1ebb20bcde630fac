"""One reading of a message, for examples that are learnt and for requests that are answered."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise
from typing import Any

from lorafit.data.examples import Message
from lorafit.data.fields import BLANK, MARKS, filled, is_empty, meaning_of, truth_of, unpacked
from lorafit.data.tools import CALLS, OF_CALLS, bound, claim, read_calls

ROLES = {
    "system": "system",
    "developer": "system",
    "user": "user",
    "human": "user",
    "assistant": "assistant",
    "gpt": "assistant",
    "model": "assistant",
    "tool": "tool",
    "function": "tool",
    "observation": "tool",
    "tool_response": "tool",
    "ipython": "tool",
    "function_call": "assistant",
    "tool_call": "assistant",
}
CALLERS = ("function_call", "tool_call")  # roles of messages that are nothing but calls, as sharegpt has them
TEXT_PARTS = ("text", "input_text", "output_text")  # types of a part of a message that is text
BY, SAYS = ("role", "from"), ("content", "value")  # who says a message, and what it says: OpenAI's and sharegpt's names
THINKS = ("reasoning_content", "reasoning", "thinking")  # what was thought before an answer
THOUGHT = ("<think>", "</think>")  # around it, where it stands in the answer itself
KINDS: dict[type, str] = {
    type(None): "null",
    bool: "true or false",
    dict: "an object",
    list: "a list",
    int: "a number",
    float: "a number",
}

Wrong = Callable[..., None]
"""wrong(what, fix, field): report a problem of the row at hand."""


def role_of(name: str) -> str | None:
    """The role that a name means, in whatever case; None for a name that means none."""
    return ROLES.get(name.strip().lower())


_THOUGHT = re.compile(r"\s*{}(.*?){}(.*)".format(*map(re.escape, THOUGHT)), re.DOTALL)


def with_thought(reasoning: str, answer: str) -> str:
    """An answer with its reasoning before it, as one text."""
    return f"{THOUGHT[0]}\n{reasoning}\n{THOUGHT[1]}\n\n{answer}"


def thought_of(text: str) -> tuple[str, str]:
    """The reasoning that an answer begins with ("" where it has none), and the answer itself."""
    found = _THOUGHT.match(text)
    return (found[1].strip(), found[2].strip()) if found else ("", text)


def joined(texts: Iterable[str]) -> str:
    """The content of a message that is given in parts."""
    return "".join(texts)


def kind_of(value: Any) -> str:
    """What JSON calls a value of this type."""
    return KINDS.get(type(value), type(value).__name__)


def read_turns(given: Mapping[str, Any], wrong: Wrong) -> tuple[Message, ...]:
    """The messages of one conversation, up to the last answer that is to be learnt.

    Args:
        given: one or more lists of messages by the name of their field, in order.
        wrong: is told every problem.

    Returns:
        The messages, without empty system messages; of no use where a problem was told.
    """
    found: list[Message | None] = []
    places: list[str] = []
    for name, turns in given.items():
        if isinstance(turns, str) and turns.strip()[:1] in ("[", "{"):
            wrong("text that is neither JSON nor a list as Python prints it", "write it with json.dumps", name)
            return ()
        if not isinstance(turns, list) or not turns:
            wrong("not a list of messages", 'write [{"role": "user", "content": "..."}, ...]', name)
            return ()
        last = len(turns) if name == [*given][-1] else 0
        found += [_turn(turn, name, i, wrong, closes=i == last - 1) for i, turn in enumerate(turns)]
        places += [f"{name}[{i}]" for i in range(len(turns))]
    read = [message for message in found if message is not None]
    if len(read) < len(found):
        return ()
    name, first = next((name, turns[0]) for name, turns in given.items())
    spoken = [message for message in bound(read, places, wrong) if message.content or message.role != "system"]
    _order(spoken, name, field_of(first, BY) or BY[0], wrong)
    return _up_to_last_learnt(spoken, name, wrong)


def last_question(messages: Sequence[Message]) -> list[Message]:
    """The last question of a conversation by itself, with the system prompt before it and the calls behind it: what an
    adapter that was trained on single questions knows."""
    asked = max((i for i, message in enumerate(messages) if message.role == "user"), default=0)
    return [*(message for message in messages[:asked] if message.role == "system"), *messages[asked:]]


def sides_of(turns: Any) -> list[str | None]:
    """The roles of a list of messages, as far as they can be told; none for anything else."""
    said = [
        turn.get(field_of(turn, BY) or BY[0]) if isinstance(turn, dict) else None
        for turn in (turns if isinstance(turns, list) else ())
    ]
    return [role_of(name) if isinstance(name, str) else None for name in said]


def _turn(turn: Any, name: str, i: int, wrong: Wrong, closes: bool) -> Message | None:
    """The message, or None with its problems told; one without content is an empty system message, or an answer that is
    not learnt. closes: whether it is the last of its conversation."""
    place = f"{name}[{i}]"
    if not isinstance(turn, dict):
        wrong("not an object", 'write {"role": "user", "content": "..."}', place)
        return None
    by, says = field_of(turn, BY), field_of(turn, SAYS) or ("value" if "from" in turn else "content")
    if by is None:
        wrong(
            f"a turn without 'role' (it has {', '.join(list(turn)[:6])})", "rename its fields to role and content", name
        )
        return None
    told = turn[by]
    role = role_of(told) if isinstance(told, str) else None
    if role is None:
        wrong(f"unknown role {json.dumps(told, default=str)}", "use system, user, assistant, tool", f"{place}.{by}")
        return None
    called = {key: turn[key] for key in CALLS if filled(turn.get(key))}
    if role != "assistant" and called:
        wrong(f"a call in a message of the {role}", "give it to the assistant", f"{place}.{next(iter(called))}")
        return None
    content = _of_parts(turn.get(says))
    if told.strip().lower() in CALLERS and not called:
        called, content = {"tool_calls": unpacked(content)}, ""
        if not isinstance(called["tool_calls"], dict | list):
            wrong("not a call as JSON", 'write {"name": ..., "arguments": {...}}', f"{place}.{says}")
            return None
    calls = read_calls(called, place, wrong)
    if calls is None:
        return None
    strange = (meaning_of(key) for key, value in turn.items() if key not in OF_CALLS and filled(value))
    message: Message | None
    thought, words = thought_of(content) if calls and isinstance(content, str) else ("", content)
    if calls and not filled(words):
        message = with_reasoning(Message(role, ""), thought, f"{place}.{says}", wrong)
    elif role == "tool" and (content is None or (isinstance(content, str) and encodable(content))):
        message = Message(role, content or "")  # a tool may have nothing to say
    elif not filled(content) and any(strange):
        return None  # a picture without words: told with all that must not be passed over
    elif role == "assistant" and is_empty(content) and not (closes or any(truth_of(turn.get(one)) for one in MARKS)):
        return _thinking(Message(role, "", learnt=False), turn, place, wrong)
    else:
        message = said(role, content, f"{place}.{says}", wrong)
    answers = claim(turn) if role == "tool" else None
    marks = {mark: turn[mark] for mark in MARKS if role == "assistant" and filled(turn.get(mark))}
    for mark, value in marks.items():
        if truth_of(value) is None:
            wrong(
                f"{json.dumps(value, default=str)}, where an answer is learnt or not", "write 0 or 1", f"{place}.{mark}"
            )
            return None
    message = message and _thinking(message, turn, place, wrong)
    learnt = all(truth_of(value) for value in marks.values())
    return message and replace(message, learnt=learnt, calls=calls, answers=answers)


def _thinking(message: Message, turn: Mapping[str, Any], place: str, wrong: Wrong) -> Message | None:
    """The message with the reasoning that its turn brings beside it, or None with the problem told."""
    for name in THINKS:
        if not filled(turn.get(name)):
            continue
        if message.role != "assistant":
            wrong(f"reasoning of the {message.role}, and only answers have one", "remove it", f"{place}.{name}")
            return None
        found = with_reasoning(message, turn[name], f"{place}.{name}", wrong)
        if found is None:
            return None
        message = found
    return message


def with_reasoning(message: Message, reasoning: Any, field: str, wrong: Wrong) -> Message | None:
    """The answer with this reasoning, or None with the problem told."""
    if not isinstance(reasoning, str):
        wrong(f"not text but {kind_of(reasoning)}", "write a string", field)
    elif not encodable(reasoning):
        wrong("holds half of a character (a lone surrogate, \\ud800 to \\udfff)", "write the whole character", field)
    elif message.reasoning not in ("", reasoning.strip()):
        wrong("another reasoning than the answer has already", "leave one of the two", field)
    else:
        return replace(message, reasoning=reasoning.strip())
    return None


def field_of(turn: Mapping[str, Any], names: tuple[str, ...]) -> str | None:
    """The first of the names that the turn has, before all one that holds something."""
    there = [name for name in names if name in turn]
    return next((name for name in there if turn[name] is not None), next(iter(there), None))


def _in_parts(content: Any) -> bool:
    return isinstance(content, list) and all(isinstance(part, dict) and "type" in part for part in content)


def _of_parts(content: Any) -> Any:
    """Parts of text as one text; any other content as it is."""
    if not _in_parts(content) or any(part["type"] not in TEXT_PARTS for part in content):
        return content
    texts = [part.get(field_of(part, ("text", "value")) or "text") for part in content]
    return joined(texts) if all(isinstance(text, str) for text in texts) else content


def said(role: str, content: Any, field: str, wrong: Wrong) -> Message | None:
    """A message of this content, or None with the problem told. A system message may be empty, which is none."""
    content = _of_parts(content)
    odd = [i for i, part in enumerate(content) if part["type"] not in TEXT_PARTS] if _in_parts(content) else []
    if odd:
        what = f"a part of type {json.dumps(content[odd[0]]['type'], default=str)}, which is not learnt"
        wrong(what, "write text alone, or leave the row out (--skip-bad)", f"{field}[{odd[0]}]")
        return None
    if not isinstance(content, str):
        wrong(f"not text but {kind_of(content)}", "write a string", field)
    elif not encodable(content):
        wrong("holds half of a character (a lone surrogate, \\ud800 to \\udfff)", "write the whole character", field)
    elif role == "assistant" and (parts := thought_of(content))[1].strip(BLANK):
        reasoning, answer = parts
        return Message(role, answer, reasoning=reasoning)
    elif role != "assistant" and content.strip(BLANK):
        return Message(role, content)
    elif role == "system":
        return Message(role, "")
    else:
        what = "an empty answer: nothing to learn" if role == "assistant" else "empty"
        wrong(what, "fill it in, or remove the line", field)
    return None


def encodable(text: str) -> bool:
    """Whether a text holds whole characters alone."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _order(turns: list[Message], name: str, by: str, wrong: Wrong) -> None:
    roles = [turn.role for turn in turns]
    if "assistant" not in roles:
        wrong("no assistant message: nothing to learn", "add the answer, or remove the line", name)
    elif roles[-1] != "assistant":
        wrong(f"ends with a {roles[-1]} message", "end with the assistant's answer", name)
    if "system" in roles[1:]:
        wrong("a system message that is not the first", "put it first", f"{name}[{roles.index('system', 1)}].{by}")
    spoken = [turn for turn in turns if turn.role != "system"]
    if spoken and spoken[0].role == "assistant":
        wrong("begins with an answer", "begin with a user message", f"{name}[0].{by}")
    for before, after in pairwise(spoken):
        if before.role == after.role != "tool" and not before.calls:  # of a call without an answer it is told already
            wrong(f"two {after.role} messages in a row", "join them into one", name)
            break


def _up_to_last_learnt(turns: list[Message], name: str, wrong: Wrong) -> tuple[Message, ...]:
    """What follows the last answer that is learnt has no part in learning it."""
    answers = [i for i, turn in enumerate(turns) if turn.role == "assistant"]
    learnt = [i for i in answers if turns[i].learnt]
    if answers and not learnt:
        wrong("every answer is marked as not to be learnt", "give the one to learn weight 1, or remove the line", name)
    return tuple(turns[: learnt[-1] + 1] if learnt else turns)
