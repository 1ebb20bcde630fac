"""Text from token ids, as they come one by one, up to a stop text."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from lorafit.data.thoughts import text_of

_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # of byte-level vocabularies


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """The bytes of one token, even if they are only part of a character; those of the replacement character where the
    vocabulary does not show them."""
    text: str = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if "\ufffd" not in text:
        return text.encode()
    written = tokenizer.convert_ids_to_tokens(token) or ""
    if named := re.fullmatch("<0x([0-9A-F]{2})>", written):
        return bytes([int(named[1], 16)])
    bytes_ = bytes(_BYTES[character] for character in written if character in _BYTES)
    return bytes_ if bytes_.decode(errors="replace") == text else text.encode()


class Detokenizer:
    """Turns the tokens of an answer into text as they come. Bytes that may begin a character are held back.

    Each piece is decoded together with the piece before it, since the text of a token may depend on its position.
    """

    def __init__(self, tokenizer: Any, special: Collection[int] = ()):
        """special: special tokens that are part of the text; all others are left out."""
        self._tokenizer, self._special = tokenizer, special
        self._ids: list[int] = []
        self._before = self._done = 0  # where the last piece begins, and where it ends

    def add(self, ids: Sequence[int], ended: bool = False) -> str:
        """Add tokens; returns the text that is complete. ended: whether these are the last."""
        self._ids += ids
        rest = self._ids[self._before :]
        known, text = (
            text_of(self._tokenizer, part, self._special) for part in (rest[: self._done - self._before], rest)
        )
        if len(text) <= len(known) or (text.endswith("\ufffd") and not ended):
            return ""
        self._before, self._done = self._done, len(self._ids)
        return text[len(known) :]


class StopTexts:
    """Ends a text before the first of some stop texts. Text that may begin one is held back. met: whether one came."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.met = False

    def add(self, text: str, ended: bool = False) -> str:
        """Add text; returns what is known to come before a stop text. ended: whether this is the last."""
        if self.met or not (text or ended):
            return ""
        held = self._held + text
        places = [place for stop in self._stops if (place := held.find(stop)) >= 0]
        if places:
            self.met, self._held = True, ""
            return held[: min(places)]
        lengths = ((stop, n) for stop in self._stops for n in range(1, min(len(stop), len(held) + 1)))
        begun = (n for stop, n in lengths if held.endswith(stop[:n]))
        end = len(held) - (0 if ended else max(begun, default=0))
        self._held = held[end:]
        return held[:end]
