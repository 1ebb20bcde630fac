"""The report: one self-contained HTML file about one run or several, its pictures as PNG files beside it."""

from __future__ import annotations

import shlex
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, StrictUndefined

import lorafit
from lorafit.errors import RunError
from lorafit.evaluation.statistics import paired_bootstrap
from lorafit.files import require_new, whole_file, write_text
from lorafit.report import charts
from lorafit.report.story import Story, read_story
from lorafit.report.why import why
from lorafit.report.words import clock, doubt, headline, interval, percent, verdict
from lorafit.settings import BY_RULE

PICTURES = ("curves", "search", "layers", "scores", "examples")
SHOWN = 6  # answers shown before the fold
FOLDED = 60  # answers in the fold


@dataclass(frozen=True)
class Pair:
    """Two runs on the same test examples: mean of NLL b − a, paired, with its interval."""

    a: str
    b: str
    difference: float
    ci95: tuple[float, float] | None


def write_report(folders: Sequence[Path], out: Path) -> Path:
    """Write the report about the runs in `folders` to `out`, pictures beside it; returns `out`.

    Raises FormatError for a folder without a run, RunError where two of the names are one run, and where `out` is
    anything else than a page of ours.
    """
    resolved = [folder.resolve() for folder in folders]
    twice = [str(folder) for folder, count in Counter(resolved).items() if count > 1]
    if twice:
        raise RunError(f"{', '.join(twice)}: named more than once: name each run once")
    if not _is_ours(out):
        for path in (out, *(_beside(out, name) for name in PICTURES)):
            require_new(path, "--out")
    stories = [replace(read_story(folder), name=name) for folder, name in zip(folders, _names(resolved), strict=True)]
    drawn = {
        "curves": charts.curves(stories),
        "search": charts.search(stories[0]) if len(stories) == 1 else None,
        "layers": charts.layers(stories[0]) if len(stories) == 1 else None,
        "scores": None if _apart(stories) else charts.scores(stories),
        "examples": charts.examples(stories[0]) if len(stories) == 1 else None,
    }
    for name, figure in drawn.items():
        if figure is not None:
            with whole_file(_beside(out, name)) as file:
                file.write_bytes(charts.png(figure))
    pictures = {name: charts.svg(figure, name) if figure else None for name, figure in drawn.items()}
    write_text(out, _page(stories, pictures))
    return out


def _names(folders: Sequence[Path]) -> list[str]:
    """The end of each path, as long as it takes to tell them apart."""
    longest = max(len(folder.parts) for folder in folders)
    ends = (["/".join(folder.parts[-n:]) for folder in folders] for n in range(2, longest + 1))
    return next(names for names in ends if len(set(names)) == len(names))


def _beside(out: Path, picture: str) -> Path:
    return out.with_name(f"{out.stem}-{picture}.png")


def _is_ours(out: Path) -> bool:
    """Whether a page of ours is there, which may be written anew; anything else is not written over."""
    return out.is_file() and 'content="lorafit ' in out.read_text(encoding="utf-8", errors="replace")[:1000]


def _page(stories: Sequence[Story], pictures: Mapping[str, str | None]) -> str:
    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    environment.filters.update(percent=percent, clock=clock, interval=interval, verdict=verdict, doubt=doubt)
    environment.filters["quoted"] = lambda path: shlex.quote(str(path))
    text = files("lorafit.report").joinpath("page.html").read_text(encoding="utf-8")
    return environment.from_string(text).render(
        stories=stories,
        pictures=pictures,
        one=_one(stories[0]) if len(stories) == 1 else None,
        pairs=pairs(stories),
        apart=_apart(stories),
        differing=_differing(stories) if len(stories) > 1 else [],
        colours=[charts.run_colour(i) for i in range(len(stories))],
        version=lorafit.__version__,
    )


