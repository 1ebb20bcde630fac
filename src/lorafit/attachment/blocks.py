"""The blocks of a model: which lie below every site; how to skip them, record their inputs, or recompute them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_utils import PreTrainedModel

from lorafit.adapters.plan import Plan
from lorafit.bases.base import Base
from lorafit.errors import AttachError


def blocks_of(base: Base) -> list[nn.Module]:
    """The blocks of the model, lowest first: the longest list of modules whose types the model's family declares as
    blocks (`_no_split_modules`). Empty if the family declares none."""
    names = getattr(base.model, "_no_split_modules", None) or ()
    stacks = [
        list(module)
        for module in base.model.modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(type(part).__name__ in names for part in module)
    ]
    return max(stacks, key=len, default=[])


# Families whose body is an embedding, then one block after the other, then a norm. Their lowest blocks can be skipped
# if the hidden states after them are given in place of the embeddings.
STREAMS = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3"})


def free_blocks(base: Base, plan: Plan) -> int:
    """The number of blocks, from the lowest, whose output does not change in training: those below every site of the
    plan, if the family is one of STREAMS."""
    model = base.model
    declared = isinstance(model, PreTrainedModel) and model.config.model_type in STREAMS
    return blocks_below(base, plan) if declared else 0


def blocks_below(base: Base, plan: Plan) -> int:
    """The number of blocks, from the lowest, that have no site of the plan in them or below them."""
    paths = {id(module): path for path, module in base.model.named_modules()}
    blocks = [f"{paths[id(block)]}." for block in blocks_of(base)]
    lowest = len(blocks) - 1
    for slot in plan.slots:
        inside = [i for i, path in enumerate(blocks) if slot.site.path.startswith(path)]
        if not inside and slot.site.path not in base.head_paths():
            return 0
        lowest = min([lowest, *inside])
    return max(0, lowest)


@contextmanager
def shadowed(modules: Sequence[nn.Module], forward: Callable[..., Tensor]) -> Iterator[None]:
    """Replace the forward of these modules for the length of the block."""
    before = [vars(module).get("forward") for module in modules]
    try:
        for module in modules:
            module.forward = forward
        yield
    finally:
        for module, earlier in zip(modules, before, strict=True):
            vars(module).pop("forward", None)
            if earlier is not None:
                module.forward = earlier


def skipping(base: Base, blocks: int) -> AbstractContextManager[None]:
    """Skip the lowest `blocks` blocks: each returns its input."""
    return shadowed(blocks_of(base)[:blocks], lambda hidden_states, *_, **__: hidden_states)


class _LastBlockReached(Exception):
    pass


@contextmanager
def inputs_of_blocks(base: Base, blocks: Sequence[int]) -> Iterator[list[Tensor]]:
    """Record the inputs of these blocks when the model is run inside the block.

    Args:
        base: The base.
        blocks: The numbers of the blocks, from the lowest to the highest. The run ends at the last of them, and the
            `with` block with it.

    Returns:
        A context manager that gives a list. After the run it holds the input of each block.
    """
    modules = blocks_of(base)
    inputs: list[Tensor] = []

    def record_and_stop(hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        inputs.append(hidden_states)
        raise _LastBlockReached

    def recorded(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            inputs.append(hidden_states)
            return original(hidden_states, *args, **kwargs)

        return forward

    with ExitStack() as stack:
        stack.enter_context(suppress(_LastBlockReached))
        for block in blocks[:-1]:
            stack.enter_context(shadowed(modules[block : block + 1], recorded(modules[block].forward)))
        stack.enter_context(shadowed(modules[blocks[-1] : blocks[-1] + 1], record_and_stop))
        yield inputs


@contextmanager
def recomputing(base: Base, on: bool = True) -> Iterator[None]:
    """Activation checkpointing: each block keeps only its input and is computed again in the backward. The gradients
    are the same; a step takes about a third longer.

    Enter it inside `attach` and `packing`, and call `backward()` inside it.

    Args:
        base: The base.
        on: False for a context that does nothing.

    Raises:
        AttachError: If the model declares no blocks, or the forward of a block is already replaced.
    """
    blocks = blocks_of(base) if on else []
    if on and not blocks:
        raise AttachError(f"'{base.name}' declares no blocks, so nothing can be recomputed: leave recomputing() out")
    if replaced := [block for block in blocks if "forward" in vars(block)]:
        raise AttachError(
            f"the forward of {type(replaced[0]).__name__} is already replaced: leave the `with` block that replaced it "
            "first"
        )
    try:
        for block in blocks:
            block.forward = _checkpointed(block.forward)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def _checkpointed(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return checkpoint(original, *args, use_reentrant=False, **kwargs)
        return original(*args, **kwargs)

    return forward
