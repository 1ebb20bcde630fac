"""Right answers counted: by equality, by check, against one answer given to everything, and what is said of it."""

from __future__ import annotations

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import Any

import pytest
from conftest import summary_with

from lorafit.cli.console import Terminal
from lorafit.data import checks as checks_module
from lorafit.data.checks import is_right
from lorafit.data.equality import compared, is_equal, json_of, last_number
from lorafit.data.examples import Call, Check, Example, Examples, Message
from lorafit.data.render import Row
from lorafit.evaluation import counting as counting_module
from lorafit.evaluation.classifier import classified, is_installed
from lorafit.evaluation.compare import SAMPLES, Comparison, _samples, asked_of
from lorafit.evaluation.counting import are_few, counted
from lorafit.evaluation.scores import AnswerScore, Counts, NllScore
from lorafit.evaluation.statistics import sign_test
from lorafit.report import charts
from lorafit.report.result import Result
from lorafit.report.words import headline, lines, of_a_hundred, share
from lorafit.runs.scores import answer_lines
from lorafit.runs.summary import Forgotten, RunSummary

REPLIES = ("We send a new one.", "Please call the shop.", "The refund takes a week.")


def asked(question: str, answer: str, check: Check | None = None, group: str | None = None) -> Example:
    return Example((Message("user", question), Message("assistant", answer)), f"x:{question}", check, group)


def labelled(n: int) -> list[Example]:
    """Questions of which three in five are answered with yes."""
    return [asked(f"question {i}", "yes" if i % 5 < 3 else "no") for i in range(n)]


def counts_of(
    questions: Sequence[Example], adapter: Sequence[str], base: Sequence[str] = (), known: Sequence[Example] = ()
) -> Counts:
    found = counted(questions, {"base": base or ["eh"] * len(questions), "adapter": adapter}, known)
    assert found is not None
    return found


def summary_of(counts: Counts | None, nll: tuple[float, float] | None = (-3.0, -2.0)) -> RunSummary:
    """A summary in which the adapter predicts the answers better unless `nll` says otherwise."""
    sample = {"question": "<q>", "reference": "<r>", "base": "b", "adapter": "<script>", "right": False}
    return summary_with(nll={"ci95": nll}, counts=None if counts is None else asdict(counts), samples=[sample])


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("  we send\na NEW one. ", REPLIES[0], True),
        ("We send a new one", REPLIES[0], False),
        ('{"to": "A", "sum": 2.0}', '{"sum": 2, "to": "A"}', True),
        ('{"to": "a", "sum": 2}', '{"sum": 2, "to": "A"}', False),
        ('{"paid": 1}', '{"paid": true}', False),
        ('Here: {"sum": 2}', '{"sum": 2}', False),
        ("[1, 2]", "[1,2]", True),
        ("[" * 100_000, "[1,2]", False),
        ("", "yes", False),
    ],
)
def test_an_answer_equals_its_reference_by_what_it_says(answer: str, reference: str, same: bool) -> None:
    assert is_equal(answer, reference) is same


CHECKS = {
    "exact": ({"exact": "BX-7"}, [" BX-7\n"], ["bx-7", "BX-7.", ""]),
    "json": ({"json": json_of('{"a": [1, null], "b": "x"}')}, ['{"b":"x","a":[1.0,null]}'], ['{"a":[1]}', "{", "x"]),
    "number": ({"number": 1234.5}, ["It is 1,234.50 in all.", "1234.5"], ["1234", "1234.5 of 2", "none", ""]),
    "label": ({"label": "A+"}, ["a+", " A+.\n"], ["A", "A-", "A+ it is", ""]),
    "minus": ({"number": -3.0}, ["−3 °C", "-3.0"], ["3", "-30"]),
    "pattern": ({"pattern": r"^\d{4}-\d{2}$"}, ["2026-11"], ["In 2026-11", ""]),
}


