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
WORSE = [TALK[0], {"role": "assistant", "content": "Three miles."}]
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
        {"question": "Who?", "context": "Ann did.", "answer": "Ann."},
        ("Who?\n\nAnn did.", "Ann."),
    ),
    "an instruction with it": (
        {"instruction": "Who?", "passage": "Ann did.", "response": "Ann."},
        ("Who?\n\nAnn did.", "Ann."),
    ),
    "a prompt with it": ({"prompt": "Who?", "context": "Ann did.", "completion": "Ann."}, ("Who?\n\nAnn did.", "Ann.")),
    "input and output": ({"input": "Who?", "output": "Ann."}, ("Who?", "Ann.")),
    "a conversation": ({"conversation": TALK}, ("How far?", "Two miles.")),
    "a conversation of any name": ({"log": TALK, "id": 3}, ("How far?", "Two miles.")),
    "a conversation in a cell": ({"dialogue": json.dumps(TALK)}, ("How far?", "Two miles.")),
    "preferences": ({"prompt": "Who?", "chosen": "Ann.", "rejected": "Bob."}, ("Who?", "Ann.")),
    "preferences of conversations": ({"chosen": TALK, "rejected": WORSE}, ("How far?", "Two miles.")),
    "the worse conversation first": ({"rejected": WORSE, "chosen": TALK}, ("How far?", "Two miles.")),
    "preferences with their question twice": (
        {"prompt": "How far?", "chosen": TALK, "rejected": WORSE},
        ("How far?", "Two miles."),
    ),
    "preferences of answers": (
        {"prompt": [TALK[0]], "chosen": [TALK[1]], "rejected": [WORSE[1]]},
        ("How far?", "Two miles."),
    ),
    "preferences after a conversation": (
        {
            "conversations": [{"from": "human", "value": "Who?"}],
            "chosen": {"from": "gpt", "value": "Ann."},
            "rejected": {"from": "gpt", "value": "Bob."},
        },
        ("Who?", "Ann."),
    ),
    "preferences after a question": (
        {"messages": [TALK[0]], "chosen": "Two.", "rejected": "Six."},
        ("How far?", "Two."),
    ),
    "chosen and rejected responses": (
        {"question": "Who?", "chosen_response": "Ann.", "rejected_response": "Bob."},
        ("Who?", "Ann."),
    ),
    "responses j and k": ({"question": "Who?", "response_k": "Bob.", "response_j": "Ann."}, ("Who?", "Ann.")),
    "preferred outputs": (
        {"prompt": [TALK[0]], "preferred_output": [TALK[1]], "non_preferred_output": [WORSE[1]]},
        ("How far?", "Two miles."),
    ),
    "a system prompt of another name": (
        {"question": "Who?", "answer": "Ann.", "system_prompt": "Be kind."},
        ("Who?", "Ann."),
    ),
    "a system prompt beside a pair": ({**PAIR, "system_message": "Be kind."}, ("How far?", "Two miles.")),
    "a picture of another name": ({"question": "Who?", "answer": "Ann.", "image": "a.png"}, ("Who?", "Ann.")),
    "earlier turns of a question": ({"question": "Who?", "answer": "Ann.", "history": [["a", "b"]]}, ("Who?", "Ann.")),
    "what was to choose from": ({"question": "Who?", "answer": "Ann.", "choices": ["Ann.", "Bob."]}, ("Who?", "Ann.")),
    "a picture's address": ({**PAIR, "image_url": "http://x/a.png"}, ("How far?", "Two miles.")),
    "a picture's address in a message": (
        {"messages": [{**TALK[0], "image_url": "http://x/a.png"}, TALK[1]]},
        ("How far?", "Two miles."),
    ),
    "the number of a sound": ({**PAIR, "audio_id": 4}, ("How far?", "Two miles.")),
    "numbers of pictures": ({**PAIR, "image_ids": [1]}, ("How far?", "Two miles.")),
    "another answer that repeats question and answer": (
        {**PAIR, "rejected": "How far? Two miles. Or so."},
        ("How far?", "Two miles."),
    ),
    "a note that holds both by chance": (
        {"prompt": "hi", "completion": "no", "notes": "this is not noise"},
        ("hi", "no"),
    ),
    "a note in which both are said": (
        {"prompt": "hi", "completion": "no", "notes": "He said hi, and I no"},
        ("hi", "no"),
    ),
    "a better answer that begins so": (
        {"prompt": "hi", "completion": "no", "better": "hi\nno, but come in"},
        ("hi", "no"),
    ),
    "an answer beside a call": (
        {
            "messages": [TALK[0], {"role": "assistant", "content": None, "tool_calls": [CALL]}],
            "response": "How far? Two miles.",
        },
        ("How far?", "map({})"),
    ),
    "preferences with scores": (
        {"prompt": "Who?", "chosen": "Ann.", "rejected": "Bob.", "margin": 0.5},
        ("Who?", "Ann."),
    ),
    "misspelt": ({"promt": "Who?", "completions": "Ann."}, ("Who?", "Ann.")),
    "a misspelt field of any form": ({"prompt": "Who?", "completion": "Ann.", "grup": "people"}, ("Who?", "Ann.")),
    "columns in another language": ({"Frage": "Who?", "Antwort": "Ann."}, ("Who?", "Ann.")),
    "with another column": ({"Frage": "Who?", "Antwort": "Ann.", "Note": 1}, ("Who?", "Ann.")),
    "a field that nothing reads": ({**PAIR, "mood": "kind"}, ("How far?", "Two miles.")),
    "two of them": ({**PAIR, "mood": "kind", "weather tomorrow": "rain"}, ("How far?", "Two miles.")),
    "one of a message": ({"messages": [TALK[0], {**TALK[1], "mood": "kind"}]}, ("How far?", "Two miles.")),
    "remarks": ({"messages": [TALK[0], {**TALK[1], "remark": "Hm."}]}, ("How far?", "Two miles.")),
    "tools beside a text": ({"text": "Two miles.", "tools": [CALL]}, ("Two miles.", "Two miles.")),
    "pictures": ({**PAIR, "images": ["a.png"]}, ("How far?", "Two miles.")),
    "earlier turns": ({**PAIR, "history": [["Who?", "Ann."]]}, ("How far?", "Two miles.")),
    "a rejected answer": ({**PAIR, "rejected": "Three."}, ("How far?", "Two miles.")),
    "stars beside a reply": ({"review": "Dull film.", "rating": 2, "reply": "Sorry."}, ("Dull film.", "Sorry.")),
    "stars beside a text": ({"text": "Dull film.", "rating": 2}, ("Dull film.", "2")),
    "a judgement of an answer": ({**PAIR, "score": 0.1}, ("How far?", "Two miles.")),
    "what may explain an answer": ({**PAIR, "note": "by the old road"}, ("How far?", "Two miles.")),
    "a number that counts no text": ({**PAIR, "num_miles": 2}, ("How far?", "Two miles.")),
    "the subject of a mail": (
        {"Ticket ID": 7, "Customer": "Ann", "Subject": "A walk", "Question": "How far?", "Answer": "Two miles."},
        ("A walk\n\nHow far?", "Two miles."),
    ),
    "the subject of a pair": ({**PAIR, "subject": "A walk"}, ("A walk\n\nHow far?", "Two miles.")),
    "the subject of an instruction": (
        {"instruction": "How far?", "output": "Two miles.", "Subject line": "A walk"},
        ("A walk\n\nHow far?", "Two miles."),
    ),
    "the subject of a text with its label": (
        {"subject": "A walk", "body": "How far?", "sentiment": "calm"},
        ("A walk\n\nHow far?", "calm"),
    ),
    "the subject of messages": ({"messages": TALK, "subject": "A walk"}, ("How far?", "Two miles.")),
    "a subject where names tell nothing": (
        {"mail": "How far?", "sent back": "Two miles.", "subject": "A walk"},
        ("A walk\n\nHow far?", "Two miles."),
    ),
    "a number of a class": ({**PAIR, "label": 3}, ("How far?", "Two miles.")),
    "a weight in kilograms": ({**PAIR, "weight": 70}, ("How far?", "Two miles.")),
}


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


