"""One declaration: what a file may say, what flags beat, what is stored."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer.main
from conftest import capitals, write_rows

from lorafit.cli import app, main
from lorafit.errors import SettingsError
from lorafit.settings import RunFile, TrainSettings, read_run_file, settings_from, template


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """What `lorafit train` asks of the pipeline, which is not run."""
    given: dict[str, Any] = {}

    def run_training(base: str, data: str, out: Path, settings: dict[str, Any], **_: Any) -> dict[str, Any]:
        given.update(base=base, data=data, out=out, settings=settings)
        raise SettingsError("enough: stop here")

    monkeypatch.setattr("lorafit.jobs.train.run_training", run_training)
    return given


def lorafit(monkeypatch: pytest.MonkeyPatch, *words: object) -> int | str | None:
    monkeypatch.setattr("sys.argv", ["lorafit", *map(str, words)])
    with pytest.raises(SystemExit) as end:
        main()
    return end.value.code


@pytest.fixture
def given(tmp_path: Path, tiny_folder: Path) -> str:
    """Lines that name a base and data that are there."""
    write_rows(tmp_path / "d.jsonl", capitals())
    return f'base = "{tiny_folder}"\ndata = "d.jsonl"\n'


def written(path: Path, text: str) -> Path:
    path.write_text(text, encoding="utf-8")
    return path


def test_a_file_gives_what_flags_do_not(
    tmp_path: Path, given: str, tiny_folder: Path, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path / "a.toml", f'{given}out = "o"\nrank = 4\nval-share = 0.2\nskip_bad = true\n')
    lorafit(monkeypatch, "train", "-c", file, "--rank", "8")
    assert asked == {
        "base": str(tiny_folder),
        "data": str(tmp_path / "d.jsonl"),
        "out": tmp_path / "o",
        "settings": {"rank": 8, "val_share": 0.2, "skip_bad": True},
    }


def test_arguments_beat_the_file(
    tmp_path: Path, given: str, tiny_folder: Path, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path / "a.toml", given.replace(str(tiny_folder), "another"))
    lorafit(monkeypatch, "train", tiny_folder, "-c", file, "--out", "elsewhere")
    found = (asked["base"], asked["data"], asked["out"])
    assert found == (str(tiny_folder), str(tmp_path / "d.jsonl"), Path("elsewhere"))


def test_what_neither_names_is_asked_for(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lorafit(monkeypatch, "train", "-c", written(tmp_path / "a.toml", "rank = 4\n")) == 2
    assert "BASE and DATA: missing: name them" in capsys.readouterr().err


def test_all_that_is_wrong_in_a_file_is_told_by_its_line(tmp_path: Path) -> None:
    file = written(tmp_path / "a.toml", '# mine\nrank = "eight"\n\nlearning-rat = 1e-3\n[extra]\nx = 1\n')
    with pytest.raises(SettingsError) as error:
        read_run_file(file)
    lines = str(error.value).splitlines()
    assert lines[0].startswith(f"{file}:2: rank 'eight': ")
    assert lines[1] == f"{file}:4: learning_rat: no such setting: did you mean learning_rate?"
    assert lines[2].startswith(f"{file}:5: extra: no such setting: ")


@pytest.mark.parametrize(
    ("line", "said"),
    [
        ("rank = true", "rank True: not a whole number"),
        ('rank = "16"', "rank '16': not a whole number"),
        ('skip_bad = "yes"', "skip_bad 'yes': not true or false"),
        ("alpha = nan", "alpha nan: not a number"),
        ("targets = []", "targets .*: names no layer"),
        ("val-share = 0.2\nval_share = 0.1", "val_share: given with - and with _"),
    ],
)
def test_a_file_says_what_it_means_in_the_type_of_toml(tmp_path: Path, line: str, said: str) -> None:
    with pytest.raises(SettingsError, match=said):
        read_run_file(written(tmp_path / "a.toml", line))


def test_a_file_gives_whole_numbers_for_any_number_and_lists_as_they_are_stored(tmp_path: Path) -> None:
    found = read_run_file(written(tmp_path / "a.toml", 'alpha = 16\ntargets = ["q_proj,v_proj"]'))
    assert found == {"alpha": 16.0, "targets": ("q_proj", "v_proj")}


@pytest.mark.parametrize("targets", [[], [","], ["", " "]])
def test_targets_that_name_nothing_are_refused_by_their_flag(targets: list[str]) -> None:
    with pytest.raises(SettingsError, match=r"--targets .*: names no layer: name at least one"):
        settings_from({"targets": targets})


def test_paths_in_a_file_count_from_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "there" / "weights").mkdir(parents=True)
    file = written(tmp_path / "there" / "a.toml", 'base = "weights"\ndata = "d.jsonl"\nout = "runs/a"\n')
    monkeypatch.chdir(tmp_path)
    found = read_run_file(Path("there/a.toml"))
    assert found == {"base": "there/weights", "data": "there/d.jsonl", "out": "there/runs/a"}
    written(file, 'base = "smollm2-135m"\ndata = "builtin"\n')
    assert read_run_file(file) == {"base": "smollm2-135m", "data": "builtin"}


def test_a_file_of_windows_is_read_or_named(tmp_path: Path) -> None:
    (tmp_path / "a.toml").write_bytes("rank = 4\n".encode("utf-8-sig"))
    assert read_run_file(tmp_path / "a.toml") == {"rank": 4}
    (tmp_path / "b.toml").write_bytes("rank = 4\n".encode("utf-16"))
    with pytest.raises(SettingsError, match=r"b\.toml: saved as UTF-16.*save it as UTF-8"):
        read_run_file(tmp_path / "b.toml")


def test_a_switch_of_a_file_can_be_turned_off(
    tmp_path: Path, given: str, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    file = written(tmp_path / "a.toml", f"{given}skip_bad = true\n")
    lorafit(monkeypatch, "train", "-c", file, "--no-skip-bad")
    assert asked["settings"] == {"skip_bad": False}


def test_a_dry_run_of_a_run_that_is_gone_on_with_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    assert lorafit(monkeypatch, "train", "b", "d", "--dry-run", "--resume") == 2
    assert "--dry-run --resume" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["rank = \n", "rank 4", "\x00"])
def test_a_file_that_is_not_toml_is_told_with_the_place(tmp_path: Path, text: str) -> None:
    with pytest.raises(SettingsError, match=r"a\.toml: not TOML \(.*line 1"):
        read_run_file(written(tmp_path / "a.toml", text))


def test_the_template_sets_nothing_and_every_line_of_it_may_be_taken() -> None:
    assert tomllib.loads(template()) == {}
    settings = [line.removeprefix("# ") for line in template().splitlines() if " = " in line]
    taken = tomllib.loads("\n".join(settings))
    assert set(taken) == set(RunFile.model_fields)
    RunFile(**taken)


def test_every_setting_of_a_file_is_a_flag_or_argument_of_train() -> None:
    known = {parameter.name for parameter in typer.main.get_command(app).commands["train"].params}  # type: ignore[attr-defined]
    assert set(RunFile.model_fields) <= known


def test_the_schema_knows_what_the_file_may_say() -> None:
    schema = RunFile.model_json_schema()
    assert set(schema["properties"]) == set(RunFile.model_fields)
    assert schema["additionalProperties"] is False
    assert schema["properties"]["val_share"]["exclusiveMaximum"] == 0.5


def test_a_dry_run_tells_the_cost_and_writes_nothing(
    tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    rows = write_rows(tmp_path / "rows.jsonl", capitals())
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(
        "sys.argv", ["lorafit", "train", str(tiny_folder), str(rows), "--rank", "2", "--dry-run", "--json"]
    )
    main_ended = pytest.raises(SystemExit)
    with main_ended as end:
        main()
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert end.value.code == 0
    assert sorted(path.name for path in tmp_path.iterdir()) == ["rows.jsonl"]
    assert found["forecast"]["seconds"] > found["forecast"]["step"] > 0
    assert found["forecast"]["disk"] > found["bytes"] > 0
    assert TrainSettings(**found["settings"]) == TrainSettings(rank=2)


def test_the_home_folder_is_meant_by_its_sign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    found = read_run_file(written(tmp_path / "a.toml", 'data = "~/my.jsonl"'))
    assert found["data"] == str(tmp_path / "home" / "my.jsonl")
