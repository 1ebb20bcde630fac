"""The pictures of a report, drawn by matplotlib: inline SVG that follows the page's light or dark, and PNG files."""

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

from lorafit.planning.signal import block_of, kinds_of
from lorafit.report.story import Story
from lorafit.report.words import lines, share

# Drawn in these colours; in the SVG each becomes the page's variable of that name, which differs by light and dark.
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
HEAT = LinearSegmentedColormap.from_list("heat", ["#f2f4f6", "#5fb3a8", "#0b5a52"])  # as well on dark paper
_SHOWN = "run "  # before a name in a legend, which leaves out those that begin with _
# What is drawn of those that answer: a shorter name, and the colour.
BARS = {
    "base": ("", "base"),
    "base_few_shot": ("base, with examples", "few"),
    "most_frequent": ("always the same answer", "muted"),
    "classifier": ("", "run4"),
    "adapter": ("", "adapter"),
}
LEAST_NLL = 1e-4  # where a logarithmic axis, which has no zero, ends
LEAST_SPAN = 0.1  # nats on both sides
LONGEST_LINE = 24  # characters of a name
WIDTH, DPI = 5.4, 160  # inches: legible at the width of a telephone; dots per inch of the PNG


def curves(stories: Sequence[Story]) -> Figure | None:
    """NLL over the steps: of one run training and validation, of several their validation. None before any step."""
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
    axes.set_xlabel("step (★ the best by validation: this is the adapter)")
    _logarithmic(axes)
    axes.set_ylabel("NLL, nats per token (log scale)")
    _legend(axes)
    return figure


def examples(story: Story) -> Figure | None:
    """Each test example by its NLL under the base (x) and under the adapter (y)."""
    if not story.answers:
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
    """Right answers of each with their interval, or, where a run has none, the difference in NLL. None before any."""
    finished = [(story.name, story.summary) for story in stories if story.summary is not None]
    if len(stories) == 1:
        return scores_of(finished[0][1]) if finished else None
    shares = [(name, share(summary)) for name, summary in finished]
    if all(found for _, found in shares):
        return _bars([(name, *found, run_colour(i)) for i, (name, found) in enumerate(shares) if found])
    return _differences([(name, summary["nll"], run_colour(i)) for i, (name, summary) in enumerate(finished)])


def scores_of(summary: Mapping[str, Any]) -> Figure | None:
    """The picture of one run's or evaluation's scores: of all that answer, or the difference in NLL."""
    if share(summary) is None:
        return _differences([("adapter", summary["nll"], COLOURS["adapter"])])
    found = [(line, line.right or line.equal) for line in lines(summary) if line.key in BARS]
    return _bars(
        [(BARS[line.key][0] or line.name, *shared, COLOURS[BARS[line.key][1]]) for line, shared in found if shared]
    )


Bar = tuple[str, float, Sequence[float] | None, str]
"""Name, value, its 95 % interval, colour."""


def _bars(bars: Sequence[Bar]) -> Figure | None:
    """Shares as bars with their intervals, the first one on top."""
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
    axes.set_xlabel("answers right, 95 % interval", loc="right")
    return figure


def _differences(found: Sequence[tuple[str, Mapping[str, Any], str]]) -> Figure | None:
    """Differences in NLL, each with its interval."""
    if not found:
        return None
    figure, axes = _rows([name for name, *_ in found])
    for place, (_, nll, colour) in enumerate(reversed(found)):
        if nll["ci95"] is not None:
            axes.plot(nll["ci95"], [place, place], color=colour, linewidth=2, solid_capstyle="round")
        axes.plot(nll["difference"], place, color=colour, marker="o", markersize=8)
    axes.axvline(0, color=COLOURS["muted"], linewidth=1)
    axes.set_xlabel("difference in NLL to the base, 95 % interval\n(below 0 is better)", loc="right")
    return figure


def forgetting(summary: Mapping[str, Any] | None) -> Figure | None:
    """NLL of each general text under the base and with the adapter. None where it was not measured."""
    found = ((summary or {}).get("forgetting") or summary or {}).get("general")
    if not found:
        return None
    figure, axes = _rows([PurePath(source).name for source in found], 1.3)
    for place, score in enumerate(reversed(found.values())):
        if score["ci95"] is not None:
            ends = [score["base"] + end for end in score["ci95"]]
            axes.plot(ends, [place, place], color=COLOURS["adapter"], linewidth=2, solid_capstyle="round")
        for who in ("base", "adapter"):
            axes.plot(
                score[who],
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
        for value in (score["base"], score["adapter"], *(score["base"] + end for end in score["ci95"] or ()))
    ]
    spare = max(0.1 * (max(shown) - min(shown)), LEAST_SPAN)  # a difference of nothing is not to look like one
    axes.set_xlim(min(shown) - spare, max(shown) + spare)
    axes.set_xlabel("NLL of general text, nats per token\n(to the right is worse)", loc="right")
    _legend(axes)
    return figure


