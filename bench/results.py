"""Where and at which commit something was measured, and its section of RESULTS.md. For every benchmark."""

from __future__ import annotations

import os
import platform
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).with_name("RESULTS.md")


def circumstances() -> dict[str, Any]:
    """The command, the commit and the machine: a benchmark's JSON begins with them."""
    command = shlex.join(["python", f"bench/{Path(sys.argv[0]).name}", *sys.argv[1:]])
    return {"command": command, "commit": _commit(), "machine": _machine()}


def _machine() -> dict[str, Any]:
    """Processor, cores, GPU, versions."""
    import torch

    info = Path("/proc/cpuinfo")
    lines = info.read_text().splitlines() if info.exists() else []
    model = next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "")
    return {
        "processor": model or platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name() if torch.cuda.is_available() else None,
        "system": platform.system(),
        "python": platform.python_version(),
        **{name: version(name) for name in ("torch", "transformers")},
    }


def _commit() -> str:
    """The commit, and whether the working tree has changed since; "" outside a clone."""

    def git(*words: str) -> str:
        done = subprocess.run(["git", *words], cwd=Path(__file__).parent, capture_output=True, text=True, check=False)
        return done.stdout.strip()

    return git("rev-parse", "--short", "HEAD") + (" with changes" if git("status", "--porcelain") else "")


def markdown(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table: the first column to the left, numbers to the right."""
    lines = [head, ["---", *["--:"] * (len(head) - 1)], *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def record(title: str, found: Mapping[str, Any], text: str) -> None:
    """Append a section. found: with `circumstances`."""
    at = found["machine"]
    where = f"{at['cores']} cores of an {at['processor']}" + (f", {at['gpu']}" if at["gpu"] else "")
    about = (
        f"`{found['command']}` at commit {found['commit']}; {where}, {at['system']}; Python {at['python']}, torch "
        f"{at['torch']}, transformers {at['transformers']}."
    )
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(f"\n## {title}, {datetime.now(UTC):%Y-%m-%d}\n\n{about}\n\n{text}\n")
