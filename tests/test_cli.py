"""The command line: what it promises on stdout, what it refuses and with which status."""

from __future__ import annotations

import io
import json
import os
import re
import socket
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import typer
from conftest import capitals, write_rows

from lorafit import cli
from lorafit.adapters.formats import peft
from lorafit.cli import main
from lorafit.cli.chat import _typed
from lorafit.cli.console import Terminal
from lorafit.cli.train import conclude
from lorafit.files import whole_folder
from lorafit.jobs import doctor
from lorafit.runs.folder import read_summary
from lorafit.settings import TrainSettings

VERBS = [
    "data",
    "plan",
    "train",
    "eval",
    "show",
    "trim",
    "demo",
    "doctor",
    "bases",
    "chat",
    "settings",
    "report",
    "explain",
]
SCORES = {
    "nll",
    "facts",
    "n_test",
    "off_desk_declined",
    "natural_stops",
    "samples",
    "base_unchanged",
    "counts",
    "format",
}
TRAINED = SCORES | {
    "misread_by_peft",
    "base",
    "base_identity",
    "adapter_dir",
    "n_train",
    "n_valid",
    "test_openings",
    "trained_tokens",
    "trainable_parameters",
    "best_step",
    "steps",
    "validation",
    "seconds",
    "tokens_per_second",
    "dtype",
    "peft",
    "peak_rss_gb",
    "parameters",
    "ladder",
    "forgetting",
    "passed_over",
}
EVALUATED = SCORES | {
    "general",
    "base",
    "adapter_dir",
    "seen_in_training",
    "seen_by_other",
    "against",
    "split",
    "trainable_parameters",
    "dtype",
    "seconds",
    "peak_rss_gb",
}
QUICK = ["--rank", "2", "--epochs", "1", "--validations", "1", "--dtype", "fp32", "--few-shot", "0"]


@dataclass(frozen=True)
class Done:
    status: int
    out: str
    err: str

    @property
    def last_object(self) -> dict[str, Any]:
        """The last line of stdout as JSON."""
        found: dict[str, Any] = json.loads(self.out.splitlines()[-1])
        return found


Lorafit = Callable[..., Done]


@pytest.fixture
def lorafit(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Lorafit:
    """Call the entry point in this process, as the shell would in its own."""

    def call(*words: object) -> Done:
        monkeypatch.setattr(sys, "argv", ["lorafit", *map(str, words)])
        status = 0
        try:
            main()
        except SystemExit as end:
            status = end.code if isinstance(end.code, int) else int(end.code is not None)
        captured = capsys.readouterr()
        return Done(status, captured.out, captured.err)

    return call


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("data") / "capitals.jsonl", capitals())


@dataclass(frozen=True)
class Run:
    folder: Path
    done: subprocess.CompletedProcess[str]


@pytest.fixture(scope="module")
def run(tiny_folder: Path, rows: Path, tmp_path_factory: pytest.TempPathFactory) -> Run:
    """One training run on the tiny base, in a process of its own."""
    folder = tmp_path_factory.mktemp("runs") / "run"
    command = [sys.executable, "-m", "lorafit", "train", str(tiny_folder), str(rows), "--out", str(folder), "--json"]
    threads = {"OMP_NUM_THREADS": "2"}
    done = subprocess.run(
        [*command, *QUICK], capture_output=True, text=True, check=False, env={**os.environ, **threads}
    )
    assert done.returncode == 0, done.stderr
    return Run(folder, done)


def test_verbs_that_share_no_work_among_processes_are_refused_there(
    lorafit: Lorafit, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WORLD_SIZE", "2")  # left by something else: no launch
    assert lorafit("bases").status == 0
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "1")
    for rank, told in (("0", 1), ("1", 0)):
        monkeypatch.setenv("RANK", rank)
        for words in (("bases",), ("train", "base", "data", "--out", "run", "--dry-run")):
            done = lorafit(*words)
            assert done.status == 2
            assert done.err.count("only training shares its work") == told


@pytest.mark.parametrize("verb", VERBS)
def test_every_verb_explains_itself(lorafit: Lorafit, verb: str) -> None:
    done = lorafit(verb, "--help")
    assert (done.status, re.match(rf"\s*Usage: .*lorafit {verb} ", done.out) is not None) == (0, True), done.out


def test_the_help_names_every_verb(lorafit: Lorafit) -> None:
    text = lorafit("--help").out
    assert [verb for verb in VERBS if f"  {verb} " not in text] == []


