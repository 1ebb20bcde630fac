"""Work of the engine's thread in addition to answers: probes of new adapters, and tasks that run between steps."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorafit.errors import AdapterError
from lorafit.serving.mixing import Loaded

PROBED = 4  # tokens of a probe: with a single one, attention would not depend on queries and keys


@dataclass(eq=False)
class Probe:
    """A new adapter that is tried as part of a step, so that the other requests do not wait for it. done: logits (2,
    vocabulary) of the bare base, and with the adapter."""

    name: str
    loaded: Loaded
    done: Future[Tensor] = field(default_factory=Future)

    @staticmethod
    def text(vocabulary: int) -> list[int]:
        """The token ids that adapters are tried on."""
        return [(i + 1) * vocabulary // (PROBED + 1) for i in range(PROBED)]

    def require_effect(self) -> None:
        """Wait for the logits. Raises AdapterError where they are not finite, or the adapter changes nothing."""
        bare, adapted = self.done.result()
        if not adapted.isfinite().all():
            raise AdapterError(f"'{self.name}': with it the base gives no finite numbers: train it again")
        if self.loaded.is_zero or torch.equal(bare, adapted):
            raise AdapterError(f"'{self.name}': it changes nothing: train it first")

    def fail(self, why: str) -> None:
        """End the probe without a result; the requests of the step are not affected."""
        self.done.set_exception(AdapterError(f"'{self.name}' cannot be tried: {why}: load it again"))


@dataclass(eq=False)
class Task:
    """A generator of which one piece is run at a time, between steps. done: what it returns."""

    pieces: Generator[None, None, Any]
    done: Future[Any] = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.done.set_running_or_notify_cancel()  # a caller that stops waiting does not cancel the task

    def advance(self) -> bool:
        """Run the next piece. Returns whether there may be another."""
        try:
            next(self.pieces)
        except StopIteration as ended:
            self.done.set_result(ended.value)
        except Exception as error:  # the caller gets it, and the engine continues
            self.done.set_exception(error)
        return not self.done.done()
