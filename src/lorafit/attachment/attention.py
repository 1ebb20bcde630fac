"""Another way to compute attention, for the length of a block."""

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
    """Have the model compute attention within the rows of a pack for the length of the block.

    Inside, the model is called with `segments` and with their positions. `on` False does nothing.
    """
    return attending(base, packs.NAME, packs.attention) if on else nullcontext()


@contextmanager
def attending(base: Base, name: str, attention: Callable[..., tuple[Tensor, None]]) -> Iterator[None]:
    """Have the model compute attention by this function for the length of the block, by its configuration.

    name: under which transformers finds it. It is called as transformers calls attention, with whatever the model is
    called with besides; in place of a mask it is given what `packing.window` gives: rows are kept apart without one.
    """
    model = base.model
    if not isinstance(model, PreTrainedModel):
        raise AttachError(
            f"{base.name}: no model of transformers, whose attention could be replaced: leave it as it is"
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
    """How a configuration and those within it compute attention, in the form in which it can be set again."""
    within = {name: _attention_of(part) for name in config.sub_configs if (part := getattr(config, name, None))}
    return {"": config._attn_implementation, **within}
