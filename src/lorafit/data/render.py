"""Messages become rows of token ids with a mask of what is trained.

The prompt of a row is exactly what generation will start from: the chat template over the messages before an
answer, with its generation prompt, and with what the template itself writes before an answer that has no reasoning
(an empty thought, the name of a channel). The answer is what the template adds when that message is appended, up to and
including the token with which it ends a turn, without which an adapter never learns to stop. Masks come from comparing
these texts, so they hold for any template, with or without markers for the assistant's part.
"""

from __future__ import annotations

import difflib
import hashlib
import json
import os.path
import re
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass, field, replace
from datetime import datetime
from functools import cached_property, partial
from typing import Any, Literal

from jinja2 import Environment, TemplateError, nodes
from jinja2.meta import find_undeclared_variables
from transformers import GenerationMixin

from lorafit.adapters.rendering import Rendering, Scalar
from lorafit.bases.base import Base
from lorafit.data.calls import CALLED, OWN, PROBE, CallForm, Spelling, form_of, read, worded
from lorafit.data.examples import Call, Example, Message
from lorafit.data.messages import THOUGHT, with_thought
from lorafit.data.thoughts import Thought, parted, text_of
from lorafit.errors import BaseError, DataError, Problem, SettingsError

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
    """Token ids and, for each, whether it is trained (never the first). `example` is the place in its list. reasoning:
    for each token, whether it is of an answer's reasoning; empty where none is."""

    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    example: int
    reasoning: tuple[bool, ...] = field(default=(), repr=False)  # digests of format 1 are over the repr

    @property
    def n_trained(self) -> int:
        return sum(self.trained)

    def only(self, reasoning: bool) -> Row:
        """The row with nothing trained but the reasoning of its answers, or all that is none."""
        of = self.reasoning or (False,) * len(self.ids)
        return replace(self, trained=tuple(a and b == reasoning for a, b in zip(self.trained, of, strict=True)))


CUT = "\ufdd0"  # where a message is cut into pieces: a code that Unicode leaves to programs, and no text holds
PLAINLY = Spelling(empty=True, as_text=False)  # of a conversation without calls, which all spell alike
ASKED = (Message("user", "a"),)
SAID, REASONED = "zkw", "qvx"  # an answer and its reasoning, by which a template is asked what it writes around them
CLOCK = "strftime_now"  # by which templates ask for the time; transformers passes them no functions, but a macro may be
FROZEN_CLOCK = (  # written before them: names of parts of the time, such as %d, are replaced by what they are
    "{% macro strftime_now(format) %}{% set told = namespace(text=format) %}"
    "{% for part, text in lorafit_now.items() %}{% set told.text = told.text.replace(part, text) %}{% endfor %}"
    "{{ told.text }}{% endmacro %}\n"
)
GIVEN = {  # names that we give, or take the place of what we give
    "messages",
    "tools",
    "custom_tools",
    "documents",
    "add_generation_prompt",
    "begin",
    "lorafit_now",
    CLOCK,
    "raise_exception",
}
REWRITES = (
    "the chat template rewrites the conversation when an answer is added, so what is trained cannot be told apart: "
    "give the base a template that only appends"
)
Place = Literal["field", "inline", "opened"]
"""Where a template has a place for reasoning: a field of the message, the beginning of its content, or the generation
prompt, which opens a thought that finished turns leave out."""


