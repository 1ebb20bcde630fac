"""Whether two answers are equal: as text, as JSON, as a label, as a number."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from typing import Any

from lorafit.data.examples import Example

# Notations of numbers: the decimal mark, then the separator of thousands, in the order in which they are tried.
NUMERALS = (".,", ",.", ", ", ". ", ".'")
_GAPS = "[ \u00a0\u2009\u202f]"  # spaces, of which three are narrow or break no line
_DIGITS = r"(?<![\w.])(?<!\d,)([-+\u2212]?)(\d+(?:[.,]\d+|['\u2019]\d{3}(?!\d)%s)*)((?:[eE][-+]?\d+)?)"


def folded(text: str) -> str:
    """The text without differences of case and white space, by which answers are compared."""
    return " ".join(unicodedata.normalize("NFC", text).split()).casefold()


def json_form(value: Any) -> str:
    """JSON data as one text, whatever the order of keys: 1.0 is 1, true is not 1."""
    return json.dumps(_whole(value), sort_keys=True, ensure_ascii=False)


def json_of(text: str) -> str | None:
    """The `json_form` of a text that is JSON; None for other texts."""
    try:
        return json_form(json.loads(text, parse_constant=refuse_constant))
    except (ValueError, RecursionError):  # a model may open brackets for ever
        return None


def compared(text: str) -> str:
    """The form in which answers are compared: a JSON object or array by its content, other texts `folded`."""
    content = json_of(text) if text.lstrip()[:1] in ("{", "[") else None
    return folded(text) if content is None else content


def is_equal(answer: str, reference: str) -> bool:
    """Whether an answer equals its reference: JSON objects and arrays by content, other texts in any case and white
    space."""
    return compared(answer) == compared(reference)


def label_of(text: str) -> str:
    """The form in which an answer is compared with a label: `folded`, without the full stop of a sentence. Nothing else
    is removed: A is not A+, toxic is not non-toxic."""
    return re.sub(r"(?<=[^\s.])[.。]$", "", folded(text))


def key_of(example: Example) -> str:
    """The form in which references are compared: calls by their meaning, words as `compared`."""
    return f"calls {[call.meaning for call in example.calls]}" if example.calls else compared(example.answer)


def last_number(text: str, numerals: str = NUMERALS[0]) -> float | None:
    """The last number of a text.

    Args:
        text: an answer.
        numerals: the notation, one of NUMERALS.

    Returns:
        The number; None where there is none, or where it has another notation: where the decimal mark is a point, 3,50
        is not a number, rather than 50.
    """
    decimal, separator = numerals[0], numerals[1]
    gap = {" ": _GAPS, "'": "['\u2019]"}.get(separator, re.escape(separator))
    numbers = re.findall(_DIGITS % (rf"|(?<!\d{{4}}){_GAPS}\d{{3}}(?!\d)" if separator == " " else ""), text)
    if not numbers:
        return None
    sign, digits, power = numbers[-1]
    written = rf"(?:\d+|\d{{1,3}}(?:{gap}\d{{3}})+)(?:{re.escape(decimal)}\d+)?"
    if not re.fullmatch(written, digits):
        return None
    digits = re.sub(gap, "", digits).replace(decimal, ".")
    return float(sign.replace("\u2212", "-") + digits + power)


def numerals_of(text: str, number: float) -> tuple[str, ...]:
    """The notations in which the last number of a text is this number."""
    numbers = {notation: last_number(text, notation) for notation in NUMERALS}
    return tuple(name for name, last in numbers.items() if last is not None and math.isclose(last, number))


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _whole(held) for key, held in value.items()}
    if isinstance(value, list):
        return [_whole(held) for held in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
