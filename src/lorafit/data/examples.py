"""Reading examples and checking them: every problem of every line at once, before a model is opened."""

from __future__ import annotations

import codecs
import hashlib
import json
from collections.abc import Iterable
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from lorafit.errors import DataError, Problem

ROLES = ("system", "user", "assistant")
SPLITS = ("train", "valid", "test")
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
    """One conversation. `where` is `file:line`; `extra` names fields that were passed over.

    `group` names the source it shares with others (a document, a fact): a split keeps a group on one side, and
    intervals resample whole groups.
    """

    messages: tuple[Message, ...]
    where: str
    check: Check | None = None
    group: str | None = None
    extra: tuple[str, ...] = ()

    @property
    def question(self) -> str:
        """All before the last answer as one text, without a system prompt: what examples are told apart by."""
        return "\n".join(message.content for message in self.messages[:-1] if message.role != "system")

    @property
    def answer(self) -> str:
        """The last assistant message."""
        return self.messages[-1].content


@dataclass(frozen=True)
class Examples:
    """Examples by split; a split that was not given is empty."""

    train: tuple[Example, ...]
    valid: tuple[Example, ...] = ()
    test: tuple[Example, ...] = ()

    def by_name(self) -> dict[str, tuple[Example, ...]]:
        return {"train": self.train, "valid": self.valid, "test": self.test}

    def digest(self) -> str:
        """SHA-256 over the messages and checks of all splits, whatever files they came from."""
        content = [[(e.messages, e.check) for e in split] for split in self.by_name().values()]
        return hashlib.sha256(repr(content).encode()).hexdigest()


def read_examples(path: str | Path) -> Examples:
    """Read one jsonl file, a folder with train/valid/test.jsonl, or the built-in help desk (`builtin`).

    A line is `{"messages": [{"role", "content"}, ...]}` or `{"prompt", "completion"}`, and may carry a `check` and a
    `group`.
    Raises DataError with all problems of all files.
    """
    folder = BUILTIN_FOLDER if str(path) == BUILTIN else Path(path)
    if not folder.is_dir():
        return Examples(train=_read_all([folder])[0])
    found = {split: folder / f"{split}.jsonl" for split in SPLITS}
    if not found["train"].exists():
        here = ", ".join(sorted(p.name for p in folder.iterdir())[:8]) or "nothing"
        problem = Problem(str(folder), f"no train.jsonl in this folder (it holds {here})",
                          "name the files train.jsonl, valid.jsonl and test.jsonl, or give one jsonl file")  # fmt: skip
        raise DataError([problem])
    other = {
        "validation": "valid",
        "val": "valid",
        "dev": "valid",
        "eval": "valid",
        "training": "train",
        "tests": "test",
    }
    misnamed = [
        Problem(str(folder / f"{name}.jsonl"), "not a name that is read", f"rename it to {split}.jsonl")
        for name, split in other.items()
        if (folder / f"{name}.jsonl").exists()
    ]
    if misnamed:
        raise DataError(misnamed)
    present = [split for split in SPLITS if found[split].exists()]
    return Examples(**dict(zip(present, _read_all(found[split] for split in present), strict=True)))


def _read_all(paths: Iterable[Path]) -> list[tuple[Example, ...]]:
    problems: list[Problem] = []
    splits = [_read_file(path, problems) for path in paths]
    if problems:
        raise DataError(problems)
    return splits


def _read_file(path: Path, problems: list[Problem]) -> tuple[Example, ...]:
    before = len(problems)
    try:
        raw = path.read_bytes()
    except FileNotFoundError:
        problems.append(Problem(str(path), "there is no such file", "check the path"))
        return ()
    except OSError as error:
        problems.append(Problem(str(path), f"cannot be read ({error.strerror})", "check its permissions"))
        return ()
    if b"\x00" in raw[:4096]:
        problems.append(Problem(str(path), "a binary file", "give text: one JSON object per line (jsonl)"))
        return ()
    lines = raw.removeprefix(codecs.BOM_UTF8).split(b"\n")  # not splitlines: JSON strings may hold other separators
    examples = []
    for number, line in enumerate(lines, 1):
        if line.strip():
            last = number == len(lines)
            example = _parse(line, f"{path}:{number}", problems, unfinished=last)
            if example is not None:
                examples.append(example)
    if not examples and len(problems) == before:
        problems.append(Problem(str(path), "no examples in it", "write one JSON object per line"))
    return tuple(examples)


