"""Buffers that a model writes in its own forward, as a batch norm in `train()` does its running statistics."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lorafit.bases.base import Base


@contextmanager
def unwritten(base: Base) -> Iterator[None]:
    """Have every module in `train()` write to copies of its buffers for the length of the block, and forget them: it
    computes what it always does, and the base keeps its bytes. Buffers that are not saved with a model are constants
    (masks, frequencies) and not copied."""
    handles: list[RemovableHandle] = []
    try:
        for module in base.model.modules():
            if module._buffers.keys() - module._non_persistent_buffers_set:
                handles += _on_copies(module)
        yield
    finally:
        for handle in handles:
            handle.remove()


def _on_copies(module: nn.Module) -> tuple[RemovableHandle, RemovableHandle]:
    """Hooks, for the old spectral norm writes in one: these stand before it, and after all others. Values are not
    written back, for a backward reads what a batch norm wrote to."""
    own: list[dict[str, Tensor | None]] = []

    def lend(module: nn.Module, _: object) -> None:
        if module.training:
            own.append(dict(module._buffers))
            for name, tensor in own[-1].items():
                if tensor is not None and name not in module._non_persistent_buffers_set:
                    module._buffers[name] = tensor.clone()

    def take_back(module: nn.Module, _: object, __: object) -> None:
        if own:
            module._buffers.update(own.pop())

    unseen: Callable[[Callable[..., None]], Any] = torch.compiler.disable  # a compiler need not understand them
    return (
        module.register_forward_pre_hook(unseen(lend), prepend=True),
        module.register_forward_hook(unseen(take_back), always_call=True),
    )
