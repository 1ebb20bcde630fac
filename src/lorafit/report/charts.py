"""Draws the pictures of a report with matplotlib: inline SVG with the page's light or dark colours, and PNG files."""

from __future__ import annotations

import io
import re
from collections.abc import Mapping, Sequence
from pathlib import PurePath
from typing import Any
from warnings import catch_warnings, filterwarnings

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.colors import LinearSegmentedColormap
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator, NullLocator

from lorafit.evaluation.scores import ClassScores, NllScore
from lorafit.planning.signal import block_of, kinds_of
from lorafit.report.story import Story
from lorafit.report.words import lines, share, writes
from lorafit.runs.summary import Summary

# The colours of the pictures. In the SVG each becomes the page's variable of that name, which is for light or dark.
COLOURS = {
    "ink": "#1b1f27",
    "muted": "#646c79",
    "line": "#d9dce2",
    "paper": "#fefefe",
    "base": "#b4540a",
    "few": "#7a4fc4",
    "adapter": "#0b7a6d",
    "run1": "#0b7a6c",
    "run2": "#b4540b",
    "run3": "#7a4fc5",
    "run4": "#2463b0",
    "run5": "#a8326b",
    "run6": "#5d6b1a",
}
HEAT = LinearSegmentedColormap.from_list("heat", ["#f2f4f6", "#5fb3a8", "#0b5a52"])  # for dark pages, too
_SHOWN = "run "  # a prefix of names, because a legend leaves out names that begin with _
# The short name and the colour of everyone who answers.
BARS = {
    "base": ("", "base"),
    "base_few_shot": ("base, with examples", "few"),
    "most_frequent": ("", "muted"),
    "classifier": ("", "run4"),
    "adapter": ("", "adapter"),
}
ON_LIGHT, ON_DARK = "#11141b", "#ffffff"  # the text on HEAT, which is the same for light and dark pages
NAMED, COUNTED = 12, 20  # up to so many labels both axes have names, and cells have counts
LEAST_NLL = 1e-4  # the lower end of a logarithmic axis, which has no zero
LEAST_SPAN = 0.1  # the least margin on both sides, in nats
LONGEST_LINE = 24  # characters of a line of a name
WIDTH, DPI = 5.4, 160  # inches, legible on a telephone; dots per inch of the PNG


def curves(stories: Sequence[Story]) -> Figure | None:
    """NLL by step: training and validation of one run, or validation of several runs. None before the first step."""
    if not any(story.training or story.validation for story in stories):
        return None
    figure, axes = _canvas(3.0)
    if len(stories) == 1:
        story = stories[0]
        steps, smooth = _smoothed(story.training)
        shown = [max(nll, LEAST_NLL) for nll in smooth]
        axes.plot(steps, shown, color=COLOURS["muted"], linewidth=1, label="training (running mean)")
    for i, story in enumerate(stories):
        colour = COLOURS["adapter"] if len(stories) == 1 else run_colour(i)
        label = "validation" if len(stories) == 1 else _SHOWN + story.name
        if not story.validation:
            continue
        points = [(step, max(nll, LEAST_NLL)) for step, nll in story.validation]
        axes.plot(*zip(*points, strict=True), color=colour, marker="o", markersize=4, linewidth=1.6, label=label)
        best = min(points, key=lambda point: point[1])
        axes.plot(*best, color=colour, marker="*", markersize=13, linestyle="none")
    axes.set_xlabel("step (★: best validation, which became the adapter)")
    _logarithmic(axes)
    axes.set_ylabel("NLL in nats (log scale)")
    _legend(axes)
    return figure


