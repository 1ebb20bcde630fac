"""Reading a file, a folder or the built-in set: every problem of every line at once, before a model is opened."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

from lorafit.data.examples import SPLITS, Check, Examples
from lorafit.data.forms import fields_of, form_of, formless, parsed, renamed_columns
from lorafit.data.readers import Record, kinds, read_records
from lorafit.errors import DataError, Problem

MISNAMED = {
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "eval": "valid",
    "training": "train",
    "tests": "test",
}
NOT_EXAMPLES = {"readme", "license", "licence", "copying", "notice"}  # names of files that come with data
TEXTS = "texts"  # of a folder that holds nothing else: all are trained on, each a group
SHARD = r"-\d+-of-(\d+)(?:-[0-9a-f]{16})?$"  # what ends the names of files that are parts of one
MOST_LABELS = 30  # named in the system prompt
BUILTIN = "builtin"  # the help desk that comes with the package
BUILTIN_FOLDER = Path(str(files("lorafit.data").joinpath("builtin")))


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
    renamed = renamed_columns(columns)
    splits = {}
    problems: list[Problem] = []
    given, unread = _files(BUILTIN_FOLDER if str(path) == BUILTIN else Path(path).expanduser())
    for split, parts in given.items():
        before, file = len(problems), parts[0]
        records = [record for part in parts for record in _records(part, problems, file_is_group=split == TEXTS)]
        lost = [name for name in renamed if records and not any(name in record.fields for record in records)]
        if lost:
            there = sorted({name for record in records[:100] for name in record.fields})[:12]
            fix = f"name another, --columns may name: {', '.join(there)}"
            problems += [Problem(str(file), f"no column '{name}'", fix, whole=True) for name in lost]
            continue
        if len(records) > 1 and not any(form_of(fields_of(record, renamed)) for record in records):
            problems.append(replace(formless(str(file), records[0].fields), whole=True))
            continue
        found = [parsed(record, renamed, problems) for record in records]
        problems[before:] = sorted(problems[before:], key=_line)
        splits["train" if split == TEXTS else split] = tuple(example for example in found if example is not None)
    skippable = skip_bad and not any(problem.whole for problem in problems) and all(splits.values())
    if problems and not skippable:
        raise DataError(problems)
    return _with_labels(Examples((), skipped=tuple(problems), unread=unread).with_splits(splits))


def _line(problem: Problem) -> int:
    """The line of a problem's `file:line: field`."""
    digits = re.search(r"(\d+)$", problem.where.partition(": ")[0])
    return int(digits[1]) if digits else 0


def _is_base(path: Path) -> bool:
    if path.exists():
        return path.suffix == ".gguf" or (path / "config.json").exists()
    from lorafit.sources.builtin import BUILTIN as BASES  # of weight, and seldom needed

    return str(path) in BASES


def _records(file: Path, problems: list[Problem], file_is_group: bool) -> list[Record]:
    found = read_records(file, problems)
    return [replace(one, fields={**one.fields, "group": file.name}) for one in found] if file_is_group else found


def _files(path: Path) -> tuple[dict[str, list[Path]], tuple[str, ...]]:
    """The files of each split, or of TEXTS to train on; and names of files of the folder that are not among them.

    Raises DataError for a folder without a training file, or with two for one split, and for what is no data at all.
    """
    if _is_base(path):
        raise DataError([Problem(str(path), "a base, not examples", "give the base first, then the data")])
    for name, what in (("adapter_config.json", "an adapter"), ("run.json", "a run")):
        if (path / name).exists():
            raise DataError([Problem(str(path), f"{what}, not examples", "give a file or folder of examples here")])
    if not path.is_dir():
        return {"train": [path]}, ()
    named: dict[str, list[Path]] = defaultdict(list)
    for file in sorted(path.iterdir()):
        stem, _, ending = file.name.lower().partition(".")
        if f".{ending.removesuffix('.gz')}" in kinds() and stem not in NOT_EXAMPLES:
            named[re.sub(SHARD, "", stem)].append(file)
    problems = [Problem(str(file), "not a name that is read",
                        f"rename it to {MISNAMED[stem]}{file.name[len(stem):]}")
                for stem in MISNAMED for file in named[stem]]  # fmt: skip
    problems += [
        Problem(str(path), f"two {split} files: {', '.join(file.name for file in named[split])}", "leave one of them")
        for split in SPLITS
        if len(named[split]) > 1 and not all(re.search(SHARD, file.name.partition(".")[0]) for file in named[split])
    ]
    for split in SPLITS:
        parts = re.search(SHARD, named[split][0].name.partition(".")[0]) if named[split] else None
        if parts and int(parts[1]) != len(named[split]):
            what = f"{len(named[split])} of the {int(parts[1])} parts of {split} are here"
            problems.append(Problem(str(path), what, "copy the others too"))
    if problems:
        raise DataError(problems)
    readable = [file for held in named.values() for file in held]
    if named["train"]:
        given = {split: named[split] for split in SPLITS if named[split]}
        return given, tuple(file.name for file in readable if not any(file in parts for parts in given.values()))
    if len(readable) > 1 and all(file.suffix == ".txt" for file in readable) and not (named["valid"] or named["test"]):
        return {TEXTS: readable}, ()
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
