"""Reads examples from a file, a folder or the built-in set, before a model is opened.

A path goes in; `Examples`, or a DataError with every problem of every line, comes out.
"""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Container, Mapping, Sequence
from dataclasses import replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from lorafit.data.advice import formless, unread_fields
from lorafit.data.columns import columns_named, joined
from lorafit.data.equality import NUMERALS, numerals_of
from lorafit.data.examples import SPLITS, Check, Example, Examples
from lorafit.data.fields import UNUSED, fields_of, filled
from lorafit.data.folders import ALSO_CALLED, Part, find_files, is_text
from lorafit.data.forms import NO_LIMIT, form_of, judges, parsed
from lorafit.data.readers import read_records
from lorafit.data.records import Record
from lorafit.data.targets import FIELD, Names, number_in
from lorafit.errors import DataError, Problem

NUMBER = re.compile(r"-?\d+(\.\d+)?")
MOST_LABELS = 30  # the most labels that the system prompt lists
BUILTIN = "builtin"  # the help desk that comes with the package
BUILTIN_FOLDER = Path(str(files("lorafit.data").joinpath("builtin")))


def read_examples(
    path: str | Path, columns: Sequence[str] = (), skip_bad: bool = False, passed_over: Container[str] = ()
) -> Examples:
    """Read a file, a folder with train, valid and test files, or the built-in help desk.

    Files may be jsonl, json, csv, tsv, parquet or plain text. In a folder of nothing
    but text files, each is a group; in folders of text files, the name of each folder is the label of its texts.
    The fields of a row
    decide its form: `messages`; `conversations` (sharegpt); `prompt`, `completion`; `instruction`, `input`, `output`
    (alpaca); `text`, `label` (classification); `text`, `score` (a number); `text`, `labels` (a list of names);
    `text`, `entities` (spans with labels); `anchor`, `positive` (two texts that belong together); `text`. Any row may
    carry a `check` and a `group`.

    Args:
        path: the file or folder, or `builtin`.
        columns: `field=column` for columns with other names, such as `prompt=question`; `unused=column` for a column to
            ignore; `field=template` joins columns into one text, such as `completion={Team}: {Reply}`.
        skip_bad: leave out rows that cannot be used; their problems are kept in `Examples.skipped`.
        passed_over: fields to ignore without asking, because the run that is resumed ignored them when it began.

    Returns:
        The examples by split. If every example is a text with a label, they have a system prompt and checks for labels.

    Raises:
        DataError: with all problems of all files.
        SettingsError: `columns` cannot be read, or contradict each other.
    """
    renamed, templates = columns_named(columns)
    wanted = [name for name, field in renamed.items() if field != UNUSED]
    wanted += [name for template in templates.values() for name in template.columns]
    fields = {column: field for field, template in templates.items() for column in template.columns} | renamed
    splits = {}
    whole_targets: dict[str, Any] = {}
    problems: list[Problem] = []
    notes: list[str] = []
    builtin = str(path) == BUILTIN
    parts_of_splits, unread = find_files(BUILTIN_FOLDER if builtin else Path(path).expanduser())
    for split, parts in parts_of_splits.items():
        before, file = len(problems), parts[0].file
        records = [record for part in parts for record in _records(part, problems, fields)]
        lost = [name for name in dict.fromkeys(wanted) if records and not any(name in r.fields for r in records)]
        if lost:
            names = sorted({name for record in records[:100] for name in record.fields})[:12]
            fix = f"name one of the columns: {', '.join(names)}"
            problems += [Problem(str(file), f"no column '{name}'", fix, whole=True) for name in lost]
            continue
        rows = joined(records, templates, renamed, problems)
        columns_of_fields = {**renamed, **{name: name for name in templates}}
        splits[split] = _examples(str(file), rows, columns_of_fields, problems, passed_over)
        split_of_file = None if file == Path(path).expanduser() else split
        whole_targets |= _targets_of(rows, columns_of_fields)
        notes += _check_split_column(str(file), split_of_file, rows, renamed, problems)
        problems[before:] = sorted(problems[before:], key=_line)
    problems += _few_targets(whole_targets)
    splits = _with_numerals(_without_unlabelled(splits, problems))
    usable = bool(splits.get("train"))
    if problems and not (skip_bad and usable and not any(problem.whole for problem in problems)):
        raise DataError(problems if usable else unskippable(problems))
    notes += [f"no row of {name} can be used: the split is left out" for name, split in splits.items() if not split]
    parts = [part for parts in parts_of_splits.values() for part in parts]
    if labels := sorted({part.fields["label"] for part in parts if "label" in part.fields}):
        notes.append(
            f"each text's label is the name of its folder ({', '.join(labels)}); to learn texts without labels, give "
            "one of these folders"
        )
    unread = () if builtin else unread  # the other files of the package are not the user's
    examples = Examples((), skipped=tuple(problems), unread=unread, notes=tuple(notes))
    return _with_labels(examples.with_splits(splits))


