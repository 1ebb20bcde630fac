"""What every arm of `bench/train.py` shares: its job, its pace, its memory. Runs without lorafit, too.

An arm is a process that prepares, takes its warm-up steps, and then waits for a line on stdin before each window, so
that only one arm works at a time. What it has measured it says in JSON lines on stdout.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}


@dataclass(frozen=True)
class PeftArm:
    """One way of setting up PEFT and the Trainer. All have dropout 0, no checkpointing of activations, no logging, no
    saving, torch's fused AdamW and transformers' SDPA attention, as they come.

    grouped: group_by_length. flat: DataCollatorWithFlattening, no padding at all. half_factors: the pairs in the
    base's dtype (autocast_adapter_dtype=False) and not in fp32. autocast: the Trainer's bf16=True. compiled:
    torch_compile=True. liger: use_liger_kernel=True, fused kernels for CUDA alone.
    keeps_memory: the allocator keeps freed blocks (glibc's environment variables), as lorafit and the floors do.
    """

    about: str
    dtype: str
    grouped: bool = True
    flat: bool = False
    half_factors: bool = False
    autocast: bool = False
    compiled: bool = False
    liger: bool = False
    keeps_memory: bool = True

    def switches(self) -> list[str]:
        """What is set away from what the Trainer and PEFT do by themselves, by public names."""
        return [
            name
            for name, on in (
                ("group_by_length", self.grouped),
                ("DataCollatorWithFlattening", self.flat),
                ("autocast_adapter_dtype=False", self.half_factors),
                ("bf16=True", self.autocast),
                ("torch_compile", self.compiled),
                ("use_liger_kernel", self.liger),
                ("freed memory kept (MALLOC_TRIM_THRESHOLD_)", self.keeps_memory),
            )
            if on
        ]


PEFT_ARMS = {
    "peft-fp32": PeftArm("PEFT fp32, as it comes", "fp32", grouped=False, keeps_memory=False),
    "peft-fp32-best": PeftArm("PEFT fp32, switches", "fp32"),
    "peft-fp32-flat": PeftArm("PEFT fp32, no padding", "fp32", flat=True),
    "peft-fp32-compiled": PeftArm("PEFT fp32, compiled", "fp32", compiled=True),
    "peft-bf16-best": PeftArm("PEFT bf16, switches", "bf16", half_factors=True),
    "peft-bf16-liger": PeftArm("PEFT bf16, Liger", "bf16", half_factors=True, liger=True),
    "peft-bf16-autocast": PeftArm("PEFT bf16, fp32 pairs", "bf16", autocast=True),
}
OWN_ARMS = {
    "lorafit": "lorafit",
    "floor": "floor",
    "floor-compiled": "floor, compiled",
}
ABOUT = {**{name: arm.about for name, arm in PEFT_ARMS.items()}, **OWN_ARMS}


@dataclass(frozen=True)
class Job:
    """What an arm is told. rows and valid: [ids, trained] pairs. start: the folder of the adapter all begin with.

    shape: a LlamaConfig's fields, of a base with random weights, in place of the folder `base`; then start is None.
    """

    arm: str
    dtype: str
    device: str
    base: str | None
    shape: dict[str, Any] | None
    start: str | None
    rows: list[tuple[list[int], list[bool]]]
    valid: list[tuple[list[int], list[bool]]]
    batch: int
    warmup: int
    windows: int
    steps: int
    out: str
    rank: int = 8
    alpha: int = 32
    learning_rate: float = 1e-3
    rate_warmup: int = 2
    seed: int = 0

    @property
    def all_steps(self) -> int:
        return self.warmup + self.windows * self.steps

    @staticmethod
    def read(path: Path) -> Job:
        return Job(**json.loads(path.read_text(encoding="utf-8")))


def random_model(job: Job) -> nn.Module:
    """A Llama of the job's shape with seeded random weights, made where it is used."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(job.seed)
    before = torch.get_default_dtype()
    torch.set_default_dtype(DTYPES[job.dtype])
    try:
        with torch.device(job.device):
            model: nn.Module = LlamaForCausalLM(LlamaConfig(**(job.shape or {})))
    finally:
        torch.set_default_dtype(before)
    return model.eval().requires_grad_(False)


def load_model(job: Job) -> nn.Module:
    """The base as transformers opens it, frozen."""
    from transformers import AutoModelForCausalLM

    if job.base is None:
        return random_model(job)
    model: nn.Module = AutoModelForCausalLM.from_pretrained(job.base, dtype=DTYPES[job.dtype], local_files_only=True)
    return model.eval().requires_grad_(False).to(job.device)


class Memory:
    """Peak above what was resident after the imports, in bytes, the base included.

    On CUDA it is what torch allocated on the device. On Linux it is VmHWM, reset once the base is there so that
    reading the weights does not count; elsewhere getrusage's largest, which nothing resets.
    """

    def __init__(self, device: str):
        self.cuda = device.startswith("cuda")
        self.method = "torch.cuda.max_memory_allocated" if self.cuda else "getrusage"
        if not self.cuda and Path("/proc/self/clear_refs").exists():
            self.method = "VmHWM"
        self._reset()
        self.imports = 0 if self.cuda else self._read("VmRSS")

    def base_is_loaded(self) -> None:
        self._reset()

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated() if self.cuda else self._read("VmHWM") - self.imports

    def _reset(self) -> None:
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        elif self.method == "VmHWM":
            Path("/proc/self/clear_refs").write_text("5")

    def _read(self, field: str) -> int:
        if self.method == "VmHWM":
            lines = Path("/proc/self/status").read_text().splitlines()
            return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(field + ":"))
        import resource

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class Pace:
    """Counts steps, waits before each window, and says what each took."""

    def __init__(self, job: Job):
        self.job = job
        # Libraries print; only what is said here may reach the parent.
        self.said = os.fdopen(os.dup(1), "w", encoding="utf-8")
        os.dup2(2, 1)
        self.memory = Memory(job.device)
        self.done = 0
        self.counts = [0, 0, 0]
        self.began = time.perf_counter()

    def say(self, **what: Any) -> None:
        print(json.dumps(what), file=self.said, flush=True)

    def stepped(self, counts: Sequence[int]) -> None:
        """After every optimizer step, with its examples, real tokens and trained tokens."""
        self.done += 1
        self.counts = [a + b for a, b in zip(self.counts, counts, strict=True)]
        into = self.done - self.job.warmup
        if into < 0 or into % self.job.steps:
            return
        if self.job.device.startswith("cuda"):
            torch.cuda.synchronize()
        seconds = time.perf_counter() - self.began
        if into == 0:
            self.say(ready=seconds)
        else:
            examples, tokens, trained = self.counts
            self.say(seconds=seconds, examples=examples, tokens=tokens, trained=trained, peak=self.memory.peak())
        if self.done < self.job.all_steps and sys.stdin.readline().strip() != "go":
            raise SystemExit("the parent is gone")
        self.counts = [0, 0, 0]
        self.began = time.perf_counter()

    def finish(self, **what: Any) -> None:
        self.say(finished=True, memory=self.memory.method, threads=torch.get_num_threads(), **what)


class Seen:
    """Which rows a step took, read off the ids that the embedding looked up: right for rows padded or packed, in any
    order and division, without a word from the training loop."""

    def __init__(self, embedding: nn.Module, job: Job):
        self.rows = {_text(ids): (len(ids), sum(trained)) for ids, trained in job.rows}
        if len(self.rows) < len(job.rows):
            raise ValueError("two rows of the benchmark are equal: draw others")
        self.looked_up: list[Tensor] = []
        embedding.register_forward_hook(lambda module, args, output: self.looked_up.append(args[0].detach()))

    def take(self) -> tuple[int, int, int]:
        """Examples, real tokens and trained tokens since it was last asked."""
        text = "\0".join(_text(ids.reshape(-1).tolist()) for ids in self.looked_up)
        self.looked_up.clear()
        found = [counts for row, counts in self.rows.items() if row in text]
        if not found:
            raise RuntimeError("a step looked up none of the rows: the arm no longer calls the model's embedding")
        return len(found), sum(tokens for tokens, _ in found), sum(trained for _, trained in found)


def _text(ids: Sequence[int]) -> str:
    """Ids as one string, a character each, which is searched fast."""
    return "".join(map(chr, ids))
