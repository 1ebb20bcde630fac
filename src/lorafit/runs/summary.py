"""The result of a run or an evaluation as a value: the content of `summary.json`."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any, Self

from pydantic import TypeAdapter, ValidationError

from lorafit.errors import FormatError
from lorafit.evaluation.scores import ClassScores, Counts, Measures, NllScore, Sample

FORMAT = 1  # of the JSON object: raise it with every new field, because a version that does not know it would drop it
Ends = tuple[float, float]
_ABSENT = {"left_out": True}  # a field that is left out of the JSON if it is None


@dataclass(frozen=True)
class Facts:
    """The shares of right answers to questions with a check; None if not measured.

    Args:
        base: The share of the base, or of the other adapter.
        base_few_shot: The share of the base with `few_shot_examples` answers shown.
        adapter: The share of the adapter.
        shuffled_control: The share of an adapter that was trained on shuffled answers.
        ci95: The 95 % interval of `adapter`; `ci95_base` and `ci95_base_few_shot` likewise.
        n: Questions that were scored.
        few_shot_examples: Shots of the base.
    """

    base: float | None
    base_few_shot: float | None
    adapter: float | None
    shuffled_control: float | None
    ci95: Ends | None
    ci95_base: Ends | None
    ci95_base_few_shot: Ends | None
    n: int
    few_shot_examples: int


@dataclass(frozen=True)
class PeftCheck:
    """The largest difference between PEFT's logits and ours, and the largest effect of the adapter on them."""

    max_logit_difference: float
    adapter_effect: float


@dataclass(frozen=True, kw_only=True)
class Summary:
    """The scores of an adapter on held-out examples.

    Args:
        base: Name of the base.
        adapter_dir: Folder of the adapter.
        base_unchanged: Whether no byte of the base in memory has changed.
        trainable_parameters: Trained numbers of the adapter.
        n_test: Examples that were scored.
        nll: NLL of the answers, compared with the base or another adapter.
        nll_of_reasoning: NLL of the reasoning before the answers; None if there is none.
        facts: Right answers by check.
        off_desk_declined: Share of the questions to decline that were declined; None without any.
        natural_stops: Share of the answers that ended with an end-of-turn token; None without any.
        counts: Right answers counted and compared; None if none could be counted.
        classes: Scores of a classifier; None for other adapters.
        measures: Scores of a task with other scores than right answers; None for other tasks.
        samples: A few questions with their answers.
        seconds: The time of each part of the work, by name.
        peak_rss_gb: Peak memory, in GB; None if the system does not report it.
        dtype: The base's dtype.
    """

    base: str
    adapter_dir: str
    base_unchanged: bool
    trainable_parameters: int
    n_test: int
    nll: NllScore
    nll_of_reasoning: NllScore | None = field(default=None, metadata=_ABSENT)
    facts: Facts
    off_desk_declined: float | None
    natural_stops: float | None
    counts: Counts | None = None
    classes: ClassScores | None = field(default=None, metadata=_ABSENT)
    measures: Measures | None = field(default=None, metadata=_ABSENT)
    samples: tuple[Sample, ...]
    seconds: dict[str, float]
    peak_rss_gb: float | None = None
    dtype: str | None = None

    @property
    def task(self) -> str:
        """The name of the adapter's task."""
        return self.measures.task if self.measures else "classification" if self.classes else "completion"

    @property
    def rival(self) -> str | None:
        """The other adapter of the comparison; None if it is with the base."""
        return None

    @property
    def forgotten(self) -> Mapping[str, NllScore]:
        """NLL of general text under the base and with the adapter, by source; empty if it was not measured."""
        return {}

    def to_json(self) -> dict[str, Any]:
        """The JSON object that is written and printed."""
        values = asdict(self)
        for part in fields(self):
            if values[part.name] is None and part.metadata.get("left_out"):
                del values[part.name]
        values["nll"].pop("n")
        if self.counts:
            values["counts"]["tells"] = self.counts.tells
        as_read: dict[str, Any] = json.loads(json.dumps({**values, "format": FORMAT}))  # lists, where Python has tuples
        return as_read

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> Self:
        """Read the result of `to_json`. Earlier versions wrote no format; unknown entries of theirs are dropped.

        Raises:
            FormatError: A newer version of lorafit wrote it.
            ValueError: Entries are missing, unknown, or of another type; all of these are named.
        """
        try:
            number = values.get("format", 0)
            if type(number) is not int or number < 0:
                raise ValueError(f"format: {number!r} is not the number of a format")
            if number > FORMAT:
                raise FormatError(f"of format {number}, and this lorafit reads 1 to {FORMAT}: use a newer lorafit")
            nll = {"n": values["n_test"], **values["nll"]}
            read: Self = TypeAdapter(cls).validate_python({**values, "nll": nll})
        except (KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"no summary: {error}") from error
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, fault['loc']))}: {fault['msg']}" for fault in error.errors()]
            raise ValueError("; ".join(wrong)) from error
        if number and (unknown := _missing(values, read.to_json())):
            raise ValueError(f"{', '.join(unknown)}: not in format {number} of a summary")
        return read


