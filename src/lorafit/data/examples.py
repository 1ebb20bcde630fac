"""What examples are: conversations and plain text, with what a right answer looks like; three splits of them."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lorafit.digests import digest_of, digest_of_format_1
from lorafit.errors import Problem

SPLITS = ("train", "valid", "test")
MOSTLY = 0.95  # of the conversations, from which on what they have in common is taken for all of them
TEXT = "text"  # the role of plain text, which answers nothing and is learnt whole


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
        """What equal calls share: the name, and the arguments in whatever order and spacing; 3.0 is 3."""
        return self.name, json.dumps(json.loads(self.arguments, parse_float=_number), sort_keys=True)


def _number(text: str) -> int | float:
    value = float(text)
    return int(value) if value.is_integer() else value


@dataclass(frozen=True)
class Message:
    """What one side says: `system`, `user`, `assistant`, or `tool`.

    learnt: False for an answer that others follow and that is not to be learnt itself. calls: of an assistant's
    message, which may have no words then. answers: of a tool's message, the call that it answers. reasoning: what was
    thought before an answer, apart from it.
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
    """What a right answer to an example looks like.

    It contains each of `contains` and none of `lacks` (whatever the case, at word boundaries), within
    `max_words`. With `declines`, the example is a question that must be turned away, and is scored apart.
    exact: the answer is this text, case included, white space around it aside. json: it is JSON with this content, as
    `equality.json_form` writes it. number: its last number is this one. pattern: this regular expression is found in
    it. label: it is this label and nothing else, by `equality.label_of`. numerals: how numbers are written, one of
    `equality.NUMERALS`.
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
        """What is asked of the answer as a whole, by name."""
        found = {
            "exact": self.exact,
            "json": self.json,
            "number": self.number,
            "pattern": self.pattern,
            "label": self.label,
        }
        return tuple((name, value) for name, value in found.items() if value is not None)


@dataclass(frozen=True)
class Example:
    """One conversation, or one piece of plain text. `where` is `file:line`; `extra` names harmless fields that nothing
    reads; `tools` are those that the assistant may call, each as JSON.

    `group` names the source it shares with others (a document, a fact): a split keeps a group on one side, and
    intervals resample whole groups.
    """

    messages: tuple[Message, ...]
    where: str
    check: Check | None = None
    group: str | None = None
    extra: tuple[str, ...] = ()
    label: str | None = None
    tools: tuple[str, ...] = ()

    @property
    def is_text(self) -> bool:
        """Plain text: no question, no answer, every token learnt."""
        return self.messages[0].role == TEXT

    @property
    def not_learnt(self) -> tuple[int, ...]:
        """Places of the messages that are marked as not to be learnt."""
        return tuple(i for i, message in enumerate(self.messages) if not message.learnt)

    @property
    def calls(self) -> tuple[Call, ...]:
        """The calls of the last answer, by which an answer is scored; empty where it is words alone."""
        return self.messages[-1].calls

    @property
    def is_scored(self) -> bool:
        """Whether anything says what a right answer is: a check, or calls."""
        return self.check is not None or bool(self.calls)

    @property
    def with_tools(self) -> tuple[object, ...]:
        """What it says of tools and calls; empty where it says nothing."""
        called = tuple((i, one.calls, one.answers) for i, one in enumerate(self.messages) if one.calls or one.answers)
        return (self.tools, *called) if self.tools or called else ()

    @property
    def reasoned(self) -> bool:
        """Whether an answer to be learnt has its reasoning."""
        return any(message.reasoning and message.learnt for message in self.messages)

    @property
    def question(self) -> str:
        """All before the last answer as one text, without a system prompt (of plain text: all of it): what examples are
        told apart by."""
        if self.is_text:
            return self.answer
        return "\n".join(message.text for message in self.messages[:-1] if message.role != "system")

    @property
    def answer(self) -> str:
        """The last assistant message, its calls included; plain text itself."""
        return self.messages[-1].text


def asks_once(examples: Sequence[Example]) -> bool:
    """Whether there are conversations, and all but a few ask one question; what tools answer is none."""
    asked = [sum(one.role == "user" for one in example.messages) for example in examples if not example.is_text]
    return any(asked) and sum(count <= 1 for count in asked) >= MOSTLY * len(asked)


@dataclass(frozen=True)
class Examples:
    """Examples by split; a split that was not given is empty.

    system: a system prompt that the form of the data calls for. skipped: problems of rows that were left out.
    unread: files of the folder that are no split of it. notes: how the data were taken, where that is to be told.
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
        """The same with the named splits replaced."""
        train, valid, test = (splits.get(name, split) for name, split in self.by_name().items())
        return replace(self, train=train, valid=valid, test=test)

    def without(self, problems: Sequence[Problem]) -> Examples:
        """The same without the examples that the problems name; they are kept in `skipped`."""
        ends = re.compile(r": |\Z")  # of a place, which a field may follow; a path may hold the former too
        bad = {problem.where[: end.start()] for problem in problems for end in ends.finditer(problem.where)}
        left = {name: tuple(e for e in split if e.where not in bad) for name, split in self.by_name().items()}
        return replace(self.with_splits(left), skipped=(*self.skipped, *problems))

    def digest(self) -> str:
        """Over the messages, their reasoning, tools and checks of all splits, whatever files they came from."""
        return digest_of([[(e.messages, e.check, e.tools) for e in split] for split in self.by_name().values()])

    def has_digest(self, digest: str) -> bool:
        """Whether this is the digest of these examples, in whichever format it is."""
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
    """The check as it was then: that of a label asked for its words."""
    if example.check is None or example.check.label is None:
        return example.check
    return Check((example.answer,), (), len(example.answer.split()))
