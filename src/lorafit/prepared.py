"""Examples made ready before a model is opened: read, checked, split, described. Nothing of weight is imported here, so
that a mistake in a file is reported at once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from lorafit.data.equality import NUMERALS, last_number
from lorafit.data.examples import Example, Examples
from lorafit.data.reading import BUILTIN, read_examples, unskippable
from lorafit.data.report import DataReport, describe
from lorafit.data.split import Questions, complete, require_apart
from lorafit.errors import DataError, Problem, SettingsError
from lorafit.evaluation.answers import is_right
from lorafit.evaluation.statistics import FEWEST, groups_of
from lorafit.settings import TrainSettings


class DataListener(Protocol):
    """Receives what is found in the data. Every method may do nothing."""

    def say(self, text: str) -> None: ...
    def data(self, report: DataReport) -> None: ...


class Unheard:
    """A DataListener that does nothing."""

    def say(self, text: str) -> None: ...
    def data(self, report: DataReport) -> None: ...


Prepared = tuple[Examples, DataReport]  # what `prepare` returns


@dataclass(frozen=True)
class Chosen:
    """What is to be scored of some data. all: of every split; split: of the chosen one; scored: those of it that can
    be."""

    all: Examples
    split: tuple[Example, ...]
    scored: Examples


def choose(data: str, split: str, settings: TrainSettings, listener: DataListener) -> Chosen:
    """Read and check data that are to be scored: of a folder one split, a single file whole."""
    examples = read_examples(data, settings.columns or (), settings.skip_bad)
    _tell(examples, listener)
    chosen = examples.train if is_single(data) else examples.by_name()[split]
    if not chosen:
        raise DataError([Problem(data, f"has no {split} split", "name another with --split, or give one file")])
    return Chosen(examples, chosen, sifted(Examples(chosen), require_passing, settings.skip_bad, listener))


def is_single(data: str) -> bool:
    """Whether the data are one file, which is scored whole."""
    return data != BUILTIN and Path(data).expanduser().is_file()


def _tell(examples: Examples, listener: DataListener) -> None:
    """Say what of the data was not taken, and how the rest was."""
    for problem in examples.skipped:
        listener.say(f"left out: {problem}")
    if examples.unread:
        listener.say(
            f"not read: {', '.join(examples.unread)}: of a folder are read its files called train, valid and "
            "test, or else its texts, or else the folders of texts in it"
        )
    for note in examples.notes:
        listener.say(note)


def prepare(data: str, settings: TrainSettings, listener: DataListener) -> tuple[Examples, DataReport]:
    """Read, check, describe; make sure that what is held out is, and complete the splits."""
    examples = read_examples(data, settings.columns or (), settings.skip_bad)
    if all(examples.by_name().values()) and settings.val_share != TrainSettings().val_share:
        raise SettingsError(
            f"--val-share {settings.val_share}: does nothing, for {data} brings train, valid and test "
            "of its own: leave it out"
        )
    _tell(examples, listener)
    different: list[int] = []
    examples = sifted(examples, require_passing, settings.skip_bad, listener)
    questions = Questions.of(examples)
    examples = sifted(examples, lambda e: different.append(require_apart(e, questions)), settings.skip_bad, listener)
    if different[-1]:
        listener.say(
            f"{different[-1]} prompts of valid and test are near-identical to others, but with answers of their own, "
            "as it must be in data to text; elsewhere such a test may be easier than life"
        )
    examples = complete(examples, settings.val_share, questions)
    report = describe(examples, questions, settings.max_length)
    listener.data(report)
    independent = len(set(groups_of([example.group for example in examples.test])))
    if independent < FEWEST:
        listener.say(
            f"only {independent} independent test example{'s' * (independent != 1)}: too few to tell whether an "
            f"adapter is better; at least {FEWEST} are needed, a hundred tell much (--val-share, or more data)"
        )
    return examples, report


def sifted(examples: Examples, check: Callable[[Examples], None], skip_bad: bool, listener: DataListener) -> Examples:
    """The examples that pass the check: all of them, or with `skip_bad` what is left without the others, each told."""
    try:
        check(examples)
        return examples
    except DataError as error:
        left = examples.without(error.problems)
        emptied = any(split and not left.by_name()[name] for name, split in examples.by_name().items())
        if emptied:
            raise DataError(unskippable(error.problems)) from error
        if not skip_bad:
            raise
        for problem in error.problems:
            listener.say(f"left out: {problem}")
        check(left)
        return left


def require_passing(examples: Examples) -> None:
    """Raise DataError naming every example whose own answer does not pass its check: no answer to it could count."""
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
    """Where the check asks for a number, what may be read in the answer."""
    check = example.check
    if check is None or check.number is None:
        return ""
    read = dict.fromkeys(number for way in NUMERALS if (number := last_number(example.answer, way)) is not None)
    found = " or ".join(f"{number:.12g}" for number in read) or "none that can be read"
    return f" (its last number: {found}; asked for: {check.number:.12g})"
