"""Digests: of content, the same in later versions; those of earlier versions are still known."""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, replace
from typing import Any

import pytest

from lorafit.data.examples import Call, Check, Example, Examples, Message
from lorafit.data.render import Row
from lorafit.digests import digest_of, digest_of_format_1
from lorafit.runs.tested import example_digest, matched, record_of, was_scored

ASKED = Example((Message("user", "Which gate?"), Message("assistant", "Gate 4.")), "a:1", Check(("4",), (), 9))
CALLED = Example(
    (Message("user", "Open gate 4."), Message("assistant", "", calls=(Call("open", '{"gate":4}'),))),
    "a:2",
    tools=('{"name":"open"}',),
)


@dataclass(frozen=True)
class Wider(Row):
    weight: float = 1.0


def test_a_digest_is_this_one() -> None:
    """It is kept in runs: where this fails, raise FORMAT and keep the old one readable."""
    text = '[{"example":3,"ids":[5,6],"trained":[false,true]}]'
    assert digest_of([Row((5, 6), (False, True), 3)]) == f"2:{hashlib.sha256(text.encode()).hexdigest()}"


def test_a_later_field_at_its_default_changes_no_digest() -> None:
    today, later = (kind((5, 6), (False, True), 3) for kind in (Row, Wider))
    assert digest_of([today]) == digest_of([later]) != digest_of([replace(later, weight=2.0)])


def test_a_digest_of_rows_of_format_1_is_this_one() -> None:
    """Runs of before have it, so what their rows were printed as must not change."""
    rows = [Row((5, 6), (False, True), 3, (False, True))]
    printed = "[Row(ids=(5, 6), trained=(False, True), example=3)]"
    assert digest_of_format_1(rows) == hashlib.sha256(printed.encode()).hexdigest()


PRINTED = (
    "[[((Message(role='user', content='Which gate?'), Message(role='assistant', content='Gate 4.')), "
    "Check(contains=('4',), lacks=(), max_words=9, declines=False)), ((Message(role='user', content='Open gate 4.'), "
    "Message(role='assistant', content='')), None, ('{\"name\":\"open\"}',), "
    "(1, (Call(name='open', arguments='{\"gate\":4}', id=''),), None))], [], []]"
)


def test_examples_know_their_digest_in_both_formats() -> None:
    examples, other = Examples((ASKED, CALLED)), Examples((ASKED,))
    for digest in (examples.digest(), hashlib.sha256(PRINTED.encode()).hexdigest()):
        assert examples.has_digest(digest) and not other.has_digest(digest)
    assert examples.digest().startswith("2:") and not examples.has_digest("3" + examples.digest()[1:])


@pytest.mark.parametrize(
    "other",
    [
        replace(CALLED, tools=('{"name":"shut"}',)),
        replace(CALLED, check=Check((), (), 9)),
        replace(CALLED, messages=(CALLED.messages[0], replace(CALLED.messages[1], reasoning="Hm."))),
        replace(CALLED, messages=(CALLED.messages[0], replace(CALLED.messages[1], calls=(Call("shut", "{}"),)))),
        replace(CALLED, messages=(replace(CALLED.messages[0], learnt=False), CALLED.messages[1])),
    ],
)
def test_whatever_is_learnt_or_scored_is_part_of_the_digest(other: Example) -> None:
    assert Examples((other,)).digest() != Examples((CALLED,)).digest()


def test_where_an_example_comes_from_is_not() -> None:
    assert Examples((replace(CALLED, where="b:9", group="g"),)).digest() == Examples((CALLED,)).digest()


def test_an_example_that_an_earlier_version_scored_is_known() -> None:
    tools = """('{"name":"open"}',)"""
    calls = """(1, (Call(name='open', arguments='{"gate":4}', id=''),), None)"""
    said = json.dumps([["user", "Open gate 4."], ["assistant", ""], tools, calls])
    before = hashlib.sha256(said.encode()).hexdigest()[:16]
    assert record_of(CALLED)["example_before"] == before
    for known in (before, example_digest(CALLED)):
        assert was_scored(CALLED, {known}) and not was_scored(ASKED, {known})


def kept(format_: str) -> list[dict[str, Any]]:
    """The records of a run on two examples and one of them again, as a version of lorafit kept them."""
    found = []
    for number, example in enumerate((ASKED, CALLED, CALLED)):
        record = {**record_of(example), "number": number}
        before = record.pop("example_before", record["example"]) if format_ != "now" else ""
        if format_ == "before":
            record["example"] = before
        elif format_ == "first":
            del record["example"]
        found.append(record)
    return found


@pytest.mark.parametrize("one", ["now", "between", "before", "first"])
@pytest.mark.parametrize("other", ["now", "first"])
def test_runs_are_paired_whichever_version_kept_them(one: str, other: str) -> None:
    """Runs on data with tools were not: their fingerprints were taken over what Python printed."""
    for ours, theirs in ((kept(one), kept(other)[::-1]), (kept(other), kept(one)[::-1])):
        both = matched(ours, theirs)
        assert sorted(a["number"] for a, _ in both) == [0, 1, 2]
        assert all(a["question"] == b["question"] for a, b in both)
        assert matched(ours, theirs[1:]) == matched(ours, []) == []


def test_the_examples_of_the_first_runs_are_known_by_what_was_said() -> None:
    (said,) = {f"{one['question']}\0{one['reference']}" for one in kept("first")[:1]}
    assert was_scored(ASKED, {said}) and not was_scored(CALLED, {said})


def test_a_label_is_known_by_the_check_it_had_in_format_1() -> None:
    labelled = Example(
        (Message("user", "Fine."), Message("assistant", "very good")), "a:1", Check((), (), 9, label="x")
    )
    before = (labelled.messages, Check(("very good",), (), 2))
    assert Examples((labelled,)).has_digest(digest_of_format_1([[before], [], []]))
