"""Every kind of file and every form of row becomes the same examples; what cannot is named with its place."""

from __future__ import annotations

import gzip
import json
import shlex
from datetime import date, datetime
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
import torch
from conftest import byte_tokenizer

from lorafit.bases.base import Base
from lorafit.data.checks import is_right
from lorafit.data.examples import Examples
from lorafit.data.readers import PIECE
from lorafit.data.reading import read_examples
from lorafit.data.render import Renderer, render
from lorafit.data.split import require_apart
from lorafit.errors import DataError, Problem, SettingsError
from lorafit.tasks.runner import Runner

ROWS = [
    {"prompt": "Where, exactly?", "completion": 'In "Skerrow".'},
    {"prompt": "Since\nwhen?", "completion": "1931; June."},
]


def asked(examples: Examples) -> list[tuple[str, str]]:
    return [(example.question, example.answer) for example in examples.train]


WANTED = [(str(row["prompt"]), str(row["completion"])) for row in ROWS]


def csv_text(delimiter: str) -> str:
    quoted = [['"' + value.replace('"', '""') + '"' for value in row.values()] for row in ROWS]
    return "\n".join(delimiter.join(cells) for cells in (["prompt", "completion"], *quoted)) + "\n"


def parquet(path: Path, rows: list[dict[str, Any]]) -> None:
    arrow, tables = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    tables.write_table(arrow.Table.from_pylist(rows), path)


def write(path: Path) -> Path:
    ending = path.name.partition(".")[2]
    if ending == "parquet":
        parquet(path, ROWS)
        return path
    lines = "".join(json.dumps(row) + "\n" for row in ROWS)
    text = {
        "jsonl": lines,
        "ndjson": lines,
        "json": json.dumps(ROWS, indent=2),
        "lines.json": lines,
        "csv": csv_text(","),
        "excel.csv": csv_text(";").replace("\n", "\r\n"),
        "tabs.csv": csv_text("\t"),
        "tsv": csv_text("\t"),
    }[ending.removesuffix(".gz")]
    raw = text.encode("utf-8-sig" if ending == "excel.csv" else "utf-8")
    path.write_bytes(gzip.compress(raw) if ending.endswith(".gz") else raw)
    return path


@pytest.mark.parametrize(
    "ending",
    ["jsonl", "ndjson", "json", "lines.json", "csv", "excel.csv", "tabs.csv", "tsv", "parquet", "jsonl.gz", "csv.gz"],
)
def test_every_kind_of_file_gives_the_same_examples(tmp_path: Path, ending: str) -> None:
    found = asked(read_examples(write(tmp_path / f"a.{ending}")))
    assert [(q.replace("\r\n", "\n"), a) for q, a in found] == WANTED


FORMS: dict[str, dict[str, Any]] = {
    "messages": {"messages": [{"role": "user", "content": "Q"}, {"role": "assistant", "content": "A"}]},
    "sharegpt": {"conversations": [{"from": "human", "value": "Q"}, {"from": "gpt", "value": "A"}]},
    "pair": {"prompt": "Q", "completion": "A"},
    "alpaca": {"instruction": "Q", "output": "A"},
    "alpaca with an empty input": {"instruction": "Q", "input": "", "output": "A"},
}


@pytest.mark.parametrize("form", FORMS)
def test_every_form_of_row_gives_the_same_example(tmp_path: Path, form: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps(FORMS[form]), encoding="utf-8")
    assert asked(read_examples(tmp_path / "a.jsonl")) == [("Q", "A")]