def _missing(given: Any, read: Any, path: str = "") -> list[str]:
    """The paths of the entries in `given` that `read` does not have; entries that are null do not count."""
    if isinstance(given, Mapping) and isinstance(read, Mapping):
        here = [f"{path}{name}" for name, part in given.items() if part is not None and name not in read]
        inside = [_missing(part, read[name], f"{path}{name}.") for name, part in given.items() if name in read]
    elif isinstance(given, list) and isinstance(read, list):
        here = []
        inside = [_missing(*both, f"{path}{i}.") for i, both in enumerate(zip(given, read, strict=True))]
    else:
        return []
    return [*here, *(name for names in inside for name in names)]


@dataclass(frozen=True)
class Forgotten:
    """NLL of general text under the base and with the adapter, by source."""

    general: dict[str, NllScore]


@dataclass(frozen=True, kw_only=True)
class RunSummary(Summary):
    """The result of a run.

    Args:
        n_train: Training examples.
        n_valid: Validation examples.
        test_openings: How often the test split has been opened.
        best_step: The step whose adapter is kept.
        steps: Steps that were taken.
        validation: (step, mean validation NLL).
        tokens_per_second: The speed of training.
        trained_tokens: Tokens that count in the loss, of all steps.
        parameters: Trained numbers of the adapter as it is shipped.
        ladder: How small it may be (`planning.ladder.Ladder`).
        rounds: The results of further rounds (`planning.refine.Round`).
        scores_of_round: If these are the scores of an earlier adapter, the first round that replaced it; else None.
        forgetting: NLL of general text.
        misread_by_peft: Why PEFT would compute another result; None if it does not.
        passed_over: Extras that failed, each with the reason.
        peft: The comparison with PEFT; None if PEFT was not asked.
        base_identity: Digest of the base's weights.
    """

    n_train: int
    best_step: int
    steps: int
    tokens_per_second: float
    n_valid: int = 0
    test_openings: int = 1
    validation: tuple[tuple[int, float], ...] = ()
    trained_tokens: int = 0
    parameters: int | None = None
    ladder: dict[str, Any] | None = None
    rounds: tuple[dict[str, Any], ...] | None = field(default=None, metadata=_ABSENT)
    scores_of_round: int | None = field(default=None, metadata=_ABSENT)
    forgetting: Forgotten | None = field(default=None, metadata=_ABSENT)
    misread_by_peft: str | None = None
    passed_over: dict[str, str] = field(default_factory=dict)
    peft: PeftCheck | None = None
    base_identity: str | None = None

    def __post_init__(self) -> None:
        if "train" not in self.seconds:
            raise ValueError("seconds.train: is missing")

    @property
    def forgotten(self) -> Mapping[str, NllScore]:
        return self.forgetting.general if self.forgetting else {}


@dataclass(frozen=True, kw_only=True)
class EvaluationSummary(Summary):
    """The result of an evaluation.

    Args:
        against: Folder of the other adapter; None for a comparison with the base.
        split: The part of a folder that was scored; None for a file.
        seen_in_training: Examples that the adapter was trained or validated on; None if that is not known.
        seen_by_other: The same for the other adapter.
        general: NLL of general text.
    """

    against: str | None = None
    split: str | None = None
    seen_in_training: int | None = None
    seen_by_other: int | None = None
    general: dict[str, NllScore] = field(default_factory=dict)

    @property
    def rival(self) -> str | None:
        return self.against

    @property
    def forgotten(self) -> Mapping[str, NllScore]:
        return self.general
