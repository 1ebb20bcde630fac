"""Keys and values of the requests that are being answered, in slots of a fixed size, and attention over them.

A step of the engine is one row of tokens: the next token of each request that is being answered, and pieces of prompts.
The keys and values of each token go into its request's slot, and every request attends to its own slot only. All other
layers of a decoder treat tokens one by one, so nothing is padded. A slot keeps its content when its request is done: a
later request with the same beginning, adapter and scale takes it over.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lorafit.errors import AttachError
from lorafit.serving.native import Kernels

NAME = "lorafit_slots"  # under which transformers finds `attention`
MIN_SHARED = 8  # tokens that two requests must share for one to take over keys and values of the other

Key = tuple[str | None, float]  # the digest of an adapter (None: the bare base), and its scale


@dataclass(eq=False)
class Slot:
    """The keys and values of one request. held: their tokens; key: their adapter and scale; used: when it was last
    taken, since the slot that is unused longest is taken first."""

    number: int
    held: list[int] = field(default_factory=list)
    key: Key = (None, 1.0)
    busy: bool = False
    used: int = 0


class Slots:
    """`count` slots of `room` tokens each, and two more for probes. Tensors are made at the first step, when the layers
    show their widths; memory is used as slots fill."""

    def __init__(self, count: int, room: int, kernels: Kernels | None):
        self.count, self.room, self.kernels = count, room, kernels
        self.slots = [Slot(i) for i in range(count)]
        self.probing = Slot(count), Slot(count + 1)
        self.layers: dict[int, tuple[Tensor, Tensor]] = {}
        self._clock = 0

    @property
    def used(self) -> float:
        """The share of the room that busy slots fill."""
        return sum(len(slot.held) for slot in self.slots if slot.busy) / (self.count * self.room)

    def take(self, ids: Sequence[int], key: Key) -> Slot | None:
        """Take a free slot for a prompt. Its `held` has the tokens whose keys and values are known already, at most all
        but one; None where all slots are busy."""
        free = [slot for slot in self.slots if not slot.busy]
        if not free:
            return None
        same_key = {slot: common_length(slot.held, ids) for slot in self.slots if slot.key == key}
        shared = {slot: n for slot, n in same_key.items() if n >= MIN_SHARED}
        best = max(shared, key=lambda slot: (shared[slot], not slot.busy), default=None)
        n = 0 if best is None else shared[best]
        if best in free and best is not None and (2 * n >= len(best.held) or len(free) == 1):
            taken = best
        else:  # the best slot keeps its content, for a request that may continue it
            others = [slot for slot in free if slot is not best]
            taken = min(others, key=lambda slot: (bool(slot.held), slot.used, slot.number))
        if best is not None and best is not taken:
            for keys, values in self.layers.values():
                for part in (keys, values):
                    part[taken.number, :, :n] = part[best.number, :, :n]
        self._clock += 1
        taken.held, taken.key, taken.busy, taken.used = list(ids[:n]), key, True, self._clock
        return taken

    def of(self, key: Key) -> list[list[int]]:
        """The tokens that the slots of this key hold."""
        return [slot.held for slot in self.slots if slot.key == key]

    def layer(self, number: int, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor]:
        """The keys and the values of a layer, (count + 2, heads, room, depth) each, where its own are (1, heads, N,
        depth)."""
        if number not in self.layers:
            keys, values = (
                new.new_empty(self.count + 2, new.shape[1], self.room, new.shape[3]) for new in (key, value)
            )
            self.layers[number] = keys, values
        return self.layers[number]


def common_length(held: Sequence[int], ids: Sequence[int]) -> int:
    """The number of tokens that both begin with, without the last of `ids`, which must be computed for its logits."""
    most = min(len(held), len(ids) - 1)
    return next((i for i in range(most) if held[i] != ids[i]), most)


@dataclass(frozen=True)
class PromptPiece:
    """A piece of a prompt in a step: rows `start` to `end`, of slot number `slot`, after `past` tokens."""

    start: int
    end: int
    slot: int
    past: int


@dataclass(frozen=True, eq=False)
class Step:
    """Where the tokens of one step go.

    Args:
        slots: of the engine.
        positions: of the tokens, (1, N).
        numbers: of their slots, (N,).
        single: rows of requests with one token; all N where there are no others.
        seen: for these rows slot, first position and end of what they attend to, (singles, 3).
        reach: the largest of these ends.
        long: the pieces of prompts.
    """

    slots: Slots
    positions: Tensor
    numbers: Tensor
    single: Tensor
    seen: Tensor
    reach: int
    long: tuple[PromptPiece, ...]
    _places: dict[int, Tensor] = field(default_factory=dict)
    _seen: dict[int | None, Tensor] = field(default_factory=dict)
    _hidden: dict[int | None, Tensor] = field(default_factory=dict)

    def write(self, kept: Tensor, new: Tensor) -> None:
        """Write keys or values (1, heads, N, depth) to their places in (count, heads, room, depth)."""
        heads = new.shape[1]
        if heads not in self._places:  # the same for every layer with this number of heads
            head = torch.arange(heads, device=new.device)[:, None]
            self._places[heads] = ((self.numbers * heads + head) * self.slots.room + self.positions).flatten()
        kept.view(-1, kept.shape[-1]).index_copy_(0, self._places[heads], new.reshape(-1, new.shape[-1]))

    @property
    def each(self) -> Tensor:
        """`seen` of every token, also of prompts, (N, 3): each sees the tokens before it, and itself."""
        ends = self.positions[0] + 1
        return torch.stack((self.numbers, torch.zeros_like(ends), ends), 1) if self.long else self.seen

    def seen_within(self, window: int | None) -> Tensor:
        """`seen`, limited to the last `window` tokens, (singles, 3)."""
        if window not in self._seen:
            numbers, first, end = self.seen.unbind(1)
            first = first if window is None else torch.maximum(first, end - window)
            self._seen[window] = torch.stack((numbers, first, end), 1)
        return self._seen[window]

    def hidden(self, window: int | None) -> Tensor:
        """Which tokens of its slot each row does not attend to, (singles, reach)."""
        if window not in self._hidden:
            _, first, end = self.seen_within(window).unbind(1)
            reach = torch.arange(self.reach, device=first.device)
            self._hidden[window] = (reach < first[:, None]) | (reach >= end[:, None])
        return self._hidden[window]

    @staticmethod
    def of(slots: Slots, taken: Sequence[Slot], lengths: Sequence[int], device: torch.device) -> Step:
        """The step in which each of these slots gets as many tokens as `lengths` says."""
        positions: list[int] = []
        numbers: list[int] = []
        single: list[int] = []
        seen: list[tuple[int, int, int]] = []
        long: list[PromptPiece] = []
        for slot, n in zip(taken, lengths, strict=True):
            past, start = len(slot.held), len(positions)
            positions += range(past, past + n)
            numbers += [slot.number] * n
            if n == 1:
                single.append(start)
                seen.append((slot.number, 0, past + 1))
            else:
                long.append(PromptPiece(start, start + n, slot.number, past))
        return Step(
            slots,
            torch.tensor([positions], device=device),
            torch.tensor(numbers, device=device),
            torch.tensor(single, dtype=torch.int64, device=device),
            torch.tensor(seen, dtype=torch.int64, device=device).view(-1, 3),
            max((end for *_, end in seen), default=0),
            tuple(long),
        )


def attention(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    step: Step | None = None,
    sliding_window: int | None = None,
    **others: Any,
) -> tuple[Tensor, None]:
    """Attention of every token to its request's slot. It has more than six parameters, which are those of
    transformers' attention interface.

    query (1, H, N, D), key (1, H_kv, N, D), value (1, H_kv, N, D_v) → (1, N, H, D_v). Raises AttachError for arguments
    that it does not support.
    """
    unsupported = [name for name in ("softcap", "s_aux", "position_bias") if others.get(name) is not None]
    if attention_mask is not None and (attention_mask.ndim or int(attention_mask) != sliding_window):
        unsupported.append("a mask of its own")
    number = getattr(module, "layer_idx", None)
    if step is None or unsupported or dropout or number is None or not getattr(module, "is_causal", True):
        raise AttachError(
            f"attention by slots: {', '.join(unsupported) or 'a call without a step'} is not supported: open "
            "a base of another family"
        )
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    keys, values = step.slots.layer(number, key, value)
    step.write(keys, key)
    step.write(values, value)
    return attended(step, query[0].transpose(0, 1), keys, values, scale, sliding_window)[None], None


def attended(step: Step, q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
    """Attention of q (N, H, D) to the slots' keys and values (count, heads, room, depth) → (N, H, D_v)."""
    if not step.long:
        return _single(step, q.contiguous(), keys, values, scale, window)
    out = q.new_empty(*q.shape[:2], values.shape[-1])
    if len(step.single):
        out[step.single] = _single(step, q[step.single], keys, values, scale, window)
    for piece in step.long:
        out[piece.start : piece.end] = _long(piece, q[piece.start : piece.end], keys, values, scale, window)
    return out