@pytest.mark.parametrize(("asks", "good", "bad"), CHECKS.values(), ids=CHECKS)
def test_a_check_asks_of_the_whole_answer_what_it_says(asks: dict[str, Any], good: list[str], bad: list[str]) -> None:
    check = Check((), (), 100, **asks)
    assert [is_right(text, check) for text in (*good, *bad)] == [True] * len(good) + [False] * len(bad)


def test_a_pattern_that_never_comes_to_an_end_is_not_found(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks_module, "SECONDS", 0.2)
    start = time.monotonic()
    assert not is_right("a" * 60 + "b", Check((), (), 9, pattern="(a|aa)+$"))
    assert time.monotonic() - start < 30


def test_data_with_other_patterns_are_other_data_and_data_without_are_what_they_were() -> None:
    old, one, other = (asked("a", "b", Check(("b",), (), 9, **more)) for more in ({}, {"pattern": "b"}, {"exact": "b"}))
    assert repr(old.check) == repr(one.check) == "Check(contains=('b',), lacks=(), max_words=9, declines=False)"
    assert len({Examples((example,)).digest() for example in (old, one, other)}) == 3


def test_a_number_and_what_stands_for_an_answer() -> None:
    assert [last_number(text) for text in ("v2", "5-3", "a 1e3.", "12.5%")] == [None, 3.0, 1000.0, 12.5]
    assert compared(" Yes\n sir") == "yes sir"


@pytest.mark.parametrize(
    ("text", "numerals", "number"),
    [
        ("3,50 EUR", ".,", None),
        ("3,50 EUR", ",.", 3.5),
        ("1.234,56", ",.", 1234.56),
        ("1.234,56", ".,", None),
        ("1 234", ", ", 1234.0),
        ("1\u202f234,5", ", ", 1234.5),
        ("in 2024 100 came", ", ", 100.0),
        ("1'234.50", ".'", 1234.5),
        ("1’234", ".'", 1234.0),
        ("1,234.50", ".,", 1234.5),
        ("30.11.2024", ".,", None),
        ("1,2,3", ".,", None),
        ("7 up", ".,", 7.0),
        ("−3 °C", ",.", -3.0),
        ("1.5e-3", ".,", 0.0015),
        ("v2.5", ".,", None),
    ],
)
def test_a_number_is_read_as_a_place_writes_it_or_not_at_all(text: str, numerals: str, number: float | None) -> None:
    assert last_number(text, numerals) == number


def test_the_sign_test_counts_groups_and_is_exact() -> None:
    assert sign_test([1, 1, 1, 1, 0, -1], [None] * 6) == (4, 1, pytest.approx(12 / 32))
    assert sign_test([1] * 8, ["one"] * 8) == (1, 0, 1.0)
    assert sign_test([0.0, 0.0], [None] * 2) == (0, 0, 1.0)


# Always the same answer


def test_one_that_always_says_the_same_is_not_praised() -> None:
    """It was: 61.7 % right against 0 % of the base, and predicts the answers better."""
    summary = summary_of(counts_of(labelled(60), ["yes"] * 60))
    assert headline(summary) == (
        "The adapter is not shown to do better than always giving the same answer, which is right in 60.0 %, "
        "though it answers more questions right than its base"
    ).replace(" %", "%")
    worse = summary_of(counts_of(labelled(60), ["perhaps"] * 60))
    assert "does worse than always giving the same answer" in headline(worse)


def test_one_that_always_says_the_same_is_not_praised_where_the_other_answers_are_free_text() -> None:
    questions = [asked(f"is {i} sold?", "No" if i % 5 < 3 else f"Yes, in shop {i}.") for i in range(60)]
    counts = counts_of(questions, ["No"] * 60)
    assert not counts.tells
    assert headline(summary_of(counts)) == (
        "The adapter is not shown to do better than always giving the same answer, which is right in 60.0%, "
        "though it answers more questions right than its base"
    )


