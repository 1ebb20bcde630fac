"""What every arm of `bench/serve.py` shares: its job, its turns, what it says. Runs without lorafit, too.

An arm is a process that opens the base and its adapters, says that it is ready, and then serves one workload for each
line of JSON on stdin, so that only one arm works at a time. It answers each with a line on stdout.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Asked:
    """One request: token ids of its prompt, the adapter (None: the bare base), tokens wanted whatever ends a turn."""

    prompt: Sequence[int]
    adapter: str | None
    tokens: int


@dataclass(frozen=True)
class Served:
    """What came of it: token ids, and when each came, in seconds after all were asked."""

    ids: list[int]
    at: list[float]


def spoken_to() -> Any:
    """Where the benchmark listens. From now on whatever a library prints goes to stderr."""
    out = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)
    return out


OUT = spoken_to()  # before any library is imported that prints


def read_job() -> dict[str, Any]:
    """What the arm is told: model, dtype, adapters by name, most_rank, slots, room."""
    job: dict[str, Any] = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    return job


def take_turns(serve: Callable[[list[Asked]], list[Served]], **about: Any) -> None:
    """Serve what stdin asks for until it ends. about: said once, when ready."""
    print(json.dumps({"ready": True, **about}), file=OUT, flush=True)
    for line in sys.stdin:
        asked = [Asked(**one) for one in json.loads(line)]
        began = time.perf_counter()
        served = serve(asked)
        seconds = time.perf_counter() - began
        told = {"seconds": seconds, "served": [asdict(one) for one in served], "memory": resident()}
        print(json.dumps(told), file=OUT, flush=True)


def resident() -> int:
    """Bytes of memory this process and its children have taken at most so far."""
    import resource

    return 1024 * sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
