"""Examples as rows of token ids, with a mask of what is trained.

Messages go in; rows for training, or the token ids of a prompt, come out. The prompt of a row is exactly what
generation starts from: the chat template over the messages before an answer, with its generation prompt, and with what
the template itself writes before an answer without reasoning (an empty thought, the name of a channel). The answer is
what the template adds when that message is appended, up to and including the token with which it ends a turn; without
that token, an adapter never learns to stop. Masks come from comparing these texts, so they hold for any template, with
or without markers for the assistant's part.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Sequence
from contextlib import suppress
from copy import copy
from dataclasses import replace
from functools import cached_property
from typing import Any

from transformers import GenerationMixin

from lorafit.adapters.rendering import Rendering, Scalar
from lorafit.bases.base import Base
from lorafit.data.calls import CallForm, read
from lorafit.data.controls import CUT, ControlTokens
from lorafit.data.examples import Call, Example, Message
from lorafit.data.rows import Row as Row
from lorafit.data.template import ChatTemplate
from lorafit.data.thoughts import Thought, parted, text_of
from lorafit.data.writer import ANSWERED, ASKED, REASONED, ConversationWriter, holds
from lorafit.errors import BaseError, DataError, Problem, SettingsError


class Renderer:
    """Renders conversations for one base, in training, evaluation, chat and serving alike.

    It takes more than six parameters: all but the first are optional."""

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
            tokenizer: of the base.
            system: the system prompt of conversations that bring none; "" for no system prompt.
            stop_ids: tokens that end a turn, in addition to the tokenizer's and the template's.
            context: the most tokens that the model reads.
            vocabulary: how many token ids the model has a row for; None for all.
            now: the time that the template reads, in ISO 8601; None for the current time at each call.
            settings: of the template, by name.
            reasoning: whether answers may begin with their reasoning. If not, prompts end with what the template itself
                writes before an answer without reasoning.

        Raises:
            BaseError: for no tokenizer, several templates, no token that ends a turn, or a template that writes tokens
                without a row in the model.
        """
        if tokenizer is None:
            raise BaseError("this base has no tokenizer: open it from a model folder to train on text")
        self.tokenizer = tokenizer
        self.system = system
        self.context = context
        self.reasoning = reasoning
        self._vocabulary = math.inf if vocabulary is None else vocabulary
        added = tokenizer.added_tokens_decoder.items()
        self.rowless = frozenset(str(token) for i, token in added if i >= self._vocabulary)
        eos = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
        stops = [i for i in dict.fromkeys([*eos, *stop_ids]) if i < self._vocabulary]
        self._template = ChatTemplate(tokenizer, tokenizer.eos_token or tokenizer.decode(stops[:1]), now, settings)
        self.now = self._template.now
        self._writer = ConversationWriter(tokenizer, self._template, system, stops)
        self.control_tokens = ControlTokens(tokenizer, self._writer, self.rowless)
        self.stop_ids = self._writer.stop_ids
        if self.rowless:
            self._require_template()
        if not stops:
            raise BaseError(
                "this base names no end-of-turn token that its model can write, without which an adapter never learns "
                "to stop: name one as eos_token in its tokenizer_config.json"
            )

    def reads(self, setting: str) -> bool:
        """Whether the template reads a setting of this name."""
        return setting in self._template.read_settings

    def require_settings(self) -> None:
        """Raise SettingsError for a setting that the template does not read, or that spells out a control token."""
        for name, value in self._template.settings:
            if not self.reads(name):
                near = difflib.get_close_matches(name, sorted(self._template.read_settings), n=1)
                fix = f"did you mean {near[0]}?" if near else "leave it out"
                raise SettingsError(f"--template {name}: the chat template of this base reads no such setting: {fix}")
            for token in self.control_tokens.spelt_in([value]) if isinstance(value, str) else ():
                removal = self.control_tokens.removal(token)
                raise SettingsError(f"--template {name}: holds the control token {token!r}: {removal}")

    @property
    def rendering(self) -> Rendering:
        """What an adapter keeps of this rendering."""
        # Where prompts with and without reasoning are the same, answers may begin with reasoning.
        reasoning = self.reasoning or not (self._writer.has_preface or self._writer.thought.opens)
        return Rendering(self._template.hash, self.system, self.now, self._template.settings, reasoning)

    def require(self, rendering: Rendering) -> None:
        """Raise BaseError where an adapter was trained with another template than this one."""
        if rendering.template_hash != self._template.hash:
            raise BaseError(
                "the chat template of this base is not the one the adapter was trained with: "
                "restore the base's chat_template.jinja"
            )

    def pieces(self, row: Row) -> list[tuple[str, bool]]:
        """The text of a row as the model sees it, in pieces, each with whether it is trained."""
        cuts = [i for i in range(1, len(row.ids)) if row.trained[i] != row.trained[i - 1]]
        spans = zip([0, *cuts], [*cuts, len(row.ids)], strict=True)
        return [(self.tokenizer.decode(row.ids[start:end]), row.trained[start]) for start, end in spans]

    def text(self, messages: Sequence[Message], prompt: bool, tools: Sequence[str] = ()) -> str:
        """The text of a conversation; arguments and errors as in `ConversationWriter.write`."""
        return self._writer.write(messages, prompt, tools)

    def preamble(self) -> str:
        """The words that the template itself writes before a first user message; "" for none."""
        return self._writer.preamble()

    @cached_property
    def plain(self) -> Renderer:
        """The same renderer for answers without reasoning."""
        plain = copy(self)
        plain.reasoning = False
        return plain

    @property
    def thought(self) -> Thought | None:
        """The marks of reasoning in generated text; None where all of the text is the answer."""
        return self._writer.thought if self.reasoning else None

    @property
    def special(self) -> frozenset[int]:
        """Special tokens that the text of an answer keeps, because they mark its reasoning."""
        return self.thought.special if self.thought else frozenset()

    @property
    def call_form(self) -> CallForm:
        """The form of tool calls in an answer."""
        return self._writer.call_form

    @property
    def marks(self) -> frozenset[int]:
        """Special tokens in the marks of tool calls."""
        return self._writer.marks

    def read(self, ids: Sequence[int]) -> tuple[str, tuple[Call, ...]]:
        """Words and calls of an answer (token ids), without its reasoning; all is words where no call is complete."""
        return self._read(ids, self.thought)

    def _read(self, ids: Sequence[int], thought: Thought | None) -> tuple[str, tuple[Call, ...]]:
        end = next((i for i, token in enumerate(ids) if token in self.stop_ids), len(ids))
        kept = self.marks | (thought.special if thought else frozenset())
        words, calls = read(self.call_form, parted(text_of(self.tokenizer, ids[:end], kept), thought)[1])
        return words.strip(), calls

    def _require_template(self) -> None:
        """Raise BaseError where every conversation would hold a token without a row in the model."""
        written = ""
        with suppress(BaseError):  # a template that refuses this: rendering reports why
            written = self.text(ANSWERED, prompt=False) + self.text(ASKED, prompt=True)
        self._ids(written, whole=True)

    def _ids(self, text: str, whole: bool = False) -> list[int]:
        """Token ids of a piece of text, or of a `whole` text with what the tokenizer adds around it. Raises BaseError
        for a token without a row in the model."""
        ids: list[int] = self.tokenizer(text, add_special_tokens=whole)["input_ids"]
        if (rowless := next((i for i in ids if i >= self._vocabulary), None)) is not None:
            token = self.tokenizer.convert_ids_to_tokens(rowless)
            raise BaseError(
                f"{token!r} is written, for which the model of this base has no row (token {rowless}, where it has "
                f"{self._vocabulary}): copy the tokenizer that the model came with, or resize the model "
                "(resize_token_embeddings) and save it"
            )
        return ids

    def prompt_ids(self, messages: Sequence[Message], tools: Sequence[str] = ()) -> list[int]:
        """Token ids from which an answer is generated.

        A control token that is spelt out in a message, or in a tool, is read as text, in two pieces: no message ends
        its turn, or begins another's.

        Args:
            messages: the conversation up to the answer.
            tools: tools that the answer may call, as `read_tools` reads them.

        Raises:
            BaseError: where the template refuses the conversation.
        """
        if self.control_tokens.spelt_in(_texts(messages, tools)):
            messages = [self.control_tokens.cut(message) for message in messages]
            tools = [self.control_tokens.cut_text(tool) for tool in tools]
            pieces = self._writer.start(messages, self.reasoning, tools).split(CUT)
        else:
            pieces = [self._writer.start(messages, self.reasoning, tools)]
        return [token for piece in pieces for token in self._ids(piece)]

    def _answer_ids(self, prompt: str, prompt_ids: list[int], answer: str) -> list[int]:
        """Ids of the answer that follow those of the prompt, which must not change. The last is the token with which
        the template ends a turn; where it writes none, the last token that ends a turn, or `stop_ids[0]`."""
        whole = self._ids(prompt + answer)
        ids = whole[len(prompt_ids) :] if whole[: len(prompt_ids)] == prompt_ids else self._ids(answer)
        if self._writer.end in ids:
            return ids[: ids.index(self._writer.end) + 1]
        last = max((i for i, token in enumerate(ids) if token in self.stop_ids), default=None)
        return [*ids, self.stop_ids[0]] if last is None else ids[: last + 1]

    def rows(self, example: Example, index: int) -> list[Row]:
        """The rows of an example.

        A conversation is one row with every answer trained, except those marked as not to be learnt. Where the template
        writes earlier turns differently once later ones follow, no single text is what the model sees at each answer,
        and each answer gets a row. Plain text has no template: every token is trained, and the end of the text.

        Args:
            example: a conversation or plain text.
            index: of the example among all.

        Raises:
            BaseError: where the template refuses the conversation.
        """
        if example.is_text:
            ids = [*self._ids(example.answer, whole=True), self.stop_ids[0]]
            return [Row(tuple(ids), (False, *[True] * (len(ids) - 1)), index)]
        turns = [i for i, message in enumerate(example.messages) if message.role == "assistant" and message.learnt]
        rows = [self._turn(example.messages[: i + 1], example.tools, index) for i in turns]
        whole = rows[0]
        for row in rows[1:]:
            n = len(whole.ids)
            if row.ids[:n] != whole.ids:
                return rows
            before, after = (part.reasoning or (False,) * len(part.ids) for part in (whole, row))
            reasoning = before + after[n:] if whole.reasoning or row.reasoning else ()
            whole = replace(row, trained=whole.trained + row.trained[n:], reasoning=reasoning)
        return [whole]

    def _turn(self, messages: Sequence[Message], tools: Sequence[str] = (), index: int = 0) -> Row:
        """The row of a conversation with only its last answer trained. Raises BaseError."""
        message = messages[-1]
        thinks = bool(message.reasoning) or self.reasoning  # else it must show that it begins without
        prompt, answer = self._writer.turn(messages, thinks, tools)
        prompt_ids = self._ids(prompt)
        answer_ids = self._answer_ids(prompt, prompt_ids, answer)
        self._require_read(message, answer_ids)
        lead = answer[: self._writer.reasoning_end(answer, message)] if thinks else ""
        thought = len(self._ids(lead)) if lead.strip() else 0
        n, m = len(prompt_ids), len(answer_ids)
        trained = (False, *[k >= n for k in range(1, n + m)])  # nothing predicts the first token
        reasoning = tuple(n <= k < n + thought for k in range(n + m)) if thought else ()
        return Row((*prompt_ids, *answer_ids), trained, index, reasoning)

    def _require_read(self, message: Message, ids: Sequence[int]) -> None:
        """Raise BaseError unless the calls of an answer can be read from its ids, for scoring and serving, and an
        answer without reasoning is read as such where others have reasoning."""
        thought = self._writer.thought if message.reasoning or self.reasoning else None
        if thought and not message.reasoning:
            text = text_of(self.tokenizer, ids[:-1], self.marks | thought.special)
            reasoning, answer = parted(text, thought)
            same = " ".join(answer.split()).startswith(" ".join(message.content.split()))
            if reasoning or not (message.calls or same):
                raise BaseError(
                    "the chat template of this base has no place for an answer without reasoning where others have it: "
                    "give this answer its reasoning, or take that of the others out"
                )
        if not message.calls:
            return
        words, calls = self._read(ids, thought)
        wanted = [call.meaning for call in message.calls]
        if [call.meaning for call in calls] != wanted or not holds(words, message.content):
            raise BaseError(
                "the calls of an answer cannot be read back from what the chat template of this base writes: leave out "
                "its words, or all but one call, or what looks like the mark of a call"
            )

    @cached_property
    def refuses_all(self) -> bool:
        """Whether the template refuses the plainest conversation, with and without reasoning."""
        for messages in (ANSWERED, REASONED) if self.reasoning else (ANSWERED,):
            with suppress(BaseError):
                self._turn(messages)
                return False
        return True


