"""Every field that holds something is used, harmless, or refused with flags that work when they are typed."""

from __future__ import annotations

import json
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows

from lorafit.data.reading import read_examples
from lorafit.errors import DataError

TALK = [{"role": "user", "content": "How far?"}, {"role": "assistant", "content": "Two miles."}]
PAIR = {"prompt": "How far?", "completion": "Two miles."}
CALL = {"id": "1", "type": "function", "function": {"name": "map", "arguments": "{}"}}


def refusal(path: Path, columns: list[str] | None = None, skip_bad: bool = False) -> str:
    with pytest.raises(DataError) as caught:
        read_examples(path, columns or [], skip_bad)
    return str(caught.value)


def flags_in(said: str) -> list[list[str]]:
    """The flags of each way that is proposed: those of one way stand side by side."""
    ways = re.findall(r"(?:--columns (?:'[^']*'|[^\s:;,]+) ?)+", said)
    return [[word for word in shlex.split(way) if word != "--columns"] for way in ways]


# What is meant by a file, and what is learnt of it with the first flags that are proposed.
OTHERWISE: dict[str, tuple[dict[str, Any], tuple[str, str]]] = {
    "a label beside a text": ({"text": "Dull film.", "sentiment": "bad"}, ("Dull film.", "bad")),
    "a label spelt large": ({"text": "Dull film.", "Label": "bad"}, ("Dull film.", "bad")),
    "an answer beside a text": ({"text": "A long tale.", "summary": "A tale."}, ("A long tale.", "A tale.")),
    "with a title": ({"title": "T", "text": "A long tale.", "summary": "A tale."}, ("A long tale.", "A tale.")),
    "the name of a number": ({"text": "Dull film.", "label": 0, "label_text": "bad"}, ("Dull film.", "bad")),
    "what a question is about": (
        {"question": "Who?", "context": "Ann did.", "answer": "Ann."}, ("Who?\n\nAnn did.", "Ann.")),
    "an instruction with it": (
        {"instruction": "Who?", "passage": "Ann did.", "response": "Ann."}, ("Who?\n\nAnn did.", "Ann.")),
    "a prompt with it": ({"prompt": "Who?", "context": "Ann did.", "completion": "Ann."}, ("Who?\n\nAnn did.", "Ann.")),
    "input and output": ({"input": "Who?", "output": "Ann."}, ("Who?", "Ann.")),
    "a conversation": ({"conversation": TALK}, ("How far?", "Two miles.")),
    "a conversation of any name": ({"log": TALK, "id": 3}, ("How far?", "Two miles.")),
    "a conversation in a cell": ({"dialogue": json.dumps(TALK)}, ("How far?", "Two miles.")),
    "preferences": ({"prompt": "Who?", "chosen": "Ann.", "rejected": "Bob."}, ("Who?", "Ann.")),
    "preferences of conversations": ({"chosen": TALK, "rejected": TALK}, ("How far?", "Two miles.")),
    "preferences with scores": (
        {"prompt": "Who?", "chosen": "Ann.", "rejected": "Bob.", "margin": 0.5}, ("Who?", "Ann.")),
    "misspelt": ({"promt": "Who?", "completions": "Ann."}, ("Who?", "Ann.")),
    "a misspelt field of any form": ({"prompt": "Who?", "completion": "Ann.", "grup": "people"}, ("Who?", "Ann.")),
    "columns in another language": ({"Frage": "Who?", "Antwort": "Ann."}, ("Who?", "Ann.")),
    "with another column": ({"Frage": "Who?", "Antwort": "Ann.", "Note": 1}, ("Who?", "Ann.")),
    "a field that nothing reads": ({**PAIR, "mood": "kind"}, ("How far?", "Two miles.")),
    "two of them": ({**PAIR, "mood": "kind", "weather tomorrow": "rain"}, ("How far?", "Two miles.")),
    "one of a message": ({"messages": [TALK[0], {**TALK[1], "mood": "kind"}]}, ("How far?", "Two miles.")),
    "a plan": ({"messages": [TALK[0], {**TALK[1], "plan": "Hm."}]}, ("How far?", "Two miles.")),
    "a call beside words": ({"messages": [TALK[0], {**TALK[1], "tool_calls": [CALL]}]}, ("How far?", "Two miles.")),
    "pictures": ({**PAIR, "images": ["a.png"]}, ("How far?", "Two miles.")),
    "earlier turns": ({**PAIR, "history": [["Who?", "Ann."]]}, ("How far?", "Two miles.")),
    "a rejected answer": ({**PAIR, "rejected": "Three."}, ("How far?", "Two miles.")),
    "a number of a class": ({**PAIR, "label": 3}, ("How far?", "Two miles.")),
    "a weight in kilograms": ({**PAIR, "weight": 70}, ("How far?", "Two miles.")),
}  # fmt: skip


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(("row", "learnt"), OTHERWISE.values(), ids=OTHERWISE)
def test_what_is_not_read_is_refused_with_flags_that_work(
    tmp_path: Path, row: dict[str, Any], learnt: tuple[str, str], rows: int
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [row] * rows)
    ways = flags_in(refusal(path))
    found = [read_examples(path, way).train for way in ways]
    assert [(e.question, e.answer) for e in found[0]] == [learnt] * rows
    assert len(found) in (1, 2)


def test_flags_beside_those_that_are_typed_already(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"q": "Who?", "answer": "Ann.", "mood": "kind"}] * 2)
    typed = ["prompt=q"]
    typed += flags_in(refusal(path, typed))[0]
    assert read_examples(path, typed).train[0].answer == "Ann."


def test_flags_leave_rows_of_the_usual_names_as_they_are(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [PAIR, {"text": "Who?", "completion": "Ann."}])
    assert [e.question for e in read_examples(path, ["prompt=text"]).train] == ["How far?", "Who?"]