def test_help_opens_no_heavy_library() -> None:
    code = (
        "import sys\nfrom lorafit.cli import main\n"
        f"for words in {[[], *([verb] for verb in VERBS)]}:\n"
        "    sys.argv = ['lorafit', *words, '--help']\n"
        "    try: main()\n"
        "    except SystemExit as end: assert not end.code\n"
        "print(sorted({'torch', 'transformers', 'numpy', 'safetensors'} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_data_and_mistakes_in_arguments_are_reported_before_a_library_of_weight_is_imported(
    tiny_folder: Path, rows: Path, tmp_path: Path
) -> None:
    (tmp_path / "data.csv").write_text("x", encoding="utf-8")
    wrong = [
        ["data", "nowhere.jsonl"],
        ["data", rows, "--base", "nowhere"],
        ["plan", tiny_folder, "nowhere.jsonl"],
        ["plan", "nowhere", rows],
        ["plan", tiny_folder, rows, "--general", "nowhere.txt"],
        ["plan", tiny_folder, rows, "--picture", rows],
        ["train", tiny_folder, "nowhere.jsonl"],
        ["train", "nowhere", rows],
        ["train", tiny_folder, rows, "--rank", "0"],
        ["train", tiny_folder, rows, "--out", tmp_path],
        ["train", "--resume", "--out", "nowhere"],
        ["eval", "nowhere", rows],
        ["eval", tiny_folder, rows],
        ["eval", "nowhere", rows, "--answers", rows],
        ["chat", "nowhere"],
        ["chat", "--base", "nowhere"],
        ["route", "Where?", "it=nowhere"],
        ["route", "Where?", "--adapters", "nowhere"],
        ["route", "Where?", "--learn", "it=nowhere"],
        ["serve", "nowhere"],
        ["serve", tiny_folder, "it=nowhere"],
        ["report", "nowhere"],
        ["show", "nowhere"],
        ["show", rows],
        ["trim", "nowhere", "--out", "out"],
        ["refine", "nowhere"],
    ]
    code = (
        "import sys\nfrom lorafit.cli import main\n"
        f"for words in {[[*map(str, words)] for words in [['data', rows], *wrong]]}:\n"
        "    sys.argv = ['lorafit', *words]\n"
        "    try: main()\n"
        "    except SystemExit as end: print('status', end.code or 0, *words[:2])\n"
        "    print('heavy', sorted({'torch', 'transformers'} & set(sys.modules)), *words)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=tmp_path)
    said = done.stdout.splitlines()
    assert [line for line in said if line.startswith("heavy ") and not line.startswith("heavy []")] == []
    assert [line.split()[1] for line in said if line.startswith("status ")] == ["0", *("2" for _ in wrong)], said
    assert "Traceback" not in done.stderr


REFUSED_AT_ONCE: list[tuple[str, str]] = [
    ("demo -o ROWS", "is not empty and not a run"),
    ("demo -o HERE", "is not empty and not a run"),
    ("demo -o RUN", "holds a run already (unfinished)"),
    ("serve BASE --host 0.0.0.0", "--host 0.0.0.0: other machines can reach this address, and no keys are set"),
    ("serve BASE --keys nowhere.json", "nowhere.json: there is no such file"),
    ("serve BASE --port TAKEN", ": in use by another program"),
    ("bases --remove nix", "'nix': there is no converted copy of this name"),
    ("train BASE ROWS --columns nonsense", "--columns nonsense: write FIELD=COLUMN"),
    ("train BASE ROWS --columns prompt=qestion", "no column 'qestion'"),
    ("train BASE BAD", "bad.jsonl:2"),
    ("train BASE ROWS --val-share 0.9", "--val-share 0.9"),
    ("train --resume --out RUN --rank 9", "rank: 4 when it began, 9 now"),
    ("train BASE BAD --dry-run", "bad.jsonl:2"),
    ("plan BASE ROWS --columns prompt=qestion", "no column 'qestion'"),
    ("plan BASE BAD", "bad.jsonl:2"),
    ("eval ADAPTER BAD", "bad.jsonl:2"),
    ("eval ADAPTER ROWS --columns nonsense", "--columns nonsense: write FIELD=COLUMN"),
    ("route Where? it=ADAPTER --learn it=BAD", "bad.jsonl:2"),
    ("route Where? it=ADAPTER --learn other=ROWS", "--learn other: there is no adapter of this name"),
    ("trim ADAPTER --out small --to lots", "--to lots: not a share of an adapter"),
    ("trim ADAPTER --out HERE --to 25%", "is there already, and would be lost"),
    ("trim ADAPTER --out small", "only a run has validation examples"),
    ("refine RUN", "is not finished"),
    ("chat --template nonsense", "--template"),
    ("report RUN RUN", "named more than once"),
    ("report RUN --out ROWS", "is there already, and would be lost"),
]


def test_what_arguments_and_files_tell_is_refused_where_nothing_of_weight_can_be_imported(
    tiny_folder: Path, rows: Path, tmp_path: Path
) -> None:
    bad = write_rows(tmp_path / "bad.jsonl", [*capitals()[:1], {"prompt": "Why?"}, *capitals()[2:]])
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        (tmp_path / "adapter" / name).parent.mkdir(exist_ok=True)
        (tmp_path / "adapter" / name).write_bytes(b"")
    frozen = {
        "dtype": "fp32",
        "threads": 1,
        "apart": True,
        "packed": True,
        "micro_tokens": 64,
        "recompute": False,
        "now": None,
    }
    asked = {"base": str(tiny_folder), "data": str(rows), "settings": {"rank": 4}, "frozen": frozen}
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "run.json").write_text(json.dumps(asked), encoding="utf-8")
    code = """
import contextlib, io, json, sys
class Blocked:
    def find_spec(self, name, *_):
        if name in ("torch", "transformers"): raise ImportError(name)
sys.meta_path.insert(0, Blocked())
from lorafit.cli import main
for words in json.loads(sys.argv[1]):
    sys.argv, said, status = ["lorafit", *words], io.StringIO(), None
    with contextlib.redirect_stderr(said), contextlib.redirect_stdout(io.StringIO()):
        try: main()
        except SystemExit as end: status = end.code
        except ImportError as error: status = str(error)
    print(json.dumps([status, said.getvalue()]))
"""
    with socket.create_server(("127.0.0.1", 0)) as other:
        known = {
            "BASE": tiny_folder,
            "ROWS": rows,
            "BAD": bad,
            "HERE": tmp_path,
            "RUN": tmp_path / "run",
            "ADAPTER": tmp_path / "adapter",
            "TAKEN": other.getsockname()[1],
        }
        pattern = re.compile("|".join(known))
        given = [
            [pattern.sub(lambda one: str(known[one[0]]), word) for word in words.split()]
            for words, _ in REFUSED_AT_ONCE
        ]
        done = subprocess.run(
            [sys.executable, "-c", code, json.dumps(given)], capture_output=True, text=True, check=False, cwd=tmp_path
        )
    told = [json.loads(line) for line in done.stdout.splitlines()]
    assert len(told) == len(REFUSED_AT_ONCE), done.stderr
    wrong = [
        (words, status, said)
        for (words, sentence), (status, said) in zip(REFUSED_AT_ONCE, told, strict=True)
        if status != 2 or sentence not in " ".join(said.split())
    ]
    assert wrong == []
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize(
    ("word", "meant"),
    [
        ("list", "lorafit bases"),
        ("merge", "lorafit.merged"),
        ("export", "PEFT's format"),
        ("EVALUATE", "lorafit eval"),
        ("finetune", "lorafit train"),
        ("trian", "train"),
    ],
)
def test_a_verb_of_another_program_is_answered_with_what_is_meant(lorafit: Lorafit, word: str, meant: str) -> None:
    done = lorafit(word)
    assert (done.status, meant in " ".join(done.err.split())) == (2, True), done.err


