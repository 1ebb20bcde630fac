"""Control tokens, with which a template marks turns, calls and reasoning, where they are spelt out in messages.

Such text would end a turn, or begin another's. In examples it is a problem; in prompts it is cut, and read as text.
"""

from __future__ import annotations

import re
from collections.abc import Sequence, Set
from contextlib import suppress
from dataclasses import replace
from functools import cached_property
from typing import Any

from lorafit.data.calls import CALLED, PROBE
from lorafit.data.examples import Message
from lorafit.data.writer import REASONED, ConversationWriter
from lorafit.errors import BaseError

CUT = "\ufdd0"  # separates the pieces of a message: a code that Unicode leaves to programs, and no text holds


class ControlTokens:
    """The control tokens of a base."""

    def __init__(self, tokenizer: Any, writer: ConversationWriter, rowless: Set[str]):
        """rowless: the tokens that the model has no row for."""
        self._tokenizer = tokenizer
        self._writer = writer
        self._rowless = rowless

    @cached_property
    def tokens(self) -> list[str]:
        """The tokenizer's named special tokens; other special tokens that the template writes around messages, calls,
        answers of tools, and reasoning; and tokens that the model has no row for."""
        talk = [Message("system", "a"), Message("user", "b"), Message("assistant", "c")]
        try:
            written = self._writer.write(talk, prompt=False)
        except BaseError:  # a template without a place for a system prompt
            written = self._writer.write(talk[1:], prompt=False)
        with suppress(BaseError):  # a template without a place for reasoning
            written += self._writer.write(REASONED, prompt=True)
        with suppress(BaseError):  # or for tools
            called = [*CALLED, Message("tool", "a", answers=CALLED[1].calls[0])]
            written += self._writer.write(called, True, [PROBE])
        marks = self._writer.marks | self._writer.thought.special
        added = self._tokenizer.added_tokens_decoder.items()
        others = [str(token) for i, token in added if token.special and (i in marks or str(token) in written)]
        return list(dict.fromkeys([*self._tokenizer.all_special_tokens, *others, *sorted(self._rowless)]))

    def spelt_in(self, texts: Sequence[str]) -> list[str]:
        """The control tokens that stand in the texts."""
        return [token for token in self.tokens if any(token in text for text in texts)]

    def removal(self, token: str) -> str:
        """What to do about a control token in a text, and why."""
        why = "has no row for it" if token in self._rowless else "would read it as the end or start of a turn"
        return f"remove it: the model {why}"

    def cut(self, message: Message) -> Message:
        """The message with every control token cut in two by CUT."""
        return replace(
            message,
            content=self.cut_text(message.content),
            reasoning=self.cut_text(message.reasoning),
            calls=tuple(replace(call, arguments=self.cut_text(call.arguments)) for call in message.calls),
        )

    def cut_text(self, text: str) -> str:
        """The text with every control token cut in two by CUT."""
        return self._beginnings.sub(lambda match: match[0] + CUT, text.replace(CUT, ""))

    @cached_property
    def _beginnings(self) -> re.Pattern[str]:
        """The first character of every control token."""
        return re.compile("|".join(f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in self.tokens))
