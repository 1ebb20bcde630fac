"""How the reasoning of an answer stands in its text, and how the two are told apart.

Where the marks between them are special tokens, these are told in the text, as no others are.
"""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import Any


@dataclass(frozen=True)
class Thought:
    """How reasoning and answer are told apart in a text that was generated: what stands before and after the reasoning.
    opens: whether the prompt has opened it already. special: tokens of these marks that are left out of texts
    elsewhere. skipped: what stands before an answer without reasoning in its place, as the name of a channel; "" where
    nothing does."""

    opening: str
    closing: str
    opens: bool
    special: frozenset[int]
    skipped: str = ""


def text_of(tokenizer: Any, ids: Sequence[int], special: Collection[int] = ()) -> str:
    """The text of token ids, without special tokens but those of `special`."""
    texts = [""]
    for is_special, run in groupby(ids, key=lambda token: token in special):
        texts.append(tokenizer.decode([*run], skip_special_tokens=not is_special, clean_up_tokenization_spaces=False))
    return "".join(texts)


class Parts:
    """The reasoning of an answer and the answer itself, apart, as its text comes, both without white space around them.
    What may be the beginning of a mark, or the end, waits."""

    def __init__(self, thought: Thought | None):
        """thought: how they are told apart; None where all is the answer."""
        self._thought = thought
        self._begun = thought is None  # whether it is known what the text begins with
        self._thinks = False
        self._held = ""
        self._reasoning, self._answer = _Trimmed(), _Trimmed()

    def add(self, text: str, ended: bool = False) -> tuple[str, str]:
        """Reasoning and answer that can be told now. ended: no more will come."""
        thought, reasoning = self._thought, ""
        self._held += text
        if thought is not None and not self._begun:
            said = self._held.lstrip()
            marked = said.startswith(thought.opening)
            begins = (thought.opening, thought.skipped)
            if not (marked or ended) and any(one.startswith(said) and one != said for one in begins):
                return "", ""
            self._begun, self._thinks = True, marked or thought.opens
            skips = thought.skipped and said.startswith(thought.skipped)
            self._held = (
                said.removeprefix(thought.opening if marked else thought.skipped) if marked or skips else (self._held)
            )
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
    """Text without white space around it, as it comes."""

    def __init__(self) -> None:
        self._begun, self._space = False, ""

    def add(self, text: str) -> str:
        text = self._space + text if self._begun else text.lstrip()
        told = text.rstrip()
        self._begun, self._space = self._begun or bool(told), text[len(told) :]
        return told


def parted(text: str, thought: Thought | None) -> tuple[str, str]:
    """The reasoning and the answer of a whole text. thought: how they are told apart; None where all is the answer."""
    return Parts(thought).add(text, ended=True)
