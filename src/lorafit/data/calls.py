"""How calls of tools stand in the text of an answer, and how they are read back from it.

The form is taken from the base's own chat template, by what it writes for a known call; one that does not render tools,
or whose calls cannot be read back, is given words of ours, in `worded`.
"""

from __future__ import annotations

import json
import os.path
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lorafit.data.examples import Call, Message
from lorafit.errors import BaseError

ID = "\ufdd1"  # stands for the id of a call in a mark: a code that Unicode leaves to programs
OPENS, CLOSES = "<tool_call>\n", "\n</tool_call>"


def worded(messages: Sequence[Message], tools: Sequence[str]) -> list[Message]:
    """The same conversation for a template that knows no tools: what may be called stands before the first question,
    calls stand in the assistant's words, and what tools answer is said by the user.

    Args:
        messages: with calls and answers of tools.
        tools: as `read_tools` read them.
    """
    found: list[Message] = []
    for message in messages:
        one = message
        if message.role == "tool":
            one = Message("user", f"<tool_response>\n{message.content}\n</tool_response>")
        elif message.calls:
            calls = [
                f'{OPENS}{{"name": "{call.name}", "arguments": {call.arguments}}}{CLOSES}' for call in message.calls
            ]
            content = "\n".join([*([message.content] if message.content else []), *calls])
            one = replace(message, content=content, calls=())
        if found and found[-1].role == one.role == "user":
            found[-1] = replace(found[-1], content=f"{found[-1].content}\n{one.content}")
        else:
            found.append(one)
    first = next((i for i, message in enumerate(found) if message.role == "user"), None)
    if tools and first is not None:
        described = "\n".join(json.dumps(json.loads(tool)["function"], ensure_ascii=False) for tool in tools)
        preface = (
            f"These functions can be called, one a line:\n{described}\nA call is written as\n"
            f'{OPENS}{{"name": "its name", "arguments": {{"name of an argument": "its value"}}}}{CLOSES}'
        )
        found[first] = replace(found[first], content=f"{preface}\n\n{found[first].content}")
    return found


@dataclass(frozen=True)
class CallForm:
    """What stands around the names and the arguments of calls: `opens name between arguments joins name between
    arguments closes`. Where it is read, any white space counts as any other, and as none.

    joins: None where an answer makes one call at most. after_words: whether words may stand before the calls.
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
_ASKED, _WORDS, _RESULT = Message("user", "probing question"), "probing words", "probing result"
CALLED = _ASKED, Message("assistant", "", calls=(_ONE,))
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
"""write(messages, prompt, tools): a template over these; raises what a template raises."""


def form_of(write: Write, ends: Sequence[str]) -> CallForm | None:
    """The form in which a template writes calls; None where it does not show tools, calls and what tools answer, where
    its calls cannot be read back, or where words begin otherwise than calls (their mark would be read as words).

    ends: texts of the tokens that end a turn.
    """
    answered = [*CALLED, Message("tool", _RESULT, answers=_ONE)]
    shown = write([_ASKED], True, [PROBE]), write(answered, True, [PROBE])
    if _ONE.name not in shown[0] or _RESULT not in shown[1]:
        return None
    plain = _said(write, Message("assistant", _WORDS), ends)
    lead = "" if plain is None else plain.partition(_WORDS)[0]  # what a template writes before every answer
    bare = _said(write, CALLED[1], ends)
    if lead.strip() and bare is not None and not bare.startswith(lead.rstrip()):
        return None

    def parts(call: Call, words: str = "", before: tuple[Call, ...] = ()) -> tuple[str, str, str] | None:
        answer = _said(write, Message("assistant", words, calls=(*before, call)), ends)
        return None if answer is None else _parts(answer.removeprefix(lead), call)

    one = parts(_ONE)
    if one is None or not one[0].strip():
        return None
    opens, between, closes = one
    two, words = parts(_TWO, before=(_ONE,)), parts(_ONE, _WORDS)
    first = f"{opens}{_ONE.name}{between}{_ONE.arguments}"
    joins = two[0].removeprefix(first) if two and two[0].startswith(first) and two[1:] == (between, closes) else ""
    after_words = words is not None and _dense(words[0]) == _dense(_WORDS + opens) and words[1:] == (between, closes)
    form = CallForm(opens, between, joins if _dense(joins) not in ("", _dense(closes)) else None, closes, after_words)
    made = (_ONE, _TWO) if form.joins is not None else (_ONE,)
    written = _said(write, Message("assistant", "", calls=made), ends) or ""
    found = read(form, written.removeprefix(lead))[1]
    return form if [call.meaning for call in found] == [call.meaning for call in made] else None


def _said(write: Write, message: Message, ends: Sequence[str]) -> str | None:
    """What a template writes for an answer, up to the end of the turn; None where it refuses it."""
    try:
        before, after = write([_ASKED], True, [PROBE]), write([_ASKED, message], False, [PROBE])
        if not after.startswith(before):  # a generation prompt that the finished turn does not repeat whole
            others = [write([_ASKED, Message("assistant", word)], False, [PROBE]) for word in "xy"]
            before = os.path.commonprefix(others)  # noqa: RUF071 (of text, not of paths)
    except BaseError:
        return None
    answer = after.removeprefix(before)
    end = max((answer.rfind(one) for one in ends if one), default=-1)
    return answer[:end] if end > 0 else answer.rstrip()


def _parts(text: str, call: Call) -> tuple[str, str, str] | None:
    """What stands before the name, between name and arguments, and behind these; None where they do not stand so."""
    if text.count(call.name) != 1 or text.count(call.arguments) != 1:
        return None
    before, _, rest = text.partition(call.name)
    between, found, behind = rest.partition(call.arguments)
    marks = [part.replace(_ONE.id, ID).replace(_TWO.id, ID) for part in (before, between, behind)]
    return (marks[0], marks[1], marks[2]) if found and between.strip() else None


def _dense(text: str) -> str:
    return "".join(text.split())


@dataclass(frozen=True)
class Words:
    """Text of an answer that is no call."""

    text: str


@dataclass(frozen=True)
class Begun:
    """A call whose name has been read. number: of the call in its answer."""

    number: int
    name: str


@dataclass(frozen=True)
class Arguments:
    """Part of the text of a call's arguments."""

    number: int
    text: str


