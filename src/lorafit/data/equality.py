"""When two answers say the same: as text, as JSON, as a number."""

from __future__ import annotations

import json
import re
import unicodedata
from typing import Any

from lorafit.data.examples import Example

_NUMBER = re.compile(r"(?<![\w.])[-+\u2212]?\d+(?:,\d{3})*(?:\.\d+)?(?:[eE][-+]?\d+)?")


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


def last_number(text: str) -> float | None:
    """The last number of a text, in which a comma may part thousands; None where there is none."""
    found = _NUMBER.findall(text)
    return float(found[-1].replace(",", "").replace("\u2212", "-")) if found else None


def _whole(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _whole(one) for key, one in value.items()}
    if isinstance(value, list):
        return [_whole(one) for one in value]
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _refused(name: str) -> None:
    raise ValueError(f"{name} is no JSON")