def test_the_flag_that_joins_a_subject_takes_the_place_of_the_one_that_was_typed(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"Subject": "A walk", "Mail": "How far?", "completion": "Two miles."}] * 2)
    said = refusal(path, ["prompt=Mail"])
    join, typed, unused = flags_in(said)
    assert typed == ["prompt=Mail"] and " in place of --columns prompt=Mail to learn from it" in said
    assert read_examples(path, join).train[0].question == "A walk\n\nHow far?"
    assert read_examples(path, [*typed, *unused]).train[0].question == "How far?"


def test_no_subject_is_joined_to_what_is_joined_already(tmp_path: Path) -> None:
    row = {"Subject": "A walk", "Mail": "How far?", "Place": "Skerrow", "completion": "Two miles."}
    path = write_rows(tmp_path / "a.jsonl", [row] * 2)
    typed = ["prompt={Place}: {Mail}"]
    (unused,) = flags_in(refusal(path, typed))
    assert (unused, read_examples(path, typed + unused).train[0].question) == (["unused=Subject"], "Skerrow: How far?")


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
    "who published it": {**PAIR, "publisher": "Ann's Press", "published_on": "2020", "doi": "10.1/2"},
    "counts": {**PAIR, "num_words": 5, "token_count": 7, "completion_tokens_count": 3, "characters_len": 20},
    "ids and sources": {**PAIR, "id": 1, "custom_id": "a", "source": "atlas", "url": "x", "created_at": "2026"},
    "what it is about": {**PAIR, "category": "roads", "topic": "miles", "task-type": "qa", "Team": "IT", "queue": "1"},
    "a number without a name": {**PAIR, "Unnamed: 0": 7},
    "nothing in it": {**PAIR, "images": [], "tools": None, "history": [[]], "mood": " ", "score": float("nan")},
    "nothing inside": {**PAIR, "mood": {"of": None, "at": []}},
    "lists that are empty in a cell": {**PAIR, "tools": "[]"},
    "a null in a message": {"messages": [TALK[0], {**TALK[1], "tool_calls": None, "images": []}], "tools": None},
    "the question again": {"messages": TALK, "prompt": "How far?"},
    "question and answer as one text": {**PAIR, "text": "### Q: How far?\n### A: Two miles."},
    "in a template": {**PAIR, "text": "Below is a task.\n\n### Task:\nHow far?\n\n### Answer:\nTwo miles.</s>"},
    "in marks": {**PAIR, "text": "<s>[INST] How far? [/INST] Two miles. </s>"},
    "side by side": {**PAIR, "text": "How far? Two miles."},
    "numbers of its parts": {**PAIR, "question_id": 3, "answer_idx": 1, "document_id": "x"},
    "its split": {**PAIR, "split": "train"},
    "its split of another spelling": {**PAIR, "split": "train_sft"},
    "a good answer": {**PAIR, "label": True},
    "good by its number": {**PAIR, "label": 1},
    "good by other names": {**PAIR, "kto_tag": True, "desirable": 1, "is_correct": "true"},
    "a row to learn": {**PAIR, "train": True, "weight": 1.0},
}


