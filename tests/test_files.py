"""A folder is replaced whole or not at all, wherever its writer is killed."""

from __future__ import annotations

import multiprocessing
import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from lorafit import files
from lorafit.adapters.folder import require_adapter_folder
from lorafit.errors import FormatError, RunError
from lorafit.files import unfinished, whole_folder

FORKS = pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def replaced(target: Path, kill: str, exchange: bool) -> None:
    """Replace `target` in a process that dies at one place."""
    rename, exchanged = Path.rename, files._exchanged
    calls: list[str] = []

    def told(real: Callable[..., Any], name: str) -> Callable[..., Any]:
        def call(*given: Any) -> Any:
            calls.append(name)
            if kill == f"before {name} {len(calls)}":
                die()
            result = real(*given)
            if kill == f"after {name} {len(calls)}":
                die()
            return result

        return call

    Path.rename = told(rename, "rename")  # type: ignore[assignment,method-assign]
    files._exchanged = told(exchanged, "exchange") if exchange else lambda *_: False
    with whole_folder(target) as building:
        (building / "what").write_text("new")


def folder(path: Path) -> Path:
    path.mkdir()
    (path / "what").write_text("old")
    return path


def killed(target: Path, kill: str, exchange: bool) -> None:
    process = multiprocessing.get_context("fork").Process(target=replaced, args=(target, kill, exchange))
    process.start()
    process.join(30)
    assert process.exitcode == -signal.SIGKILL


@FORKS
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(
    ("kill", "said"),
    [("before rename 1", "old"), ("after rename 1", "old"), ("before rename 2", "old"), ("after rename 2", "new")],
)
def test_where_names_change_in_two_steps_a_kill_between_them_loses_nothing(
    tmp_path: Path, kill: str, said: str
) -> None:
    target = folder(tmp_path / "adapter")
    killed(target, kill, exchange=False)
    for left in unfinished(tmp_path, ["adapter"]):
        files.shutil.rmtree(left)
    assert (target / "what").read_text() == said
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


@FORKS
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
def test_who_reads_an_adapter_finds_what_a_killed_writer_had_moved_aside(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(files, "WAIT", 0.01)
    target = folder(tmp_path / "adapter")
    killed(target, "after rename 1", exchange=False)
    assert not target.exists()
    with pytest.raises(FormatError, match=r"adapter_config\.json and adapter_model\.safetensors missing"):
        require_adapter_folder(target)
    assert (target / "what").read_text() == "old"


def test_a_writer_at_work_is_waited_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What it has moved aside is not put back under its hands."""
    aside = folder(tmp_path / ".adapter.abcd1234.old")
    monkeypatch.setattr(files.time, "sleep", lambda _: (tmp_path / "adapter").mkdir())
    files.put_back(tmp_path / "adapter")
    assert aside.exists() and not list((tmp_path / "adapter").iterdir())


@FORKS
@pytest.mark.filterwarnings("ignore:This process .* is multi-threaded:DeprecationWarning")
@pytest.mark.parametrize(("kill", "said"), [("before exchange 1", "old"), ("after exchange 1", "new")])
def test_where_names_change_in_one_step_the_folder_is_there_at_once(tmp_path: Path, kill: str, said: str) -> None:
    target = folder(tmp_path / "adapter")
    if not files._exchanged(folder(tmp_path / "one"), folder(tmp_path / "other")):
        pytest.skip("this disk cannot exchange two names")
    killed(target, kill, exchange=True)
    assert (target / "what").read_text() == said
    assert len(unfinished(tmp_path, ["adapter"])) == 1


def test_a_folder_is_replaced(tmp_path: Path) -> None:
    target = folder(tmp_path / "adapter")
    with whole_folder(target) as building:
        (building / "what").write_text("new")
    assert (target / "what").read_text() == "new"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_a_file_is_never_replaced_by_a_folder(tmp_path: Path) -> None:
    (tmp_path / "adapter").write_text("mine")
    with pytest.raises(RunError, match="adapter: a file, not a folder: name"), whole_folder(tmp_path / "adapter"):
        pass
    assert (tmp_path / "adapter").read_text() == "mine"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_the_folder_behind_a_link_is_replaced_and_the_link_stays(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    target = folder(tmp_path / "disk" / "adapter")
    link = tmp_path / "adapter"
    link.symlink_to(target)
    with whole_folder(link) as building:
        (building / "what").write_text("new")
    assert link.is_symlink()
    assert (target / "what").read_text() == "new"
