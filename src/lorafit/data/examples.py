"""Examples: conversations and plain text, checks of their answers, and the three splits."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lorafit.data.targets import Target
from lorafit.digests import digest_of, digest_of_format_1
from lorafit.errors import Problem

SPLITS = ("train", "valid", "test")
MOSTLY = 0.95  # the share of conversations that decides for all of them
TEXT = "text"  # the role of plain text, which is learnt whole


@dataclass(frozen=True)
class Call:
    """A call of a tool by the assistant. arguments: a JSON object as text. id: by which the tool's answer names it."""

    name: str
    arguments: str
    id: str = ""

    @property
    def text(self) -> str:
        """The call as people read it."""
        return f"{self.name}({self.arguments})"

    @property
    def meaning(self) -> tuple[str, str]:
        """The name, and the arguments in one order and spacing: the same for equal calls; 3.0 is 3."""
        return self.name, json.dumps(json.loads(self.arguments, parse_float=_number), sort_keys=True)


def _number(text: str) -> int | float:
    value = float(text)
    return int(value) if value.is_integer() else value


@dataclass(frozen=True)
class Message:
    """A message of a conversation.

    Args:
        role: `system`, `user`, `assistant` or `tool`.
        content: its words.
        learnt: False for an answer that is not to be learnt, but that others follow.
        calls: of an assistant's message, which may then have no words.
        answers: the call that a tool's message answers.
        reasoning: the reasoning before an answer.
    """

    role: str
    content: str
    learnt: bool = field(default=True, repr=False)  # digests of format 1 are over the repr
    calls: tuple[Call, ...] = field(default=(), repr=False)
    answers: Call | None = field(default=None, repr=False)
    reasoning: str = field(default="", repr=False)

    @property
    def text(self) -> str:
        """Words and calls, as people read them."""
        return "\n".join([*([self.content] if self.content or not self.calls else []), *(c.text for c in self.calls)])


@dataclass(frozen=True)
class Check:
    """What a right answer to an example looks like: it passes every part of its check.

    Args:
        contains: texts that occur in it, in any case, at word boundaries.
        lacks: texts that do not occur in it.
        max_words: the most words that it has.
        declines: whether the question must be turned away, which is scored apart.
        exact: the whole answer, in this case, without white space around it.
        json: the content of the answer as JSON, as `equality.json_form` writes it.
        number: its last number.
        pattern: a regular expression that is found in it.
        label: the whole answer, as `equality.label_of` compares labels.
        numerals: how numbers are written, one of `equality.NUMERALS`.
    """

    contains: tuple[str, ...]
    lacks: tuple[str, ...]
    max_words: int
    declines: bool = False
    exact: str | None = field(default=None, repr=False)  # digests of format 1 are over the repr
    json: str | None = field(default=None, repr=False)
    number: float | None = field(default=None, repr=False)
    pattern: str | None = field(default=None, repr=False)
    label: str | None = field(default=None, repr=False)
    numerals: str = field(default=".,", repr=False)

    @property
    def forms(self) -> tuple[tuple[str, str | float], ...]:
        """The parts that concern the answer as a whole, by name."""
        names = ("exact", "json", "number", "pattern", "label")
        return tuple((name, getattr(self, name)) for name in names if getattr(self, name) is not None)