def _parse(line: bytes, where: str, problems: list[Problem], unfinished: bool) -> Example | None:
    def wrong(what: str, fix: str, field: str = "") -> None:
        problems.append(Problem(f"{where}: {field}" if field else where, what, fix))

    try:
        row = json.loads(line.decode())
    except UnicodeDecodeError:
        wrong("not UTF-8", "save the file as UTF-8")
        return None
    except (ValueError, RecursionError) as error:  # ValueError: also a number of thousands of digits
        said = error.msg if isinstance(error, json.JSONDecodeError) else str(error).partition(";")[0]
        if unfinished:
            wrong(f"not JSON ({said}), and the file ends here", "half-written? write the last line again")
        else:
            wrong(f"not JSON ({said})", "write one JSON object per line")
        return None
    if not isinstance(row, dict):
        wrong("not a JSON object", 'write {"messages": [...]} or {"prompt": ..., "completion": ...}')
        return None
    before = len(problems)
    messages = _messages(row, wrong)
    check = _check(row.get("check"), wrong)
    group = row.get("group")
    if group is not None and not isinstance(group, str):
        wrong(f"not text but {type(group).__name__}", "write a string, or leave it out", "group")
    if len(problems) > before:
        return None
    return Example(messages, where, check, group, _passed_over(row))


def _messages(row: dict[str, Any], wrong: Any) -> tuple[Message, ...]:
    if "messages" not in row:
        if not {"prompt", "completion"} <= set(row):
            fields = ", ".join(sorted(row)[:6]) or "none"
            wrong(f"neither messages nor prompt and completion (fields: {fields})", "rename the fields")
            return ()
        turns = [{"role": "user", "content": row["prompt"]}, {"role": "assistant", "content": row["completion"]}]
        names = ["prompt", "completion"]
    else:
        turns = row["messages"]
        if not isinstance(turns, list) or not turns:
            wrong("not a list of messages", 'write [{"role": "user", "content": "..."}, ...]', "messages")
            return ()
        names = [f"messages[{i}].content" for i in range(len(turns))]
    found = []
    for i, (turn, name) in enumerate(zip(turns, names, strict=True)):
        if not isinstance(turn, dict):
            wrong("not an object", 'write {"role": "user", "content": "..."}', f"messages[{i}]")
            continue
        role, content = turn.get("role"), turn.get("content")
        if role not in ROLES:
            wrong(f"unknown role {json.dumps(role)}", f"use {', '.join(ROLES)}", f"messages[{i}].role")
        elif not isinstance(content, str):
            wrong(f"not text but {type(content).__name__}", "write a string", name)
        elif not _encodable(content):
            wrong("holds half of a character (a lone surrogate, \\ud800 to \\udfff)", "write the whole character", name)
        elif not content.strip():
            what = "an empty answer: nothing to learn" if role == "assistant" else "empty"
            wrong(what, "fill it in, or remove the line", name)
        else:
            found.append(Message(role, content))
    if len(found) == len(turns):
        _order(found, wrong)
    return tuple(found)


def _encodable(text: str) -> bool:
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True


def _passed_over(row: dict[str, Any]) -> tuple[str, ...]:
    """Names of fields that nothing was read from."""
    if "messages" not in row:
        return tuple(sorted(set(row) - {"prompt", "completion", "check", "group"}))
    inner = {f"messages[].{field}" for turn in row["messages"] for field in set(turn) - {"role", "content"}}
    return tuple(sorted(set(row) - {"messages", "check", "group"} | inner))


def _order(turns: list[Message], wrong: Any) -> None:
    roles = [turn.role for turn in turns]
    if "assistant" not in roles:
        wrong("no assistant message: nothing to learn", "add the answer, or remove the line", "messages")
    elif roles[-1] != "assistant":
        wrong(f"ends with a {roles[-1]} message", "end with the assistant's answer", "messages")
    if "system" in roles[1:]:
        wrong("a system message that is not the first", "put it first", f"messages[{roles.index('system', 1)}].role")
    spoken = [role for role in roles if role != "system"]
    if spoken and spoken[0] == "assistant":
        wrong("begins with an answer", "begin with a user message", "messages[0].role")
    for i in range(1, len(spoken)):
        if spoken[i] == spoken[i - 1]:
            wrong(f"two {spoken[i]} messages in a row", "join them into one", "messages")
            break


def _check(value: Any, wrong: Any) -> Check | None:
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
