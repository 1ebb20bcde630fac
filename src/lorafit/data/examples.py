"""Reading examples and checking them: every problem of every line at once, before a model is opened."""

from __future__ import annotations

import difflib
import hashlib
import json
import re
import shlex
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
NOT_EXAMPLES = {"readme", "license", "licence", "copying", "notice"}  # names of files that come with data
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

    Files may be jsonl, json, csv, tsv, parquet or plain text; a folder of text files alone is read whole, each file a
    group. Each row is of one form, told by its fields:
    `messages`; `conversations` (sharegpt); `prompt`, `completion`; `instruction`, `input`, `output` (alpaca); `text`,
    `label` (classification); `text`. It may carry a `check` and a `group`.

    columns: `field=column` for columns of other names, such as `prompt=question`. skip_bad: leave out rows that cannot
    be used, kept in `Examples.skipped`.
    Raises DataError with all problems of all files, SettingsError for columns that cannot be.
    """
    renamed = _renamed(columns)
    splits = {}
    problems: list[Problem] = []
    for split, parts in _files(BUILTIN_FOLDER if str(path) == BUILTIN else Path(path)).items():
        before, file = len(problems), parts[0]
        records = read_records(file, problems) if len(parts) == 1 else _texts(parts, problems)
        lost = [name for name in renamed if records and not any(name in record.fields for record in records)]
        if lost:
            there = sorted({name for record in records[:100] for name in record.fields})[:12]
            fix = f"name another, --columns may name: {', '.join(there)}"
            problems += [Problem(str(file), f"no column '{name}'", fix) for name in lost]
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


def _is_base(path: Path) -> bool:
    if path.exists():
        return path.suffix == ".gguf" or (path / "config.json").exists()
    from lorafit.sources.builtin import BUILTIN as BASES  # of weight, and seldom needed

    return str(path) in BASES


def _texts(files: Sequence[Path], problems: list[Problem]) -> list[Record]:
    """The pieces of many texts; those of one text are a group."""
    found = [(file, record) for file in files for record in read_records(file, problems)]
    return [replace(record, fields={**record.fields, "group": file.name}) for file, record in found]


def _files(path: Path) -> dict[str, list[Path]]:
    """The file of each split, or many texts to train on. Raises DataError for a folder without a training file, or with
    two for one split, and for what is no data at all."""
    if _is_base(path):
        raise DataError([Problem(str(path), "a base, not examples", "give the base first, then the data")])
    for name, what in (("adapter_config.json", "an adapter"), ("run.json", "a run")):
        if (path / name).exists():
            raise DataError([Problem(str(path), f"{what}, not examples", "give a file or folder of examples here")])
    if not path.is_dir():
        return {"train": [path]}
    named: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(path.iterdir()):
        stem, _, ending = file.name.partition(".")
        if f".{ending.removesuffix('.gz')}" in kinds():
            named[stem].append(file)
    problems = [Problem(str(file), "not a name that is read",
                        f"rename it to {MISNAMED[stem]}{file.name.removeprefix(stem)}")
                for stem in MISNAMED for file in named[stem]]  # fmt: skip
    problems += [
        Problem(str(path), f"two {split} files: {', '.join(file.name for file in named[split])}", "leave one of them")
        for split in SPLITS
        if len(named[split]) > 1
    ]
    if problems:
        raise DataError(problems)
    if named["train"]:
        return {split: named[split] for split in SPLITS if named[split]}
    readable = [file for held in named.values() for file in held if file.stem.lower() not in NOT_EXAMPLES]
    if len(readable) > 1 and all(file.suffix == ".txt" for file in readable) and not (named["valid"] or named["test"]):
        return {"train": readable}
    names = sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
    here = ", ".join(names[:8]) + (" ..." if names[8:] else "") or "nothing"
    packed = next((name for name in names if name.endswith(".zip")), None)
    if len(readable) == 1:
        fix = f"give that file, {readable[0]}, or call it train{readable[0].suffix}"
    elif readable:
        fix = "name the files train, valid and test, or give one of them"
    elif packed or any(file.is_dir() for file in path.iterdir()):
        fix = f"unpack {packed}" if packed else "give a folder or file further down"
    else:
        fix = "give files named train, valid and test (jsonl, json, csv, tsv, parquet or txt), or one file"
    what = f"no train.jsonl or other training file in this folder (it holds {here})"
    raise DataError([Problem(str(path), what, fix)])


def _fields(record: Record, renamed: dict[str, str]) -> dict[str, Any]:
    return {renamed.get(name, name): value for name, value in record.fields.items()} if renamed else record.fields


def _form(row: dict[str, Any]) -> str | None:
    return next((form for form, (needed, _) in FORMS.items() if needed <= set(row)), None)


def _formless(where: str, row: dict[str, Any]) -> Problem:
    """A problem of one row, or of a whole file in which no row has a form."""
    fields = ", ".join(list(row)[:8]) or "none"
    return Problem(where, f"of no form that is known (fields: {fields})", _reform(row))


def _reform(row: dict[str, Any]) -> str:
    """What makes a known form of the row: flags ready to type, where its names tell what is meant."""
    meant = {name: _meant(name) for name in row}
    for needed, _ in FORMS.values():
        if needed <= set(meant.values()):
            named: dict[str, str] = {}
            for name, field in meant.items():
                if field in needed and field not in row:
                    named.setdefault(field, name)
            return f"rename what is called otherwise, or add {_flags(named)}"
    for needed, _ in FORMS.values():
        if needed & set(row):
            return f"add {' and '.join(sorted(needed - set(row)))}"
    if len(row) == 2:
        asked, answered = row
        fix = f"add {_flags({'prompt': asked, 'completion': answered})}"
        return f"{fix} if {asked} is what is asked and {answered} the answer"
    return f"say which column is what, as in {_flags({'prompt': 'QUESTION', 'completion': 'ANSWER'})}"


def _meant(name: str) -> str | None:
    """The field that a column of another name or spelling most likely is."""
    plain = name.strip().lower()
    near = difflib.get_close_matches(plain, FIELDS, n=1, cutoff=0.8)
    return near[0] if near else next((field for field, names in ALSO.items() if plain in names), None)


def _flags(named: Mapping[str, str]) -> str:
    return " ".join(f"--columns {shlex.quote(f'{field}={name}')}" for field, name in named.items())


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
ALSO = {  # what others call these fields, in the public data sets met so far
    "prompt": ("question", "query", "source", "mr", "problem", "document", "original_text", "ask", "user"),
    "completion": ("answer", "response", "reply", "target", "ref", "reference", "summary", "reference_summary",
                   "solution", "assistant"),
    "text": ("sentence", "utterance", "review", "content", "body", "comment"),
    "label": ("intent", "category", "class", "sentiment", "topic"),
}  # fmt: skip
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
    fix = 'write {"contains": ["21 days"], "lacks": ["14 days"], "max_words": 30}'
    keys = ("contains", "lacks", "max_words", "declines")
    strange = [name for name in value if name not in keys] if isinstance(value, dict) else []
    if strange:
        near = difflib.get_close_matches(strange[0], keys, n=1)
        wrong(f"not a check, for it has '{strange[0]}'", f"did you mean {near[0]}?" if near else fix, "check")
        return None
    if not isinstance(value, dict):
        wrong("not a check", fix, "check")
        return None
    lists = [value.get("contains", []), value.get("lacks", [])]
    words, declines = value.get("max_words", 100), value.get("declines", False)
    texts = all(isinstance(one, list) and all(isinstance(t, str) and t.strip() for t in one) for one in lists)
    if not texts or not lists[0] or type(words) is not int or words < 1 or not isinstance(declines, bool):
        wrong("not a check", fix, "check")
        return None
    return Check(tuple(lists[0]), tuple(lists[1]), words, declines)
