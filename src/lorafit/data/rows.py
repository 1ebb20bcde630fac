"""Rows of token ids, with a mask of what is trained: what rendering makes of examples, and batches are made of."""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Row:
    """Token ids of an example, with a mask of what is trained.

    Args:
        ids: token ids, (T,).
        trained: for each token, whether it is trained, (T,); never the first.
        example: the index of its example.
        reasoning: for each token, whether it is part of an answer's reasoning, (T,); empty where no token is.
    """

    ids: tuple[int, ...]
    trained: tuple[bool, ...]
    example: int
    reasoning: tuple[bool, ...] = field(default=(), repr=False)  # digests of format 1 are over the repr

    @property
    def n_trained(self) -> int:
        """The number of trained tokens."""
        return sum(self.trained)

    def only(self, reasoning: bool) -> Row:
        """The row with only the reasoning of its answers trained, or only the answers themselves."""
        of_reasoning = self.reasoning or (False,) * len(self.ids)
        pairs = zip(self.trained, of_reasoning, strict=True)
        return replace(self, trained=tuple(trained and part == reasoning for trained, part in pairs))

    def split(self, longest: int) -> list[Row]:
        """Rows of at most `longest` tokens, of a row of plain text. Each begins with the last token of the row before,
        so that every token but the first is predicted once."""
        starts = range(0, max(1, len(self.ids) - 1), longest - 1)
        return [
            Row(self.ids[i : i + longest], (False, *self.trained[i + 1 : i + longest]), self.example) for i in starts
        ]
