"""The data report: what is in the examples, before any model is opened."""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass

from lorafit.data.examples import Example, Examples
from lorafit.data.split import Questions

MANY = 10  # examples with one answer that are worth a remark
CUT = 100  # characters: no shorter answers are taken for cut off


@dataclass(frozen=True)
class SplitReport:
    """Counts of one split. words: (shortest, median, longest) of whole examples, of answers alone.
    contradictions: prompts that occur with more than one answer. labels: how often each is the answer, the most
    frequent first."""

    examples: int
    answers: int
    words: tuple[int, int, int]
    answer_words: tuple[int, int, int]
    near_duplicates: int
    contradictions: int
    checked: int
    declining: int
    labels: dict[str, int]


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
    return lambda example: any(found.search(message.text) for message in example.messages)


def _answers(pattern: str) -> Callable[[Example], bool]:
    found = re.compile(pattern)
    return lambda example: not example.is_text and found.search(example.answer) is not None


def _nothing(example: Example) -> bool:
    return not example.is_text and example.answer.strip(string.whitespace + ".!?-_<>()[]#*\"'").lower() in _NOTHING


def _echoes(example: Example) -> bool:
    return not example.is_text and example.answer.strip() == example.messages[-2].text.strip()


def _undescribed(example: Example) -> bool:
    return not example.tools and any(message.calls for message in example.messages)


_CONTROL = r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f\ufffd]"
# UTF-8 that was read as another encoding: ’ as â€™, é as Ã©, a hard space as Â and one, й as Ð¹, 日 as æ—¥.
_HIGH = "\x80-\xbf€‚ƒ„…†‡ˆ‰Š‹ŒŽ‘’“”•–—˜™š›œžŸ"
_MISREAD = f"(?:â€|[ÃÂÐÑ])[{_HIGH}]|(?<![A-Za-zÀ-ÿ])[ãäåæçèéï](?:[\x80-\xbf][{_HIGH}]|[{_HIGH}][\x80-\xbf])"
_HTML = (
    r"</?(?:a|article|b|body|br|div|em|font|footer|h[1-6]|head|header|html|i|img|li|nav|ol|p|script|section|span|strong"
    r"|style|table|tbody|td|th|thead|tr|u|ul)(?:\s[^<>]*)?/?>|&(?:amp|lt|gt|quot|apos|nbsp|copy|[a-zA-Z](?:acute|grave|circ|uml|tilde|cedil)|[lr][ds]quo|[mn]dash|#x?[\da-fA-F]+);"
)
_MAIL = r"(?<![\w.+-])[\w.+-]+@[\w-]+\.[\w.]*\w"
_PHONE = (
    r"(?<![\w.,-])\(?\d{3,4}\)?[ .-]\d{3}[ .-]\d{3,4}(?![\w-])"
    r"|(?<![\w.,-])\+\d{1,3}[ .-]?\(?\d{1,4}\)?(?:[ .-]?\d{2,4}){2,4}(?![\w-])"
)
_NUMBERS = (  # of cards, of accounts by country, of social security in the United States
    r"(?<![\w-])\d{4}([ -]?)\d{4}\1\d{4}\1\d{4}(?![\w-])|\b[A-Z]{2}\d{2}(?: ?[A-Z0-9]{4}){3,7}\b"
    r"|(?<![\w-])\d{3}-\d{2}-\d{4}(?![\w-])"
)
_SECRET = (
    r"\b(?:sk|pk|ghp|gho|xox[abp]|hf)[-_](?=[A-Za-z_-]*\d)[A-Za-z0-9_-]{16,}"
    r"|\bAKIA[0-9A-Z]{16}\b|-----BEGIN [A-Z ]*PRIVATE KEY"
)
_NOTHING = {"", "n/a", "na", "nan", "none", "null", "nil", "undefined", "todo", "to do", "tbd", "fixme", "xxx"}
_MARKER = r"(?:#{2,}|\bEND|</s>|<\|[^|>]*\|>|\[/?INST\])\s*$"
_PRIVATE = "take out what an adapter must not repeat"
ODD: dict[str, tuple[Callable[[Example], bool], str]] = {
    "hold control characters": (_holds(_CONTROL), "letters were lost on the way, go back to the source"),
    "hold text read in a wrong encoding (â€™, Ã©)": (_holds(_MISREAD), "read the source as UTF-8"),
    "hold HTML": (_holds(_HTML), "strip it, unless answers should have some"),
    "hold an e-mail address": (_holds(_MAIL), _PRIVATE),
    "hold what looks like a telephone number": (_holds(_PHONE), _PRIVATE),
    "hold what looks like the number of a card, an account or a person": (_holds(_NUMBERS), _PRIVATE),
    "hold what looks like a key or password of a program": (_holds(_SECRET), _PRIVATE),
    "call tools that they do not describe": (_undescribed, "give each its tools, as requests will"),
    "answer with the question itself": (_echoes, "correct the answers"),
    "answer with a mark for nothing (N/A, null, TODO)": (_nothing, "fill them in, or leave them out"),
    "answer with blanks before or after": (_answers(r"^\s|\s$"), "strip them, they are learnt too"),
    "end an answer with a marker (###, END, </s>)": (
        _answers(_MARKER),
        "take it out: where an answer ends is learnt without it",
    ),
}


