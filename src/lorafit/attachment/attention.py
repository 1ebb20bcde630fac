"""Replaces the model's attention function for the length of a block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

from torch import Tensor
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedConfig
from transformers.modeling_utils import PreTrainedModel

from lorafit.attachment import packing as packs
from lorafit.bases.base import Base
from lorafit.errors import AttachError


def packing(base: Base, on: bool = True) -> AbstractContextManager[None]:
    """Let each row of a pack attend only to itself, for the length of the block. Inside, the model must be called with
    `segments` and with their positions.

    Args:
        base: The base.
        on: False for a context that does nothing.
    """
    return attending(base, packs.NAME, packs.attention) if on else nullcontext()


@contextmanager
def attending(base: Base, name: str, attention: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    """Let the model compute attention with this function for the length of the block.

    Args:
        base: The base, a model of transformers.
        name: The name under which the function is registered in transformers, and set in the model's configuration.
        attention: The function. It is called like every attention function of transformers, with the additional
            arguments of the model's call. In place of a mask it receives the result of `packing.window`, because it
            keeps rows apart without a mask.

    Raises:
        AttachError: If the model is not one of transformers.
    """
    model = base.model
    if not isinstance(model, PreTrainedModel):
        raise AttachError(
            f"{base.name}: not a model of transformers, so its attention cannot be replaced: leave packing() out"
        )
    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, packs.window)
    before = _attention_of(model.config)
    model.config._attn_implementation = name
    try:
        yield
    finally:
        model.config._attn_implementation = before


def _attention_of(config: PreTrainedConfig) -> dict[str, Any]:
    """The attention functions of a configuration and its sub-configurations, in the form in which they can be set."""
    within = {name: _attention_of(part) for name in config.sub_configs if (part := getattr(config, name, None))}
    return {"": config._attn_implementation, **within}
