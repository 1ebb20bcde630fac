"""Greedy answers to many prompts, from the bare base or an adapter on it.

The engine answers wherever it serves the base, so that what is measured is what will be served; transformers' own
`generate` answers for the other families.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from types import TracebackType

from lorafit.adapter import Adapter
from lorafit.attachment import attach
from lorafit.base import Base
from lorafit.data.render import Renderer
from lorafit.errors import BaseError
from lorafit.generation.greedy import Answer, bytes_per_token, generate
from lorafit.serving import Engine, Request

SLOTS = 32  # answers at a time: with more, a step of SmolLM2 takes as long as it has tokens more
KEPT = 1 << 30  # bytes of keys and values, where no limit is set
UNHURRIED = 1e6  # seconds a step may take: nobody waits for the next token, and steps depend on no clock

Progress = Callable[[int, int], None]


class Decoding:
    """Answers prompts until it is closed: `with Decoding(base, renderer, longest, most) as decoding: ...`.

    Nothing may be attached to the base, nor be attached to it meanwhile.
    """

    def __init__(
        self, base: Base, renderer: Renderer, longest: int, most: int, memory: int | None = None,
        accept_unknown_base: bool = False,
    ):  # fmt: skip
        """
        Args:
            base: what answers.
            renderer: whose tokens end an answer.
            longest: tokens of the longest prompt.
            most: tokens of an answer at most; fewer where the base's context ends before.
            memory: bytes that keys and values may take; by default KEPT.
            accept_unknown_base: attach adapters that do not say which base they belong to.
        """
        self.base, self.renderer, self.most = base, renderer, most
        self._memory, self._accept = memory, accept_unknown_base
        room = longest + most if base.context is None else min(longest + most, base.context)
        slots = max(1, min(SLOTS, (KEPT if memory is None else memory) // (bytes_per_token(base) * room)))
        try:
            engine = Engine(base, slots=slots, room=room, queue=1 << 30, stall=UNHURRIED,
                            accept_unknown_base=accept_unknown_base)  # fmt: skip
        except BaseError:  # of a family that it does not serve
            self._engine = None
            return
        self._engine = engine if engine.room >= room else None
        if self._engine is None:  # it reads no prompt as long
            engine.close()

    def __enter__(self) -> Decoding:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._engine is not None:
            self._engine.close()

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
        if self._engine is not None:
            return self._by_engine(self._engine, prompts, most, adapter, progress)
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
            waiting = engine.submit_all([Request(tuple(prompt), name, max_tokens=most) for prompt in prompts])
            found = []
            progress(0, len(prompts))
            for answer in waiting:
                result = answer.result()
                found.append(Answer(result.text.strip(), result.finish == "stop"))
                progress(len(found), len(prompts))
            return found
        finally:
            if name is not None:
                engine.unload(name)
