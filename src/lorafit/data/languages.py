"""Whether a base was trained on the language of the examples, estimated by the tokens that a word takes."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from lorafit.data.examples import Example

WORD, SIGNS = 5, 2  # letters that count as a word; signs of Chinese, Japanese and Korean that do
_SIGNS = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]")
# Tokens a word, above which a language is strange. SmolLM2, trained on English, takes 0.8 to 1.2 for English, 2 for
# German and French, 2.5 for Polish and 4.7 for Russian.
MANY = 2.4
OF_REFERENCE = 2.0  # and so many times those of a text that the base knows, for a base may read single bytes
LOOKED_AT, PIECE, REFERENCE = 200, 600, 4000  # examples; characters of each, and of the text they are compared with
FEWEST = 4  # words of an example, below which it is not judged
SHARE = 0.1  # of the examples, from which on it is reported


def tokens_a_word(tokenizer: Any, text: str) -> float | None:
    """Tokens for each word of a text, of which only the letters count; None for a text of hardly any letters."""
    letters = "".join(c if c.isalpha() or unicodedata.category(c)[0] == "M" else " " for c in text)
    signs, count = len(_SIGNS.findall(letters)), sum(map(str.isalpha, letters))
    words = (count - signs) / WORD + signs / SIGNS
    if words < FEWEST:
        return None
    return len(tokenizer(" ".join(letters.split()), add_special_tokens=False)["input_ids"]) / words


def strange_language(tokenizer: Any, examples: Sequence[Example], reference: str) -> str | None:
    """A warning where many examples are in a language that the base hardly knows; None otherwise.

    Args:
        tokenizer: of the base.
        examples: of which a sample is looked at.
        reference: a text in English, the language that a base of few languages most likely knows.
    """
    known = tokens_a_word(tokenizer, reference[:REFERENCE]) or 0.0
    rates: list[tuple[float, Example]] = []
    for example in examples[:: max(1, len(examples) // LOOKED_AT)]:
        rate = tokens_a_word(tokenizer, f"{example.answer[:PIECE]} {example.question[:PIECE]}")
        if rate is not None:
            rates.append((rate, example))
    odd = [(rate, example) for rate, example in rates if rate > max(MANY, OF_REFERENCE * known)]
    if not odd or len(odd) < SHARE * len(rates):
        return None
    mean = sum(rate for rate, _ in odd) / len(odd)
    return (
        f"{len(odd)} of {len(rates)} examples that were looked at are in a language or script that this base hardly "
        f"knows, first {odd[0][1].where}: {mean:.1f} tokens for a word, where English takes {known:.1f}: it will write "
        "it badly; take a base that was made from texts in this language"
    )