def describe(examples: Examples, questions: Questions | None = None, max_length: int | None = None) -> DataReport:
    """The report of examples that have passed the checks.

    Args:
        examples: all splits.
        questions: of these examples, where they are at hand.
        max_length: tokens that training takes in an example; None where that is not asked.
    """
    questions = questions or Questions.of(examples)
    given = {name: split for name, split in examples.by_name().items() if split}
    fields = Counter(field for split in given.values() for example in split for field in example.extra)
    return DataReport(
        {name: _describe(split, questions) for name, split in given.items()},
        dict(fields),
        _remarks(given, questions, max_length),
        examples.digest(),
    )


def _remarks(given: dict[str, tuple[Example, ...]], questions: Questions, max_length: int | None) -> tuple[Remark, ...]:
    everything = [example for split in given.values() for example in split]
    found = [(what, [e for e in everything if has(e)], advice) for what, (has, advice) in ODD.items()]
    answered = [example for example in everything if not example.is_text]
    answers = Counter(e.answer.strip().lower() for e in answered)
    share = 0.5 if any(e.label is None for e in answered) else 0.9  # a rare label is nothing odd
    for most, count in answers.most_common(1):
        if count > max(MANY, share * len(answered)):
            same = [e for e in answered if e.answer.strip().lower() == most]
            found.append(("have the same answer", same, "give others, or an adapter learns to say nothing else"))
    longest = max((len(e.answer) for e in answered), default=0)
    cut = [e for e in answered if len(e.answer) == longest]
    if len(cut) > max(MANY, len(answered) // 20) and longest > CUT:
        what = f"have an answer of exactly {longest:,} characters, which is the longest"
        found.append((what, cut, "go back to the source if they were cut there"))
    if questions.by_answer:
        advice = "right for teaching a voice; else give the questions that were asked"
        found.append(("ask one and the same thing, so that answers are what is held out", everything, advice))
    if max_length is not None:  # plain text is cut into pieces
        long = [e for e in everything if not e.is_text and _words(e) > max_length]
        words = max(map(_words, long), default=0)
        what = f"hold more words (up to {words:,}) than the {max_length:,} tokens that training takes"
        found.append(
            (what, long, "they are refused (--skip-bad leaves them out): shorten or split them, or raise --max-length")
        )
    found += _mixed(everything) + _labels(given)
    taught = {e.group for e in given.get("train", ()) if e.group is not None}
    shared = [e for name in given if name != "train" for e in given[name] if e.group in taught]
    advice = "right where the same is asked in other words; to test on what is new, keep a group on one side"
    found.append(("of valid and test are of a group that is trained on too", shared, advice))
    return tuple(Remark(what, len(having), having[0].where, advice) for what, having, advice in found if having)


Found = tuple[str, list[Example], str]
"""What was found, the examples that have it, what to do."""


def _mixed(everything: Sequence[Example]) -> list[Found]:
    """Examples of a kind that is not that of most."""
    kinds: dict[str, list[Example]] = defaultdict(list)
    for e in everything:
        kinds["plain text" if e.is_text else "conversations" if e.label is None else "texts with a label"].append(e)
    most = max(kinds, key=lambda kind: len(kinds[kind]))
    return [
        (f"are {kind}, where most are {most}", held, "give one kind, unless both are meant")
        for kind, held in kinds.items()
        if kind != most
    ]


def _labels(given: dict[str, tuple[Example, ...]]) -> list[Found]:
    """Labels that are most likely one, and labels that cannot be learnt."""
    labelled = [e for split in given.values() for e in split if e.label is not None]
    counts = Counter(e.label for e in labelled)
    usual = {str(label).casefold(): label for label, _ in reversed(counts.most_common())}  # the most frequent spelling
    odd = [e for e in labelled if usual[str(e.label).casefold()] != e.label]
    known = {e.label for e in given.get("train", ())}
    unknown = [e for e in labelled if e.label not in known]
    return [
        ("have a label that differs from a more frequent one in case alone", odd, "write a label in one way"),
        ("have a label that no training example has", unknown, "add examples of it to training"),
    ]


def _describe(split: Sequence[Example], questions: Questions) -> SplitReport:
    said: dict[str, set[str]] = defaultdict(set)
    for example in split:
        said[" ".join(example.question.lower().split())].add(" ".join(example.answer.lower().split()))
    answers = [m for example in split for m in example.messages if m.role == "assistant" and m.learnt]
    return SplitReport(
        examples=len(split),
        answers=len(answers),
        words=_spread([_words(example) for example in split]),
        answer_words=_spread([len(m.text.split()) for m in answers]),
        near_duplicates=questions.repeated(split),
        contradictions=sum(len(found) > 1 for found in said.values()),
        checked=sum(example.is_scored for example in split),
        declining=sum(example.check is not None and example.check.declines for example in split),
        labels=dict(Counter(example.label for example in split if example.label is not None).most_common()),
    )


def _words(example: Example) -> int:
    """Words of a whole example, none of which takes less than a token."""
    return sum(len(message.text.split()) for message in example.messages)


def _spread(counts: list[int]) -> tuple[int, int, int]:
    ordered = sorted(counts) or [0]
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]
