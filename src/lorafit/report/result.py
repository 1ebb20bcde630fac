"""The result of a run or an evaluation, as a notebook shows it."""

from __future__ import annotations

from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from lorafit.errors import FormatError
from lorafit.report import charts
from lorafit.report.story import read_story
from lorafit.report.templates import template
from lorafit.report.words import answered, headline, interval, of_a_hundred
from lorafit.runs.folder import REPORT
from lorafit.runs.summary import Summary


class Result(dict[str, Any]):
    """A summary: a dictionary with the content of `summary.json`, or of what `lorafit eval --json` prints.

    A notebook shows verdict, table, samples and pictures, a terminal a few lines; `dict(result)` is a plain dictionary.
    """

    summary: Summary
    folder: Path | None

    def __init__(self, summary: Summary, folder: Path | None = None):
        """
        Args:
            summary: The scores.
            folder: The run folder, for its curves; None for an evaluation.
        """
        super().__init__(summary.to_json())
        self.summary, self.folder = summary, folder

    def __repr__(self) -> str:
        sentence, nll = of_a_hundred(self.summary), self.summary.nll
        told = [
            headline(self.summary),
            *([sentence] if sentence else []),
            f"difference in NLL {nll.difference:+.3f}, {interval(nll.ci95)}",
        ]
        where = f"; report: {self.folder / REPORT}" if self.folder else ""
        return "; ".join(told) + f" (a dictionary of {', '.join(self)}){where}"

    def _repr_html_(self) -> str:
        """The HTML that notebooks show."""
        summary, drawn = self.summary, {**charts.of_summary(self.summary), "curves": None}
        if self.folder is not None:
            with suppress(FormatError):  # if the folder was moved or damaged, the scores are shown without curves
                drawn["curves"] = charts.curves([read_story(self.folder)])
        return template("result.html").render(
            s=summary,
            headline=headline(summary),
            of_a_hundred=of_a_hundred(summary),
            samples=[answered(summary, asdict(one), {"adapter": one.right}) for one in summary.samples],
            pictures={name: charts.svg(figure, f"result-{name}") if figure else None for name, figure in drawn.items()},
            report=self.folder / REPORT if self.folder else None,
        )