def test_a_base_with_examples_is_as_good_where_answers_are_free_text_too() -> None:
    questions = [asked(f"what is {i} and {i}", str(2 * i)) for i in range(40)]
    right = [one.answer for one in questions]
    counts = counted(questions, {"base": ["eh"] * 40, "base_few_shot": right, "adapter": right})
    assert counts is not None and not counts.tells
    assert "is not shown to answer more than the base with examples" in headline(summary_of(counts))


def test_labels_that_carry_checks_are_held_against_the_most_frequent_one_too() -> None:
    questions = [asked(one.question, one.answer, Check((one.answer,), (), 1)) for one in labelled(60)]
    counts = counts_of(questions, ["yes"] * 60)
    assert (counts.by, counts.right["most_frequent"].share, counts.most_frequent) == ("check", 0.6, "yes")
    assert "is not shown to do better than always" in headline(summary_of(counts))


def test_one_that_always_says_the_same_is_not_praised_where_a_check_passes_many_wordings() -> None:
    """It was: no reference occurs twice, so there was no most frequent one."""
    either = Check((), (), 100, pattern="(?i)yes|no")
    questions = [asked(f"is {i} open?", f"{'Yes' if i % 2 else 'No'}, shop {i} says.", either) for i in range(60)]
    counts = counts_of(questions, ["Yes."] * 60)
    assert counts.right["most_frequent"].share == counts.right["adapter"].share == 1.0
    assert "is not shown to do better than always giving the same answer" in headline(summary_of(counts))


def test_the_constant_answer_is_the_one_that_passes_most_checks_and_not_the_most_frequent_one() -> None:
    words = ("red", "green", "blue")
    questions = [asked(f"{word} {i}", word, Check((word,), (), 9)) for word in words for i in range(20)]
    counts = counts_of(questions, ["red"] * 20 + ["Red, green and blue."] * 40)
    assert (counts.most_frequent, counts.right["most_frequent"].share) == ("Red, green and blue.", 1.0)


def test_the_constant_answer_is_found_in_bounded_time(monkeypatch: pytest.MonkeyPatch) -> None:
    questions = [asked(f"q{i}", f"reply {i}", Check((f"reply {i}",), (), 9)) for i in range(3_000)]
    tried: list[str] = []
    monkeypatch.setattr(counting_module, "is_right", lambda text, check: tried.append(text) or False)  # type: ignore[func-returns-value]
    counts_of(questions, [f"said {i}" for i in range(3_000)])
    assert len(tried) - 3 * 3_000 <= counting_module.TRIED


def test_one_that_knows_is_praised_for_what_it_is() -> None:
    counts = counts_of(labelled(60), [one.answer.upper() for one in labelled(60)])
    assert headline(summary_of(counts)) == "The adapter answers more questions right than its base"
    assert of_a_hundred(summary_of(counts)) == (
        "of 100 questions like these about 100 are answered right, 94 to 100 in the 95 % interval (right: the answer "
        "is the reference)"
    )


def test_a_classifier_that_is_better_is_named_in_the_verdict() -> None:
    texts = {"base": ["eh"] * 60, "adapter": ["yes"] * 36 + [one.answer for one in labelled(60)][36:]}
    counts = counted(labelled(60), {**texts, "classifier": [one.answer for one in labelled(60)]})
    assert counts is not None and counts.against["classifier"].fewer > 5
    assert "but a simple classifier (TF-IDF with logistic regression) answers more" in headline(summary_of(counts))


# What is counted


def test_a_check_on_one_field_does_not_hide_that_the_whole_differs() -> None:
    def invoice(n: int, to: str) -> str:
        return json.dumps({"sum": n, "to": to})

    questions = [asked(f"invoice {n}", invoice(n, "Ann"), Check((str(n),), (), 99)) for n in range(36)]
    counts = counts_of(questions, [invoice(n, "Ann" if n < 8 else "Bob") for n in range(36)])
    assert (counts.right["adapter"].share, counts.equal["adapter"].share, counts.json) == (1.0, 8 / 36, 36)
    assert [(line.right, line.equal) for line in lines(summary_of(counts)) if line.key == "adapter"] == [
        ((1.0, counts.right["adapter"].ci95), (8 / 36, counts.equal["adapter"].ci95))
    ]


