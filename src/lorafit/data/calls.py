"""Calls of tools in the text of an answer: how a chat template writes them, and how they are read back.

The form is learnt from the base's own chat template, by what it writes for a known call. A template that does not
render tools, or whose calls cannot be read back, gets our own form, written by `worded`.
"""

from __future__ import annotations

import json
import os.path
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorafit.data.examples import Call, Message
from lorafit.errors import BaseError

ID = "\ufdd1"  # stands for the id of a call in a form: a code that Unicode leaves to programs
OPENS, CLOSES = "<tool_call>\n", "\n</tool_call>"


def worded(messages: Sequence[Message], tools: Sequence[str]) -> list[Message]:
    """Write a conversation for a template that knows no tools: the tools are described before the first question, calls
    are words of the assistant, and answers of tools are words of the user.

    Args:
        messages: with calls and answers of tools.
        tools: as `read_tools` reads them.
    """
    conversation: list[Message] = []
    for message in messages:
        if message.role == "tool":
            message = Message("user", f"<tool_response>\n{message.content}\n</tool_response>")
        elif message.calls:
            calls = [
                f'{OPENS}{{"name": "{call.name}", "arguments": {call.arguments}}}{CLOSES}' for call in message.calls
            ]
            content = "\n".join([*([message.content] if message.content else []), *calls])
            message = replace(message, content=content, calls=())
        if conversation and conversation[-1].role == message.role == "user":
            conversation[-1] = replace(conversation[-1], content=f"{conversation[-1].content}\n{message.content}")
        else:
            conversation.append(message)
    first = next((i for i, message in enumerate(conversation) if message.role == "user"), None)
    if tools and first is not None:
        described = "\n".join(json.dumps(json.loads(tool)["function"], ensure_ascii=False) for tool in tools)
        preface = (
            f"These functions can be called, one a line:\n{described}\nA call is written as\n"
            f'{OPENS}{{"name": "its name", "arguments": {{"name of an argument": "its value"}}}}{CLOSES}'
        )
        conversation[first] = replace(conversation[first], content=f"{preface}\n\n{conversation[first].content}")
    return conversation


@dataclass(frozen=True)
class CallForm:
    """How calls are written: `opens name between arguments joins name between arguments closes`. When they are read,
    white space in these marks stands for any white space, or none.

    Args:
        opens: the text before the first name.
        between: the text between a name and its arguments.
        joins: the text between two calls; None where an answer makes one call at most.
        closes: the text after the last arguments.
        after_words: whether words may precede the calls.
    """

    opens: str
    between: str
    joins: str | None
    closes: str
    after_words: bool


OWN = CallForm(
    f'{OPENS}{{"name": "', '", "arguments": ', f'}}{CLOSES}\n{OPENS}{{"name": "', f"}}{CLOSES}", after_words=True
)  # as `worded` writes them

_ONE = Call("look_up_probe", '{"probe_key": "probe value", "probe_count": 3}', "call00000")
_TWO = Call("send_probe", '{"probe_list": [1, 2]}', "call00001")
_QUESTION, _WORDS, _RESULT = Message("user", "probing question"), "probing words", "probing result"
CALLED = _QUESTION, Message("assistant", "", calls=(_ONE,))
PROBE = json.dumps(
    {
        "type": "function",
        "function": {
            "name": _ONE.name,
            "description": "A probe.",
            "parameters": {"type": "object", "properties": {"probe_key": {"type": "string", "description": "A key."}}},
        },
    }
)

Write = Callable[[Sequence[Message], bool, Sequence[str]], str]
"""write(messages, prompt, tools): the text that a template writes; raises BaseError where it refuses."""


