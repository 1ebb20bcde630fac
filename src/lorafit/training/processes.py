"""The processes of one run: each computes a share of every step, and the sum of the shares is the same step in all.

The factors are replicated and are not part of the module tree, so no module is wrapped. The first process makes the
decisions that depend on a clock or a measurement.
"""

from __future__ import annotations

import json
import os
import signal
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lorafit.errors import Interrupted, SettingsError


@dataclass(frozen=True)
class Processes:
    """This process among those of its run. A single process exchanges nothing.

    If another process has ended, all methods that wait for it raise Interrupted.

    Args:
        rank: The number of this process.
        count: How many processes the run has.
        here: How many of them are on this machine.
    """

    rank: int = 0
    count: int = 1
    here: int = 1

    @property
    def first(self) -> bool:
        """Whether this is the process that writes, reports and decides."""
        return self.rank == 0

    def share(self, lengths: Sequence[int]) -> list[int]:
        """The positions of the rows that this process computes. lengths: of all rows, in tokens."""
        return shares(lengths, self.count)[self.rank]

    def sum(self, values: Tensor) -> None:
        """Sum `values` over all processes, in place; all get the same bits."""
        if self.count > 1:
            with _waiting():
                dist.all_reduce(values)

    def agreed(self, choose: Callable[[], Any]) -> Any:
        """The result of `choose`, which only the first process calls. It must be a value that JSON can hold."""
        if self.count == 1:
            return choose()
        content = json.dumps(choose()).encode() if self.first else b""
        with _waiting():
            size = torch.tensor([len(content)])
            dist.broadcast(size, 0)
            message = torch.tensor(list(content) or [0] * int(size), dtype=torch.uint8)
            dist.broadcast(message, 0)
        return json.loads(bytes(message.tolist()))

    def differing(self, values: Mapping[str, Any]) -> list[str]:
        """The names of the values that are not the same in all processes."""
        mine = json.loads(json.dumps(values))
        first = self.agreed(lambda: mine)
        count = torch.tensor([float(mine[name] != first[name]) for name in mine])
        self.sum(count)
        return [name for name, others in zip(mine, count.tolist(), strict=True) if others]

    def require_work(self, batch_size: int) -> None:
        """Raise SettingsError if a step has fewer examples than there are processes."""
        if batch_size < self.count:
            raise SettingsError(
                f"--batch-size {batch_size}: {self.count} processes cannot share a step of {batch_size}: raise it to "
                f"{self.count} or more, or start no more than {batch_size} with torchrun --nproc-per-node"
            )

    def leave(self) -> None:
        """Leave the process group. A second call does nothing."""
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()


ALONE = Processes()
# The others wait while the first downloads, converts and measures a base, which can take longer than torch's default
# of half an hour. A process that has ended is noticed at once by its closed connection.
PATIENCE = timedelta(hours=6)


def shares(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Divide positions into `count` shares of about as many tokens: the longest row first, to the smallest share.

    No share is empty unless there are fewer rows than shares. lengths: of the rows, in tokens.
    """
    dealt: list[list[int]] = [[] for _ in range(count)]
    tokens = [0] * count
    for place in sorted(range(len(lengths)), key=lambda i: lengths[i], reverse=True):
        smallest = tokens.index(min(tokens))
        dealt[smallest].append(place)
        tokens[smallest] += lengths[place]
    return dealt


@contextmanager
def launched() -> Iterator[Processes]:
    """The processes that torchrun has started, from its environment variables; ALONE without torchrun.

    On GPUs, each process uses the one of its LOCAL_RANK, which becomes torch's current device. Raises SettingsError if
    there are fewer GPUs than processes.
    """
    count = int(os.environ["WORLD_SIZE"]) if dist.is_torchelastic_launched() else 1
    if count == 1:
        yield ALONE
        return
    local, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    if gpus:
        if local >= gpus:
            raise SettingsError(
                f"--nproc-per-node: process {local + 1} of this machine finds no GPU of its own, for there are {gpus}: "
                f"start no more than {gpus}"
            )
        torch.cuda.set_device(local)
    dist.init_process_group("cpu:gloo,cuda:nccl" if gpus else "gloo", timeout=PATIENCE)
    processes = Processes(int(os.environ["RANK"]), count, int(os.environ["LOCAL_WORLD_SIZE"]))
    try:
        yield processes
    except BaseException:
        if threading.current_thread() is threading.main_thread():
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun ends all processes once one has ended
        raise
    finally:
        processes.leave()


@contextmanager
def _waiting() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # the kind depends on the backend: a closed connection, a timeout
        why = str(error).partition("\n")[0]
        raise Interrupted(f"another process of the run has ended ({why}): repeat the command with --resume") from error
