"""Counts of an engine: its present requests, and its requests, tokens and steps since it began."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stats:
    """Counts of an engine.

    Args:
        running: requests that are being answered.
        waiting: requests that wait.
        answering: adapters of the requests that are being answered, without the bare base.
        queued: adapters of the requests that wait, without the bare base.
        slots_used: share of the slots' room that busy slots fill.
        prompt_tokens: tokens of prompts.
        known_tokens: of these, those whose keys and values were there already.
        tokens: tokens of answers.
        requests: requests that have begun.
        steps: steps of the engine.
        seconds: that these steps took.
        model_seconds: of these, those in the model.
        served: tokens of prompts and answers, by adapter; None: the bare base.
    """

    running: int = 0
    waiting: int = 0
    answering: frozenset[str] = frozenset()
    queued: frozenset[str] = frozenset()
    slots_used: float = 0.0
    prompt_tokens: int = 0
    known_tokens: int = 0
    tokens: int = 0
    requests: int = 0
    steps: int = 0
    seconds: float = 0.0
    model_seconds: float = 0.0
    served: Mapping[str | None, int] = field(default_factory=dict)