def form_of(write: Write, ends: Sequence[str]) -> CallForm | None:
    """Learn the form in which a template writes calls.

    Args:
        write: the template. A BaseError that it raises is passed on.
        ends: the texts of the tokens that end a turn.

    Returns:
        The form; None where the template leaves out tools, calls or answers of tools, where its calls cannot be read
        back, or where words begin otherwise than calls (the mark of words would be read as words).
    """
    answered = [*CALLED, Message("tool", _RESULT, answers=_ONE)]
    if _ONE.name not in write([_QUESTION], True, [PROBE]) or _RESULT not in write(answered, True, [PROBE]):
        return None
    plain = _answer_text(write, Message("assistant", _WORDS), ends)
    lead = "" if plain is None else plain.partition(_WORDS)[0]  # what a template writes before every answer
    bare = _answer_text(write, CALLED[1], ends)
    if lead.strip() and bare is not None and not bare.startswith(lead.rstrip()):
        return None

    def parts(call: Call, words: str = "", before: tuple[Call, ...] = ()) -> tuple[str, str, str] | None:
        answer = _answer_text(write, Message("assistant", words, calls=(*before, call)), ends)
        return None if answer is None else _around(call, answer.removeprefix(lead))

    one = parts(_ONE)
    if one is None or not one[0].strip():
        return None
    opens, between, closes = one
    two, words = parts(_TWO, before=(_ONE,)), parts(_ONE, _WORDS)
    first = f"{opens}{_ONE.name}{between}{_ONE.arguments}"
    joins = two[0].removeprefix(first) if two and two[0].startswith(first) and two[1:] == (between, closes) else ""
    after_words = words is not None and _dense(words[0]) == _dense(_WORDS + opens) and words[1:] == (between, closes)
    form = CallForm(opens, between, joins if _dense(joins) not in ("", _dense(closes)) else None, closes, after_words)
    calls = (_ONE, _TWO) if form.joins is not None else (_ONE,)
    answer = _answer_text(write, Message("assistant", "", calls=calls), ends) or ""
    _, read_back = read(form, answer.removeprefix(lead))
    return form if [call.meaning for call in read_back] == [call.meaning for call in calls] else None


def _answer_text(write: Write, message: Message, ends: Sequence[str]) -> str | None:
    """What a template writes for an answer, up to the end of the turn; None where it refuses it."""
    try:
        before, after = write([_QUESTION], True, [PROBE]), write([_QUESTION, message], False, [PROBE])
        if not after.startswith(before):  # a generation prompt that the finished turn does not repeat whole
            others = [write([_QUESTION, Message("assistant", word)], False, [PROBE]) for word in "xy"]
            before = shared_start(*others)
    except BaseError:
        return None
    answer = after.removeprefix(before)
    end = max((answer.rfind(mark) for mark in ends if mark), default=-1)
    return answer[:end] if end > 0 else answer.rstrip()


def shared_start(*texts: str) -> str:
    """The longest beginning that all texts share."""
    return os.path.commonprefix(texts)  # noqa: RUF071 (of text, not of paths)


def _around(call: Call, text: str) -> tuple[str, str, str] | None:
    """The text before a call's name, between name and arguments, and after these; None for any other text."""
    if text.count(call.name) != 1 or text.count(call.arguments) != 1:
        return None
    before, _, rest = text.partition(call.name)
    between, arguments, after = rest.partition(call.arguments)
    before, between, after = (part.replace(_ONE.id, ID).replace(_TWO.id, ID) for part in (before, between, after))
    return (before, between, after) if arguments and between.strip() else None


def _dense(text: str) -> str:
    return "".join(text.split())


@dataclass(frozen=True)
class Words:
    """Text of an answer that is no call."""

    text: str


@dataclass(frozen=True)
class Begun:
    """A call whose name has been read; `number` is its index in the answer."""

    number: int
    name: str


@dataclass(frozen=True)
class Arguments:
    """Part of the text of a call's arguments; `number` is the call's index in the answer."""

    number: int
    text: str


Part = Words | Begun | Arguments


