"""Protects buffers that a model changes in its forward, such as the running statistics of a batch norm in `train()`."""

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
    """Let every module in `train()` write to copies of its buffers for the length of the block.

    A copy is made before each forward and dropped after it, so the results are the same, and the base keeps its bytes.
    Buffers that are not saved with a model are constants (masks, frequencies) and are not copied.
    """
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
    """Hooks that exchange the module's buffers for copies during its forward.

    They are hooks because the old spectral norm writes in a hook: the first of these runs before it, the second after
    it. The buffers themselves are exchanged, not their values, because a backward reads what a batch norm wrote.
    """
    originals: list[dict[str, Tensor | None]] = []

    def use_copies(module: nn.Module, _: object) -> None:
        if module.training:
            originals.append(dict(module._buffers))
            for name, tensor in originals[-1].items():
                if tensor is not None and name not in module._non_persistent_buffers_set:
                    module._buffers[name] = tensor.clone()

    def restore(module: nn.Module, _: object, __: object) -> None:
        if originals:
            module._buffers.update(originals.pop())

    untraced: Callable[[Callable[..., None]], Any] = torch.compiler.disable
    return (
        module.register_forward_pre_hook(untraced(use_copies), prepend=True),
        module.register_forward_hook(untraced(restore), always_call=True),
    )
