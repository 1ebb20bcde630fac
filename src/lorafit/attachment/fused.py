"""Turns off torch's fused encoder layers while something is attached, because they do not call their inner layers."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager

from torch import nn
from torch.backends import mha

from lorafit.bases.base import Base


class _Fused:
    """torch's fused encoder layer, which in `eval()` reads the weights of its inner layers without calling them.

    torch has one switch for the whole process, so this counts how many attachments need it off.
    """

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._unwanted = 0
        self._before = True

    @contextmanager
    def wanted(self, on: bool, model: nn.Module) -> Iterator[None]:
        """Turn fused layers off for the length of the block, or on again within such a block. Does nothing if the model
        has no encoder layer of torch."""
        has_any = any(isinstance(module, nn.TransformerEncoderLayer) for module in model.modules())
        change = 0 if not has_any else -1 if on else 1
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
    """Let torch's encoder layers call their inner layers for the length of the block, as `attach` does; a fused layer
    would ignore an adapter. The output is rounded differently from that of a fused layer."""
    return FUSED.wanted(False, base.model)