class CallReader:
    """Reads an answer while it is generated: words, and then calls."""

    def __init__(self, form: CallForm):
        self._form, self._text, self._state = form, "", "words"
        self._depth, self._quoted, self._escaped = 0, False, False
        self._words: list[str] = []
        self._names: list[str] = []
        self._arguments: list[str] = []

    @property
    def words(self) -> str:
        """The words so far."""
        return "".join(self._words)

    @property
    def calls(self) -> tuple[Call, ...]:
        """The calls so far; the last may lack the end of its arguments."""
        return tuple(map(Call, self._names, self._arguments))

    def add(self, text: str, ended: bool = False) -> list[Part]:
        """Read more text, the last if `ended`, and return the parts that are certain now."""
        self._text += text
        parts: list[Part] = []
        while (step := self._next(ended)) is not None:
            parts += step
        return parts

    @property
    def is_cut(self) -> bool:
        """Whether the text so far breaks off within the name or the arguments of a call."""
        return self._state in ("name", "arguments")

    def whole(self) -> bool:
        """Whether an answer that has ended has calls, each with JSON arguments, and nothing after them."""
        if self._state != "after" or _end(self._form.closes, self._text, 0) != len(self._text.rstrip()):
            return False
        try:
            return all(isinstance(json.loads(text), dict) for text in self._arguments)
        except (ValueError, RecursionError):
            return False

    def _next(self, ended: bool) -> list[Part] | None:
        """Take the next step, and return the parts that it reads; None where it needs more text."""
        match self._state:
            case "words":
                return self._next_words(ended)
            case "name":
                return self._next_name()
            case "arguments":
                return self._next_arguments()
            case _:
                if self._form.joins is not None and (end := _end(self._form.joins, self._text, 0) or 0) > 0:
                    self._text, self._state = self._text[end:], "name"
                    return []
                return None

    def _next_words(self, ended: bool) -> list[Part] | None:
        """Read words up to where calls begin, or may begin. White space before that belongs to the mark of calls."""
        blank = len(self._text) - len(self._text.lstrip())
        first = self._form.opens.lstrip()[0]
        starts = [i for i, c in enumerate(self._text) if c == first]
        if not self._form.after_words:
            starts = [blank] if not self._words and starts[:1] == [blank] else []
        words, rest = self._text if ended else self._text.rstrip(), None
        for start in starts:
            end = _end(self._form.opens, self._text, start)
            if end is not None and (end > 0 or not ended):
                words = self._text[:start].rstrip()
                rest = self._text[end:] if end > 0 else None  # None: the mark may be unfinished
                break
        if rest is None and not words:
            return None
        self._text = self._text[len(words) :] if rest is None else rest
        self._state = "words" if rest is None else "name"
        self._words.append(words)
        return [Words(words)] if words else []

    def _next_name(self) -> list[Part] | None:
        text = self._text.lstrip()
        name = next((text[:i] for i, c in enumerate(text) if not (c.isalnum() or c in "_.:-")), None)
        end = _end(self._form.between, text, len(name)) if name else None
        if name is None or end is None or end < 0:
            return None
        self._text, self._state = text[end:], "arguments"
        self._names.append(name)
        self._arguments.append("")
        return [Begun(len(self._names) - 1, name)]

    def _next_arguments(self) -> list[Part] | None:
        text = rest = self._text if self._depth else self._text.lstrip()
        if not text or not (self._depth or text.startswith("{")):
            return None
        for i, c in enumerate(text):
            if self._quoted:
                self._escaped, self._quoted = c == "\\" and not self._escaped, c != '"' or self._escaped
            elif c == '"':
                self._quoted = True
            else:
                self._depth += (c in "{[") - (c in "}]")
            if not self._depth:
                text, self._state = text[: i + 1], "after"
                break
        self._text = rest[len(text) :]
        self._arguments[-1] += text
        return [Arguments(len(self._names) - 1, text)]


def _end(mark: str, text: str, start: int) -> int | None:
    """Where a mark ends that begins at `start`; -1 where the text may still become the mark, None where it cannot. Any
    white space, or none, may stand before the mark and where it has white space."""
    at = start
    for i, wanted in enumerate(mark):
        while (i == 0 or wanted.isspace()) and at < len(text) and text[at].isspace():
            at += 1
        if wanted.isspace():
            continue
        if at == len(text):
            return -1
        if wanted == ID:
            while at < len(text) and (text[at].isalnum() or text[at] in "_-"):
                at += 1
        elif text[at] == wanted:
            at += 1
        else:
            return None
    return at


@dataclass(frozen=True)
class Spelling:
    """How a template takes messages with calls: whether the content of a message without words is empty, rather than
    left out, and whether arguments are the text of an object, rather than the object."""

    empty: bool
    as_text: bool

    def turn(self, message: Message) -> dict[str, Any]:
        """The message as the template takes it."""
        turn: dict[str, Any] = {"role": message.role, "content": message.content}
        if message.calls:
            if not (message.content or self.empty):
                del turn["content"]
            turn["tool_calls"] = [
                {
                    "id": call.id,
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": call.arguments if self.as_text else json.loads(call.arguments),
                    },
                }
                for call in message.calls
            ]
        if message.answers is not None:
            turn |= {"name": message.answers.name, "tool_call_id": message.answers.id}
        return turn


def read(form: CallForm, text: str) -> tuple[str, tuple[Call, ...]]:
    """Words and calls of a whole answer; the text and no calls where the calls are incomplete."""
    reader = CallReader(form)
    reader.add(text, ended=True)
    return (reader.words, reader.calls) if reader.whole() else (text, ())