def search(story: Story) -> Figure | None:
    """The arms of the search: training NLL over the steps of each, its validation NLL at the end. None without any."""
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
    axes.set_ylabel("NLL, nats per token")
    _legend(axes)
    return figure


def layers(story: Story) -> Figure | None:
    """How strongly the data pulled at each layer before training, and what the trained pairs there do for validation.
    None where neither was measured."""
    drawn: list[tuple[str, dict[str, float]]] = []
    if story.card and "sites" in story.card:
        drawn.append(("before: the pull of the data", _energies(story.card)))
    if story.importance:
        drawn.append(("after: what the pairs do", dict(story.importance["first_order"])))
    return _heat(drawn) if drawn else None


def layer_card(card: Mapping[str, Any]) -> Figure:
    """How strongly the data pull at each layer."""
    return _heat([("the pull of the data", _energies(card))])


def _energies(card: Mapping[str, Any]) -> dict[str, float]:
    return {one["path"]: one["energy"] for one in card["sites"]}


def _heat(drawn: Sequence[tuple[str, Mapping[str, float]]]) -> Figure:
    """Blocks × kinds of module, each cell by its share of the whole; what is below zero is drawn as nothing."""
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
    """The block of a site, below the first for one that lies in none."""
    block = block_of(path)
    return -1 if block is None else block


def run_colour(i: int) -> str:
    """The colour of the i-th of several runs."""
    return COLOURS[f"run{i % 6 + 1}"]


def svg(figure: Figure, name: str) -> str:
    """The figure as an SVG element for a page: scalable, its colours the page's variables. `name` keeps ids apart."""
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
    """The figure as a picture file, on white paper."""
    file = io.BytesIO()
    _save(figure, file, format="png", dpi=DPI, facecolor=COLOURS["paper"], metadata={"Software": None})
    return file.getvalue()


def _save(figure: Figure, file: Any, **how: Any) -> None:
    """A character that the font lacks is a box in the PNG, and no reason to warn; in the SVG the browser draws it."""
    with catch_warnings():
        filterwarnings("ignore", "Glyph .* missing from font")
        figure.savefig(file, **how)


def _legend(axes: Axes) -> None:
    """The names as they are: no formulas between $, and none left out that begins with _."""
    for text in axes.legend(frameon=False, labelcolor=COLOURS["ink"]).get_texts():
        text.set(text=_in_lines(text.get_text().removeprefix(_SHOWN)), parse_math=False)


def _logarithmic(axes: Axes) -> None:
    """The y axis in logarithms, its marks written as numbers."""
    axes.set_yscale("log")
    low, high = axes.get_ylim()
    round_ones = [digit * 10.0**power for power in range(-5, 5) for digit in (1, 2, 5)]
    marks = [mark for mark in round_ones if low <= mark <= high]
    if len(marks) < 3:
        marks = [mark for mark in MaxNLocator(5).tick_values(low, high) if low <= mark <= high]
    axes.set_yticks(marks, [f"{mark:g}" for mark in marks])
    axes.yaxis.set_minor_locator(NullLocator())


def _rows(names: Sequence[str], rest: float = 0.9) -> tuple[Figure, Axes]:
    """A picture with a row for each name, the first on top. rest: inches of what is not rows. The label below is to end
    where the axis ends (loc="right"): wider than the axis, it would be cut at the edge of the picture."""
    told = [_in_lines(name) for name in names]
    lines = max(name.count("\n") + 1 for name in told)
    figure, axes = _canvas(rest + (0.26 + 0.16 * lines) * len(told))
    axes.set_yticks(range(len(told)), told[::-1], parse_math=False)
    axes.set_ylim(-0.6, len(told) - 0.4)
    return figure, axes


def _in_lines(name: str) -> str:
    """A name that leaves room beside it: broken where words and parts of paths end, or else anywhere."""
    lines = [""]
    for piece in re.findall(rf"[^\s/._-]{{1,{LONGEST_LINE}}}[\s/._-]?|[\s/._-]", name):
        if len(lines[-1] + piece.rstrip()) > LONGEST_LINE:
            lines.append("")
        lines[-1] += piece
    return "\n".join(line.rstrip() for line in lines)


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
    """Running mean over a fiftieth of the run: single steps of few examples jump about."""
    width = max(1, len(points) // 50)
    steps = [step for step, _ in points]
    values = [value for _, value in points]
    means = []
    for i in range(len(values)):
        window = values[max(0, i - width) : i + width + 1]
        means.append(sum(window) / len(window))
    return steps, means
