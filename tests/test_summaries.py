"""A summary is read whole or refused: what a version does not know is never dropped in silence."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from conftest import summary_with

from lorafit.errors import FormatError
from lorafit.runs.folder import read_summary
from lorafit.runs.summary import FORMAT, EvaluationSummary, RunSummary

EARLIER = Path(__file__).parent / "earlier_runs" / "ended" / "summary.json"
COUNTS: dict[str, Any] = {
    **dict.fromkeys(("n", "json", "distinct", "other"), 2),
    **{key: [] for key in ("recall", "confusions")},
    **{key: {} for key in ("against", "equal")},
    **dict.fromkeys(("most_frequent", "classifier_missing")),
    "by": "check",
    "few": False,
    "right": {"adapter": {"share": 0.5, "ci95": [0.1, 0.9]}},
}
WHOLE = summary_with(
    counts=COUNTS,
    samples=[{"question": "q", "reference": "r", "base": "b", "adapter": "a"}],
    forgetting={"general": {"pages": {"base": 2.0, "adapter": 2.0, "difference": 0.0, "ci95": None, "n": 3}}},
    rounds=[{"number": 1, "accepted": True}],
    ladder={"chosen": 0.5, "rungs": [{"share": 0.5}]},
    peft={"max_logit_difference": 0.0, "adapter_effect": 1.0},
).to_json()


def test_what_is_written_is_read_as_the_same_value() -> None:
    assert WHOLE["format"] == FORMAT
    assert RunSummary.from_json(WHOLE).to_json() == WHOLE


@pytest.mark.parametrize(
    ("path", "named"),
    [
        ((), "score"),
        (("nll",), "nll.score"),
        (("facts",), "facts.score"),
        (("counts", "right", "adapter"), "counts.right.adapter.score"),
        (("samples", 0), "samples.0.score"),
        (("forgetting", "general", "pages"), "forgetting.general.pages.score"),
    ],
)
def test_an_entry_that_the_format_does_not_have_is_named(path: tuple[str | int, ...], named: str) -> None:
    odd = json.loads(json.dumps(WHOLE))
    part = odd
    for key in path:
        part = part[key]
    part["score"] = 0.5
    with pytest.raises(ValueError, match=f"^{named}: not in format {FORMAT} of a summary$"):
        RunSummary.from_json(odd)


def test_a_summary_of_a_run_is_none_of_an_evaluation() -> None:
    with pytest.raises(ValueError, match=r"n_train, .*: not in format"):
        EvaluationSummary.from_json(WHOLE)


def test_a_summary_of_a_newer_version_is_refused_and_not_called_damaged(tmp_path: Path) -> None:
    (tmp_path / "summary.json").write_text(json.dumps({**WHOLE, "format": FORMAT + 1, "score": 0.5}), encoding="utf-8")
    with pytest.raises(FormatError) as caught:
        read_summary(tmp_path)
    wanted = f"summary.json: of format {FORMAT + 1}, and this lorafit reads 1 to {FORMAT}: use a newer lorafit"
    assert str(caught.value).endswith(wanted)


@pytest.mark.parametrize("number", ["1", 1.0, True, None, -1])
def test_a_format_that_is_no_number_is_refused(number: Any) -> None:
    with pytest.raises(ValueError, match=r"^format: .* is not the number of a format$"):
        RunSummary.from_json({**WHOLE, "format": number})


def test_a_summary_of_before_there_was_a_format_is_read_with_what_it_alone_has() -> None:
    """Earlier versions had entries that are gone; an entry of a later one it cannot have."""
    earlier = json.loads(EARLIER.read_text(encoding="utf-8"))
    assert "format" not in earlier
    assert RunSummary.from_json({**earlier, "score": 0.5}) == RunSummary.from_json(earlier)
