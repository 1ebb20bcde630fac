"""Reads records from parquet files; the only module that imports pyarrow."""

from __future__ import annotations

import importlib.util
import io
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from lorafit.data.records import Record
from lorafit.errors import Problem


def read_parquet(path: Path, raw: bytes, problems: list[Problem]) -> Iterator[Record]:
    """The records of a parquet file, with labels by name where the file has their names."""
    if importlib.util.find_spec("pyarrow") is None:
        problems.append(Problem(str(path), "parquet needs its reader", "pip install pyarrow", whole=True))
        return
    import pyarrow
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(io.BytesIO(raw)).read()
    except (pyarrow.ArrowException, OSError, ValueError) as error:
        problems.append(Problem(str(path), f"not parquet, or damaged ({error})", "copy it again", whole=True))
        return
    names = table.column_names
    twice = sorted({name for name in names if names.count(name) > 1})
    if twice:
        what, fix = f"two columns are named '{twice[0]}'", "give every column a name of its own"
        problems.append(Problem(str(path), what, fix, whole=True))
        return
    labels = _label_names(table.schema.metadata or {})
    columns = [_named(_values(column), labels.get(name)) for name, column in zip(names, table.columns, strict=True)]
    for number, cells in enumerate(zip(*columns, strict=True), 1):
        row = {name: value for name, value in zip(names, cells, strict=True) if value is not None}
        yield Record(f"{path}:row {number}", row)


def _values(column: Any) -> list[Any]:
    """The values of a column; as text where Python has no type for them, such as times to the nanosecond."""
    try:
        values: list[Any] = column.to_pylist()
    except (ValueError, OverflowError):
        values = column.cast("string").to_pylist()
    return values


def _label_names(metadata: dict[bytes, bytes]) -> dict[str, list[str]]:
    """The names of labels, for each column of their numbers, as `datasets` keeps them in the schema."""
    try:
        features = json.loads(metadata[b"huggingface"])["info"]["features"]
        return {name: feature["names"] for name, feature in features.items() if feature.get("_type") == "ClassLabel"}
    except (KeyError, TypeError, ValueError, AttributeError):
        return {}


def _named(values: list[Any], names: list[str] | None) -> list[Any]:
    """The names of numbered labels; -1 is a row without a label."""
    if names is None:
        return values
    numbers = [int(value) if isinstance(value, float) and value.is_integer() else value for value in values]
    return [
        names[value] if type(value) is int and 0 <= value < len(names) else None if value == -1 else value
        for value in numbers
    ]
