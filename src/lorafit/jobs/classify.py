"""`lorafit classify`: a classifier and a file of texts go in; the label of each text, and its confidence, come out."""

from __future__ import annotations

import csv
import io
import json
from collections import Counter
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

from lorafit.adapters.formats import peft
from lorafit.adapters.rendering import Classes
from lorafit.attachment.adapters import attach
from lorafit.data.reading import unskippable
from lorafit.data.rows import Row
from lorafit.data.texts import Text, read_texts
from lorafit.errors import AdapterError, DataError, Problem, SettingsError
from lorafit.files import require_new, write_text
from lorafit.heads import opened_for
from lorafit.jobs.listener import Listener, Silent
from lorafit.jobs.machine import keep_freed_memory
from lorafit.jobs.prepare import opened_base
from lorafit.settings import settings_from
from lorafit.tasks.classification import TOO_LONG, Classification, LabelRenderer, probabilities, text_rows

PREDICTED, CONFIDENCE, PROBABILITIES = "predicted", "confidence", "probabilities"
KINDS = (".csv", ".jsonl")  # of files that are written


def run_classifying(
    adapter_folder: str | Path,
    data: str | Path,
    settings: Mapping[str, Any] = MappingProxyType({}),
    *,
    base: str | Path | None = None,
    out: str | Path | None = None,
    accept_unknown_base: bool = False,
    listener: Listener | None = None,
) -> dict[str, Any]:
    """Give every text of a file its most likely label. It has more than six parameters; those that are set by name are
    optional.

    Args:
        adapter_folder: A classifier: an adapter folder, or a run.
        data: A file of texts, as `read_texts` takes it.
        settings: Fields of TrainSettings that matter here: columns, dtype, skip_bad.
        base: The base; None for the one that the adapter names.
        out: A new .csv or .jsonl file: the rows of `data` with `predicted` and `confidence`, in .jsonl also with the
            probability of every label. It is written whole or not at all.
        accept_unknown_base: Attach an adapter that does not say which base it belongs to.
        listener: Receives messages and progress.

    Returns:
        How many texts have each label. Without `out`, also the rows that would be written to a .jsonl file.

    Raises:
        AdapterError: The adapter is no classifier, or does not fit the base.
        DataError: Texts cannot be read or classified; all of these are named.
    """
    listener = listener or Silent()
    out = require_output(out)
    resolved = settings_from(settings)
    adapter_folder = peft.adapter_folder(adapter_folder)
    peft.require_classifies(adapter_folder)
    adapter = peft.read(adapter_folder)
    classes = adapter.classes
    assert classes is not None  # require_classifies sees to it
    texts, problems = read_texts(data, resolved.columns or ())
    if problems and not resolved.skip_bad:
        raise DataError(problems)
    _require_free_columns(str(data), texts)
    name = str(base) if base else adapter.base_name
    if name is None:
        raise AdapterError(f"{adapter_folder}: does not say which base it belongs to: name it with --base")
    keep_freed_memory()
    opened = opened_base(name, resolved, listener, head=opened_for(adapter))
    texts, rows, unread = _rows(LabelRenderer(opened, classes), texts)
    problems += unread
    if unread and not (resolved.skip_bad and texts):
        raise DataError(problems if texts else unskippable(problems))
    for problem in problems:
        listener.say(f"left out: {problem}")

    def watch(done: int) -> None:
        listener.watch("labels", done, len(rows), "texts")

    watch(0)
    with attach(opened, adapter, accept_unknown_base=accept_unknown_base):
        likely = probabilities(opened, Classification(classes), rows, watch)
    labelled = [_labelled(text, classes, shares) for text, shares in zip(texts, likely.tolist(), strict=True)]
    counts = Counter(row[PREDICTED] for row in labelled)
    found = {
        "adapter_dir": str(adapter_folder),
        "base": opened.name,
        "n": len(labelled),
        "labels": {label: counts[label] for label in classes.labels},
        "left_out": len(problems),
    }
    if out is None:
        return {**found, "texts": labelled}
    write_text(out, as_csv(labelled) if out.suffix.lower() == ".csv" else _as_jsonl(labelled))
    return {**found, "out": str(out)}


def _rows(renderer: LabelRenderer, texts: Sequence[Text]) -> tuple[list[Text], list[Row], list[Problem]]:
    """The texts that the base can read, with their rows, and the problems of the others."""
    try:
        return [*texts], text_rows(renderer, [(text.where, text.text) for text in texts], TOO_LONG), []
    except DataError as error:
        lost = {problem.where for problem in error.problems}
        left = [text for text in texts if text.where not in lost]
        return left, text_rows(renderer, [(text.where, text.text) for text in left], TOO_LONG), [*error.problems]


def _labelled(text: Text, classes: Classes, shares: Sequence[float]) -> dict[str, Any]:
    """The row of a text with its most likely label."""
    best = max(range(len(shares)), key=shares.__getitem__)
    by_label = {label: round(share, 6) for label, share in zip(classes.labels, shares, strict=True)}
    return {
        **text.row,
        PREDICTED: classes.labels[best],
        CONFIDENCE: round(shares[best], 6),
        PROBABILITIES: by_label,
    }


def require_output(out: str | Path | None) -> Path | None:
    """The path of the new file to write, if any. Raises SettingsError for another type of file, and RunError for a file
    that exists."""
    if out is None:
        return None
    out = Path(out).expanduser()
    if out.suffix.lower() not in KINDS:
        raise SettingsError(f"--out {out}: not a type of file that is written: end its name in {' or '.join(KINDS)}")
    require_new(out, "--out")
    return out


def _require_free_columns(data: str, texts: Sequence[Text]) -> None:
    """Raise DataError if rows have a column that would be replaced by one of the result."""
    names = {name for text in texts for name in text.row}
    if taken := [name for name in (PREDICTED, CONFIDENCE, PROBABILITIES) if name in names]:
        what = f"has a column '{taken[0]}', which the result would replace"
        raise DataError([Problem(data, what, "rename it", whole=True)])


def as_csv(rows: Sequence[Mapping[str, Any]]) -> str:
    """Rows as a table, without the probabilities of all labels. Lists and objects are written as JSON."""
    names = [name for name in dict.fromkeys(name for row in rows for name in row) if name != PROBABILITIES]
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(names)
    for row in rows:
        writer.writerow([_cell(row.get(name)) for name in names])
    return text.getvalue()


def _cell(value: Any) -> Any:
    return json.dumps(value, ensure_ascii=False, default=str) if isinstance(value, list | dict) else value


def _as_jsonl(rows: Sequence[Mapping[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False, default=str) + "\n" for row in rows)
