"""Which bases can be served: families that were tried, each base measured before it is."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers.modeling_utils import PreTrainedModel

from lorafit.bases.base import Base
from lorafit.errors import NotServedError

# Families whose attention is all that passes from token to token, through transformers' attention interface. Each is
# tested; a base of one of them is still measured before it is served.
FAMILIES = frozenset({"llama", "mistral", "qwen2", "qwen3", "smollm3", "gpt2", "gpt_neox", "olmo2", "phi3", "granite"})
PIECES = (11, 1, 7, 5)  # tokens of the text that is measured, in pieces


def servable(base: Base) -> PreTrainedModel:
    """The model of a base of one of these families. Raises NotServedError for another."""
    model = base.model
    if not isinstance(model, PreTrainedModel) or not model.can_generate():
        raise NotServedError(
            f"'{base.name}' cannot be served: it is no causal language model of transformers: open one"
        )
    kind = model.config.model_type
    if kind not in FAMILIES:
        raise NotServedError(
            f"'{base.name}' cannot be served: the family {kind} has not been tried: open a base of one of "
            f"{', '.join(sorted(FAMILIES))}"
        )
    return model


def same_for_all(model: PreTrainedModel) -> int | None:
    """The length up to which a position is rotated alike whatever else is in the step; None where it always is. Beyond,
    these kinds change the frequencies of all rows by the longest."""
    config: Any = model.config.get_text_config()
    rope = getattr(config, "rope_parameters", None) or getattr(config, "rope_scaling", None) or {}
    if rope.get("rope_type", rope.get("type")) not in {"longrope", "dynamic"}:
        return None
    said = rope.get("original_max_position_embeddings") or getattr(config, "original_max_position_embeddings", None)
    return int(said or config.max_position_embeddings)


def at_once(model: PreTrainedModel) -> tuple[list[list[int]], Tensor]:
    """A text in pieces, and the model's own logits (pieces, vocabulary) after each, from reading it at once."""
    vocabulary = int(model.config.get_text_config().vocab_size)
    ids = [(7 * i * i + 3 * i + 1) % vocabulary for i in range(sum(PIECES))]
    ends = torch.tensor(PIECES).cumsum(0)
    with torch.inference_mode():
        logits = model(torch.tensor([ids], device=model.device), use_cache=False).logits[0]
    pieces = [ids[end - n : end] for n, end in zip(PIECES, ends.tolist(), strict=True)]
    return pieces, logits[(ends - 1).to(logits.device)]


def require_same(base: Base, found: Tensor, wanted: Tensor, rounding: float) -> None:
    """Raise NotServedError unless logits piece by piece are those at once, within `rounding` relative."""
    off = float((found.float() - wanted.float()).norm() / wanted.float().norm())
    if not off <= rounding:
        raise NotServedError(
            f"'{base.name}' cannot be served: token by token it computes something else than "
            f"at once (by {off:.1%}): open a base whose state is in keys and values alone"
        )
