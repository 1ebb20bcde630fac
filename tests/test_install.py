"""The wheel as its user meets it: an empty environment, no repository. Minutes, so in make test-all."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).resolve().parents[1] / "scripts" / "check_wheel.py"


@pytest.mark.slow
def test_the_wheel_works_in_an_empty_environment_without_the_repository() -> None:
    done = subprocess.run([sys.executable, SCRIPT], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.endswith("the wheel works without the repository\n")