def unskippable(problems: Sequence[Problem]) -> list[Problem]:
    """The same problems, which now say that --skip-bad would leave no row instead of recommending it."""
    note = "(--skip-bad would leave no row)"
    return [replace(problem, fix=problem.fix.replace("(--skip-bad)", note)) for problem in problems]


def require_data(path: str | Path) -> None:
    """Check, before any slow work, that `path` can be data. Only files that lie next to folders of texts are read.

    Raises:
        DataError: `path` cannot be data.
    """
    if str(path) == BUILTIN:
        return
    parts_of_splits, _ = find_files(Path(path).expanduser())
    problems: list[Problem] = []
    for part in (part for parts in parts_of_splits.values() for part in parts if not part.file.is_file()):
        read_records(part.file, problems)
    if problems:
        raise DataError(problems)


def _records(part: Part, problems: list[Problem], columns: Mapping[str, str]) -> list[Record]:
    records = read_records(part.file, problems, columns)
    return [replace(r, fields={**r.fields, **part.fields}) for r in records] if part.fields else records


def _examples(
    file: str, records: Sequence[Record], renamed: dict[str, str], problems: list[Problem], passed_over: Container[str]
) -> tuple[Example, ...]:
    """The examples of the records of one split; problems are appended to `problems`."""
    rows = [fields_of(record.fields, renamed) for record in records]
    forms = [form_of(row) for row in rows]
    if len(records) > 1 and not any(forms):
        problems.append(replace(formless(file, records, renamed), whole=True))
        return ()
    examples: list[Example] = []
    unknown: dict[str, Record] = {}
    judged = judges(rows)
    for record, row, form in zip(records, rows, forms, strict=True):
        if form is None:
            problems.append(formless(record.where, [record], renamed))
        elif example := parsed(record, row, form, problems, unknown, judged):
            examples.append(example)
    if unknown := {name: record for name, record in unknown.items() if name not in passed_over}:
        problems.append(unread_fields(unknown, renamed))
    return tuple(examples)


def _targets_of(records: Sequence[Record], renamed: Mapping[str, str]) -> dict[str, Any]:
    """The numbers, by place, that are learnt only because a column is called `target`."""
    if "target" in renamed or "score" in renamed.values():
        return {}
    taken = {"score", "label", "labels", "entities"}
    rows = ((record, fields_of(record.fields, renamed)) for record in records if "target" in record.fields)
    return {r.where: row["score"] for r, row in rows if "score" in row and not taken & r.fields.keys()}


def _few_targets(targets: Mapping[str, Any]) -> list[Problem]:
    """The problem of a column `target` with one or two whole numbers, which are more likely labels than amounts."""
    values = {number_in(target) for target in targets.values()}
    if len(targets) <= 2 or not 0 < len(values) <= 2 or not all(v is not None and v.is_integer() for v in values):
        return []
    held = " and ".join(sorted({str(target) for target in targets.values()}))
    fix = "add --columns label=target if they are labels, or --columns score=target if they are numbers"
    return [Problem(next(iter(targets)), f"target is only {held} in all rows: labels or numbers?", fix, whole=True)]


def _check_split_column(
    file: str, split: str | None, records: Sequence[Record], renamed: Mapping[str, str], problems: list[Problem]
) -> list[str]:
    """Check rows that name their split in a column `split`.

    Args:
        file: the name of the file, for problems and notes.
        split: the split that the file's name stands for; None if the user named the file itself.
        records: its rows.
        renamed: the field that each column of --columns stands for.
        problems: a problem is added if the file mixes splits, or holds another split than its name says.

    Returns:
        A note for the user if all rows of a file that the user named belong to one other split.
    """
    rows = [fields_of(record.fields, renamed) for record in records if "split" in record.fields]
    named = [row["split"] for row in rows if filled(row.get("split"))]
    counts = Counter(map(str, named))
    splits = {_split_of(name) for name in counts}
    if splits <= {split or "train"}:
        return []
    if split is None and len(splits) == 1 and len(named) == len(records):
        return [f"every row of {file} says split {next(iter(counts))!r}: the column is ignored, as you named the file"]
    listed = ", ".join(f"{count} {name}" for name, count in counts.most_common(5))
    what = f"rows of another split than {split}" if split else "rows of several splits in one file"
    fix = "write each to a file of its own (train.jsonl, valid.jsonl, test.jsonl) and give their folder"
    problems.append(Problem(file, f"{what} (split: {listed})", f"{fix}, or add --columns {UNUSED}=split", whole=True))
    return []


def _split_of(name: str) -> str:
    """The split that a name in another program's data stands for: `train_sft` is train. Other names are kept."""
    plain = name.strip().lower()
    return ALSO_CALLED.get(plain) or next((split for split in SPLITS if plain.startswith(split)), plain)


