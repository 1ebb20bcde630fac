"""Near-identical examples among many: seconds and memory of all that is asked of them. `make bench-alike`

Texts are drawn from invented words; a tenth of them are copies in which one word in fifty is another. Each set is
checked in a process of its own, which imports what `lorafit data` imports: indexed once, held-out examples drawn, both
proven apart, copies counted. What was found is compared with the copies that were planted, and memory with the bound
that was set beforehand: 1 GB at most, the texts and Python included.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

SETS = {"prompts": (100_000, 570), "contracts": (5_000, 10_000)}  # texts, characters of each
BOUND = 1e9
COPIES, CHANGED = 0.1, 50  # share of texts that are copies; of so many words one is changed


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--share", type=float, default=1.0, help="of the texts of each set")
    parser.add_argument("--record", action="store_true", help="append the table to bench/RESULTS.md")
    parser.add_argument("--only", choices=SETS, help=argparse.SUPPRESS)  # the process that checks one set
    asked = parser.parse_args()
    if asked.only:
        print(json.dumps(checked(asked.only, asked.share)))
        return
    found = {name: _in_a_process(name, asked.share) for name in SETS}
    from results import circumstances, markdown, record  # torch behind it, which is none of the sets' memory

    head = [
        "set",
        "texts",
        "characters",
        "index (s)",
        "split (s)",
        "apart (s)",
        "report (s)",
        "copies found",
        "before (GB)",
        "peak (GB)",
        "a text (KB)",
    ]
    rows = [
        [
            name,
            f"{one['texts']:,}",
            f"{one['characters']:,}",
            *(f"{one['seconds'][part]:.1f}" for part in ("index", "split", "apart", "report")),
            f"{one['found']:,} of {one['planted']:,}",
            f"{one['before'] / 1e9:.2f}",
            f"{one['peak'] / 1e9:.2f}",
            f"{(one['peak'] - one['before']) / one['texts'] / 1e3:.1f}",
        ]
        for name, one in found.items()
    ]
    table = Table(*head)
    for row in rows:
        table.add_row(*row)
    Console().print(table)
    about = {**circumstances(), "share": asked.share, "sets": found}
    within = all(one["peak"] <= BOUND for one in found.values())
    said = f"Memory of at most {BOUND / 1e9:.0f} GB: {'kept' if within else 'NOT kept'}. One thread."
    if asked.record:
        record("Near-identical examples", about, f"{markdown(head, rows)}\n\n{said}\n")
    print(said)
    print(json.dumps(about))


def _in_a_process(name: str, share: float) -> dict[str, Any]:
    command = [sys.executable, __file__, "--only", name, "--share", str(share)]
    threads = dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    done = subprocess.run(command, capture_output=True, text=True, check=True, env={**os.environ, **threads})
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def texts_of(count: int, characters: int) -> tuple[list[str], int]:
    """Texts, and how many of them are copies of others, changed a little."""
    rng = random.Random(0)
    vocabulary = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 10))) for _ in range(20_000)]
    planted = round(COPIES * count)
    texts = [" ".join(rng.choices(vocabulary, k=characters // 7)) for _ in range(count - planted)]
    for original in rng.sample(texts, planted):
        words = original.split()
        for place in rng.sample(range(len(words)), max(1, len(words) // CHANGED)):
            words[place] = rng.choice(vocabulary)
        texts.append(" ".join(words))
    rng.shuffle(texts)
    return texts, planted


def checked(name: str, share: float) -> dict[str, Any]:
    """What is asked of one set of examples, with seconds of the processor and bytes."""
    from lorafit.data.examples import Example, Examples, Message
    from lorafit.data.report import describe
    from lorafit.data.split import Questions, complete, require_apart

    count, characters = SETS[name]
    texts, planted = texts_of(max(20, round(share * count)), characters)
    examples = Examples(
        tuple(
            Example((Message("user", text), Message("assistant", "Yes.")), f"x:{i}") for i, text in enumerate(texts, 1)
        )
    )
    before = _peak()
    seconds: dict[str, float] = {}
    began = time.process_time()

    def passed(part: str) -> None:
        nonlocal began
        now = time.process_time()
        seconds[part], began = now - began, now

    questions = Questions.of(examples)
    passed("index")
    found = questions.repeated(examples.train)
    whole = complete(examples, questions=questions)
    passed("split")
    require_apart(whole, questions)
    passed("apart")
    describe(whole, questions)
    passed("report")
    mean = round(sum(map(len, texts)) / len(texts))
    return {
        "texts": len(texts),
        "characters": mean,
        "seconds": seconds,
        "found": found,
        "planted": planted,
        "before": before,
        "peak": _peak(),
    }


def _peak() -> int:
    """Bytes this process has held at most; of Linux, those of this program alone and not of who started it."""
    status = Path("/proc/self/status")
    if status.exists() and (told := re.search(r"^VmHWM:\s*(\d+) kB", status.read_text(), re.MULTILINE)):
        return 1024 * int(told[1])
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return held if sys.platform == "darwin" else 1024 * held


if __name__ == "__main__":
    main()
