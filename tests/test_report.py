"""The report: whole in one file, true to the run, for any reader."""

from __future__ import annotations

import itertools
import json
import re
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, fields, replace
from importlib.util import find_spec
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from conftest import LABELS, capitals, summary_with, write_rows
from matplotlib import image

from lorafit.adapters.rendering import Classes
from lorafit.cli.console import Terminal
from lorafit.data.examples import Example, Message
from lorafit.errors import FormatError, RunError
from lorafit.evaluation.classes import class_scores
from lorafit.evaluation.scores import ClassScores
from lorafit.files import read_json, write_json
from lorafit.jobs.show import shown
from lorafit.jobs.train import run_training
from lorafit.report import charts
from lorafit.report.page import pairs, write_report
from lorafit.report.result import Result
from lorafit.report.story import read_story
from lorafit.report.words import headline, of_a_hundred
from lorafit.runs.folder import read_summary
from lorafit.runs.summary import EvaluationSummary, Summary
from lorafit.runs.tested import example_digest, scored_in

PAGE = Path(charts.__file__).with_name("parts.html").read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def run(tiny_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("report")
    rows = [{**row, "source": "x"} for row in capitals(80)]
    rows[0]["prompt"] = "What of <script>alert(1)</script> & co?"
    data = write_rows(folder / "rows.jsonl", rows)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorafit.jobs.train.compare_with_peft", lambda *_: None)
        settings = {"rank": 2, "epochs": 0.5, "validations": 2, "dtype": "fp32"}
        run_training(str(tiny_folder), str(data), folder / "run", settings)
    return folder / "run"


@pytest.fixture
def copy(run: Path, tmp_path: Path) -> Path:
    return Path(copytree(run, tmp_path / "copy"))


def test_the_page_needs_nothing_beside_it(run: Path) -> None:
    text = (run / "report.html").read_text(encoding="utf-8")
    assert re.findall(r"<(?:script|link|img|iframe)\b|@import|url\((?!#)", text) == []
    assert re.findall(r'(?:src|href)="(?!#)[^"]*"', text) == []
    assert text.count("<svg") == 5


def test_the_pictures_lie_beside_it(run: Path) -> None:
    for name in ("curves", "scores", "examples", "forgetting"):
        assert (run / f"report-{name}.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_what_the_data_hold_is_text_and_not_markup(copy: Path) -> None:
    data = read_json(copy / "data.json")
    data["example"] = [["<script>alert(1)</script>", True]]
    write_json(copy / "data.json", data)
    answers = (copy / "scores" / "answers.jsonl").read_text(encoding="utf-8").splitlines()
    first = {**json.loads(answers[0]), "question": "<b onclick=x>", "adapter": "</dd><script>", "reference": "<i>"}
    (copy / "scores" / "answers.jsonl").write_text("\n".join([json.dumps(first), *answers[1:], ""]), encoding="utf-8")
    text = write_report([copy], copy / "report.html").read_text(encoding="utf-8")
    assert "<script" not in text and "<b onclick" not in text and "<i>" not in text
    assert "&lt;b onclick=x&gt;" in text


def test_the_page_says_what_the_summary_says(run: Path) -> None:
    text, summary = (run / "report.html").read_text(encoding="utf-8"), read_json(run / "summary.json")
    said = (
        f"{summary['nll']['base']:.3f}",
        f"{summary['nll']['adapter']:.3f}",
        f"{summary['nll']['difference']:+.3f}",
        "Ignored fields: source",
        "set by you",
        summary["base_identity"],
    )
    assert [one for one in said if one not in text] == []


def test_every_test_example_is_kept_with_its_nll(run: Path) -> None:
    story = read_story(run)
    assert story.summary is not None
    assert len(story.answers) == story.summary.n_test
    mean = sum(answer["nll"]["adapter"] for answer in story.answers) / len(story.answers)
    assert mean == pytest.approx(story.summary.nll.adapter)


def test_a_run_without_checks_counts_the_answers_that_equal_their_references(run: Path) -> None:
    counts = read_json(run / "summary.json")["counts"]
    assert (counts["by"], counts["n"], counts["few"]) == ("equality", 8, True)
    assert {"base", "base_few_shot", "adapter"} <= set(counts["right"])
    story, text = read_story(run), (run / "report.html").read_text(encoding="utf-8")
    for who in ("base", "base_few_shot", "adapter"):
        assert sum(answer["equal"][who] for answer in story.answers) / 8 == counts["equal"][who]["share"]
    assert "equal to the reference, of 8" in text and "Answer by answer" in text


def test_wrong_answers_stand_first_on_the_page(copy: Path) -> None:
    lines = [json.loads(line) for line in (copy / "scores" / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    for i, line in enumerate(lines):
        line |= {"right": {"adapter": i != 5}, "question": f"question {i}", "adapter": "said"}
    write_rows(copy / "scores" / "answers.jsonl", lines)
    text = write_report([copy], copy / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'class="q">(question \d)', text)[0] == "question 5"
    assert "first some of the wrong answers (1 of 8 are wrong)" in text


def test_the_curve_is_drawn_in_logarithms_with_marks_that_are_numbers(run: Path) -> None:
    figure = charts.curves([read_story(run)])
    assert figure is not None
    axes = figure.axes[0]
    assert axes.get_yscale() == "log"
    assert len(axes.get_yticks()) >= 2
    assert all(float(label.get_text()) > 0 for label in axes.get_yticklabels())


def test_a_comparison_breaks_long_names_and_is_as_broad_as_the_screen(run: Path, copy: Path) -> None:
    text = write_report([run, copy], copy.parent / "both.html").read_text(encoding="utf-8")
    assert '<main class="broad">' in text
    assert "main td:not(.n) { min-width: 6rem; overflow-wrap: anywhere; }" in text


def test_of_long_names_nothing_is_cut_at_the_edge_of_a_picture(run: Path, tmp_path: Path) -> None:
    """Three runs, with names that would take half of the picture, and as the score what has the longest label."""
    names = ("a-much-longer-name.of_a_folder/with-a-lower-rate-than-before", "x" * 60, "short/run")
    folders = [Path(copytree(run, tmp_path / name)) for name in names]
    stories = [replace(read_story(folder), name=name) for folder, name in zip(folders, names, strict=True)]
    summaries = [one.summary for one in stories if one.summary]
    drawn = [
        charts.scores(stories),
        charts.curves(stories),
        charts.scores_of(summaries[0]),
        charts.scores(stories[:1]),
        charts.forgetting(summaries[0].forgotten),
        charts._bars([(name, 0.5, (0.4, 0.6), "#0b7a6c") for name in names]),
    ]
    for figure in drawn:
        assert figure is not None
        figure.draw_without_rendering()
        axes, (low, high) = figure.axes[0], figure.axes[0].get_xlim()
        ticks = [
            label for at, label in zip(axes.get_xticks(), axes.get_xticklabels(), strict=True) if low <= at <= high
        ]
        legend = axes.get_legend()
        texts = [axes.xaxis.label, axes.yaxis.label, *ticks, *axes.get_yticklabels()]
        for text in (*texts, *(legend.get_texts() if legend else ())):
            box = text.get_window_extent()
            inside = box.x0 >= -1 and box.x1 <= figure.bbox.width + 1
            assert inside or not text.get_text(), text.get_text()
        assert axes.get_position().width > 0.4, "the names leave no room"
    write_report(folders, tmp_path / "all.html")
    said = (tmp_path / "all.html").read_text(encoding="utf-8")
    assert "main th:not(.n), main td:not(.n) { min-width: 6rem; overflow-wrap: anywhere; }" in said


@pytest.mark.parametrize(
    ("name", "lines"),
    [
        ("runs/mine", ["runs/mine"]),
        ("handbook-of-the-desk/run300-with-a-lower-rate", ["handbook-of-the-desk/", "run300-with-a-lower-rate"]),
        ("x" * 30, ["x" * 24, "x" * 6]),
        ("", [""]),
    ],
)
def test_a_long_name_is_broken_where_its_parts_end(name: str, lines: list[str]) -> None:
    assert charts._in_lines(name).split("\n") == lines


def test_an_unfinished_run_tells_what_there_is(copy: Path) -> None:
    for name in ("summary.json", "scores/answers.jsonl", "data.json"):
        (copy / name).unlink()
    with (copy / "metrics.jsonl").open("a", encoding="utf-8") as file:
        file.write('{"step": 9')  # being written
    text = write_report([copy], copy / "report.html").read_text(encoding="utf-8")
    assert "This run is not finished" in text
    assert text.count("<svg") == 2  # the curve so far, and the layer card


def test_runs_on_the_same_test_are_paired_by_example(run: Path, copy: Path) -> None:
    lines = [json.loads(line) for line in (copy / "scores" / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
    for line in lines:
        line["nll"]["adapter"] -= 0.25
    write_rows(copy / "scores" / "answers.jsonl", lines)
    (pair,) = pairs([read_story(run), read_story(copy)])
    assert pair.difference == pytest.approx(-0.25)
    text = write_report([run, copy], copy.parent / "both.html").read_text(encoding="utf-8")
    assert "Read with care" not in text
    assert "-0.250" in text


def test_runs_on_other_tests_are_not_paired_and_that_is_said(run: Path, copy: Path) -> None:
    lines = (copy / "scores" / "answers.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (copy / "scores" / "answers.jsonl").write_text("".join(lines[1:]), encoding="utf-8")
    assert pairs([read_story(run), read_story(copy)]) == []
    text = write_report([run, copy], copy.parent / "both.html").read_text(encoding="utf-8")
    assert "tested on different examples" in text
    assert not (copy.parent / "both-scores.png").exists()


def test_the_same_test_in_another_order_is_the_same_test(run: Path, copy: Path) -> None:
    lines = (copy / "scores" / "answers.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (copy / "scores" / "answers.jsonl").write_text("".join(reversed(lines)), encoding="utf-8")
    (pair,) = pairs([read_story(run), read_story(copy)])
    assert (pair.difference, pair.a != pair.b) == (0.0, True)


def test_a_question_after_other_turns_is_another_example() -> None:
    def asked(*before: Message) -> Example:
        return Example((*before, Message("user", "Why?"), Message("assistant", "So.")), "x:1")

    told = (Message("user", "It rains."), Message("assistant", "Yes."))
    kinds = [asked(), asked(Message("system", "Be brief.")), asked(*told)]
    assert len({example_digest(kind) for kind in kinds}) == 3


def test_runs_on_different_bases_are_not_compared(run: Path, copy: Path) -> None:
    rewrite(copy / "run.json", base_identity="0" * 64)
    assert pairs([read_story(run), read_story(copy)]) == []
    text = write_report([run, copy], copy.parent / "both.html").read_text(encoding="utf-8")
    assert "they have different bases" in text
    assert text.count("<svg") == 1  # the curves


def test_a_run_without_checks_stands_in_the_chart_beside_one_with_them(run: Path, copy: Path) -> None:
    facts = read_json(copy / "summary.json")["facts"]
    rewrite(copy / "summary.json", facts={**facts, "adapter": 0.5, "ci95": [0.4, 0.6], "base": 0.1})
    figure = charts.scores([read_story(copy), read_story(run)])
    assert figure is not None
    assert len(figure.axes[0].get_yticklabels()) == 2


@pytest.mark.parametrize("name", ["price$x^{2$", "_mine", "模型"])
def test_any_name_of_a_folder_is_drawn_as_it_is(run: Path, tmp_path: Path, name: str) -> None:
    folders = [Path(copytree(run, tmp_path / name / one)) for one in ("_a", "b")]
    text = write_report(folders, tmp_path / "both.html").read_text(encoding="utf-8")
    assert all(text[text.index("<svg") :].count(read_story(folder).name) >= 2 for folder in folders)  # scores, legend


def test_runs_of_one_name_are_told_apart(run: Path, tmp_path: Path) -> None:
    folders = [Path(copytree(run, tmp_path / one / "runs" / "mine")) for one in ("monday", "friday")]
    text = write_report(folders, tmp_path / "both.html").read_text(encoding="utf-8")
    assert "monday/runs/mine" in text and "friday/runs/mine" in text
    assert "No setting differs." in text


@pytest.mark.parametrize("damage", [{}, {"nll": {}}, {"facts": None}])
def test_a_damaged_summary_is_named(copy: Path, damage: dict[str, Any]) -> None:
    write_json(copy / "summary.json", damage and read_json(copy / "summary.json") | damage)
    for look in (lambda: write_report([copy], copy / "report.html"), lambda: shown(copy)):
        with pytest.raises(FormatError, match=r"summary\.json: not written by lorafit, or damaged: "):
            look()


@pytest.mark.parametrize("name", ["curves", "scores", "examples"])
def test_the_pictures_show_the_adapter_in_its_colour_and_words_beside_it(run: Path, name: str) -> None:
    """A blank picture, or bare axes, have none of it."""
    pixels = (image.imread(run / f"report-{name}.png")[..., :3] * 255).round().astype(int)
    counts = []
    for colour in ("adapter", "ink"):
        wanted = [int(charts.COLOURS[colour][i : i + 2], 16) for i in (1, 3, 5)]
        counts.append(int((abs(pixels - wanted).max(axis=-1) < 40).sum()))
    assert min(counts) > 50, counts


def test_what_differs_holds_what_does_and_nothing_else(run: Path, copy: Path) -> None:
    rewrite(copy / "run.json", data="elsewhere.jsonl")
    text = write_report([run, copy], copy.parent / "both.html").read_text(encoding="utf-8")
    differs = text[text.index("What differs") :]
    assert "elsewhere.jsonl" in differs and "No setting differs." not in text
    assert re.findall(r"<td>(sites|ranks|base|seed)</td>", differs) == []


def test_one_run_named_twice_is_refused(run: Path, tmp_path: Path) -> None:
    with pytest.raises(RunError, match="named more than once: name each run once"):
        write_report([run, run / ".." / run.name], tmp_path / "both.html")


def test_a_folder_without_a_run_is_refused(tmp_path: Path) -> None:
    with pytest.raises(FormatError, match="holds no run: name a folder"):
        write_report([tmp_path], tmp_path / "report.html")
    assert list(tmp_path.iterdir()) == []


def test_the_report_is_the_same_when_it_is_written_again(copy: Path) -> None:
    write_report([copy], copy / "report.html")
    before = {path.name: path.read_bytes() for path in copy.glob("report*")}
    write_report([copy], copy / "report.html")
    assert {path.name: path.read_bytes() for path in copy.glob("report*")} == before


@pytest.mark.parametrize("theme", [PAGE[: PAGE.index("@media (prefers")], PAGE[PAGE.index("@media (prefers") :]])
def test_every_colour_of_the_pictures_is_known_by_light_and_dark(theme: str) -> None:
    assert [name for name in charts.COLOURS if f"--{name}: #" not in theme] == []


def test_no_two_colours_of_the_pictures_are_one() -> None:
    """They are told apart by their value when the page's variables take their place."""
    assert len(set(charts.COLOURS.values())) == len(charts.COLOURS)


CLASSES: dict[str, Any] = {
    "classes": asdict(class_scores(Classes(("a", "b"), 0), [0, 1], torch.full((2, 2), 0.5), learnt_from=40))
}


def summary(
    nll: list[float] | None,
    facts: list[float] | None,
    few: list[float] | None = None,
    base: Sequence[float] = (0.0, 0.1),
) -> dict[str, Any]:
    """Parts of a summary."""
    return {"nll": {"ci95": nll}, "facts": {"ci95": facts, "ci95_base": facts and base, "ci95_base_few_shot": few}}


def rewrite(path: Path, **changes: Any) -> None:
    write_json(path, read_json(path) | changes)


def test_terminal_page_and_card_say_the_same_sentence(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = read_summary(run)
    assert summary is not None
    said = headline(summary)
    Terminal().results(summary)
    card = (run / "adapter" / "README.md").read_text(encoding="utf-8")
    page = (run / "report.html").read_text(encoding="utf-8")
    assert [said in text for text in (capsys.readouterr().out, card, page)] == [True] * 3


def test_a_base_that_changed_heads_the_page_and_warns_in_a_comparison(run: Path, copy: Path) -> None:
    rewrite(copy / "summary.json", base_unchanged=False)
    one = write_report([copy], copy / "report.html").read_text(encoding="utf-8")
    both = write_report([run, copy], copy.parent / "both.html").read_text(encoding="utf-8")
    assert "<h1>Do not use this adapter" in one
    assert f"{read_story(copy).name}: do not use" in both


@pytest.mark.parametrize(
    ("given", "says"),
    [
        (summary(None, None), "Too few"),
        (summary([-2, -1], None), "predicts the answers better than its base"),
        (summary([1, 2], None), "The adapter is worse than its base"),
        (summary([0, 0], None), "it changes nothing"),
        (summary([-1, 1], None), "No difference"),
        (summary([-2, -1], [0.5, 0.9]), "answers more questions right"),
        (summary([-2, -1], [0.5, 0.9], [0.3, 0.6]), "but is not shown to answer more"),
        (summary([-2, -1], [0.05, 0.9]), "but is not shown to answer more"),
        (summary([-1, 1], [0.05, 0.9]), "is not shown to answer more"),
        (summary([1, 2], [0.05, 0.9]), "The adapter is worse than its base"),
        (summary([1, 2], [0.5, 0.9]), "The adapter is worse than its base"),
        (summary([-1, 1], [0.0, 0.1], base=[0.3, 0.6]), "The adapter is worse than its base"),
        (summary([-2, -1], [0.0, 0.1], base=[0.3, 0.6]), "The adapter is worse than its base"),
        (summary([-2, -1], [0.5, 0.9]) | {"base_unchanged": False}, "Do not use this adapter"),
        (summary([-2, -1], [0.5, 0.9]) | {"peft": {"max_logit_difference": 7.3, "adapter_effect": 9.9}}, "Do not use"),
        (
            summary([-2, -1], [0.5, 0.9]) | {"peft": {"max_logit_difference": 0.0, "adapter_effect": 9.9}},
            "answers more",
        ),
        (
            summary([-2, -1], [0.5, 0.9]) | CLASSES,
            "The adapter labels more texts right than a guess by label frequency",
        ),
        (
            summary([-2, -1], [0.05, 0.9]) | CLASSES,
            "predicts the labels better than a guess by label frequency, but is not",
        ),
        (
            summary([-2, -1], [0.0, 0.1], base=[0.3, 0.6]) | CLASSES,
            "labels fewer texts right, though it predicts the labels",
        ),
    ],
)
def test_the_headline_claims_no_more_than_was_shown(given: dict[str, Any], says: str) -> None:
    assert says in headline(summary_with(**given))


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({}, "The adapter is worse than the other adapter"),
        (CLASSES, "worse than the other adapter at predicting the labels"),
    ],
)
def test_another_adapter_is_named_where_it_is_compared(given: dict[str, Any], says: str) -> None:
    whole = summary_with(**summary([1, 2], None), **given)
    own = {part.name: getattr(whole, part.name) for part in fields(Summary)}
    assert says in headline(EvaluationSummary(**own, against="runs/other"))


def test_separators_that_are_no_line_ends_are_text(copy: Path) -> None:
    file = copy / "scores" / "answers.jsonl"
    file.write_text(
        file.read_text(encoding="utf-8").replace('"reference": "', '"reference": "\u2028'), encoding="utf-8"
    )
    assert "\u2028" in file.read_text(encoding="utf-8")
    write_report([copy], copy / "report.html")
    assert len(scored_in(copy)) == len(read_story(copy).answers)


def test_pictures_that_are_not_ours_are_not_written_over(copy: Path, tmp_path: Path) -> None:
    (tmp_path / "r-scores.png").write_text("mine", encoding="utf-8")
    with pytest.raises(RunError, match=r"r-scores\.png"):
        write_report([copy], tmp_path / "r.html")
    assert (tmp_path / "r-scores.png").read_text(encoding="utf-8") == "mine"


def classes_of(labels: Sequence[str], n: int = 300) -> ClassScores:
    """The scores of a classifier that is right in about two thirds."""
    torch.manual_seed(0)
    truth = torch.randint(len(labels), (n,))
    logits = torch.randn(n, len(labels))
    logits[torch.arange(n), truth] += 2 * (torch.rand(n) < 0.7)
    return class_scores(Classes(tuple(labels), 0), truth.tolist(), logits.softmax(-1))


@pytest.fixture
def classifier(classifier_run: Path, tmp_path: Path) -> Path:
    return Path(copytree(classifier_run, tmp_path / "classifier"))


def test_a_classifier_is_reported_in_its_own_words(classifier_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary, found = read_summary(classifier_run), read_json(classifier_run / "summary.json")
    assert summary is not None
    result = Result(summary, classifier_run)
    Terminal().results(summary)
    page, card = ((classifier_run / name).read_text("utf-8") for name in ("report.html", "adapter/README.md"))
    told = {"terminal": capsys.readouterr().out, "page": page, "card": card, "notebook": result._repr_html_()}
    for where, text in told.items():
        text = re.sub(r"<svg.*?</svg>|[│┃]", " ", text, flags=re.DOTALL)
        words = " ".join(re.sub(r"<[^>]*>", " ", text).split())
        for said in ("macro-F1", f"{found['classes']['macro_f1']:.3f}", f"{found['classes']['calibration_error']:.3f}"):
            assert said in words, (where, said)
        for wrong in ("facts right", "per token", "lorafit chat", "answers right", "equal to the reference"):
            assert wrong not in words, (where, wrong)
        assert re.search(r"nats\b.*per\b.*text", words), where
        assert "label frequencies in training" in words or where == "terminal", where  # there in a narrow column
    assert str(of_a_hundred(summary)).endswith("in the 95 % interval") and "get the right label" in repr(result)


def test_the_page_of_a_classifier_shows_each_label_the_matrix_and_the_confidence(classifier_run: Path) -> None:
    found, text = read_json(classifier_run / "summary.json"), (classifier_run / "report.html").read_text("utf-8")
    table = text[text.index("Label by label") : text.index("<h2>Training")]
    for one in found["classes"]["per_label"]:
        assert f'<td>{one["label"]}</td><td class="n">{one["n"]}</td>' in table
        assert f"{one['f1']:.3f}" in table
    assert f"Calibration error {found['classes']['calibration_error']:.3f}" in table
    assert "Confusions" not in text, "the matrix says it"
    drawn = {path.stem.removeprefix("report-") for path in classifier_run.glob("report-*.png")}
    assert {"confusion", "reliability"} <= drawn
    assert not {"forgetting", "examples"} & drawn


def test_wrong_texts_stand_first_and_the_most_frequent_label_is_no_answer(classifier: Path) -> None:
    lines = [json.loads(line) for line in (classifier / "scores" / "answers.jsonl").read_text("utf-8").splitlines()]
    for i, line in enumerate(lines):
        line |= {"right": {"base": False, "adapter": i != 2}, "question": f"text {i}", "base": "frequent"}
    write_rows(classifier / "scores" / "answers.jsonl", lines)
    text = write_report([classifier], classifier / "report.html").read_text(encoding="utf-8")
    assert re.findall(r'class="q">(text \d)', text)[0] == "text 2"
    assert "first some of the wrong answers (1 of 4 are wrong)" in text and "frequent</dd>" not in text


@pytest.mark.parametrize(
    "labels",
    [
        ["yes", "no"],
        [*LABELS, "$x^{2$", "_under", "a label of so many words that it would take half of the picture, and more"],
        [f"a class with a long name of its own, number {i}" for i in range(20)],
        [f"emotion {i}" for i in range(60)],
    ],
    ids=len,
)
def test_the_matrix_names_its_labels_and_cuts_none_at_the_edge(labels: list[str]) -> None:
    found = classes_of(labels)
    figure = charts.confusion(found)
    assert figure is not None
    figure.draw_without_rendering()
    (axes,) = figure.axes
    for name in (axes.xaxis.label, axes.yaxis.label, *axes.get_xticklabels(), *axes.get_yticklabels()):
        box = name.get_window_extent()
        assert box.x0 >= -1 and box.x1 <= figure.bbox.width + 1, name.get_text()
        assert box.y0 >= -1 and box.y1 <= figure.bbox.height + 1, name.get_text()
    boxes = [name.get_window_extent() for name in axes.get_yticklabels()]
    assert all(one.y0 >= other.y1 - 1 for one, other in itertools.pairwise(boxes)), "labels lie on each other"
    assert axes.get_position().width > 0.4, "the names leave no room"
    assert len({name.get_text() for name in axes.get_yticklabels()}) == len(labels)
    written = [text.get_text() for text in axes.texts]
    counts = [str(n) for row in found.confusion or () for n in row if n]
    assert written == (counts if len(labels) <= 20 else [])
    charts.png(figure)


def test_of_more_labels_than_a_matrix_holds_the_confusions_are_listed(classifier: Path) -> None:
    found = read_json(classifier / "summary.json")
    rewrite(classifier / "summary.json", classes={**found["classes"], "confusion": None})
    (classifier / "report-confusion.png").unlink()
    text = write_report([classifier], classifier / "report.html").read_text(encoding="utf-8")
    wrong = found["counts"]["confusions"]
    assert ("Confusions" in text) == bool(wrong)
    assert not (classifier / "report-confusion.png").exists()


def test_confidence_is_drawn_against_what_is_right_by_how_many_texts_they_are() -> None:
    found = classes_of(LABELS)
    figure = charts.reliability(found)
    bins, (axes,) = found.bins, figure.axes
    assert len(bins) > 3
    points = [tuple(map(float, one.get_offsets()[0])) for one in axes.collections]
    assert points == [pytest.approx((one.confidence, one.right)) for one in bins]
    areas = [float(one.get_sizes()[0]) for one in axes.collections]
    assert max(areas) == areas[max(range(len(bins)), key=lambda i: bins[i].n)]
    assert [text.get_text() for text in axes.texts] == [str(one.n) for one in bins]
    assert axes.lines[0].get_xydata().tolist() == [[0, 0], [1, 1]]  # type: ignore[union-attr]


def test_classifiers_are_compared_by_macro_f1_too(classifier_run: Path, classifier: Path) -> None:
    rewrite(
        classifier / "summary.json", classes={**read_json(classifier / "summary.json")["classes"], "macro_f1": 0.987}
    )
    text = write_report([classifier_run, classifier], classifier.parent / "both.html").read_text(encoding="utf-8")
    assert "macro-F1</th>" in text and ">0.987</td>" in text


def test_a_classifier_beside_answers_that_are_labels_is_compared_by_right_ones_alone(
    classifier_run: Path, classifier: Path
) -> None:
    """The same run, as one that writes its labels would tell of itself, and right in one text more."""
    found = read_json(classifier / "summary.json")
    del found["classes"]
    write_json(classifier / "summary.json", found)
    lines = [json.loads(line) for line in (classifier / "scores" / "answers.jsonl").read_text("utf-8").splitlines()]
    first = next(i for i, line in enumerate(lines) if not line["right"]["adapter"])
    lines[first]["right"]["adapter"] = True
    write_rows(classifier / "scores" / "answers.jsonl", lines)
    (pair,) = pairs([read_story(classifier_run), read_story(classifier)])
    assert (pair.difference, pair.right and (pair.right.more, pair.right.fewer)) == (None, (1, 0))
    text = write_report([classifier_run, classifier], classifier.parent / "both.html").read_text(encoding="utf-8")
    assert "by the share of right labels" in text and "macro-F1</th>" not in text
    assert text.count(f'data-of="right">{found["facts"]["adapter"]:.1%}<') == 2
    assert text.count("<svg") == 1, "right answers, and no curves of two units"


def test_the_lines_of_a_classifiers_card_run_and_peft_says_the_same(classifier_run: Path) -> None:
    if find_spec("peft") is None:
        pytest.skip("needs PEFT: pip install peft==0.21.2")
    card = (classifier_run / "adapter" / "README.md").read_text(encoding="utf-8")
    code = re.findall(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)
    assert len(code) == 2
    done = subprocess.run(
        [sys.executable, "-c", "\n".join(code)],
        cwd=classifier_run / "adapter",
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    (ours, sure), (theirs, as_sure) = (line.rsplit(" ", 1) for line in done.stdout.splitlines()[-2:])
    assert ours == theirs and ours in LABELS
    assert float(sure) == pytest.approx(float(as_sure), abs=0.01)  # ours may be in bf16