def examples(story: Story) -> Figure | None:
    """Test examples by NLL under the base (x) and under the adapter (y). None without any, or if no text is
    written."""
    # Other adapters are compared with a guess, whose NLL is the same for all examples of a label.
    if not story.answers or (story.summary and not writes(story.summary)):
        return None
    figure, axes = _canvas(3.8)
    base = [answer["nll"]["base"] for answer in story.answers]
    adapter = [answer["nll"]["adapter"] for answer in story.answers]
    top = max([*base, *adapter, 1e-3]) * 1.05
    axes.plot([0, top], [0, top], color=COLOURS["muted"], linewidth=1)
    axes.scatter(base, adapter, s=14, color=COLOURS["adapter"], alpha=0.6, linewidths=0, clip_on=False)
    axes.set_xlim(0, top)
    axes.set_ylim(0, top)
    axes.set_xlabel("NLL under the base")
    axes.set_ylabel("NLL with the adapter")
    return figure


def scores(stories: Sequence[Story]) -> Figure | None:
    """The right answers of several runs, or the differences in NLL if a run has none. None before there are scores."""
    finished = [(story.name, story.summary) for story in stories if story.summary is not None]
    if len(stories) == 1:
        return scores_of(finished[0][1]) if finished else None
    shares = [(name, share(summary)) for name, summary in finished]
    if all(found for _, found in shares):
        return _bars([(name, *found, run_colour(i)) for i, (name, found) in enumerate(shares) if found])
    return _differences([(name, summary.nll, run_colour(i)) for i, (name, summary) in enumerate(finished)])


def scores_of(summary: Summary) -> Figure | None:
    """The scores of one run or evaluation: right answers of everyone who answers, or the difference in NLL."""
    if share(summary) is None:
        return _differences([("adapter", summary.nll, COLOURS["adapter"])])
    found = [(line, line.right or line.equal) for line in lines(summary) if line.key in BARS]
    return _bars(
        [(BARS[line.key][0] or line.name, *shared, COLOURS[BARS[line.key][1]]) for line, shared in found if shared]
    )


Bar = tuple[str, float, Sequence[float] | None, str]
"""Name, value, 95 % interval, colour."""


