"""What the engine's thread does beside answering: trying adapters that are new, and work that comes in pieces."""

from __future__ import annotations

from collections.abc import Generator
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lorafit.errors import AdapterError
from lorafit.serving.mixing import Loaded

PROBED = 4  # tokens an adapter is tried on: of one alone, attention would not show what it asks and is asked


@dataclass(eq=False)
class Probe:
    """An adapter that is tried beside a step: one of its own would keep all the others waiting for it. done: logits
    (2, vocabulary) of the bare base, and with it."""

    name: str
    loaded: Loaded
    done: Future[Tensor] = field(default_factory=Future)

    @staticmethod
    def text(vocabulary: int) -> list[int]:
        """Token ids it is tried on."""
        return [(i + 1) * vocabulary // (PROBED + 1) for i in range(PROBED)]

    def require_effect(self) -> None:
        """Wait for what was found. Raises AdapterError where the adapter spoils the base, or changes nothing."""
        bare, adapted = self.done.result()
        if not adapted.isfinite().all():
            raise AdapterError(f"'{self.name}': with it the base gives no finite numbers: train it again")
        if self.loaded.is_nothing or torch.equal(bare, adapted):
            raise AdapterError(f"'{self.name}': it changes nothing: train it first")

    def fail(self, why: str) -> None:
        """Nothing was found: the others go on without it, and have lost nothing."""
        self.done.set_exception(AdapterError(f"'{self.name}' cannot be tried: {why}: load it again"))


@dataclass(eq=False)
class Aside:
    """Work in pieces, each of which is done between two steps."""

    pieces: Generator[None, None, Any]
    done: Future[Any] = field(default_factory=Future)

    def __post_init__(self) -> None:
        self.done.set_running_or_notify_cancel()  # whoever waits no longer cancels their waiting alone

    def goes_on(self) -> bool:
        """Do its next piece; false once there is none."""
        try:
            next(self.pieces)
        except StopIteration as ended:
            self.done.set_result(ended.value)
        except Exception as error:  # whatever it is, whoever waits hears of it, and the engine goes on
            self.done.set_exception(error)
        return not self.done.done()
