"""How much of the prompts that are new goes into a step, so that who waits for the next token does not wait long."""

from __future__ import annotations

from collections.abc import Sequence

from lorafit.serving.rows import Row

MOST = 512  # tokens of prompts in one step
LEAST = 16


class Pace:
    """Learns from each step what a token of a prompt adds to it. stall: seconds that prompts may add to a step in which
    others wait for their next token."""

    def __init__(self, stall: float):
        self.stall = stall
        self.per_token = 0.0  # seconds that a token of a prompt adds to a step
        self.single = 0.0  # seconds of a step without one

    def shares(self, rows: Sequence[Row]) -> dict[Row, int]:
        """How many tokens of each request go into the next step."""
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
        """From a step of so many tokens of each request, which took so long in the model."""
        long = sum(n for n in lengths if n > 1)
        if not long:
            self.single = seconds if not self.single else 0.9 * self.single + 0.1 * seconds
        elif long >= LEAST:
            others = self.single if long < sum(lengths) else 0.0
            added = max(seconds - others, seconds / 10) / long
            self.per_token = added if not self.per_token else 0.7 * self.per_token + 0.3 * added
