"""What a comparison says, as part of the summary of a run or of an evaluation."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from lorafit.evaluation.compare import Comparison
from lorafit.evaluation.statistics import wilson


def scores_json(comparison: Comparison) -> dict[str, Any]:
    """The part of a summary that says how good: the same keys for a run and for an evaluation alone."""
    base, few, adapter = comparison.base, comparison.base_few_shot, comparison.adapter
    nll = asdict(comparison.nll)
    nll.pop("n")
    return {
        "n_test": comparison.nll.n,
        "nll": nll,
        "facts": {
            "base": base.accuracy,
            "base_few_shot": few.accuracy if few else None,
            "adapter": adapter.accuracy,
            "shuffled_control": None,
            "ci95": list(wilson(adapter.right * adapter.groups / adapter.n, adapter.groups)) if adapter.n else None,
            "n": adapter.n,
            "few_shot_examples": comparison.shots,
        },
        "off_desk_declined": adapter.declined / adapter.off_desk_n if adapter.off_desk_n else None,
        "natural_stops": adapter.natural_stops / len(adapter.answers) if adapter.answers else None,
        "samples": [asdict(sample) for sample in comparison.samples],
    }