def test_a_field_is_refused_once_for_a_file_and_never_skipped(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [PAIR, *[{**PAIR, "mood": "kind"}] * 30])
    assert refusal(path, skip_bad=True) == (
        f"1 problem in the data\n  {path}:2: nothing reads 'mood', which may carry meaning: "
        "add --columns unused=mood to pass it over"
    )


HARMLESS: dict[str, dict[str, Any]] = {
    "ids and sources": {**PAIR, "id": 1, "custom_id": "a", "source": "atlas", "url": "x", "created_at": "2026"},
    "what it is about": {**PAIR, "category": "roads", "topic": "miles", "task-type": "qa"},
    "a number without a name": {**PAIR, "Unnamed: 0": 7},
    "nothing in it": {**PAIR, "images": [], "tools": None, "history": [[]], "mood": " ", "score": float("nan")},
    "nothing inside": {**PAIR, "mood": {"of": None, "at": []}},
    "lists that are empty in a cell": {**PAIR, "tools": "[]"},
    "a null in a message": {"messages": [TALK[0], {**TALK[1], "tool_calls": None, "images": []}], "tools": None},
    "the question again": {"messages": TALK, "prompt": "How far?"},
    "question and answer as one text": {**PAIR, "text": "### Q: How far?\n### A: Two miles."},
    "a good answer": {**PAIR, "label": True},
    "a row to learn": {**PAIR, "train": True, "weight": 1.0},
}  # fmt: skip


@pytest.mark.parametrize("row", HARMLESS.values(), ids=HARMLESS)
def test_what_is_harmless_is_passed_over(tmp_path: Path, row: dict[str, Any]) -> None:
    (example,) = read_examples(write_rows(tmp_path / "a.jsonl", [row])).train
    assert (example.question, example.answer) == ("How far?", "Two miles.")


def test_nulls_are_not_told_as_fields(tmp_path: Path) -> None:
    (example,) = read_examples(write_rows(tmp_path / "a.jsonl", [HARMLESS["a null in a message"]])).train
    assert example.extra == ()


def test_an_encyclopedia_is_plain_text(tmp_path: Path) -> None:
    row: dict[str, Any] = {"id": "12", "url": "x", "title": "Skerrow", "text": "Skerrow is a loch."}
    assert read_examples(write_rows(tmp_path / "a.jsonl", [row])).train[0].is_text


BAD_ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "a bad answer": ({**PAIR, "label": False}, "label: an answer marked as bad, as unpaired preferences have it"),
    "a bad answer in a cell": ({**PAIR, "label": "False"}, "label: an answer marked as bad"),
    "a bad conversation": ({"messages": TALK, "label": False}, "label: an answer marked as bad"),
    "a row not to learn": ({**PAIR, "train": False}, "train: a row marked as not to be learnt"),
    "pictures": ({**PAIR, "images": ["a.png"]}, "images: pictures, sounds or films"),
    "a call": (
        {"messages": [TALK[0], {**TALK[1], "content": None, "tool_calls": [CALL]}]},
        "messages[].tool_calls: a call of a tool, which is not learnt"),
    "an older call": (
        {"messages": [TALK[0], {**TALK[1], "content": "", "function_call": {"name": "map"}}]},
        "messages[].function_call: a call of a tool, which is not learnt"),
}  # fmt: skip


@pytest.mark.parametrize(("row", "said"), BAD_ROWS.values(), ids=BAD_ROWS)
def test_a_row_that_would_be_learnt_wrongly_is_named_and_can_be_left_out(
    tmp_path: Path, row: dict[str, Any], said: str
) -> None:
    path = write_rows(tmp_path / "a.jsonl", [PAIR, row])
    assert f"1 problem in the data\n  {path}:2: {said}" in refusal(path)
    assert len(read_examples(path, skip_bad=True).train) == 1


def test_pairs_of_preferences_are_named(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"prompt": "Who?", "chosen": "Ann.", "rejected": "Bob."}] * 2
    assert "pairs of a preferred and a rejected answer" in refusal(write_rows(tmp_path / "a.jsonl", rows))


@pytest.mark.parametrize("row", [{"id": "1", "body": {"messages": TALK}}, {"request": {"prompt": "a", "reply": "b"}}])
def test_no_flag_is_proposed_for_a_column_that_is_an_object(tmp_path: Path, row: dict[str, Any]) -> None:
    name = list(row)[-1]
    said = refusal(write_rows(tmp_path / "a.jsonl", [row]))
    assert said.endswith(f"write the fields of '{name}' into the row itself")


@pytest.mark.parametrize("unlabelled", [{"text": "Fair film."}, {"text": "Fair film.", "label": None}])
def test_a_row_without_the_label_that_others_have_is_named(tmp_path: Path, unlabelled: dict[str, Any]) -> None:
    rows: list[dict[str, Any]] = [{"text": f"Film {i}.", "label": "bad"} for i in range(3)]
    path = write_rows(tmp_path / "a.jsonl", [*rows, unlabelled])
    assert f"{path}:4: label: missing, where other rows have one" in refusal(path)
    assert read_examples(path, skip_bad=True).system == "Answer with the label alone: bad."


def test_a_test_file_without_the_labels_of_training_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"text": "Dull film.", "label": "bad"}])
    write_rows(tmp_path / "test.jsonl", [{"text": "Fair film."}])
    assert f"{tmp_path / 'test.jsonl'}:1: label: missing" in refusal(tmp_path)


def test_labels_that_are_null_in_every_row_are_no_labels(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": f"Film {i}.", "label": None} for i in range(3)]
    assert all(e.is_text for e in read_examples(write_rows(tmp_path / "a.jsonl", rows)).train)