@pytest.mark.parametrize("row", HARMLESS.values(), ids=HARMLESS)
def test_what_is_harmless_is_passed_over(tmp_path: Path, row: dict[str, Any]) -> None:
    (example,) = read_examples(write_rows(tmp_path / "a.jsonl", [row])).train
    assert (example.question, example.answer) == ("How far?", "Two miles.")


def test_the_input_of_a_task_is_part_of_what_is_repeated(tmp_path: Path) -> None:
    row: dict[str, Any] = {"instruction": "Sum up.", "input": "A long\n\ntale.", "output": "A tale."}
    row["text"] = "Do it.\n\n### Instruction:\nSum up.\n\n### Input:\nA long\n\ntale.\n\n### Response:\nA tale."
    assert read_examples(write_rows(tmp_path / "a.jsonl", [row])).train[0].extra == ("text",)


MAY_BE_THE_ANSWER = [
    "label_id",
    "class_id",
    "intent_id",
    "answer_id",
    "answer_idx",
    "target_index",
    "speaker_id",
    "language",
    "author",
    "year",
    "source",
    "key",
    "is_correct",
]


@pytest.mark.parametrize("name", MAY_BE_THE_ANSWER)
def test_what_may_be_the_answer_to_a_text_is_not_passed_over(tmp_path: Path, name: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"text": f"Film {i}.", name: i} for i in range(3)])
    assert f"nothing reads '{name}', which may carry meaning" in refusal(path)


