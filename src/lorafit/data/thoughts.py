"""Splits the text of an answer into its reasoning and the answer itself, whole or while it is generated.

Special tokens are left out of the text, except those in the marks of reasoning.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any


@dataclass(frozen=True)
class Thought:
    """The marks of reasoning in generated text.

    Args:
        opening: the mark before the reasoning.
        closing: the mark after it.
        opens: whether the prompt ends with the opening mark.
        special: special tokens in these marks.
        skipped: the mark before an answer without reasoning, such as the name of a channel; "" for none.
    """

    opening: str
    closing: str
    opens: bool
    special: frozenset[int]
    skipped: str = ""


def text_of(tokenizer: Any, ids: Sequence[int], special: Collection[int] = ()) -> str:
    """The text of token ids, without special tokens other than those in `special`."""
    texts = [""]
    for is_special, run in groupby(ids, key=lambda token: token in special):
        texts.append(tokenizer.decode([*run], skip_special_tokens=not is_special, clean_up_tokenization_spaces=False))
    return "".join(texts)


class Parts:
    """Splits the text of an answer into reasoning and answer while it is generated, both without white space around
    them. Text that may be the beginning of a mark, and white space at the end, is held back."""

    def __init__(self, thought: Thought | None):
        """thought: the marks of reasoning; None where all of the text is the answer."""
        self._thought = thought
        self._begun = thought is None  # whether it is known if the text begins with reasoning
        self._thinks = False
        self._held = ""
        self._reasoning, self._answer = _Trimmed(), _Trimmed()

    def add(self, text: str, ended: bool = False) -> tuple[str, str]:
        """Read more text, the last if `ended`, and return the reasoning and the answer that are certain now."""
        thought, reasoning = self._thought, ""
        self._held += text
        if thought is not None and not self._begun:
            text = self._held.lstrip()
            marked = text.startswith(thought.opening)
            marks = (thought.opening, thought.skipped)
            if not (marked or ended) and any(mark.startswith(text) and mark != text for mark in marks):
                return "", ""
            self._begun, self._thinks = True, marked or thought.opens
            if marked or (thought.skipped and text.startswith(thought.skipped)):
                self._held = text.removeprefix(thought.opening if marked else thought.skipped)
        if thought is not None and self._thinks:
            before, closing, after = self._held.partition(thought.closing)
            begun = next((n for n in range(len(thought.closing) - 1, 0, -1) if before.endswith(thought.closing[:n])), 0)
            kept = 0 if closing or ended else begun
            reasoning = self._reasoning.add(before[: len(before) - kept])
            self._held = after if closing else before[len(before) - kept :]
            self._thinks = not closing
            if self._thinks:
                return reasoning, ""
        held, self._held = self._held, ""
        return reasoning, self._answer.add(held)


class _Trimmed:
    """A text without white space around it, read in pieces."""

    def __init__(self) -> None:
        self._begun, self._space = False, ""

    def add(self, text: str) -> str:
        text = self._space + text if self._begun else text.lstrip()
        trimmed = text.rstrip()
        self._begun, self._space = self._begun or bool(trimmed), text[len(trimmed) :]
        return trimmed


def parted(text: str, thought: Thought | None) -> tuple[str, str]:
    """The reasoning and the answer of a whole text. thought: the marks; None where all of it is the answer."""
    return Parts(thought).add(text, ended=True)
