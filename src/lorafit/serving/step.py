"""Steps of the model: the tokens of many requests, each with its own adapter, go in; logits come out."""

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
    """Runs steps over slots. All methods are called in the thread that owns the model.

    Args:
        base: that is served.
        slots: requests that are answered at the same time.
        room: tokens of each, prompt and answer.
        native: whether to use the C++ kernels where there is a compiler.
        eight_bit: whether to compute with 8-bit weights made from the base; needs the kernels.
        timed: whether to choose between ways to compute a step by their time on this machine.

    Raises:
        BaseError: `eight_bit` without kernels.
        NotServedError: the base cannot be served.
    """

    def __init__(self, base: Base, slots: int, room: int, *, native: bool, eight_bit: bool, timed: bool):
        self._base, self._model = base, servable(base)
        self._keeps_logits = "logits_to_keep" in inspect.signature(self._model.forward).parameters
        one_dtype = all(parameter.dtype == base.dtype for parameter in self._model.parameters())
        loops = kernels(base.dtype, base.device) if native and one_dtype else None
        if eight_bit and loops is None:
            raise BaseError(
                "eight_bit: only the C++ kernels compute with 8-bit weights: leave it out, or install a C++ compiler"
            )
        self.mixer = Mixer(Products(base, loops, eight_bit, timed), base.device)
        numbers = {site.path: number for number, site in enumerate(base.sites)}
        self.decoder = decoder_of(self._model, self.mixer, numbers)
        self.slots = Slots(slots, max(room, sum(PIECES)), loops)
        self._expected = [at_once(self._model)]

    @contextmanager
    def owning(self) -> Iterator[None]:
        """Own the model inside the block. Raises NotServedError where steps over slots do not compute what the model
        computes for a whole text."""
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode())
            stack.enter_context(attending(self._base, NAME, attention))
            stack.enter_context(adapting(self._base, self.mixer.change))
            self._require_servable(*self._expected.pop())  # and release the logits
            if self.decoder is not None:
                self.decoder.measure(self.slots)
            yield

    def forget(self) -> None:
        """Release all keys and values."""
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
        """Run one step, which writes keys and values into the slots. Requests of one adapter must be neighbours.

        Args:
            slots: of each request.
            ids: of each request the tokens after those that its slot holds.
            owners: of each request the adapter; None: the bare base.
            scales: of each request the factor of what its adapter adds.
            ends: of each request whether the logits after its last token are needed.

        Returns:
            Logits (number of ends that are true, vocabulary).
        """
        device, lengths = self._base.device, [len(part) for part in ids]
        step = Step.of(self.slots, slots, lengths, device)
        last = torch.tensor(lengths).cumsum(0)[torch.tensor(ends, dtype=torch.bool)] - 1
        kept = last.to(device) if self._keeps_logits and len(last) < sum(lengths) else None
        self.mixer.begin(owners, scales, lengths, None if kept is None else [int(end) for end in ends])
        tokens = torch.tensor([[token for part in ids for token in part]], device=device)
        if self.decoder is not None:
            logits = self.decoder.logits(tokens, step, kept)
        else:
            keep = {} if kept is None else {"logits_to_keep": kept}
            logits = self._model(
                input_ids=tokens, position_ids=step.positions, use_cache=False, step=step, **keep
            ).logits[0]
        return logits if kept is not None else logits[last.to(device)]

    def features(self, ids: list[int], depths: Sequence[int]) -> Tensor:
        """Features of one text for a router, by the bare base: (D,)."""
        tokens = torch.tensor([ids], device=self._base.device)
        step = Step.of(self.slots, [self.slots.probing[0]], [len(ids)], self._base.device)
        self.mixer.begin([None], [1.0], [len(ids)], None)
        with inputs_of_blocks(self._base, depths) as streams:
            self._model(input_ids=tokens, position_ids=step.positions, use_cache=False, step=step)
        return routing.pooled([stream[0] for stream in streams])

    def _require_servable(self, pieces: list[list[int]], expected: Tensor) -> None:
        """Raise NotServedError unless steps compute `expected`, the model's own logits after pieces of a text."""
        slot, logits = replace(self.slots.probing[0], held=[]), []
        try:
            for part in pieces:
                logits.append(self.forward([slot], [part], [None], [1.0], [True])[0])
                slot.held += part
        except (MemoryError, torch.OutOfMemoryError):
            raise
        except Exception as error:  # a family that does not take these arguments may raise anything
            raise NotServedError(
                f"'{self._base.name}' cannot be served ({error}): open a base of another family"
            ) from error
        exact = self._base.dtype == torch.float32 and not self.mixer.products.bytes
        require_same(self._base, torch.stack(logits), expected, 1e-3 if exact else 0.1)