def test_a_text_has_a_place_and_a_time(tmp_path: Path) -> None:
    row: dict[str, Any] = {
        "text": "Skerrow is a loch.",
        "id": "1",
        "doc_id": 4,
        "url": "x",
        "page_url": "y",
        "created_at": "2026",
        "date": "2026",
        "file_path": "a",
        "token_count": 5,
    }
    assert read_examples(write_rows(tmp_path / "a.jsonl", [row])).train[0].is_text


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
    "a tag of a bad answer": ({**PAIR, "kto_tag": False}, "kto_tag: an answer marked as bad"),
    "an undesirable answer": ({**PAIR, "desirable": 0}, "desirable: an answer marked as bad"),
    "a wrong answer": ({**PAIR, "is_correct": "False"}, "is_correct: an answer marked as bad"),
    "the worse answer": ({**PAIR, "rejected_response": "Six."}, "rejected_response: a preference"),
    "a mark that an answer repeats": ({**PAIR, "train": 0, "text": "How far? Two miles."}, "train: a row marked"),
    "a call beside a pair": ({**PAIR, "function_call": {"name": "map"}}, "function_call: a call of a tool, which is"),
}


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


PAIRS: dict[str, tuple[dict[str, Any], str]] = {
    "whole conversations as text": (
        {"chosen": "\n\nHuman: Who?\n\nAssistant: Ann.", "rejected": "\n\nHuman: Who?\n\nAssistant: Bob."},
        "write 'chosen' as messages",
    ),
    "with a column that says which": (
        {"prompt": "Who?", "response_a": "Ann.", "response_b": "Bob.", "preference": "a"},
        "write the better answer of each row as completion",
    ),
    "with the number of the better one": (
        {"prompt": "Who?", "response_0": "Ann.", "response_1": "Bob.", "better_response_id": 0},
        "write the better answer of each row as completion",
    ),
}


@pytest.mark.parametrize(("row", "fix"), PAIRS.values(), ids=PAIRS)
def test_pairs_that_no_flag_makes_examples_of_are_named(tmp_path: Path, row: dict[str, Any], fix: str) -> None:
    said = refusal(write_rows(tmp_path / "a.jsonl", [row] * 2))
    assert "pairs of a preferred and a rejected answer, and learning from preferences is not there yet" in said
    assert fix in said
    assert "--columns" not in said


def test_labels_of_zeros_and_ones_beside_answers_judge_them(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{**PAIR, "label": 1}, {**PAIR, "label": 0}])
    assert f"{path}:2: label: an answer marked as bad" in refusal(path)
    assert len(read_examples(path, skip_bad=True).train) == 1
    assert len(read_examples(path, ["unused=label"]).train) == 2, "as is proposed where it says something else"


def test_labels_of_more_numbers_judge_nothing(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{**PAIR, "label": i} for i in range(3)])
    assert f"{path}:1: nothing reads 'label'" in refusal(path)


TOLD: dict[str, tuple[dict[str, Any], str]] = {
    "a picture": ({"image": "a.png"}, "(passed over: 'image', pictures, sounds or films, which are not read)"),
    "the worse answer": ({"rejected": "Bob."}, "(passed over: 'rejected', the worse answer)"),
    "what may mean something": ({"documents": ["Ann did."]}, "(passed over: 'documents', which may carry meaning)"),
    "a call": ({"tool_calls": [CALL]}, "'tool_calls', a call of a tool, which is learnt only as part of a message)"),
}


@pytest.mark.parametrize(("more", "words"), TOLD.values(), ids=TOLD)
def test_flags_say_what_they_pass_over(tmp_path: Path, more: dict[str, Any], words: str) -> None:
    answer = "chosen" if "rejected" in more else "answer"
    path = write_rows(tmp_path / "a.jsonl", [{"question": "Who?", answer: "Ann.", **more}] * 2)
    assert refusal(path).endswith(words)


