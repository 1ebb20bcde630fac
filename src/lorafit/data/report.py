"""The data report: what is in the examples, before any model is opened."""

from __future__ import annotations

import re
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorafit.data.examples import Example, Examples
from lorafit.data.split import near_pairs

MANY = 10  # examples with one answer that are worth a remark


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
class Remark:
    """Something odd that stops no run: how many examples have it, the place of the first, what to do if it is not
    meant."""

    what: str
    examples: int
    first: str
    advice: str


@dataclass(frozen=True)
class DataReport:
    """Splits by name, fields that were passed over with their counts, remarks, and the digest of the content."""

    splits: dict[str, SplitReport]
    passed_over: dict[str, int]
    remarks: tuple[Remark, ...]
    digest: str


def _holds(pattern: str) -> Callable[[Example], bool]:
    found = re.compile(pattern)
    return lambda example: any(found.search(message.content) for message in example.messages)


def _echoes(example: Example) -> bool:
    return not example.is_text and example.answer.strip() == example.messages[-2].content.strip()


_CONTROL = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd]"
# UTF-8 that was read as another encoding: ’ as â€™, é as Ã©, a hard space as Â and one.
_MISREAD = "(?:â€|[ÃÂ])[\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ]"
_HTML = (
    r"</?(?:a|b|br|div|em|font|h[1-6]|i|img|li|ol|p|span|strong|table|td|tr|ul)(?:\s[^<>]*)?/?>"
    r"|&(?:amp|lt|gt|quot|nbsp|#\d+);"
)
_MAIL = r"[\w.+-]+@[\w-]+\.[\w.]*\w"
_PHONE = r"(?<![\w.,-])\(?\d{3,4}\)?[ .-]\d{3}[ .-]\d{3,4}(?![\w-])"
_PRIVATE = "take out what an adapter must not repeat"
ODD: dict[str, tuple[Callable[[Example], bool], str]] = {
    "hold control characters": (_holds(_CONTROL), "letters were lost on the way, go back to the source"),
    "hold text read in a wrong encoding (â€™, Ã©)": (_holds(_MISREAD), "read the source as UTF-8"),
    "hold HTML": (_holds(_HTML), "strip it, unless answers should have some"),
    "hold an e-mail address": (_holds(_MAIL), _PRIVATE),
    "hold what looks like a telephone number": (_holds(_PHONE), _PRIVATE),
    "answer with the question itself": (_echoes, "correct the answers"),
}


def describe(examples: Examples) -> DataReport:
    """The report of examples that have passed the checks."""
    given = {name: split for name, split in examples.by_name().items() if split}
    fields = Counter(field for split in given.values() for example in split for field in example.extra)
    return DataReport(
        {name: _describe(split) for name, split in given.items()}, dict(fields), _remarks(given), examples.digest()
    )


def _remarks(given: dict[str, tuple[Example, ...]]) -> tuple[Remark, ...]:
    everything = [example for split in given.values() for example in split]
    found = [(what, [e for e in everything if has(e)], advice) for what, (has, advice) in ODD.items()]
    answers = Counter(e.answer.strip().lower() for e in everything if not e.is_text and e.label is None)
    most, count = answers.most_common(1)[0] if answers else ("", 0)
    if count > max(MANY, len(everything) // 2):
        same = [e for e in everything if e.answer.strip().lower() == most]
        found.append(("have the same answer", same, "give others, or an adapter learns to say nothing else"))
    return tuple(Remark(what, len(having), having[0].where, advice) for what, having, advice in found if having)


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
