"""The processes of one run. Each computes a share of every step; summed, the shares are the step, in all of them alike.

Factors are replicated, and lie outside the module tree: nothing is wrapped, and nothing depends on the order of
wrapping. What is decided by a clock or a measurement, the first process decides.
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
    """This process among those of its run: `rank` of `count`, `here` of them on this machine. One alone exchanges
    nothing.

    Where another process has ended, whatever waits for it raises Interrupted.
    """

    rank: int = 0
    count: int = 1
    here: int = 1

    @property
    def first(self) -> bool:
        """Whether it is the one that writes, speaks and decides."""
        return self.rank == 0

    def share(self, lengths: Sequence[int]) -> list[int]:
        """Places of the rows, of these lengths in tokens, that this process computes."""
        return shares(lengths, self.count)[self.rank]

    def sum(self, values: Tensor) -> None:
        """Add up `values` over all processes, in place; the same bits in each of them."""
        if self.count > 1:
            with _waiting():
                dist.all_reduce(values)

    def agreed(self, choose: Callable[[], Any]) -> Any:
        """What `choose` returns in the first process, the only one that calls it. A value that JSON can hold."""
        if self.count == 1:
            return choose()
        said = json.dumps(choose()).encode() if self.first else b""
        with _waiting():
            size = torch.tensor([len(said)])
            dist.broadcast(size, 0)
            told = torch.tensor(list(said) or [0] * int(size), dtype=torch.uint8)
            dist.broadcast(told, 0)
        return json.loads(bytes(told.tolist()))

    def differing(self, said: Mapping[str, Any]) -> list[str]:
        """Names under which some process holds another value than the first does."""
        mine = json.loads(json.dumps(said))
        first = self.agreed(lambda: mine)
        count = torch.tensor([float(mine[name] != first[name]) for name in mine])
        self.sum(count)
        return [name for name, others in zip(mine, count.tolist(), strict=True) if others]

    def require_work(self, batch_size: int) -> None:
        """Raise SettingsError where a step has fewer examples than there are processes."""
        if batch_size < self.count:
            raise SettingsError(
                f"--batch-size {batch_size}: {self.count} processes cannot share a step of {batch_size}: raise it to "
                f"{self.count} or more, or start no more than {batch_size} with torchrun --nproc-per-node"
            )

    def leave(self) -> None:
        """Exchange nothing from here on. Leaving twice does nothing."""
        if self.count > 1 and dist.is_initialized():
            dist.destroy_process_group()


ALONE = Processes()
# The others wait while the first fetches, converts and measures a base, which can take longer than torch's half hour.
# One that has ended is noticed at once, by its closed connection.
PATIENCE = timedelta(hours=6)


def shares(lengths: Sequence[int], count: int) -> list[list[int]]:
    """Places dealt out so that each share has about as many tokens: the longest row first, to the smallest share.

    No share is empty unless there are fewer rows than shares.
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
    """The processes that torchrun has started, told by its environment; ALONE where it has not, or only one.

    On a GPU each takes that of its LOCAL_RANK, which is then torch's current device. Raises SettingsError where there
    are fewer GPUs than processes.
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
            signal.signal(signal.SIGTERM, signal.SIG_IGN)  # torchrun asks all to end once one has: this one is about to
        raise
    finally:
        processes.leave()


@contextmanager
def _waiting() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:  # of several kinds, by backend: a closed connection, a wait in vain
        why = str(error).partition("\n")[0]
        raise Interrupted(f"another process of the run has ended ({why}): go on with --resume") from error
