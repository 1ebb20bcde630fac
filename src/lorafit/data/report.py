"""The data report: what is in the examples, before any model is opened."""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass

from lorafit.data.examples import Example, Examples
from lorafit.data.split import near_pairs


@dataclass(frozen=True)
class SplitReport:
    """Counts of one split. words: (shortest, median, longest) of whole examples, of answers alone.
    contradictions: prompts that occur with more than one answer."""

    examples: int
    answers: int
    words: tuple[int, int, int]
    answer_words: tuple[int, int, int]
    near_duplicates: int
    contradictions: int
    checked: int
    declining: int


@dataclass(frozen=True)
class DataReport:
    """Splits by name, fields that were passed over with their counts, and the digest of the content."""

    splits: dict[str, SplitReport]
    passed_over: dict[str, int]
    digest: str


def describe(examples: Examples) -> DataReport:
    """The report of examples that have passed the checks."""
    given = {name: split for name, split in examples.by_name().items() if split}
    fields = Counter(field for split in given.values() for example in split for field in example.extra)
    return DataReport({name: _describe(split) for name, split in given.items()}, dict(fields), examples.digest())


def _describe(split: Sequence[Example]) -> SplitReport:
    near: set[int] = set()
    for _, j in near_pairs([example.question for example in split], lambda i, j: j not in near):
        near.add(j)
    said: dict[str, set[str]] = defaultdict(set)
    for example in split:
        said[" ".join(example.question.lower().split())].add(" ".join(example.answer.lower().split()))
    answers = [m for example in split for m in example.messages if m.role == "assistant"]
    return SplitReport(
        examples=len(split),
        answers=len(answers),
        words=_spread([sum(len(m.content.split()) for m in example.messages) for example in split]),
        answer_words=_spread([len(m.content.split()) for m in answers]),
        near_duplicates=len(near),
        contradictions=sum(len(found) > 1 for found in said.values()),
        checked=sum(example.check is not None for example in split),
        declining=sum(example.check is not None and example.check.declines for example in split),
    )


def _spread(counts: list[int]) -> tuple[int, int, int]:
    ordered = sorted(counts) or [0]
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]
