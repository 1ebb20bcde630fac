"""Token ids become text as they come."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from typing import Any

from transformers.convert_slow_tokenizer import bytes_to_unicode

from lorafit.data.thoughts import text_of

_BYTES = {character: byte for byte, character in bytes_to_unicode().items()}  # as byte-level vocabularies write them


def token_bytes(tokenizer: Any, token: int) -> bytes:
    """The bytes of one token, also where they are part of a character. Where the tokenizer's vocabulary does not tell
    these, those of the replacement character."""
    text: str = tokenizer.decode([token], clean_up_tokenization_spaces=False)
    if "\ufffd" not in text:
        return text.encode()
    written = tokenizer.convert_ids_to_tokens(token) or ""
    if named := re.fullmatch("<0x([0-9A-F]{2})>", written):
        return bytes([int(named[1], 16)])
    found = bytes(_BYTES[character] for character in written if character in _BYTES)
    return found if found.decode(errors="replace") == text else text.encode()


class Words:
    """Whole characters of an answer whose tokens come one by one; what looks like the beginning of one waits.

    Each piece is decoded behind the one before it, for a token's text may depend on where it stands.
    """

    def __init__(self, tokenizer: Any, special: Collection[int] = ()):
        """special: special tokens that are told; all others are left out."""
        self._tokenizer, self._special = tokenizer, special
        self._ids: list[int] = []
        self._before = self._told = 0

    def add(self, ids: Sequence[int], ended: bool = False) -> str:
        """The text that can be told now. ended: no more will come."""
        self._ids += ids
        rest = self._ids[self._before :]
        known, text = (
            text_of(self._tokenizer, part, self._special) for part in (rest[: self._told - self._before], rest)
        )
        if len(text) <= len(known) or (text.endswith("\ufffd") and not ended):
            return ""
        self._before, self._told = self._told, len(self._ids)
        return text[len(known) :]


class Until:
    """Text up to the first of some stops. What may be the beginning of one is held back until it is known."""

    def __init__(self, stops: Sequence[str]):
        self._stops = tuple(stops)
        self._held = ""
        self.met = False

    def add(self, text: str, ended: bool = False) -> str:
        """The text that can be told now. ended: no more will come."""
        if self.met or not (text or ended):
            return ""
        self._held += text
        places = [place for stop in self._stops if (place := self._held.find(stop)) >= 0]
        if places:
            self.met = True
            told, self._held = self._held[: min(places)], ""
            return told
        lengths = ((stop, n) for stop in self._stops for n in range(1, min(len(stop), len(self._held) + 1)))
        begun = (n for stop, n in lengths if self._held.endswith(stop[:n]))
        keep = 0 if ended else max(begun, default=0)
        told, self._held = self._held[: len(self._held) - keep], self._held[len(self._held) - keep :]
        return told
