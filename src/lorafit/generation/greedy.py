"""Greedy decoding by transformers' own generate, with whatever is attached to the base: prompts in, answers out. It is
used for families that the engine does not serve, and as the reference for the engine's answers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer

from lorafit.bases.base import Base
from lorafit.data.render import Renderer
from lorafit.data.thoughts import parted, text_of
from lorafit.errors import BaseError
from lorafit.generation.text import Detokenizer

BATCH = 64
GROWTH = 4  # bytes held for each byte of keys and values, which are copied as they grow (measured: 2.5 to 3)


@dataclass(frozen=True)
class Answer:
    """An answer. text: without special tokens and reasoning. stopped: whether it ended with an end-of-turn token. ids:
    its tokens, with those of the reasoning, since the marks of calls may be special tokens."""

    text: str
    stopped: bool
    ids: tuple[int, ...] = field(default=(), compare=False)
    reasoning: str = ""


@torch.no_grad()
def generate(
    base: Base,
    renderer: Renderer,
    prompts: Sequence[list[int]],
    max_new_tokens: int,
    progress: Callable[[int, int], None] = lambda done, of: None,
    room: int | None = None,
) -> list[Answer]:
    """Decode an answer to each prompt. Prompts of similar length are decoded together, and a start that all prompts
    share (a system prompt, examples) is computed once.

    Args:
        base: with its adapter attached.
        renderer: whose stop tokens end an answer.
        prompts: token ids.
        max_new_tokens: of each answer.
        progress: called with the number of answers so far and of all.
        room: bytes that keys and values may take; where more are needed, fewer prompts are decoded at a time.

    Returns:
        The answers, in the order of the prompts.
    """
    pad = renderer.stop_ids[0]
    model = _greedy(base, renderer, max_new_tokens)
    shared = _common_start(prompts)
    cache = _state_after(base, shared) if shared else None
    if cache is None:
        shared = []
    order = sorted(range(len(prompts)), key=lambda i: len(prompts[i]))
    answers: dict[int, Answer] = {}
    longest = max(map(len, prompts), default=0) + max_new_tokens
    batch = BATCH if room is None else max(1, min(BATCH, room // (GROWTH * bytes_per_token(base) * longest)))
    progress(0, len(prompts))
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        width = max(len(prompts[i]) for i in part)
        ids = torch.full((len(part), width), pad, dtype=torch.int64)
        seen = torch.zeros((len(part), width), dtype=torch.int64)
        for k, i in enumerate(part):  # the shared start on the left, the rest of the prompt on the right
            rest = prompts[i][len(shared) :]
            ids[k] = torch.tensor([*shared, *[pad] * (width - len(prompts[i])), *rest])
            seen[k, : len(shared)] = seen[k, width - len(rest) :] = 1
        past = copy.deepcopy(cache)
        if past is not None:
            past.batch_repeat_interleave(len(part))
        out = model.generate(input_ids=ids.to(base.device), attention_mask=seen.to(base.device), past_key_values=past)
        for k, i in enumerate(part):
            new = out[k, width:].tolist()
            end = next((n for n, token in enumerate(new) if token in renderer.stop_ids), None)
            reasoning, text = parted(text_of(renderer.tokenizer, new[:end], renderer.special), renderer.thought)
            answers[i] = Answer(text, end is not None, tuple(new[:end]), reasoning)
        progress(len(answers), len(prompts))
    return [answers[i] for i in range(len(prompts))]


@torch.no_grad()
def stream(base: Base, renderer: Renderer, prompt: list[int], max_new_tokens: int, emit: Callable[[str], None]) -> None:
    """Answer one prompt; `emit` is called with each piece of text as soon as its characters are complete."""
    words = Detokenizer(renderer.tokenizer, renderer.special)

    def emit_next(ids: torch.Tensor, scores: object) -> bool:
        if text := words.add(ids[0, -1:].tolist()):
            emit(text)
        return False  # a stopping criterion, which never stops

    ids = torch.tensor([prompt], device=base.device)
    _greedy(base, renderer, max_new_tokens).generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), stopping_criteria=[emit_next]
    )
    if text := words.add([], ended=True):
        emit(text)


def _greedy(base: Base, renderer: Renderer, max_new_tokens: int) -> Any:
    """A copy of the model that shares its modules, without the base's generation config, whose settings (a penalty on
    repetition, beams) would change the answers."""
    if base.head:
        raise BaseError(f"'{base.name}' was opened as a classifier, which writes no text: open it without labels")
    model: Any = copy.copy(base.model)
    stops = list(renderer.stop_ids)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=stops[0]
    )
    return model


def bytes_per_token(base: Base) -> int:
    """Bytes of the keys and values of one token in all layers; each is as wide as the hidden state where the config
    does not say otherwise."""
    model: Any = base.model
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    return 2 * int(config.num_hidden_layers) * int(kv_heads) * int(width) * base.dtype.itemsize


def _common_start(prompts: Sequence[list[int]]) -> list[int]:
    """The tokens that all prompts begin with, leaving at least one to each; empty for a single prompt."""
    if len(prompts) < 2:
        return []
    first, last = min(prompts), max(prompts)  # in lexicographic order: all prompts share what these two share
    n = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: min(n, min(map(len, prompts)) - 1)]


def _state_after(base: Base, ids: list[int]) -> DynamicCache | None:
    """Keys and values of the start of a prompt; None for a model that has another kind of state, or that ignores
    position ids, so that padding after the start would count as distance."""
    if "position_ids" not in inspect.signature(base.model.forward).parameters:
        return None
    cache = base.model(input_ids=torch.tensor([ids], device=base.device), use_cache=True).get("past_key_values")
    is_plain = isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)
    return cache if is_plain else None