def test_recall_and_confusions_say_which_answer_is_taken_for_which() -> None:
    questions = [asked(f"{reply} {i}", reply) for reply in REPLIES for i in range(10)]
    given = (
        [REPLIES[0]] * 10 + [REPLIES[0].upper()] * 4 + [REPLIES[1]] * 6 + ["Words of its own."] * 2 + [REPLIES[2]] * 8
    )
    counts = counts_of(questions, given)
    assert [(one.answer, one.n, one.right, one.given) for one in counts.recall] == [
        (REPLIES[1], 10, 6, 6),
        (REPLIES[2], 10, 8, 8),
        (REPLIES[0], 10, 10, 14),
    ]
    assert [(one.reference, one.given, one.n) for one in counts.confusions] == [(REPLIES[1], REPLIES[0], 4)]
    assert (counts.few, counts.distinct, counts.other) == (True, 3, 2)


def test_of_free_text_nobody_says_whether_it_is_right() -> None:
    questions = [asked(f"tell {i}", f"A tale of {i} mice.") for i in range(40)]
    counts = counts_of(questions, [f"A story of {i} mice." for i in range(40)])
    summary = summary_of(counts)
    assert (counts.few, counts.tells, counts.most_frequent, share(summary)) == (False, False, None, None)
    assert headline(summary) == "The adapter predicts the answers better than its base"


def test_equal_answers_of_free_text_count_where_they_show_something() -> None:
    questions = [asked(f"what is {i} and {i}", str(2 * i)) for i in range(40)]
    assert "answers more questions right" in headline(summary_of(counts_of(questions, [e.answer for e in questions])))


def test_questions_to_turn_away_and_questions_without_a_check_do_not_count_among_checked_ones() -> None:
    check, away = Check(("a",), (), 9), Check(("no",), (), 9, declines=True)
    questions = [asked("1", "a", check), asked("2", "no", away), asked("3", "b")]
    counts = counts_of(questions, ["a", "no", "b"])
    assert (counts.n, counts.right["adapter"].share, counts.by) == (1, 1.0, "check")
    assert counted([asked("2", "no", away)], {"base": ["x"], "adapter": ["no"]}) is None


CHECKED = [asked(f"c{i}", "yes", Check(("yes",), (), 9)) for i in range(2)]


def test_a_check_on_a_few_rows_silences_no_others_where_answers_are_few() -> None:
    questions = [*CHECKED, *labelled(58)]
    counts = counts_of(questions, [one.answer for one in questions])
    assert (counts.n, counts.checked, counts.unchecked, counts.right["adapter"].share) == (60, 2, 0, 1.0)
    assert headline(summary_of(counts)) == "The adapter answers more questions right than its base"
    assert str(of_a_hundred(summary_of(counts))).endswith(
        "(right: the answer passes its check, or is the reference where there is no check)"
    )
    rows = [Row((1, 2, 3), (False, True, True), 0)] * 60
    assert asked_of(questions, rows) == list(range(60))


def test_a_verdict_on_the_rows_with_a_check_alone_says_so() -> None:
    tales = [asked(f"tell {i}", f"A tale of {i} mice.") for i in range(58)]
    questions = [*CHECKED, *tales]
    rows = [Row((1, 2, 3), (False, True, True), 0)] * 60
    assert (asked_of(questions, rows), asked_of(questions, rows, answer_all=True)) == ([0, 1], list(range(60)))
    counts = counted(CHECKED, {"base": ["eh"] * 2, "adapter": ["yes"] * 2}, unasked=58)
    assert counts is not None and (counts.n, counts.checked, counts.unchecked) == (2, 2, 58)
    assert counts_of(questions, [one.answer for one in questions]).unchecked == 58
    assert headline(summary_of(counts)) == (
        "The adapter is not shown to do better than always giving the same answer, which is right in 100.0% of the 2 "
        "questions with a check, though it predicts the answers better than its base"
    )
    assert "of 100 like the 2 questions with a check about 100" in str(of_a_hundred(summary_of(counts)))


