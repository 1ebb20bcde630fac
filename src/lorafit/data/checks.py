"""Whether an answer passes the check of its example."""

from __future__ import annotations

import math
import re

import regex

from lorafit.data.equality import json_of, label_of, last_number
from lorafit.data.examples import Check

SECONDS = 2.0  # that the search for a pattern may take


def occurs(phrase: str, text: str) -> bool:
    """Whether the phrase occurs between word boundaries, in any case and white space.

    The point in 2.5 is not a boundary: "5 years" does not occur in "2.5 years".
    """
    inner = r"\s+".join(re.escape(word) for word in phrase.split())
    before = r"(?<!\w)(?<!\d[.,])" if phrase.strip()[0].isdigit() else r"(?<!\w)"
    after = r"(?!\w)(?![.,]\d)" if phrase.strip()[-1].isdigit() else r"(?!\w)"
    return re.search(before + inner + after, text, re.IGNORECASE) is not None


def is_right(answer: str, check: Check) -> bool:
    """Whether an answer passes every part of a check, as `Check` lists them."""
    number = None if check.number is None else last_number(answer, check.numerals)
    return (
        len(answer.split()) <= check.max_words
        and all(occurs(phrase, answer) for phrase in check.contains)
        and not any(occurs(phrase, answer) for phrase in check.lacks)
        and (check.label is None or label_of(answer) == label_of(check.label))
        and (check.exact is None or answer.strip() == check.exact.strip())
        and (check.json is None or json_of(answer) == check.json)
        and (check.number is None or (number is not None and math.isclose(number, check.number)))
        and (check.pattern is None or _matches(check.pattern, answer))
    )


def _matches(pattern: str, text: str) -> bool:
    """Whether a regular expression matches anywhere; a search that takes longer than SECONDS does not."""
    try:
        return regex.search(pattern, text, timeout=SECONDS) is not None
    except TimeoutError:
        return False
