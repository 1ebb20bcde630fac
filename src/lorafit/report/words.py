"""Numbers in words, the same in the terminal, the card and the report."""

from __future__ import annotations

import math
from collections.abc import Sequence


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
