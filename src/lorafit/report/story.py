"""Reads the files of a run folder for the report. Of an unfinished run it reads those that exist."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lorafit.errors import FormatError
from lorafit.files import read_json
from lorafit.runs.folder import (
    ANSWERS,
    CARD,
    DATA,
    IMPORTANCE,
    METRICS,
    PLAN,
    RUN,
    SCORES,
    SEARCH,
    TRIED,
    openings,
    read_run,
    read_summary,
    standing_folder,
)
from lorafit.runs.summary import RunSummary


@dataclass(frozen=True)
class Story:
    """The content of one run's files. `answers` has a record per test example, `steps` one per step and validation.
    `plan`, `data` and `summary` are None until the run has written them. `openings` counts the openings of the test.
    `card` has what validation can show, and the layer card; `tried` the result and the curve of each arm of the search.
    """

    name: str
    folder: Path
    asked: Mapping[str, Any]
    plan: Mapping[str, Any] | None
    data: Mapping[str, Any] | None
    steps: tuple[Mapping[str, Any], ...]
    answers: tuple[Mapping[str, Any], ...]
    summary: RunSummary | None
    openings: int
    card: Mapping[str, Any] | None
    tried: tuple[Mapping[str, Any], ...]
    importance: Mapping[str, Any] | None

    @property
    def training(self) -> list[tuple[int, float]]:
        """(step, NLL of the step's examples)."""
        return [(line["step"], line["train_nll"]) for line in self.steps if "train_nll" in line]

    @property
    def validation(self) -> list[tuple[int, float]]:
        """(step, mean validation NLL per example)."""
        return [(line["step"], line["valid_nll"]) for line in self.steps if "valid_nll" in line]


def read_story(folder: Path) -> Story:
    """Read a run folder. Raises FormatError if it holds no run, or a damaged one."""
    if not (folder / RUN).exists():
        raise FormatError(f"{folder}: holds no run: name a folder that 'lorafit train' or 'lorafit demo' wrote")
    resolved, trained = folder.resolve(), standing_folder(folder)
    return Story(
        name=f"{resolved.parent.name}/{resolved.name}",
        folder=folder,
        asked=read_run(folder),
        plan=_read(trained / PLAN),
        data=_read(folder / DATA),
        steps=lines_of(trained / METRICS),
        answers=lines_of(folder / SCORES / ANSWERS),
        summary=read_summary(folder),
        openings=openings(folder),
        card=_read(folder / SEARCH / CARD),
        tried=_tried(folder / SEARCH),
        importance=_read(folder / SCORES / IMPORTANCE),
    )


def _tried(folder: Path) -> tuple[Mapping[str, Any], ...]:
    """The arms of the search; each has a `curve`, its training NLL by step."""
    if not (folder / TRIED).exists():
        return ()
    arms = read_json(folder / TRIED)
    if not isinstance(arms, list):
        raise FormatError(f"{folder / TRIED}: not written by lorafit, or damaged: train again into another folder")
    lines = {arm["cell"]: lines_of(folder / arm["cell"] / METRICS) for arm in arms}
    return tuple(
        {**arm, "curve": [(line["step"], line["train_nll"]) for line in lines[arm["cell"]] if "train_nll" in line]}
        for arm in arms
    )


def _read(path: Path) -> Mapping[str, Any] | None:
    found = read_json(path) if path.exists() else None
    if found is not None and not isinstance(found, dict):
        raise FormatError(f"{path}: not written by lorafit, or damaged: train again into another folder")
    return found


def lines_of(path: Path) -> tuple[Mapping[str, Any], ...]:
    """The records of a file of JSON lines. An incomplete last line, which is being written, is left out."""
    if not path.exists():
        return ()
    *lines, _ = path.read_text(encoding="utf-8").split(
        "\n"
    )  # splitlines would also split at separators inside of JSON strings
    try:
        return tuple(json.loads(line) for line in lines)
    except ValueError as error:
        raise FormatError(f"{path}: damaged ({error}): train again into another folder") from error