def _without_unlabelled(
    splits: dict[str, tuple[Example, ...]], problems: list[Problem]
) -> dict[str, tuple[Example, ...]]:
    """Remove texts without a label, or number, if other texts have one, and report each of them as a problem."""
    splits = _of_one_kind(splits, problems)
    everything = [example for split in splits.values() for example in split]
    labelled = [example for example in everything if example.label is not None]
    targets = [example.target for example in everything if example.target is not None]
    if not labelled and not targets:
        return splits
    field = "label" if labelled else FIELD[type(targets[0])]
    fix = "write it, or leave the row out (--skip-bad)"
    what = "missing, where other rows have one"
    problems += [Problem(f"{example.where}: {field}", what, fix) for example in everything if example.is_text]
    problems += _numbers_and_names(labelled)
    return {name: tuple(e for e in split if not e.is_text) for name, split in splits.items()}


def _of_one_kind(splits: dict[str, tuple[Example, ...]], problems: list[Problem]) -> dict[str, tuple[Example, ...]]:
    """Remove rows with another kind of target (a label, a number, labels, entities, a partner) than most rows have, and
    report each of them as a problem: together they would be taken for answers to be written."""
    counts = Counter(kind for split in splits.values() for example in split if (kind := _kind_of(example)))
    if len(counts) < 2:
        return splits
    usual = counts.most_common(1)[0][0]
    fix = f"write {usual} instead, move it to data of its own, or leave it out (--skip-bad)"
    problems += [
        Problem(f"{example.where}: {kind}", f"a row with {kind}, where most rows have {usual}", fix)
        for split in splits.values()
        for example in split
        if (kind := _kind_of(example)) not in ("", usual)
    ]
    return {name: tuple(e for e in split if _kind_of(e) in ("", usual)) for name, split in splits.items()}


def _kind_of(example: Example) -> str:
    """The field with the label or the target of an example; "" for one that has neither."""
    return "label" if example.label is not None else FIELD[type(example.target)] if example.target is not None else ""


def _numbers_and_names(labelled: Sequence[Example]) -> list[Problem]:
    """Problems of files whose labels are all numbers, while another file's labels are all names: most likely these are
    the same labels and their names were lost."""
    labels: dict[str, set[str]] = defaultdict(set)
    for example in labelled:
        labels[example.where.rpartition(":")[0]].add(example.label or "")
    # Text files are left out: their labels are names of folders.
    held = {file: sorted(names) for file, names in labels.items() if not is_text(Path(file))}
    numbers = {file for file, names in held.items() if all(map(NUMBER.fullmatch, names))}
    named = next((file for file, names in held.items() if not any(map(NUMBER.fullmatch, names))), None)
    if named is None:
        return []
    what = "labels are numbers ({}), but those of {} are names ({})"
    return [
        Problem(
            file,
            what.format(", ".join(held[file][:5]), Path(named).name, ", ".join(held[named][:5])),
            "write the names here too",
            whole=True,
        )
        for file in sorted(numbers)
    ]


def _with_numerals(splits: dict[str, tuple[Example, ...]]) -> dict[str, tuple[Example, ...]]:
    """Set how numbers are written in every check by number: as in its reference, or, if that fits several notations
    (as 42 does), in the notation that fits most references."""
    fitting = {
        e.where: numerals_of(e.answer, e.check.number)
        for split in splits.values()
        for e in split
        if e.check and e.check.number is not None
    }
    counts = Counter(notation for notations in fitting.values() for notation in notations)
    by_frequency = sorted(NUMERALS, key=lambda notation: -counts[notation])

    def with_notation(example: Example) -> Example:
        if example.check and (fits := fitting.get(example.where)):
            return replace(example, check=replace(example.check, numerals=next(n for n in by_frequency if n in fits)))
        return example

    return {name: tuple(map(with_notation, split)) for name, split in splits.items()} if fitting else splits


def _line(problem: Problem) -> int:
    """The line of a problem, by which problems are sorted."""
    digits = re.search(r"(\d+)$", problem.place[1])
    return int(digits[1]) if digits else 0


def _with_labels(examples: Examples) -> Examples:
    """If every example is a text with a label, or with several, add a system prompt that lists the labels, and checks
    that the answer is the label and nothing else. `contains` would not do: non-toxic contains toxic, and C++ contains
    C."""
    everything = [example for split in examples.by_name().values() for example in split]
    if everything and all(isinstance(example.target, Names) for example in everything):
        several = [example.target.names for example in everything if isinstance(example.target, Names)]
        labels = sorted({name for names in several for name in names})
        system = "Answer with the labels that apply, separated by commas"
    else:
        labels = sorted({example.label for example in everything if example.label is not None})
        if not labels or any(example.label is None for example in everything):
            return examples
        system = "Answer with the label alone"
    system += f": {', '.join(labels)}." if len(labels) <= MOST_LABELS else "."
    checked = {
        name: tuple(replace(e, check=e.check or Check((), (), NO_LIMIT, label=e.answer)) for e in split)
        for name, split in examples.by_name().items()
    }
    return replace(examples.with_splits(checked), system=system)
