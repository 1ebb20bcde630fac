"""Whether a base was made from texts in the language of the examples, told by the tokens that a word takes."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from typing import Any

from lorafit.data.examples import Example

WORD, SIGNS = 5, 2  # letters that count as a word; so many of Chinese, Japanese and Korean do
_SIGNS = re.compile(r"[\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uac00-\ud7af]")
MANY = (
    2.4  # tokens a word. SmolLM2, made from English: English 0.8 to 1.2, German and French 2, Polish 2.5, Russian 4.7
)
OF_REFERENCE = 2.0  # and so many times those of a text the base can read, for one may read single bytes
LOOKED_AT, PIECE, REFERENCE = 200, 600, 4000  # examples; characters of each, and of the text it is compared with
FEWEST = 4  # words of an example without which nothing is told of it
SHARE = 0.1  # of the examples, from which on it is said


def tokens_a_word(tokenizer: Any, text: str) -> float | None:
    """Tokens for each word of a text, its letters alone; None for a text of hardly any."""
    said = "".join(c if c.isalpha() or unicodedata.category(c)[0] == "M" else " " for c in text)
    signs, letters = len(_SIGNS.findall(said)), sum(map(str.isalpha, said))
    words = (letters - signs) / WORD + signs / SIGNS
    if words < FEWEST:
        return None
    return len(tokenizer(" ".join(said.split()), add_special_tokens=False)["input_ids"]) / words


def strange_language(tokenizer: Any, examples: Sequence[Example], reference: str) -> str | None:
    """What there is to say where many examples are in a language that the base hardly knows; None elsewhere.

    Args:
        tokenizer: of the base.
        examples: some of them, spread over all, are looked at.
        reference: a text in English, which a base of few languages knows most likely.
    """
    known = tokens_a_word(tokenizer, reference[:REFERENCE]) or 0.0
    found: list[tuple[float, Example]] = []
    for example in examples[:: max(1, len(examples) // LOOKED_AT)]:
        rate = tokens_a_word(tokenizer, f"{example.answer[:PIECE]} {example.question[:PIECE]}")
        if rate is not None:
            found.append((rate, example))
    odd = [(rate, example) for rate, example in found if rate > max(MANY, OF_REFERENCE * known)]
    if not odd or len(odd) < SHARE * len(found):
        return None
    mean = sum(rate for rate, _ in odd) / len(odd)
    return (
        f"{len(odd)} of {len(found)} examples that were looked at are in a language or script that this base hardly "
        f"knows, first {odd[0][1].where}: {mean:.1f} tokens for a word, where English takes {known:.1f}: it will write "
        "it badly; take a base that was made from texts in this language"
    )