class Renderer:
    """One tokenizer with one rendering. Training, evaluation and chat all go through it."""

    def __init__(
        self,
        tokenizer: Any,
        system: str | None = None,
        stop_ids: Sequence[int] = (),
        context: int | None = None,
        *,
        vocabulary: int | None = None,
        now: str | None = None,
        settings: Sequence[tuple[str, Scalar]] = (),
        reasoning: bool = False,
    ):
        """
        Args:
            system: put before conversations that bring no system prompt; "" is none.
            stop_ids: tokens that end a turn beside the tokenizer's own and the template's.
            context: the most tokens the model reads.
            vocabulary: the token ids that the model has a row for are below it; None: all.
            now: the time that the template is told, in ISO 8601; None: that of the moment.
            settings: of the template, by name.
            reasoning: whether answers may begin with their reasoning. False: prompts end in what the template itself
                writes before an answer without one.

        Raises:
            BaseError: no tokenizer, several templates, no token that ends a turn, or a template that writes tokens
                which the model has no row for.
        """
        if tokenizer is None:
            raise BaseError("this base has no tokenizer: open it from a model folder to train on text")
        self.tokenizer = tokenizer
        if isinstance(tokenizer.chat_template, dict):
            names = ", ".join(tokenizer.chat_template)
            raise BaseError(f"this base has several chat templates ({names}): leave one in its tokenizer_config.json")
        self.template: str = tokenizer.chat_template or PLAIN_TEMPLATE
        self.system = system
        self.context = context
        self.now = now if CLOCK in self.template else None
        self._clock = {} if self.now is None else {"lorafit_now": _parts_of(datetime.fromisoformat(self.now))}
        self.settings = tuple(sorted(settings, key=lambda one: one[0]))
        self.reasoning = reasoning
        self._vocabulary = vocabulary
        added = tokenizer.added_tokens_decoder.items()
        self.rowless = frozenset(str(token) for i, token in added if self._beyond([i]))
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        stops = dict.fromkeys([*eos, *stop_ids])
        self.stop_ids: tuple[int, ...] = tuple(i for i in stops if not self._beyond([i]))
        if self.rowless:
            self._require_template()
        if not self.stop_ids:
            raise BaseError(
                "this base names no end-of-turn token that its model can write, without which an adapter never learns "
                "to stop: name one as eos_token in its tokenizer_config.json"
            )
        self._tail = self._after_answers()
        self._special = frozenset(i for i, token in added if token.special)
        ends = self._special.union(self.stop_ids)
        self._end = next((token for token in self._ids(self._tail) if token in ends), None)
        if self._end is not None:
            self.stop_ids = tuple(dict.fromkeys([*self.stop_ids, self._end]))

    def reads(self, setting: str) -> bool:
        """Whether the template reads a setting of this name."""
        return setting in self._read_settings

    @cached_property
    def _read_settings(self) -> frozenset[str]:
        return frozenset(name for name in _settings_of(self.template) - GIVEN if not name.endswith("_token"))

    def require_settings(self) -> None:
        """Raise SettingsError for the first setting that the template does not read, or whose text is no mere text."""
        for name, value in self.settings:
            if not self.reads(name):
                near = difflib.get_close_matches(name, sorted(self._read_settings), n=1)
                fix = f"did you mean {near[0]}?" if near else "leave it out"
                raise SettingsError(f"--template {name}: the chat template of this base reads no such setting: {fix}")
            for control in (token for token in self._control if token in value) if isinstance(value, str) else ():
                raise SettingsError(f"--template {name}: holds the control token {control!r}: {self.removal(control)}")

    @property
    def rendering(self) -> Rendering:
        digest = hashlib.sha256(self.template.encode()).hexdigest()
        plain = not self.reasoning and (self._has_preface or self._thought.opens)  # it makes a difference
        return Rendering(digest, self.system, self.now, self.settings, not plain)

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
        """The template over the messages; with `prompt`, with its generation prompt. tools: that may be called, as
        `read_tools` reads them."""
        reasoned = any(message.reasoning for message in messages)
        return self._text(messages, prompt, self._place if reasoned else None, tools)

    def _text(self, messages: Sequence[Message], prompt: bool, place: Place | None, tools: Sequence[str] = ()) -> str:
        if not (tools or any(m.calls or m.answers for m in messages)):
            return self._spelled(PLAINLY, messages, prompt, place=place)
        if self._spelling is None:
            return self._spelled(PLAINLY, worded(messages, tools), prompt, place=place)
        return self._spelled(self._spelling, messages, prompt, tools, place)

    def _spelled(
        self,
        spelling: Spelling,
        messages: Sequence[Message],
        prompt: bool,
        tools: Sequence[str] = (),
        place: Place | None = None,
    ) -> str:
        turns = [_turn_of(message, place, spelling) for message in messages]
        if turns[0]["role"] == "system" and not turns[0]["content"].strip():
            turns = turns[1:]  # an empty one is none
        elif self.system and turns[0]["role"] != "system" and self._has_system:
            turns.insert(0, {"role": "system", "content": self.system})
        elif self.system and turns[0]["role"] == "user":
            turns[0] = {"role": "user", "content": f"{self.system}\n\n{turns[0]['content']}"}
        if turns[0]["role"] != "system" and self._silences:
            turns.insert(0, {"role": "system", "content": ""})
        return self._rendered(turns, prompt, tools)

    def _rendered(self, turns: list[dict[str, Any]], prompt: bool, tools: Sequence[str] = ()) -> str:
        begins = self._ids("x", whole=True)[:1] == [self.tokenizer.bos_token_id]
        given = {**dict(self.settings), **self._clock, "begin": self.tokenizer.bos_token if begins else ""}
        eos = self.tokenizer.eos_token or self.tokenizer.decode(self.stop_ids[:1])
        try:
            text: str = self.tokenizer.apply_chat_template(
                turns,
                chat_template=FROZEN_CLOCK + self.template if self._clock else self.template,
                tokenize=False,
                add_generation_prompt=prompt,
                tools=[json.loads(tool) for tool in tools] or None,
                eos_token=eos,
                **given,
            )
        except Exception as error:  # a template is a program: it may fail in any way
            raise BaseError(
                f"the chat template of this base refuses the conversation ({error}): change one of the two"
            ) from error
        return text

    @cached_property
    def _silences(self) -> bool:
        """Whether no system prompt is wanted, and an empty one keeps the template from speaking of its own accord."""
        asked = [{"role": "user", "content": "\0"}]
        with suppress(BaseError):
            if self.system == "" and self._own_words(self._rendered(asked, prompt=False)):
                return not self._own_words(self._rendered([{"role": "system", "content": ""}, *asked], prompt=False))
        return False

    @cached_property
    def _has_system(self) -> bool:
        """Whether the template has a place for a system message."""
        asked = [{"role": "system", "content": SAID}, {"role": "user", "content": "a"}]
        with suppress(BaseError):
            return SAID in self._rendered(asked, prompt=True)
        return False

    @cached_property
    def _place(self) -> Place | None:
        """Where the template has a place for the reasoning of an answer."""
        talk = (*ASKED, Message("assistant", SAID, reasoning=REASONED))
        places: tuple[Place, ...] = ("field", "inline")
        for place in places:
            with suppress(BaseError):
                said = self._text(talk, False, place)
                if 0 <= said.find(REASONED) < said.find(SAID):
                    return place
        with suppress(BaseError):
            if self._text(ASKED, True, None).rstrip().endswith(THOUGHT[0]):
                return "opened"
        return None

    @cached_property
    def plain(self) -> Renderer:
        """The same rendering for answers that are to begin without reasoning."""
        found = copy(self)
        found.reasoning = False
        return found

    @property
    def thought(self) -> Thought | None:
        """How reasoning and answer are told apart in what is generated; None where all of it is the answer."""
        return self._thought if self.reasoning else None

    @property
    def told(self) -> frozenset[int]:
        """Special tokens that are told in the text of an answer, for they tell its reasoning apart."""
        return self.thought.special if self.thought else frozenset()

    @cached_property
    def _thought(self) -> Thought:
        opening, closing, opens, skipped = *THOUGHT, self._place == "opened", ""
        if self._place in ("field", "inline"):
            opened = self.start(ASKED, reasoning=True)
            said = self.text((*ASKED, Message("assistant", SAID, reasoning=REASONED)), prompt=False)
            before, _, after = said.partition(REASONED)
            found = before[len(opened) :].strip() if before.startswith(opened) else opening
            opening, closing, opens = found or opening, after.partition(SAID)[0].strip() or closing, not found
            plain = self.text((*ASKED, Message("assistant", SAID)), prompt=False)
            lead = plain[len(opened) :].partition(SAID)[0].strip() if plain.startswith(opened) else ""
            skipped = "" if opens or lead.startswith(opening) else lead
        return Thought(opening, closing, opens, self._special_in(f"{opening} {closing} {skipped}"), skipped)

    def _special_in(self, text: str) -> frozenset[int]:
        return self._special.intersection(self._ids(text))

    def start(self, messages: Sequence[Message], reasoning: bool, tools: Sequence[str] = ()) -> str:
        """The text that an answer to the messages follows: one with reasoning, or one without. tools: that it may call,
        as `read_tools` reads them."""
        opened = self.text(messages, True, tools)
        apart = reasoning and self._place != "inline"  # else the template takes it for the answer, or part of it
        return opened if apart or not self._has_preface else self._past_preface(messages, opened, tools)

    def _past_preface(self, messages: Sequence[Message], opened: str, tools: Sequence[str] = ()) -> str:
        """A prompt with what finished turns have before an answer, whatever it says or calls. Raises BaseError."""
        head = self._head(messages, Message("assistant", SAID), tools)
        if tools:
            called = self.text([*messages, CALLED[1]], False, tools)
            head = os.path.commonprefix([head, called])  # noqa: RUF071 (of text, not of paths)
        if opened.startswith(head):
            return opened
        if not head.startswith((opened, self.text(messages, False, tools))):
            raise BaseError(REWRITES)
        return head

    @cached_property
    def _has_preface(self) -> bool:
        with suppress(BaseError):
            opened = self.text(ASKED, prompt=True)
            return self._past_preface(ASKED, opened) != opened
        return False

    def _head(self, messages: Sequence[Message], message: Message, tools: Sequence[str]) -> str:
        """What finished turns begin with whatever the message says, or thinks, without spaces that words may begin
        with."""
        plain = replace(message, calls=())
        others = [replace(plain, reasoning=word) if plain.reasoning else replace(plain, content=word) for word in "xy"]
        said = [self.text([*messages, other], False, tools) for other in others]
        return os.path.commonprefix(said).rstrip(" ")  # noqa: RUF071 (of text, not of paths)

    def _after_answers(self) -> str:
        """What the template writes after an answer: the first special token in it ends a turn."""
        with suppress(BaseError):
            return self._text((*ASKED, Message("assistant", SAID)), False, None).rpartition(SAID)[2]
        return ""

    def preamble(self) -> str:
        """What the template says of its own accord before a first user message; "" where it says nothing in words."""
        return self._own_words(self.text([Message("user", "\0")], prompt=False))

    def _own_words(self, text: str) -> str:
        """What stands before the message that is \\0, without special tokens; "" where these are no words."""
        before = text.partition("\0")[0]
        for token in (str(token) for token in self.tokenizer.added_tokens_decoder.values() if token.special):
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
                if (form := form_of(partial(self._spelled, spelling), ends)) is not None:
                    return spelling, form
        return None, OWN

    def _takes_objects(self, spelling: Spelling) -> bool:
        try:
            self._spelled(spelling, CALLED, False, [PROBE])
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

    @cached_property
    def marks(self) -> frozenset[int]:
        """Special tokens that the marks of calls are made of."""
        form = self.call_form
        return self._special_in(form.opens + form.between + (form.joins or "") + form.closes)

    def read(self, ids: Sequence[int]) -> tuple[str, tuple[Call, ...]]:
        """Words and calls of an answer (token ids), without its reasoning. What holds no whole calls is words."""
        return self._read(ids, self.thought)

    def _read(self, ids: Sequence[int], thought: Thought | None) -> tuple[str, tuple[Call, ...]]:
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
        told = self.marks | (thought.special if thought else frozenset())
        words, calls = read(self.call_form, parted(text_of(self.tokenizer, ids[:end], told), thought)[1])
        return words.strip(), calls

    def controls(self, example: Example) -> list[str]:
        """Control tokens that stand in the messages, or in what tools are described by, as if they were text."""
        texts = _texts(example.messages, example.tools)
        return [token for token in self._control if any(token in text for text in texts)]

    def removal(self, control: str) -> str:
        """What to do about a control token in a message, and why."""
        why = "has no row for it" if control in self.rowless else "would read it as the end or start of a turn"
        return f"remove it: the model {why}"

    @cached_property
    def _control(self) -> list[str]:
        """The tokenizer's named special tokens, those of the others that the template writes around messages, calls,
        what tools answer, and reasoning, and those that the model has no row for."""
        talk = [Message("system", "a"), Message("user", "b"), Message("assistant", "c")]
        try:
            written = self.text(talk, prompt=False)
        except BaseError:  # a template without a place for a system prompt
            written = self.text(talk[1:], prompt=False)
        others: list[tuple[list[Message], list[str]]] = [
            ([*ASKED, Message("assistant", SAID, reasoning=REASONED)], []),
            ([*CALLED, Message("tool", "a", answers=CALLED[1].calls[0])], [PROBE]),
        ]
        for messages, tools in others:
            with suppress(BaseError):  # which has no place for them
                written += self.text(messages, True, tools)
        marks = self.marks | self._thought.special
        special = [(i, str(token)) for i, token in self.tokenizer.added_tokens_decoder.items() if token.special]
        named: list[str] = self.tokenizer.all_special_tokens
        others_written = (token for i, token in special if i in marks or token in written)
        return list(dict.fromkeys([*named, *others_written, *sorted(self.rowless)]))

    def _beyond(self, ids: Sequence[int]) -> list[int]:
        """Those of some token ids that the model has no row for."""
        return [] if self._vocabulary is None else [i for i in ids if i >= self._vocabulary]

    def _known(self, ids: list[int]) -> list[int]:
        """The same token ids. Raises BaseError for the first that the model has no row for."""
        if beyond := self._beyond(ids):
            token = self.tokenizer.convert_ids_to_tokens(beyond[0])
            raise BaseError(
                f"{token!r} is written, for which the model of this base has no row (token {beyond[0]}, where it has "
                f"{self._vocabulary}): copy the tokenizer that the model came with, or resize the model "
                "(resize_token_embeddings) and save it"
            )
        return ids

    def _require_template(self) -> None:
        """Raise BaseError where every conversation would hold a token that the model has no row for."""
        written = ""
        with suppress(BaseError):  # a template that refuses this: rendering tells why
            written = self._text((*ASKED, Message("assistant", SAID)), False, None) + self._text(ASKED, True, None)
        self._known(self._ids(written, whole=True))

    def _ids(self, text: str, whole: bool = False) -> list[int]:
        """Token ids of a piece of text; of a `whole` one, with what the tokenizer puts around it."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=whole)["input_ids"]
        return ids

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[str] = ()) -> list[int]:
        """Token ids from which an answer to `messages` is generated. A control token that is spelt out in a message, or
        in a tool, is read as the text that it is, piece by piece: no message ends its turn, or begins another's."""
        texts = _texts(messages, tools)
        if not any(token in text for token in self._control for text in texts):
            return self._known(self._ids(self.start(messages, self.reasoning, tools)))
        begins = re.compile("|".join(f"{re.escape(token[0])}(?={re.escape(token[1:])})" for token in self._control))

        def cut(text: str) -> str:
            return begins.sub(lambda found: found[0] + CUT, text.replace(CUT, ""))

        safe = [
            replace(
                one,
                content=cut(one.content),
                reasoning=cut(one.reasoning),
                calls=tuple(replace(call, arguments=cut(call.arguments)) for call in one.calls),
            )
            for one in messages
        ]
        text = self.start(safe, self.reasoning, [cut(tool) for tool in tools])
        return self._known([token for piece in text.split(CUT) for token in self._ids(piece)])

    def _answer_ids(self, prompt: str, prompt_ids: list[int], answer: str) -> list[int]:
        """Ids of the answer as they follow the prompt's, whose own ids must not change under it. The last is the
        token with which the template ends a turn; where it writes none, the last that ends a turn at all, or one more.
        """
        whole = self._ids(prompt + answer)
        ids = whole[len(prompt_ids) :] if whole[: len(prompt_ids)] == prompt_ids else self._ids(answer)
        if self._end in ids:
            return ids[: ids.index(self._end) + 1]
        last = max((i for i, token in enumerate(ids) if token in self.stop_ids), default=None)
        return [*ids, self.stop_ids[0]] if last is None else ids[: last + 1]

    def rows(self, example: Example, index: int) -> list[Row]:
        """One row with every answer trained, but those marked as not to be learnt; or one row per answer, where the
        template writes earlier turns differently once later ones follow (then no single text is what the model sees at
        each answer).

        Plain text is no conversation: no template, every token trained, the end of the text included."""
        if example.is_text:
            ids = self._known([*self._ids(example.answer, whole=True), self.stop_ids[0]])
            return [Row(tuple(ids), (False, *[True] * (len(ids) - 1)), index)]
        turns = [i for i, message in enumerate(example.messages) if message.role == "assistant" and message.learnt]
        built = [self._turn(example.messages, i, example.tools, index) for i in turns]
        whole = built[0]
        for row in built[1:]:
            n = len(whole.ids)
            if row.ids[:n] != whole.ids:
                return built
            parts = [one.reasoning or (False,) * len(one.ids) for one in (whole, row)]
            reasoning = parts[0] + parts[1][n:] if whole.reasoning or row.reasoning else ()
            whole = replace(row, trained=whole.trained + row.trained[n:], reasoning=reasoning)
        return [whole]

    def _turn(self, messages: Sequence[Message], i: int, tools: Sequence[str] = (), index: int = 0) -> Row:
        """The row that ends with answer i, which alone is trained. Raises BaseError."""
        message, before = messages[i], messages[:i]
        reasoned = bool(message.reasoning)
        if reasoned and self._place is None:
            raise BaseError(
                "the chat template of this base has no place for the reasoning of an answer: take the reasoning out"
            )
        thinks = (
            reasoned or self.reasoning
        )  # an answer without a thought says so itself, where others may begin with one
        unsaid = reasoned and self._place == "opened"  # by finished turns
        said = replace(message, reasoning="") if unsaid else message
        prompt = self.start(before, thinks, tools)
        after = self.text([*before, said], False, tools)
        # A generation prompt that the finished turn does not repeat whole, as where it opens <think>: the answer begins
        # where finished turns with other words begin to differ, and still follows the whole prompt.
        head = prompt if after.startswith(prompt) else self._head(before, said, tools)
        shared = os.path.commonprefix([prompt, after])  # noqa: RUF071 (of text, not of paths)
        if thinks and not reasoned and not prompt.startswith(head) and prompt[len(shared) :].isspace():
            head = (
                shared  # the prompt opens a thought with white space, which a finished turn without one closes at once
            )
        if not (prompt.startswith(head) and after.startswith(head)):
            raise BaseError(REWRITES)
        if reasoned and THOUGHT[1] in prompt[len(head) :]:
            fix = "add --template enable_thinking=true" if self.reads("enable_thinking") else "take the reasoning out"
            raise BaseError(f"the chat template of this base begins answers without reasoning, and here is one: {fix}")
        answer = after[len(head) :]
        if unsaid:
            answer = with_thought(message.reasoning, answer).removeprefix(THOUGHT[0]).lstrip()
        elif thinks and not reasoned and self._thought.opens and self._thought.closing not in answer:
            answer = f"{self._thought.closing}\n\n{answer}"  # of the thought that the prompt has opened
        for one in messages[: i + 1]:
            text = answer if one is message else prompt
            quoted = json.dumps(one.content, ensure_ascii=False)[1:-1] if one.role == "tool" else ""
            shown = _holds(text, one.content, one.reasoning) or (quoted and _holds(text, quoted))  # as JSON, as some do
            if (one.role != "assistant" or one is message) and not shown:
                fix = "leave its words out, or " * bool(one.calls)
                raise BaseError(
                    f"the chat template of this base leaves out or changes what the {one.role} message says: {fix}give "
                    "the base a template that renders messages whose content is text"
                )
        prompt_ids = self._ids(prompt)
        answer_ids = self._answer_ids(prompt, prompt_ids, answer)
        self._known([*prompt_ids, *answer_ids])
        self._require_read(message, answer_ids)
        lead = answer[: self._begins(answer, message)] if thinks else ""
        thought = len(self._ids(lead)) if lead.strip() else 0
        n, m = len(prompt_ids), len(answer_ids)
        trained = (False, *[k >= n for k in range(1, n + m)])  # nothing comes before the first token
        reasoning = tuple(n <= k < n + thought for k in range(n + m)) if thought else ()
        return Row((*prompt_ids, *answer_ids), trained, index, reasoning)

    def _begins(self, answer: str, message: Message) -> int:
        """Where in the text of an answer its reasoning is over."""
        if not message.calls:
            return max(0, answer.removesuffix(self._tail).rfind(message.content.strip()))
        _, closing, rest = answer.partition(self._thought.closing)  # its words may stand in the arguments again
        return len(answer) - len(rest) if closing else 0

    def _require_read(self, message: Message, ids: Sequence[int]) -> None:
        """Raise BaseError unless the calls of an answer are read from its ids (what is scored, and served), and one
        without reasoning is read as such where others have it."""
        thought = self._thought if message.reasoning or self.reasoning else None
        if thought and not message.reasoning:
            text = text_of(self.tokenizer, ids[:-1], self.marks | thought.special)
            reasoning, answer = parted(text, thought)
            told, said = (" ".join(one.split()) for one in (answer, message.content))
            if reasoning or not (message.calls or told.startswith(said)):
                raise BaseError(
                    "the chat template of this base has no place for an answer without reasoning where others have it: "
                    "give this answer its reasoning, or take that of the others out"
                )
        if not message.calls:
            return
        words, calls = self._read(ids, thought)
        wanted = [call.meaning for call in message.calls]
        if [call.meaning for call in calls] != wanted or not _holds(words, message.content):
            raise BaseError(
                "the calls of an answer cannot be read back from what the chat template of this base writes: leave out "
                "its words, or all but one call, or what looks like the mark of a call"
            )

    @cached_property
    def refuses_all(self) -> bool:
        """Whether the template cannot be used at all: it refuses the plainest conversation, also with reasoning."""
        for reasoning in ("", REASONED) if self.reasoning else ("",):
            with suppress(BaseError):
                self._turn((*ASKED, Message("assistant", SAID, reasoning=reasoning)), 1)
                return False
        return True


