"""Messages as the text that a base's chat template writes, in a conversation or before an answer.

Messages go in; the text of a prompt, of an answer or of a conversation comes out. How a template treats system prompts,
reasoning and calls of tools is learnt by letting it write words that no template holds.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import cached_property, partial
from typing import Any, Literal

from lorafit.data.calls import CALLED, OWN, PROBE, CallForm, Spelling, form_of, shared_start, worded
from lorafit.data.examples import Message
from lorafit.data.messages import THOUGHT, with_thought
from lorafit.data.template import ChatTemplate
from lorafit.data.thoughts import Thought
from lorafit.errors import BaseError

PLAIN = Spelling(empty=True, as_text=False)  # of a conversation without calls, for which any will do
ASKED = (Message("user", "a"),)
WORD, REASON = "zkw", "qvx"  # an answer and its reasoning, which no template holds
ANSWERED = (*ASKED, Message("assistant", WORD))
REASONED = (*ASKED, Message("assistant", WORD, reasoning=REASON))
REWRITES = (
    "the chat template rewrites the conversation when an answer is added, so it is not clear what is trained: "
    "give the base a template that only appends"
)
Place = Literal["field", "inline", "opened"]
"""Where a template takes reasoning: in a field of the message, at the beginning of its content, or after a generation
prompt that opens a thought, which finished turns leave out."""


class ConversationWriter:
    """Writes conversations by a chat template, and knows where their answers end and how their parts are marked."""

    def __init__(self, tokenizer: Any, template: ChatTemplate, system: str | None, stop_ids: Sequence[int]):
        """
        Args:
            tokenizer: of the base.
            template: its chat template.
            system: the system prompt of conversations that bring none; "" for no system prompt.
            stop_ids: tokens that end a turn; the template's is added.
        """
        self._tokenizer = tokenizer
        self._template = template
        self._system = system
        special = [(i, str(token)) for i, token in tokenizer.added_tokens_decoder.items() if token.special]
        self._special = frozenset(i for i, _ in special)
        self._special_texts = [text for _, text in special]
        self._after_answer = ""
        with suppress(BaseError):
            self._after_answer = self.write(ANSWERED, prompt=False).rpartition(WORD)[2]
        ends = self._special.union(stop_ids)
        self.end = next((token for token in self._ids(self._after_answer) if token in ends), None)
        """The token with which the template ends an answer; None for no token."""
        self.stop_ids = tuple(dict.fromkeys([*stop_ids, *([] if self.end is None else [self.end])]))

    def _ids(self, text: str) -> list[int]:
        ids: list[int] = self._tokenizer(text, add_special_tokens=False)["input_ids"]
        return ids

    def write(self, messages: Sequence[Message], prompt: bool, tools: Sequence[str] = ()) -> str:
        """The text of a conversation.

        Args:
            messages: the conversation.
            prompt: whether to end with the generation prompt.
            tools: tools that may be called, as `read_tools` reads them.

        Raises:
            BaseError: where the template refuses it.
        """
        place = self.place if any(message.reasoning for message in messages) else None
        if not (tools or any(message.calls or message.answers for message in messages)):
            return self._spelled(PLAIN, messages, prompt, place=place)
        spelling, _ = self._style
        if spelling is None:
            return self._spelled(PLAIN, worded(messages, tools), prompt, place=place)
        return self._spelled(spelling, messages, prompt, tools, place)

    def _spelled(
        self,
        spelling: Spelling,
        messages: Sequence[Message],
        prompt: bool,
        tools: Sequence[str] = (),
        place: Place | None = None,
    ) -> str:
        spoken = [message for message in messages if message.role != "system" or message.text.strip()]
        turns = [_turn_of(message, place, spelling) for message in spoken]
        if self._system and turns[0]["role"] != "system":
            question = next((turn for turn in turns if turn["role"] == "user"), None)
            if self._takes_system or question is None:
                turns.insert(0, {"role": "system", "content": self._system})
            else:
                question["content"] = f"{self._system}\n\n{question['content']}"
        if turns[0]["role"] != "system" and self._silences:
            turns.insert(0, {"role": "system", "content": ""})
        return self._template.write(turns, prompt, tools)

    @cached_property
    def _silences(self) -> bool:
        """Whether no system prompt is wanted, and an empty one keeps the template from adding its own words."""
        turns = [{"role": "user", "content": "\0"}]
        with suppress(BaseError):
            if self._system == "" and self._words_before(self._template.write(turns, prompt=False)):
                silenced = self._template.write([{"role": "system", "content": ""}, *turns], prompt=False)
                return not self._words_before(silenced)
        return False

    @cached_property
    def _takes_system(self) -> bool:
        """Whether the template shows a system message."""
        turns = [{"role": "system", "content": WORD}, {"role": "user", "content": "a"}]
        with suppress(BaseError):
            return WORD in self._template.write(turns, prompt=True)
        return False

    def preamble(self) -> str:
        """The words that the template itself writes before a first user message; "" for none."""
        return self._words_before(self.write([Message("user", "\0")], prompt=False))

    def _words_before(self, text: str) -> str:
        """The text before the message \\0, without special tokens; "" where it is only names of roles."""
        before = text.partition("\0")[0]
        for token in self._special_texts:
            before = before.replace(token, " ")
        words = before.split()
        return " ".join(words) if len(words) > 3 else ""

    @cached_property
    def place(self) -> Place | None:
        """Where the template takes the reasoning of an answer; None for nowhere."""
        places: tuple[Place, ...] = ("field", "inline")
        for place in places:
            with suppress(BaseError):
                text = self._spelled(PLAIN, REASONED, False, place=place)
                if 0 <= text.find(REASON) < text.find(WORD):
                    return place
        with suppress(BaseError):
            if self.write(ASKED, prompt=True).rstrip().endswith(THOUGHT[0]):
                return "opened"
        return None

    @cached_property
    def thought(self) -> Thought:
        """The marks of reasoning in the text of an answer."""
        opening, closing, opens, skipped = *THOUGHT, self.place == "opened", ""
        if self.place in ("field", "inline"):
            opened = self.start(ASKED, reasoning=True)
            before, _, after = self.write(REASONED, prompt=False).partition(REASON)
            mark = before[len(opened) :].strip() if before.startswith(opened) else opening
            opening, closing, opens = mark or opening, after.partition(WORD)[0].strip() or closing, not mark
            plain = self.write(ANSWERED, prompt=False)
            lead = plain[len(opened) :].partition(WORD)[0].strip() if plain.startswith(opened) else ""
            skipped = "" if opens or lead.startswith(opening) else lead
        return Thought(opening, closing, opens, self._special_in(f"{opening} {closing} {skipped}"), skipped)

    def _special_in(self, text: str) -> frozenset[int]:
        return self._special.intersection(self._ids(text))

    @cached_property
    def _style(self) -> tuple[Spelling | None, CallForm]:
        """How the template takes calls, and the form in which it writes them; no spelling, and our form, where it
        cannot. Arguments go as text only to a template that fails on objects: another would quote them."""
        ends = [self._tokenizer.decode([token]) for token in self.stop_ids]
        for empty, as_text in ((False, False), (False, True), (True, False), (True, True)):
            if as_text and self._takes_objects(empty):
                continue
            spelling = Spelling(empty, as_text)
            with suppress(BaseError):
                if (form := form_of(partial(self._spelled, spelling), ends)) is not None:
                    return spelling, form
        return None, OWN

    def _takes_objects(self, empty: bool) -> bool:
        with suppress(BaseError):
            self._spelled(Spelling(empty, as_text=False), CALLED, False, [PROBE])
            return True
        return False

    @property
    def call_form(self) -> CallForm:
        """The form of calls in an answer."""
        return self._style[1]

    @cached_property
    def marks(self) -> frozenset[int]:
        """Special tokens in the marks of calls."""
        form = self.call_form
        return self._special_in(form.opens + form.between + (form.joins or "") + form.closes)

    def start(self, messages: Sequence[Message], reasoning: bool, tools: Sequence[str] = ()) -> str:
        """The text that an answer to the messages follows.

        Args:
            messages: the conversation up to the answer.
            reasoning: whether the answer may begin with its reasoning.
            tools: tools that it may call, as `read_tools` reads them.

        Raises:
            BaseError: where the template refuses the conversation, leaves out or changes what is not the assistant's,
                or rewrites the conversation when an answer is added.
        """
        opened = self.write(messages, True, tools)
        separate = reasoning and self.place != "inline"  # else reasoning is part of the answer for the template
        text = opened if separate or not self.has_preface else self._with_preface(messages, opened, tools)
        _require_shown([message for message in messages if message.role != "assistant"], text)
        return text

    def _with_preface(self, messages: Sequence[Message], opened: str, tools: Sequence[str] = ()) -> str:
        """The prompt with what finished turns have before any answer. Raises BaseError."""
        head = self._head(messages, ANSWERED[-1], tools)
        if tools:
            head = shared_start(head, self.write([*messages, CALLED[1]], False, tools))
        if opened.startswith(head):
            return opened
        if not head.startswith((opened, self.write(messages, False, tools))):
            raise BaseError(REWRITES)
        return head

    @cached_property
    def has_preface(self) -> bool:
        """Whether finished turns have something before an answer that the generation prompt lacks."""
        with suppress(BaseError):
            opened = self.write(ASKED, prompt=True)
            return self._with_preface(ASKED, opened) != opened
        return False

    def _head(self, messages: Sequence[Message], message: Message, tools: Sequence[str]) -> str:
        """The beginning that finished turns share whatever the message says or thinks, without trailing spaces, which
        may belong to its words."""
        plain = replace(message, calls=())
        others = [replace(plain, reasoning=word) if plain.reasoning else replace(plain, content=word) for word in "xy"]
        return shared_start(*(self.write([*messages, other], False, tools) for other in others)).rstrip(" ")

    def turn(self, messages: Sequence[Message], thinks: bool, tools: Sequence[str] = ()) -> tuple[str, str]:
        """The text before the last message, an answer, and the text of that answer.

        Args:
            messages: a conversation that ends with an answer.
            thinks: whether answers may begin with their reasoning.
            tools: tools that may be called, as `read_tools` reads them.

        Raises:
            BaseError: where the template does not take the reasoning, or leaves out or changes a message.
        """
        before, message = messages[:-1], messages[-1]
        if message.reasoning and self.place is None:
            raise BaseError(
                "the chat template of this base has no place for the reasoning of an answer: take the reasoning out"
            )
        omitted = bool(message.reasoning) and self.place == "opened"  # finished turns leave the reasoning out
        finished = replace(message, reasoning="") if omitted else message
        prompt = self.start(before, thinks, tools)
        after = self.write([*before, finished], False, tools)
        # Where the finished turn does not repeat the whole generation prompt, which may open <think>, the answer begins
        # where finished turns with other words begin to differ, and still follows the whole prompt.
        head = prompt if after.startswith(prompt) else self._head(before, finished, tools)
        shared = shared_start(prompt, after)
        without = thinks and not message.reasoning  # and must differ from an answer that begins with reasoning
        if without and not prompt.startswith(head) and prompt[len(shared) :].isspace():
            head = shared  # the prompt opens a thought with white space, which a turn without one closes at once
        if not (prompt.startswith(head) and after.startswith(head)):
            raise BaseError(REWRITES)
        if message.reasoning and THOUGHT[1] in prompt[len(head) :]:
            thinking = "enable_thinking" in self._template.read_settings
            fix = "add --template enable_thinking=true" if thinking else "take the reasoning out"
            raise BaseError(f"the chat template of this base begins answers without reasoning, and here is one: {fix}")
        answer = after[len(head) :]
        if omitted:
            answer = with_thought(message.reasoning, answer).removeprefix(THOUGHT[0]).lstrip()
        elif without and self.thought.opens and self.thought.closing not in answer:
            answer = f"{self.thought.closing}\n\n{answer}"  # of the thought that the prompt has opened
        _require_shown([message], answer)
        return prompt, answer

    def reasoning_end(self, answer: str, message: Message) -> int:
        """The index at which the reasoning ends in the text of an answer."""
        if not message.calls:
            return max(0, answer.removesuffix(self._after_answer).rfind(message.content.strip()))
        _, closing, rest = answer.partition(self.thought.closing)  # its words may stand in the arguments again
        return len(answer) - len(rest) if closing else 0


def holds(text: str, *contents: str) -> bool:
    """Whether a text holds all of the contents, whatever the white space."""
    return all(" ".join(content.split()) in " ".join(text.split()) for content in contents)


def _require_shown(messages: Sequence[Message], text: str) -> None:
    """Raise BaseError where one of the messages is not in the text."""
    for message in messages:
        quoted = json.dumps(message.content, ensure_ascii=False)[1:-1] if message.role == "tool" else ""
        if holds(text, message.content, message.reasoning) or (quoted and holds(text, quoted)):  # as JSON, as some do
            continue
        fix = "leave its words out, or " * bool(message.calls)
        raise BaseError(
            f"the chat template of this base leaves out or changes what the {message.role} message says: {fix}give "
            "the base a template that renders messages whose content is text"
        )


def _turn_of(message: Message, place: Place | None, spelling: Spelling) -> dict[str, Any]:
    """A message as the template takes it, with its reasoning if it has a place."""
    turn = spelling.turn(message)
    if place == "field" and message.reasoning:
        return {**turn, **dict.fromkeys(("reasoning_content", "thinking"), message.reasoning)}
    if place == "inline" and message.reasoning:
        turn["content"] = with_thought(message.reasoning, message.content)
    return turn