def _one(story: Story) -> dict[str, Any]:
    """What the page says about a single run beyond what its files say."""
    answered = [answer for answer in story.answers if answer["adapter"] is not None]
    asked = answered or [answer for answer in story.answers if answer["question"]]
    shown = asked[:: max(1, len(asked) // SHOWN)][:SHOWN]
    worst = sorted(story.answers, key=lambda answer: answer["nll"]["base"] - answer["nll"]["adapter"])
    worse = sum(answer["nll"]["adapter"] > answer["nll"]["base"] for answer in story.answers)
    sites = Counter(slot["site"]["path"].rpartition(".")[2] for slot in story.plan["slots"]) if story.plan else {}
    return {"shown": shown, "folded": [a for a in answered if a not in shown][:FOLDED], "answered": len(answered),
            "worst": worst[:3] if len(worst) > SHOWN else [], "worse": worse, "sites": sites, "why": why(story),
            **_scored(story.summary)}  # fmt: skip


def _scored(summary: Mapping[str, Any] | None) -> dict[str, Any]:
    """The headline; the models a run compares, as (name, key); the interval of each one's share of right answers."""
    if summary is None:
        return {}
    facts = summary["facts"]
    models = [("base", "base")]
    if facts["base_few_shot"] is not None:
        models.append((f"base, {facts['few_shot_examples']} examples in its prompt", "base_few_shot"))
    models.append(("adapter", "adapter"))
    if facts["shuffled_control"] is not None:
        models.append(("control: trained on shuffled answers", "shuffled_control"))
    ends = {"base": facts.get("ci95_base"), "base_few_shot": facts.get("ci95_base_few_shot"), "adapter": facts["ci95"],
            "shuffled_control": None}  # fmt: skip
    return {"models": models, "ends": ends, "headline": headline(summary)}


def _apart(stories: Sequence[Story]) -> list[str]:
    """What keeps the runs from being compared."""
    found = []
    if len({_base(story) for story in stories}) > 1:
        found.append("they stand on different bases")
    if len({tuple(_tested(story)) for story in stories if story.answers}) > 1:
        found.append("they were tested on different examples")
    return found


def _differing(stories: Sequence[Story]) -> list[tuple[str, list[str]]]:
    """What was not the same in all runs, with its value in each: what was asked for, and what the rules made of it."""
    told: list[dict[str, Any]] = []
    for story in stories:
        one = {"base": story.asked["base"], "data": story.asked["data"]}
        one |= {name: "by rule" if value is None and name in BY_RULE else value
                for name, value in story.asked["settings"].items()}  # fmt: skip
        one |= story.asked["frozen"]  # what auto came to
        if story.plan:
            one |= {f"{name} (resolved)": value for name, value in story.plan["recipe"].items()}
            one["sites"] = len(story.plan["slots"])
            one["ranks"] = ", ".join(map(str, sorted({slot["rank"] for slot in story.plan["slots"]})))
        told.append(one)
    names = dict.fromkeys(name for one in told for name in one)
    values = {name: [str(one.get(name, "-")) for one in told] for name in names}
    return [(name, each) for name, each in values.items() if len(set(each)) > 1]


def pairs(stories: Sequence[Story]) -> list[Pair]:
    """Every later run against the first, where both stand on one base and were tested on the same examples."""
    first, found = stories[0], []
    for other in stories[1:]:
        ours, theirs = _tested(first), _tested(other)
        if ours and ours.keys() == theirs.keys() and _base(first) == _base(other):
            differences = [theirs[key]["nll"]["adapter"] - ours[key]["nll"]["adapter"] for key in ours]
            drawn = paired_bootstrap(differences, [answer["group"] for answer in ours.values()])
            mean = sum(differences) / len(differences)
            found.append(Pair(first.name, other.name, mean, (drawn.low, drawn.high) if drawn else None))
    return found


def _base(story: Story) -> str:
    return str(story.asked.get("base_identity") or story.asked["base"])


def _tested(story: Story) -> dict[tuple[str, int], Mapping[str, Any]]:
    """The records of the test in one order, whatever the file's: by fingerprint, and how many of it came before."""
    ranked = sorted((_fingerprint(answer), i) for i, answer in enumerate(story.answers))
    before: Counter[str] = Counter()
    found = {}
    for fingerprint, i in ranked:
        found[fingerprint, before[fingerprint]] = story.answers[i]
        before[fingerprint] += 1
    return found


def _fingerprint(answer: Mapping[str, Any]) -> str:
    return answer.get("example") or f"{answer['question']}\0{answer['reference']}"  # before runs kept one
