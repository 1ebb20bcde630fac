"""The files of a folder of examples, found by their names: which split each belongs to, and what it adds to its rows.

A path goes in; the files of each split come out. No file is read, except examples that lie next to folders of texts.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence, Set
from dataclasses import dataclass, field
from pathlib import Path

from lorafit.bases.builtin import BUILTIN as BASES
from lorafit.data.advice import hold_examples
from lorafit.data.examples import SPLITS
from lorafit.data.readers import kinds, read_records
from lorafit.errors import DataError, Problem

ALSO_CALLED = {**dict.fromkeys(("validation", "val", "dev", "eval"), "valid"), "training": "train", "tests": "test"}
NOT_EXAMPLES = re.compile(r"readme|licen[cs]e|copying|notice|dataset_dict|dataset_infos?|state")  # go with data
SHARD = r"-\d+-of-(\d+)(?:-[0-9a-f]{16})?$"  # the end of the name of a file that is one of several parts


@dataclass(frozen=True)
class Part:
    """One file of a split, and the fields that are added to each of its rows: a group, a label."""

    file: Path
    fields: Mapping[str, str] = field(default_factory=dict)


def find_files(path: Path) -> tuple[dict[str, list[Part]], tuple[str, ...]]:
    """Find the files of each split.

    Args:
        path: a file, which is all of the training data, or a folder.

    Returns:
        The files by split, and the names of the other files of the folder.

    Raises:
        DataError: for a base, an adapter or a run; for a folder without a training file, or with two for one split.
    """
    if (path.suffix == ".gguf" or (path / "config.json").exists()) if path.exists() else str(path) in BASES:
        raise DataError([Problem(str(path), "a base, not examples", "give the base first, then the data")])
    for name, kind in (("adapter_config.json", "an adapter"), ("run.json", "a run")):
        if (path / name).exists():
            raise DataError([Problem(str(path), f"{kind}, not examples", "give a file or folder of examples here")])
    if not path.is_dir():
        return {"train": [Part(path)]}, ()
    parts = _files_of_folder(path)
    files = [part.file for split in parts.values() for part in split]
    return parts, _unread(path, {taken for file in files for taken in (file, *file.parents)})


def is_text(file: Path) -> bool:
    """Whether a file is called plain text."""
    return file.suffix.lower() == ".txt"


def _unread(folder: Path, taken: Set[Path], within: str = "") -> tuple[str, ...]:
    """Names of what a folder holds in addition to `taken` (files, and the folders they are in); a folder that holds
    none of these by its name only. READMEs and the like are not named."""
    names: list[str] = []
    for path in _listing(folder):
        if path in taken:
            names += _unread(path, taken, f"{within}{path.name}/") if path.is_dir() else []
        elif within or not _describes_data(path):
            names.append(f"{within}{path.name}{'/' * path.is_dir()}")
    return tuple(names)


def _files_of_folder(path: Path) -> dict[str, list[Part]]:
    """The files of a folder by split. Raises DataError as `find_files` does."""
    named = _by_name(path)
    if problems := [problem for split in SPLITS if (problem := _not_one_split(path, split, named[split]))]:
        raise DataError(problems)
    readable = [file for files in named.values() for file in files]
    if named["train"]:
        return {split: [Part(file) for file in named[split]] for split in SPLITS if named[split]}
    if not (named["valid"] or named["test"]):
        labelled = _labelled_by_folder(path)
        flat = readable if len(readable) > 1 and all(map(is_text, readable)) else []
        if labelled and sum(map(len, labelled.values())) >= len(flat):
            if problem := _examples_next_to_texts(path, readable):
                raise DataError([problem])
            return labelled
        if flat:
            return {"train": [Part(file, {"group": file.name}) for file in flat]}
    if not readable and (parts := _by_split(path) or _as_on_hub(path)):
        return parts
    raise DataError([_no_training_file(path, readable)])


def _no_training_file(path: Path, readable: Sequence[Path]) -> Problem:
    """What a folder without a training file holds instead. readable: its files of a supported type."""
    names = sorted(entry.name for entry in _listing(path))
    packed = next((name for name in names if name.endswith(".zip")), None)
    if any(name in ("dataset_dict.json", "dataset_info.json") for name in names):
        fix = "write each split with datasets.load_from_disk(FOLDER)[SPLIT].to_json('SPLIT.jsonl'), and give these"
    elif len(readable) == 1:
        folders = [
            folder for folder in _listing(path, Path.is_dir) if any(map(is_text, _listing(folder, Path.is_file)))
        ]
        other = f"the folder {folders[0]}" if folders else f"call it train{_ending(readable[0])}"
        fix = f"give that file, {readable[0]}, or {other}"
    elif readable:
        fix = "name the files train, valid and test, or give one of them"
    elif packed or any(file.is_dir() for file in path.iterdir()):
        fix = f"unpack {packed}" if packed else "give a folder or file further down"
    else:
        fix = "give files named train, valid and test (jsonl, json, csv, tsv, parquet or txt), or one file"
    content = ", ".join(names[:8]) + (" ..." if names[8:] else "") or "nothing"
    return Problem(str(path), f"no train.jsonl or other training file in this folder (it holds {content})", fix)


def _as_on_hub(path: Path) -> dict[str, list[Part]]:
    """The files of a folder `data` or `default`, by split; none without such a folder.

    Raises:
        DataError: where neither folder can be read, and where both can, for it is not known which of them is meant.
    """
    readable: dict[Path, dict[str, list[Part]]] = {}
    problems: list[Problem] = []
    for folder in (path / "data", path / "default"):
        try:
            readable |= {folder: _files_of_folder(folder)} if folder.is_dir() else {}
        except DataError as error:
            problems += error.problems
    if len(readable) > 1:
        both = " and ".join(f"{folder.name}/" for folder in readable)
        raise DataError([Problem(str(path), f"examples in {both}", f"give {' or '.join(map(str, readable))}")])
    if problems and not readable:
        raise DataError(problems)
    return next(iter(readable.values()), {})


def _examples_next_to_texts(path: Path, files: Sequence[Path]) -> Problem | None:
    """The problem of a folder with files of examples and folders of texts: it is not known which of them are meant."""
    examples = [file for file in files if not is_text(file) and hold_examples(read_records(file, []))]
    if not examples:
        return None
    names, paths = ", ".join(file.name for file in examples), " or ".join(map(str, examples))
    fix = f"give {paths}; or take {names} out, to learn each text with its folder's name as label"
    return Problem(str(path), f"examples in {names} next to folders of texts", fix)


def _not_one_split(path: Path, split: str, files: Sequence[Path]) -> Problem | None:
    """What is wrong with files of a folder that should be the parts of one split; None where nothing is."""
    stems = sorted({_stem(file) for file in files})
    if stems and all(stem.isdecimal() for stem in stems) and len(stems) == len(files):
        first = 0 if len(stems[0]) == 4 else min(1, int(stems[0]))  # 0000.parquet and so on, as the hub has them
        missing = sorted({*range(first, len(stems) + first)} - {*map(int, stems)})
        what = f"{split}: part {missing[0]:0{len(stems[0])}} is not here, and {files[-1].name} is" if missing else ""
        return Problem(str(path), what, "copy the others too") if missing else None
    parts = next((int(shard[1]) for stem in stems if (shard := re.search(SHARD, stem))), 1)
    if len({re.sub(SHARD, "", stem) for stem in stems}) > 1 or (parts == 1 and len(files) > 1):
        return Problem(str(path), f"two {split} files: {', '.join(file.name for file in files)}", "leave one of them")
    if files and parts != len(files):
        return Problem(str(path), f"{len(files)} of the {parts} parts of {split} are here", "copy the others too")
    return None


def _by_split(path: Path) -> dict[str, list[Part]]:
    """The files of folders each of which is a split, as the hub converts data (`train/0000.parquet`), by split; none
    for other folders. Texts of a split are read whole, each a group.

    Raises:
        DataError: for files in one of the folders that are not the parts of one file, and for two folders of one split.
    """
    folders = _folders_of_splits(path)
    files = {
        split: sorted(file for named in _by_name(folder).values() for file in named)
        for split, folder in folders.items()
    }
    if not (files.get("train") and all(files.values())):
        return {}
    problems = [
        problem
        for split, held in files.items()
        if not all(map(is_text, held)) and (problem := _not_one_split(folders[split], split, held))
    ]
    if problems:
        raise DataError(problems)
    return {
        split: [Part(file, {"group": file.name} if all(map(is_text, held)) else {}) for file in held]
        for split, held in files.items()
    }


def _folders_of_splits(path: Path) -> dict[str, Path]:
    """The folder of each split; none without one to train on. A folder with another program's name for a split counts
    where no folder has our name.

    Raises:
        DataError: for two folders of one split, such as Train and train.
    """
    folders = _listing(path, Path.is_dir)
    named: dict[str, list[Path]] = {}
    for split in SPLITS:
        ours = [folder for folder in folders if folder.name.lower() == split]
        named[split] = ours or [folder for folder in folders if ALSO_CALLED.get(folder.name.lower()) == split]
    if not named["train"]:
        return {}
    if problems := [
        Problem(str(path), f"two {split} folders: {', '.join(folder.name for folder in twice)}", "leave one of them")
        for split, twice in named.items()
        if len(twice) > 1
    ]:
        raise DataError(problems)
    return {split: held[0] for split, held in named.items() if held}


def _labelled_by_folder(path: Path) -> dict[str, list[Part]]:
    """The texts of folders of texts, by split, each with the name of its folder as label; none for other folders.

    A text that is there at several levels of reading is one group: it is never on two sides of a split.
    """
    texts = _texts_and_labels(path)
    groups = iter(_without_levels([(file.stem, label) for split in texts.values() for file, label in split]))
    return {
        split: [Part(file, {"group": next(groups), "label": label}) for file, label in held]
        for split, held in texts.items()
    }


def _texts_and_labels(path: Path) -> dict[str, list[tuple[Path, str]]]:
    """Texts with the names of their folders, by split; none where fewer than two folders hold texts, or where one
    holds other examples. Raises DataError for two folders of one split."""
    if folders := _folders_of_splits(path):  # each split is a folder of such folders
        splits = {split: _texts_and_labels(folder) for split, folder in folders.items()}
        return {split: texts["train"] for split, texts in splits.items()} if all(splits.values()) else {}
    texts: list[tuple[Path, str]] = []
    for folder in _listing(path, Path.is_dir):
        files = [
            file
            for file in _listing(folder, Path.is_file)
            if file.suffix.lower() in kinds() and not _describes_data(file)
        ]
        if not all(map(is_text, files)):
            return {}
        texts += [(file, folder.name) for file in files]
    return {"train": texts} if len({label for _, label in texts}) > 1 else {}


def _listing(folder: Path, wanted: Callable[[Path], bool] = lambda _: True) -> list[Path]:
    """What is in a folder and is not hidden, by name."""
    return sorted(path for path in folder.iterdir() if not path.name.startswith(".") and wanted(path))


def _without_levels(named: Sequence[tuple[str, str]]) -> list[str]:
    """Names of files without the level of reading that they repeat, such as Rain for `Rain-ele` in `Ele-Txt`.

    A level may stand at either end of a name. What only looks like a level (topic-1 in a folder 1) stays: of the
    possible readings, the one counts by which most texts are the same at several levels.

    Args:
        named: the name of each file, without its ending, and that of its folder.
    """
    names = [(stem, _squeezed(folder)) for stem, folder in named]
    unprefixed = [(_without_prefix(stem, level), level) for stem, level in names]
    readings = (
        [stem for stem, _ in names],
        [_without_suffix(*name) for name in names],
        [stem for stem, _ in unprefixed],
        [_without_suffix(*name) for name in unprefixed],
    )
    return min(readings, key=lambda reading: len(set(reading)))


def _without_suffix(stem: str, level: str) -> str:
    """The name without the longest end that is a level, or the beginning of one."""
    cuts = [cut for cut in re.finditer(r"(?<=[^-_. ])[-_. ]+", stem) if _begins(level, stem[cut.end() :])]
    return stem[: cuts[0].start()] if cuts else stem


def _without_prefix(stem: str, level: str) -> str:
    """The name without the longest beginning that is a level, or the beginning of one."""
    cuts = [cut for cut in re.finditer(r"[-_. ]+(?=[^-_. ])", stem) if _begins(level, stem[: cut.start()])]
    return stem[cuts[-1].end() :] if cuts else stem


def _begins(level: str, part: str) -> bool:
    return bool(_squeezed(part)) and level.startswith(_squeezed(part))


def _squeezed(text: str) -> str:
    return re.sub(r"[-_. ]", "", text).casefold()


def _by_name(path: Path) -> dict[str, list[Path]]:
    """The files of a folder by their names, parts of one file together. A split with another program's name gets our
    name, unless a file of our name is there too."""
    named: dict[str, list[Path]] = defaultdict(list)
    for file in _listing(path):
        if _ending(file).removesuffix(".gz") in kinds() and not _describes_data(file):
            named[re.sub(SHARD, "", _stem(file))].append(file)
    ours = {split for split in SPLITS if split in named}
    for name, split in ALSO_CALLED.items():
        if split not in ours:
            named[split] += named.pop(name, [])
    return named


def _stem(file: Path) -> str:
    """The name without its ending; it may hold dots (`Mr. Hill.txt`)."""
    return file.name.lower().removesuffix(_ending(file))


def _ending(file: Path) -> str:
    """The ending, with that of compression: `.jsonl`, `.jsonl.gz`."""
    return "".join(file.suffixes[-2:] if file.suffix.lower() == ".gz" else file.suffixes[-1:]).lower()


def _describes_data(file: Path) -> bool:
    """Whether a file by its name describes data and holds none: README.txt, readme.en.txt."""
    return NOT_EXAMPLES.fullmatch(file.name.lower().partition(".")[0]) is not None
