"""How transformers opens a base that writes no text."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Opening:
    """A class of transformers that puts another head on a base than that of a language model.

    Args:
        model: The name of its auto class.
        table: The name of the table of its model types in transformers.
        noun: What the base becomes.
        settings: Further settings of its config, by name.
        has_head: Whether it has a head; if not, it gives its last hidden state.
    """

    model: str
    table: str
    noun: str
    settings: tuple[tuple[str, Any], ...] = ()
    has_head: bool = True


CLASSIFIER = Opening(
    "AutoModelForSequenceClassification",
    "MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES",
    "classifier of texts",
    (("problem_type", "single_label_classification"),),
)