def _bars(bars: Sequence[Bar]) -> Figure | None:
    """Bars of shares with their intervals; the first bar is on top."""
    if not bars:
        return None
    figure, axes = _rows([name for name, *_ in bars])
    for place, (_, value, ends, colour) in enumerate(reversed(bars)):
        axes.barh(place, value, height=0.55, color=colour, alpha=0.35, linewidth=0)
        if ends is not None:
            axes.plot(ends, [place, place], color=colour, linewidth=2, solid_capstyle="round")
        axes.plot(value, place, color=colour, marker="o", markersize=8, clip_on=False)
    axes.set_xlim(0, 1.02)
    axes.set_xticks([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axes.set_xlabel("right, 95 % interval", loc="right")
    return figure


def _differences(found: Sequence[tuple[str, NllScore, str]]) -> Figure | None:
    """Differences in NLL, each with its interval."""
    if not found:
        return None
    figure, axes = _rows([name for name, *_ in found])
    for place, (_, nll, colour) in enumerate(reversed(found)):
        if nll.ci95 is not None:
            axes.plot(nll.ci95, [place, place], color=colour, linewidth=2, solid_capstyle="round")
        axes.plot(nll.difference, place, color=colour, marker="o", markersize=8)
    axes.axvline(0, color=COLOURS["muted"], linewidth=1)
    axes.set_xlabel("difference in NLL from the base, 95 % interval\n(below 0 is better)", loc="right")
    return figure


def of_summary(summary: Summary) -> dict[str, Figure | None]:
    """All pictures that need only a summary, by name."""
    return {
        "scores": scores_of(summary),
        "forgetting": forgetting(summary.forgotten),
        "confusion": confusion(summary.classes) if summary.classes else None,
        "reliability": reliability(summary.classes) if summary.classes else None,
    }


def confusion(classes: ClassScores) -> Figure | None:
    """The confusion matrix: true labels (rows) and given labels (columns), with shares of the row as colours and, if
    there is room, counts. With many labels the lower axis has numbers instead of names. None without a matrix."""
    if not classes.confusion:
        return None
    counts = np.array(classes.confusion)
    shares, n = counts / np.maximum(1, counts.sum(1, keepdims=True)), len(counts)
    names = [_cut(one.label) for one in classes.per_label]
    size, every = (8, 1) if n <= NAMED else (7, 1) if n <= COUNTED else (6, 2)
    below = names if n <= NAMED else [str(i + 1) for i in range(0, n, every)]
    left = names if n <= NAMED else [f"{name}  {i + 1}" for i, name in enumerate(names)]
    row = 0.42 if n <= NAMED else 0.26 if n <= COUNTED else 0.15
    figure = Figure(figsize=(WIDTH, 1.1 + max(1.4, n * row)), layout="constrained")
    axes = figure.add_subplot()
    axes.pcolormesh(shares, cmap=HEAT, vmin=0, vmax=1, edgecolors="none")
    axes.invert_yaxis()
    axes.set_yticks(np.arange(n) + 0.5, left, fontsize=size, parse_math=False)
    axes.set_xticks(np.arange(0, n, every) + 0.5, below, fontsize=size, parse_math=False)
    if max(map(len, below)) * n > 60:  # more characters than fit next to each other
        for name in axes.get_xticklabels():
            name.set(rotation=45, ha="right", rotation_mode="anchor")
    for (i, k), count in np.ndenumerate(counts):
        if count and n <= COUNTED:
            colour = ON_DARK if shares[i, k] > 0.5 else ON_LIGHT
            axes.text(k + 0.5, i + 0.5, f"{count}", color=colour, fontsize=size, ha="center", va="center")
    axes.tick_params(colors=COLOURS["ink"], length=0)
    axes.set_xlabel("predicted label", color=COLOURS["ink"], loc="right")
    axes.set_ylabel("true label", color=COLOURS["ink"])
    for spine in axes.spines.values():
        spine.set_color(COLOURS["line"])
    return figure


def reliability(classes: ClassScores) -> Figure:
    """The reliability diagram: the share of right labels (y) by confidence (x), with the number of texts."""
    figure, axes = _canvas(3.8)
    axes.plot([0, 1], [0, 1], color=COLOURS["muted"], linewidth=1)
    for one in classes.bins:
        at, size = (one.confidence, one.right), 20 + 400 * one.n / classes.n
        axes.scatter(*at, s=size, color=COLOURS["adapter"], alpha=0.55, linewidths=0, clip_on=False)
        above = (
            one.right < 0.1 or one.confidence < one.right < 0.9
        )  # the side that is away from the line and inside the picture
        away = (6 + size**0.5 / 2) * (1 if above else -1)
        number = axes.annotate(
            f"{one.n:,}", at, (0, away), textcoords="offset points", color=COLOURS["ink"], fontsize=8
        )
        number.set(ha="center", va="center")
    marks = ([0, 0.25, 0.5, 0.75, 1], ["0 %", "25 %", "50 %", "75 %", "100 %"])
    axes.set_xlim(0, 1.02)
    axes.set_ylim(0, 1.02)
    axes.set_xticks(*marks)
    axes.set_yticks(*marks)
    axes.set_xlabel("confidence: probability of the predicted label")
    axes.set_ylabel("share right")
    return figure


def forgetting(found: Mapping[str, NllScore]) -> Figure | None:
    """The NLL of each general text under the base and with the adapter. None if it was not measured."""
    if not found:
        return None
    figure, axes = _rows([PurePath(source).name for source in found], 1.3)
    for place, score in enumerate(reversed([*found.values()])):
        if score.ci95 is not None:
            ends = [score.base + end for end in score.ci95]
            axes.plot(ends, [place, place], color=COLOURS["adapter"], linewidth=2, solid_capstyle="round")
        for who, nll in (("base", score.base), ("adapter", score.adapter)):
            axes.plot(
                nll,
                place,
                color=COLOURS[who],
                marker="o",
                markersize=8,
                linestyle="none",
                label=who if place == 0 else None,
            )
    shown = [
        value
        for score in found.values()
        for value in (score.base, score.adapter, *(score.base + end for end in score.ci95 or ()))
    ]
    spare = max(0.1 * (max(shown) - min(shown)), LEAST_SPAN)  # a tiny difference must not look like a large one
    axes.set_xlim(min(shown) - spare, max(shown) + spare)
    axes.set_xlabel("NLL of general text, nats per token\n(to the right is worse)", loc="right")
    _legend(axes)
    return figure


def search(story: Story) -> Figure | None:
    """The arms of the search: the training NLL by step, and the validation NLL at the end. None without arms."""
    arms = [arm for arm in story.tried if arm["curve"]]
    if not arms:
        return None
    figure, axes = _canvas(3.4)
    for what, style in (("rate-", "-"), ("place-", "--")):
        some = [arm for arm in arms if arm["cell"].startswith(what)]
        names = list(dict.fromkeys(arm["name"] for arm in some))
        for arm in some:
            colour = run_colour(names.index(arm["name"]))
            steps, smooth = _smoothed(arm["curve"])
            axes.plot(steps, smooth, style, color=colour, linewidth=1, alpha=0.55)
            if arm["each"] is not None:
                axes.plot(arm["steps"], sum(arm["each"]) / len(arm["each"]), color=colour, marker="o", linestyle="none")
        for i, name in enumerate(names):
            axes.plot([], [], style, color=run_colour(i), linewidth=2, label=_SHOWN + name)
    axes.set_xlabel("step (lines: training, running mean; ● validation at the end)")
    axes.set_ylabel("NLL in nats")
    _legend(axes)
    return figure


def layers(story: Story) -> Figure | None:
    """The strength of the gradient at each layer before training, and the importance of the trained pairs there for
    validation. None if neither was measured."""
    drawn: list[tuple[str, dict[str, float]]] = []
    if story.card and "sites" in story.card:
        drawn.append(("before training: gradient energy", _energies(story.card)))
    if story.importance:
        drawn.append(("after training: effect of the pairs", dict(story.importance["first_order"])))
    return _heat(drawn) if drawn else None


def layer_card(card: Mapping[str, Any]) -> Figure:
    """The strength of the gradient at each layer."""
    return _heat([("gradient energy", _energies(card))])


def _energies(card: Mapping[str, Any]) -> dict[str, float]:
    return {one["path"]: one["energy"] for one in card["sites"]}


def _heat(drawn: Sequence[tuple[str, Mapping[str, float]]]) -> Figure:
    """A heat map of blocks × kinds of module. Each cell shows its share of the whole; negative values count as zero."""
    paths = list(drawn[0][1])
    kinds = kinds_of(paths)
    names = list(dict.fromkeys(kinds.values()))
    blocks = sorted({_row(path) for path in paths})
    figure = Figure(figsize=(WIDTH, min(9.0, 1.6 + 0.16 * len(blocks))), layout="constrained")
    for place, (title, values) in enumerate(drawn):
        axes = figure.add_subplot(1, len(drawn), place + 1)
        grid = np.zeros((len(blocks), len(names)))
        for path, value in values.items():
            grid[blocks.index(_row(path)), names.index(kinds[path])] += max(0.0, value)
        whole = grid.sum()
        axes.pcolormesh(grid / whole if whole else grid, cmap=HEAT, vmin=0, edgecolors="none")
        axes.set_title(title, fontsize=9, color=COLOURS["ink"])
        axes.set_xticks(np.arange(len(names)) + 0.5, names, rotation=60, ha="right", fontsize=7)
        every = max(1, len(blocks) // 15)
        told = ["-" if block < 0 else str(block) for block in blocks[::every]]
        axes.set_yticks(np.arange(0, len(blocks), every) + 0.5, told, fontsize=7)
        axes.tick_params(colors=COLOURS["ink"], length=0)
        if place == 0:
            axes.set_ylabel("block", color=COLOURS["ink"])
        for spine in axes.spines.values():
            spine.set_color(COLOURS["line"])
    return figure


def _row(path: str) -> int:
    """The number of a site's block; -1 for a site outside of the blocks."""
    block = block_of(path)
    return -1 if block is None else block


def run_colour(i: int) -> str:
    """The colour of the i-th of several runs."""
    return COLOURS[f"run{i % 6 + 1}"]


def svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element that uses the page's colour variables. name: makes its ids unique in the page."""
    with rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        file = io.StringIO()
        _save(figure, file, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = file.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(
        r'(<svg[^>]*?) width="[^"]*"', r"\1", re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", text, count=1), count=1
    )
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    for variable, colour in COLOURS.items():
        text = text.replace(colour, f"var(--{variable})")
    return re.sub(r"'DejaVu Sans'[^;\"]*", "inherit", text)


def png(figure: Figure) -> bytes:
    """The figure as the content of a PNG file, on white."""
    file = io.BytesIO()
    _save(figure, file, format="png", dpi=DPI, facecolor=COLOURS["paper"], metadata={"Software": None})
    return file.getvalue()


def _save(figure: Figure, file: Any, **how: Any) -> None:
    """Save without warnings about characters that the font lacks: PNG shows a box, and a browser draws them in SVG."""
    with catch_warnings():
        filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(file, **how)


def _legend(axes: Axes) -> None:
    """Draw the legend with the names as they are: $ begins no formula, and names that begin with _ are kept."""
    for text in axes.legend(frameon=False, labelcolor=COLOURS["ink"]).get_texts():
        text.set(text=_in_lines(text.get_text().removeprefix(_SHOWN)), parse_math=False)


def _logarithmic(axes: Axes) -> None:
    """Make the y axis logarithmic, with plain numbers at its ticks."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    round_ones = [digit * 10.0**power for power in range(-5, 5) for digit in (1, 2, 5)]
    marks = [mark for mark in round_ones if low <= mark <= high]
    if len(marks) < 3:
        marks = [mark for mark in MaxNLocator(5).tick_values(low, high) if low <= mark <= high]
    axes.set_yticks(marks, [f"{mark:g}" for mark in marks])
    axes.yaxis.set_minor_locator(NullLocator())


def _rows(names: Sequence[str], rest: float = 0.9) -> tuple[Figure, Axes]:
    """A figure with a row for each name; the first is on top. rest: the height in inches without the rows. The label of
    the x axis should end with the axis (loc="right"), or a long one would be cut at the edge of the figure."""
    told = [_in_lines(name) for name in names]
    lines = max(name.count("\n") + 1 for name in told)
    figure, axes = _canvas(rest + (0.26 + 0.16 * lines) * len(told))
    axes.set_yticks(range(len(told)), told[::-1], parse_math=False)
    axes.set_ylim(-0.6, len(told) - 0.4)
    return figure, axes


def _in_lines(name: str) -> str:
    """A long name in several lines, broken between words and parts of paths if possible."""
    lines = [""]
    for piece in re.findall(rf"[^\s/._-]{{1,{LONGEST_LINE}}}[\s/._-]?|[\s/._-]", name):
        if len(lines[-1] + piece.rstrip()) > LONGEST_LINE:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


def _cut(name: str) -> str:
    """A long name in one line: its beginning and its end."""
    name = " ".join(name.split())
    return name if len(name) <= 28 else f"{name[:14]}…{name[-13:]}"


def _canvas(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(COLOURS["line"])
    axes.grid(color=COLOURS["line"], linewidth=0.6)
    axes.set_axisbelow(True)
    axes.tick_params(colors=COLOURS["ink"], length=0)
    axes.xaxis.label.set_color(COLOURS["ink"])
    axes.yaxis.label.set_color(COLOURS["ink"])
    return figure, axes


def _smoothed(points: Sequence[tuple[int, float]]) -> tuple[list[int], list[float]]:
    """The running mean over a fiftieth of the run, because the NLL of single steps varies strongly."""
    width = max(1, len(points) // 50)
    steps = [step for step, _ in points]
    values = [value for _, value in points]
    means = []
    for i in range(len(values)):
        window = values[max(0, i - width) : i + width + 1]
        means.append(sum(window) / len(window))
    return steps, means
