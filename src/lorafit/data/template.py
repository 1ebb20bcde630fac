"""The chat template of a base: turns as templates read them go in, text comes out."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Sequence
from datetime import datetime
from functools import cached_property
from typing import Any

from jinja2 import Environment, TemplateError, nodes
from jinja2.meta import find_undeclared_variables

from lorafit.adapters.rendering import Scalar
from lorafit.errors import BaseError

# For bases without a chat template: "User: ...\nAssistant: ...<eos>\n", a system prompt first on lines of its own,
# before all the token with which the tokenizer begins a text, if it does.
PLAIN_TEMPLATE = (
    "{{ begin }}"
    "{% for m in messages %}"
    "{% if m['role'] == 'system' %}{{ m['content'] + '\n\n' }}"
    "{% elif m['role'] == 'user' %}{{ 'User: ' + m['content'] + '\n' }}"
    "{% else %}{{ 'Assistant: ' + m['content'] + eos_token + '\n' }}{% endif %}"
    "{% endfor %}"
    "{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
CLOCK = "strftime_now"  # the function by which templates ask for the time
FROZEN_CLOCK = (  # defines it as a macro before a template, since transformers takes no functions: %d becomes the day
    "{% macro strftime_now(format) %}{% set result = namespace(text=format) %}"
    "{% for part, text in lorafit_now.items() %}{% set result.text = result.text.replace(part, text) %}{% endfor %}"
    "{{ result.text }}{% endmacro %}\n"
)
# Names that are given to every template, or that stand for them: no settings.
GIVEN = {"messages", "tools", "custom_tools", "documents", "add_generation_prompt", "begin", "lorafit_now"}
GIVEN |= {CLOCK, "raise_exception"}


class ChatTemplate:
    """A tokenizer's chat template with fixed settings, or the plain template where it has none."""

    def __init__(self, tokenizer: Any, eos: str, now: str | None, settings: Sequence[tuple[str, Scalar]]):
        """
        Args:
            tokenizer: of the base.
            eos: the text of the token that ends a turn.
            now: the time that the template reads, in ISO 8601; None for the current time at each call.
            settings: of the template, by name.

        Raises:
            BaseError: for several templates.
        """
        if isinstance(tokenizer.chat_template, dict):
            names = ", ".join(tokenizer.chat_template)
            raise BaseError(f"this base has several chat templates ({names}): leave one in its tokenizer_config.json")
        self._tokenizer = tokenizer
        self._source: str = tokenizer.chat_template or PLAIN_TEMPLATE
        self.now = now if CLOCK in self._source else None
        self.settings = tuple(sorted(settings, key=lambda setting: setting[0]))
        bos = tokenizer.bos_token if tokenizer("x")["input_ids"][:1] == [tokenizer.bos_token_id] else ""
        self._given = {**dict(self.settings), "begin": bos, "eos_token": eos}
        self._executed = self._source
        if self.now is not None:
            self._given["lorafit_now"] = _time_parts(datetime.fromisoformat(self.now))
            self._executed = FROZEN_CLOCK + self._source

    @property
    def hash(self) -> str:
        """SHA-256 of the template's text."""
        return hashlib.sha256(self._source.encode()).hexdigest()

    def write(self, turns: Sequence[dict[str, Any]], prompt: bool, tools: Sequence[str] = ()) -> str:
        """The text of a conversation.

        Args:
            turns: messages in the form that templates read.
            prompt: whether to end with the generation prompt.
            tools: tools that may be called, each as JSON.

        Raises:
            BaseError: where the template refuses the conversation.
        """
        try:
            text: str = self._tokenizer.apply_chat_template(
                turns,
                chat_template=self._executed,
                tokenize=False,
                add_generation_prompt=prompt,
                tools=[json.loads(tool) for tool in tools] or None,
                **self._given,
            )
        except Exception as error:  # a template is a program, and may fail in any way
            raise BaseError(
                f"the chat template of this base refuses the conversation ({error}): change one of the two"
            ) from error
        return text

    @cached_property
    def read_settings(self) -> frozenset[str]:
        """Names of the settings that the template reads."""
        return frozenset(name for name in _undefined_names(self._source) - GIVEN if not name.endswith("_token"))


def _undefined_names(template: str) -> set[str]:
    """Names that a template reads and does not define, or defines only where they are not given."""
    source = re.sub(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}", "", template)  # tags that only transformers knows
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
        names = find_undeclared_variables(tree)
    except TemplateError:  # the first rendering reports it
        return set()
    stored = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    tested = [test.node for test in tree.find_all(nodes.Test) if test.name in ("defined", "undefined")]
    tested += [call.node for call in tree.find_all(nodes.Filter) if call.name in ("default", "d") and call.node]
    return names - (stored - {node.name for node in tested if isinstance(node, nodes.Name)})


def _time_parts(now: datetime) -> dict[str, str]:
    """The parts of a time by their strftime codes; %-d is %d without leading zeros."""
    parts = {f"%{name}": now.strftime(f"%{name}") for name in "aAbBcCdDeFgGhHIjmMprRSTuUVwWxXyYzZ"}
    bare = {f"%-{name}": parts[f"%{name}"].lstrip("0 ") or "0" for name in "deHIjmMSy"}
    return {**bare, **parts, "%%": "%"}
