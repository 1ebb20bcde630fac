"""Prepares examples before a model is opened: they are read, checked, split and described.

A path and settings go in; complete examples and their report come out. Neither torch nor transformers is imported
here, so that a mistake in a file is reported at once.
"""

from __future__ import annotations

from collections.abc import Callable, Container
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lorafit.data.checks import is_right
from lorafit.data.equality import NUMERALS, last_number
from lorafit.data.examples import Example, Examples
from lorafit.data.reading import BUILTIN, read_examples, unskippable
from lorafit.data.report import DataReport, describe
from lorafit.data.split import FEWEST, Questions, complete, groups_of, require_apart
from lorafit.errors import DataError, Problem, SettingsError
from lorafit.settings import TrainSettings


class DataListener(Protocol):
    """Receives messages about the data and their report. Every method may do nothing."""

    def say(self, text: str) -> None: ...
    def data(self, report: DataReport) -> None: ...


class Unheard:
    """A DataListener that does nothing."""

    def say(self, text: str) -> None: ...
    def data(self, report: DataReport) -> None: ...


Prepared = tuple[Examples, DataReport]
"""Complete, checked examples and their report."""


@dataclass(frozen=True)
class Chosen:
    """Examples to score.

    Args:
        all: the examples of every split.
        split: those of the chosen split.
        scored: those of the chosen split whose reference passes its own check.
    """

    all: Examples
    split: tuple[Example, ...]
    scored: Examples


def choose(data: str, split: str, settings: TrainSettings, listener: DataListener) -> Chosen:
    """Read and check examples to score: one split of a folder, or the whole of a single file.

    Args:
        data: a file, a folder, or `builtin`.
        split: the split of a folder: train, valid or test.
        settings: its columns and `skip_bad` are used.
        listener: receives a message about everything that is left out.

    Raises:
        DataError: with every problem of the data, or for a folder without this split.
    """
    examples = read_examples(data, settings.columns or (), settings.skip_bad)
    _report_unread(examples, listener)
    chosen = examples.train if is_single(data) else examples.by_name()[split]
    if not chosen:
        raise DataError([Problem(data, f"has no {split} split", "name another with --split, or give one file")])
    return Chosen(examples, chosen, sifted(Examples(chosen), require_passing, settings.skip_bad, listener))


def is_single(data: str) -> bool:
    """Whether the data are one file, which is scored whole."""
    return data != BUILTIN and Path(data).expanduser().is_file()


def _report_unread(examples: Examples, listener: DataListener) -> None:
    """Report the rows and files that were not read, and how the others were understood."""
    for problem in examples.skipped:
        listener.say(f"left out: {problem}")
    if examples.unread:
        listener.say(
            f"not read: {', '.join(examples.unread)}: a folder's files called train, valid and test are read, or else "
            "its texts, or else its folders of texts: give the file or folder that you meant"
        )
    for note in examples.notes:
        listener.say(note)


def prepare(data: str, settings: TrainSettings, listener: DataListener, passed_over: Container[str] = ()) -> Prepared:
    """Read, check, split and describe the examples of a run.

    Args:
        data: a file, a folder, or `builtin`.
        settings: those of the run.
        listener: receives messages and the report.
        passed_over: as in `read_examples`.

    Returns:
        Examples with all three splits, and their report.

    Raises:
        DataError: with every problem of the data: what cannot be read, references that fail their own check,
            near-identical examples on both sides of a split, too few examples to split.
        SettingsError: for columns that cannot be, and for a `val_share` where every split is given.
    """
    examples = read_examples(data, settings.columns or (), settings.skip_bad, passed_over)
    if all(examples.by_name().values()) and settings.val_share != TrainSettings().val_share:
        raise SettingsError(
            f"--val-share {settings.val_share}: does nothing, because {data} has train, valid and test files: "
            "leave it out"
        )
    _report_unread(examples, listener)
    examples = sifted(examples, require_passing, settings.skip_bad, listener)
    questions = Questions.of(examples)
    different = 0

    def check_apart(examples: Examples) -> None:
        nonlocal different
        different = require_apart(examples, questions)

    examples = sifted(examples, check_apart, settings.skip_bad, listener)
    if different:
        listener.say(
            f"{different} prompts of valid and test are near-identical to other prompts, but have different answers: "
            "expected where data are turned into text; elsewhere such a test may be easier than real use"
        )
    examples = complete(examples, settings.val_share, questions)
    report = describe(examples, questions, settings.max_length)
    listener.data(report)
    independent = len(set(groups_of([example.group for example in examples.test])))
    if independent < FEWEST:
        listener.say(
            f"only {independent} independent test example{'s' * (independent != 1)}: too few to tell whether an "
            f"adapter is better; at least {FEWEST} are needed, and a hundred tell much (--val-share, or more data)"
        )
    return examples, report


def sifted(examples: Examples, check: Callable[[Examples], None], skip_bad: bool, listener: DataListener) -> Examples:
    """The examples that pass a check.

    Args:
        examples: all splits.
        check: raises DataError with a problem for every example that fails.
        skip_bad: leave out the examples that fail, rather than raise.
        listener: receives a message about each that is left out.

    Raises:
        DataError: as `check` does, without `skip_bad` or where a split would be left empty.
    """
    try:
        check(examples)
        return examples
    except DataError as error:
        passing = examples.without(error.problems)
        if any(split and not passing.by_name()[name] for name, split in examples.by_name().items()):
            raise DataError(unskippable(error.problems)) from error
        if not skip_bad:
            raise
        for problem in error.problems:
            listener.say(f"left out: {problem}")
        check(passing)
        return passing


def require_passing(examples: Examples) -> None:
    """Raise DataError naming every example whose reference answer fails its own check: no answer could pass it."""
    problems = [
        Problem(
            f"{example.where}: check",
            f"its own answer does not pass it{_numbers_read(example)}",
            "correct the answer, or what the check asks of it",
        )
        for split in examples.by_name().values()
        for example in split
        if example.check is not None and not is_right(example.answer, example.check)
    ]
    if problems:
        raise DataError(problems)


def _numbers_read(example: Example) -> str:
    """The last number of a reference answer in every notation, where its check asks for another; "" elsewhere."""
    check = example.check
    if check is None or check.number is None:
        return ""
    read = dict.fromkeys(number for form in NUMERALS if (number := last_number(example.answer, form)) is not None)
    numbers = " or ".join(f"{number:.12g}" for number in read) or "none that can be read"
    return f" (its last number: {numbers}; asked for: {check.number:.12g})"