def _settings_of(template: str) -> set[str]:
    """Names that a template reads and does not itself give a meaning, but where it finds that they have none."""
    source = re.sub(r"\{%[-+]?\s*(?:end)?generation\s*[-+]?%\}", "", template)  # marks of transformers alone
    try:
        tree = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(source)
        read_names = find_undeclared_variables(tree)
    except TemplateError:  # which its first rendering will tell
        return set()
    own = {name.name for name in tree.find_all(nodes.Name) if name.ctx == "store"}
    asked = [test.node for test in tree.find_all(nodes.Test) if test.name in ("defined", "undefined")]
    asked += [one.node for one in tree.find_all(nodes.Filter) if one.name in ("default", "d") and one.node]
    return read_names - (own - {node.name for node in asked if isinstance(node, nodes.Name)})


def _texts(messages: Sequence[Message], tools: Sequence[str]) -> list[str]:
    """All that others have written in a conversation."""
    return [*(text for message in messages for text in (message.text, message.reasoning)), *tools]


def _turn_of(message: Message, place: Place | None, spelling: Spelling) -> dict[str, Any]:
    """A message as templates are given it, its reasoning where they have a place for it."""
    turn = spelling.turn(message)
    if place == "field" and message.reasoning:
        return {**turn, **dict.fromkeys(("reasoning_content", "thinking"), message.reasoning)}
    if place == "inline" and message.reasoning:
        turn["content"] = with_thought(message.reasoning, message.content)
    return turn


