"""Greedy answers to many prompts, from the bare base or an adapter on it.

The engine answers wherever it serves the base, so that what is measured is what will be served; transformers' own
`generate` answers for the other families.
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

SLOTS = 32  # answers at a time: with more, a step of SmolLM2 takes as long as it has tokens more
PROBES = 2  # slots that an engine has besides
KEPT = 1 << 30  # bytes of keys and values at most
STEP = MOST + SLOTS  # tokens of a step at most: pieces of prompts, and one of each answer
WIDE = 10  # numbers held for each of them, in widths of the widest layer: what goes into it and out, and the stream
UNHURRIED = 1e6  # seconds a step may take: nobody waits for the next token

Progress = Callable[[int, int], None]


class Decoding:
    """Answers prompts until it is closed: `with Decoding(base, renderer, longest, most) as decoding: ...`.

    Nothing may be attached to the base, nor be attached to it meanwhile.
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
            base: what answers.
            renderer: whose tokens end an answer.
            longest: tokens of the longest prompt.
            most: tokens of an answer at most; fewer where the base's context ends before.
            memory: bytes that decoding may take; None for as many as go well.
            accept_unknown_base: attach adapters that do not say which base they belong to.
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
        """Close the engine, which has the model to itself while it is open."""
        if self._engine is not None:
            self._engine.close()
        self._engine = None

    def _opened(self) -> Engine | None:
        """The engine, opened for the first prompts; None where it does not serve the base, or none as long."""
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
        """Answer prompts (token ids), in their order.

        Args:
            prompts: none longer than `longest`.
            adapter: what answers with the base; None for the bare base.
            progress: called with the answers that are done, of how many.
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
        if adapter is not None:  # published untried: one that changes nothing is measured like any other
            version = engine.adapters.add("measured", adapter)
            engine.adapters.publish(version)
            name = version.name
        try:
            told = self.renderer.told
            asked = [Request(tuple(prompt), name, max_tokens=most, special=told) for prompt in prompts]
            waiting = engine.submit_all(asked)
            found = []
            progress(0, len(prompts))
            for answer in waiting:
                found.append(_answer(answer, self.renderer))
                progress(len(found), len(prompts))
            return found
        finally:
            if name is not None:
                engine.unload(name)


def bytes_held(base: Base, room: int, memory: int | None = None) -> int:
    """Bytes that decoding holds at most, beside the base.

    Args:
        base: what answers.
        room: tokens of the longest prompt with its answer.
        memory: bytes that it may take; None for as many as go well. The least that it needs may be more.
    """
    return (_slots(base, room, memory) + PROBES) * bytes_per_token(base) * room + _working(base)


def _slots(base: Base, room: int, memory: int | None) -> int:
    """How many answers are decoded at a time."""
    kept = KEPT if memory is None else min(KEPT, memory - _working(base))
    return max(1, min(SLOTS, kept // (bytes_per_token(base) * room) - PROBES))


def _working(base: Base) -> int:
    """Bytes that a step of the engine holds at most."""
    return STEP * WIDE * base.widest * base.dtype.itemsize


def _answer(waiting: Waiting, renderer: Renderer) -> Answer:
    try:
        result = waiting.result()
    except RequestError:  # the adapter gives no finite numbers there: no answer, and a wrong one
        return Answer("", False)
    except CancelledError as error:
        raise BaseError(f"answers could not be decoded ({error}): give more memory (--memory), or free some") from error
    reasoning, said = parted(result.text, renderer.thought)
    return Answer(said, result.finish == "stop", tuple(token.id for token in result.tokens), reasoning)
