"""Checks whether a base can be served: its family must have been tested, and its logits over slots are compared."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from lorafit.bases.base import Base
from lorafit.errors import NotServedError

# Tested families in which tokens affect each other only through transformers' attention interface. Each base is still
# measured before it is served.
FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3", "gpt2", "gpt_neox", "olmo2", "phi3", "granite"})
PIECES = (11, 1, 7, 5)  # tokens of the pieces of the text that is measured


def servable(base: Base) -> PreTrainedModel:
    """The model of a base of one of these families. Raises NotServedError for another base."""
    model = base.model
    if base.head:
        raise NotServedError(f"'{base.name}' cannot be served: it is open as a classifier: open it without labels")
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise NotServedError(
            f"'{base.name}' cannot be served: it is not a causal language model of transformers: open one"
        )
    family = model.config.model_type
    if family not in FAMILIES:
        raise NotServedError(
            f"'{base.name}' cannot be served: the family {family} has not been tried: open a base of one of "
            f"{', '.join(sorted(FAMILIES))}"
        )
    return model


def same_for_all(model: PreTrainedModel) -> int | None:
    """The length up to which the rotation of a position does not depend on the other rows of a step; None: at any
    length. Beyond it some types of rotary embedding change the frequencies of all rows by the longest one."""
    config: Any = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) not in {"longrope", "dynamic"}:
        return None
    original = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(original or config.max_position_embeddings)


def at_once(model: PreTrainedModel) -> tuple[list[list[int]], Tensor]:
    """A text in pieces, and the model's logits (pieces, vocabulary) after each, from one forward over the whole."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = [(7 * i * i + 3 * i + 1) % vocabulary for i in range(sum(PIECES))]
    ends = torch.tensor(PIECES).cumsum(0)
    with torch.inference_mode():
        logits = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0]
    pieces = [ids[end - n : end] for n, end in zip(PIECES, ends.tolist(), strict=True)]
    return pieces, logits[(ends - 1).to(logits.device)]


def require_same(base: Base, logits: Tensor, expected: Tensor, tolerance: float) -> None:
    """Raise NotServedError unless logits computed in pieces are the expected ones, within a relative tolerance."""
    off = float((logits.float() - expected.float()).norm() / expected.float().norm())
    if not off <= tolerance:
        raise NotServedError(
            f"'{base.name}' cannot be served: token by token its logits differ from those of the whole text "
            f"(by {off:.1%}): open a base whose only state is keys and values"
        )
