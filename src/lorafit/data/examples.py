"""Reading examples and checking them: every problem of every line at once, before a model is opened."""

from __future__ import annotations

import hashlib
import json
import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from lorafit.data.readers import Record, kinds, read_records
from lorafit.errors import DataError, Problem, SettingsError

ROLES = ("system", "user", "assistant")
SPLITS = ("train", "valid", "test")
MISNAMED = {
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "eval": "valid",
    "training": "train",
    "tests": "test",
}
TEXT = "text"  # the role of plain text, which answers nothing and is learnt whole
MOST_LABELS = 30  # named in the system prompt
BUILTIN = "builtin"  # the help desk that comes with the package
BUILTIN_FOLDER = Path(str(files("lorafit.data").joinpath("builtin")))


@dataclass(frozen=True)
class Message:
    role: str
    content: str


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
    """One conversation, or one piece of plain text. `where` is `file:line`; `extra` names fields that were passed over.

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
    """

    train: tuple[Example, ...]
    valid: tuple[Example, ...] = ()
    test: tuple[Example, ...] = ()
    system: str | None = None
    skipped: tuple[Problem, ...] = ()

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
        content = [[(e.messages, e.check) for e in split] for split in self.by_name().values()]
        return hashlib.sha256(repr(content).encode()).hexdigest()


def read_examples(path: str | Path, columns: Sequence[str] = (), skip_bad: bool = False) -> Examples:
    """Read one file, a folder with train, valid and test files, or the built-in help desk (`builtin`).

    Files may be jsonl, json, csv, tsv, parquet or plain text. Each row is of one form, told by its fields:
    `messages`; `conversations` (sharegpt); `prompt`, `completion`; `instruction`, `input`, `output` (alpaca); `text`,
    `label` (classification); `text`. It may carry a `check` and a `group`.

    columns: `field=column` for columns of other names, such as `prompt=question`. skip_bad: leave out rows that cannot
    be used, kept in `Examples.skipped`.
    Raises DataError with all problems of all files, SettingsError for columns that cannot be.
    """
    renamed = _renamed(columns)
    splits = {}
    problems: list[Problem] = []
    for split, file in _files(BUILTIN_FOLDER if str(path) == BUILTIN else Path(path)).items():
        before = len(problems)
        records = read_records(file, problems)
        lost = [name for name in renamed if records and not any(name in record.fields for record in records)]
        if lost:
            there = ", ".join(sorted({name for record in records[:100] for name in record.fields})[:12])
            problems += [Problem(str(file), f"no column '{name}'", f"--columns may name: {there}") for name in lost]
            continue
        if len(records) > 1 and not any(_form(_fields(record, renamed)) for record in records):
            problems.append(_formless(str(file), records[0].fields))
            continue
        found = [_parse(record, renamed, problems) for record in records]
        problems[before:] = sorted(problems[before:], key=_line)
        splits[split] = tuple(example for example in found if example is not None)
        if not splits[split] and len(problems) == before:
            problems.append(Problem(str(file), "no examples in it", "write at least one"))
    skippable = skip_bad and all(splits.get(split) for split in splits) and "train" in splits
    if problems and not skippable:
        raise DataError(problems)
    return _with_labels(Examples((), skipped=tuple(problems)).with_splits(splits))


def _line(problem: Problem) -> int:
    """The line of a problem's `file:line: field`."""
    digits = re.search(r"(\d+)$", problem.where.partition(": ")[0])
    return int(digits[1]) if digits else 0


def _renamed(columns: Sequence[str]) -> dict[str, str]:
    """Field by column name."""
    found = {}
    for given in columns:
        field, _, column = given.partition("=")
        if field not in FIELDS or not column:
            known = ", ".join(sorted(FIELDS))
            raise SettingsError(
                f"--columns {given}: write FIELD=COLUMN, such as prompt=question; FIELD is one of {known}"
            )
        found[column] = field
    return found


def _files(path: Path) -> dict[str, Path]:
    """The file of each split. Raises DataError for a folder without a training file, or with two for one split."""
    if not path.is_dir():
        return {"train": path}
    named: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(path.iterdir()):
        stem, _, ending = file.name.partition(".")
        if f".{ending.removesuffix('.gz')}" in kinds():
            named[stem].append(file)
    problems = [Problem(str(file), "not a name that is read", f"rename it to {MISNAMED[stem]}{file.suffix}")
                for stem in MISNAMED for file in named[stem]]  # fmt: skip
    problems += [
        Problem(str(path), f"two {split} files: {', '.join(file.name for file in named[split])}", "leave one of them")
        for split in SPLITS
        if len(named[split]) > 1
    ]
    if not named["train"] and not problems:
        here = ", ".join(sorted(p.name for p in path.iterdir())[:8]) or "nothing"
        fix = "name the files train, valid and test (jsonl, json, csv, tsv, parquet or txt), or give one file"
        problems.append(
            Problem(str(path), f"no train.jsonl or other training file in this folder (it holds {here})", fix)
        )
    if problems:
        raise DataError(problems)
    return {split: named[split][0] for split in SPLITS if named[split]}