def _single(step: Step, q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
    """Attention of requests with one token each, q (rows, H, D) → (rows, H, D_v)."""
    if step.slots.kernels is not None and keys.shape == values.shape:
        return step.slots.kernels.attend(q, keys, values, step.seen_within(window), scale)
    hidden = step.hidden(window)
    mask = torch.zeros(hidden.shape, dtype=q.dtype, device=q.device).masked_fill_(hidden, -torch.inf)
    numbers = step.seen[:, 0]
    k, v = (part[numbers, :, : step.reach].masked_fill(hidden[:, None, :, None], 0) for part in (keys, values))
    shared = q.unflatten(1, (k.shape[1], -1))  # group the heads that share keys and values
    return F.scaled_dot_product_attention(shared, k, v, mask[:, None, None], scale=scale).flatten(1, 2)


def _long(piece: PromptPiece, q: Tensor, keys: Tensor, values: Tensor, scale: float, window: int | None) -> Tensor:
    """Attention of a piece of a prompt, q (n, H, D) → (n, H, D_v), also to the tokens before it in its slot."""
    n, total = len(q), piece.past + piece.end - piece.start
    k, v = (part[piece.slot : piece.slot + 1, :, :total] for part in (keys, values))
    mask = None
    if piece.past or (window is not None and window < total):
        hidden = torch.ones(n, total, dtype=torch.bool, device=q.device).triu(piece.past + 1)
        if window is not None:
            hidden |= torch.ones_like(hidden).tril(piece.past - window)
        mask = torch.zeros(n, total, dtype=q.dtype, device=q.device).masked_fill_(hidden, -torch.inf)
    out = F.scaled_dot_product_attention(
        q.transpose(0, 1)[None], k, v, mask, is_causal=mask is None, scale=scale, enable_gqa=q.shape[1] != k.shape[1]
    )
    return out[0].transpose(0, 1)
