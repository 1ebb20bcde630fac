"""Messages become rows of token ids with a mask of what is trained.

The prompt of a row is exactly what generation will start from: the chat template over the messages before an
answer, with its generation prompt. The answer is what the template adds when that message is appended, up to and
including the end-of-turn token, without which an adapter never learns to stop. Masks come from comparing these
two texts, so they hold for any template, with or without markers for the assistant's part.
"""

from __future__ import annotations

import hashlib
import json
import os.path
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

from transformers import GenerationMixin

from lorafit.base import Base
from lorafit.data.calls import CALLED, OWN, PROBE, CallForm, Spelling, form_of, read, worded
from lorafit.data.examples import Call, Example, Message
from lorafit.errors import BaseError, DataError, Problem
from lorafit.records import Rendering

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


@dataclass(frozen=True)
class Row:
    """Token ids and, for each, whether it is trained (never the first). `example` is the place in its list."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    example: int

    @property
    def n_trained(self) -> int:
        return sum(self.trained)


CUT = "\ufdd0"  # where a message is cut into pieces: a code that Unicode leaves to programs, and no text holds


class Renderer:
    """One tokenizer with one rendering. Training, evaluation and chat all go through it."""

    def __init__(
        self, tokenizer: Any, system: str | None = None, stop_ids: Sequence[int] = (), context: int | None = None
    ):
        """stop_ids: tokens that end a turn beside the tokenizer's own. context: the most tokens the model reads."""
        if tokenizer is None:
            raise BaseError("this base has no tokenizer: open it from a model folder to train on text")
        self.tokenizer = tokenizer
        if isinstance(tokenizer.chat_template, dict):
            names = ", ".join(tokenizer.chat_template)
            raise BaseError(f"this base has several chat templates ({names}): leave one in its tokenizer_config.json")
        self.template: str = tokenizer.chat_template or PLAIN_TEMPLATE
        self.system = system
        self.context = context
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        self.stop_ids: tuple[int, ...] = tuple(dict.fromkeys([*eos, *stop_ids]))
        if not self.stop_ids:
            raise BaseError(
                "this base names no end-of-turn token, without which an adapter never learns to stop: name one as "
                "eos_token in its tokenizer_config.json"
            )

    @property
    def rendering(self) -> Rendering:
        digest = hashlib.sha256(self.template.encode()).hexdigest()
        return Rendering(digest, self.system)

    def pieces(self, row: Row) -> list[tuple[str, bool]]:
        """The text of a row as the model sees it, in pieces, each with whether it is trained."""
        cuts = [i for i in range(1, len(row.ids)) if row.trained[i] != row.trained[i - 1]]
        spans = zip([0, *cuts], [*cuts, len(row.ids)], strict=True)
        return [(self.tokenizer.decode(row.ids[start:end]), row.trained[start]) for start, end in spans]

    def require(self, rendering: Rendering) -> None:
        """Raise BaseError where an adapter was trained with another template than this one."""
        if rendering.template_hash != self.rendering.template_hash:
            raise BaseError(
                "the chat template of this base is not the one the adapter was trained with: "
                "restore the base's chat_template.jinja"
            )

    def text(self, messages: Sequence[Message], prompt: bool, tools: Sequence[str] = ()) -> str:
        """The template over the messages; with `prompt`, up to where an answer begins. tools: that may be called, as
        `read_tools` reads them."""
        if not (tools or any(m.calls or m.answers for m in messages)):
            return self._written([{"role": m.role, "content": m.content} for m in messages], prompt)
        if self._spelling is None:
            return self.text(worded(messages, tools), prompt)
        return self._spelled(self._spelling)(messages, prompt, tools)

    def _spelled(self, spelling: Spelling) -> Callable[[Sequence[Message], bool, Sequence[str]], str]:
        return lambda messages, prompt, tools: self._written([spelling.turn(m) for m in messages], prompt, tools)

    def _written(self, turns: list[dict[str, Any]], prompt: bool, tools: Sequence[str] = ()) -> str:
        begins = self._ids("x", whole=True)[:1] == [self.tokenizer.bos_token_id]
        if self.system is not None and turns[0]["role"] != "system":
            turns.insert(0, {"role": "system", "content": self.system})
        try:
            text: str = self.tokenizer.apply_chat_template(
                turns, chat_template=self.template, tokenize=False, add_generation_prompt=prompt,
                tools=[json.loads(tool) for tool in tools] or None,
                eos_token=self.tokenizer.eos_token or self.tokenizer.decode(self.stop_ids[:1]),
                begin=self.tokenizer.bos_token if begins else "",
            )  # fmt: skip
        except Exception as error:  # a template is a program: it may fail in any way
            raise BaseError(
                f"the chat template of this base refuses the conversation ({error}): change one of the two"
            ) from error
        return text

    def preamble(self) -> str:
        """What the template says of its own accord before a first user message; "" where it says nothing in words."""
        before = self.text([Message("user", "\0")], prompt=False).partition("\0")[0]
        for token in self._control:
            before = before.replace(token, " ")
        words = before.split()
        return " ".join(words) if len(words) > 3 else ""

    @cached_property
    def _style(self) -> tuple[Spelling | None, CallForm]:
        """How the template is given calls, and the form in which it writes them; no spelling where it is given words of
        ours instead. Arguments go as text only to a template that fails on objects: another would quote them."""
        ends = [self.tokenizer.decode([token]) for token in self.stop_ids]
        for empty, as_text in ((False, False), (False, True), (True, False), (True, True)):
            spelling = Spelling(empty, as_text)
            if as_text and self._takes_objects(replace(spelling, as_text=False)):
                continue
            with suppress(BaseError):
                if (form := form_of(self._spelled(spelling), ends)) is not None:
                    return spelling, form
        return None, OWN

    def _takes_objects(self, spelling: Spelling) -> bool:
        try:
            self._spelled(spelling)(CALLED, False, [PROBE])
        except BaseError:
            return False
        return True

    @property
    def _spelling(self) -> Spelling | None:
        return self._style[0]

    @property
    def call_form(self) -> CallForm:
        """How calls of tools stand in an answer."""
        return self._style[1]

    def read(self, ids: Sequence[int]) -> tuple[str, tuple[Call, ...]]:
        """Words and calls of an answer (token ids). What holds no whole calls is words."""
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
        # The marks of calls may be special tokens, so these are not passed over.
        text = self.tokenizer.decode(ids[:end], clean_up_tokenization_spaces=False)
        words, calls = read(self.call_form, text)
        return words.strip(), calls

    def controls(self, example: Example) -> list[str]:
        """Control tokens that stand in the messages, or in what tools are described by, as if they were text."""
        said = [*(message.text for message in example.messages), *example.tools]
        return [token for token in self._control if any(token in text for text in said)]

    @cached_property
    def _control(self) -> list[str]:
        """The tokenizer's named special tokens, and those of the others that the template writes around messages."""
        talk = [Message("system", "a"), Message("user", "b"), Message("assistant", "c")]
        try:
            written = self.text(talk, prompt=False)
        except BaseError:  # a template without a place for a system prompt
            written = self.text(talk[1:], prompt=False)
        marked = [str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special]
        named: list[str] = self.tokenizer.all_special_tokens
        return list(dict.fromkeys([*named, *(token for token in marked if token in written)]))

    def _ids(self, text: str, whole: bool = False) -> list[int]:
        """Token ids of a piece of text; of a `whole` one, with what the tokenizer puts around it."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=whole)["input_ids"]
        return ids

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[str] = ()) -> list[int]:
        """Token ids from which an answer to `messages` is generated. A control token that is spelt out in a message, or
        in a tool, is read as the text that it is, piece by piece: no message ends its turn, or begins another's."""
        said = [*(message.text for message in messages), *tools]
        if not any(token in text for token in self._control for text in said):
            return self._ids(self.text(messages, prompt=True, tools=tools))
        begins = re.compile("|".join(f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in self._control))

        def cut(text: str) -> str:
            return begins.sub(lambda found: found[0] + CUT, text.replace(CUT, ""))

        pieces = [
            replace(one, content=cut(one.content),
                    calls=tuple(replace(call, arguments=cut(call.arguments)) for call in one.calls))
            for one in messages
        ]  # fmt: skip
        text = self.text(pieces, prompt=True, tools=[cut(tool) for tool in tools])
        return [token for piece in text.split(CUT) for token in self._ids(piece)]

    def _answer_ids(self, prompt: str, prompt_ids: list[int], answer: str) -> list[int]:
        """Ids of the answer as they follow the prompt's, whose own ids must not change under it."""
        whole = self._ids(prompt + answer)
        ids = whole[len(prompt_ids) :] if whole[: len(prompt_ids)] == prompt_ids else self._ids(answer)
        last = max((i for i, token in enumerate(ids) if token in self.stop_ids), default=None)
        return [*ids, self.stop_ids[0]] if last is None else ids[: last + 1]

    def rows(self, example: Example, index: int) -> list[Row]:
        """One row with every answer trained, but those marked as not to be learnt; or one row per answer, where the
        template writes earlier turns differently once later ones follow (then no single text is what the model sees at
        each answer).

        Plain text is no conversation: no template, every token trained, the end of the text included."""
        if example.is_text:
            ids = [*self._ids(example.answer, whole=True), self.stop_ids[0]]
            return [Row(tuple(ids), (False, *[True] * (len(ids) - 1)), index)]
        turns = [i for i, message in enumerate(example.messages) if message.role == "assistant" and message.learnt]
        built = [self._turn(example.messages, i, example.tools) for i in turns]
        ids, trained = built[0]
        for next_ids, next_trained in built[1:]:
            if next_ids[: len(ids)] != ids:
                return [Row(tuple(a), tuple(b), index) for a, b in built]
            ids, trained = next_ids, trained + next_trained[len(trained) :]
        return [Row(tuple(ids), tuple(trained), index)]

    def _turn(
        self, messages: Sequence[Message], i: int, tools: Sequence[str] = ()
    ) -> tuple[list[int], list[bool]]:  # fmt: skip
        """Ids up to the end of answer i, and the mask that trains only that answer."""
        before = self.text(messages[:i], prompt=True, tools=tools)
        after = self.text(messages[: i + 1], prompt=False, tools=tools)
        head = before
        if not after.startswith(before):
            # A generation prompt that the finished turn does not repeat whole, as where it opens <think>: the answer
            # begins where finished turns with other words begin to differ, and still follows the whole prompt.
            others = [self.text([*messages[:i], Message("assistant", word)], False, tools) for word in "xy"]
            head = os.path.commonprefix(others)  # noqa: RUF071 (of text, not of paths)
            if not (before.startswith(head) and after.startswith(head)):
                raise BaseError(
                    "the chat template rewrites the conversation when an answer is added, so what is trained "
                    "cannot be told apart: give the base a template that only appends"
                )
        answer = after[len(head) :]
        for message in messages[: i + 1]:
            said = answer if message is messages[i] else before
            quoted = json.dumps(message.content, ensure_ascii=False)[1:-1] if message.role == "tool" else ""
            shown = _holds(said, message.content) or (quoted and _holds(said, quoted))  # as JSON, as some write it
            if (message.role != "assistant" or said is answer) and not shown:
                fix = "leave its words out, or " * bool(message.calls)
                raise BaseError(
                    f"the chat template of this base leaves out or changes what the {message.role} message says: {fix}"
                    "give the base a template that renders messages whose content is text"
                )
        prompt_ids = self._ids(before)
        answer_ids = self._answer_ids(before, prompt_ids, answer)
        self._require_read(messages[i], answer_ids)
        trained = [False] * len(prompt_ids) + [True] * len(answer_ids)
        return prompt_ids + answer_ids, [False, *trained[1:]]  # nothing comes before the first token

    def _require_read(self, message: Message, ids: Sequence[int]) -> None:
        """Raise BaseError unless the calls of an answer are read from its ids (what is scored, and served)."""
        if not message.calls:
            return
        words, calls = self.read(ids)
        wanted = [call.meaning for call in message.calls]
        if [call.meaning for call in calls] != wanted or not _holds(words, message.content):
            raise BaseError(
                "the calls of an answer cannot be read back from what the chat template of this base writes: leave out "
                "its words, or all but one call, or what looks like the mark of a call"
            )


