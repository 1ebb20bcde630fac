"""Numbers in words, the same in the terminal, the card and the report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lorafit.oracle import same_as_peft


def doubt(summary: Mapping[str, Any]) -> str | None:
    """Why nobody should use the adapter of a run, whatever its scores; None where nothing speaks against it."""
    if not summary.get("base_unchanged", True):
        return "the base in memory is not what it was when it was opened"
    if (peft := summary.get("peft")) and not same_as_peft(peft):
        return "PEFT computes something else with it than lorafit"
    return None


def headline(summary: Mapping[str, Any]) -> str:
    """What a run or an evaluation has shown, in the one sentence that terminal, page and card say."""
    if why := doubt(summary):
        return f"Do not use this adapter: {why}"
    nll, facts = summary["nll"]["ci95"], summary["facts"]
    other = "the other adapter" if summary.get("against") else "its base"
    if nll is None:
        return "Too few test examples to tell whether the adapter helps"
    says, right = verdict(nll), facts["ci95"]
    more = right is not None and right[0] > facts["ci95_base"][1]
    fewer = right is not None and right[1] < facts["ci95_base"][0]
    if fewer:
        return f"The adapter is worse than {other}: it answers fewer questions right" + (
            ", though it predicts the answers better" if says == "better" else ""
        )
    if says == "worse":
        return f"The adapter is worse than {other} at predicting the answers" + (
            ", though it answers more of them right" if more else ""
        )
    if more:
        few = facts["ci95_base_few_shot"]
        return f"The adapter answers more questions right than {other}" + (
            ", but is not shown to answer more than the base with examples in its prompt" if few and right[0] <= few[1]
            else ""
        )  # fmt: skip
    if says == "better":
        return f"The adapter predicts the answers better than {other}" + (
            ", but is not shown to answer more of them right" if right else ""
        )
    if tuple(nll) == (0, 0):
        return f"The adapter is the same as {other}: it changes nothing"
    return (f"The adapter is not shown to answer more questions right than {other}" if right
            else f"No difference between the adapter and {other} has been shown")  # fmt: skip


def interval(ci95: Sequence[float] | None) -> str:
    """An interval in words; None is one that too few examples allow."""
    if ci95 is None:
        return "too few examples for an interval"
    return f"95 % interval {ci95[0]:+.3f} to {ci95[1]:+.3f}"


def verdict(ci95: Sequence[float] | None) -> str:
    """What an interval of NLL differences, adapter − base, allows to say."""
    if ci95 is None:
        return "too few examples to tell"
    low, high = ci95
    if low == high == 0:
        return "the same: it changes nothing"
    return "better" if high < 0 else "worse" if low > 0 else "not shown to differ"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def clock(seconds: float) -> str:
    """Minutes and seconds; a question mark before the first measurement."""
    return "?" if math.isnan(seconds) else f"{int(seconds) // 60}:{int(seconds) % 60:02d}"