@pytest.mark.parametrize(
    ("mark", "good", "bad"),
    [("label", True, False), ("label", 1, 0), ("train", True, False), ("weight", 1, 0), ("kto_tag", True, False)],
)
def test_flags_for_other_names_leave_the_marks_of_rows_in_force(
    tmp_path: Path, mark: str, good: object, bad: object
) -> None:
    rows = [{"question": f"Who {i}?", "answer": "Ann.", mark: good if i else bad} for i in range(3)]
    path = write_rows(tmp_path / "a.jsonl", rows)
    said = refusal(path)
    assert said.endswith(f" --columns completion=answer --skip-bad (left out: rows by '{mark}')")
    with pytest.raises(DataError, match=rf"1 problem in the data\n.*a\.jsonl:1: {mark}"):
        read_examples(path, flags_in(said)[0])
    assert [e.question for e in read_examples(path, flags_in(said)[0], skip_bad=True).train] == ["Who 1?", "Who 2?"]


def test_no_flag_is_proposed_where_every_row_is_marked_as_bad(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"question": "Who?", "answer": "Ann.", "label": False}] * 2
    said = refusal(write_rows(tmp_path / "a.jsonl", rows))
    assert said.endswith("every row is marked as not to be learnt by 'label': give rows that are")


def test_a_system_prompt_of_another_name_is_learnt(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"question": "Who?", "answer": "Ann.", "system_prompt": "Be kind."}] * 2)
    (example, _) = read_examples(path, flags_in(refusal(path))[0]).train
    assert (example.messages[0].role, example.messages[0].content) == ("system", "Be kind.")


def test_rows_of_another_split_are_not_trained_on(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{**PAIR, "split": "train"}, *[{**PAIR, "split": "test"}] * 2])
    assert refusal(path, skip_bad=True) == (
        f"1 problem in the data\n  {path}: rows of several splits in one file (split: 2 test, 1 train): write each to "
        "a file of its own (train.jsonl, valid.jsonl, test.jsonl) and give their folder, or add --columns unused=split"
    )
    assert len(read_examples(path, flags_in(refusal(path))[0]).train) == 3


def test_a_file_of_a_folder_holds_rows_of_its_own_split(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{**PAIR, "split": "train"}])
    write_rows(tmp_path / "validation.jsonl", [{**PAIR, "split": "dev"}])
    assert read_examples(tmp_path).valid
    write_rows(tmp_path / "train.jsonl", [{**PAIR, "split": "test"}] * 2)
    assert "train.jsonl: rows of another split than train (split: 2 test)" in refusal(tmp_path)


def test_one_file_of_one_split_is_read_as_it_is_given_and_told(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{**PAIR, "split": "test"}] * 2)
    assert read_examples(path).notes == (
        f"every row of {path} says split 'test': the column is ignored, as you named the file",
    )


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


def test_an_empty_cell_is_no_label(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("text,label\nDull film.,bad\nFair film.,\n", encoding="utf-8")
    assert f"{tmp_path / 'a.csv'}:3: label: missing, where other rows have one" in refusal(tmp_path / "a.csv")


def test_fields_are_told_though_the_first_row_leaves_them_empty(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("Frage,Note,Antwort\nWho?,,Ann.\nHow?,x,So.\n", encoding="utf-8")
    assert "(fields: Frage, Note, Antwort)" in refusal(tmp_path / "a.csv")


def test_a_test_file_without_the_labels_of_training_is_named(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [{"text": "Dull film.", "label": "bad"}])
    write_rows(tmp_path / "test.jsonl", [{"text": "Fair film."}])
    assert f"{tmp_path / 'test.jsonl'}:1: label: missing" in refusal(tmp_path)


def test_labels_that_are_null_in_every_row_are_no_labels(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [{"text": f"Film {i}.", "label": None} for i in range(3)]
    assert all(e.is_text for e in read_examples(write_rows(tmp_path / "a.jsonl", rows)).train)
