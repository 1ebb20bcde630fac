"""Paths: strings wherever they are given, from the root on wherever they are kept."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
from conftest import byte_tokenizer, capitals, tiny_llama, write_rows

from lorafit import open_base, read_adapter, run_evaluation, run_training
from lorafit.adapters.formats import peft
from lorafit.errors import BaseError

SETTINGS: dict[str, Any] = {"epochs": 1.0, "rank": 2, "search": "none", "few_shot": 0, "validations": 1, "trim": "none",
                            "routing_questions": 0, "dtype": "fp32", "general": "d/letter.txt"}  # fmt: skip


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A folder in which a run was made by relative paths; the tests are in another one."""
    folder, elsewhere = tmp_path_factory.mktemp("home"), tmp_path_factory.mktemp("elsewhere")
    tiny_llama().save_pretrained(folder / "bases" / "tiny")
    byte_tokenizer().save_pretrained(folder / "bases" / "tiny")
    write_rows(folder / "d" / "rows.jsonl", capitals())
    write_rows(folder / "d" / "new.jsonl", [{"prompt": f"What follows {n}?", "completion": str(n)} for n in range(8)])
    (folder / "d" / "letter.txt").write_text("Dear all,\n\nthe key is under the mat.\n\nYours", encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("lorafit.jobs.train.compare_with_peft", lambda *_: None)
        patch.chdir(folder)
        run_training("bases/tiny", "d/rows.jsonl", "runs/rel", SETTINGS)
        patch.chdir(elsewhere)
        yield folder


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def test_base_data_and_files_are_kept_from_the_root_on(home: Path) -> None:
    run = read(home / "runs/rel/run.json")
    assert (run["base"], run["data"]) == (str(home / "bases/tiny"), str(home / "d/rows.jsonl"))
    assert run["typed"] == {"base": "bases/tiny", "data": "d/rows.jsonl"}
    assert run["settings"]["general"] == str(home / "d/letter.txt")
    assert read(home / "runs/rel/adapter/lorafit.json")["base_name"] == str(home / "bases/tiny")
    config = read(home / "runs/rel/adapter/adapter_config.json")
    assert config["base_model_name_or_path"] == str(home / "bases/tiny")


def test_the_lines_of_the_model_card_run_as_they_stand(home: Path) -> None:
    card = (home / "runs/rel/adapter/README.md").read_text(encoding="utf-8")
    (code,) = re.findall(r"^```python\n(.*?)^```", card, re.DOTALL | re.MULTILINE)
    done = subprocess.run([sys.executable, "-c", code], cwd=home / "runs/rel/adapter", capture_output=True, text=True,
                          check=False)  # fmt: skip
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("named", ["runs/rel", "runs/rel/adapter"])
def test_an_adapter_is_read_by_a_string_of_the_run_or_of_its_folder(home: Path, named: str) -> None:
    assert read_adapter(str(home / named)) == read_adapter(home / "runs/rel/adapter")


def test_an_adapter_is_evaluated_from_elsewhere_by_strings(home: Path, tmp_path: Path) -> None:
    run_evaluation(None, str(home / "runs/rel"), str(home / "d/new.jsonl"), {"dtype": "fp32"},
                   answers=str(tmp_path / "answers.jsonl"))  # fmt: skip
    assert (tmp_path / "answers.jsonl").exists()


def test_a_run_is_resumed_from_elsewhere(home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lorafit.jobs.train.compare_with_peft", lambda *_: None)
    out = Path(copytree(home / "runs/rel", tmp_path / "run"))
    (out / "summary.json").unlink()
    run_training(None, None, str(out), {}, resume=True)
    assert (out / "summary.json").exists()


def test_a_folder_that_an_earlier_version_named_from_elsewhere_is_not_asked_of_the_hub(
    home: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fetched(*_: Any, **__: Any) -> None:
        raise AssertionError("asked of the hub")

    monkeypatch.setattr("lorafit.bases.hub.fetched", fetched)
    old = Path(copytree(home / "runs/rel/adapter", tmp_path / "adapter"))
    said = read(old / "lorafit.json")
    (old / "lorafit.json").write_text(json.dumps(said | {"base_name": "bases/tiny"}), encoding="utf-8")
    assert peft.glance(old).base_name == peft.read(old).base_name == "./bases/tiny"
    with pytest.raises(BaseError, match="there is no such folder"):
        open_base(str(peft.read(old).base_name))
    monkeypatch.chdir(home)
    assert open_base(str(peft.read(old).base_name)).identity == peft.read(old).base
