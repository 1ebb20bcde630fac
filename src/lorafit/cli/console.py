"""The output of the command line: progress with the time left on stderr, results on stdout."""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
import time
import weakref
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.padding import Padding
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Column, Table
from rich.text import Text

from lorafit.heads.head import listed
from lorafit.report.words import ASIDE, clock, headline, interval, lines, no_classifier, of_a_hundred, terms
from lorafit.report.words import table as score_rows
from lorafit.runs.summary import EvaluationSummary, Summary

if TYPE_CHECKING:
    from lorafit.data.render import Row
    from lorafit.data.report import DataReport
    from lorafit.evaluation.scores import Counts, Sample
    from lorafit.jobs.listener import Shown
    from lorafit.planning import Choice
    from lorafit.training.loop import Moment

SECONDS_BETWEEN_LINES = 10.0
TELLING = 0.05  # the share of the work after which the time left is estimated, because the beginning is slow
MOST_CONFUSIONS = 3
WIDTH_OF_REASONS = 100  # columns; in a narrower terminal a table of reasons is not readable
_drawn: weakref.WeakSet[Progress] = weakref.WeakSet()


class Terminal:
    """A Listener for a terminal, a notebook or a pipe. With `as_json`, only the JSON object goes to stdout."""

    def __init__(self, as_json: bool = False):
        self.as_json = as_json
        self.out = Console(stderr=as_json, highlight=False, soft_wrap=as_json or not sys.stdout.isatty())
        self.err = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._task: tuple[str, TaskID] | None = None
        self._began: dict[str, tuple[float, int]] = {}
        self._last_line = 0.0
        quiet_libraries()

    def say(self, text: str) -> None:
        self._end_bar()
        self.out.print(Text(text))

    def watch(self, what: str, done: int, of: int, unit: str = "examples") -> None:
        """Show the progress of one named piece of work. Bytes are shown as MB."""
        now = time.monotonic()
        if done == 0:
            self._began[what] = now, 0  # earlier work of this name may be unfinished
        began, first = self._began.setdefault(what, (now, done))
        told = done > first and done - first >= TELLING * of
        left = (now - began) / (done - first) * (of - done) if told else math.nan
        in_bytes = unit == "bytes"
        so_far, all_of_it = (f"{n / 1e6:,.1f}" if in_bytes else str(n) for n in (done, of))
        self._draw(what, done, of, f"{what} {so_far}/{all_of_it}{' MB' if in_bytes else ''}", left)
        if done == of:
            self._end_bar()
            del self._began[what]
            self.out.print(Text(f"{what}: {all_of_it} {'MB' if in_bytes else unit} in {now - began:.0f} s"))

    def moment(self, moment: Moment) -> None:
        if moment.valid_nll is not None:
            self._end_bar()
            speed = f", {moment.tokens_per_second:.0f} tokens/s" if moment.step else ", before the first step"
            left = f", {clock(moment.seconds_left)} left" if moment.step and moment.step < moment.steps else ""
            self.out.print(
                Text(f"step {moment.step:>4}/{moment.steps}  validation NLL {moment.valid_nll:.3f}{speed}{left}")
            )
        elif moment.train_nll is not None:
            text = f"training {moment.step}/{moment.steps}  NLL {moment.train_nll:.3f}"
            self._draw("training", moment.step, moment.steps, text, moment.seconds_left)

    def _draw(self, what: str, done: int, of: int, text: str, left: float) -> None:
        if not self.err.is_terminal:
            now = time.monotonic()
            if now - self._last_line >= SECONDS_BETWEEN_LINES and not math.isnan(left):
                self._last_line = now
                self.err.print(Text(f"{text}  {clock(left)} left"))
            return
        if self._task is None or self._task[0] != what:
            self._end_bar()
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self.err, transient=True)
            _drawn.add(self._bar)
            self._task = (what, self._bar.add_task(text, total=of, completed=done))
            self._bar.start()
        elif self._bar is not None:
            self._bar.update(self._task[1], completed=done, description=text)

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    def data(self, report: DataReport) -> None:
        names = ("split", "examples", "answers", "words", "of answers", "alike", "checked")
        table = Table(*(Column(name, overflow="fold") for name in names))
        for name, split in report.splits.items():
            checked = f"{split.checked}" + (f" ({split.declining} to decline)" if split.declining else "")
            table.add_row(
                name,
                f"{split.examples:,}",
                f"{split.answers:,}",
                "{}-{}-{}".format(*split.words),
                "{}-{}-{}".format(*split.answer_words),
                f"{split.near_duplicates:,}",
                checked if split.checked else "-",
            )
        self.out.print(table)
        self.out.print("words: shortest-median-longest; alike: near-identical to an earlier prompt of the same split")
        for name, split in report.splits.items():
            if split.labels:
                self.out.print(Text(f"{name}: {listed([f'{label} {n:,}' for label, n in split.labels.items()])}"))
        for name, split in report.splits.items():
            if split.contradictions:
                self.out.print(f"{name}: {split.contradictions} prompts occur with different answers: is that right?")
        passed_over = [f"'{field}' ({count:,} line{'s' * (count != 1)})" for field, count in report.passed_over.items()]
        if passed_over:
            self.out.print(Text(f"field{'s' * (len(passed_over) > 1)} ignored: {', '.join(passed_over)}"))
        for one in report.remarks:
            self.out.print(Text(f"{one.examples:,} {one.what}, first {one.first}: {one.advice}"))

    def plan(self, choices: Sequence[Choice]) -> None:
        """Show the choices in a table, or below each other in a narrow terminal."""
        if self.out.width < WIDTH_OF_REASONS:
            for choice in choices:
                self.out.print(Text(f"{choice.name}: ", style="bold") + Text(choice.value, style="cyan"))
                change = f" ({choice.flag})" if choice.flag else ""
                self.out.print(Padding(Text(choice.reason + change), (0, 0, 0, 2)), soft_wrap=False)
            return
        table = Table("choice", "value", "reason", "change it with")
        for choice in choices:
            table.add_row(*(Text(cell) for cell in (choice.name, choice.value, choice.reason, choice.flag)))
        self.out.print(table)

    def evidence(self, found: Mapping[str, Any]) -> None:
        """Show what validation can detect, the layer card by kind of module, and the placements."""
        told = found["evidence"]
        if told["detectable"] is None:
            self.say(f"{told['independent']} independent validation examples are too few to base a choice on")
        else:
            self.say(
                f"validation: {told['independent']} independent examples detect a difference in NLL of "
                f"{told['detectable']:.3f} ({told['detectable'] / told['nll']:.0%} of the base's {told['nll']:.3f}) "
                "four times in five, and a smaller one if differences vary less than the NLL"
            )
        if found["card"]:
            self._card(found["card"])
        if found["placements"]:
            table = Table("placement", "parameters", "tried in --search thorough")
            for one in found["placements"]:
                size = f"{one['parameters']:,}" if one["parameters"] else "-"
                table.add_row(one["name"], size, Text(("yes: " if one["tried"] else "") + one["reason"]))
            self.out.print(table)

    def _card(self, card: Mapping[str, Any]) -> None:
        from lorafit.planning.signal import kinds_of  # it imports torch, for which --help must not wait

        named = kinds_of([site["path"] for site in card["sites"]])
        kinds: dict[str, list[Mapping[str, Any]]] = {}
        for site in card["sites"]:
            kinds.setdefault(named[site["path"]], []).append(site)
        whole = sum(max(0.0, site["energy"]) for site in card["sites"]) or 1.0
        cost = sum(site["parameters"] for site in card["sites"])
        table = Table("layer card", "sites", "gradient energy", "cost", "strongest in blocks")
        for name, sites in kinds.items():
            energy = sum(max(0.0, site["energy"]) for site in sites) / whole
            ranked = [
                str(site["block"])
                for site in sorted(sites, key=lambda one: -one["energy"])[:3]
                if site["block"] is not None
            ]
            table.add_row(
                name,
                str(len(sites)),
                f"{energy:.0%}",
                f"{sum(s['parameters'] for s in sites) / cost:.0%}",
                ", ".join(ranked),
            )
        self.out.print(table)
        self.out.print(
            f"gradient energy: the part on which {card['batches']} gradients agree; cost: share of parameters and of "
            "operations"
        )

    def example(self, row: Row, renderer: Shown) -> None:
        """Show one example as the model sees it: trained tokens green and underlined, the others dim."""
        marks = "green, underlined" if self.out.is_terminal else "between >>> and <<<"
        text = Text(f"one example as the model sees it; the trained part is {marks}:\n")
        for piece, trained in renderer.pieces(row):
            shown = f">>>{piece}<<<" if trained and not self.out.is_terminal else piece  # colours do not survive a pipe
            text.append(shown, style="green underline" if trained else "dim")
        self.out.print(text)

    def results(self, summary: Summary) -> None:
        """Show sample answers, the table of scores, and the verdict."""
        nll, counts, scores, said = summary.nll, summary.counts, lines(summary), terms(summary)
        self._samples(summary.samples, scores[0].name if said.reads else None)
        evaluated = summary if isinstance(summary, EvaluationSummary) else None
        kind = f"{evaluated.split or ''} examples".strip() if evaluated else "held-out examples"
        table = Table(f"on {summary.n_test} {kind}", *(line.name for line in scores))
        for what, cells in score_rows(summary):
            table.add_row(what, *cells)
        self.out.print(table)
        self.out.print(f"NLL: how much the right {said.answer}s surprise a model; lower is better, 0 is certain")
        for note in said.notes:
            self.out.print(note)
        if any(line.equal for line in scores):
            self.out.print(f"equal to the reference: {ASIDE}")
        if any(line.key == "shuffled_control" for line in scores):
            self.out.print("control: an adapter trained on shuffled answers, measured beforehand (make control)")
        self.out.print(f"{headline(summary)}; paired difference in NLL {nll.difference:+.3f}, {interval(nll.ci95)}")
        if evaluated and evaluated.seen_in_training:
            self.out.print(f"but {evaluated.seen_in_training} of these were used in its training: they test memory")
        if sentence := of_a_hundred(summary):
            self.out.print(sentence)
        elif not summary.measures:
            self.out.print("whether answers are right was not measured: give examples a check (docs/data.md)")
        if counts:
            self._confusions(counts)

    def _confusions(self, counts: Counts) -> None:
        """Show the most frequent confusions, and why there is no simple classifier."""
        for one in counts.confusions[:MOST_CONFUSIONS]:
            given, reference = clipped(one.given, 60), clipped(one.reference, 60)
            self.out.print(Text(f"{one.n} × {given!r} where {reference!r} is right"))
        if why := no_classifier(counts):
            self.out.print(Text(why))

    def _samples(self, samples: Sequence[Sample], other: str | None) -> None:
        """Show sample answers next to each other, or below each other in a narrow terminal. other: who else answers."""
        names = {"question": "question", "reference": "reference", **({other: "base"} if other else {})}
        names["adapter"] = "adapter"
        cut = [{name: clipped(getattr(sample, key)) for name, key in names.items()} for sample in samples]
        marks = ["" if sample.right is None else "✓" if sample.right else "✗" for sample in samples]
        if samples and self.out.width >= 120:
            table = Table(*names, *(["right"] if any(marks) else []), show_lines=True)
            for sample, mark in zip(cut, marks, strict=True):
                table.add_row(*(Text(text) for text in sample.values()), *([mark] if any(marks) else []))
            self.out.print(table)
            return
        for sample, mark in zip(cut, marks, strict=True):
            table = Table.grid(padding=(0, 2))
            table.add_column(justify="right", style="dim", min_width=13)
            for name, text in sample.items():
                table.add_row(f"{mark} {name}".strip() if name == "adapter" else name, Text(text))
            self.out.print(table)
            self.out.print()

    def finish(self, found: Mapping[str, Any]) -> None:
        """With --json, print the result as one object."""
        self._end_bar()
        if self.as_json:
            print(json.dumps(found, allow_nan=False))


def clipped(text: str, longest: int = 240) -> str:
    """Long text, cut after a word and marked as cut."""
    return text if len(text) <= longest else text[:longest].rpartition(" ")[0] + " …"


def program() -> str:
    """The command that starts lorafit in this shell."""
    if shutil.which("lorafit"):
        return "lorafit"
    return sys.argv[0] if Path(sys.argv[0]).name == "lorafit" else "python -m lorafit"


def end_bars() -> None:
    """Stop the progress bars, so that an error is the last line on the screen."""
    for bar in list(_drawn):
        bar.stop()


def quiet_libraries() -> None:
    """Switch off the progress bars of transformers, whose steps lorafit reports. If it is not imported yet, an
    environment variable does this, because the import takes seconds and not every verb needs it."""
    if "transformers" not in sys.modules:
        os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
        return
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
