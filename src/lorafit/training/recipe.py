"""The resolved numbers of one training run."""

from __future__ import annotations

import math
from dataclasses import dataclass

EARLY = 8  # an early validation follows after this fraction (1 / EARLY) of the steps to the first one


@dataclass(frozen=True)
class Recipe:
    """The numbers of a training.

    Args:
        learning_rate: The peak of the learning rate.
        batch_size: Examples per step.
        steps: Steps in all.
        warmup: Steps in which the rate rises.
        validate_every: Steps between two validations.
        patience: Training stops after so many validations without a better one.
        weight_decay: AdamW's decay, on matrices only.
        dropout: The probability with which an input of an adapter is dropped.
        clip: The largest norm of the gradient.
        micro_tokens: Tokens per forward, padding included. It bounds memory; results differ only by rounding.
        recompute: Whether blocks are computed again for the backward, which takes less memory and more time.
        seed: The seed of the order of the rows and of dropout.
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
        """The step of an additional early validation, which shows the first steep fall; 0 if there is only one
        validation, or if they are close together."""
        return self.validate_every // EARLY if self.validate_every < self.steps else 0

    def validations_after(self, step: int) -> int:
        """How many validations follow after a step if none of them stops the run."""
        return math.ceil((self.steps - step) / self.validate_every) + (step < self.early)
