"""What the terminal shows: progress with time left on stderr, results on stdout, in a pipe one line now and then."""

from __future__ import annotations

import json
import math
import sys
import time
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn
from rich.table import Table
from rich.text import Text

from lorafit.report.card import interval

if TYPE_CHECKING:
    from lorafit.data.render import Renderer, Row
    from lorafit.data.report import DataReport
    from lorafit.planning import Choice
    from lorafit.training.loop import Moment

SECONDS_BETWEEN_LINES = 10.0


class Terminal:
    """A Listener that draws. With `as_json`, stdout is kept for the one JSON object."""

    def __init__(self, as_json: bool):
        self.as_json = as_json
        self.out = Console(stderr=as_json, highlight=False, soft_wrap=as_json or not sys.stdout.isatty())
        self.err = Console(stderr=True, highlight=False)
        self._bar: Progress | None = None
        self._task: tuple[str, TaskID] | None = None
        self._began: dict[str, float] = {}
        self._last_line = 0.0
        quiet_libraries()

    def say(self, text: str) -> None:
        self._end_bar()
        self.out.print(Text(text))

    def watch(self, what: str, done: int, of: int) -> None:
        """Progress of one named piece of work."""
        now = time.monotonic()
        began = self._began.setdefault(what, now)
        left = (now - began) / done * (of - done) if done else math.nan
        self._draw(what, done, of, f"{what} {done}/{of}", left)
        if done == of:
            self._end_bar()
            self.out.print(Text(f"{what}: {of} examples in {now - began:.0f} s"))

    def moment(self, moment: Moment) -> None:
        if moment.valid_nll is not None:
            self._end_bar()
            speed = f", {moment.tokens_per_second:.0f} tokens/s" if moment.step else ", before the first step"
            left = f", {clock(moment.seconds_left)} left" if moment.step and moment.step < moment.steps else ""
            self.out.print(Text(
                f"step {moment.step:>4}/{moment.steps}  validation NLL {moment.valid_nll:.3f}{speed}{left}"
            ))  # fmt: skip
        elif moment.train_nll is not None:
            text = f"training {moment.step}/{moment.steps}  NLL {moment.train_nll:.3f}"
            self._draw("training", moment.step, moment.steps, text, moment.seconds_left)

    def _draw(self, what: str, done: int, of: int, text: str, left: float) -> None:
        if not self.err.is_terminal:
            now = time.monotonic()
            if now - self._last_line >= SECONDS_BETWEEN_LINES:
                self._last_line = now
                self.err.print(Text(f"{text}  {clock(left)} left"))
            return
        if self._task is None or self._task[0] != what:
            self._end_bar()
            columns = (TextColumn("{task.description}"), BarColumn(bar_width=24), TimeRemainingColumn())
            self._bar = Progress(*columns, console=self.err, transient=True)
            self._task = (what, self._bar.add_task(text, total=of, completed=done))
            self._bar.start()
        elif self._bar is not None:
            self._bar.update(self._task[1], completed=done, description=text)

    def _end_bar(self) -> None:
        if self._bar is not None:
            self._bar.stop()
        self._bar = self._task = None

    def data(self, report: DataReport) -> None:
        table = Table("split", "examples", "answers", "words", "per answer", "near-duplicates", "checked")
        for name, split in report.splits.items():
            checked = f"{split.checked}" + (f" ({split.declining} to decline)" if split.declining else "")
            table.add_row(
                name, f"{split.examples:,}", f"{split.answers:,}", "{}-{}-{}".format(*split.words),
                "{}-{}-{}".format(*split.answer_words), f"{split.near_duplicates:,}", checked if split.checked else "-",
            )  # fmt: skip
        self.out.print(table)
        self.out.print("words: shortest-median-longest; no near-identical prompts on two sides of a split")
        for field, count in report.passed_over.items():
            self.out.print(Text(f"field '{field}' is passed over ({count:,} lines)"))

    def plan(self, choices: Sequence[Choice]) -> None:
        table = Table("choice", "value", "reason", "change it with")
        for choice in choices:
            table.add_row(*(Text(cell) for cell in (choice.name, choice.value, choice.reason, choice.flag)))
        self.out.print(table)

    def example(self, row: Row, renderer: Renderer) -> None:
        """One example as the model sees it: trained tokens green and underlined, the others dim."""
        text = Text("one example as the model sees it (trained: green, underlined): ")
        start = 0
        for i in range(1, len(row.ids) + 1):
            if i == len(row.ids) or row.trained[i] != row.trained[start]:
                piece = renderer.tokenizer.decode(row.ids[start:i])
                if not self.out.is_terminal and row.trained[start]:
                    piece = f">>>{piece}<<<"  # colours do not survive a pipe
                text.append(piece, style="green underline" if row.trained[start] else "dim")
                start = i
        self.out.print(text)

    def results(self, summary: Mapping[str, Any]) -> None:
        """The table at the end, and sample answers side by side."""
        nll, facts = summary["nll"], summary["facts"]
        other = "other adapter" if summary.get("against") else "base"
        shots = facts["few_shot_examples"]
        given = f"base, {shots} examples given" if shots else "base, few-shot"
        table = Table(
            f"on {summary['n_test']} {summary.get('split') or ''} examples", other, given, "adapter", "control"
        )
        table.add_row("completion NLL, nats/token", f"{nll['base']:.3f}", "", f"{nll['adapter']:.3f}", "")
        if facts["adapter"] is not None:
            keys = ("base", "base_few_shot", "adapter", "shuffled_control")
            table.add_row(f"facts right (of {facts['n']})", *(percent(facts[key]) for key in keys))
        if summary["off_desk_declined"] is not None:
            table.add_row("off-topic declined", "", "", percent(summary["off_desk_declined"]), "")
        table.add_row("answers that end by themselves", "", "", percent(summary["natural_stops"]), "")
        self.out.print(table)
        self.out.print(
            f"adapter against {other}: {verdict(nll['ci95'])}; paired difference in NLL {nll['difference']:+.3f}, "
            + interval(nll["ci95"])
        )
        if facts["ci95"]:
            self.out.print(f"facts right, 95 % interval {facts['ci95'][0]:.1%} to {facts['ci95'][1]:.1%}")
        samples = Table("question", "reference", other, "adapter", show_lines=True)
        for sample in summary["samples"]:
            samples.add_row(*(Text(sample[key]) for key in ("question", "reference", "base", "adapter")))
        self.out.print(samples)

    def finish(self, summary: Mapping[str, Any]) -> None:
        """With --json, the one object."""
        self._end_bar()
        if self.as_json:
            print(json.dumps(summary, allow_nan=False))


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


def quiet_libraries() -> None:
    """Transformers draws bars of its own for steps that we report; ours are enough."""
    from transformers.utils import logging

    logging.disable_progress_bar()
    logging.set_verbosity_error()