Part = Words | Begun | Arguments


class CallReader:
    """Reads an answer as it comes: words, and then calls. calls: those that have been read, the last maybe in part."""

    def __init__(self, form: CallForm):
        self._form, self._text, self._state = form, "", "words"
        self._depth, self._quoted, self._escaped = 0, False, False
        self._words: list[str] = []
        self._names: list[str] = []
        self._arguments: list[str] = []

    @property
    def words(self) -> str:
        return "".join(self._words)

    @property
    def calls(self) -> tuple[Call, ...]:
        return tuple(Call(*one) for one in zip(self._names, self._arguments, strict=True))

    def add(self, text: str, ended: bool = False) -> list[Part]:
        """What can be told now. ended: no more will come."""
        self._text += text
        parts: list[Part] = []
        while (found := self._next(ended)) is not None:
            parts += found
        return parts

    @property
    def is_cut(self) -> bool:
        """Whether what has been read breaks off within a call: what it calls, or with what, is not all there."""
        return self._state in ("name", "arguments")

    def whole(self) -> bool:
        """Whether an answer that has ended has calls, each with arguments that are JSON, and nothing behind them."""
        if self._state != "behind" or _end(self._form.closes, self._text, 0) != len(self._text.rstrip()):
            return False
        try:
            return all(isinstance(json.loads(text), dict) for text in self._arguments)
        except (ValueError, RecursionError):
            return False

    def _next(self, ended: bool) -> list[Part] | None:
        """Take the next step, and return what it tells; None where there is nothing to be done until more comes."""
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
        """Words up to where calls begin, or may begin; the white space before that belongs to their mark."""
        blank = len(self._text) - len(self._text.lstrip())
        first = self._form.opens.lstrip()[0]
        starts = [i for i, c in enumerate(self._text) if c == first]
        if not self._form.after_words:
            starts = [blank] if not self._words and starts[:1] == [blank] else []
        for start in starts:
            end = _end(self._form.opens, self._text, start)
            if end is None or (end < 0 and ended):
                continue
            told = self._text[:start].rstrip()
            if end > 0:
                self._text, self._state = self._text[end:], "name"
                self._words.append(told)
                return [Words(told)] if told else []
            break
        else:
            told = self._text if ended else self._text.rstrip()
        if not told:
            return None
        self._text = self._text[len(told) :]
        self._words.append(told)
        return [Words(told)]

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
                text, self._state = text[: i + 1], "behind"
                break
        self._text = rest[len(text) :]
        self._arguments[-1] += text
        return [Arguments(len(self._names) - 1, text)]


def _end(mark: str, text: str, start: int) -> int | None:
    """Where a mark ends that begins at `start`; -1 where the text may still become it, None where it cannot. Before it,
    and where it has white space, there may be any or none."""
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
    """How a template wants a conversation with calls: whether the words of a message without any are an empty text,
    or are left out; and whether arguments are the text of an object."""

    empty: bool
    as_text: bool

    def turn(self, message: Message) -> dict[str, Any]:
        """A message as templates read it."""
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
    """Words and calls of a whole answer; the text and no calls, where it does not hold whole ones."""
    reader = CallReader(form)
    reader.add(text, ended=True)
    return (reader.words, reader.calls) if reader.whole() else (text, ())
