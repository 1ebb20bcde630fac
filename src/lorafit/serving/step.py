"""Steps: the tokens of many requests, each with its own adapter, go through the model at once."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import replace

import torch
from torch import Tensor

from lorafit import routing
from lorafit.attachment.adapters import adapting
from lorafit.attachment.attention import attending
from lorafit.attachment.blocks import inputs_of_blocks
from lorafit.bases.base import Base
from lorafit.errors import BaseError, NotServedError
from lorafit.serving.decoder import decoder_of
from lorafit.serving.families import PIECES, at_once, require_same, servable
from lorafit.serving.mixing import Loaded, Mixer
from lorafit.serving.native import kernels
from lorafit.serving.products import Products
from lorafit.serving.slots import NAME, Slot, Slots, Step, attention


class Steps:
    """Runs steps over slots. Everything but its construction happens in the one thread that owns the model.

    Args:
        base: What is served.
        slots: Requests that are answered at once.
        room: Tokens of each, prompt and answer.
        native: Whether to use the kernels in C++ where there is a compiler.
        eight_bit: Compute with 8-bit weights made of the base; needs the kernels.
        timed: Choose between ways to compute a step by their time on this machine.

    Raises:
        BaseError: `eight_bit` without kernels.
        NotServedError: A base that cannot be served.
    """

    def __init__(self, base: Base, slots: int, room: int, *, native: bool, eight_bit: bool, timed: bool):
        self._base, self._model = base, servable(base)
        self._head_alone = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        alike = all(one.dtype == base.dtype for one in self._model.parameters())  # the kernels read one dtype
        found = kernels(base.dtype, base.device) if native and alike else None
        if eight_bit and found is None:
            raise BaseError(
                "eight_bit: only our kernels compute with 8-bit weights: leave it out, or install a C++ compiler"
            )
        self.mixer = Mixer(Products(base, found, eight_bit, timed), base.device)
        numbers = {site.path: number for number, site in enumerate(base.sites)}
        self.decoder = decoder_of(self._model, self.mixer, numbers)
        self.slots = Slots(slots, max(room, sum(PIECES)), found)
        self._expected = [at_once(self._model)]

    @contextmanager
    def owning(self) -> Iterator[None]:
        """Own the model for the length of the block. Raises NotServedError where steps over slots do not compute what
        the model computes at once."""
        with ExitStack() as held:
            held.enter_context(torch.inference_mode())
            held.enter_context(attending(self._base, NAME, attention))
            held.enter_context(adapting(self._base, self.mixer.change))
            self._require_servable(*self._expected.pop())  # needed no longer than this takes
            if self.decoder is not None:
                self.decoder.measure(self.slots)
            yield

    def forget(self) -> None:
        """Let go of all keys and values."""
        self.mixer.end()
        self.slots.layers.clear()

    def forward(
        self,
        slots: Sequence[Slot],
        ids: Sequence[Sequence[int]],
        owners: Sequence[Loaded | None],
        scales: Sequence[float],
        ends: Sequence[bool],
    ) -> Tensor:
        """One step; keys and values go into the slots. Rows of one adapter are neighbours.

        Args:
            slots: Of each request.
            ids: Of each request, the tokens that follow what its slot holds.
            owners: Of each request, its adapter; None for the bare base.
            scales: Of each request, a factor of what its adapter adds.
            ends: Of each request, whether the logits after its last token are wanted.

        Returns:
            Logits (ends that are true, vocabulary).
        """
        device, lengths = self._base.device, [len(part) for part in ids]
        step = Step.of(self.slots, slots, lengths, device)
        last = torch.tensor(lengths).cumsum(0)[torch.tensor(ends, dtype=torch.bool)] - 1
        alone = last.to(device) if self._head_alone and len(last) < sum(lengths) else None
        self.mixer.begin(owners, scales, lengths, None if alone is None else [int(one) for one in ends])
        tokens = torch.tensor([[token for part in ids for token in part]], device=device)
        if self.decoder is not None:
            logits = self.decoder.logits(tokens, step, alone)
        else:
            where = {} if alone is None else {"logits_to_keep": alone}
            logits = self._model(
                input_ids=tokens, position_ids=step.positions, use_cache=False, step=step, **where
            ).logits[0]
        return logits if alone is not None else logits[last.to(device)]

    def features(self, ids: list[int], depths: Sequence[int]) -> Tensor:
        """What the bare base makes of one text, for a router: (D,)."""
        tokens = torch.tensor([ids], device=self._base.device)
        step = Step.of(self.slots, [self.slots.probing[0]], [len(ids)], self._base.device)
        self.mixer.begin([None], [1.0], [len(ids)], None)
        with inputs_of_blocks(self._base, depths) as streams:
            self._model(input_ids=tokens, position_ids=step.positions, use_cache=False, step=step)
        return routing.pooled([stream[0] for stream in streams])

    def _require_servable(self, pieces: list[list[int]], wanted: Tensor) -> None:
        """`wanted`: logits after each of these pieces of a text, computed at once."""
        slot, found = replace(self.slots.probing[0], held=[]), []
        try:
            for part in pieces:
                found.append(self.forward([slot], [part], [None], [1.0], [True])[0])
                slot.held += part
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a family that takes no such arguments fails in whatever way it does
            raise NotServedError(
                f"'{self._base.name}' cannot be served ({error}): open a base of another family"
            ) from error
        exact = self._base.dtype == torch.float32 and not self.mixer.products.bytes
        require_same(self._base, torch.stack(found), wanted, 1e-3 if exact else 0.1)