def test_what_is_meant_names_verbs_and_flags_that_there_are() -> None:
    group = typer.main.get_command(cli.app)
    for meant in cli.MEANT.values():
        for verb, flags in re.findall(r"lorafit (\w+)((?: (?:--?)?[\w/]+)*)", meant):
            command = group.commands[verb]  # type: ignore[attr-defined]
            known = {option for p in command.params for option in p.opts}
            assert {word for word in flags.split() if word.startswith("--")} <= known, meant


def test_a_file_where_a_verb_belongs_is_answered_with_the_verb(lorafit: Lorafit, rows: Path) -> None:
    assert f"lorafit data {rows} checks examples" in " ".join(lorafit(rows).err.split())


@pytest.mark.parametrize("words", [["-h"], ["help"], ["help", "train"], ["train", "-h"], ["key", "create", "-h"]])
def test_help_is_given_however_it_is_asked_for(lorafit: Lorafit, words: list[str]) -> None:
    meant = [word for word in words if word not in ("-h", "help")]
    done = lorafit(*words)
    assert (done.status, done.out) == (0, lorafit(*meant, "--help").out)


@pytest.mark.parametrize("verb", ["train", "demo", "trim", "report"])
def test_whatever_writes_takes_o_for_out(verb: str) -> None:
    command = typer.main.get_command(cli.app).commands[verb]  # type: ignore[attr-defined]
    assert [p.opts for p in command.params if p.name == "out"] == [["--out", "-o"]]


@pytest.mark.parametrize("verb", ["train", "plan"])
@pytest.mark.parametrize("name", TrainSettings.model_fields)
def test_every_setting_is_a_flag_with_its_description(lorafit: Lorafit, verb: str, name: str) -> None:
    text = " ".join(lorafit(verb, "--help").out.split())
    flag = "--" + name.replace("_", "-")
    description = TrainSettings.model_fields[name].description
    assert description
    switch = TrainSettings.model_fields[name].annotation is bool
    assert (f" {flag} " if switch else f" {flag} <") in text
    assert description in text


def test_a_flag_arrives_as_its_setting(lorafit: Lorafit, tiny_folder: Path, rows: Path) -> None:
    plan = lorafit(
        "plan",
        tiny_folder,
        rows,
        "--json",
        "--rank",
        3,
        "--alpha",
        6,
        "--learning-rate",
        0.25,
        "--targets",
        "q_proj",
        "--targets",
        "v_proj",
        "--seed",
        9,
    ).last_object
    found = {(slot["site"]["path"].split(".")[-1], slot["rank"], slot["alpha"]) for slot in plan["slots"]}
    assert found == {("q_proj", 3, 6.0), ("v_proj", 3, 6.0)}
    assert (plan["recipe"]["learning_rate"], plan["recipe"]["seed"]) == (0.25, 9)


REFUSED: dict[str, tuple[list[str], str]] = {
    "missing data": (["plan", "BASE", "nowhere.jsonl"], "nowhere.jsonl: there is no such file"),
    "unknown base": (["plan", "no-such-base", "ROWS"], "'no-such-base': neither a model folder"),
    "misspelt target": (["plan", "BASE", "ROWS", "--targets", "q_porj"], "did you mean q_proj"),
    "rank zero": (["plan", "BASE", "ROWS", "--rank", "0"], "--rank 0: out of range: choose at least 1"),
    "huge rank": (["plan", "BASE", "ROWS", "--rank", "9999"], "--rank 9999: larger than every layer"),
    "dropout": (["plan", "BASE", "ROWS", "--dropout", "2"], "--dropout 2.0: out of range: choose at least 0 and less"),
    "epochs": (["plan", "BASE", "ROWS", "--epochs", "-1"], "--epochs -1.0: "),
    "endless epochs": (["plan", "BASE", "ROWS", "--epochs", "inf"], "--epochs inf: "),
    "not one step": (["plan", "BASE", "ROWS", "--epochs", "0.001"], "less than one step"),
    "variant": (["plan", "BASE", "ROWS", "--variant", "lara"], "--variant"),
    "text for a number": (["plan", "BASE", "ROWS", "--rank", "many"], "'--rank': not a whole number"),
    "unknown flag": (["plan", "BASE", "ROWS", "--rnk", "3"], "--rnk"),
    "unknown verb": (["trian"], "trian"),
    "too long": (["plan", "BASE", "ROWS", "--max-length", "8"], "tokens, the limit is 8"),
    "share of data": (["data", "ROWS", "--val-share", "0.9"], "--val-share 0.9: "),
    "system prompt of no base": (["data", "ROWS", "--system", "x"], "--system: no effect without a base"),
    "base of data": (["data", "ROWS", "--base", "no-such-base"], "'no-such-base': neither"),
    "no adapter": (["eval", "BASE", "ROWS"], "adapter_config.json"),
    "showing nothing": (["show", "nowhere"], "nowhere: there is no such path: check the path"),
    "showing data": (["show", "ROWS"], "neither a run, nor an adapter"),
    "showing another json": (["show", "BASE/config.json"], "not a plan"),
    "resuming nothing": (["train", "BASE", "ROWS", "--resume", "--out", "OUT"], "no run to resume here"),
}


@pytest.mark.parametrize(("words", "said"), REFUSED.values(), ids=REFUSED)
def test_bad_input_is_refused_with_status_two_and_a_reason(
    lorafit: Lorafit, tiny_folder: Path, rows: Path, tmp_path: Path, words: list[str], said: str
) -> None:
    known = {"BASE": str(tiny_folder), "ROWS": str(rows), "OUT": str(tmp_path / "out")}
    given = [known.get(word, word.replace("BASE/", f"{tiny_folder}/")) for word in words]
    done = lorafit(*given)
    assert (done.status, said in done.err) == (2, True), done.err


def test_several_bad_settings_are_named_at_once(lorafit: Lorafit, rows: Path, tmp_path: Path) -> None:
    done = lorafit("train", "x", rows, "--out", tmp_path / "out", "--dropout", 2, "--alpha", -1, "--seed", -5)
    assert [flag for flag in ("--dropout", "--alpha", "--seed") if flag not in done.err] == []


