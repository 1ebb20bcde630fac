"""PEFT, asked to read what was written and to compute the same."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lorafit.bases.base import Base

FP32 = 4  # bytes of a parameter
BESIDE = int(0.6e9)  # bytes of a process that has imported torch and PEFT, and its activations (measured: 0.5e9)


def compare_with_peft(
    folder: Path, base: Base, rows: Sequence[Sequence[int]], say: Callable[[str], None], room: int | None = None
) -> dict[str, float] | None:
    """Ask PEFT to read an adapter folder, in a process of its own that opens the base in fp32.

    Args:
        folder: the adapter folder.
        base: the base, opened from a folder.
        rows: token ids on which the logits are compared.
        say: told that PEFT is asked, or why it is not.
        room: bytes that the process may take; None for as many as there are.

    Returns:
        The largest logit difference between PEFT's reading and ours, and the adapter's own effect; None where PEFT
        cannot be asked.
    """
    if base.folder is None:
        say("the base is open in this process alone, so PEFT was not asked to read the adapter: open it from a folder")
        return None
    if importlib.util.find_spec("peft") is None:
        say("PEFT is not installed, so it was not asked to read the adapter (pip install peft==0.21.2)")
        return None
    config: Any = base.model.config
    logits = 3 * sum(map(len, rows)) * int(config.get_text_config().vocab_size)  # of the base, of ours, of theirs
    needed = FP32 * (sum(parameter.numel() for parameter in base.model.parameters()) + logits) + BESIDE
    if room is not None and needed > room:
        say(
            f"PEFT was not asked to read the adapter: to open the base in fp32 once more takes about "
            f"{needed / 1e9:.1f} GB, and {room / 1e9:.1f} GB are left"
        )
        return None
    say("asking PEFT to read the adapter and compute the same")
    command = [sys.executable, "-m", "lorafit.jobs.with_peft", str(folder.resolve()), str(base.folder.resolve())]
    done = subprocess.run(command, input=json.dumps(rows), capture_output=True, text=True, check=False)
    if done.returncode:
        ended = f"its process was ended by signal {-done.returncode}" if done.returncode < 0 else "no reason given"
        reason = (done.stderr.strip().splitlines() or [ended])[-1]
        say(f"PEFT did not read the adapter: {reason}")
        return None
    found: dict[str, float] = json.loads(done.stdout.strip().splitlines()[-1])
    return found
