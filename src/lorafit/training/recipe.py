"""The resolved numbers of one training run."""

from __future__ import annotations

import math
from dataclasses import dataclass

EARLY = 8  # of the steps to the first validation, the share after which is validated too


@dataclass(frozen=True)
class Recipe:
    """learning_rate: the peak. batch_size: examples per step. warmup, validate_every: in steps.

    micro_tokens: tokens per forward, padding included where there is some; it bounds memory and, up to rounding,
    nothing else. recompute: whether blocks are computed again for the backward instead of kept: less memory, more time.
    patience: validations without a better one before training stops. clip: bound on the gradient's norm.
    """

    learning_rate: float
    batch_size: int
    steps: int
    warmup: int
    validate_every: int
    patience: int = 3
    weight_decay: float = 0.0
    dropout: float = 0.0
    clip: float = 1.0
    micro_tokens: int = 1024
    recompute: bool = False
    seed: int = 0

    @property
    def early(self) -> int:
        """A step after which is validated too, so that the first fall is seen, which is steep; 0: none, where there is
        but one validation, or they are close together."""
        return self.validate_every // EARLY if self.validate_every < self.steps else 0

    def validations_after(self, step: int) -> int:
        """How many validations are to come after a step, where none stops the run."""
        return math.ceil((self.steps - step) / self.validate_every) + (step < self.early)
