"""Greedy decoding of many prompts, by transformers' own generate, with whatever is attached to the base."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from transformers import GenerationConfig

from lorafit.base import Base
from lorafit.data.render import Renderer

BATCH = 32


@dataclass(frozen=True)
class Answer:
    """Text without special tokens, and whether it ended by itself with an end-of-turn token."""

    text: str
    stopped: bool


@torch.no_grad()
def generate(
    base: Base,
    renderer: Renderer,
    prompts: Sequence[Sequence[int]],
    max_new_tokens: int,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> list[Answer]:
    """Answers in the order of the prompts (token ids). Prompts of like length are decoded together."""
    pad = renderer.stop_ids[0]
    config = GenerationConfig(
        do_sample=False,
        max_new_tokens=max_new_tokens,
        eos_token_id=list(renderer.stop_ids),
        pad_token_id=pad,
        use_cache=True,
    )
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, Answer] = {}
    for start in range(0, len(order), BATCH):
        part = order[start : start + BATCH]
        width = max(len(prompts[i]) for i in part)
        ids = torch.full((len(part), width), pad, dtype=torch.int64)
        seen = torch.zeros((len(part), width), dtype=torch.int64)
        for k, i in enumerate(part):
            ids[k, width - len(prompts[i]) :] = torch.tensor(prompts[i])
            seen[k, width - len(prompts[i]) :] = 1
        model = cast(Any, base.model)
        out = model.generate(
            input_ids=ids.to(base.device), attention_mask=seen.to(base.device), generation_config=config
        )
        for k, i in enumerate(part):
            new = out[k, width:].tolist()
            end = next((n for n, token in enumerate(new) if token in renderer.stop_ids), None)
            text = renderer.tokenizer.decode(new[:end], skip_special_tokens=True)
            answers[i] = Answer(text.strip(), end is not None)
        progress(len(answers), len(prompts))
    return [answers[i] for i in range(len(prompts))]
