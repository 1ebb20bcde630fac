"""Reading a file, a folder or the built-in set: every problem of every line at once, before a model is opened."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib.resources import files
from pathlib import Path

from lorafit.data.advice import formless, hold_examples, unread_fields
from lorafit.data.columns import columns_named, joined
from lorafit.data.equality import NUMERALS, numerals_of
from lorafit.data.examples import SPLITS, Check, Example, Examples
from lorafit.data.fields import UNUSED, fields_of, filled
from lorafit.data.forms import NO_LIMIT, form_of, judges, parsed
from lorafit.data.readers import Record, kinds, read_records
from lorafit.errors import DataError, Problem

ALSO_CALLED = {
    "validation": "valid",
    "val": "valid",
    "dev": "valid",
    "eval": "valid",
    "training": "train",
    "tests": "test",
}
NOT_EXAMPLES = {  # names of files that come with data
    "readme",
    "license",
    "licence",
    "copying",
    "notice",
    "dataset_dict",
    "dataset_info",
    "dataset_infos",
    "state",
}
SHARD = r"-\d+-of-(\d+)(?:-[0-9a-f]{16})?$"  # what ends the names of files that are parts of one
NUMBER = re.compile(r"-?\d+(\.\d+)?")
MOST_LABELS = 30  # named in the system prompt
BUILTIN = "builtin"  # the help desk that comes with the package
BUILTIN_FOLDER = Path(str(files("lorafit.data").joinpath("builtin")))


def read_examples(path: str | Path, columns: Sequence[str] = (), skip_bad: bool = False) -> Examples:
    """Read one file, a folder with train, valid and test files, or the built-in help desk (`builtin`).

    Files may be jsonl, json, csv, tsv, parquet or plain text. A folder of text files alone is read whole, each file a
    group; of folders of text files, the name of each folder is the label of its texts. Each row is of one form, told by
    its fields: `messages`; `conversations` (sharegpt); `prompt`, `completion`; `instruction`, `input`, `output`
    (alpaca); `text`, `label` (classification); `text`. It may carry a `check` and a `group`.

    Args:
        path: the file or folder, or `builtin`.
        columns: `field=column` for columns of other names, such as `prompt=question`; `unused=column` for a column that
            is to be passed over; `field=template` joins columns into one text, such as `completion={Team}: {Reply}`.
        skip_bad: leave out rows that cannot be used, kept in `Examples.skipped`.

    Raises:
        DataError: with all problems of all files.
        SettingsError: for columns that cannot be.
    """
    renamed, templates = columns_named(columns)
    wanted = [name for name, field in renamed.items() if field != UNUSED]
    wanted += [name for template in templates.values() for name in template.columns]
    splits = {}
    problems: list[Problem] = []
    notes: list[str] = []
    builtin = str(path) == BUILTIN
    given, unread = _files(BUILTIN_FOLDER if builtin else Path(path).expanduser())
    unread = () if builtin else unread  # what else is in the package is no matter of the user's
    for split, parts in given.items():
        before, file = len(problems), parts[0].file
        records = [record for part in parts for record in _records(part, problems)]
        lost = [name for name in dict.fromkeys(wanted) if records and not any(name in r.fields for r in records)]
        if lost:
            there = sorted({name for record in records[:100] for name in record.fields})[:12]
            fix = f"name another, --columns may name: {', '.join(there)}"
            problems += [Problem(str(file), f"no column '{name}'", fix, whole=True) for name in lost]
            continue
        rows = joined(records, templates, renamed, problems)
        found = _parsed(str(file), rows, {**renamed, **{name: name for name in templates}}, problems)
        named_so = None if file == Path(path).expanduser() else split
        notes += _of_other_splits(str(file), named_so, rows, renamed, problems)
        problems[before:] = sorted(problems[before:], key=_line)
        splits[split] = found
    splits = _with_numerals(_labelled(splits, problems))
    left = bool(splits.get("train"))
    if problems and not (skip_bad and left and not any(problem.whole for problem in problems)):
        raise DataError(problems if left else unskippable(problems))
    notes += [f"no row of {name} can be used: it is left out whole" for name, split in splits.items() if not split]
    levels = sorted({part.fields["label"] for parts in given.values() for part in parts if "label" in part.fields})
    if levels:
        notes.append(
            f"the names of the folders ({', '.join(levels)}) are the labels of their texts; to learn the "
            "texts of one as they are, give that folder"
        )
    return _with_labels(Examples((), skipped=tuple(problems), unread=unread, notes=tuple(notes)).with_splits(splits))


def unskippable(problems: Sequence[Problem]) -> list[Problem]:
    """The problems where --skip-bad is no way out, for it would leave no row."""
    said = "(--skip-bad would leave no row)"
    return [replace(problem, fix=problem.fix.replace("(--skip-bad)", said)) for problem in problems]


def require_data(path: str | Path) -> None:
    """Raise DataError where `path` can be no data. No file is read but those beside folders of texts: asked before slow
    work."""
    if str(path) == BUILTIN:
        return
    given, _ = _files(Path(path).expanduser())
    problems: list[Problem] = []
    for part in (part for parts in given.values() for part in parts if not part.file.is_file()):
        read_records(part.file, problems)
    if problems:
        raise DataError(problems)


def _parsed(
    file: str, records: Sequence[Record], renamed: dict[str, str], problems: list[Problem]
) -> tuple[Example, ...]:
    """The examples of the records of one split, with every problem told."""
    rows = [fields_of(record.fields, renamed) for record in records]
    forms = [form_of(row) for row in rows]
    if len(records) > 1 and not any(forms):
        problems.append(replace(formless(file, records, renamed), whole=True))
        return ()
    found: list[Example | None] = []
    unknown: dict[str, Record] = {}
    judged = judges(rows)
    for record, row, form in zip(records, rows, forms, strict=True):
        if form is None:
            problems.append(formless(record.where, [record], renamed))
        else:
            found.append(parsed(record, row, form, problems, unknown, judged))
    if unknown:
        problems.append(unread_fields(unknown, renamed))
    return tuple(example for example in found if example is not None)


def _of_other_splits(
    file: str, split: str | None, records: Sequence[Record], renamed: Mapping[str, str], problems: list[Problem]
) -> list[str]:
    """What is to be told of rows that name the split they are for, in a column `split`.

    Args:
        file: the place to name.
        split: for which the file is by its name; None where it is given by itself, for whatever it is given.
        records: its rows.
        renamed: the field of each column that is named.
        problems: is told of a file that mixes splits, or is of another one.
    """
    rows = [fields_of(record.fields, renamed) for record in records if "split" in record.fields]
    named = [row["split"] for row in rows if filled(row.get("split"))]
    found = Counter(map(str, named))
    splits = {_split_of(name) for name in found}
    if splits <= {split or "train"}:
        return []
    if split is None and len(splits) == 1 and len(named) == len(records):
        return [f"every row of {file} says split {next(iter(found))!r}: they are taken as they are given"]
    told = ", ".join(f"{count} {name}" for name, count in found.most_common(5))
    what = f"rows of another split than {split}" if split else "rows of several splits in one file"
    fix = "write each to a file of its own (train.jsonl, valid.jsonl, test.jsonl) and give their folder"
    problems.append(Problem(file, f"{what} (split: {told})", f"{fix}, or add --columns {UNUSED}=split", whole=True))
    return []


def _split_of(name: str) -> str:
    """The split that other programs mean by a name, as far as it can be told: `train_sft` is train."""
    plain = name.strip().lower()
    return ALSO_CALLED.get(plain) or next((split for split in SPLITS if plain.startswith(split)), plain)


def _labelled(splits: dict[str, tuple[Example, ...]], problems: list[Problem]) -> dict[str, tuple[Example, ...]]:
    """The splits without texts that lack the label that others have, each told."""
    if not any(example.label is not None for split in splits.values() for example in split):
        return splits
    fix = "write it, or leave the row out (--skip-bad)"
    problems += [
        Problem(f"{e.where}: label", "missing, where other rows have one", fix)
        for split in splits.values()
        for e in split
        if e.is_text
    ]
    problems += _numbers_beside_names([e for split in splits.values() for e in split if e.label is not None])
    return {name: tuple(e for e in split if not e.is_text) for name, split in splits.items()}


def _with_numerals(splits: dict[str, tuple[Example, ...]]) -> dict[str, tuple[Example, ...]]:
    """The same, each check by a number with the way in which its reference writes numbers; where several fit (42), with
    the one that fits most references."""
    ways = {
        e.where: numerals_of(e.answer, e.check.number)
        for split in splits.values()
        for e in split
        if e.check and e.check.number is not None
    }
    fits = Counter(way for each in ways.values() for way in each)
    usual = sorted(NUMERALS, key=lambda way: -fits[way])

    def written(example: Example) -> Example:
        way = next((one for one in usual if one in ways.get(example.where, ())), None)
        return replace(example, check=replace(example.check, numerals=way)) if way and example.check else example

    return {name: tuple(map(written, split)) for name, split in splits.items()} if ways else splits


def _numbers_beside_names(labelled: Sequence[Example]) -> list[Problem]:
    """Files whose labels are nothing but numbers, where others have nothing but names: of the same labels, most likely,
    whose names one of them has lost."""
    labels: dict[str, set[str]] = defaultdict(set)
    for example in labelled:
        labels[example.where.rpartition(":")[0]].add(example.label or "")
    of_folders = {file for file in labels if _is_text(Path(file))}
    held = {file: sorted(found) for file, found in labels.items() if file not in of_folders}
    numbers = {file for file, found in held.items() if all(map(NUMBER.fullmatch, found))}
    named = next((file for file, found in held.items() if not any(map(NUMBER.fullmatch, found))), None)
    if named is None:
        return []
    what = "labels are numbers ({}), where those of {} are names ({})"
    return [
        Problem(
            file,
            what.format(", ".join(held[file][:5]), Path(named).name, ", ".join(held[named][:5])),
            "write the names here too",
            whole=True,
        )
        for file in sorted(numbers)
    ]


def _line(problem: Problem) -> int:
    """The line of a problem, for the order in which problems are told."""
    digits = re.search(r"(\d+)$", problem.place[1])
    return int(digits[1]) if digits else 0


def _is_base(path: Path) -> bool:
    if path.exists():
        return path.suffix == ".gguf" or (path / "config.json").exists()
    from lorafit.bases.builtin import BUILTIN as BASES

    return str(path) in BASES


@dataclass(frozen=True)
class Part:
    """One file of a split. fields: what each of its rows is given: the group, and the label."""

    file: Path
    fields: Mapping[str, str] = field(default_factory=dict)


def _records(part: Part, problems: list[Problem]) -> list[Record]:
    found = read_records(part.file, problems)
    return [replace(one, fields={**one.fields, **part.fields}) for one in found] if part.fields else found


def _files(path: Path) -> tuple[dict[str, list[Part]], tuple[str, ...]]:
    """The files of each split; and names of files of the folder that are not among them.

    Raises DataError for a folder without a training file, or with two for one split, and for what is no data at all.
    """
    if _is_base(path):
        raise DataError([Problem(str(path), "a base, not examples", "give the base first, then the data")])
    for name, what in (("adapter_config.json", "an adapter"), ("run.json", "a run")):
        if (path / name).exists():
            raise DataError([Problem(str(path), f"{what}, not examples", "give a file or folder of examples here")])
    if not path.is_dir():
        return {"train": [Part(path)]}, ()
    named = _by_name(path)
    if problems := [problem for split in SPLITS if (problem := _apart(path, split, named[split]))]:
        raise DataError(problems)
    readable = [file for held in named.values() for file in held]
    if named["train"]:
        given = {split: named[split] for split in SPLITS if named[split]}
        left = tuple(file.name for file in readable if not any(file in parts for parts in given.values()))
        return {split: [Part(file) for file in parts] for split, parts in given.items()}, left
    if not (named["valid"] or named["test"]):
        levels, left = _by_level(path)
        flat = readable if len(readable) > 1 and all(map(_is_text, readable)) else []
        if levels and sum(map(len, levels.values())) >= len(flat):
            if problem := _beside(path, readable):
                raise DataError([problem])
            return levels, (*left, *(file.name for file in readable))
        if flat:
            beside = tuple(f"{one.name}/" for one in _seen(path, Path.is_dir))
            return {"train": [Part(file, {"group": file.name}) for file in flat]}, beside
    if not readable:
        splits, left = _by_split(path)
        if splits:
            return splits, left
    inside = next((path / name for name in ("data", "default") if (path / name).is_dir()), None)
    if not readable and inside:  # as the hub has it
        return _files(inside)
    names = sorted(p.name for p in path.iterdir() if not p.name.startswith("."))
    here = ", ".join(names[:8]) + (" ..." if names[8:] else "") or "nothing"
    packed = next((name for name in names if name.endswith(".zip")), None)
    if any(name in ("dataset_dict.json", "dataset_info.json") for name in names):
        fix = "write each split with datasets.load_from_disk(FOLDER)[SPLIT].to_json('SPLIT.jsonl'), and give these"
    elif len(readable) == 1:
        deeper = [path / name for name in _with_texts(path)]
        fix = f"give that file, {readable[0]}, or " + (
            f"the folder {deeper[0]}" if deeper else f"call it train{_ending(readable[0])}"
        )
    elif readable:
        fix = "name the files train, valid and test, or give one of them"
    elif packed or any(file.is_dir() for file in path.iterdir()):
        fix = f"unpack {packed}" if packed else "give a folder or file further down"
    else:
        fix = "give files named train, valid and test (jsonl, json, csv, tsv, parquet or txt), or one file"
    what = f"no train.jsonl or other training file in this folder (it holds {here})"
    raise DataError([Problem(str(path), what, fix)])


def _beside(path: Path, files: Sequence[Path]) -> Problem | None:
    """Files of examples beside folders of texts: which of the two is meant is not told. None where there are none."""
    held = [file for file in files if not _is_text(file) and hold_examples(read_records(file, []))]
    if not held:
        return None
    names = ", ".join(file.name for file in held)
    fix = f"give {' or '.join(map(str, held))}; or take {names} out, to learn each text with its folder's name as label"
    return Problem(str(path), f"examples in {names} beside folders of texts", fix)


def _is_text(file: Path) -> bool:
    return file.suffix.lower() == ".txt"


def _apart(path: Path, split: str, files: Sequence[Path]) -> Problem | None:
    """What is wrong with files of a folder that are to be the parts of one split; None where nothing is."""
    stems = sorted({_stem(file) for file in files})
    if stems and all(stem.isdecimal() for stem in stems) and len(stems) == len(files):
        first = 0 if len(stems[0]) == 4 else min(1, int(stems[0]))  # 0000.parquet and so on, as the hub has them
        missing = sorted({*range(first, len(stems) + first)} - {*map(int, stems)})
        what = f"{split}: part {missing[0]:0{len(stems[0])}} is not here, and {files[-1].name} is" if missing else ""
        return Problem(str(path), what, "copy the others too") if missing else None
    parts = next((int(found[1]) for stem in stems if (found := re.search(SHARD, stem))), 1)
    if len({re.sub(SHARD, "", stem) for stem in stems}) > 1 or (parts == 1 and len(files) > 1):
        return Problem(str(path), f"two {split} files: {', '.join(file.name for file in files)}", "leave one of them")
    if files and parts != len(files):
        return Problem(str(path), f"{len(files)} of the {parts} parts of {split} are here", "copy the others too")
    return None


def _by_split(path: Path) -> tuple[dict[str, list[Part]], tuple[str, ...]]:
    """The files of folders each of which is a split, as the hub converts data (`train/0000.parquet`), by split, and
    what else lies there; nothing for other folders. Texts of a split are read whole, each a group.

    Raises DataError for files in one of the folders that are no parts of one, and for two folders of one split.
    """
    found, others = _folders_of_splits(path)
    files = {
        split: sorted(file for held in _by_name(folder).values() for file in held) for split, folder in found.items()
    }
    if not (files.get("train") and all(files.values())):
        return {}, ()
    given, problems = {}, []
    for split, held in files.items():
        if all(map(_is_text, held)):
            given[split] = [Part(file, {"group": file.name}) for file in held]
            continue
        given[split] = [Part(file) for file in held]
        problems += [problem] if (problem := _apart(found[split], split, held)) else []
    if problems:
        raise DataError(problems)
    return given, others


def _folders_of_splits(path: Path) -> tuple[dict[str, Path], tuple[str, ...]]:
    """The folder of each split, and the names of the other folders; nothing without one to train on. As of files, what
    other programs call otherwise counts where no folder has our name.

    Raises DataError for two of one split, such as Train and train: neither is to be passed over.
    """
    folders = _seen(path, Path.is_dir)
    named: dict[str, list[Path]] = {}
    for split in SPLITS:
        ours = [one for one in folders if one.name.lower() == split]
        named[split] = ours or [one for one in folders if ALSO_CALLED.get(one.name.lower()) == split]
    if not named["train"]:
        return {}, ()
    what = "two {} folders: {}"
    if problems := [
        Problem(str(path), what.format(split, ", ".join(one.name for one in held)), "leave one of them")
        for split, held in named.items()
        if len(held) > 1
    ]:
        raise DataError(problems)
    found = {split: held[0] for split, held in named.items() if held}
    return found, tuple(f"{one.name}/" for one in folders if one not in found.values())


def _by_level(path: Path) -> tuple[dict[str, list[Part]], tuple[str, ...]]:
    """The texts of folders of texts, by split, each with the name of its folder as label, and what else lies there;
    nothing for other folders. One text at several levels is one group: it is never on two sides of a split."""
    found, left = _levels_of(path)
    groups = iter(_without_levels([(file.stem, level) for texts in found.values() for file, level in texts]))
    return {
        split: [Part(file, {"group": next(groups), "label": level}) for file, level in texts]
        for split, texts in found.items()
    }, left


def _levels_of(path: Path) -> tuple[dict[str, list[tuple[Path, str]]], tuple[str, ...]]:
    """Texts with the names of their folders, by split, and what else lies in the folders, or is a folder without texts;
    nothing where fewer than two folders hold texts, or where one holds examples of another kind.

    Raises DataError for two folders of one split.
    """
    splits, others = _folders_of_splits(path)
    if splits:  # each split is a folder of such folders
        found = {split: _levels_of(folder) for split, folder in splits.items()}
        if not all(held for held, _ in found.values()):
            return {}, ()
        unread = [f"{splits[split].name}/{name}" for split, (_, rest) in found.items() for name in rest]
        return {split: held["train"] for split, (held, _) in found.items()}, (*others, *unread)
    texts: list[tuple[Path, str]] = []
    left: list[str] = []
    for folder in _seen(path, Path.is_dir):
        files = _seen(folder)
        read = [one for one in files if one.suffix.lower() in kinds() and one.is_file()]
        here = [one for one in read if not _is_about(one)]
        if not all(map(_is_text, here)):
            return {}, ()
        besides = sorted({*files} - {*here})
        texts += [(one, folder.name) for one in here]
        left += [f"{folder.name}/{one.name}" for one in besides] if here else [f"{folder.name}/"]
    return ({"train": texts} if len({level for _, level in texts}) > 1 else {}), tuple(left)


def _seen(folder: Path, wanted: Callable[[Path], bool] = lambda _: True) -> list[Path]:
    """What is in a folder and is not hidden, by name."""
    return sorted(one for one in folder.iterdir() if not one.name.startswith(".") and wanted(one))


def _with_texts(path: Path) -> tuple[str, ...]:
    """The folders in a folder that hold a file of text."""
    return tuple(f"{one.name}/" for one in _seen(path, Path.is_dir) if any(map(_is_text, _seen(one, Path.is_file))))


def _without_levels(named: Sequence[tuple[str, str]]) -> list[str]:
    """Names of files without the level that they repeat, such as Rain for `Rain-ele` in `Ele-Txt`.

    A level may stand at either end. What looks like one and is none (topic-1 in a folder 1) stays: of the readings, the
    one counts by which most texts are the same at several levels.

    Args:
        named: the name of each file, without its ending, and that of its folder.
    """
    levels = [(stem, _squeezed(level)) for stem, level in named]
    before = [(_before(stem, level), level) for stem, level in levels]
    readings = (
        [stem for stem, _ in named],
        [_behind(*one) for one in levels],
        [stem for stem, _ in before],
        [_behind(*one) for one in before],
    )
    return min(readings, key=lambda names: len(set(names)))


def _behind(stem: str, level: str) -> str:
    """The name without the longest end that is a level, or a beginning of it."""
    cuts = [cut for cut in re.finditer(r"(?<=[^-_. ])[-_. ]+", stem) if _is_of(stem[cut.end() :], level)]
    return stem[: cuts[0].start()] if cuts else stem


def _before(stem: str, level: str) -> str:
    """The name without the longest beginning that is a level, or a beginning of it."""
    cuts = [cut for cut in re.finditer(r"[-_. ]+(?=[^-_. ])", stem) if _is_of(stem[: cut.start()], level)]
    return stem[cuts[-1].end() :] if cuts else stem


def _is_of(part: str, level: str) -> bool:
    return bool(_squeezed(part)) and level.startswith(_squeezed(part))


def _squeezed(text: str) -> str:
    return re.sub(r"[-_. ]", "", text).casefold()


def _by_name(path: Path) -> dict[str, list[Path]]:
    """The files of a folder by what they are called, parts of one file together. A split that other programs call
    otherwise has our name, unless a file of that name is there too."""
    named: dict[str, list[Path]] = defaultdict(list)
    for file in _seen(path):
        if _ending(file).removesuffix(".gz") in kinds() and not _is_about(file):
            named[re.sub(SHARD, "", _stem(file))].append(file)
    given = {split for split in SPLITS if split in named}
    for name, split in ALSO_CALLED.items():
        if split not in given:
            named[split] += named.pop(name, [])
    return named


def _stem(file: Path) -> str:
    """The name without its ending; dots may stand in it (`Mr. Hill.txt`)."""
    return file.name.lower().removesuffix(_ending(file))


def _ending(file: Path) -> str:
    """The ending, with that of packing: `.jsonl`, `.jsonl.gz`."""
    return "".join(file.suffixes[-2:] if file.suffix.lower() == ".gz" else file.suffixes[-1:]).lower()


def _is_about(file: Path) -> bool:
    """Whether a file by its name tells of data and holds none: README.txt, readme.en.txt."""
    return file.name.lower().partition(".")[0] in NOT_EXAMPLES


def _with_labels(examples: Examples) -> Examples:
    """Where every example is a text with its label: a system prompt that names the labels, and a check that the answer
    is the label and nothing else. A check by the words that occur would not do: toxic occurs in non-toxic, C in C++."""
    everything = [example for split in examples.by_name().values() for example in split]
    labels = sorted({example.label for example in everything if example.label is not None})
    if not labels or any(example.label is None for example in everything):
        return examples
    system = "Answer with the label alone" + (f": {', '.join(labels)}." if len(labels) <= MOST_LABELS else ".")
    checked = {
        name: tuple(replace(e, check=e.check or Check((), (), NO_LIMIT, label=e.answer)) for e in split)
        for name, split in examples.by_name().items()
    }
    return replace(examples.with_splits(checked), system=system)
