"""torch's fused encoder layers, which pass over the layers within them: kept off while something is attached."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn
from torch.backends import mha

from lorafit.bases.base import Base


class _Fused:
    """torch's fused encoder layer, which in `eval()` reads the weights of the layers within it past their forwards.

    Its switch is one for the whole process, so it is counted who wants it off.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unwanted = 0
        self._before = True

    @contextmanager
    def wanted(self, on: bool, model: nn.Module) -> Iterator[None]:
        """Off for the length of the block where the model has such layers; `on` within takes that back."""
        concerned = any(isinstance(module, nn.TransformerEncoderLayer) for module in model.modules())
        change = 0 if not concerned else -1 if on else 1
        self._count(change)
        try:
            yield
        finally:
            self._count(-change)

    def _count(self, change: int) -> None:
        with self._lock:
            if change and not self._unwanted:
                self._before = mha.get_fastpath_enabled()
            if change:
                self._unwanted += change
                mha.set_fastpath_enabled(self._before and not self._unwanted)


FUSED = _Fused()


def layer_by_layer(base: Base) -> AbstractContextManager[None]:
    """Have the base call every layer within torch's encoder layers for the length of the block, as `attach` does: fused
    they would pass over an adapter. What comes out is rounded along another path."""
    return FUSED.wanted(False, base.model)
