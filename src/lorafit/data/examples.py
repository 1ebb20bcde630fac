"""What examples are: conversations and plain text, with what a right answer looks like; three splits of them."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

from lorafit.errors import Problem

SPLITS = ("train", "valid", "test")
TEXT = "text"  # the role of plain text, which answers nothing and is learnt whole


@dataclass(frozen=True)
class Message:
    """What one side says. learnt: False for an answer that others follow and that is not to be learnt itself.
    reasoning: what was thought before an answer, apart from it."""

    role: str
    content: str
    learnt: bool = field(default=True, repr=False)  # digests are over the repr
    reasoning: str = field(default="", repr=False)


@dataclass(frozen=True)
class Check:
    """What a right answer to an example looks like.

    It contains each of `contains` and none of `lacks` (whatever the case, at word boundaries), within
    `max_words`. With `declines`, the example is a question that must be turned away, and is scored apart.
    """

    contains: tuple[str, ...]
    lacks: tuple[str, ...]
    max_words: int
    declines: bool = False


@dataclass(frozen=True)
class Example:
    """One conversation, or one piece of plain text. `where` is `file:line`; `extra` names harmless fields that nothing
    reads.

    `group` names the source it shares with others (a document, a fact): a split keeps a group on one side, and
    intervals resample whole groups.
    """

    messages: tuple[Message, ...]
    where: str
    check: Check | None = None
    group: str | None = None
    extra: tuple[str, ...] = ()
    label: str | None = None

    @property
    def is_text(self) -> bool:
        """Plain text: no question, no answer, every token learnt."""
        return self.messages[0].role == TEXT

    @property
    def not_learnt(self) -> tuple[int, ...]:
        """Places of the messages that are marked as not to be learnt."""
        return tuple(i for i, message in enumerate(self.messages) if not message.learnt)

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
        return "\n".join(message.content for message in self.messages[:-1] if message.role != "system")

    @property
    def answer(self) -> str:
        """The last assistant message; plain text itself."""
        return self.messages[-1].content


@dataclass(frozen=True)
class Examples:
    """Examples by split; a split that was not given is empty.

    system: a system prompt that the form of the data calls for. skipped: problems of rows that were left out.
    unread: files of the folder that are no split of it.
    """

    train: tuple[Example, ...]
    valid: tuple[Example, ...] = ()
    test: tuple[Example, ...] = ()
    system: str | None = None
    skipped: tuple[Problem, ...] = ()
    unread: tuple[str, ...] = ()

    def by_name(self) -> dict[str, tuple[Example, ...]]:
        return {"train": self.train, "valid": self.valid, "test": self.test}

    def with_splits(self, splits: Mapping[str, tuple[Example, ...]]) -> Examples:
        """The same with the named splits replaced."""
        train, valid, test = (splits.get(name, split) for name, split in self.by_name().items())
        return replace(self, train=train, valid=valid, test=test)

    def without(self, problems: Sequence[Problem]) -> Examples:
        """The same without the examples that the problems name; they are kept in `skipped`."""
        bad = {problem.where.partition(": ")[0] for problem in problems}
        left = {name: tuple(e for e in split if e.where not in bad) for name, split in self.by_name().items()}
        return replace(self.with_splits(left), skipped=(*self.skipped, *problems))

    def digest(self) -> str:
        """SHA-256 over the messages and checks of all splits, whatever files they came from."""
        content = [[(e.messages, e.check, *e.not_learnt, *(m.reasoning for m in e.messages if m.reasoning))
                    for e in split] for split in self.by_name().values()]  # fmt: skip
        return hashlib.sha256(repr(content).encode()).hexdigest()
