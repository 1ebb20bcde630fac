"""What can be attached."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lorafit.adapters.adapter import Adapter


class Source(Protocol):
    """What can be attached: an Adapter, or the state that trains one.

    groups: paths of sites that are called with the same tensor, by the first of them. The first forward finds them, and
    later attachments of the same source know them.
    """

    groups: dict[str, list[str]]

    @property
    def adapter(self) -> Adapter: ...
    def factors(self, dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, Tensor]]: ...
    def drop(self, x: Tensor) -> Tensor: ...


class Fixed:
    """An Adapter as a Source: its factors are cast once per dtype."""

    def __init__(self, adapter: Adapter):
        self._adapter = adapter
        self.groups: dict[str, list[str]] = {}
        self._cast: dict[tuple[torch.dtype, torch.device], dict[str, dict[str, Tensor]]] = {}

    @property
    def adapter(self) -> Adapter:
        return self._adapter

    def factors(self, dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, Tensor]]:
        key = (dtype, device)
        if key not in self._cast:
            self._cast[key] = self._adapter.factors(dtype, device)
        return self._cast[key]

    def drop(self, x: Tensor) -> Tensor:
        return x
