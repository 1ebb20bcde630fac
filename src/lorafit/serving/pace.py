"""Decides how many tokens of each request go into a step, so that new prompts do not delay other requests much."""

from __future__ import annotations

from collections.abc import Sequence

from lorafit.serving.rows import Row

MOST = 512  # tokens of prompts in one step
LEAST = 16


class Pace:
    """Learns from each step how much time a token of a prompt adds. stall: seconds that prompts may add to a step in
    which other requests wait for their next token."""

    def __init__(self, stall: float):
        self.stall = stall
        self.per_token = 0.0  # seconds that a token of a prompt adds to a step
        self.single = 0.0  # seconds of a step without prompts

    def shares(self, rows: Sequence[Row]) -> dict[Row, int]:
        """The number of tokens of each request in the next step."""
        single = [row for row in rows if row.left == 1]
        prompts = [row for row in rows if row.left > 1]
        budget = MOST
        if single and self.per_token:
            budget = max(LEAST, min(MOST, int(self.stall / self.per_token)))
        shares = dict.fromkeys(single, 1)
        for row in prompts:
            if budget <= 0:
                break
            shares[row] = min(row.left, budget)
            budget -= shares[row]
        return shares

    def learn(self, lengths: Sequence[int], seconds: float) -> None:
        """Learn from a step. lengths: tokens of each request; seconds: that the model took."""
        long = sum(n for n in lengths if n > 1)
        if not long:
            self.single = seconds if not self.single else 0.9 * self.single + 0.1 * seconds
        elif long >= LEAST:
            others = self.single if long < sum(lengths) else 0.0
            added = max(seconds - others, seconds / 10) / long
            self.per_token = added if not self.per_token else 0.7 * self.per_token + 0.3 * added