def test_a_refusal_shows_no_traceback(rows: Path) -> None:
    command = [sys.executable, "-m", "lorafit", "data", "nowhere.jsonl"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert (done.returncode, "Traceback" in done.stderr, done.stderr.startswith("lorafit: ")) == (2, False, True)


def test_a_refused_setting_leaves_no_folder(lorafit: Lorafit, tiny_folder: Path, rows: Path, tmp_path: Path) -> None:
    lorafit("train", tiny_folder, rows, "--out", tmp_path / "out", "--dropout", 2)
    assert list(tmp_path.iterdir()) == []


def test_a_damaged_tokenizer_is_a_base_that_cannot_be_opened(
    lorafit: Lorafit, tiny_folder: Path, rows: Path, tmp_path: Path
) -> None:
    for file in tiny_folder.iterdir():
        (tmp_path / file.name).write_bytes(file.read_bytes())
    (tmp_path / "tokenizer.json").write_text("[]", encoding="utf-8")
    statuses = [lorafit("data", rows, "--base", tmp_path).status, lorafit("plan", tmp_path, rows).status]
    assert statuses == [2, 2]


def test_data_describes_the_splits_as_json(lorafit: Lorafit, tiny_folder: Path, rows: Path) -> None:
    found = lorafit("data", rows, "--base", tiny_folder, "--json").last_object
    assert set(found) == {"splits", "passed_over", "remarks", "digest", "tokens"}
    assert all(0 < n["trained"] < n["all"] for n in found["tokens"].values())
    assert {name: split["examples"] for name, split in found["splits"].items()} == {"train": 20, "valid": 2, "test": 2}


def test_data_needs_no_base(lorafit: Lorafit, rows: Path) -> None:
    done = lorafit("data", rows)
    assert (done.status, "in order; lengths were not checked: --base BASE counts" in done.out) == (0, True)


def test_data_without_a_base_report_what_every_base_would_refuse(lorafit: Lorafit, tmp_path: Path) -> None:
    long = {"prompt": "so " * 4534, "completion": "Two miles."}
    done = lorafit("data", write_rows(tmp_path / "a.jsonl", [*capitals(), long]))
    told = " ".join(done.out.split())
    assert "1 hold more words (up to 4,536) than the 1,024 tokens that training takes" in told
    assert "refused (--skip-bad leaves them out)" in told and "or raise --max-length" in told
    advised = lorafit("data", tmp_path / "a.jsonl", "--max-length", "9000")
    assert advised.status == 0 and "hold more words" not in advised.out


def test_data_of_a_settings_file_are_seen_as_its_base_sees_them_unless_told_not_to(
    lorafit: Lorafit, tiny_folder: Path, rows: Path, tmp_path: Path
) -> None:
    (tmp_path / "my.toml").write_text(f'base = "{tiny_folder}"\nsystem = "Help desk"\n', encoding="utf-8")
    given = ["data", rows, "-c", tmp_path / "my.toml", "--json"]
    assert lorafit(*given).last_object["tokens"]["train"]["all"] > 0
    assert lorafit(*given, "--base", "none").last_object["tokens"] == {}


def test_data_marks_what_is_trained(lorafit: Lorafit, tiny_folder: Path, rows: Path) -> None:
    text = lorafit("data", rows, "--base", tiny_folder).out
    assert text.count(">>>It is ") == text.count(".<|end|><<<") == 1


def test_data_refuses_what_is_too_long_for_training(lorafit: Lorafit, tiny_folder: Path, rows: Path) -> None:
    done = lorafit("data", rows, "--base", tiny_folder, "--max-length", "12")
    assert done.status == 2
    assert "24 problems" in done.err
    assert "tokens, the limit is 12" in done.err


def test_data_reports_fields_that_are_passed_over(lorafit: Lorafit, tmp_path: Path) -> None:
    path = write_rows(tmp_path / "a.jsonl", [{**row, "source": "atlas"} for row in capitals()])
    assert "field ignored: 'source' (24 lines)" in lorafit("data", path).out


def test_plan_gives_resolved_numbers_as_json(lorafit: Lorafit, tiny_folder: Path, rows: Path) -> None:
    found = lorafit("plan", tiny_folder, rows, "--json").last_object
    assert set(found) == {
        "base",
        "trainable_parameters",
        "bytes",
        "flops_per_token",
        "recipe",
        "choices",
        "slots",
        "forecast",
        "settings",
        "evidence",
        "card",
        "search",
        "placements",
    }
    assert all(type(slot["rank"]) is int for slot in found["slots"])


def test_every_choice_of_a_plan_has_its_reason(lorafit: Lorafit, tiny_folder: Path, rows: Path) -> None:
    choices = lorafit("plan", tiny_folder, rows, "--json").last_object["choices"]
    assert len(choices) > 4
    assert all(choice["reason"] for choice in choices)


def test_plan_writes_nothing(
    lorafit: Lorafit, tiny_folder: Path, rows: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert lorafit("plan", tiny_folder, rows).status == 0
    assert list(tmp_path.iterdir()) == []


def test_train_ends_with_its_summary_as_json(run: Run) -> None:
    assert set(json.loads(run.done.stdout.splitlines()[-1])) == TRAINED


def test_train_keeps_stdout_for_the_one_object(run: Run) -> None:
    assert len(run.done.stdout.splitlines()) == 1


def test_the_summary_that_is_printed_is_the_one_that_is_written(run: Run) -> None:
    assert json.loads(run.done.stdout) == json.loads((run.folder / "summary.json").read_text(encoding="utf-8"))


def test_train_leaves_the_base_unchanged(run: Run) -> None:
    assert json.loads(run.done.stdout)["base_unchanged"] is True


def test_train_says_what_it_did_in_words(run: Run) -> None:
    said = ("trained: best validation", "read back, it is equal bit for bit", "base unchanged", "lorafit show")
    assert [words for words in said if words not in run.done.stderr] == []


def test_eval_ends_with_its_scores_as_json(lorafit: Lorafit, run: Run, rows: Path) -> None:
    found = lorafit("eval", run.folder / "adapter", rows, "--dtype", "fp32", "--json").last_object
    assert set(found) == EVALUATED
    assert (found["n_test"], found["base_unchanged"], found["dtype"]) == (24, True, "float32")


def test_eval_writes_answers_over_nothing_and_says_so_before_a_model_opens(
    lorafit: Lorafit, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    mine = write_rows(tmp_path / "mine.jsonl", capitals(12))
    before = mine.read_bytes()
    (tmp_path / "folder").mkdir()
    monkeypatch.setattr("lorafit.jobs.prepare.open_base", lambda *_: pytest.fail("a base was opened"))
    for name, said in (("mine.jsonl", "is there already"), ("folder", "a folder"), ("mine.jsonl/x", "--answers")):
        done = lorafit("eval", run.folder, mine, "--answers", tmp_path / name)
        assert (done.status, said in done.err, "--out" in done.err) == (2, True, False), done.err
    assert mine.read_bytes() == before


def test_report_writes_over_a_page_of_its_own_and_nothing_else(lorafit: Lorafit, run: Run, tmp_path: Path) -> None:
    (tmp_path / "thesis.html").write_text("<p>Ten years of work", encoding="utf-8")
    for name, said in (("thesis.html", "is there already"), ("", "a folder")):
        done = lorafit("report", run.folder, "--out", tmp_path / name)
        assert (done.status, said in done.err) == (2, True), done.err
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.html"]
    for _ in range(2):
        assert lorafit("report", run.folder, "--out", tmp_path / "mine.html").status == 0


def test_a_file_made_for_training_serves_eval_too(lorafit: Lorafit, run: Run, rows: Path, tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_text("few_shot = 3\nrank = 8\n", encoding="utf-8")
    given = ["eval", run.folder, rows, "--dtype", "fp32"]
    assert lorafit(*given, "-c", tmp_path / "a.toml").status == 0
    assert "--few-shot takes its examples from" in lorafit(*given, "--few-shot", 3).err


def test_eval_tells_that_questions_were_trained_on(lorafit: Lorafit, run: Run, rows: Path) -> None:
    """The first thing one tries is the file one trained on; what it shows is memory."""
    done = lorafit("eval", run.folder, rows, "--dtype", "fp32")
    assert "22 of these 24 questions were trained or validated on" in done.out


def test_the_version_is_told(lorafit: Lorafit) -> None:
    assert lorafit("--version").out.startswith("lorafit 0.")


@pytest.mark.parametrize("given", [["q_proj,v_proj"], ["q_proj", "v_proj"], ["q_proj, v_proj"]])
def test_targets_may_be_given_either_way(lorafit: Lorafit, tiny_folder: Path, rows: Path, given: list[str]) -> None:
    flags = [word for one in given for word in ("--targets", one)]
    found = lorafit("plan", tiny_folder, rows, *flags, "--json").last_object
    assert {slot["site"]["path"].rpartition(".")[2] for slot in found["slots"]} == {"q_proj", "v_proj"}


def test_a_check_that_its_own_answer_fails_is_refused(lorafit: Lorafit, tmp_path: Path) -> None:
    data = capitals()
    data[3]["check"] = {"contains": ["nowhere"]}
    done = lorafit("data", write_rows(tmp_path / "a.jsonl", data))
    assert (done.status, "a.jsonl:4: check: its own answer does not pass it" in done.err) == (2, True)


def test_contradictions_are_pointed_out(lorafit: Lorafit, tmp_path: Path) -> None:
    data = [*capitals(), {"prompt": capitals()[0]["prompt"], "completion": "It is elsewhere."}]
    done = lorafit("data", write_rows(tmp_path / "a.jsonl", data))
    assert "1 prompts occur with different answers" in done.out


def test_an_adapter_equals_itself_in_eval(lorafit: Lorafit, run: Run, rows: Path) -> None:
    adapter = run.folder / "adapter"
    found = lorafit("eval", adapter, rows, "--against", adapter, "--dtype", "fp32", "--json").last_object
    assert found["nll"]["difference"] == 0.0


def test_eval_refuses_a_split_that_is_not_there(lorafit: Lorafit, run: Run, tmp_path: Path) -> None:
    write_rows(tmp_path / "train.jsonl", capitals())
    write_rows(tmp_path / "valid.jsonl", capitals()[:2])
    done = lorafit("eval", run.folder / "adapter", tmp_path)
    assert (done.status, "no test split" in done.err) == (2, True)


def test_show_knows_a_run(lorafit: Lorafit, run: Run) -> None:
    found = lorafit("show", run.folder, "--json").last_object
    assert (found["kind"], found["state"], found["ranks"]) == ("run", "finished", {"2": 14})


def test_show_knows_an_adapter(lorafit: Lorafit, run: Run) -> None:
    found = lorafit("show", run.folder / "adapter", "--json").last_object
    assert (found["kind"], found["sites"], found["variant"]) == ("adapter", 14, "lora")


def test_show_knows_a_plan(lorafit: Lorafit, run: Run) -> None:
    found = lorafit("show", run.folder / "plan.json", "--json").last_object
    assert (found["kind"], found["sites"]) == ("plan", 14)


def test_show_knows_a_base(lorafit: Lorafit, tiny_folder: Path) -> None:
    found = lorafit("show", tiny_folder, "--json").last_object
    assert (found["kind"], found["site names"]["q_proj"]) == ("base", 2)


def test_show_knows_a_classifier_and_what_it_tells_apart(lorafit: Lorafit, classifier_run: Path) -> None:
    for path in (classifier_run, classifier_run / "adapter"):
        done = lorafit("show", path)
        assert re.search(r"task  classification\n", done.out)
        assert re.search(r"labels  bad, good, neither one nor the other\n", done.out)


def test_after_a_classifier_nobody_is_sent_to_chat(classifier_run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    summary = read_summary(classifier_run)
    assert summary is not None
    conclude(Terminal(), summary, classifier_run, [])
    following = capsys.readouterr().out.partition("next:")[2]
    assert "chat" not in following
    assert f"classify {classifier_run} TEXTS.csv" in following
    assert f"eval {classifier_run} TEXTS.jsonl" in following and "adapter/README.md" in following


def test_trim_writes_a_smaller_adapter_and_nothing_over_another(lorafit: Lorafit, run: Run, tmp_path: Path) -> None:
    out = tmp_path / "half"
    done = lorafit("trim", run.folder, "--to", "50%", "--out", out, "--json")
    assert done.status == 0, done.err
    said = done.last_object
    small, whole = peft.read(out), peft.read(run.folder / "adapter")
    assert small.plan.parameters == said["parameters"] <= whole.plan.parameters / 2
    assert (small.base, small.rendering) == (whole.base, whole.rendering)
    assert 0.5 < said["left"] < 1
    again = lorafit("trim", run.folder, "--out", out)
    assert again.status == 2
    assert peft.read(out) == small


def test_trim_asks_the_runs_validation_where_it_is_not_told_how_much(
    lorafit: Lorafit, run: Run, tmp_path: Path
) -> None:
    done = lorafit("trim", run.folder, "--out", tmp_path / "small", "--json")
    assert done.status == 0, done.err
    said = done.last_object
    assert said["reason"].startswith("untrimmed: ")
    assert said["reason"].endswith("independent validation examples are too few: at least 10 are needed")
    assert [rung["bound"] for rung in said["rungs"]] == [None] * len(said["rungs"])
    assert said["adapter_dir"] is None
    assert not (tmp_path / "small").exists()
    whole = read_summary(run.folder)
    assert whole is not None
    assert said["nll"] == pytest.approx(min(nll for _, nll in whole.validation), rel=1e-5)


def test_train_does_not_touch_a_finished_run(lorafit: Lorafit, run: Run, tiny_folder: Path, rows: Path) -> None:
    before = {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")}
    done = lorafit("train", tiny_folder, rows, "--out", run.folder)
    assert (done.status, "holds a run already (finished)" in done.err) == (2, True)
    assert {path: path.stat().st_mtime_ns for path in run.folder.rglob("*")} == before


def test_train_does_not_write_among_other_files(
    lorafit: Lorafit, tiny_folder: Path, rows: Path, tmp_path: Path
) -> None:
    (tmp_path / "thesis.txt").write_text("Ten years of work.", encoding="utf-8")
    done = lorafit("train", tiny_folder, rows, "--out", tmp_path)
    assert (done.status, "is not empty and not a run" in done.err) == (2, True)
    assert [path.name for path in tmp_path.iterdir()] == ["thesis.txt"]


def test_a_finished_run_is_not_resumed(lorafit: Lorafit, run: Run, tiny_folder: Path, rows: Path) -> None:
    done = lorafit("train", tiny_folder, rows, "--out", run.folder, "--resume")
    assert (done.status, "this run is finished" in done.err) == (2, True)


def test_doctor_looks_at_the_machine_and_fires_every_site(lorafit: Lorafit, tiny_folder: Path) -> None:
    found = lorafit("doctor", tiny_folder, "--json").last_object
    told = {one["what"]: one["value"] for one in found["findings"]}
    assert found["ok"] is True
    assert told["sites"] == "14 of 14 linear layers of the blocks take part"
    assert {"processor", "memory", "disk", "GPU", "matrix products", "C++ compiler", "base", "context"} <= set(told)


def test_doctor_refuses_a_base_that_cannot_be_opened(lorafit: Lorafit, tmp_path: Path) -> None:
    done = lorafit("doctor", tmp_path)
    assert (done.status, "cannot be used as a base" in done.err) == (2, True)


def test_doctor_keeps_what_it_found_where_the_base_cannot_be_opened(lorafit: Lorafit, tmp_path: Path) -> None:
    done = lorafit("doctor", tmp_path, "--json")
    found = {one["what"]: one for one in done.last_object["findings"]}
    assert (done.status, done.last_object["ok"]) == (2, False)
    assert (found["base"]["state"], "cannot be used as a base" in found["base"]["advice"]) == ("broken", True)
    assert {"processor", "memory", "disk", "GPU"} <= set(found)
    plain = lorafit("doctor", tmp_path)
    assert ("matrix products" in plain.out, plain.err.count("cannot be used as a base")) == (True, 1)


def test_doctor_ends_with_status_two_where_nothing_can_be_adapted(
    lorafit: Lorafit, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "fired", lambda *_: frozenset())
    done = lorafit("doctor", tiny_folder, "--json")
    (sites,) = (one for one in done.last_object["findings"] if one["what"] == "sites")
    assert (done.status, done.last_object["ok"], sites["state"]) == (2, False, "broken")
    assert "broken  nothing here can be adapted" in lorafit("doctor", tiny_folder).out


@pytest.mark.parametrize(("free", "state"), [(1.9e9, "slow"), (2.1e9, "good")])
def test_a_disk_without_room_for_a_conversion_is_called_slow(
    free: float, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(doctor, "free_bytes", lambda folder: free)
    assert doctor._disk().state == state


def test_doctor_times_a_step_of_the_base_it_is_given(lorafit: Lorafit, tiny_folder: Path) -> None:
    assert "training" not in [one["what"] for one in lorafit("doctor", "--json").last_object["findings"]]
    told = lorafit("doctor", tiny_folder, "--json").last_object["findings"]
    (found,) = (one["value"] for one in told if one["what"] == "training")
    assert re.match(r"[1-9]\d* tokens/s, of one step that was timed: 4 rows of 64 tokens", found)


@pytest.mark.parametrize(
    ("threads", "usable", "named", "state"),
    [(1, 2, "1", "slow"), (1, 2, None, "good"), (1, 4, None, "slow"), (2, 2, "2", "good")],
)
def test_cores_that_stand_idle_are_called_slow(
    threads: int, usable: int, named: str | None, state: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of two cores that torch takes one of by itself, one may be the second thread of the other."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    if named:
        monkeypatch.setenv("OMP_NUM_THREADS", named)
    monkeypatch.setattr(doctor, "available_cores", lambda: usable)
    monkeypatch.setattr(doctor.torch, "get_num_threads", lambda: threads)
    finding = doctor._cores()
    assert (finding.state, f"OMP_NUM_THREADS={usable}" in finding.advice) == (state, state == "slow")


def test_more_threads_than_cores_are_called_slow(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "available_cores", lambda: 1)
    monkeypatch.setattr(doctor.torch, "get_num_threads", lambda: 4)
    finding = doctor._cores()
    assert (finding.state, "OMP_NUM_THREADS=1" in finding.advice) == ("slow", True)


def test_bases_lists_what_is_converted_with_its_size(
    lorafit: Lorafit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path))
    copy = tmp_path / "bases" / "mine-0123456789ab-1"
    copy.mkdir(parents=True)
    (copy / "model.safetensors").write_bytes(b"x" * 1000)
    (copy / "lorafit-base.json").write_text('{"name": "mine"}', encoding="utf-8")
    listed = lorafit("bases", "--json").last_object
    found = {one["name"]: one for one in listed["bases"]}
    assert found["mine.gguf"]["bytes"] == listed["cache_bytes"] == 1016
    assert "smollm2-135m" in found
    assert lorafit("bases", "--remove", "nobodys").status == 2
    assert lorafit("bases", "--remove", "mine", "--json").last_object["removed"] == [str(copy)]
    assert not copy.exists()


@pytest.mark.parametrize("record", ["{", "[]", "{}", '{"name": 3}', '{"name": ""}'])
def test_a_broken_copy_is_listed_and_can_be_removed(
    record: str, lorafit: Lorafit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path))
    broken = tmp_path / "bases" / "mine-0123456789ab-1"
    broken.mkdir(parents=True)
    (broken / "lorafit-base.json").write_text(record, encoding="utf-8")
    (listed,) = (one for one in lorafit("bases", "--json").last_object["bases"] if one["name"] == broken.name)
    assert (listed["kind"], listed["bytes"]) == ("broken", len(record))
    assert f"lorafit bases --remove {broken.name}" in lorafit("bases").out
    assert f"lorafit bases --remove {broken.name}" in lorafit("chat", "--base", broken).err
    assert lorafit("bases", "--remove", broken.name, "--json").last_object["removed"] == [str(broken)]
    assert not broken.exists()


def test_what_a_killed_conversion_left_is_listed_and_can_be_removed(
    lorafit: Lorafit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORAFIT_CACHE", str(tmp_path))
    with whole_folder(tmp_path / "bases" / "mine-0123456789ab-1") as building:
        (building / "model.safetensors").write_bytes(b"x" * 1000)
        (tmp_path / "bases" / ".thesis").mkdir()
        listed = lorafit("bases", "--json").last_object
        (left,) = (one for one in listed["bases"] if one["where"].startswith(str(tmp_path)))
        assert (left["name"], left["kind"], left["bytes"]) == (building.name, "unfinished", listed["cache_bytes"])
        assert f"lorafit bases --remove {building.name}" in lorafit("bases").out
        assert lorafit("bases", "--remove", ".thesis").status == 2
        assert lorafit("bases", "--remove", building.name, "--json").last_object["removed"] == [str(building)]
        assert not building.exists()
        building.mkdir()  # the block ends as if nothing had happened


def test_plain_text_trains_and_has_no_answers(lorafit: Lorafit, tiny_folder: Path, tmp_path: Path) -> None:
    paragraphs = [str(row["prompt"]) * 12 + str(row["completion"]) * 60 for row in capitals(40)]
    (tmp_path / "a.txt").write_text("\n\n".join(paragraphs), encoding="utf-8")
    done = lorafit("train", tiny_folder, tmp_path / "a.txt", "--out", tmp_path / "run", *QUICK, "--max-length", "64")
    assert done.status == 0, done.err
    assert "answers that end by themselves" not in done.out
    summary = json.loads((tmp_path / "run" / "summary.json").read_text(encoding="utf-8"))
    assert (summary["natural_stops"], summary["samples"], summary["facts"]["adapter"]) == (None, [], None)


def test_a_table_of_labels_trains_and_counts_right_labels(lorafit: Lorafit, tiny_folder: Path, tmp_path: Path) -> None:
    lines = [f"{row['prompt']},{'odd' if i % 2 else 'even'}" for i, row in enumerate(capitals(40))]
    (tmp_path / "a.csv").write_text("\n".join(["says,kind", *lines]), encoding="utf-8")
    flags = [*QUICK, "--columns", "text=says", "--columns", "label=kind", "--out", tmp_path / "run", "--json"]
    summary = lorafit("train", tiny_folder, tmp_path / "a.csv", *flags).last_object
    assert summary["facts"]["n"] == summary["n_test"] == 4
    ours = json.loads((tmp_path / "run" / "adapter" / "lorafit.json").read_text(encoding="utf-8"))
    assert ours["rendering"]["system"] == "Answer with the label alone: even, odd."
    again = lorafit("eval", tmp_path / "run", tmp_path / "a.csv", "--columns", "text=says", "--columns", "label=kind")
    assert again.status == 0, again.err


def test_skip_bad_leaves_out_what_cannot_be_used_wherever_it_is_found(
    lorafit: Lorafit, tiny_folder: Path, tmp_path: Path
) -> None:
    """Rows that cannot be read, rows that are too long, and checks that their own answers fail."""
    data = capitals(40)
    data[2]["completion"] = ""
    data[3]["check"] = {"contains": ["nowhere"]}
    data[4]["prompt"] = "long " * 100
    path = write_rows(tmp_path / "a.jsonl", data)
    assert lorafit("plan", tiny_folder, path, "--max-length", "128").status == 2
    done = lorafit("plan", tiny_folder, path, "--max-length", "128", "--skip-bad")
    assert done.status == 0, done.err
    assert [done.out.count(f"left out: {path}:{line}") for line in (3, 4, 5)] == [1, 1, 1]


def test_eval_leaves_out_what_training_would(lorafit: Lorafit, run: Run, tmp_path: Path) -> None:
    data = capitals(40)[24:]
    data[1]["check"] = {"contains": ["nowhere"]}
    data[2]["prompt"] = "long " * 100
    path = write_rows(tmp_path / "a.jsonl", data)
    flags = ["--dtype", "fp32", "--max-length", "128"]
    assert lorafit("eval", run.folder, path, *flags).status == 2
    done = lorafit("eval", run.folder, path, *flags, "--skip-bad")
    assert done.status == 0, done.err
    assert [done.out.count(f"left out: {path}:{line}") for line in (2, 3)] == [1, 1]
    assert "on 14 examples" in done.out


def talk(lorafit: Lorafit, monkeypatch: pytest.MonkeyPatch, lines: list[str], *words: str | Path) -> Done:
    monkeypatch.setattr("sys.stdin", io.StringIO("".join(line + "\n" for line in lines)))
    return lorafit("chat", *words, "--max-new-tokens", "6")


def test_chat_answers_as_adapter_as_base_and_as_both(
    lorafit: Lorafit, run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked = ["/both", "Where?", "/base", "Where?", "/nonsense", "/adapter", "/new", "Where?", "/quit", "never read"]
    done = talk(lorafit, monkeypatch, asked, run.folder)
    assert done.status == 0, done.err
    name = run.folder.name
    both, unknown = f"answering: base and {name}", "/nonsense: no such command"
    for said in (both, "base: ", f"{name}: ", "answering: base\n", unknown, f"answering: {name}\n", "forgotten"):
        assert said in done.out


def test_chat_without_an_adapter_says_how_to_open_one(
    lorafit: Lorafit, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    done = talk(lorafit, monkeypatch, ["/both", "/adapter nowhere", "Where?"], "--base", str(tiny_folder))
    assert done.status == 0, done.err
    assert "no adapter is open: open one with /adapter FOLDER" in done.out
    assert "nowhere: there is no such adapter folder" in done.out


def test_chat_goes_on_after_a_line_that_is_no_text(
    lorafit: Lorafit, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    typed = io.TextIOWrapper(io.BytesIO(b"\xff\xfe bad bytes\n/new\nWhere?\n"), encoding="utf-8")
    monkeypatch.setattr("sys.stdin", typed)
    done = lorafit("chat", "--base", tiny_folder, "--max-new-tokens", "6")
    assert done.status == 0, done.err
    assert re.search(r"not UTF-8 \(byte 0xff\): .*\nforgotten\n", done.out)


@pytest.mark.parametrize(
    ("lines", "status"), [(["word " * 200], 2), (["/nonsense", "/new"], 2), (["/new"], 0), ([], 0)]
)
def test_a_script_sees_that_chat_answered_nothing(
    lines: list[str], status: int, lorafit: Lorafit, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert talk(lorafit, monkeypatch, lines, "--base", tiny_folder).status == status


def test_chat_is_told_its_system_prompt(lorafit: Lorafit, tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[str | None] = []
    monkeypatch.setattr(
        "lorafit.jobs.chat.Chat._speak", lambda chat, adapter, renderer, *_: seen.append(renderer.system)
    )
    talk(lorafit, monkeypatch, ["Where?"], "--base", tiny_folder, "--system", "Be long.")
    assert seen == ["Be long."]


def test_ctrl_c_at_the_prompt_drops_the_line_and_twice_leaves(monkeypatch: pytest.MonkeyPatch) -> None:
    readline = pytest.importorskip("readline")
    at_prompt = iter(["half a line", ""])  # at the second and third Ctrl-C in a row
    keys = iter(["^C", "Where?", "^C", "^C", "^C", "never read"])

    def typed(prompt: str) -> str:
        key = next(keys)
        if key == "^C":
            raise KeyboardInterrupt
        return key

    monkeypatch.setattr("builtins.input", typed)
    monkeypatch.setattr(readline, "get_line_buffer", lambda: next(at_prompt))
    assert list(_typed()) == ["Where?"]
    assert list(keys) == ["never read"]


def test_a_plan_reads_well_on_a_narrow_screen_and_is_a_table_on_a_wide_one(
    lorafit: Lorafit, tiny_folder: Path, rows: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    narrow, wide = [
        (monkeypatch.setenv("COLUMNS", columns), lorafit("plan", tiny_folder, rows).out)[1] for columns in ("80", "160")
    ]
    assert re.search(r"^rank: 16 \(alpha \d+\)\n  \S.*$", narrow, re.MULTILINE)
    assert "change it with" in wide
    assert max(len(line) for line in narrow.splitlines() if "(--rank" in line) <= 80


def test_the_first_of_many_does_not_tell_how_long_the_rest_takes(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 0.0, 8.0, 8.0, 15.0, 15.0])
    monkeypatch.setattr("lorafit.cli.console.time.monotonic", lambda: next(now))
    terminal = Terminal()
    monkeypatch.setattr(terminal, "_last_line", -60.0)
    for done in (0, 1, 100):  # the first answer of 200 took 8 seconds, with what prepares the others
        terminal.watch("answers", done, 200)
    assert capsys.readouterr().err.splitlines() == ["answers 100/200  0:15 left"]


def test_a_validation_is_one_line_and_the_next_one_counts_from_its_own_beginning(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = iter([0.0, 0.0, 10.0, 10.0, 1000.0, 1000.0, 1020.0, 1020.0])
    monkeypatch.setattr("lorafit.cli.console.time.monotonic", lambda: next(now))
    terminal = Terminal()
    for done in (0, 50, 0, 50):  # two validations of 100 examples; the end of each is told with its result
        terminal.watch("validation", done, 100)
    told = capsys.readouterr()
    assert (told.out, told.err.splitlines()[-1]) == ("", "validation 50/100  0:20 left")


def test_data_refuses_what_the_base_cannot_read(lorafit: Lorafit, tiny_folder: Path, tmp_path: Path) -> None:
    long = [{"prompt": f"Number {i}? " + "word " * 400, "completion": "Yes."} for i in range(12)]
    done = lorafit("data", write_rows(tmp_path / "a.jsonl", long), "--base", tiny_folder, "--max-length", "4000")
    assert done.status == 2
    assert "this base reads no more" in done.err


def test_data_leaves_out_what_is_too_long_as_training_would(
    lorafit: Lorafit, tiny_folder: Path, tmp_path: Path
) -> None:
    rows = [*capitals(), {"prompt": "word " * 400, "completion": "Yes."}]
    done = lorafit("data", write_rows(tmp_path / "a.jsonl", rows), "--base", tiny_folder, "--skip-bad")
    assert done.status == 0
    assert "left out" in done.out
