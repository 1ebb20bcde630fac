"""What an adapter keeps about how messages became text in training, so that its prompts are always the same."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import datetime
from math import inf
from typing import Any

Scalar = str | int | float | bool | None


@dataclass(frozen=True)
class Rendering:
    """How messages become text.

    Args:
        template_hash: of the chat template.
        system: the system prompt of conversations that bring none. None: the template's own; "": none.
        now: the time that the template reads, in ISO 8601. None: the template reads no time; if it does, or for an
            adapter of an earlier version, the current time is used.
        settings: of the template, by name.
        reasoning: whether an answer may begin with its reasoning. If not, prompts end with what the template itself
            writes before an answer without reasoning.
        single: whether nearly all conversations in training had one question, so that the adapter has hardly seen an
            answer of its own. Also False where that is not known.
    """

    template_hash: str
    system: str | None = None
    now: str | None = None
    settings: tuple[tuple[str, Scalar], ...] = ()
    reasoning: bool = True
    single: bool = field(default=False, compare=False)  # about the questions, not about their rendering

    def to_json(self) -> dict[str, Any]:
        """Only fields that differ from their default, so that earlier versions read it where they know these fields."""
        optional = {
            "now": self.now,
            "settings": dict(self.settings),
            "reasoning": None if self.reasoning else False,
            "single": self.single or None,
        }
        return {
            "template_hash": self.template_hash,
            "system": self.system,
            **{name: value for name, value in optional.items() if value not in (None, {})},
        }

    @staticmethod
    def from_json(value: Mapping[str, Any]) -> Rendering:
        """Read what `to_json` wrote. Raises TypeError for anything else."""
        if not isinstance(value, Mapping):
            raise TypeError("rendering")
        settings = value.get("settings", {})
        if not isinstance(settings, Mapping) or not all(isinstance(setting, Scalar) for setting in settings.values()):
            raise TypeError("rendering.settings")
        rendering = Rendering(**{**value, "settings": tuple(settings.items())})
        flags = isinstance(rendering.reasoning, bool) and isinstance(rendering.single, bool)
        if not (isinstance(rendering.system, str | None) and flags and isinstance(rendering.template_hash, str)):
            raise TypeError("rendering")
        if not is_time(rendering.now):
            raise TypeError("rendering.now")
        return rendering


@dataclass(frozen=True)
class Classes:
    """What an adapter that writes no text gives, such as labels, and how it reads a text: its tokens with those that
    the tokenizer puts around them, padded by the token `pad` on the right.

    Args:
        labels: In the order of the head's outputs.
        pad: The token's number.
        weights: By label, how much an example of it counts in training and in NLL; empty: all count alike.
        task: The name of its task.
        peft: What PEFT calls this type of task.
        scale: The mean and the deviation of the training numbers, for a task that predicts numbers: an output is the
            distance from the mean in deviations.
    """

    labels: tuple[str, ...]
    pad: int
    weights: tuple[float, ...] = ()
    task: str = "classification"
    peft: str = "SEQ_CLS"
    scale: tuple[float, float] | None = None

    def to_json(self) -> dict[str, Any]:
        scale = list(self.scale) if self.scale else None
        optional = {"weights": list(self.weights), "task": self.task, "peft": self.peft, "scale": scale}
        # These are left out: earlier versions know none of them.
        usual: dict[str, Any] = {"weights": [], "task": Classes.task, "peft": Classes.peft, "scale": None}
        set_here = {name: value for name, value in optional.items() if value != usual[name]}
        return {"labels": list(self.labels), "pad": self.pad, **set_here}

    @staticmethod
    def from_json(found: Mapping[str, Any]) -> Classes:
        """What `to_json` wrote. Raises TypeError for anything else."""
        labels, pad, weights = found["labels"], found["pad"], found.get("weights", [])
        if not (isinstance(labels, list) and all(isinstance(one, str) for one in labels) and isinstance(pad, int)):
            raise TypeError("classes")
        if not (isinstance(weights, list) and all(isinstance(w, float) and 0 < w < inf for w in weights)):
            raise TypeError("classes.weights")
        if len(weights) not in (0, len(labels)):
            raise TypeError("classes.weights")
        task, peft = found.get("task", Classes.task), found.get("peft", Classes.peft)
        if not (isinstance(task, str) and isinstance(peft, str)):
            raise TypeError("classes.task")
        scale = found.get("scale")
        if scale is not None and not (
            isinstance(scale, list) and len(scale) == 2 and all(isinstance(s, float) for s in scale) and scale[1] > 0
        ):
            raise TypeError("classes.scale")
        return Classes(tuple(labels), pad, tuple(weights), task, peft, (scale[0], scale[1]) if scale else None)


def is_time(text: Any) -> bool:
    """Whether this is a time in ISO 8601, or None."""
    try:
        return text is None or bool(datetime.fromisoformat(text))
    except (TypeError, ValueError):
        return False