def test_of_many_answers_each_is_kept_in_the_summary_and_the_page_folds_most() -> None:
    questions = [asked(f"q{i}", f"intent {i % 150}") for i in range(900)]
    counts = counts_of(questions, ["intent 0"] * 900)
    assert len(counts.recall) == counts.distinct == 150
    page = Result(summary_of(counts))._repr_html_()
    assert "138 more answers" in page and "intent 149" in page


def test_a_group_is_one_piece_of_evidence() -> None:
    questions = [asked(f"{i}", f"{i % 2}", group=f"g{i % 4}") for i in range(40)]
    counts = counts_of(questions, [one.answer for one in questions])
    assert (counts.against["base"].more, counts.against["base"].p) == (4, 0.125)
    assert counts.right["adapter"].ci95[0] < 0.6


def test_answers_that_the_test_seldom_has_are_few_where_training_has_them_often() -> None:
    known = [asked(f"k{i}", f"reply {i % 20}") for i in range(200)]
    test = [asked(f"t{i}", f"reply {i}") for i in range(20)]
    assert counts_of(test, ["x"] * 20, known=known).few
    assert not counts_of(test, ["x"] * 20).few


# Calls


def called(question: str, **arguments: object) -> Example:
    call = Call("book", json.dumps(arguments))
    return Example((Message("user", question), Message("assistant", "", calls=(call,))), f"x:{question}")


def test_calls_are_counted_by_what_they_mean() -> None:
    questions = [called(f"table {i} for two", table=i, seats=2) for i in range(40)]
    said = tuple(f'book({{"seats": 2.0, "table": {i}}})' for i in range(40))
    words = AnswerScore(0, 40, 0, 0, 40, 40, ("Which table?",) * 40, (False,) * 40)
    calls = AnswerScore(40, 40, 0, 0, 40, 40, said, (True,) * 40)
    answers = {"base": words.answers, "adapter": calls.answers}
    counts = counted(questions, answers, correct={"base": words.correct, "adapter": calls.correct})
    assert counts is not None
    assert (counts.by, counts.right["adapter"].share, counts.equal["adapter"].share) == ("check", 1.0, 1.0)
    assert (counts.tells, counts.right["base"].share, counts.against["base"].more) == (True, 0.0, 40)
    assert of_a_hundred(summary_of(counts)) is not None
    samples = _samples(questions, words.answers, calls.answers, counts, calls.correct)
    assert [sample.right for sample in samples] == [True] * SAMPLES
    nll = NllScore(1.0, 0.5, -0.5, None, 40)
    comparison = Comparison(nll, words, None, calls, samples, tuple(range(40)), ((1.0, 0.5),) * 40, counts)
    told = [json.loads(line) for line in answer_lines(questions, comparison).splitlines()]
    assert all(one["equal"] == one["right"] == {"base": False, "adapter": True} for one in told)


def test_the_most_frequent_call_is_one_however_it_is_spelt() -> None:
    questions = [called(f"q{i}", **({"a": 1, "b": 2} if i % 2 else {"b": 2, "a": 1.0})) for i in range(30)]
    questions += [called(f"r{i}", a=2, b=2) for i in range(20)]
    given, fine = ['book({"a": 1, "b": 2})'] * 50, [True] * 30 + [False] * 20
    counts = counted(
        questions, {"base": ["eh"] * 50, "adapter": given}, correct={"base": [False] * 50, "adapter": fine}
    )
    assert counts is not None and (counts.distinct, counts.right["most_frequent"].share) == (2, 0.6)
    assert [(one.answer, one.n, one.right, one.given) for one in counts.recall] == [
        (questions[30].answer, 20, 0, 0),
        (questions[0].answer, 30, 30, 50),
    ]
    assert [(one.reference, one.given, one.n) for one in counts.confusions] == [
        (questions[30].answer, questions[0].answer, 20)
    ]
    assert "is not shown to do better than always" in headline(summary_of(counts))


