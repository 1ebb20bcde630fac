"""Reading examples: what is taken, what is refused, and that everything wrong is named at once."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
from conftest import write_rows

from lorafit.data.checks import is_right
from lorafit.data.examples import Check, Example, Message, asks_once
from lorafit.data.prepared import Unheard, choose, prepare, require_passing
from lorafit.data.reading import read_examples
from lorafit.data.report import describe
from lorafit.errors import DataError, InputError
from lorafit.settings import TrainSettings

GOOD = {"prompt": "What is two and two?", "completion": "Four."}


def user(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict[str, str]:
    return {"role": "assistant", "content": text}


def system(text: str) -> dict[str, str]:
    return {"role": "system", "content": text}


def problems_of(path: Path) -> list[str]:
    with pytest.raises(DataError) as caught:
        read_examples(path)
    return [str(problem) for problem in caught.value.problems]


def one_problem(tmp_path: Path, row: object, before: object = GOOD) -> str:
    """The single problem of a row on line 2 of a file, without the path of the file."""
    path = tmp_path / "some.jsonl"
    path.write_text(json.dumps(before) + "\n" + json.dumps(row) + "\n", encoding="utf-8")
    (problem,) = problems_of(path)
    assert problem.startswith(f"{path}:2: ")
    return problem.removeprefix(f"{path}:")


def one_raw_problem(tmp_path: Path, raw: bytes) -> str:
    path = tmp_path / "some.jsonl"
    path.write_bytes(raw)
    (problem,) = problems_of(path)
    assert problem.startswith(str(path))
    return problem.removeprefix(str(path))


def test_messages_are_read_as_they_stand(tmp_path: Path) -> None:
    turns = [system("Be short."), user("One?"), assistant("1"), user("Two?"), assistant("2")]
    (example,) = read_examples(write_rows(tmp_path / "a.jsonl", [{"messages": turns}])).train
    assert example.messages == tuple(Message(turn["role"], turn["content"]) for turn in turns)


def test_prompt_and_completion_become_a_question_and_an_answer(tmp_path: Path) -> None:
    (example,) = read_examples(write_rows(tmp_path / "a.jsonl", [GOOD])).train
    assert example.messages == (Message("user", "What is two and two?"), Message("assistant", "Four."))


def test_prompt_and_answer_of_a_conversation_are_parted_before_the_last_answer(tmp_path: Path) -> None:
    turns = [user("One?"), assistant("1"), user("Two?"), assistant("2")]
    (example,) = read_examples(write_rows(tmp_path / "a.jsonl", [{"messages": turns}])).train
    assert (example.question, example.answer) == ("One?\n1\nTwo?", "2")


def test_check_and_group_are_read(tmp_path: Path) -> None:
    check = {"contains": ["four"], "lacks": ["five"], "max_words": 7, "declines": True}
    (example,) = read_examples(write_rows(tmp_path / "a.jsonl", [{**GOOD, "check": check, "group": "sums"}])).train
    assert (example.check, example.group) == (Check(("four",), ("five",), 7, True), "sums")


def test_what_is_wrong_with_an_example_leaves_it_out_whatever_its_path_holds(tmp_path: Path) -> None:
    (tmp_path / "g: h").mkdir()
    wrong = {**GOOD, "check": {"contains": ["nowhere"]}}
    examples = read_examples(write_rows(tmp_path / "g: h" / "x.jsonl", [GOOD, wrong, *[GOOD] * 18]))
    with pytest.raises(DataError) as caught:
        require_passing(examples)
    left = examples.without(caught.value.problems)
    assert [int(e.where.rpartition(":")[2]) for e in left.train] == [1, *range(3, 21)]  # 2 is not the beginning of 20
    require_passing(left)


def test_what_is_wrong_alike_is_told_once_and_in_order_whatever_the_path_holds(tmp_path: Path) -> None:
    path = tmp_path / "g: h" / "x.csv"
    path.parent.mkdir()
    path.write_text(
        "prompt,completion\n" + "".join(f"Q{i},{'A,B' if i == 30 else ''}\n" for i in range(31)), encoding="utf-8"
    )
    with pytest.raises(DataError) as caught:
        read_examples(path)
    empty, cells = str(caught.value).splitlines()[1:]
    assert (
        empty.startswith(f"  {path}:2: completion: an empty answer")
        and "(also at 3, 4, 5, 6, 7, 8, 9, 10 and 21 more)" in empty
    )
    assert cells.startswith(f"  {path}:32: 3 cells under 2 columns")


def test_an_example_knows_its_file_and_line_blank_lines_counted(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text("\n\n" + json.dumps(GOOD) + "\n", encoding="utf-8")
    assert [example.where for example in read_examples(path).train] == [f"{path}:3"]


def test_a_folder_is_read_by_split(tmp_path: Path) -> None:
    for i, split in enumerate(("train", "valid", "test"), 1):
        write_rows(tmp_path / f"{split}.jsonl", [GOOD] * i)
    examples = read_examples(tmp_path)
    assert [len(split) for split in examples.by_name().values()] == [1, 2, 3]


def test_a_missing_split_of_a_folder_is_empty(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [GOOD])
    write_rows(tmp_path / "test.jsonl", [GOOD])
    assert read_examples(tmp_path).valid == ()


def test_the_builtin_help_desk_has_three_splits_and_names_no_file_of_the_package_as_unread() -> None:
    found = read_examples("builtin")
    assert all(len(split) > 100 for split in found.by_name().values())
    assert found.unread == ()


def conversation(turns: int) -> Example:
    return Example(tuple(Message(("user", "assistant")[i % 2], "So?") for i in range(2 * turns)), f"a.jsonl:{turns}")


@pytest.mark.parametrize(
    ("single", "longer", "once"),
    [(1000, 1, True), (95, 5, True), (94, 6, False), (0, 3, False), (0, 0, False), (3, 0, True)],
)
def test_a_few_longer_conversations_do_not_make_the_others_longer(single: int, longer: int, once: bool) -> None:
    assert asks_once([*[conversation(1)] * single, *[conversation(2)] * longer]) == once


def test_texts_ask_nothing() -> None:
    assert not asks_once([Example((Message("text", "It rained."),), "a.txt:1")])


def test_a_byte_order_mark_is_no_part_of_the_first_line(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n")
    assert len(read_examples(path).train) == 1


@pytest.mark.parametrize("separator", ["\u2028", "\u2029", "\x85", "\x0b"], ids=["LS", "PS", "NEL", "VT"])
def test_a_separator_within_a_string_ends_no_line(tmp_path: Path, separator: str) -> None:
    text = f"first{separator}second"
    path = tmp_path / "a.jsonl"
    line = json.dumps({"prompt": "?", "completion": text}, ensure_ascii=separator < " ")
    path.write_text(line + "\n", encoding="utf-8")
    assert read_examples(path).train[0].answer == text


def test_lines_may_end_as_on_windows(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes((json.dumps(GOOD) + "\r\n").encode() * 2)
    assert len(read_examples(path).train) == 2


def test_a_last_line_needs_no_line_end(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_text(json.dumps(GOOD), encoding="utf-8")
    assert len(read_examples(path).train) == 1


def test_an_unknown_field_is_passed_over_and_reported(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{**GOOD, "source": "x"}, {**GOOD, "source": "y", "lang": "en"}])
    assert describe(read_examples(path)).passed_over == {"source": 2, "lang": 1}


def test_a_prompt_beside_messages_is_reported_as_passed_over(tmp_path: Path) -> None:
    row: dict[str, Any] = {"messages": [user("a"), assistant("b")], "prompt": "a"}
    assert read_examples(write_rows(tmp_path / "a.jsonl", [row])).train[0].extra == ("prompt",)


def test_a_field_of_a_message_that_is_not_read_is_reported(tmp_path: Path) -> None:
    row: dict[str, Any] = {"messages": [user("a"), {**assistant("b"), "name": "Ann"}]}
    assert read_examples(write_rows(tmp_path / "a.jsonl", [row])).train[0].extra == ("messages[].name",)


def test_the_digest_tells_contents_apart_and_not_files(tmp_path: Path) -> None:
    one, same = (read_examples(write_rows(tmp_path / name, [GOOD])) for name in ("a.jsonl", "b.jsonl"))
    other = read_examples(write_rows(tmp_path / "c.jsonl", [{**GOOD, "completion": "Five."}]))
    assert (one.digest() == same.digest(), one.digest() == other.digest()) == (True, False)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    assert problems_of(tmp_path / "none.jsonl") == [f"{tmp_path / 'none.jsonl'}: there is no such file: check the path"]


def test_a_folder_without_train_says_what_it_holds(tmp_path: Path) -> None:
    write_rows(tmp_path / "lessons.jsonl", [GOOD])
    (problem,) = problems_of(tmp_path)
    assert "no train.jsonl" in problem
    assert "lessons.jsonl" in problem


@pytest.mark.parametrize("raw", [b"", b"\n \n\t\n\n", b"\xef\xbb\xbf"], ids=["empty", "blank lines", "only a mark"])
def test_a_file_without_examples_is_refused(tmp_path: Path, raw: bytes) -> None:
    assert "no examples in it" in one_raw_problem(tmp_path, raw)


def test_an_empty_split_of_a_folder_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [GOOD])
    (tmp_path / "valid.jsonl").write_bytes(b"")
    (problem,) = problems_of(tmp_path)
    assert problem.startswith(f"{tmp_path / 'valid.jsonl'}: no examples")


def test_a_binary_file_is_refused_once(tmp_path: Path) -> None:
    assert "a binary file" in one_raw_problem(tmp_path, b"\x7fELF\x00\x00\n\xff\n\xfe\n")


def test_a_line_that_is_not_utf8_is_named(tmp_path: Path) -> None:
    good = json.dumps(GOOD).encode()
    raw = good + b"\n" + '{"prompt": "Käse?", "completion": "Ja."}'.encode("latin-1") + b"\n" + good + b"\n"
    said = ":2: not UTF-8 (byte 0xe4, which is ä in Windows-1252): save the file as UTF-8"
    assert one_raw_problem(tmp_path, raw).startswith(said)


def test_a_byte_order_mark_does_not_shift_the_line_of_an_error(tmp_path: Path) -> None:
    raw = b"\xef\xbb\xbf" + json.dumps(GOOD).encode() + b"\n\xff\n"
    assert one_raw_problem(tmp_path, raw).startswith(":2: not UTF-8")


def test_a_line_that_is_not_utf8_hides_no_other_problem(tmp_path: Path) -> None:
    path = tmp_path / "a.jsonl"
    path.write_bytes(b"\xff\n[]\n\xfe\n")
    found = problems_of(path)
    assert [problem.split(": ")[0] for problem in found] == [f"{path}:{line}" for line in (1, 2, 3)]


def test_a_half_written_last_line_is_called_that(tmp_path: Path) -> None:
    raw = (json.dumps(GOOD) + "\n" + json.dumps(GOOD)[:-9]).encode()
    problem = one_raw_problem(tmp_path, raw)
    assert problem.startswith(":2: ")
    assert "half-written" in problem


def test_a_line_that_is_not_json_is_refused(tmp_path: Path) -> None:
    problem = one_raw_problem(tmp_path, b"{'prompt': 1}\n" + json.dumps(GOOD).encode() + b"\n")
    assert problem.startswith(":1: not JSON")
    assert "half-written" not in problem


@pytest.mark.parametrize("value", ["9" * 5000, "[" * 100_000], ids=["a huge number", "deep nesting"])
def test_json_that_python_cannot_hold_is_a_problem_of_its_line(tmp_path: Path, value: str) -> None:
    raw = f'{{"prompt": "a", "completion": "b", "n": {value}}}\n'.encode()
    assert one_raw_problem(tmp_path, raw).startswith(":1: not JSON")


@pytest.mark.parametrize("row", [["a", "b"], "text", 3, None], ids=["list", "text", "number", "null"])
def test_a_line_that_is_no_object_is_refused(tmp_path: Path, row: object) -> None:
    assert "not a JSON object" in one_problem(tmp_path, row)


BAD = {
    "fields of another kind": ({"question": "a", "answer": "b"}, "2: not a known form"),
    "prompt alone": ({"prompt": "a"}, "2: not a known form"),
    "no object": ({"messages": [user("a"), "b"]}, "2: messages[1]: not an object"),
    "messages no list": ({"messages": "a"}, "2: messages: not a list"),
    "no messages": ({"messages": []}, "2: messages: not a list"),
    "unknown role": ({"messages": [user("a"), {"role": "bot", "content": "b"}]}, "2: messages[1].role: unknown"),
    "no role": ({"messages": [user("a"), {"content": "b"}]}, "2: messages: a turn without 'role' (it has content)"),
    "not learnt": ({"messages": [user("a"), {**assistant("b"), "weight": 0}]}, "2: messages: every answer is marked"),
    "half learnt": ({"messages": [user("a"), {**assistant("b"), "weight": 0.5}]}, "2: messages[1].weight: 0.5, where"),
    "a picture": (
        {"messages": [user("a"), {"role": "assistant", "content": [{"type": "image_url", "url": "b"}]}]},
        '2: messages[1].content[0]: a part of type "image_url", which is not learnt',
    ),
    "a tool": (
        {"messages": [user("a"), {"role": "tool", "content": "b"}, assistant("c")]},
        "2: messages[1]: the answer of a tool that answers no call before it",
    ),
    "numpy's print": ({"messages": "[{'role': 'user'}\n {'role': 'assistant'}]"}, "2: messages: text that is neither"),
    "two system prompts": ({"messages": [system("a"), user("b"), assistant("c")], "system": "d"}, "2: system: another"),
    "role no text": ({"messages": [user("a"), {"role": [], "content": "b"}]}, "2: messages[1].role: unknown role []"),
    "content no text": ({"messages": [user("a"), {"role": "assistant", "content": [1]}]}, "2: messages[1].content: no"),
    "completion no text": ({"prompt": "a", "completion": 4}, "2: completion: not text but a number"),
    "empty prompt": ({"prompt": " ", "completion": "b"}, "2: prompt: empty"),
    "empty answer": ({"prompt": "a", "completion": ""}, "2: completion: an empty answer"),
    "answer of white space": ({"messages": [user("a"), assistant(" \n")]}, "2: messages[1].content: an empty answer"),
    "half a character": ({"prompt": "a", "completion": "\ud800"}, "2: completion: holds half of a character"),
    "half an input": ({"instruction": "a", "input": "\ud800", "output": "b"}, "2: input: holds half of a character"),
    "ends with user": ({"messages": [user("a"), assistant("b"), user("c")]}, "2: messages: ends with a user"),
    "no answer": ({"messages": [user("a")]}, "2: messages: no assistant message"),
    "answer alone": ({"messages": [system("a"), assistant("b")]}, "2: messages: nothing is asked before the answer"),
    "group a list": ({**GOOD, "group": [3]}, "2: group: not text but a list"),
    "text and answer": ({"text": "a", "completion": "b"}, "2: nothing reads 'completion', which may carry"),
}


@pytest.mark.parametrize(("row", "said"), BAD.values(), ids=BAD)
def test_a_bad_example_is_refused_by_line_and_field(tmp_path: Path, row: object, said: str) -> None:
    assert one_problem(tmp_path, row).startswith(said)


CHECKS: dict[str, object] = {
    "text": "21 days",
    "empty": {},
    "nothing contained": {"contains": []},
    "contains text": {"contains": "21 days"},
    "contains a number": {"contains": [21]},
    "contains blank": {"contains": [" "]},
    "lacks text": {"contains": ["a"], "lacks": "b"},
    "no words allowed": {"contains": ["a"], "max_words": 0},
    "words true": {"contains": ["a"], "max_words": True},
    "declines a number": {"contains": ["a"], "declines": 1},
    "misspelt key": {"contains": ["a"], "lack": ["b"]},
    "half a pattern": {"pattern": "(a"},
    "pattern a list": {"pattern": ["a"]},
    "exact blank": {"exact": " "},
    "number a text": {"number": "4"},
    "number true": {"number": True},
    "lacks alone": {"lacks": ["five"]},
}


def test_what_a_check_asks_of_the_whole_answer_is_read(tmp_path: Path) -> None:
    check = {"exact": "Four.", "json": {"b": 1.0, "a": None}, "number": 4, "pattern": "^F", "contains": None}
    (example,) = read_examples(write_rows(tmp_path / "a.jsonl", [{**GOOD, "check": check}])).train
    assert example.check == Check((), (), 10**9, False, "Four.", '{"a": null, "b": 1}', 4.0, "^F")


def numbered(path: Path, *answers: tuple[str, float]) -> Path:
    rows = [
        {"prompt": f"What does {i} cost?", "completion": text, "check": {"number": number}}
        for i, (text, number) in enumerate(answers)
    ]
    return write_rows(path, rows)


def test_a_number_is_checked_in_the_way_in_which_references_write_numbers(tmp_path: Path) -> None:
    """It was read as Americans write it: 50 was right where the reference is 3,50 EUR."""
    path = numbered(tmp_path / "a.jsonl", ("3,50 EUR", 3.5), ("1.234 Stück", 1234), ("42 EUR", 42), ("1 234", 1234))
    examples = read_examples(path)
    require_passing(examples)
    price, pieces, whole, parted = (example.check for example in examples.train)
    assert price and pieces and whole and parted
    assert [is_right(text, price) for text in ("3,50", "3,5 Euro", "50", "350")] == [True, True, False, False]
    assert [is_right(text, pieces) for text in ("1234", "1.234,00", "1.234", "234")] == [True, True, True, False]
    assert [is_right(text, whole) for text in ("42,00 EUR", "42.000")] == [True, False]
    assert [is_right(text, parted) for text in ("1 234", "1\u00a0234,0", "234")] == [True, True, False]


def test_a_number_that_is_not_the_references_is_told_with_what_was_read(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"does not pass it \(its last number: 3\.5; asked for: 50\)"):
        require_passing(read_examples(numbered(tmp_path / "a.jsonl", ("3,50 EUR", 50))))


def test_a_pattern_that_is_none_is_told_with_its_fault(tmp_path: Path) -> None:
    said = one_problem(tmp_path, {**GOOD, "check": {"pattern": "(a"}})
    assert said.startswith("2: check: not a check, for its pattern is no regular expression (missing )")


def test_a_misspelt_key_of_a_check_is_told_with_the_right_one(tmp_path: Path) -> None:
    row = {**GOOD, "check": {"contain": ["four"]}}
    assert one_problem(tmp_path, row) == "2: check: not a check, for it has 'contain': did you mean contains?"


ODDITIES = {
    "a quotation mark that lost its upper byte": ("It\x19s four.", "control characters"),
    "UTF-8 read as Windows-1252": ("Itâ€™s four.", "wrong encoding"),
    "UTF-8 read as Latin-1": ("CafÃ\xa9 Four.", "wrong encoding"),
    "a tag": ("Four.<br />", "HTML"),
    "an entity": ("Four &amp; more.", "HTML"),
    "an address": ("Ask ann@example.com.", "e-mail"),
    "a number to call": ("Call 718-659-0200.", "telephone"),
    "an echo": (GOOD["prompt"], "the question itself"),
}


@pytest.mark.parametrize(("answer", "said"), ODDITIES.values(), ids=ODDITIES)
def test_what_is_odd_and_stops_nothing_is_remarked_with_its_first_line(tmp_path: Path, answer: str, said: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", [GOOD, {**GOOD, "completion": answer}])
    (remark,) = describe(read_examples(path)).remarks
    assert (said in remark.what, remark.examples, remark.first) == (True, 1, f"{path}:2")


def test_what_only_looks_odd_is_not_remarked(tmp_path: Path) -> None:
    rows = [{**GOOD, "completion": text} for text in ("AÇÃO, São João", "x < b > c", "2024-11-24", "a @ b", "1\t2\n3")]
    assert describe(read_examples(write_rows(tmp_path / "a.jsonl", rows))).remarks == ()


def test_an_example_of_more_words_than_training_takes_tokens_is_remarked(tmp_path: Path) -> None:
    rows = [GOOD, {**GOOD, "prompt": "so " * 1020 + "where?"}, {**GOOD, "prompt": "so " * 4000 + "where?"}]
    examples = read_examples(write_rows(tmp_path / "a.jsonl", rows))
    (remark,) = describe(examples, max_length=1024).remarks
    words = 4001 + len(str(GOOD["completion"]).split())
    assert (remark.examples, remark.first.rpartition(":")[2]) == (1, "3")
    assert f"more words (up to {words:,}) than the 1,024 tokens" in remark.what
    assert describe(examples, max_length=5000).remarks == ()


def test_plain_text_is_cut_and_never_too_long(tmp_path: Path) -> None:
    examples = read_examples(write_rows(tmp_path / "a.jsonl", [{"text": "so " * 4000}]))
    assert describe(examples, max_length=1024).remarks == ()


def test_one_answer_to_everything_is_remarked(tmp_path: Path) -> None:
    rows = [{"prompt": f"What is {i}?", "completion": "A number."} for i in range(12)]
    (remark,) = describe(read_examples(write_rows(tmp_path / "a.jsonl", rows))).remarks
    assert (remark.what, remark.examples) == ("have the same answer", 12)


@pytest.mark.parametrize("check", CHECKS.values(), ids=CHECKS)
def test_a_bad_check_is_refused(tmp_path: Path, check: object) -> None:
    assert one_problem(tmp_path, {**GOOD, "check": check}).startswith("2: check: not a check")


def test_all_problems_of_a_line_are_named_at_once(tmp_path: Path) -> None:
    row: dict[str, object] = {"prompt": "", "completion": 3, "check": 1, "group": [2]}
    found = problems_of(write_rows(tmp_path / "a.jsonl", [row]))
    assert [problem.split(": ")[1] for problem in found] == ["prompt", "completion", "check", "group"]


def test_all_problems_of_all_files_are_named_at_once(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", [GOOD, {"prompt": "a", "completion": ""}, GOOD, {"prompt": "a"}])
    write_rows(tmp_path / "valid.jsonl", [{**GOOD, "group": [1]}])
    (tmp_path / "test.jsonl").write_bytes(b"{}\n{")
    found = [problem.removeprefix(str(tmp_path))[1:].split(": ")[0] for problem in problems_of(tmp_path)]
    assert found == ["train.jsonl:2", "train.jsonl:4", "valid.jsonl:1", "test.jsonl:1", "test.jsonl:2"]


def test_what_is_wrong_again_and_again_is_one_line_with_its_places(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "a", "completion": ""}] * 23)
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert str(caught.value).startswith("23 problems in the data\n")
    assert str(caught.value).endswith("(also at 2, 3, 4, 5, 6, 7, 8, 9 and 14 more)")
    assert len(str(caught.value).splitlines()) == 2


def test_the_message_shows_twenty_kinds_of_problems_and_counts_the_rest(tmp_path: Path) -> None:
    path = write_rows(
        tmp_path / "a.jsonl", [{"prompt": "a", "completion": {}, f"x{i}": 1, "check": {f"y{i}": 1}} for i in range(23)]
    )
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert str(caught.value).startswith("46 problems in the data\n")
    assert str(caught.value).endswith("\n  ... and 4 other kinds")


def test_every_problem_says_what_to_do(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [row for row, _ in BAD.values() if isinstance(row, dict)])
    with pytest.raises(DataError) as caught:
        read_examples(path)
    assert all(problem.fix for problem in caught.value.problems)


@pytest.mark.parametrize(
    "text", ["Il a dit «\u00a0j'ai mangé\u00a0».", "Il a crié…»", "C'est l'été\u00a0«\u00a0indien\u00a0»."]
)
def test_french_is_not_taken_for_text_read_in_a_wrong_encoding(tmp_path: Path, text: str) -> None:
    rows = [{"prompt": f"{text} {i}", "completion": "Oui."} for i in range(3)]
    assert describe(read_examples(write_rows(tmp_path / "a.jsonl", rows))).remarks == ()


ODD_ANSWERS = {
    "N/A": "a mark for nothing",
    " Paris": "blanks before",
    "Paris ###": "a marker",
    "æ—¥æœ¬": "wrong encoding",
    "Ð¿Ñ€Ð¸Ð²ÐµÑ‚": "wrong encoding",
    "4111 1111 1111 1111": "number of a card",
    "sk-abc123def456ghi789": "key or password",
    "+49 30 1234567": "telephone",
}


@pytest.mark.parametrize(("answer", "said"), ODD_ANSWERS.items())
def test_odd_answers_are_remarked(tmp_path: Path, answer: str, said: str) -> None:
    rows = [{"prompt": "Where?", "completion": answer}, {"prompt": "Who was it?", "completion": "Nobody."}]
    found = describe(read_examples(write_rows(tmp_path / "a.jsonl", rows))).remarks
    assert [one.examples for one in found if said in one.what] == [1]


def test_remarks_come_to_an_end_where_letters_were_lost(tmp_path: Path) -> None:
    """A pattern that tries every way to divide the signs takes hours here."""
    rows = [{"prompt": "Where?", "completion": "?" * 20_000 + "x"}, {"prompt": "b" * 20_000, "completion": "c"}]
    assert describe(read_examples(write_rows(tmp_path / "a.jsonl", rows))).remarks == ()


def test_labels_that_differ_in_case_or_that_training_lacks_are_remarked(tmp_path: Path) -> None:
    for name, labels in (("train", ["good"] * 5 + ["Good", "bad", "bad"]), ("test", ["bad", "awful"])):
        rows: list[dict[str, object]] = [
            {"text": f"{name} film number {i}", "label": one} for i, one in enumerate(labels)
        ]
        write_rows(tmp_path / f"{name}.jsonl", rows)
    found = describe(read_examples(tmp_path))
    assert {one.what: one.examples for one in found.remarks} == {
        "have a label that differs from a more frequent one only in case or spaces": 1,
        "have a label that no training example has": 1,
    }
    assert found.splits["train"].labels == {"good": 5, "bad": 2, "Good": 1}


def test_kinds_of_examples_that_are_mixed_are_remarked(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": "Q", "completion": "A"}, *[{"text": f"Prose {i}."} for i in range(3)]]
    found = describe(read_examples(write_rows(tmp_path / "a.jsonl", rows))).remarks
    assert [(one.what, one.examples) for one in found] == [("are conversations, where most are plain text", 1)]


# One reading of a message

ONE_READING: dict[str, dict[str, Any]] = {
    "parts of text": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "Wh"}, {"type": "text", "text": "y?"}]},
            {"role": "assistant", "content": [{"type": "output_text", "text": "So."}]},
        ]
    },
    "an empty system message": {"messages": [system(" "), user("Why?"), assistant("So.")]},
    "roles in capitals": {"messages": [{"role": "User", "content": "Why?"}, {"role": "ASSISTANT", "content": "So."}]},
    "roles of others": {"messages": [{"role": "human", "content": "Why?"}, {"role": "gpt", "content": "So."}]},
    "sharegpt under our name": {"messages": [{"from": "human", "value": "Why?"}, {"from": "gpt", "value": "So."}]},
    "our turns under sharegpt's name": {"conversations": [user("Why?"), assistant("So.")]},
    "both spellings, one of them null": {
        "messages": [
            {**user("Why?"), "from": None, "value": None},
            {"role": None, "content": None, "from": "gpt", "value": "So."},
        ]
    },
    "weights of questions": {"messages": [{**user("Why?"), "weight": 0}, {**assistant("So."), "weight": 1}]},
    "marks that say learn": {"messages": [user("Why?"), {**assistant("So."), "train": True, "loss_weight": 1.0}]},
    "marks that are null": {"messages": [user("Why?"), {**assistant("So."), "weight": None}]},
    "two lists": {"prompt": [user("Why?")], "completion": [assistant("So.")]},
    "a list and a text": {"prompt": [user("Why?")], "completion": "So."},
    "a null where a conversation may be": {"messages": None, "prompt": "Why?", "completion": "So."},
    "an empty list where a conversation may be": {"messages": [], "prompt": "Why?", "completion": "So."},
    "an empty cell where one may be": {"messages": "", "prompt": "Why?", "completion": "So."},
    "a list in a cell that is empty": {"conversations": "[]", "prompt": "Why?", "completion": "So."},
    "no number where one may be": {"messages": float("nan"), "prompt": "Why?", "completion": "So."},
    "no numbers in what may be left out": {
        "prompt": "Why?",
        "completion": "So.",
        **dict.fromkeys(("group", "check", "system", "reasoning_content", "tools"), float("nan")),
    },
    "blanks in what may be left out": {
        "prompt": "Why?",
        "completion": "So.",
        **dict.fromkeys(("group", "check", "system", "reasoning_content", "tools"), " "),
    },
    "no number for an input": {"instruction": "Why?", "input": float("nan"), "output": "So."},
    "a blank input": {"instruction": "Why?", "input": " ", "output": "So."},
    "an empty text beside a pair": {"text": "", "label": "", "prompt": "Why?", "completion": "So."},
    "as Python prints it": {"messages": str([user("Why?"), assistant("So.")])},
}


@pytest.mark.parametrize("row", ONE_READING.values(), ids=ONE_READING)
def test_a_message_is_read_in_every_spelling(tmp_path: Path, row: dict[str, Any]) -> None:
    (example,) = read_examples(write_rows(tmp_path / "a.jsonl", [row])).train
    assert example.messages == (Message("user", "Why?"), Message("assistant", "So."))


def test_empty_cells_of_a_table_are_no_fields(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("messages,group,check,prompt,completion\n,,,Why?,So.\n", encoding="utf-8")
    (example,) = read_examples(tmp_path / "a.csv").train
    assert (example.question, example.answer, example.group, example.check) == ("Why?", "So.", None, None)


def test_a_developer_is_the_system(tmp_path: Path) -> None:
    row: dict[str, Any] = {"messages": [{"role": "developer", "content": "Be short."}, user("Why?"), assistant("So.")]}
    assert read_examples(write_rows(tmp_path / "a.jsonl", [row])).train[0].messages[0] == Message("system", "Be short.")


def test_an_answer_that_is_json_stays_text(tmp_path: Path) -> None:
    row: dict[str, Any] = {"prompt": "[1, 2]", "completion": '[{"name": "Ann"}]'}
    (example,) = read_examples(write_rows(tmp_path / "a.jsonl", [row])).train
    assert (example.question, example.answer) == ("[1, 2]", '[{"name": "Ann"}]')


NOT_TO_LEARN = {"weight": 0, "train": False, "training": False, "trainable": False, "loss": 0.0, "loss_weight": "0"}


@pytest.mark.parametrize(("mark", "value"), NOT_TO_LEARN.items())
@pytest.mark.parametrize("form", ["messages", "conversations"])
def test_an_answer_marked_as_not_to_be_learnt_is_context_alone(
    tmp_path: Path, form: str, mark: str, value: object
) -> None:
    turns = [user("a"), {**assistant("bad"), mark: value}, user("b"), assistant("good")]
    (example,) = read_examples(write_rows(tmp_path / "a.jsonl", [{form: turns}])).train
    assert [message.learnt for message in example.messages] == [True, False, True, True]


SILENT: dict[str, dict[str, Any]] = {
    "without content": {"role": "assistant"},
    "null": {"role": "assistant", "content": None},
    "empty": assistant(""),
    "empty parts": {"role": "assistant", "content": [{"type": "text", "text": ""}]},
    "no parts": {"role": "assistant", "content": []},
    "marked": {"role": "assistant", "content": None, "weight": 0},
}


@pytest.mark.parametrize("silent", SILENT.values(), ids=SILENT)
def test_an_answer_that_says_nothing_is_context_where_others_follow(tmp_path: Path, silent: dict[str, Any]) -> None:
    row: dict[str, Any] = {"messages": [user("a"), silent, user("b"), assistant("good")]}
    (example,) = read_examples(write_rows(tmp_path / "a.jsonl", [row])).train
    assert example.messages[1] == Message("assistant", "", learnt=False)
    assert one_problem(tmp_path, {"messages": [user("a"), silent]})


def test_an_empty_list_as_text_is_an_answer(tmp_path: Path) -> None:
    rows: list[dict[str, Any]] = [
        {"messages": [user("a"), assistant("[]"), user("b"), assistant("{}")]},
        {"prompt": "a", "completion": "[]", "text": "b"},
        {"instruction": "a", "input": "[]", "output": "{}"},
    ]
    talk, pair, task = read_examples(write_rows(tmp_path / "a.jsonl", rows), ["unused=text"]).train
    assert (talk.messages[1].learnt, pair.answer, task.question) == (True, "[]", "a\n\n[]")
    labelled: list[dict[str, Any]] = [{"text": "a", "label": "[]"}]
    assert read_examples(write_rows(tmp_path / "b.jsonl", labelled)).train[0].label == "[]"


def test_an_answer_that_says_nothing_cannot_be_marked_as_to_be_learnt(tmp_path: Path) -> None:
    row = {"messages": [user("a"), {**assistant(""), "weight": 1}, user("b"), assistant("good")]}
    assert one_problem(tmp_path, row).startswith("2: messages[1].content: an empty answer")


def test_what_follows_the_last_answer_to_learn_is_left_out(tmp_path: Path) -> None:
    turns = [user("a"), assistant("good"), user("b"), {**assistant("bad"), "weight": 0}]
    (example,) = read_examples(write_rows(tmp_path / "a.jsonl", [{"messages": turns}])).train
    assert example.answer == "good"


def test_the_digest_tells_apart_what_is_learnt_and_that_of_before_is_known(tmp_path: Path) -> None:
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    marked = [user("a"), {**assistant("b"), "weight": 0}, user("c"), assistant("d")]
    whole, part = (
        read_examples(write_rows(tmp_path / f"{i}.jsonl", [{"messages": one}])) for i, one in enumerate((turns, marked))
    )
    assert whole.digest() != part.digest()
    # As runs have it that began before messages had marks:
    before = "9e9467df8e32ef73b02cb126c7f2936564985b7bc66693a15f4290a5da8b6d33"
    assert whole.has_digest(before) and not part.has_digest(before)


def test_columns_are_joined_by_a_template(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('Subject,Body,Team,Reply,n\nWhere?,"{It} is lost.",IT,Here.,3\n', encoding="utf-8")
    given = [r"prompt={Subject}\n\n{Body}", r"completion=Team: {Team}\n{Reply}\\n {{{n}}}", "unused=x"]
    (example,) = read_examples(tmp_path / "a.csv", given).train
    assert (example.question, example.answer) == ("Where?\n\n{It} is lost.", "Team: IT\nHere.\\n {3}")
    assert example.extra == ()


def test_a_column_may_be_joined_and_be_a_field_too(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"q": "Where?", "Team": "IT", "Reply": "Here."}])
    given = ["prompt={Team}: {q}", "completion={Reply} ({Team})", "group=Team"]
    (example,) = read_examples(path, given).train
    assert (example.question, example.answer, example.group) == ("IT: Where?", "Here. (IT)", "IT")


def test_a_row_in_which_a_joined_column_is_empty_is_a_problem_of_that_row(tmp_path: Path) -> None:
    rows: list[dict[str, object]] = [{"prompt": "Where?", "Team": "IT", "Reply": "Here."}]
    rows += [{**rows[0], "Team": " "}, {"prompt": "Where?", "Reply": "Here."}, {**rows[0], "Reply": ["Here."]}]
    path, given = write_rows(tmp_path / "a.jsonl", rows), ["completion={Team}: {Reply}"]
    with pytest.raises(DataError) as caught:
        read_examples(path, given)
    assert [(p.where.removeprefix(str(path)), p.what) for p in caught.value.problems] == [
        (":2: Team", "empty, and 'completion' is made of it"),
        (":3: Team", "empty, and 'completion' is made of it"),
        (":4: Reply", "a list, and 'completion' is made of it"),
    ]
    assert len(read_examples(path, given, skip_bad=True).train) == 1


@pytest.mark.parametrize(
    ("given", "said"),
    [
        (["completion={Tem}"], r"no column 'Tem': name one of the columns: Reply, Team"),
        (["completion={Team"], "a single '{': write {COLUMN}"),
        (["completion=Team}"], "a single '}'"),
        (["messages={Team}"], "'messages' is no text"),
        (["check={Team}"], "'check' is no text"),
        (["completion={Team}", "completion=Reply"], "'completion' is named twice"),
        (["completion={{Team}}"], "no column '{Team}'"),
    ],
)
def test_a_template_that_cannot_be_is_refused(tmp_path: Path, given: list[str], said: str) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "Where?", "Team": "IT", "Reply": "Here."}])
    with pytest.raises(InputError, match=re.escape(said)):
        read_examples(path, given)


def test_flags_that_are_proposed_for_a_name_with_braces_mean_that_name(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{"prompt": "Where?", "completion": "Here.", "the {mood}": "kind"}])
    with pytest.raises(DataError, match=re.escape("--columns 'unused=the {{mood}}'")):
        read_examples(path)
    assert read_examples(path, ["unused=the {{mood}}"]).train[0].answer == "Here."


def texts(folder: Path, *levels: str) -> Path:
    for level in levels:
        (folder / level).mkdir(parents=True)
        for name in ("Rain", "Old roads"):
            (folder / level / f"{name}-{level[:3].lower()}.txt").write_text(f"{name}, {level}.", encoding="utf-8")
    return folder


def test_folders_of_texts_are_texts_with_a_label(tmp_path: Path) -> None:
    texts(tmp_path, "Adv-Txt", "Ele-Txt")
    (tmp_path / "Ele-Txt" / "notes.pdf").write_bytes(b"%PDF")
    (tmp_path / "Ele-Txt" / ".DS_Store").write_bytes(b"x")
    found = read_examples(tmp_path)
    assert {(e.question, e.label, e.group) for e in found.train} == {
        (f"{name}, {level}.", level, name) for name in ("Rain", "Old roads") for level in ("Adv-Txt", "Ele-Txt")
    }
    assert found.system == "Answer with the label alone: Adv-Txt, Ele-Txt."
    assert found.unread == ("Ele-Txt/notes.pdf",)
    assert "label is the name of its folder (Adv-Txt, Ele-Txt)" in found.notes[0]


NAMED = {  # files, and the texts that they are
    "digits behind": (("A1/topic1-A1", "B1/topic1-B1"), {"topic1"}),
    "in front": (("A1/A1_topic1", "B1/B1_topic1", "A1/A1_topic2"), {"topic1", "topic2"}),
    "in two words": (("level 1/Old roads level 1", "level 2/Old roads level_2"), {"Old roads"}),
    "in part": (("Ele-Txt/Rain-ele", "Adv-Txt/Rain-adv-txt", "Adv-Txt/Rain"), {"Rain"}),
    "numbers of texts": (("1/topic-1", "1/topic-2", "2/topic-1", "2/topic-2"), {"topic-1", "topic-2"}),
    "articles": (("Advanced/A fire", "Basic/A fire", "Advanced/A rain", "Basic/A rain"), {"A fire", "A rain"}),
}


@pytest.mark.parametrize(("files", "known"), NAMED.values(), ids=NAMED)
def test_one_text_at_several_levels_is_one_group_however_files_name_the_level(
    tmp_path: Path, files: tuple[str, ...], known: set[str]
) -> None:
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / f"{name}.txt").write_text(f"The text {name}.", encoding="utf-8")
    assert {example.group for example in read_examples(tmp_path).train} == known


def test_one_text_is_one_group_across_splits_too(tmp_path: Path) -> None:
    for name in ("train/A1/sun-A1", "train/B1/rain-B1", "test/A1/rain-A1", "test/B1/sun-B1"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / f"{name}.txt").write_text(f"The text {name}.", encoding="utf-8")
    found = read_examples(tmp_path)
    assert {e.group for e in found.train} == {e.group for e in found.test} == {"sun", "rain"}


def test_what_an_unzipped_folder_holds_beside_its_levels_is_left_out_and_named(tmp_path: Path) -> None:
    for level in ("Adv", "Ele"):
        (tmp_path / level).mkdir()
        (tmp_path / level / "Rain.TXT").write_text(f"Rain, {level}.", encoding="utf-8")
    (tmp_path / "__MACOSX" / "Adv").mkdir(parents=True)
    (tmp_path / "__MACOSX" / "Adv" / "._Rain.TXT").write_bytes(b"x")
    for name in ("empty", "pictures"):
        (tmp_path / name).mkdir()
    (tmp_path / "pictures" / "rain.png").write_bytes(b"x")
    for name in ("about.txt", "index.csv"):
        (tmp_path / name).write_text("about,these\n", encoding="utf-8")
    found = read_examples(tmp_path)
    assert {(e.label, e.group) for e in found.train} == {("Adv", "Rain"), ("Ele", "Rain")}
    assert found.unread == ("__MACOSX/", "about.txt", "empty/", "index.csv", "pictures/")


EXAMPLES = {
    "a table": {"mails.csv": "prompt,completion\nWhere?,Here.\n"},
    "columns of other names": {"mails.csv": "Question,Answer\nWhere?,Here.\n"},
    "two files": dict.fromkeys(("old.jsonl", "new.jsonl"), '{"prompt": "Where?", "completion": "Here."}\n'),
}


@pytest.mark.parametrize("held", EXAMPLES.values(), ids=EXAMPLES)
def test_examples_beside_folders_of_texts_are_not_left_out_for_the_texts(tmp_path: Path, held: dict[str, str]) -> None:
    texts(tmp_path, "docs", "notes")
    for name, text in held.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    (problem,) = problems_of(tmp_path)
    given = " or ".join(str(tmp_path / name) for name in sorted(held))
    assert f"next to folders of texts: give {given}; or take {', '.join(sorted(held))} out" in problem
    for name in held:
        (tmp_path / name).unlink()
    assert {example.label for example in read_examples(tmp_path).train} == {"docs", "notes"}


class Heard(Unheard):
    def __init__(self) -> None:
        self.said: list[str] = []

    def say(self, text: str) -> None:
        self.said.append(text)


def test_how_a_folder_is_taken_is_told_alike_for_training_and_for_scores(tmp_path: Path) -> None:
    written(tmp_path, *(f"{level}/{topic}.txt" for level in ("neg", "pos") for topic in "abcdefgh"), "pos/notes.pdf")
    trained, scored = Heard(), Heard()
    prepare(str(tmp_path), TrainSettings(), trained)
    choose(str(tmp_path), "train", TrainSettings(), scored)
    unread, note = scored.said
    assert unread.startswith("not read: pos/notes.pdf: a folder") and "the name of its folder (neg, pos)" in note
    assert trained.said[:2] == scored.said


def test_one_file_below_the_home_folder_is_scored_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    write_rows(tmp_path / "more.jsonl", [GOOD] * 3)
    assert len(choose("~/more.jsonl", "test", TrainSettings(), Unheard()).split) == 3


def test_the_builtin_data_are_scored_by_split_whatever_a_file_is_called(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    write_rows(tmp_path / "builtin", [GOOD])
    assert choose("builtin", "test", TrainSettings(), Unheard()).split == read_examples("builtin").test


def test_texts_of_a_folder_with_fewer_in_folders_are_read_and_the_folders_named(tmp_path: Path) -> None:
    for name in ("one.TXT", "two.TXT", "three.TXT", "old/one.txt", "older/one.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(name, encoding="utf-8")
    found = read_examples(tmp_path)
    assert ({e.group for e in found.train}, found.unread) == ({"one.TXT", "two.TXT", "three.TXT"}, ("old/", "older/"))


def test_texts_with_dots_in_their_names_are_read(tmp_path: Path) -> None:
    names = ("Mr. Hill.txt", "no. 7.v2.TXT", "rain.txt")
    flat = read_examples(written(tmp_path / "flat", *names, "readme.en.txt", ".hidden.txt"))
    split = read_examples(written(tmp_path / "split", *(f"train/{name}" for name in names)))
    assert {e.group for e in flat.train} == {e.group for e in split.train} == set(names)


def test_a_file_with_a_dot_in_its_name_is_told_where_it_is_not_read(tmp_path: Path) -> None:
    write_rows(tmp_path / "train.v2.jsonl", [GOOD])
    with pytest.raises(DataError, match=r"give that file, .*train\.v2\.jsonl, or call it train\.jsonl$"):
        read_examples(tmp_path)
    write_rows(tmp_path / "train.jsonl", [GOOD])
    assert read_examples(tmp_path).unread == ("train.v2.jsonl",)


def test_every_folder_beside_texts_is_told_as_not_read(tmp_path: Path) -> None:
    written(tmp_path, "one.txt", "two.txt", "pictures/rain.png")
    (tmp_path / "more").mkdir()
    write_rows(tmp_path / "more" / "train.jsonl", [GOOD])
    assert read_examples(tmp_path).unread == ("more/", "pictures/")


def test_a_file_beside_a_folder_of_texts_is_not_advised_to_be_called_train(tmp_path: Path) -> None:
    (tmp_path / "A1").mkdir()
    for name in ("A1/rain.txt", "about.txt"):
        (tmp_path / name).write_text(name, encoding="utf-8")
    with pytest.raises(DataError, match=f"give that file, {tmp_path / 'about.txt'}, or the folder {tmp_path / 'A1'}$"):
        read_examples(tmp_path)


def test_folders_of_texts_in_folders_of_splits_keep_the_split(tmp_path: Path) -> None:
    texts(tmp_path / "train", "neg", "pos")
    texts(tmp_path / "validation", "neg", "pos")
    texts(tmp_path, "unsup")
    found = read_examples(tmp_path)
    assert (len(found.train), len(found.valid), len(found.test), found.unread) == (4, 4, 0, ("unsup/",))
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "one.txt").write_text("No label.", encoding="utf-8")
    with pytest.raises(DataError, match="or other training file in this folder"):
        read_examples(tmp_path)


def written(folder: Path, *names: str) -> Path:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(f"The text {name}.", encoding="utf-8")
    return folder


@pytest.mark.parametrize("names", [("a.txt",), ("neg/a.txt", "pos/a.txt")], ids=["texts", "labels"])
@pytest.mark.parametrize(
    ("one", "other", "split"), [("Train", "train", "train"), ("dev", "val", "valid"), ("TEST", "test", "test")]
)
def test_two_folders_of_one_split_are_refused(
    tmp_path: Path, one: str, other: str, split: str, names: tuple[str, ...]
) -> None:
    written(tmp_path, *(f"{folder}/{name}" for folder in ("train", one, other) for name in names))
    (problem,) = problems_of(tmp_path)
    assert problem == f"{tmp_path}: two {split} folders: {one}, {other}: leave one of them"


@pytest.mark.parametrize("names", [("a.txt",), ("neg/a.txt", "pos/a.txt")], ids=["texts", "labels"])
def test_the_folder_of_our_name_stands_before_that_of_others(tmp_path: Path, names: tuple[str, ...]) -> None:
    folders = ("train", "training", "valid", "validation")
    written(tmp_path, *(f"{folder}/{name}" for folder in folders for name in names))
    found = read_examples(tmp_path)
    where = {Path(e.where).relative_to(tmp_path).parts[0] for e in (*found.train, *found.valid)}
    assert (where, found.unread) == ({"train", "valid"}, ("training/", "validation/"))


def test_texts_whose_endings_are_written_large_are_texts(tmp_path: Path) -> None:
    found = read_examples(written(tmp_path / "splits", "Train/A.TXT", "Train/B.txt", "test/C.Txt"))
    assert [e.group for e in (*found.train, *found.test)] == ["A.TXT", "B.txt", "C.Txt"]
    assert {e.label for e in read_examples(written(tmp_path / "levels", "1/a.TXT", "two/b.TXT")).train} == {"1", "two"}


def test_what_tells_of_a_folder_of_texts_is_none_of_them(tmp_path: Path) -> None:
    found = read_examples(written(tmp_path, "neg/a.txt", "pos/b.txt", "pos/README.txt", "pos/dataset_info.json"))
    assert [Path(e.where).name for e in found.train] == ["a.txt:1", "b.txt:1"]
    assert found.unread == ("pos/README.txt", "pos/dataset_info.json")


@pytest.mark.parametrize("file", ["Ele-Txt/rows.jsonl", "more/rows.csv"])
def test_folders_that_hold_more_than_texts_are_no_labels(tmp_path: Path, file: str) -> None:
    texts(tmp_path, "Adv-Txt", "Ele-Txt")
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text("{}", encoding="utf-8")
    with pytest.raises(DataError, match="give a folder or file further down"):
        read_examples(tmp_path)
