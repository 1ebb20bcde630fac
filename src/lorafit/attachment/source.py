"""The interface of values that can be attached to a base: it gives the factors, in the dtype of the computation."""

from __future__ import annotations

from typing import Protocol

import torch
from torch import Tensor

from lorafit.adapters.adapter import Adapter


class Source(Protocol):
    """A source of factors: an Adapter (as `Fixed`), or the state that trains one.

    Attributes:
        groups: For each site that begins a group, the paths of the sites that are called with the same input tensor.
            The first forward finds the groups; they are kept for later attachments of the same source.
    """

    groups: dict[str, list[str]]

    @property
    def adapter(self) -> Adapter: ...

    def factors(self, dtype: torch.dtype, device: torch.device) -> dict[str, dict[str, Tensor]]:
        """The factors by site path and name: matrices in `dtype`, vectors in fp32."""
        ...

    def drop(self, x: Tensor) -> Tensor:
        """x after the adapter's dropout."""
        ...


class Fixed:
    """An Adapter as a Source. Its factors are cast once for each dtype and device."""

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
