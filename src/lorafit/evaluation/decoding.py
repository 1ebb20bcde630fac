"""Answers many prompts by greedy decoding, with the bare base or with an adapter.

The engine of the server answers if it serves the base, so that the served model is measured; for other families
`generation.greedy.generate` answers.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import TracebackType

from lorafit.adapters.adapter import Adapter
from lorafit.attachment.adapters import attach
from lorafit.bases.base import Base
from lorafit.data.render import Renderer
from lorafit.data.thoughts import parted
from lorafit.errors import BaseError, CancelledError, NotServedError, RequestError
from lorafit.generation.greedy import Answer, bytes_per_token, generate
from lorafit.serving import Answer as Waiting
from lorafit.serving import Engine, Request
from lorafit.serving.families import same_for_all, servable
from lorafit.serving.pace import MOST

SLOTS = 32  # answers at a time: with more, the time of a step of SmolLM2 grows with its tokens
PROBES = 2  # additional slots of an engine
KEPT = 1 << 30  # bytes of keys and values at most
STEP = MOST + SLOTS  # tokens of a step at most: pieces of prompts, and one token of each answer
WIDE = 10  # numbers held for each token of a step, in multiples of the widest layer
UNHURRIED = 1e6  # seconds that a step may take, because nobody waits for the next token

Progress = Callable[[int, int], None]


class Decoding:
    """Answers prompts until it is closed: `with Decoding(base, renderer, longest, most) as decoding: ...`.

    Nothing may be attached to the base while it is open.
    """

    def __init__(
        self,
        base: Base,
        renderer: Renderer,
        longest: int,
        most: int,
        memory: int | None = None,
        accept_unknown_base: bool = False,
    ):
        """
        Args:
            base: The base.
            renderer: Its tokens end an answer.
            longest: Tokens of the longest prompt.
            most: The most tokens of an answer; fewer if the base's context ends before.
            memory: Bytes that decoding may take; None for no limit.
            accept_unknown_base: Attach adapters that do not say which base they belong to.
        """
        self.base, self.renderer, self.longest, self.most = base, renderer, longest, most
        self._memory, self._accept = memory, accept_unknown_base
        self._engine: Engine | None = None

    def __enter__(self) -> Decoding:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._let_go()

    def _let_go(self) -> None:
        """Close the engine; while it is open, no other code may use the model."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    def _opened(self) -> Engine | None:
        """The engine, opened at the first call; None if it does not serve the base, or no prompts of this length."""
        if self._engine is None:
            try:
                model = servable(self.base)
                room = self.longest + self.most
                room = room if self.base.context is None else min(room, self.base.context)
                if (same_for_all(model) or room) < room:
                    return None
                self._engine = Engine(
                    self.base,
                    slots=_slots(self.base, room, self._memory),
                    room=room,
                    queue=1 << 30,
                    stall=UNHURRIED,
                    accept_unknown_base=self._accept,
                    timed=False,
                    renderer=self.renderer,
                )
            except NotServedError:
                return None
        return self._engine

    def answers(
        self, prompts: Sequence[list[int]], adapter: Adapter | None = None, progress: Progress = lambda done, of: None
    ) -> list[Answer]:
        """The answers to the prompts, in their order.

        Args:
            prompts: Token ids; none is longer than `longest`.
            adapter: The adapter; None for the bare base.
            progress: Called with the number of answers that are done, and of all answers.
        """
        if not prompts:
            return []
        rest = self.most if self.base.context is None else self.base.context - max(map(len, prompts))
        most = max(1, min(self.most, rest))
        served = adapter is None or adapter.plan.is_product
        if served and (engine := self._opened()) is not None:
            return self._by_engine(engine, prompts, most, adapter, progress)
        self._let_go()
        on = attach(self.base, adapter, accept_unknown_base=self._accept) if adapter else nullcontext()
        with on:
            return generate(self.base, self.renderer, prompts, most, progress, self._memory)

    def _by_engine(
        self, engine: Engine, prompts: Sequence[list[int]], most: int, adapter: Adapter | None, progress: Progress
    ) -> list[Answer]:
        name = None
        if (
            adapter is not None
        ):  # published without the test of a new adapter: one that changes nothing is measured, too
            version = engine.adapters.add("measured", adapter)
            engine.adapters.publish(version)
            name = version.name
        try:
            special = self.renderer.special
            requests = [Request(tuple(prompt), name, max_tokens=most, special=special) for prompt in prompts]
            answers = []
            progress(0, len(prompts))
            for waiting in engine.submit_all(requests):
                answers.append(_answer(waiting, self.renderer))
                progress(len(answers), len(prompts))
            return answers
        finally:
            if name is not None:
                engine.unload(name)


def bytes_held(base: Base, room: int, memory: int | None = None) -> int:
    """The most bytes that decoding holds in addition to the base.

    Args:
        base: The base.
        room: Tokens of the longest prompt with its answer.
        memory: Bytes that decoding may take; None for no limit. The least that it needs may be more.
    """
    return (_slots(base, room, memory) + PROBES) * bytes_per_token(base) * room + _working(base)


def _slots(base: Base, room: int, memory: int | None) -> int:
    """How many answers are decoded at a time."""
    kept = KEPT if memory is None else min(KEPT, memory - _working(base))
    return max(1, min(SLOTS, kept // (bytes_per_token(base) * room) - PROBES))


def _working(base: Base) -> int:
    """The most bytes that a step of the engine holds."""
    return STEP * WIDE * base.widest * base.dtype.itemsize


def _answer(waiting: Waiting, renderer: Renderer) -> Answer:
    try:
        result = waiting.result()
    except RequestError:  # the adapter gives no finite numbers there: this counts as a wrong answer
        return Answer("", False)
    except CancelledError as error:
        raise BaseError(f"answers could not be decoded ({error}): give more memory (--memory), or free some") from error
    reasoning, text = parted(result.text, renderer.thought)
    return Answer(text, result.finish == "stop", tuple(token.id for token in result.tokens), reasoning)
