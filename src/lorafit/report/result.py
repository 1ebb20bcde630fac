"""The result of a run or an evaluation, as a notebook shows it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from lorafit.errors import FormatError
from lorafit.report import charts
from lorafit.report.story import read_story
from lorafit.report.templates import template
from lorafit.report.words import headline, interval, of_a_hundred
from lorafit.runs.folder import REPORT


class Result(dict[str, Any]):
    """A summary: a dictionary with the content of `summary.json`, or of what `lorafit eval --json` prints.

    A notebook shows it as verdict, table, samples and pictures, a terminal in a few lines; `dict(result)` is bare.
    """

    folder: Path | None

    def __init__(self, summary: Mapping[str, Any], folder: Path | None = None):
        """
        Args:
            summary: what was measured.
            folder: the run folder, whose curves are drawn too; None for an evaluation.
        """
        super().__init__(json.loads(json.dumps(summary)))  # as it is read again
        self.folder = folder

    def __repr__(self) -> str:
        sentence = of_a_hundred(self)
        told = [
            headline(self),
            *([sentence] if sentence else []),
            f"difference in NLL {self['nll']['difference']:+.3f}, {interval(self['nll']['ci95'])}",
        ]
        where = f"; report: {self.folder / REPORT}" if self.folder else ""
        return "; ".join(told) + f" (a dictionary of {', '.join(self)}){where}"

    def _repr_html_(self) -> str:
        """Asked for by notebooks."""
        drawn = {"scores": charts.scores_of(self), "forgetting": charts.forgetting(self), "curves": None}
        if self.folder is not None:
            with suppress(FormatError):  # moved or damaged since: what was measured is here all the same
                drawn["curves"] = charts.curves([read_story(self.folder)])
        return template("result.html").render(
            s=self,
            headline=headline(self),
            of_a_hundred=of_a_hundred(self),
            samples=[{**one, "good": {"adapter": one.get("right")}} for one in self["samples"]],
            pictures={name: charts.svg(figure, f"result-{name}") if figure else None for name, figure in drawn.items()},
            report=self.folder / REPORT if self.folder else None,
        )
