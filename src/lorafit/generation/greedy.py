"""Greedy decoding by transformers' own generate, with whatever is attached to the base: for the families that the
engine does not serve, and the oracle of what it answers."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import DynamicCache, GenerationConfig
from transformers.cache_utils import DynamicLayer
from transformers.generation.streamers import BaseStreamer

from lorafit.bases.base import Base
from lorafit.data.render import Renderer
from lorafit.data.thoughts import parted, text_of
from lorafit.generation.text import Words

BATCH = 64
GROWN = 4  # bytes held for each of keys and values: they are copied as they grow, and leave holes (measured: 2.5 to 3)


@dataclass(frozen=True)
class Answer:
    """Text without special tokens, and whether it ended by itself with an end-of-turn token. ids: its tokens, those of
    the reasoning too, for the marks of calls may be special ones. reasoning: what was thought before it."""

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
    """Answers in the order of the prompts (token ids). Prompts of like length are decoded together.

    What all prompts begin with (a system prompt, examples given) is computed once. room: bytes that keys and values may
    take; fewer prompts are decoded at a time where they would take more.
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
    batch = BATCH if room is None else max(1, min(BATCH, room // (GROWN * bytes_per_token(base) * longest)))
    progress(0, len(prompts))
    for start in range(0, len(order), batch):
        part = order[start : start + batch]
        width = max(len(prompts[i]) for i in part)
        ids = torch.full((len(part), width), pad, dtype=torch.int64)
        seen = torch.zeros((len(part), width), dtype=torch.int64)
        for k, i in enumerate(part):  # the shared start on the left, the prompt's own rest on the right
            own = prompts[i][len(shared) :]
            ids[k] = torch.tensor([*shared, *[pad] * (width - len(prompts[i])), *own])
            seen[k, : len(shared)] = seen[k, width - len(own) :] = 1
        past = copy.deepcopy(cache)
        if past is not None:
            past.batch_repeat_interleave(len(part))
        out = model.generate(input_ids=ids.to(base.device), attention_mask=seen.to(base.device), past_key_values=past)
        for k, i in enumerate(part):
            new = out[k, width:].tolist()
            end = next((n for n, token in enumerate(new) if token in renderer.stop_ids), None)
            reasoning, said = parted(text_of(renderer.tokenizer, new[:end], renderer.told), renderer.thought)
            answers[i] = Answer(said, end is not None, tuple(new[:end]), reasoning)
        progress(len(answers), len(prompts))
    return [answers[i] for i in range(len(prompts))]


@torch.no_grad()
def stream(base: Base, renderer: Renderer, prompt: list[int], max_new_tokens: int, emit: Callable[[str], None]) -> None:
    """Answer one prompt; `emit` is called with each piece of text as soon as its characters are whole."""
    ids = torch.tensor([prompt], device=base.device)
    streamer = _Streamer(Words(renderer.tokenizer, renderer.told), emit)
    _greedy(base, renderer, max_new_tokens).generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), streamer=streamer
    )


class _Streamer(BaseStreamer):
    """Hands on whole characters, of the answer alone."""

    def __init__(self, words: Words, emit: Callable[[str], None]):
        self._words, self._emit = words, emit
        self._begun = False  # until the prompt has come, which is not told

    def put(self, value: torch.Tensor) -> None:
        if self._begun:
            self._tell(value.tolist())
        self._begun = True

    def end(self) -> None:
        self._tell([], ended=True)

    def _tell(self, ids: list[int], ended: bool = False) -> None:
        if text := self._words.add(ids, ended):
            self._emit(text)


def _greedy(base: Base, renderer: Renderer, max_new_tokens: int) -> Any:
    """A second handle on the model's modules, without the base's own habits: generate would mix them (a penalty on
    repetition, beams) into what it is asked for."""
    model: Any = copy.copy(base.model)
    stops = list(renderer.stop_ids)
    model.generation_config = GenerationConfig(
        do_sample=False, max_new_tokens=max_new_tokens, eos_token_id=stops, pad_token_id=stops[0]
    )
    return model


def bytes_per_token(base: Base) -> int:
    """Bytes of keys and values, of all layers, as wide as the hidden state where the base does not say."""
    model: Any = base.model
    config = model.config.get_text_config()
    heads = getattr(config, "num_attention_heads", None) or 1
    wide = getattr(config, "head_dim", None) or config.hidden_size // heads
    shared = getattr(config, "num_key_value_heads", None) or heads
    return 2 * int(config.num_hidden_layers) * int(shared) * int(wide) * base.dtype.itemsize


def _common_start(prompts: Sequence[list[int]]) -> list[int]:
    """The tokens all prompts begin with, at least one left to each; nothing where there is but one prompt."""
    if len(prompts) < 2:
        return []
    first, last = min(prompts), max(prompts)  # whatever these two share, those between them in order share
    n = next((i for i, (a, b) in enumerate(zip(first, last, strict=False)) if a != b), len(first))
    return first[: min(n, min(map(len, prompts)) - 1)]


def _state_after(base: Base, ids: list[int]) -> DynamicCache | None:
    """Keys and values of a prompt's start; None where a model's state is of another kind, or where it takes its
    positions from elsewhere than position ids, so that padding after the start would count as distance."""
    if "position_ids" not in inspect.signature(base.model.forward).parameters:
        return None
    cache = base.model(input_ids=torch.tensor([ids], device=base.device), use_cache=True).get("past_key_values")
    plain = isinstance(cache, DynamicCache) and all(type(layer) is DynamicLayer for layer in cache.layers)
    return cache if plain else None