def test_rows_with_a_check_and_rows_with_a_call_count_alike() -> None:
    questions = [called("q", a=1), asked("how many?", "seven", Check(("seven",), (), 9)), asked("hello", "Hi.")]
    said, fine = ['book({"a": 1})', "It is seven.", "Hi."], [True, True, None]
    counts = counted(questions, {"base": ["eh"] * 3, "adapter": said}, correct={"adapter": fine})
    assert counts is not None and (counts.n, counts.right["adapter"].share, counts.equal["adapter"].share) == (
        2,
        1,
        0.5,
    )


# The simple classifier


@pytest.mark.skipif(not is_installed(), reason="needs scikit-learn, which is optional")
def test_the_simple_classifier_learns_from_training_alone() -> None:
    about = ("my parcel is broken", "where do I complain about prices", "when is my money back")
    known = [asked(f"{about[i % 3]} {i}", REPLIES[i % 3]) for i in range(60)]
    test = [asked(f"{about[i % 3]}, said customer {i}", REPLIES[i % 3]) for i in range(30)]
    counts = counts_of(test, [REPLIES[0]] * 30, known=known)
    assert counts.right["classifier"].share == 1.0
    assert counts.classifier_missing is None
    assert counts.classifier_learnt == (60, 60)
    assert classified(known[:1], test) is None


@pytest.mark.skipif(not is_installed(), reason="needs scikit-learn, which is optional")
def test_the_simple_classifier_learns_from_as_much_as_seconds_allow_and_its_row_says_so() -> None:
    def intents(n: int) -> list[Example]:
        return [
            asked(f"I should like to have thing {i % 150} of kind {i * 7919 % n}", f"intent {i % 150}")
            for i in range(n)
        ]

    start = time.monotonic()
    counts = counts_of(intents(150), ["x"] * 150, known=intents(4_000))
    assert time.monotonic() - start < 30, "a minute and more without a bound"
    assert counts.classifier_learnt is not None
    learnt, of = counts.classifier_learnt
    assert 300 < learnt < 1_000 and of == 4_000
    (line,) = [line for line in lines(summary_of(counts)) if line.key == "classifier"]
    assert line.name == f"simple classifier, {learnt} of 4,000 examples"


@pytest.mark.skipif(not is_installed(), reason="needs scikit-learn, which is optional")
def test_a_classifier_that_fails_ends_nothing_and_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    known = [asked(" " * i, "yes" if i % 2 else "no") for i in range(1, 41)]  # nothing in them to tell apart
    counts = counts_of(labelled(20), ["yes"] * 20, known=known)
    assert counts.classifier_missing is not None and "it failed (ValueError: " in counts.classifier_missing
    Terminal().results(summary_of(counts))
    assert "no simple classifier is compared with the adapter: it failed" in capsys.readouterr().out


@pytest.mark.skipif(not is_installed(), reason="needs scikit-learn, which is optional")
def test_many_answers_to_long_questions_are_left_to_the_adapter() -> None:
    known = [asked("so " * 400 + str(i), f"intent {i % 150}") for i in range(900)]
    counts = counts_of(known[:150], ["x"] * 150, known=known)
    assert counts.classifier_missing == "150 answers to questions of 1000 characters would take it too long"


