"""The processes of `bench/train.py`: each arm in one of its own, only one of them at work at a time."""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading
import time
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from train_child import PEFT_ARMS, Job

HERE = Path(__file__).resolve().parent
ENVIRONMENT = HERE.parent / ".cache" / "bench" / "peft"
COMPILE_LIMIT = 300.0  # seconds; a compilation that takes longer is reported as failed
SILENCE_LIMIT = 1800.0  # seconds without a word after which any arm is
# What lorafit's runs ask of glibc: keep freed blocks. In the environment, so that arms without lorafit have it, too.
KEEP_MEMORY = {"MALLOC_MMAP_THRESHOLD_": str(1 << 30), "MALLOC_TRIM_THRESHOLD_": str((1 << 31) - 1)}


def peft_python(pip_flags: Sequence[str], cuda: bool) -> str:
    """The interpreter of the environment that PEFT and the Trainer are installed into, once for each list of pins."""
    python = ENVIRONMENT / ("Scripts" if os.name == "nt" else "bin") / "python"
    files = [HERE / "requirements-train.txt", *([HERE / "requirements-train-gpu.txt"] if cuda else [])]
    wanted = "".join(file.read_text(encoding="utf-8") for file in files)
    mark = ENVIRONMENT / "ready"
    if not mark.exists() or mark.read_text(encoding="utf-8") != wanted:
        print(f"setting up {ENVIRONMENT.relative_to(HERE.parent)} for the PEFT arms, once", file=sys.stderr, flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", str(ENVIRONMENT)], check=True)
        pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", *pip_flags]
        pins = [word for file in files for word in ("-r", str(file))]
        subprocess.run([*pip, "-c", str(HERE.parent / "constraints.txt"), *pins], check=True)
        mark.write_text(wanted, encoding="utf-8")
    return str(python)


@dataclass
class Measured:
    """What an arm said: its windows, what it finished with, or why it did not."""

    job: Job
    windows: list[dict[str, float]] = field(default_factory=list)
    ready_seconds: float | None = None
    finished: dict[str, Any] = field(default_factory=dict)
    failed: str | None = None


class Progress:
    """Says each window with the time left, from the seconds per token that each arm has shown so far."""

    def __init__(self) -> None:
        self.todo: dict[tuple[str, str], float] = {}
        self.shown: dict[str, list[float]] = defaultdict(lambda: [0.0, 0.0])

    def expect(self, name: str, job: Job) -> None:
        mean = sum(len(ids) for ids, _ in job.rows) / len(job.rows)
        self.todo[name, job.arm] = mean * job.batch * job.all_steps

    def drop(self, name: str, arm: str) -> None:
        self.todo.pop((name, arm), None)

    def did(self, name: str, arm: str, tokens: float, seconds: float, what: str) -> None:
        self.todo[name, arm] = max(0.0, self.todo.get((name, arm), 0.0) - tokens)
        self.shown[arm][0] += tokens
        self.shown[arm][1] += seconds
        every = [sum(column) for column in zip(*self.shown.values(), strict=True)]
        left = 0.0
        for (_, other), rest in self.todo.items():
            done, took = self.shown[other] if other in self.shown and self.shown[other][0] else every
            left += rest * took / done
        speed = f"{tokens / seconds:8.1f} tokens/s"
        print(f"{name:10} {arm:19} {what:14} {speed}   about {left / 60:.0f} min left", file=sys.stderr, flush=True)


class Arm:
    """One child process, and the lines it says."""

    def __init__(self, job: Job, python: str, work: Path):
        self.job = job
        path = work / f"{job.arm}.json"
        path.write_text(json.dumps(asdict(job)), encoding="utf-8")
        self.log = work / f"{job.arm}.log"
        keeps = job.arm not in PEFT_ARMS or PEFT_ARMS[job.arm].keeps_memory
        self.process = subprocess.Popen(
            [python, str(HERE / "train.py"), "--arm", job.arm, "--job", str(path)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.log.open("w", encoding="utf-8"),
            text=True,
            env=child_environment(keeps),
        )
        self.lines: queue.Queue[str | None] = queue.Queue()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        assert self.process.stdout
        for line in self.process.stdout:
            self.lines.put(line)
        self.lines.put(None)

    def hear(self, limit: float = SILENCE_LIMIT) -> dict[str, Any]:
        """The next thing it says; {"failed": why} where it ends instead, or says nothing for `limit` seconds."""
        try:
            line = self.lines.get(timeout=limit)
        except queue.Empty:
            self.close()
            return {"failed": f"not a word for {limit:.0f} s"}
        if line is not None:
            said: dict[str, Any] = json.loads(line)
            return said
        self.process.wait()
        said_last = self.log.read_text(encoding="utf-8", errors="replace").strip().splitlines()
        return {"failed": said_last[-1] if said_last else f"ended with status {self.process.returncode}"}

    def go(self) -> None:
        assert self.process.stdin
        try:
            self.process.stdin.write("go\n")
            self.process.stdin.flush()
        except BrokenPipeError:
            pass  # it has ended: the next `hear` says why

    def close(self) -> None:
        self.process.kill()
        self.process.wait()


def child_environment(keeps_memory: bool) -> dict[str, str]:
    paths = [str(HERE.parent / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    own = {"PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    return {**os.environ, **own, **(KEEP_MEMORY if keeps_memory else {})}


def measure(name: str, jobs: Sequence[Job], peft: str, work: Path, progress: Progress) -> dict[str, Measured]:
    """Start every arm and let it warm up, then give each its next window in turn until all have had theirs."""
    arms: list[Arm] = []
    measured = {job.arm: Measured(job) for job in jobs}
    try:
        for job in jobs:
            began = time.monotonic()
            arms.append(Arm(job, peft if job.arm in PEFT_ARMS else sys.executable, work))
            said = arms[-1].hear(COMPILE_LIMIT if "compiled" in job.arm else SILENCE_LIMIT)
            if _failed(said, name, measured[job.arm], progress):
                continue
            measured[job.arm].ready_seconds = said["ready"]
            print(f"{name:10} {job.arm:19} ready after {time.monotonic() - began:.0f} s", file=sys.stderr, flush=True)
            warm = progress.todo[name, job.arm] * job.warmup / job.all_steps
            progress.todo[name, job.arm] -= warm
        for window in range(max(job.windows for job in jobs)):
            for arm in arms:
                if window < arm.job.windows and not measured[arm.job.arm].failed:
                    _one_window(arm, window, name, measured[arm.job.arm], progress)
    finally:
        for arm in arms:
            arm.close()
    return measured


def _one_window(arm: Arm, window: int, name: str, into: Measured, progress: Progress) -> None:
    arm.go()
    said = arm.hear()
    if _failed(said, name, into, progress):
        return
    into.windows.append(said)
    progress.did(name, arm.job.arm, said["tokens"], said["seconds"], f"window {window + 1} of {arm.job.windows}")
    if window + 1 == arm.job.windows:  # it goes on by itself, and must be at rest before the next arm works
        last = arm.hear()
        if not _failed(last, name, into, progress):
            into.finished = last


def _failed(said: Mapping[str, Any], name: str, into: Measured, progress: Progress) -> bool:
    if "failed" not in said:
        return False
    into.failed = said["failed"]
    progress.drop(name, into.job.arm)
    print(f"{name:10} {into.job.arm:19} FAILED: {into.failed}", file=sys.stderr, flush=True)
    return True


def score(job: Job, adapters: Mapping[str, str], work: Path) -> dict[str, list[float]]:
    """NLL per validation example of the base and of every adapter, all by lorafit's evaluator in one process."""
    path = work / "score.json"
    path.write_text(json.dumps(asdict(job)), encoding="utf-8")
    named = [f"{name}={folder}" for name, folder in adapters.items()]
    command = [sys.executable, str(HERE / "train.py"), "--arm", "score", "--job", str(path), "--adapters", *named]
    done = subprocess.run(command, env=child_environment(True), stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, list[float]] = json.loads(done.stdout.splitlines()[-1])
    return found
