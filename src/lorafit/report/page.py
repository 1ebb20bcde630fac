"""The report: the folders of runs go in; one self-contained HTML file, and its pictures as PNG files, come out."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorafit.evaluation.scores import Paired
from lorafit.evaluation.statistics import paired_bootstrap, sign_test
from lorafit.files import whole_file, write_text
from lorafit.report import charts
from lorafit.report.place import beside, require_place
from lorafit.report.story import Story, read_story
from lorafit.report.templates import template
from lorafit.report.why import why
from lorafit.report.words import answered, headline, share
from lorafit.runs.folder import DRAWN
from lorafit.runs.tested import matched
from lorafit.settings import BY_RULE
from lorafit.version import __version__

SHOWN = 6  # answers that are shown at once
FOLDED = 60  # further answers that a click shows


@dataclass(frozen=True)
class Pair:
    """Two runs on the same test examples.

    Args:
        a, b: Their names.
        difference: The mean of NLL b − a, with its interval `ci95`; None if only one of them is a classifier.
        right: Right answers of b against those of a; None if answers cannot be scored.
    """

    a: str
    b: str
    difference: float | None
    ci95: tuple[float, float] | None
    right: Paired | None


def write_report(folders: str | Path | Sequence[str | Path], out: str | Path) -> Path:
    """Write the report about one or several runs to the file `out`, and its pictures next to it; returns `out`.

    Raises FormatError for a folder without a run, and RunError like `require_place`.
    """
    out = Path(out)
    runs = [Path(folder) for folder in ([folders] if isinstance(folders, str | Path) else folders)]
    require_place(runs, out)
    resolved = [run.resolve() for run in runs]
    stories = [replace(read_story(run), name=name) for run, name in zip(runs, _names(resolved), strict=True)]
    drawn = dict.fromkeys(DRAWN) | {"curves": None if _mixed(stories) else charts.curves(stories)}
    if len(stories) == 1:
        (story,) = stories
        drawn |= {"search": charts.search(story), "layers": charts.layers(story), "examples": charts.examples(story)}
        drawn |= charts.of_summary(story.summary) if story.summary else {}
    elif not _apart(stories):
        drawn["scores"] = charts.scores(stories)
    for name, figure in drawn.items():
        if figure is not None:
            with whole_file(beside(out, name)) as file:
                file.write_bytes(charts.png(figure))
    pictures = {name: charts.svg(figure, name) if figure else None for name, figure in drawn.items()}
    write_text(out, _page(stories, pictures))
    return out


def _names(folders: Sequence[Path]) -> list[str]:
    """The shortest ends of the paths that differ from each other."""
    longest = max(len(folder.parts) for folder in folders)
    ends = (["/".join(folder.parts[-n:]) for folder in folders] for n in range(2, longest + 1))
    return next(names for names in ends if len(set(names)) == len(names))


def _page(stories: Sequence[Story], pictures: Mapping[str, str | None]) -> str:
    return template("page.html").render(
        stories=stories,
        pictures=pictures,
        one=_one(stories[0]) if len(stories) == 1 else None,
        pairs=pairs(stories),
        apart=_apart(stories),
        mixed=_mixed(stories),
        labels=all(story.summary and story.summary.classes for story in stories),
        differing=_differing(stories) if len(stories) > 1 else [],
        colours=[charts.run_colour(i) for i in range(len(stories))],
        version=__version__,
    )


def _one(story: Story) -> dict[str, Any]:
    """The values for the page of a single run that are not in its files."""
    answers = [answered(story.summary, one, _marks(story, one)) for one in story.answers]
    given = [answer for answer in answers if answer["adapter"] is not None]
    wrong = [answer for answer in given if answer["good"].get("adapter") is False]
    asked = [answer for answer in given or answers if answer["question"] and answer not in wrong]
    shown = _spread(wrong, SHOWN // 2)
    shown += _spread(asked, SHOWN - len(shown))
    folded = [*(one for one in wrong if one not in shown), *(one for one in asked if one not in shown)]
    worst = sorted(answers, key=lambda answer: answer["nll"]["base"] - answer["nll"]["adapter"])
    worse = sum(answer["nll"]["adapter"] > answer["nll"]["base"] for answer in answers)
    sites = Counter(slot["site"]["path"].rpartition(".")[2] for slot in story.plan["slots"]) if story.plan else {}
    told = {"headline": headline(story.summary), "share": share(story.summary)} if story.summary else {}
    return {
        "shown": shown,
        "folded": folded[:FOLDED] if given else [],
        "answered": len(given),
        "wrong": len(wrong),
        "worst": worst[:3] if len(worst) > SHOWN else [],
        "worse": worse,
        "sites": sites,
        "why": why(story),
        **told,
    }


def _marks(story: Story, answer: Mapping[str, Any]) -> dict[str, bool]:
    """Whether each answer is right, by its check, or by equality if that is meaningful."""
    counts = story.summary.counts if story.summary else None
    tells = counts is not None and counts.tells and not counts.unchecked
    return dict(answer.get("right") or (answer.get("equal") if tells else None) or {})


def _spread(answers: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    return list(answers[:: max(1, -(-len(answers) // max(1, most)))][:most])


def _mixed(stories: Sequence[Story]) -> bool:
    """Whether NLL is of several units: of several tasks, or with and without weights of labels."""
    found = [story.summary for story in stories if story.summary]
    return len({(one.task, one.classes is not None and one.classes.weighted) for one in found}) > 1


def _apart(stories: Sequence[Story]) -> list[str]:
    """The reasons why the runs cannot be compared."""
    found = []
    if len({_base(story) for story in stories}) > 1:
        found.append("they have different bases")
    first, *others = [story.answers for story in stories if story.answers] or [()]
    if not all(matched(first, answers) for answers in others):
        found.append("they were tested on different examples")
    return found


def _differing(stories: Sequence[Story]) -> list[tuple[str, list[str]]]:
    """The settings and decisions that differ between the runs, with their value in each."""
    told: list[dict[str, Any]] = []
    for story in stories:
        one = {"base": story.asked["base"], "data": story.asked["data"]}
        one |= {
            name: "by rule" if value is None and name in BY_RULE else value
            for name, value in story.asked["settings"].items()
        }
        one |= story.asked["frozen"]  # the resolved values of auto
        if story.plan:
            one |= {f"{name} (resolved)": value for name, value in story.plan["recipe"].items()}
            one["sites"] = len(story.plan["slots"])
            one["ranks"] = ", ".join(map(str, sorted({slot["rank"] for slot in story.plan["slots"]})))
        told.append(one)
    names = dict.fromkeys(name for one in told for name in one)
    values = {name: [str(one.get(name, "-")) for one in told] for name in names}
    return [(name, each) for name, each in values.items() if len(set(each)) > 1]


def pairs(stories: Sequence[Story]) -> list[Pair]:
    """Each later run against the first, if both have the same base and the same test examples."""
    first, found = stories[0], []
    for other in stories[1:]:
        both = matched(first.answers, other.answers)
        if not both or _base(first) != _base(other):
            continue
        groups = [ours["group"] for ours, _ in both]
        mean = ends = None
        if not _mixed([first, other]):
            differences = [theirs["nll"]["adapter"] - ours["nll"]["adapter"] for ours, theirs in both]
            drawn, mean = paired_bootstrap(differences, groups), sum(differences) / len(differences)
            ends = (drawn.low, drawn.high) if drawn else None
        marks = [(_marks(first, ours).get("adapter"), _marks(other, theirs).get("adapter")) for ours, theirs in both]
        known = [(b - a, group) for (a, b), group in zip(marks, groups, strict=True) if a is not None and b is not None]
        right = Paired(*sign_test(*zip(*known, strict=True))) if known else None
        found.append(Pair(first.name, other.name, mean, ends, right))
    return found


def _base(story: Story) -> str:
    return str(story.asked.get("base_identity") or story.asked["base"])
