"""How messages become text: what an adapter keeps of it, so that it is always asked as it was trained."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from typing import Any

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Rendering:
    """How messages become text.

    Args:
        template_hash: of the chat template.
        system: the system prompt put before every conversation that brings none. None: whatever the template itself
            does; "": none.
        now: the time that the template is told, in ISO 8601; None where it asks for none, and then, or for an adapter
            of an earlier version, it is told the time of the moment.
        settings: of the template, by name.
        reasoning: whether an answer may begin with its reasoning. False: prompts end in what the template itself writes
            before an answer without one.
        single: whether the conversations that were trained on asked one question each, but for a few, so that an
            adapter has hardly seen an answer of its own (False too where it is not known).
    """

    template_hash: str
    system: str | None = None
    now: str | None = None
    settings: tuple[tuple[str, Scalar], ...] = ()
    reasoning: bool = True
    single: bool = field(default=False, compare=False)  # of what was asked, not of how it is rendered

    def to_json(self) -> dict[str, Any]:
        """Without what says nothing, so that earlier versions read it where nothing is said that they lack."""
        told = {
            "now": self.now,
            "settings": dict(self.settings),
            "reasoning": None if self.reasoning else False,
            "single": self.single or None,
        }
        return {
            "template_hash": self.template_hash,
            "system": self.system,
            **{name: value for name, value in told.items() if value not in (None, {})},
        }

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> Rendering:
        """What `to_json` wrote. Raises TypeError for anything else."""
        if not isinstance(found, Mapping):
            raise TypeError("rendering")
        settings = found.get("settings", {})
        if not isinstance(settings, Mapping) or not all(isinstance(value, Scalar) for value in settings.values()):
            raise TypeError("rendering.settings")
        made = Rendering(**{**found, "settings": tuple(settings.items())})
        system = made.system is None or isinstance(made.system, str)
        flags = isinstance(made.reasoning, bool) and isinstance(made.single, bool)
        if not (system and flags and isinstance(made.template_hash, str)):
            raise TypeError("rendering")
        if not is_time(made.now):
            raise TypeError("rendering.now")
        return made


def is_time(text: Any) -> bool:
    """Whether this is a time in ISO 8601, or None."""
    try:
        return text is None or bool(datetime.fromisoformat(text))
    except (TypeError, ValueError):
        return False