def test_that_no_classifier_is_there_is_said_where_it_would_help(capsys: pytest.CaptureFixture[str]) -> None:
    known = labelled(40)
    found: Mapping[bool, str | None] = {
        bool(given): counts_of(labelled(20), ["yes"] * 20, known=given).classifier_missing for given in (known, [])
    }
    assert found == {True: None if is_installed() else "not installed", False: None}
    Terminal().results(summary_of(counts_of(labelled(20), ["yes"] * 20, known=known)))
    assert ("pip install scikit-learn" in capsys.readouterr().out) is not is_installed()


# What is shown


def test_wrong_answers_come_first_among_the_samples() -> None:
    questions = labelled(20)
    adapter = [one.answer for one in questions]
    adapter[13] = "perhaps"
    counts = counts_of(questions, adapter)
    samples = _samples(questions, ["eh"] * 20, adapter, counts, [None] * 20)
    assert [sample.right for sample in samples] == [False, *[True] * (SAMPLES - 1)]
    wrong = _samples(questions, ["eh"] * 20, ["perhaps"] * 20, counts_of(questions, ["perhaps"] * 20), [None] * 20)
    assert [sample.right for sample in wrong] == [False] * SAMPLES


def test_a_notebook_draws_verdict_table_samples_and_pictures_and_data_are_no_markup() -> None:
    summary = summary_of(counts_of(labelled(60), [one.answer for one in labelled(60)]))
    lost = NllScore(3.0, 3.1, 0.1, (0.05, 0.15), 20)
    summary = replace(summary, forgetting=Forgotten({"the built-in pages": lost}))
    result = Result(summary)
    page = result._repr_html_()
    assert "<h3>The adapter answers more questions right than its base</h3>" in page
    assert "always the same answer" in page and "60.0%" in page
    assert (page.count("<svg"), page.count("&lt;script&gt;"), page.count("<script")) == (2, 1, 0)
    assert "https://" not in page.replace("https://matplotlib.org", "")
    assert json.loads(json.dumps(result)) == json.loads(json.dumps(summary.to_json()))
    assert repr(result).startswith("The adapter answers more questions right than its base; of 100 questions")


def test_the_bars_hold_the_adapter_against_the_most_frequent_answer() -> None:
    figure = charts.scores_of(summary_of(counts_of(labelled(60), ["yes"] * 60)))
    assert figure is not None
    names = [label.get_text() for label in figure.axes[0].get_yticklabels()]
    assert names == ["adapter", "always the same answer", "base"]
    assert sorted(bar.get_width() for bar in figure.axes[0].patches) == [0.0, 0.6, 0.6]


def test_the_terminal_says_what_is_taken_for_what(capsys: pytest.CaptureFixture[str]) -> None:
    given = [one.answer for one in labelled(60)]
    given[:3] = ["no"] * 3
    Terminal().results(summary_of(counts_of(labelled(60), given)))
    said = " ".join(capsys.readouterr().out.split())
    assert "3 × 'no' where 'yes' is right" in said
    assert "of 100 questions like these about 95 are answered right" in said


def test_free_answers_are_not_counted_because_training_had_few() -> None:
    learnt = [asked(f"q{i}", f"Reply {i % 10}.") for i in range(200)]
    free = [asked(f"n{i}", f"Something of its own, {i}.") for i in range(20)]
    assert are_few([asked(f"n{i}", f"Reply {i % 10}.") for i in range(20)], learnt)
    assert not are_few(free, learnt)


def test_a_summary_of_an_earlier_version_lacks_what_came_later() -> None:
    whole = summary_of(counts_of(labelled(60), ["yes"] * 60)).to_json()
    for name in ("checked", "unchecked", "classifier_learnt", "tells"):
        counts = {key: part for key, part in whole["counts"].items() if key != name}
        assert RunSummary.from_json({**whole, "counts": counts}).counts is not None
    with pytest.raises(ValueError, match=r"counts\.right: Field required"):
        RunSummary.from_json(
            {**whole, "counts": {key: part for key, part in whole["counts"].items() if key != "right"}}
        )
