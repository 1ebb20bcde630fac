"""The wheel as its user meets it: an empty environment, no repository. Minutes, so in make test-all."""

from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "scripts" / "check_wheel.py"


def test_the_wheel_holds_every_file_that_is_no_module() -> None:
    package = ROOT / "src" / "lorafit"
    patterns = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]["lorafit"]
    held = {path for pattern in patterns for path in package.glob(pattern)}
    others = {path for path in package.rglob("*") if path.is_file() and path.suffix not in {".py", ".pyc"}}
    assert others == held


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment_without_the_repository() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("the wheel works without the repository\n")