def _fields(record: Record, renamed: dict[str, str]) -> dict[str, Any]:
    return {renamed.get(name, name): value for name, value in record.fields.items()} if renamed else record.fields


def _form(row: dict[str, Any]) -> str | None:
    return next((form for form, (needed, _) in FORMS.items() if needed <= set(row)), None)


def _formless(where: str, row: dict[str, Any]) -> Problem:
    """A problem of one row, or of a whole file in which no row has a form."""
    fields = ", ".join(list(row)[:8]) or "none"
    return Problem(where, f"of no form that is known (fields: {fields})",
                   "give prompt and completion, or messages; name columns of other names: --columns prompt=QUESTION "
                   "--columns completion=ANSWER")  # fmt: skip


Wrong = Callable[..., None]
"""wrong(what, fix, field): tell a problem of the record at hand."""


def _parse(record: Record, renamed: dict[str, str], problems: list[Problem]) -> Example | None:
    def wrong(what: str, fix: str, field: str = "") -> None:
        problems.append(Problem(f"{record.where}: {field}" if field else record.where, what, fix))

    row = _fields(record, renamed)
    before = len(problems)
    form = _form(row)
    if form is None:
        problems.append(_formless(record.where, row))
        return None
    messages = FORMS[form][1](row, wrong)
    check = _check(row.get("check"), wrong)
    group = row.get("group")
    if group is not None and not isinstance(group, str):
        wrong(f"not text but {type(group).__name__}", "write a string, or leave it out", "group")
    if len(problems) > before:
        return None
    return Example(
        messages, record.where, check, group, _passed_over(row, form), row["label"] if form == LABELLED else None
    )


def _messages(row: dict[str, Any], wrong: Wrong) -> tuple[Message, ...]:
    return _turns(row["messages"], "messages", "role", "content", {role: role for role in ROLES}, wrong)


def _sharegpt(row: dict[str, Any], wrong: Wrong) -> tuple[Message, ...]:
    roles = {"human": "user", "user": "user", "gpt": "assistant", "assistant": "assistant", "system": "system"}
    return _turns(row["conversations"], "conversations", "from", "value", roles, wrong)


def _turns(turns: Any, name: str, by: str, says: str, roles: dict[str, str], wrong: Wrong) -> tuple[Message, ...]:
    if not isinstance(turns, list) or not turns:
        wrong("not a list of messages", f'write [{{"{by}": "{next(iter(roles))}", "{says}": "..."}}, ...]', name)
        return ()
    found = []
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            wrong("not an object", f'write {{"{by}": "user", "{says}": "..."}}', f"{name}[{i}]")
        elif not isinstance(turn.get(by), str) or turn[by] not in roles:
            said = json.dumps(turn.get(by), default=str)
            wrong(f"unknown role {said}", f"use {', '.join(roles)}", f"{name}[{i}].{by}")
        else:
            found += _said(roles[turn[by]], turn.get(says), f"{name}[{i}].{says}", wrong)
    if len(found) == len(turns):
        _order(found, name, by, wrong)
    return tuple(found)


def _said(role: str, content: Any, field: str, wrong: Wrong) -> list[Message]:
    """The message, or none with the problem told."""
    if not isinstance(content, str):
        wrong(f"not text but {type(content).__name__}", "write a string", field)
    elif not _encodable(content):
        wrong("holds half of a character (a lone surrogate, \\ud800 to \\udfff)", "write the whole character", field)
    elif not content.strip():
        what = "an empty answer: nothing to learn" if role == "assistant" else "empty"
        wrong(what, "fill it in, or remove the line", field)
    else:
        return [Message(role, content)]
    return []


def _pair(row: dict[str, Any], wrong: Wrong) -> tuple[Message, ...]:
    asked = _said("user", row["prompt"], "prompt", wrong)
    return (*asked, *_said("assistant", row["completion"], "completion", wrong))


