"""The data report: what is in the examples, before a model is opened.

Examples that have passed the checks go in; counts of each split, and remarks about what looks odd, come out.
"""

from __future__ import annotations

import re
import string
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lorafit.data.examples import Example, Examples
from lorafit.data.fields import BLANK
from lorafit.data.split import Questions
from lorafit.data.targets import CALLED, Spans

MANY = 10  # examples with the same answer, above which there is a remark
CUT = 100  # characters: shorter answers are not taken for cut off


@dataclass(frozen=True)
class SplitReport:
    """Counts of one split.

    Args:
        examples, answers: how many there are; only answers that are learnt.
        words: (shortest, median, longest) of whole examples.
        answer_words: (shortest, median, longest) of the answers.
        near_duplicates: examples that are near-identical to an earlier one.
        contradictions: prompts that occur with more than one answer.
        checked: examples with a check or with calls.
        declining: examples whose check asks to turn the question away.
        labels: how often each label is the answer, the most frequent first.
    """

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
    """Something odd that stops no run: what these examples have in common, how many there are, the place of the first,
    and what to do where it is not intended."""

    what: str
    examples: int
    first: str
    advice: str


@dataclass(frozen=True)
class DataReport:
    """Counts by split, fields that were passed over with their counts, remarks, and the digest of the content."""

    splits: dict[str, SplitReport]
    passed_over: dict[str, int]
    remarks: tuple[Remark, ...]
    digest: str


Test = Callable[[Example], bool]


def _holds(pattern: str) -> Test:
    regex = re.compile(pattern)
    return lambda example: any(regex.search(message.text) for message in example.messages)


def _answers(pattern: str) -> Test:
    regex = re.compile(pattern)
    return lambda example: not example.is_text and regex.search(example.answer) is not None


def _nothing(example: Example) -> bool:
    return not example.is_text and example.answer.strip(string.whitespace + ".!?-_<>()[]#*\"'").lower() in _NOTHING


def _echoes(example: Example) -> bool:
    return not example.is_text and example.answer.strip() == example.asked.strip()


def _roles(example: Example) -> list[str]:
    return [message.role for message in example.messages if message.role != "system"]


def _twice(role: str) -> Test:
    """Whether two messages of one role follow each other, with no answer of a tool between them."""
    return lambda example: (role, role) in pairwise(_roles(example))


def _begins_with_answer(example: Example) -> bool:
    return _roles(example)[:1] == ["assistant"]


def _late_system(example: Example) -> bool:
    return any(message.role == "system" for message in example.messages[1:])


def _says_nothing(role: str) -> Test:
    return lambda example: any(m.role == role and not m.text.strip(BLANK) for m in example.messages)


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
ODD: dict[str, tuple[Test, str]] = {
    "hold control characters": (_holds(_CONTROL), "letters were lost on the way, go back to the source"),
    "hold text read in a wrong encoding (â€™, Ã©)": (_holds(_MISREAD), "read the source as UTF-8"),
    "hold HTML": (_holds(_HTML), "strip it, unless answers should have some"),
    "hold an e-mail address": (_holds(_MAIL), _PRIVATE),
    "hold what looks like a telephone number": (_holds(_PHONE), _PRIVATE),
    "hold what looks like the number of a card, an account or a person": (_holds(_NUMBERS), _PRIVATE),
    "hold what looks like a key or password of a program": (_holds(_SECRET), _PRIVATE),
    "call tools that they do not describe": (_undescribed, "give each its tools, as requests will"),
    "have two messages of the user in a row": (_twice("user"), "give the answer between them, unless it was none"),
    "have two answers in a row": (_twice("assistant"), "give the question between them, or join them"),
    "begin with an answer, which is not learnt": (_begins_with_answer, "give the question before it, if there was one"),
    "have a system message that is not the first": (_late_system, "put it first, unless requests will not"),
    "have an empty question": (_says_nothing("user"), "fill it in, or leave the row out"),
    "have an empty answer that others follow": (_says_nothing("assistant"), "it is not learnt: fill in what was lost"),
    "answer with the question itself": (_echoes, "correct the answers"),
    "answer with a mark for nothing (N/A, null, TODO)": (_nothing, "fill them in, or leave them out"),
    "answer with blanks before or after": (_answers(r"^\s|\s$"), "strip them, they are learnt too"),
    "end an answer with a marker (###, END, </s>)": (
        _answers(_MARKER),
        "take it out: where an answer ends is learnt without it",
    ),
}


def describe(examples: Examples, questions: Questions | None = None, max_length: int | None = None) -> DataReport:
    """Describe examples that have passed the checks.

    Args:
        examples: all splits.
        questions: the index of these examples; None to build it.
        max_length: the most tokens of an example in training; None for no remark about long examples.
    """
    questions = questions or Questions.of(examples)
    splits = {name: split for name, split in examples.by_name().items() if split}
    fields = Counter(field for split in splits.values() for example in split for field in example.extra)
    counts = {name: _describe(split, questions) for name, split in splits.items()}
    return DataReport(counts, dict(fields), _remarks(splits, questions, max_length), examples.digest())


