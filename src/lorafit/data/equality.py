"""When two answers say the same: as text, as JSON, as a number."""

from __future__ import annotations

import json
import math
import re
import unicodedata
from typing import Any

from lorafit.data.examples import Example

# How numbers are written: the decimal mark, then what parts thousands, in the order in which they are tried.
NUMERALS = (".,", ",.", ", ", ". ", ".'")
_GAPS = "[ \u00a0\u2009\u202f]"  # blanks, of which three are narrow or break no line
_DIGITS = r"(?<![\w.])(?<!\d,)([-+\u2212]?)(\d+(?:[.,]\d+|['\u2019]\d{3}(?!\d)%s)*)((?:[eE][-+]?\d+)?)"


def folded(text: str) -> str:
    """The text whatever its case and white space, by which answers are compared."""
    return " ".join(unicodedata.normalize("NFC", text).split()).casefold()


def json_form(value: Any) -> str:
    """JSON data as one text, whatever the order of keys: 1.0 is 1, true is not 1."""
    return json.dumps(_whole(value), sort_keys=True, ensure_ascii=False)


def json_of(text: str) -> str | None:
    """The JSON that a text holds and nothing beside it, by `json_form`; None for other texts."""
    try:
        return json_form(json.loads(text, parse_constant=_refused))
    except (ValueError, RecursionError):  # a model may open brackets for ever
        return None


def compared(text: str) -> str:
    """What stands for an answer when answers are held against each other: a JSON object or array by its content,
    other texts `folded`."""
    found = json_of(text) if text.lstrip()[:1] in ("{", "[") else None
    return folded(text) if found is None else found


def label_of(text: str) -> str:
    """What stands for an answer when it is held against a label: `folded`, without the full stop of a sentence. Nothing
    else is taken from it: A is not A+, toxic is not non-toxic."""
    return re.sub(r"(?<=[^\s.])[.。]$", "", folded(text))


def key_of(example: Example) -> str:
    """What stands for a reference when references are held against each other: calls by their meaning, `compared` for
    words."""
    return f"calls {[call.meaning for call in example.calls]}" if example.calls else compared(example.answer)


def last_number(text: str, numerals: str = NUMERALS[0]) -> float | None:
    """The last number of a text, None where there is none, or where it is not written so: 3,50 is no number where the
    decimal mark is a point, rather than 50. numerals: one of NUMERALS."""
    decimal, parting = numerals[0], numerals[1]
    gap = {" ": _GAPS, "'": "['\u2019]"}.get(parting, re.escape(parting))
    found = re.findall(_DIGITS % (rf"|(?<!\d{{4}}){_GAPS}\d{{3}}(?!\d)" if parting == " " else ""), text)
    if not found:
        return None
    sign, digits, power = found[-1]
    written = rf"(?:\d+|\d{{1,3}}(?:{gap}\d{{3}})+)(?:{re.escape(decimal)}\d+)?"
    if not re.fullmatch(written, digits):
        return None
    digits = re.sub(gap, "", digits).replace(decimal, ".")
    return float(sign.replace("\u2212", "-") + digits + power)


def numerals_of(text: str, number: float) -> tuple[str, ...]:
    """The ways of writing numbers in which the last number of a text is this one."""
    return tuple(way for way in NUMERALS if (read := last_number(text, way)) is not None and math.isclose(read, number))


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _whole(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_whole(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _refused(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
