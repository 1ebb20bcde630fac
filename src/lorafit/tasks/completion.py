"""The task of a language model: predict each trained token from all tokens before it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from lorafit.bases.base import Base
from lorafit.data.batches import Batch
from lorafit.data.render import Row
from lorafit.tasks import forward
from lorafit.tasks.probe import mode_of
from lorafit.tasks.task import ForwardMode


@dataclass(frozen=True)
class Completion:
    """The task of a language model. It implements `Task`; a target is a trained token."""

    name: str = "completion"
    logits_at_a_time: int | None = forward.CHUNK
    starts: bool = True

    def mode(self, base: Base, rows: Sequence[Row]) -> ForwardMode:
        return mode_of(base, rows)

    def batch(self, base: Base, rows: Sequence[Row], mode: ForwardMode) -> Batch:
        return forward.batch_of(base, rows, mode)

    def body(self, base: Base, batch: Batch, mode: ForwardMode) -> Tensor:
        return forward.body(base, batch, mode)

    def nll(self, base: Base, batch: Batch, mode: ForwardMode) -> Tensor:
        return forward.token_nll(base, batch, mode)

    def weight(self, row: Row) -> float:
        return sum(row.trained[1:])

    def probes(self, rows: Sequence[Row], lengths: Sequence[int]) -> list[Row]:
        """Rows in which the same share of tokens is trained as in the given rows."""
        ids = [i for row in rows for i in row.ids]
        share = sum(row.n_trained for row in rows) / len(ids)
        made = []
        for k, n in enumerate(lengths):
            trained = min(n - 1, max(1, round(share * n)))
            whole = (ids * (n // len(ids) + 1))[:n]
            made.append(Row(tuple(whole), (*[False] * (n - trained), *[True] * trained), k))
        return made


COMPLETION = Completion()