def _remarks(
    splits: dict[str, tuple[Example, ...]], questions: Questions, max_length: int | None
) -> tuple[Remark, ...]:
    everything = [example for split in splits.values() for example in split]
    findings = [(what, [e for e in everything if test(e)], advice) for what, (test, advice) in ODD.items()]
    answered = [example for example in everything if not example.is_text]
    answers = Counter(e.answer.strip().lower() for e in answered)
    share = 0.5 if any(e.label is None for e in answered) else 0.9  # a rare label is not odd
    for most, count in answers.most_common(1):
        if count > max(MANY, share * len(answered)):
            same = [e for e in answered if e.answer.strip().lower() == most]
            findings.append(("have the same answer", same, "give others, or an adapter learns to say nothing else"))
    longest = max((len(e.answer) for e in answered), default=0)
    cut = [e for e in answered if len(e.answer) == longest]
    if len(cut) > max(MANY, len(answered) // 20) and longest > CUT:
        what = f"have an answer of exactly {longest:,} characters, the longest length in the data"
        findings.append((what, cut, "compare them with the source: they may have been cut off"))
    if questions.by_answer:
        advice = "right for teaching a voice; else give the questions that were asked"
        findings.append(("ask one and the same thing, so that answers are what is held out", everything, advice))
    if max_length is not None:  # plain text is cut into pieces
        long = [e for e in everything if not e.is_text and _words(e) > max_length]
        words = max(map(_words, long), default=0)
        what = f"hold more words (up to {words:,}) than the {max_length:,} tokens that training takes"
        advice = "they are refused (--skip-bad leaves them out): shorten or split them, or raise --max-length"
        findings.append((what, long, advice))
    findings += _mixed(everything) + _label_findings(splits)
    trained = {e.group for e in splits.get("train", ()) if e.group is not None}
    shared = [e for name in splits if name != "train" for e in splits[name] if e.group in trained]
    advice = "keep it if the test asks the same in other words; to test on new facts, keep each group in one split"
    findings.append(("of valid and test belong to a group that is also in training", shared, advice))
    return tuple(Remark(what, len(having), having[0].where, advice) for what, having, advice in findings if having)


Finding = tuple[str, list[Example], str]
"""What is odd, the examples that have it, what to do."""


def _mixed(everything: Sequence[Example]) -> list[Finding]:
    """Examples of another kind than most."""
    kinds: dict[str, list[Example]] = defaultdict(list)
    for e in everything:
        other = "conversations" if e.label is None else "texts with a label"
        kinds["plain text" if e.is_text else CALLED[type(e.target)] if e.target else other].append(e)
    most = max(kinds, key=lambda kind: len(kinds[kind]))
    return [
        (f"are {kind}, where most are {most}", examples, "give one kind, unless both are meant")
        for kind, examples in kinds.items()
        if kind != most
    ]


def _label_findings(splits: dict[str, tuple[Example, ...]]) -> list[Finding]:
    """Labels that are most likely the same, and labels that cannot be learnt."""
    labelled = [e for split in splits.values() for e in split if e.label is not None]
    counts = Counter(e.label for e in labelled)
    usual = {_folded(label): label for label, _ in reversed(counts.most_common())}  # the most frequent spelling
    odd = [e for e in labelled if usual[_folded(e.label)] != e.label]
    known = {e.label for e in splits.get("train", ())}
    unknown = [e for e in labelled if e.label not in known]
    frequency = Counter(_folded(e.label) for e in labelled)
    single = [e for e in labelled if e.label in known and frequency[_folded(e.label)] == 1]
    few = "it is hardly learnt, and never tested: add examples of it, or leave it out"
    return [
        ("have a label that differs from a more frequent one only in case or spaces", odd, "write a label in one way"),
        ("have a label that no training example has", unknown, "add examples of it to training"),
        ("have a label that no other example has", single if len(single) < len(labelled) / 2 else [], few),
    ]


def _folded(label: str | None) -> str:
    """A label without case and spaces."""
    return "".join(str(label).casefold().split())


def _describe(split: Sequence[Example], questions: Questions) -> SplitReport:
    answers_to: dict[str, set[tuple[object, ...]]] = defaultdict(set)
    for example in split:
        answers_to[" ".join(example.question.lower().split())].add(_given(example))
    answers = [m for example in split for m in example.messages if m.role == "assistant" and m.learnt]
    return SplitReport(
        examples=len(split),
        answers=len(answers),
        words=_spread([_words(example) for example in split]),
        answer_words=_spread([len(m.text.split()) for m in answers]),
        near_duplicates=questions.repeated(split),
        contradictions=sum(len(answers) > 1 for answers in answers_to.values()),
        checked=sum(example.is_scored for example in split),
        declining=sum(example.check is not None and example.check.declines for example in split),
        labels=dict(Counter(example.label for example in split if example.label is not None).most_common()),
    )


def _given(example: Example) -> tuple[object, ...]:
    """The answer without case and spaces; of entities also their places, counted in characters that are not blank."""
    text = example.asked
    spans = example.target.spans if isinstance(example.target, Spans) else ()
    return " ".join(example.answer.lower().split()), *(len("".join(text[: one.start].split())) for one in spans)


def _words(example: Example) -> int:
    """Words of a whole example, none of which takes less than a token."""
    return sum(len(message.text.split()) for message in example.messages)


def _spread(counts: list[int]) -> tuple[int, int, int]:
    ordered = sorted(counts) or [0]
    return ordered[0], ordered[len(ordered) // 2], ordered[-1]