@dataclass(frozen=True)
class Example:
    """One conversation, or one piece of plain text.

    Args:
        messages: the conversation; for plain text, one message with the role `text`.
        where: its place, `file:line`.
        check: of its last answer.
        group: the source that it shares with others (a document, a fact). A split keeps a group on one side, and
            intervals resample whole groups.
        extra: names of harmless fields that nothing reads.
        label: the answer, where it is the label of a text.
        target: what the answer says, where it is a number, or a list of labels.
        tools: tools that the assistant may call, each as JSON.
    """

    messages: tuple[Message, ...]
    where: str
    check: Check | None = None
    group: str | None = None
    extra: tuple[str, ...] = ()
    label: str | None = None
    tools: tuple[str, ...] = ()
    target: Target | None = None

    @property
    def is_text(self) -> bool:
        """Plain text: no question, no answer, every token learnt."""
        return self.messages[0].role == TEXT

    @property
    def not_learnt(self) -> tuple[int, ...]:
        """Indices of the messages that are not to be learnt."""
        return tuple(i for i, message in enumerate(self.messages) if not message.learnt)

    @property
    def calls(self) -> tuple[Call, ...]:
        """The calls of the last answer, by which an answer is scored; empty where it has only words."""
        return self.messages[-1].calls

    @property
    def is_scored(self) -> bool:
        """Whether a check, or calls, say what a right answer is."""
        return self.check is not None or bool(self.calls)

    @property
    def with_tools(self) -> tuple[object, ...]:
        """Its tools and calls, for a digest; empty where it has none."""
        called = tuple((i, m.calls, m.answers) for i, m in enumerate(self.messages) if m.calls or m.answers)
        return (self.tools, *called) if self.tools or called else ()

    @property
    def reasoned(self) -> bool:
        """Whether an answer to be learnt has reasoning."""
        return any(message.reasoning and message.learnt for message in self.messages)

    @property
    def question(self) -> str:
        """The text by which examples are compared: all before the last answer, without a system prompt; plain text
        itself."""
        if self.is_text:
            return self.answer
        return "\n".join(message.text for message in self.messages[:-1] if message.role != "system")

    @property
    def asked(self) -> str:
        """The message before the last answer; "" where that is only a system prompt, and for plain text."""
        return next((m.text for m in reversed(self.messages[:-1]) if m.role != "system"), "")

    @property
    def answer(self) -> str:
        """The last assistant message, its calls included; plain text itself."""
        return self.messages[-1].text


def asks_once(examples: Sequence[Example]) -> bool:
    """Whether there are conversations, and nearly all have a single question."""
    questions = [sum(m.role == "user" for m in example.messages) for example in examples if not example.is_text]
    return any(questions) and sum(count <= 1 for count in questions) >= MOSTLY * len(questions)


@dataclass(frozen=True)
class Examples:
    """Examples by split; a split that was not given is empty.

    Args:
        train, valid, test: the examples of each split.
        system: a system prompt that the form of the data calls for.
        skipped: problems of rows that were left out.
        unread: files of the folder that are not part of a split.
        notes: messages to the user about how the data were understood.
    """

    train: tuple[Example, ...]
    valid: tuple[Example, ...] = ()
    test: tuple[Example, ...] = ()
    system: str | None = None
    skipped: tuple[Problem, ...] = ()
    unread: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()

    def by_name(self) -> dict[str, tuple[Example, ...]]:
        return {"train": self.train, "valid": self.valid, "test": self.test}

    def with_splits(self, splits: Mapping[str, tuple[Example, ...]]) -> Examples:
        """A copy with the named splits replaced."""
        train, valid, test = (splits.get(name, split) for name, split in self.by_name().items())
        return replace(self, train=train, valid=valid, test=test)

    def without(self, problems: Sequence[Problem]) -> Examples:
        """A copy without the examples that the problems name; the problems are kept in `skipped`."""
        ends = re.compile(r": |\Z")  # of a place, which a field may follow; a path may hold ": " too
        bad = {problem.where[: end.start()] for problem in problems for end in ends.finditer(problem.where)}
        left = {name: tuple(e for e in split if e.where not in bad) for name, split in self.by_name().items()}
        return replace(self.with_splits(left), skipped=(*self.skipped, *problems))

    def digest(self) -> str:
        """The digest of messages, reasoning, tools, checks and targets of all splits, whatever files they came from."""
        content = [
            [(e.messages, e.check, e.tools, *([e.target] if e.target else [])) for e in split]
            for split in self.by_name().values()
        ]
        return digest_of(content)

    def has_digest(self, digest: str) -> bool:
        """Whether this is the digest of these examples, in any format."""
        return digest == (self.digest() if ":" in digest else self._digest_of_format_1())

    def _digest_of_format_1(self) -> str:
        content = [
            [
                (
                    e.messages,
                    check := _check_of_format_1(e),
                    *e.not_learnt,
                    *e.with_tools,
                    *((i, m.reasoning) for i, m in enumerate(e.messages) if m.reasoning),
                    *(check.forms if check else ()),
                )
                for e in split
            ]
            for split in self.by_name().values()
        ]
        return digest_of_format_1(content)


def _check_of_format_1(example: Example) -> Check | None:
    """The check as it was in format 1, where a label was a text to contain."""
    if example.check is None or example.check.label is None:
        return example.check
    return Check((example.answer,), (), len(example.answer.split()))
