"""Paths: strings wherever they are given, from the root on wherever they are kept."""

from __future__ import annotations

import dataclasses
import inspect
import json
import re
import subprocess
import sys
import types
from collections.abc import Callable, Iterator
from pathlib import Path
from shutil import copytree
from typing import Any, Union, get_args, get_origin, get_type_hints

import pytest
import torch
from conftest import byte_tokenizer, capitals, tiny_llama, write_rows

import lorafit
from lorafit.adapters.formats import peft
from lorafit.bases.base import open_base
from lorafit.data.reading import read_examples
from lorafit.data.render import render, renderer_for
from lorafit.errors import BaseError
from lorafit.jobs.chat import Chat
from lorafit.jobs.demo import run_demo
from lorafit.jobs.evaluate import run_evaluation
from lorafit.jobs.plan import run_planning
from lorafit.jobs.prepare import open_all
from lorafit.jobs.refine import run_refining
from lorafit.jobs.show import shown
from lorafit.jobs.train import run_training
from lorafit.jobs.trim import cut, run_trimming
from lorafit.planning import decide
from lorafit.report.page import write_report
from lorafit.serving import Engine
from lorafit.settings import settings_from
from lorafit.training.loop import train

SETTINGS: dict[str, Any] = {
    "epochs": 1.0,
    "rank": 2,
    "search": "none",
    "few_shot": 0,
    "validations": 1,
    "trim": "none",
    "routing_questions": 0,
    "dtype": "fp32",
    "general": "d/letter.txt",
}


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
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=home / "runs/rel/adapter", capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("named", ["runs/rel", "runs/rel/adapter"])
def test_an_adapter_is_read_by_a_string_of_the_run_or_of_its_folder(home: Path, named: str) -> None:
    assert peft.read(str(home / named)) == peft.read(home / "runs/rel/adapter")


def test_an_adapter_is_evaluated_from_elsewhere_by_strings(home: Path, tmp_path: Path) -> None:
    run_evaluation(
        None,
        str(home / "runs/rel"),
        str(home / "d/new.jsonl"),
        {"dtype": "fp32"},
        answers=str(tmp_path / "answers.jsonl"),
    )
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


# Every public function takes a path as a string and as a Path

ALSO_CALLED = {
    "cut": cut,
    "run_trimming": run_trimming,
    "run_demo": run_demo,
    "write_report": write_report,
    "shown": shown,
    "Chat": Chat,
    "peft.glance": peft.glance,
}
JOBS = {one.__name__: one for one in (run_evaluation, run_planning, open_all, run_refining)}
PATHS = {"base_name", "data", "folder", "out"}  # parameters of these names are paths


def public_functions() -> Iterator[tuple[str, Callable[..., Any]]]:
    """The functions behind the package's names, the jobs' and those of the commands, and the methods of the classes
    among them, without the `__init__` that a dataclass or a pydantic model is given."""
    named = {name: getattr(lorafit, name) for name in lorafit.__all__} | JOBS | ALSO_CALLED
    for name, value in named.items():
        if inspect.isfunction(value):
            yield name, value
        elif inspect.isclass(value):
            made = dataclasses.is_dataclass(value) or hasattr(value, "model_fields")
            for method, function in inspect.getmembers(value, inspect.isfunction):
                if not method.startswith("_") or (method == "__init__" and not made):
                    yield f"{name}.{method}", function


def takes_one_of_the_two(hint: Any) -> bool:
    """Whether a type holds Path without str, or is one of them where it should be both."""
    kinds = get_args(hint) if get_origin(hint) in (Union, types.UnionType) else (hint,)
    inner = (part for kind in kinds for part in get_args(kind) if part is not Ellipsis)
    return (Path in kinds and str not in kinds) or any(takes_one_of_the_two(part) for part in inner)


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The types of the parameters that may be paths. The names of others are not always there to be looked up."""
    told = {
        name: kind
        for name, kind in inspect.get_annotations(function).items()
        if name != "return" and (name in PATHS or "Path" in str(kind))
    }
    options = re.search(r"Unpack\[(\w+)\]", str(inspect.get_annotations(function)))
    named = get_type_hints(function.__globals__[options[1]]) if options else {}
    return {
        **get_type_hints(types.SimpleNamespace(__annotations__=told), function.__globals__),
        **{name: kind for name, kind in named.items() if name in PATHS or "Path" in str(kind)},
    }


def test_every_public_function_that_takes_a_path_takes_a_string_and_a_path() -> None:
    seen, wrong = set(), []
    for name, function in public_functions():
        for parameter, hint in hints_of(function).items():
            kinds = get_args(hint) or (hint,)
            seen |= {name} if Path in kinds else set()
            if takes_one_of_the_two(hint) or (parameter in PATHS and str in kinds and Path not in kinds):
                wrong.append(f"{name}({parameter}: {hint})")
    assert not wrong
    assert {"train", "run_training", "run_refining", "run_trimming", "open_base", "Engine.load"} <= seen


def test_a_training_keeps_checkpoint_and_trunk_in_folders_that_strings_name(home: Path, tmp_path: Path) -> None:
    base = open_base(str(home / "bases/tiny"), torch.float32)
    rows = render(renderer_for(base), read_examples(str(home / "d/rows.jsonl")).train, 256)
    plan = {"targets": ("1.mlp.down_proj",), "rank": 2, "learning_rate": 1e-3, "epochs": 2.0}
    decision = decide(base, rows[:12], settings_from(plan))
    for name in ("run", "trunk"):
        (tmp_path / name).mkdir()
    train(
        base,
        lorafit.fresh(base, decision.plan, 0),
        rows[:12],
        rows[12:],
        decision.recipe,
        trunk_bytes=1 << 24,
        folder=str(tmp_path / "run"),
        trunk_in=str(tmp_path / "trunk"),
    )
    assert (tmp_path / "run" / "metrics.jsonl").exists() and any((tmp_path / "trunk").rglob("*"))


def test_a_run_is_trimmed_cut_refined_reported_and_shown_by_strings(home: Path, tmp_path: Path) -> None:
    run, small, half, page = (str(tmp_path / name) for name in ("run", "small", "half", "report.html"))
    copytree(home / "runs/rel", run)
    assert run_trimming(run, small)["parameters"] == cut(run, "50%", half)["of"]
    assert peft.read(half).plan.parameters < peft.read(run).plan.parameters
    assert run_refining(run)["verdict"]
    assert write_report(run, page) == Path(page) and Path(page).exists(), "one run is no list of letters"
    assert write_report([run, str(home / "runs/rel")], page) == Path(page)
    assert shown(run)["kind"] == "run"


def test_an_adapter_is_served_and_asked_by_strings(home: Path) -> None:
    base, adapter = open_base(str(home / "bases/tiny"), torch.float32), str(home / "runs/rel/adapter")
    with Engine(base, {"desk": adapter}, slots=1, native=False) as engine:
        assert engine.load("other", adapter).digest == engine.adapters.find("desk").digest
    with Chat(base) as chat:
        assert chat.add(adapter) == "rel"


def test_base_and_data_may_be_paths(home: Path) -> None:
    base, data, letter = home / "bases/tiny", home / "d/rows.jsonl", home / "d/letter.txt"
    found = run_planning(base, data, {**SETTINGS, "general": letter})
    assert (found["base"], found["settings"]["general"]) == (str(base), str(letter))
    scored = run_evaluation(base, home / "runs/rel", home / "d/new.jsonl", {"dtype": "fp32", "general": letter})
    assert scored["base"] == str(base) and str(letter) in scored["general"]
