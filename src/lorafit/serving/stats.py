"""What an engine is doing, and what it has done."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Stats:
    """What the engine is doing, and what it has done since it began.

    Args:
        running: Requests that are being answered.
        waiting: Requests that wait.
        answering: Adapters of the requests that are being answered, the bare base apart.
        queued: Adapters of the requests that wait, the bare base apart.
        slots_used: Share of all slots' tokens that have keys and values.
        prompt_tokens: Tokens of prompts.
        known_tokens: Of these, those whose keys and values were there already.
        tokens: Tokens of answers.
        requests: Requests that were begun.
        steps: Steps of the engine.
        seconds: Of these steps.
        model_seconds: Of these, in the model.
        served: Tokens of prompts and answers, by adapter.
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