def test_the_input_of_alpaca_follows_its_instruction(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(
        '{"instruction": "Translate.", "input": "chat", "output": "cat"}', encoding="utf-8"
    )
    assert asked(read_examples(tmp_path / "a.jsonl")) == [("Translate.\n\nchat", "cat")]


def test_columns_of_other_names_are_named(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("Frage,Antwort,Nr\nWo?,Da.,7\n", encoding="utf-8")
    examples = read_examples(tmp_path / "a.csv", ["prompt=Frage", "completion=Antwort"])
    assert (asked(examples), examples.train[0].extra) == ([("Wo?", "Da.")], ("Nr",))
    with pytest.raises(DataError, match=r"no column 'Fraga': name one of the columns: Antwort, Frage, Nr"):
        read_examples(tmp_path / "a.csv", ["prompt=Fraga", "completion=Antwort"])
    with pytest.raises(DataError, match=r"a\.csv:2: not a known form .*--columns prompt="):
        read_examples(tmp_path / "a.csv")
    with pytest.raises(SettingsError, match="write FIELD=COLUMN"):
        read_examples(tmp_path / "a.csv", ["question=Frage"])


BROKEN = {
    "short row": (
        "a.csv",
        b"prompt;completion;id\nQ;A;1\nQ;A\n",
        r"a\.csv:3: 2 cells under 3 columns: cells are missing .*';'",
    ),
    "long row": ("a.csv", b"prompt,completion\nQ,A\nQ,A,B\n", r"a\.csv:3: 3 cells under 2 columns: put cells .*','"),
    "rows that end in a comma": (
        "a.csv",
        b"prompt,completion\nQ,A,\nR,B,\n",
        r"a\.csv:2: 3 cells under 2 columns: remove the ',' at its end",
    ),
    "a comment among rows": (
        "a.csv",
        b"prompt,completion\nQ,A\n# checked, by Ann\nR,B\n",
        r"a\.csv:3: begins with #, as comments do: remove",
    ),
    "a short comment among rows": (
        "a.csv",
        b"prompt,completion\nQ,A\n# checked\nR,B\n",
        r"a\.csv:3: begins with #, as comments do: remove",
    ),
    "a table of Markdown": (
        "a.csv",
        b"| prompt | completion |\n|---|:-:|\n| Q | A |\n",
        r"a\.csv:1: a table as Markdown has it: save it",
    ),
    "a table of Markdown without bars around": (
        "a.csv",
        b"prompt | completion\n--- | ---\nQ | A\n",
        r"a\.csv:1: a table as Markdown has it: save it",
    ),
    "a table that is called a text": (
        "a.txt",
        b"Question,Answer\nQ,A\nR,B\n",
        r"a\.txt: a table in a file that is called plain text: rename .* a\.csv",
    ),
    "a table of tabs that is called a text": (
        "a.txt",
        b"id\ttext\tlabel\n1\tQ\tA\n\n2\tR\tB\n",
        r"a\.txt: a table .*: rename it to a\.tsv",
    ),
    "a title": (
        "a.csv",
        b"Questions of May\nprompt,completion\nQ,A\n",
        r"a\.csv:2: 2 cells under 1 column: if the first line, 'Questions of May', is a title, remove it",
    ),
    "the header again": (
        "a.csv",
        b"prompt,completion\nQ,A\n\xef\xbb\xbfprompt,completion\nQ,A\n",
        r"a\.csv:3: the header once more: remove the line",
    ),
    "lines of JSON": (
        "a.csv",
        b'{"prompt": "Q", "completion": "A"}\n',
        r"a\.csv: JSON in .* a table: rename it to a\.jsonl",
    ),
    "a list of JSON": ("a.tsv", b'[{"prompt": "Q", "completion": "A"}]', r"a\.tsv: JSON in .*: rename it to a\.jsonl"),
    "glued objects": (
        "a.jsonl",
        b'{"prompt": "Q"}{"prompt": "R"}',
        r"a\.jsonl:1: one JSON object after another: put a line",
    ),
    "commas between": ("a.jsonl", b'{"prompt": "Q"},\n{"prompt": "R"}', r"a\.jsonl:1: a comma behind the object"),
    "objects over lines": (
        "a.json",
        b'{\n "prompt": "Q"\n}\n{\n "prompt": "R"\n}',
        r"a\.json:1: JSON objects over several",
    ),
    "Python's print": (
        "a.jsonl",
        b"{'prompt': 'Q', 'completion': None}",
        r"a\.jsonl:1: not JSON, but an object as Python",
    ),
    "after a long cell": ("a.csv", b'prompt,completion\n"Q\n\nQ",A\nx\n', r"a\.csv:row 3, line 5: 1 cells"),
    "open quote": ("a.csv", b'prompt,completion\n"Q,A\n', r"a\.csv:2: not a table"),
    "no names": ("a.csv", b"prompt,\nQ,A\n", r"a\.csv:2: not a known form .*prompt, column 2\): add completion"),
    "names twice": ("a.csv", b"prompt,prompt\nQ,A\n", r"a\.csv:1: two columns are named 'prompt'"),
    "latin-1": ("a.csv", "prompt,completion\nQ,A\nwär,B\n".encode("latin-1"), r"a\.csv:3: not UTF-8.*CSV UTF-8"),
    "utf-16": ("a.csv", "prompt,completion\nQ,A\n".encode("utf-16"), r"a\.csv: UTF-16, not UTF-8"),
    "header alone": ("a.csv", b"prompt,completion\n", r"a\.csv: no examples in it"),
    "cut list": ("a.json", b'[{"prompt": "Q", "completion": "A"},\n', r"a\.json:2: the list is cut off"),
    "one object": ("a.json", b'{\n "train": [["Q", "A"]]\n}', r"a\.json: one JSON object \(its keys: train"),
    "odd list": ("a.json", b'[{"prompt": "Q", "completion": "A"},\n 7]', r"a\.json:row 2: not a JSON object"),
    "damaged parquet": ("a.parquet", b"PAR1 and no more", r"a\.parquet: not parquet, or damaged"),
    "workbook": (
        "a.xlsx",
        b"PK\x03\x04\x14\x00",
        r"a\.xlsx: a workbook, not a csv file: save the sheet as",
    ),
    "archive": ("a.zip", b"PK\x03\x04\x14\x00", r"a\.zip: a zip archive: unpack it"),
    "unknown ending": ("a.neg", b"dull .\nflat .\n", r"a\.neg: unsupported file type \(\.neg\): copy it to a\.txt"),
    "damaged gz": ("a.jsonl.gz", b"\x1f\x8b no", r"a\.jsonl\.gz: cannot be unpacked"),
    "unknown speaker": ("a.jsonl", b'{"conversations": [{"from": "bot", "value": "x"}]}', r"conversations\[0\]\.from"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_what_cannot_be_read_is_named_with_its_place(tmp_path: Path, what: str) -> None:
    name, raw, said = BROKEN[what]
    if name.endswith("parquet"):
        pytest.importorskip("pyarrow")
    (tmp_path / name).write_bytes(raw)
    with pytest.raises(DataError, match=said):
        read_examples(tmp_path / name)


def test_a_file_of_another_form_is_one_problem_and_not_one_a_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("utterance,intent\n" + "Hello,greet\n" * 50, encoding="utf-8")
    with pytest.raises(
        DataError, match=r"1 problem in the data\n.*a\.csv: not a known form .*utterance, intent"
    ) as caught:
        read_examples(tmp_path / "a.csv")
    assert len(caught.value.problems) == 1


SAID = {
    "misspelt": ("promt,completion", "--columns prompt=promt"),
    "plural": ("prompt,completions", "--columns completion=completions"),
    "other names": ("id,Question,Answer", "--columns prompt=Question --columns completion=Answer"),
    "labels": ("utterance,intent,category", "--columns text=utterance --columns label=intent"),
    "another language": (
        "Frage,Antwort",
        "--columns completion=Antwort if Frage is what is asked",
    ),
    "half": ("prompt,id,source", "add completion"),
}


@pytest.mark.parametrize(("header", "said"), SAID.values(), ids=SAID)
def test_columns_of_other_names_are_answered_with_the_flags_to_type(tmp_path: Path, header: str, said: str) -> None:
    (tmp_path / "a.csv").write_text(header + "\n" + ",".join("abc"[: header.count(",") + 1]) + "\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_examples(tmp_path / "a.csv")
    assert said in caught.value.problems[0].fix


def test_fields_one_level_down_are_pointed_at(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"id": 1, "data": {"question": "Q", "answer": "A"}}\n', encoding="utf-8")
    with pytest.raises(DataError, match="write the fields of 'data' into the row itself"):
        read_examples(tmp_path / "a.jsonl")


def test_the_flags_that_are_proposed_work(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("my question,response\nWhere?,Here.\n", encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_examples(tmp_path / "a.csv")
    words = shlex.split(caught.value.problems[0].fix.partition(" if ")[0])
    columns = [words[i + 1] for i, word in enumerate(words) if word == "--columns"]
    assert asked(read_examples(tmp_path / "a.csv", columns)) == [("Where?", "Here.")]


def test_below_cells_of_several_lines_a_place_says_the_row_too(tmp_path: Path) -> None:
    text = '# of May\nprompt,completion\nQ,A\n"Q\n\nQ",A\n\nQ2,\nQ3,\n"Q4\n'
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_examples(tmp_path / "a.csv")
    places = [problem.where.removeprefix(f"{tmp_path / 'a.csv'}:") for problem in caught.value.problems]
    assert places == ["row 6, line 8: completion", "row 7, line 9: completion", "row 8, line 10"]
    assert f"{tmp_path / 'a.csv'}:row 6, line 8: completion: an empty answer" in str(caught.value)
    assert "(also at row 7, line 9)" in str(caught.value)


def test_rows_below_cells_of_several_lines_can_be_left_out(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text('prompt,completion\n"Q\nQ",A\nQ2,\nQ3,C\n', encoding="utf-8")
    examples = read_examples(tmp_path / "a.csv", skip_bad=True)
    places = [example.where.removeprefix(f"{tmp_path / 'a.csv'}:") for example in examples.train]
    assert places == ["2", "row 4, line 5"]
    left = examples.without([Problem(f"{examples.train[1].where}: check", "", "")])
    assert left.train == examples.train[:1]


def test_bad_rows_are_left_out_when_asked_and_kept_by_line(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion\nQ,A\nQ2,\nQ3,C\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"a\.csv:3: completion: an empty answer"):
        read_examples(tmp_path / "a.csv")
    examples = read_examples(tmp_path / "a.csv", skip_bad=True)
    assert asked(examples) == [("Q", "A"), ("Q3", "C")]
    assert [problem.where for problem in examples.skipped] == [f"{tmp_path / 'a.csv'}:3: completion"]
    (tmp_path / "b.csv").write_text("prompt,completion\nQ2,\n", encoding="utf-8")
    with pytest.raises(DataError):
        read_examples(tmp_path / "b.csv", skip_bad=True)


def test_a_test_split_of_which_no_row_can_be_used_is_left_out_and_told(tmp_path: Path) -> None:
    for name, labels in {"train": ["dull", "fair", None], "validation": ["fair"], "test": [None, None]}.items():
        rows = "".join(json.dumps({"text": f"Film {i}.", "label": label}) + "\n" for i, label in enumerate(labels))
        (tmp_path / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    with pytest.raises(DataError, match=r"test\.jsonl:1: label: missing.*leave the row out \(--skip-bad\)"):
        read_examples(tmp_path)
    found = read_examples(tmp_path, skip_bad=True)
    assert [len(split) for split in found.by_name().values()] == [2, 1, 0]
    assert (len(found.skipped), found.notes) == (3, ("no row of test can be used: the split is left out",))


@pytest.mark.parametrize("skip_bad", [False, True])
def test_no_flag_is_proposed_that_would_leave_no_row(tmp_path: Path, skip_bad: bool) -> None:
    (tmp_path / "a.csv").write_text("prompt,completion,label\nQ,A,false\nQ2,A2,false\n", encoding="utf-8")
    with pytest.raises(DataError, match=r"leave this one out \(--skip-bad would leave no row\)"):
        read_examples(tmp_path / "a.csv", skip_bad=skip_bad)
    (tmp_path / "a.csv").write_text("prompt,completion,label\nQ,A,false\nQ2,A2,true\n", encoding="utf-8")
    assert len(read_examples(tmp_path / "a.csv", skip_bad=True).train) == 1


def test_a_folder_may_hold_any_kind_and_no_two_for_one_split(tmp_path: Path) -> None:
    write(tmp_path / "train.csv")
    write(tmp_path / "test.jsonl.gz")
    assert len(read_examples(tmp_path).test) == 2
    write(tmp_path / "train.json")
    with pytest.raises(DataError, match=r"two train files: train\.csv, train\.json"):
        read_examples(tmp_path)


def test_a_folder_of_text_files_is_read_whole_and_each_text_is_a_group(tmp_path: Path) -> None:
    for name in ("one.txt", "two.txt", "README.txt"):
        (tmp_path / name).write_text(f"{name}\n\n" + "word " * PIECE, encoding="utf-8")
    examples = read_examples(tmp_path)
    assert {example.group for example in examples.train} == {"one.txt", "two.txt"}
    (tmp_path / "valid.txt").write_text("held out", encoding="utf-8")
    with pytest.raises(DataError, match=r"no train\.jsonl .*: name the files train, valid and test"):
        read_examples(tmp_path)


NO_DATA = {
    "a base": ({"config.json": "{}"}, "a base, not examples: give the base first"),
    "an adapter": ({"adapter_config.json": "{}"}, "an adapter, not examples"),
    "a run": ({"run.json": "{}"}, "a run, not examples"),
    "one file": ({"input.txt": "x", "LICENSE.txt": "y"}, r"give that file, .*input\.txt, or call it train\.txt"),
    "an archive": ({"set.zip": "PK"}, "unpack set.zip"),
    "nothing": ({}, "it holds nothing"),
    "one file, packed": ({"dev.jsonl.gz": "x"}, r"or call it train\.jsonl\.gz"),
    "saved by datasets": ({"dataset_dict.json": "{}"}, r"load_from_disk\(FOLDER\)\[SPLIT\]\.to_json"),
    "two of one meaning": (
        {"train.jsonl": "x", "val.jsonl": "x", "dev.jsonl": "x"},
        r"two valid files: val\.jsonl, dev",
    ),
}


@pytest.mark.parametrize(("held", "said"), NO_DATA.values(), ids=NO_DATA)
def test_a_folder_that_is_no_data_is_told_what_it_is(tmp_path: Path, held: dict[str, str], said: str) -> None:
    for name, text in held.items():
        (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        read_examples(tmp_path)


def test_a_near_name_is_proposed_for_a_path_that_is_not_there(tmp_path: Path) -> None:
    path = write(tmp_path / "questions.jsonl")
    with pytest.raises(DataError, match=f"there is no such file: did you mean {path}"):
        read_examples(tmp_path / "question.jsonl")


def test_a_text_without_blank_lines_is_cut_at_lines(tmp_path: Path) -> None:
    lines = [f"{i} " + "word " * 20 for i in range(200)]
    (tmp_path / "a.txt").write_text("\n".join(lines), encoding="utf-8")
    examples = read_examples(tmp_path / "a.txt").train
    assert max(len(example.answer) for example in examples) < 2.2 * PIECE
    assert "\n".join(example.answer for example in examples).split() == " ".join(lines).split()


def test_labels_are_answers_of_which_the_system_prompt_tells(tmp_path: Path) -> None:
    rows = [{"text": "Lovely.", "label": "good"}, {"text": "Dull.", "label": "not good"}]
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    examples = read_examples(tmp_path / "a.jsonl")
    assert asked(examples) == [("Lovely.", "good"), ("Dull.", "not good")]
    assert examples.system == "Answer with the label alone: good, not good."
    good = examples.train[0].check
    assert good is not None
    assert [is_right(text, good) for text in ("good", "Good.", "not good", "It is good")] == [True, True, False, False]


LABELS = ("toxic non-toxic", "1 -1", "5 5%", "A A+ A-", "C C++ C#", "billing billing-late", "a/b a b", "x. x.y")


@pytest.mark.parametrize("named", LABELS)
def test_no_label_is_right_where_another_one_is(tmp_path: Path, named: str) -> None:
    labels = named.split()
    table = "text,label\n" + "".join(f"text {i},{label}\n" for i, label in enumerate(labels))
    (tmp_path / "a.csv").write_text(table, encoding="utf-8")
    for example in read_examples(tmp_path / "a.csv").train:
        assert example.check is not None
        assert [one for one in labels if is_right(one, example.check)] == [example.answer]


# Plain text


def test_a_text_file_becomes_pieces_of_whole_paragraphs(tmp_path: Path) -> None:
    paragraphs = [f"{i} " + "word " * 60 for i in range(40)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    examples = read_examples(tmp_path / "a.txt")
    assert "\n\n".join(e.answer for e in examples.train).split() == " ".join(paragraphs).split()
    assert all(len(e.answer) < 2 * PIECE for e in examples.train)
    lines = (tmp_path / "a.txt").read_text(encoding="utf-8").split("\n")
    assert all(e.answer.startswith(lines[int(e.where.rpartition(":")[2]) - 1].strip()) for e in examples.train)
    require_apart(Examples(examples.train))


def test_of_plain_text_every_token_is_predicted_once(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "abcdefghijklmnopqrstuvwxyz"}), encoding="utf-8")
    renderer = Renderer(byte_tokenizer())
    whole = render(renderer, read_examples(tmp_path / "a.jsonl").train, 100)[0]
    rows = render(renderer, read_examples(tmp_path / "a.jsonl").train, 8)
    assert len(rows) > 3
    assert max(len(row.ids) for row in rows) == 8
    predicted = [i for row in rows for i, trained in zip(row.ids, row.trained, strict=True) if trained]
    assert predicted == list(whole.ids[1:])
    assert whole.ids[-1] == renderer.stop_ids[0]


def test_plain_text_has_a_mean_nll(tiny_base: Base, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("Once upon a time there was a pair of matrices.", encoding="utf-8")
    rows = render(Renderer(tiny_base.tokenizer), read_examples(tmp_path / "a.txt").train, 16)
    (nll,) = Runner.of(tiny_base, rows).nll(rows)
    assert torch.isfinite(torch.tensor(nll))


FOUND = [{"prompt": "Where?", "completion": "Here."}]


def test_a_column_that_is_named_stands_before_one_that_has_the_name(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("q,a,prompt\nWhere?,Here.,x0\n", encoding="utf-8")
    assert asked(read_examples(tmp_path / "a.csv", ["prompt=q", "completion=a"])) == [("Where?", "Here.")]


@pytest.mark.parametrize("columns", [["prompt=q", "prompt=a"], ["prompt=q", "completion=q"]])
def test_columns_named_twice_are_refused(tmp_path: Path, columns: list[str]) -> None:
    with pytest.raises(SettingsError, match="is named twice"):
        read_examples(tmp_path / "a.csv", columns)


def test_names_of_splits_may_be_written_large_and_files_that_are_no_split_are_told(tmp_path: Path) -> None:
    for name in ("Train.jsonl", "TEST.JSONL", "train_extra.jsonl"):
        (tmp_path / name).write_text(json.dumps({"prompt": name, "completion": "Here."}), encoding="utf-8")
    found = read_examples(tmp_path)
    assert [[e.question for e in split] for split in found.by_name().values()] == [["Train.jsonl"], [], ["TEST.JSONL"]]
    assert found.unread == ("train_extra.jsonl",)


def test_parts_of_a_split_are_one(tmp_path: Path) -> None:
    for i in range(2):
        name = f"train-0000{i}-of-00002.jsonl"
        (tmp_path / name).write_text(json.dumps({"prompt": f"{i}", "completion": "Here."}), encoding="utf-8")
    assert [e.question for e in read_examples(tmp_path).train] == ["0", "1"]


BAD_FILES = {
    "another form": ("test.csv", "q,a\n" + "Where?,Here.\n" * 3),
    "an open quote": ("test.csv", 'prompt,completion\na,b\n"Where?,Here.\n'),
    "a list cut off": ("test.json", json.dumps(FOUND * 3)[:-2]),
}


@pytest.mark.parametrize(("name", "text"), BAD_FILES.values(), ids=BAD_FILES)
def test_a_bad_file_is_not_a_bad_row_that_can_be_skipped(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / "train.jsonl").write_text(json.dumps(FOUND[0]), encoding="utf-8")
    (tmp_path / name).write_text(text, encoding="utf-8")
    with pytest.raises(DataError):
        read_examples(tmp_path, skip_bad=True)


@pytest.mark.parametrize("indent", [None, 1])
def test_every_row_of_a_list_has_a_place_of_its_own(tmp_path: Path, indent: int | None) -> None:
    rows = [*FOUND * 3, {"prompt": "Where?", "completion": ""}]
    (tmp_path / "a.json").write_text(json.dumps(rows, indent=indent), encoding="utf-8")
    found = read_examples(tmp_path / "a.json", skip_bad=True)
    assert len(found.train) == len({e.where for e in found.train}) == 3
    assert [problem.where.rpartition("/")[2] for problem in found.skipped] == ["a.json:row 4: completion"]


ODD_JSON = {
    "two lists": ("[{}]\n[{}]", "not JSON"),
    "no comma": ('[{"a": 1} {"a": 2}]', "not JSON"),
    "a number": ("5", "no list of examples but 5"),
    "null": ("null", "no list of examples but null"),
    "objects by name": ('{\n"a": {"b": 1}}', "write the objects under its keys as a list"),
    "a list by name": ('{\n"data": [], "v": 1}', "give 'data', the list in it"),
    "twice": ('[{"prompt": "a", "prompt": "b"}]', "'prompt' stands twice"),
}


@pytest.mark.parametrize(("text", "said"), ODD_JSON.values(), ids=ODD_JSON)
def test_json_that_is_no_list_of_examples_is_refused_whole(tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "a.json").write_text(text, encoding="utf-8")
    with pytest.raises(DataError, match=said):
        read_examples(tmp_path / "a.json")


ODD_TABLES = {
    "capitals": ("a.CSV", "prompt,completion\nWhere?,Here.\n"),
    "a spreadsheet's line": ("a.csv", "sep=;\nprompt;completion\nWhere?;Here.\n"),
    "a column of numbers without a name": ("a.csv", ",prompt,completion\n0,Where?,Here.\n"),
    "quotes that are none": ("a.tsv", 'prompt\tcompletion\tby\nWhere?\tHere.\t"Ann" B\n'),
    "empty cells": ("a.csv", "prompt,completion,group,check\nWhere?,Here.,,\n"),
    "a check in a cell": ("a.csv", 'prompt,completion,check\nWhere?,Here.,"{""contains"": [""here""]}"\n'),
    "line ends of an old machine": ("a.jsonl", json.dumps(FOUND[0]) + "\r" + "\r"),
    "a list in a file of lines": ("a.jsonl", json.dumps(FOUND)),
    "bars": ("a.csv", "prompt|completion\nWhere?|Here.\n"),
    "bars and commas": ("a.csv", "old, id|prompt|completion\n1|Where?|Here.\n"),
    "a comment": ("a.csv", "# by hand, in May, twice\n#\nprompt,completion\nWhere?,Here.\n"),
    "numbered by a sign": ("a.csv", "#,prompt,completion\n1,Where?,Here.\n"),
    "a comma in a quoted name": ("a.csv", '"prompt";"completion";"id, of, all, these"\nWhere?;Here.;\n'),
    "more commas in a name than columns": ("a.csv", "prompt;completion;a, b, c, d\nWhere?;Here.;\n"),
    "blanks before quotes": ("a.csv", 'prompt, completion\n"Where?", "Here."\n'),
    "a mark before a line": ("a.jsonl", "\n\ufeff" + json.dumps(FOUND[0])),
    "a mark in a name": ("a.jsonl", json.dumps({"\ufeffprompt": "Where?", "completion": "\ufeffHere."})),
}


@pytest.mark.parametrize(("name", "text"), ODD_TABLES.values(), ids=ODD_TABLES)
def test_files_as_programs_write_them_are_read(tmp_path: Path, name: str, text: str) -> None:
    (tmp_path / name).write_bytes(text.encode())
    assert asked(read_examples(tmp_path / name)) == [("Where?", "Here.")]


def test_a_system_prompt_of_a_row_is_kept(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({**FOUND[0], "system": "Be brief."}), encoding="utf-8")
    assert [m.role for m in read_examples(tmp_path / "a.jsonl").train[0].messages] == ["system", "user", "assistant"]


@pytest.mark.parametrize(("label", "learnt"), [(True, "true"), (1.0, "1"), (2.5, "2.5"), (3, "3"), (" yes ", "yes")])
def test_labels_of_any_kind_are_learnt_as_text(tmp_path: Path, label: object, learnt: str) -> None:
    (tmp_path / "a.jsonl").write_text(json.dumps({"text": "Well.", "label": label}), encoding="utf-8")
    assert read_examples(tmp_path / "a.jsonl").train[0].answer == learnt


def test_columns_of_times_and_columns_of_one_name_in_parquet(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    good = {"prompt": ["Where?"], "completion": ["Here."]}
    pq.write_table(pa.table({**good, "at": pa.array([1], pa.timestamp("ns"))}), tmp_path / "a.parquet")
    assert asked(read_examples(tmp_path / "a.parquet")) == [("Where?", "Here.")]
    pq.write_table(pa.Table.from_arrays([pa.array(["a"])] * 2, ["prompt", "prompt"]), tmp_path / "b.parquet")
    with pytest.raises(DataError, match="two columns are named 'prompt'"):
        read_examples(tmp_path / "b.parquet")


def test_columns_that_json_does_not_know_are_passed_over_or_named_like_any_other(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", [{**ROWS[0], "date": date(2031, 5, 9), "paid": Decimal("12.50")}])
    with pytest.raises(DataError, match="nothing reads 'paid'"):
        read_examples(tmp_path / "a.parquet")
    assert read_examples(tmp_path / "a.parquet", ["unused=paid"]).train[0].extra == ("date",)


def test_columns_of_dates_and_amounts_are_joined_as_they_are_written(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    columns = {
        "prompt": ["When?"],
        "day": pa.array([date(2031, 5, 9)]),
        "sum": pa.array([Decimal("12.50")]),
        "none": pa.array([Decimal("0")], pa.decimal128(20, 10)),
        "at": pa.array([datetime(2031, 5, 9, 14, 30)]),
        "paid": [True],
        "n": [3],
        "rate": [0.5],
        "raw": [b"GIF"],
    }
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    unused = ["unused=raw"]
    (example,) = read_examples(
        tmp_path / "a.parquet", ["completion={day}: {sum}, {none}, {at}, {paid}, {n}, {rate}", *unused]
    ).train
    assert example.answer == "2031-05-09: 12.50, 0.0000000000, 2031-05-09 14:30:00, true, 3, 0.5"
    given = ["completion={raw}", *(f"unused={name}" for name in columns if name not in ("prompt", "raw"))]
    with pytest.raises(DataError, match="bytes, and 'completion' is made of it: name a column of text or numbers"):
        read_examples(tmp_path / "a.parquet", given)


def test_a_text_without_line_breaks_is_cut_where_sentences_end(tmp_path: Path) -> None:
    text = " ".join(f"This is sentence number {i} of a long line." for i in range(400))
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    pieces = [e.answer for e in read_examples(tmp_path / "a.txt").train]
    assert len(pieces) > 3
    assert all(piece.endswith("line.") for piece in pieces)
    assert " ".join(pieces) == text


def test_json_lines_are_not_learnt_as_plain_text(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(json.dumps(FOUND[0]), encoding="utf-8")
    with pytest.raises(DataError, match=r"rename it to a\.jsonl"):
        read_examples(tmp_path / "a.txt")


def test_a_table_of_tabs_whose_quotes_span_rows_loses_none(tmp_path: Path) -> None:
    rows = ["prompt\tcompletion", 'q1\t"So it begins', "q2\tmiddle", 'q3\tthen it ends"', "q4\tx"]
    (tmp_path / "a.tsv").write_text("\n".join(rows), encoding="utf-8")
    assert [q for q, _ in asked(read_examples(tmp_path / "a.tsv"))] == ["q1", "q2", "q3", "q4"]


def test_missing_parts_of_a_split_are_named(tmp_path: Path) -> None:
    (tmp_path / "train-00000-of-00003-a09b74b3ef9c3b56.jsonl").write_text(json.dumps(FOUND[0]), encoding="utf-8")
    with pytest.raises(DataError, match="1 of the 3 parts of train are here"):
        read_examples(tmp_path)


@pytest.mark.parametrize("label", ["NaN", "1e999"])
def test_a_label_that_is_no_number_is_refused(tmp_path: Path, label: str) -> None:
    (tmp_path / "a.jsonl").write_text(f'{{"text": "good film", "label": {label}}}', encoding="utf-8")
    with pytest.raises(DataError, match="label: not a label"):
        read_examples(tmp_path / "a.jsonl")


def test_pieces_of_one_line_have_places_of_their_own(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("This is a sentence of a long line. " * 500, encoding="utf-8")
    places = [e.where for e in read_examples(tmp_path / "a.txt").train]
    assert len(set(places)) == len(places) > 3


COLUMNS_SAID = {
    '{"message": "hi", "label": "ham"}': "--columns text=message",
    '{"input": "a", "output": "b"}': "--columns prompt=input --columns completion=output",
    '{"instruction": "a", "response": "b"}': "--columns output=response",
}


@pytest.mark.parametrize(("row", "said"), COLUMNS_SAID.items())
def test_the_advice_for_common_names_can_be_followed(tmp_path: Path, row: str, said: str) -> None:
    (tmp_path / "a.jsonl").write_text(row, encoding="utf-8")
    with pytest.raises(DataError) as caught:
        read_examples(tmp_path / "a.jsonl")
    assert said in caught.value.problems[0].fix
    assert read_examples(tmp_path / "a.jsonl", [word for word in said.split() if "=" in word]).train


CRLF = {
    "csv": 'prompt,completion\r\n"Where?\r\nSay.","Here.\r\n\r\nThere."\r\n',
    "csv of an old machine": 'prompt,completion\r"Where?\rSay.","Here.\r\rThere."\r',
    "jsonl": json.dumps({"prompt": "Where?\r\nSay.", "completion": "Here.\r\n\r\nThere."}),
    "jsonl translated twice": json.dumps({"prompt": "Where?\r\r\nSay.", "completion": "Here.\r\r\n\r\r\nThere."}),
    "json": json.dumps(
        [
            {
                "messages": [
                    {"role": "user", "content": "Where?\rSay."},
                    {"role": "assistant", "content": "Here.\r\n\nThere."},
                ]
            }
        ]
    ),
}


@pytest.mark.parametrize("kind", CRLF)
def test_lines_within_a_text_end_in_one_way(tmp_path: Path, kind: str) -> None:
    path = tmp_path / f"a.{kind.partition(' ')[0]}"
    path.write_bytes(CRLF[kind].encode())
    assert asked(read_examples(path)) == [("Where?\nSay.", "Here.\n\nThere.")]


def test_lines_within_a_cell_of_parquet_end_in_one_way(tmp_path: Path) -> None:
    parquet(tmp_path / "a.parquet", [{"prompt": "Where?", "completion": "Here.\r\nThere."}])
    assert asked(read_examples(tmp_path / "a.parquet")) == [("Where?", "Here.\nThere.")]


@pytest.mark.parametrize("given", ["", "data"])
def test_a_folder_as_the_hub_has_it(tmp_path: Path, given: str) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "README.md").write_text("A set.", encoding="utf-8")
    for name in ("train", "validation", "test"):
        parquet(tmp_path / "data" / f"{name}-00000-of-00001.parquet", [{"prompt": name, "completion": "Here."}])
    splits = read_examples(tmp_path / given).by_name().values()
    assert [[e.question for e in split] for split in splits] == [["train"], ["validation"], ["test"]]


SPLIT_FOLDERS: dict[str, list[str]] = {
    "numbered": ["train/0000.parquet", "train/0001.parquet", "test/0000.parquet"],
    "in a folder of one configuration": ["default/train/0000.parquet", "default/validation/0000.parquet"],
    "in data": ["data/train/0000.parquet", "data/dev/part.parquet"],
    "parts by name": ["train/train-00000-of-00002.parquet", "train/train-00001-of-00002.parquet", "test/x.parquet"],
}


@pytest.mark.parametrize("names", SPLIT_FOLDERS.values(), ids=SPLIT_FOLDERS)
def test_a_folder_of_each_split_is_that_split(tmp_path: Path, names: list[str]) -> None:
    for name in names:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        parquet(tmp_path / name, [{"prompt": name, "completion": "Here."}])
    found = read_examples(tmp_path)
    trained = [name for name in names if "train/" in name]
    assert [e.question for e in found.train] == trained
    assert [e.question for e in (*found.valid, *found.test)] == [name for name in names if name not in trained]


@pytest.mark.parametrize("meant", ["data", "default"])
def test_examples_in_both_folders_that_the_hub_has_stop_the_run_with_advice_that_works(
    tmp_path: Path, meant: str
) -> None:
    """`default` was passed over, and nobody was told."""
    for name in ("data", "default"):
        (tmp_path / name / "train").mkdir(parents=True)
        parquet(tmp_path / name / "train" / "0000.parquet", [{"prompt": name, "completion": "Here."}])
    with pytest.raises(DataError, match="examples in data/ and default/: give ") as caught:
        read_examples(tmp_path)
    first, _, second = str(caught.value.problems[0].fix).removeprefix("give ").partition(" or ")
    assert [e.question for e in read_examples({"data": first, "default": second}[meant]).train] == [meant]


@pytest.mark.parametrize(("empty", "meant"), [("data", "default"), ("default", "data")])
def test_of_the_folders_that_the_hub_has_the_one_with_examples_is_read_and_the_other_named(
    tmp_path: Path, empty: str, meant: str
) -> None:
    (tmp_path / empty / "raw").mkdir(parents=True)
    (tmp_path / meant).mkdir()
    (tmp_path / meant / "notes.pdf").write_bytes(b"%PDF")
    parquet(tmp_path / meant / "train-00000-of-00001.parquet", ROWS)
    found = read_examples(tmp_path)
    assert (len(found.train), set(found.unread)) == (len(ROWS), {f"{empty}/", f"{meant}/notes.pdf"})


def test_whatever_lies_beside_files_of_splits_is_told_as_not_read(tmp_path: Path) -> None:
    """A sheet with the validation and a folder of more examples were passed over in silence."""
    write(tmp_path / "train.jsonl")
    (tmp_path / "valid.xlsx").write_bytes(b"PK")
    (tmp_path / "README.md").write_text("A set.", encoding="utf-8")
    (tmp_path / "data").mkdir()
    write(tmp_path / "data" / "valid.jsonl")
    assert read_examples(tmp_path).unread == ("data/", "valid.xlsx")


def test_files_of_other_names_in_a_folder_of_a_split_are_not_taken_for_its_parts(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    for name in ("a", "b"):
        write(tmp_path / "train" / f"{name}.jsonl")
    with pytest.raises(DataError, match=r"two train files: a\.jsonl, b\.jsonl"):
        read_examples(tmp_path)


def test_missing_parts_in_a_folder_of_a_split_are_named(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    parquet(tmp_path / "train" / "train-00001-of-00002.parquet", ROWS)
    with pytest.raises(DataError, match="1 of the 2 parts of train are here"):
        read_examples(tmp_path)
    (tmp_path / "train" / "train-00001-of-00002.parquet").unlink()
    parquet(tmp_path / "train" / "0001.parquet", ROWS)
    with pytest.raises(DataError, match=r"train: part 0000 is not here, and 0001\.parquet is"):
        read_examples(tmp_path)


def test_texts_in_folders_of_splits_are_learnt_as_texts(tmp_path: Path) -> None:
    for name in ("train/a.txt", "train/b.txt", "test/c.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(f"A long tale of {name}.", encoding="utf-8")
    found = read_examples(tmp_path)
    assert [e.group for e in (*found.train, *found.test)] == ["a.txt", "b.txt", "c.txt"]
    assert all(e.is_text for e in found.train)


def test_what_else_lies_in_folders_of_splits_is_told(tmp_path: Path) -> None:
    for name in ("train/0000.parquet", "partial-train/0000.parquet"):
        (tmp_path / name).parent.mkdir()
        parquet(tmp_path / name, ROWS)
    assert read_examples(tmp_path).unread == ("partial-train/",)


def test_names_of_labels_in_one_file_and_numbers_in_another_are_refused(tmp_path: Path) -> None:
    for name, labels in {"train": ["dull", "fair"], "test": [0, 1]}.items():
        rows = "".join(json.dumps({"text": f"Film {i}.", "label": label}) + "\n" for i, label in enumerate(labels))
        (tmp_path / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    said = r"test\.jsonl: labels are numbers \(0, 1\), but those of train\.jsonl are names \(dull, fair\): write"
    with pytest.raises(DataError, match=said):
        read_examples(tmp_path, skip_bad=True)


def test_numbers_as_labels_in_every_file_are_labels(tmp_path: Path) -> None:
    for name, labels in {"train": ["1", 2, "other"], "test": [1, 2]}.items():
        rows = "".join(json.dumps({"text": f"Film {i}.", "label": label}) + "\n" for i, label in enumerate(labels))
        (tmp_path / f"{name}.jsonl").write_text(rows, encoding="utf-8")
    assert [e.label for e in read_examples(tmp_path).test] == ["1", "2"]


@pytest.mark.parametrize(
    ("name", "split"), [("dev", "valid"), ("Val", "valid"), ("training", "train"), ("tests", "test")]
)
def test_splits_are_read_by_the_names_of_others(tmp_path: Path, name: str, split: str) -> None:
    for one in {"train", name} - ({"train"} if split == "train" else set()):
        (tmp_path / f"{one}.jsonl").write_text(json.dumps({"prompt": one, "completion": "Here."}), encoding="utf-8")
    assert [e.question for e in read_examples(tmp_path).by_name()[split]] == [name]


def test_our_name_of_a_split_stands_before_that_of_others(tmp_path: Path) -> None:
    for one in ("train", "valid", "validation"):
        (tmp_path / f"{one}.jsonl").write_text(json.dumps({"prompt": one, "completion": "Here."}), encoding="utf-8")
    found = read_examples(tmp_path)
    assert ([e.question for e in found.valid], found.unread) == (["valid"], ("validation.jsonl",))


@pytest.mark.parametrize("kind", ["int64", "double"])
def test_labels_of_parquet_are_learnt_by_their_names(tmp_path: Path, kind: str) -> None:
    pa, pq = pytest.importorskip("pyarrow"), pytest.importorskip("pyarrow.parquet")
    features = {
        "text": {"dtype": "string", "_type": "Value"},
        "label": {"names": ["dull", "fair"], "_type": "ClassLabel"},
    }
    table = pa.table({"text": ["A.", "B.", "C."], "label": pa.array([1, 0, -1]).cast(kind)})
    kept = {"huggingface": json.dumps({"info": {"features": features}})}
    pq.write_table(table.replace_schema_metadata(kept), tmp_path / "a.parquet")
    found = read_examples(tmp_path / "a.parquet", skip_bad=True)
    assert [e.answer for e in found.train] == ["fair", "dull"]
    assert [str(p).partition("a.parquet:")[2] for p in found.skipped] == [
        "row 3: label: missing, where other rows have one: write it, or leave the row out (--skip-bad)"
    ]


COMMENTED = {
    "with as many commas as the header": "# exported on May 5, 2024\nquestion,answer\nQ,A\n",
    "two of them": "# of the desk, in May\n# checked, by Ann\nprompt,completion\nQ,A\n",
}


@pytest.mark.parametrize("text", COMMENTED.values(), ids=COMMENTED)
def test_a_comment_above_a_table_is_no_header(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    columns = ["prompt=question", "completion=answer"] if "question" in text else []
    assert asked(read_examples(tmp_path / "a.csv", columns)) == [("Q", "A")]


NO_COMMENTS = {
    "a header": "#,prompt,completion\n1,Q,A\n",
    "a quoted cell": 'prompt,completion\n"# Q","A"\nR,B\n',
    "a number": "prompt,completion\n#1 of all?,A\nR,B\n",
    "most rows": "prompt,completion\n# Q,A\n# R,B\n# S,C\n",
    "within a cell": 'prompt,completion\n"Q\n# R",A\nS,B\n',
}


@pytest.mark.parametrize("text", NO_COMMENTS.values(), ids=NO_COMMENTS)
def test_what_begins_with_a_hash_may_be_a_cell(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.csv").write_text(text, encoding="utf-8")
    assert len(read_examples(tmp_path / "a.csv").train) == text.count("\n") - 1 - ('R"' in text)


def test_blanks_around_bars_belong_to_no_cell(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("prompt | completion\nWhere, then? | In Skerrow. \n", encoding="utf-8")
    assert asked(read_examples(tmp_path / "a.csv")) == [("Where, then?", "In Skerrow.")]
    (tmp_path / "a.csv").write_text("prompt, completion\nWhere?, Here.\n", encoding="utf-8")
    assert asked(read_examples(tmp_path / "a.csv")) == [("Where?", "Here.")]
    (tmp_path / "a.csv").write_text("prompt,completion\nWhere?, Here.\n", encoding="utf-8")
    assert asked(read_examples(tmp_path / "a.csv")) == [("Where?", " Here.")]


TEXTS = {
    "a tale": "Answer, my heart,\nand say no more.\n",
    "lines of one comma each": "Answer, O heart\nCome, O night\nGo, O day\n",
    "a list": "text\nA long tale.\nAnother.\n",
    "two words": "Question, answer\nand so on, it goes, for ever\n",
}


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_a_text_with_commas_is_no_table(tmp_path: Path, text: str) -> None:
    (tmp_path / "a.txt").write_text(text, encoding="utf-8")
    assert [e.answer for e in read_examples(tmp_path / "a.txt").train] == [text.strip()]


def test_a_long_cell_does_not_hide_the_dialect(tmp_path: Path) -> None:
    rows = ["prompt;completion", *(f'"Where, {i}?\n{"x" * 9000}";"Here; {i}."' for i in range(300))]
    (tmp_path / "a.csv").write_text("\n".join(rows), encoding="utf-8")
    assert asked(read_examples(tmp_path / "a.csv"))[-1][1] == "Here; 299."
