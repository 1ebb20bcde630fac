"""The blocks that a model is a stack of: left out from below, watched, or computed twice."""

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
    """The blocks a model is a stack of, as its family names them; empty where it names none."""
    names = getattr(base.model, "_no_split_modules", None) or ()
    stacks = [
        list(module)
        for module in base.model.modules()
        if isinstance(module, nn.ModuleList) and len(module) and all(type(part).__name__ in names for part in module)
    ]
    return max(stacks, key=len, default=[])


# Families whose body is: embed, then block after block over one stream, then a norm. Their blocks can be left out from
# below, and the stream given where the embedding would be.
STREAMS = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3"})


def free_blocks(base: Base, plan: Plan) -> int:
    """How many of the lowest blocks need not be run again: those below every site, in a family of STREAMS."""
    model = base.model
    declared = isinstance(model, PreTrainedModel) and model.config.model_type in STREAMS
    return blocks_below(base, plan) if declared else 0


def blocks_below(base: Base, plan: Plan) -> int:
    """How many of the lowest blocks have no site of the plan, nor anything below them."""
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
    """Another forward for these modules, for the length of the block."""
    before = [vars(module).get("forward") for module in modules]
    try:
        for module in modules:
            module.forward = forward
        yield
    finally:
        for module, own in zip(modules, before, strict=True):
            vars(module).pop("forward", None)
            if own is not None:
                module.forward = own


def skipping(base: Base, blocks: int) -> AbstractContextManager[None]:
    """Have the lowest `blocks` blocks hand on what they are given."""
    return shadowed(blocks_of(base)[:blocks], lambda hidden_states, *_, **__: hidden_states)


class _Reached(Exception):
    pass


@contextmanager
def inputs_of_blocks(base: Base, blocks: Sequence[int]) -> Iterator[list[Tensor]]:
    """What reaches these blocks, in their order, when the model is run inside: the run ends at the last of them. The
    list is filled then."""
    modules = blocks_of(base)
    seen: list[Tensor] = []

    def reached(hidden_states: Tensor, *_: object, **__: object) -> Tensor:
        seen.append(hidden_states)
        raise _Reached

    def passed(original: Callable[..., Tensor]) -> Callable[..., Tensor]:
        def forward(hidden_states: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            seen.append(hidden_states)
            return original(hidden_states, *args, **kwargs)

        return forward

    with ExitStack() as held:
        held.enter_context(suppress(_Reached))
        for block in blocks[:-1]:
            held.enter_context(shadowed(modules[block : block + 1], passed(modules[block].forward)))
        held.enter_context(shadowed(modules[blocks[-1] : blocks[-1] + 1], reached))
        yield seen


@contextmanager
def recomputing(base: Base, on: bool = True) -> Iterator[None]:
    """Have each block keep its input alone, and compute the rest again when the backward comes to it: the gradients are
    the same, for about a third more time. `on` False does nothing.

    Goes inside `attach` and `packing`, and `backward()` inside it. Raises AttachError for a model without known blocks.
    """
    blocks = blocks_of(base) if on else []
    if on and not blocks:
        raise AttachError(f"'{base.name}' names no blocks that could be computed twice: leave recomputing out")
    if shadowed := [block for block in blocks if "forward" in vars(block)]:
        raise AttachError(f"the forward of {type(shadowed[0]).__name__} is already replaced: leave that block first")
    try:
        for block in blocks:
            block.forward = _twice(block.forward)
        yield
    finally:
        for block in blocks:
            vars(block).pop("forward", None)


def _twice(original: Callable[..., Any]) -> Callable[..., Any]:
    def forward(*args: Any, **kwargs: Any) -> Any:
        if torch.is_grad_enabled():
            return checkpoint(original, *args, use_reentrant=False, **kwargs)
        return original(*args, **kwargs)

    return forward