def _parts_of(now: datetime) -> dict[str, str]:
    """A time by the names of its parts, as strftime calls them; %-d is %d without zeros before it."""
    parts = {f"%{name}": now.strftime(f"%{name}") for name in "aAbBcCdDeFgGhHIjmMprRSTuUVwWxXyYzZ"}
    bare = {f"%-{name}": parts[f"%{name}"].lstrip("0 ") or "0" for name in "deHIjmMSy"}
    return {**bare, **parts, "%%": "%"}


def _pieces(row: Row, longest: int) -> list[Row]:
    """A long text in rows of at most `longest` tokens. Each begins with the last token of the one before, so that every
    token but the first is predicted once."""
    starts = range(0, max(1, len(row.ids) - 1), longest - 1)
    return [Row(row.ids[i : i + longest], (False, *row.trained[i + 1 : i + longest]), row.example) for i in starts]


def _holds(text: str, *contents: str) -> bool:
    return all(" ".join(content.split()) in " ".join(text.split()) for content in contents)


def renderer_for(
    base: Base,
    system: str | None = None,
    like: Rendering | None = None,
    *,
    now: str | None = None,
    settings: Sequence[tuple[str, Scalar]] = (),
    reasoning: bool = False,
) -> Renderer:
    """The renderer of a base: its template, and every token with which its model may end a turn.

    Args:
        base: whose tokenizer it is.
        system: put before conversations that bring no system prompt; "" is none.
        like: what an adapter was trained with, which takes the place of all that follows, and of `system` where that
            is None.
        now: the time that the template is told, in ISO 8601; None: that of the moment.
        settings: of the template, by name.
        reasoning: whether answers may begin with their reasoning.

    Raises:
        BaseError: the base has another template than the adapter was trained with, or cannot be rendered for.
        SettingsError: a setting that the template does not read, or whose text holds a control token.
    """
    if like is not None:
        system = like.system if system is None else system
        now, settings, reasoning = like.now, like.settings, like.reasoning
    said = base.model.generation_config.eos_token_id if isinstance(base.model, GenerationMixin) else None
    stops = [] if said is None else [said] if isinstance(said, int) else list(said)
    made = Renderer(
        base.tokenizer,
        system,
        stops,
        base.context,
        vocabulary=base.vocabulary,
        now=now,
        settings=settings,
        reasoning=reasoning,
    )
    if like is not None:
        made.require(like)
    made.require_settings()
    return made


def render(renderer: Renderer, examples: Sequence[Example], max_length: int) -> list[Row]:
    """Rows of all examples.

    Raises:
        DataError: naming every example that is longer than `max_length` tokens or than the base reads (an answer is
            never cut), that the template refuses, or that has nothing to learn.
        BaseError: the template refuses every conversation.
    """
    rows: list[Row] = []
    problems = []
    limit, fix_length = max_length, "shorten it, remove the line, or raise --max-length"
    if renderer.context is not None and renderer.context < max_length:
        limit, fix_length = renderer.context, "shorten it, or remove the line: this base reads no more"
    for index, example in enumerate(examples):
        try:
            controls = renderer.controls(example)
            for control in controls:
                what = f"holds the control token {control!r} in a message"
                problems.append(Problem(example.where, what, renderer.removal(control)))
            if controls:
                continue
            built = renderer.rows(example, index)
        except BaseError as error:
            if renderer.refuses_all:
                raise BaseError(f"{example.where}: {error}") from error  # which says what to do
            what, _, fix = str(error).rpartition(": ")
            problems.append(Problem(example.where, what, f"{fix}, or leave the row out (--skip-bad)"))
            continue
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
