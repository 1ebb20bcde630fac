"""Lets PEFT read an adapter folder in a second process, and compares its logits with ours."""

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
from lorafit.runs.summary import PeftCheck

FP32 = 4  # bytes of a parameter
OVERHEAD = int(0.6e9)  # bytes of a process that has imported torch and PEFT, and its activations (measured: 0.5e9)


def compare_with_peft(
    folder: Path, base: Base, rows: Sequence[Sequence[int]], say: Callable[[str], None], room: int | None = None
) -> PeftCheck | None:
    """Ask PEFT to read an adapter folder, in a process of its own that opens the base in fp32.

    Args:
        folder: The adapter folder.
        base: The base, opened from a folder.
        rows: Token ids on which the logits are compared.
        say: Called with a message that PEFT is asked, or why it is not.
        room: Bytes that the process may take; None for no limit.

    Returns:
        The largest difference between PEFT's logits and ours, and the largest effect of the adapter on them; None if
        PEFT cannot be asked.
    """
    if base.folder is None:
        say("the base is only in this process, so PEFT was not asked to read the adapter: open the base from a folder")
        return None
    if importlib.util.find_spec("peft") is None:
        say("PEFT is not installed, so it was not asked to read the adapter (pip install peft==0.21.2)")
        return None
    config: Any = base.model.config
    logits = 3 * sum(map(len, rows)) * int(config.get_text_config().vocab_size)  # of the base, of ours, of theirs
    needed = FP32 * (sum(parameter.numel() for parameter in base.model.parameters()) + logits) + OVERHEAD
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
    return PeftCheck(**json.loads(done.stdout.strip().splitlines()[-1]))