def _pieces(row: Row, longest: int) -> list[Row]:
    """A long text in rows of at most `longest` tokens. Each begins with the last token of the one before, so that every
    token but the first is predicted once."""
    starts = range(0, max(1, len(row.ids) - 1), longest - 1)
    return [Row(row.ids[i : i + longest], (False, *row.trained[i + 1 : i + longest]), row.example) for i in starts]


def _holds(text: str, content: str) -> bool:
    return " ".join(content.split()) in " ".join(text.split())


def renderer_for(base: Base, system: str | None = None) -> Renderer:
    """The renderer of a base: its template, and every token with which its model may end a turn."""
    said = base.model.generation_config.eos_token_id if isinstance(base.model, GenerationMixin) else None
    stops = [] if said is None else [said] if isinstance(said, int) else list(said)
    return Renderer(base.tokenizer, system, stops, base.context)


def render(renderer: Renderer, examples: Sequence[Example], max_length: int) -> list[Row]:
    """Rows of all examples. Raises DataError naming every example that is longer than `max_length` tokens or than
    the base reads (an answer is never cut), or has nothing to learn."""
    rows: list[Row] = []
    problems = []
    limit, fix_length = max_length, "shorten it, remove the line, or raise --max-length"
    if renderer.context is not None and renderer.context < max_length:
        limit, fix_length = renderer.context, "shorten it, or remove the line: this base reads no more"
    for index, example in enumerate(examples):
        try:
            controls = renderer.controls(example)
            for control in controls:
                fix = "remove it: the model would read it as the end or start of a turn"
                problems.append(Problem(example.where, f"holds the control token {control!r} in a message", fix))
            if controls:
                continue
            built = renderer.rows(example, index)
        except BaseError as error:
            raise BaseError(f"{example.where}: {error}") from error  # which says what to do
        if example.is_text:
            built = [piece for row in built for piece in _pieces(row, limit)]
        for row in built:
            if len(row.ids) > limit:
                problems.append(Problem(example.where, f"{len(row.ids)} tokens, the limit is {limit}", fix_length))
            elif row.n_trained == 0:
                problems.append(Problem(example.where, "nothing to learn in it", "fill in the answer"))
            rows.append(row)
    if problems:
        raise DataError(problems)
    return rows