def _alpaca(row: dict[str, Any], wrong: Wrong) -> tuple[Message, ...]:
    asked, more = _said("user", row["instruction"], "instruction", wrong), row.get("input")
    if more is not None and not isinstance(more, str):
        wrong(f"not text but {type(more).__name__}", "write a string, or leave it out", "input")
    elif more and more.strip() and asked and _encodable(more):
        asked = [Message("user", f"{asked[0].content}\n\n{more}")]
    return (*asked, *_said("assistant", row["output"], "output", wrong))


def _labelled(row: dict[str, Any], wrong: Wrong) -> tuple[Message, ...]:
    label = row["label"]
    if type(label) is int:  # as parquet files keep them
        label = row["label"] = str(label)
    return (*_said("user", row["text"], "text", wrong), *_said("assistant", label, "label", wrong))


def _plain(row: dict[str, Any], wrong: Wrong) -> tuple[Message, ...]:
    return tuple(_said(TEXT, row["text"], "text", wrong))


LABELLED = "text and label"
FORMS: dict[str, tuple[frozenset[str], Callable[[dict[str, Any], Wrong], tuple[Message, ...]]]] = {
    "messages": (frozenset({"messages"}), _messages),
    "sharegpt": (frozenset({"conversations"}), _sharegpt),
    "prompt and completion": (frozenset({"prompt", "completion"}), _pair),
    "alpaca": (frozenset({"instruction", "output"}), _alpaca),
    LABELLED: (frozenset({"text", "label"}), _labelled),
    "text": (frozenset({"text"}), _plain),
}
FIELDS = frozenset({"input", "check", "group"}).union(*(needed for needed, _ in FORMS.values()))


def _with_labels(examples: Examples) -> Examples:
    """Where every example is a text with its label: a system prompt that names the labels, and a check that the answer
    is the label and nothing else."""
    everything = [example for split in examples.by_name().values() for example in split]
    labels = sorted({example.label for example in everything if example.label is not None})
    if not labels or any(example.label is None for example in everything):
        return examples
    system = "Answer with the label alone" + (f": {', '.join(labels)}." if len(labels) <= MOST_LABELS else ".")
    checked = {
        name: tuple(replace(e, check=e.check or Check((e.answer,), (), len(e.answer.split()))) for e in split)
        for name, split in examples.by_name().items()
    }
    return replace(examples.with_splits(checked), system=system)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _passed_over(row: dict[str, Any], form: str) -> tuple[str, ...]:
    """Names of fields that nothing was read from."""
    used = FORMS[form][0] | {"check", "group"} | ({"input"} if form == "alpaca" else set())
    inner = {f"messages[].{field}" for turn in row["messages"] for field in set(turn) - {"role", "content"}
             } if form == "messages" else set()  # fmt: skip
    return tuple(sorted(set(row) - used | inner))


def _order(turns: list[Message], name: str, by: str, wrong: Wrong) -> None:
    roles = [turn.role for turn in turns]
    if "assistant" not in roles:
        wrong("no assistant message: nothing to learn", "add the answer, or remove the line", name)
    elif roles[-1] != "assistant":
        wrong(f"ends with a {roles[-1]} message", "end with the assistant's answer", name)
    if "system" in roles[1:]:
        wrong("a system message that is not the first", "put it first", f"{name}[{roles.index('system', 1)}].{by}")
    spoken = [role for role in roles if role != "system"]
    if spoken and spoken[0] == "assistant":
        wrong("begins with an answer", "begin with a user message", f"{name}[0].{by}")
    for i in range(1, len(spoken)):
        if spoken[i] == spoken[i - 1]:
            wrong(f"two {spoken[i]} messages in a row", "join them into one", name)
            break


def _check(value: Any, wrong: Wrong) -> Check | None:
    if value is None:
        return None
    fix = '{"contains": ["21 days"], "lacks": ["14 days"], "max_words": 30}'
    if not isinstance(value, dict) or set(value) - {"contains", "lacks", "max_words", "declines"}:
        wrong("not a check", f"write {fix}", "check")
        return None
    lists = [value.get("contains", []), value.get("lacks", [])]
    words, declines = value.get("max_words", 100), value.get("declines", False)
    texts = all(isinstance(one, list) and all(isinstance(t, str) and t.strip() for t in one) for one in lists)
    if not texts or not lists[0] or type(words) is not int or words < 1 or not isinstance(declines, bool):
        wrong("not a check", f"write {fix}", "check")
        return None
    return Check(tuple(lists[0]), tuple(lists[1]), words, declines)