def _texts(messages: Sequence[Message], tools: Sequence[str]) -> list[str]:
    """All texts in a conversation that the template did not write."""
    return [*(text for message in messages for text in (message.text, message.reasoning)), *tools]


def renderer_for(
    base: Base,
    system: str | None = None,
    like: Rendering | None = None,
    *,
    now: str | None = None,
    settings: Sequence[tuple[str, Scalar]] = (),
    reasoning: bool = False,
) -> Renderer:
    """The renderer of a base.

    Args:
        base: gives the tokenizer, the template, the context, and the tokens that end a turn.
        system: the system prompt of conversations that bring none; "" for no system prompt.
        like: the rendering that an adapter was trained with. It replaces the arguments that follow, and `system` where
            that is None.
        now: as in `Renderer`.
        settings: as in `Renderer`.
        reasoning: as in `Renderer`.

    Raises:
        BaseError: for another template than the adapter was trained with, or a base without what `Renderer` needs.
        SettingsError: for a setting that the template does not read, or that spells out a control token.
    """
    if like is not None:
        system = like.system if system is None else system
        now, settings, reasoning = like.now, like.settings, like.reasoning
    eos = base.model.generation_config.eos_token_id if isinstance(base.model, GenerationMixin) else None
    stops = [] if eos is None else [eos] if isinstance(eos, int) else list(eos)
    renderer = Renderer(
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
        renderer.require(like)
    renderer.require_settings()
    return renderer


def render(renderer: Renderer, examples: Sequence[Example], max_length: int) -> list[Row]:
    """Render examples as rows.

    Args:
        renderer: of the base.
        examples: conversations and plain texts; a long text becomes several rows.
        max_length: the most tokens of a row.

    Returns:
        The rows in the order of the examples.

    Raises:
        DataError: with every example that has more tokens than `max_length` or than the base reads (an answer is never
            cut), that the template refuses, or that has nothing to learn.
        BaseError: where the template refuses every conversation.
    """
    rows: list[Row] = []
    problems = []
    limit, fix_length = max_length, "shorten it, remove the line, or raise --max-length"
    if renderer.context is not None and renderer.context < max_length:
        limit, fix_length = renderer.context, "shorten it, or remove the line: this base reads no more"
    for index, example in enumerate(examples):
        try:
            control_tokens = renderer.control_tokens.spelt_in(_texts(example.messages, example.tools))
            for token in control_tokens:
                what = f"holds the control token {token!r} in a message"
                problems.append(Problem(example.where, what, renderer.control_tokens.removal(token)))
            if control_tokens:
                continue
            built = renderer.rows(example, index)
        except BaseError as error:
            if renderer.refuses_all:
                raise BaseError(f"{example.where}: {error}") from error  # which says what to do
            what, _, fix = str(error).rpartition(": ")
            problems.append(Problem(example.where, what, f"{fix}, or leave the row out (--skip-bad)"))
            continue
        if example.is_text:
            built = [piece for row in built for piece in row.split(limit)]
        for row in built:
            if len(row.ids) > limit:
                problems.append(Problem(example.where, f"{len(row.ids)} tokens, the limit is {limit}", fix_length))
            elif row.n_trained == 0:
                problems.append(Problem(example.where, "nothing to learn in it", "fill in the answer"))
            rows.append(row)
    if problems:
        raise DataError(problems)
    return rows
