"""The report: one self-contained HTML file about one run or several, its pictures as PNG files beside it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from lorafit.evaluation.statistics import paired_bootstrap
from lorafit.files import whole_file, write_text
from lorafit.report import charts
from lorafit.report.place import beside, require_place
from lorafit.report.story import Story, read_story
from lorafit.report.templates import template
from lorafit.report.why import why
from lorafit.report.words import headline, share
from lorafit.settings import BY_RULE
from lorafit.version import __version__

SHOWN = 6  # answers shown before the fold
FOLDED = 60  # answers in the fold


@dataclass(frozen=True)
class Pair:
    """Two runs on the same test examples: mean of NLL b − a, paired, with its interval."""

    a: str
    b: str
    difference: float
    ci95: tuple[float, float] | None


def write_report(folders: str | Path | Sequence[str | Path], out: str | Path) -> Path:
    """Write the report about a run, or several, to `out`, pictures beside it; returns `out`.

    Raises FormatError for a folder without a run, RunError as `require_place` does.
    """
    out = Path(out)
    runs = [Path(folder) for folder in ([folders] if isinstance(folders, str | Path) else folders)]
    require_place(runs, out)
    resolved = [run.resolve() for run in runs]
    stories = [replace(read_story(run), name=name) for run, name in zip(runs, _names(resolved), strict=True)]
    drawn = {
        "curves": charts.curves(stories),
        "search": charts.search(stories[0]) if len(stories) == 1 else None,
        "layers": charts.layers(stories[0]) if len(stories) == 1 else None,
        "scores": None if _apart(stories) else charts.scores(stories),
        "examples": charts.examples(stories[0]) if len(stories) == 1 else None,
        "forgetting": charts.forgetting(stories[0].summary) if len(stories) == 1 else None,
    }
    for name, figure in drawn.items():
        if figure is not None:
            with whole_file(beside(out, name)) as file:
                file.write_bytes(charts.png(figure))
    pictures = {name: charts.svg(figure, name) if figure else None for name, figure in drawn.items()}
    write_text(out, _page(stories, pictures))
    return out


def _names(folders: Sequence[Path]) -> list[str]:
    """The end of each path, as long as it takes to tell them apart."""
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
        differing=_differing(stories) if len(stories) > 1 else [],
        colours=[charts.run_colour(i) for i in range(len(stories))],
        version=__version__,
    )


def _one(story: Story) -> dict[str, Any]:
    """What the page says about a single run beyond what its files say."""
    counts = (story.summary or {}).get("counts") or {}
    tells = bool(counts.get("tells") and not counts.get("unchecked"))
    answers = [{**answer, "good": _marks(answer, tells)} for answer in story.answers]
    answered = [answer for answer in answers if answer["adapter"] is not None]
    wrong = [answer for answer in answered if answer["good"].get("adapter") is False]
    asked = [answer for answer in answered or answers if answer["question"] and answer not in wrong]
    shown = _spread(wrong, SHOWN // 2)
    shown += _spread(asked, SHOWN - len(shown))
    folded = [*(one for one in wrong if one not in shown), *(one for one in asked if one not in shown)]
    worst = sorted(answers, key=lambda answer: answer["nll"]["base"] - answer["nll"]["adapter"])
    worse = sum(answer["nll"]["adapter"] > answer["nll"]["base"] for answer in answers)
    sites = Counter(slot["site"]["path"].rpartition(".")[2] for slot in story.plan["slots"]) if story.plan else {}
    told = {"headline": headline(story.summary), "share": share(story.summary)} if story.summary else {}
    return {
        "shown": shown,
        "folded": folded[:FOLDED] if answered else [],
        "answered": len(answered),
        "wrong": len(wrong),
        "worst": worst[:3] if len(worst) > SHOWN else [],
        "worse": worse,
        "sites": sites,
        "why": why(story),
        **told,
    }


def _marks(answer: Mapping[str, Any], tells: bool) -> dict[str, bool]:
    """Whose answers are right, by their check, or by equality where that tells."""
    return dict(answer.get("right") or (answer.get("equal") if tells else None) or {})


def _spread(answers: Sequence[dict[str, Any]], most: int) -> list[dict[str, Any]]:
    return list(answers[:: max(1, -(-len(answers) // max(1, most)))][:most])


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
        one |= {
            name: "by rule" if value is None and name in BY_RULE else value
            for name, value in story.asked["settings"].items()
        }
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
