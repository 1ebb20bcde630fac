"""A cache of the trunk, the lowest blocks if a plan adapts none of them: their output for a batch never changes, so it
is computed once and read from disk in later epochs.

The file is read, not mapped: the pages of a mapped file count as memory of the process, and a full disk would end it by
a signal. Reading takes little time compared with a step.
"""

from __future__ import annotations

import hashlib
import shutil
import zlib
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from lorafit.data.batches import Batch, Start
from lorafit.tasks.runner import Runner

MARK = 4  # bytes before each batch: its checksum, zeros if it has not been written
FREE_SHARE = 0.5  # of the free disk that the file may take at most


def room_for(folder: Path, most: int) -> int:
    """The bytes, at most `most`, that may be kept in `folder`; caches that are there already count as free."""
    kept = sum(path.stat().st_size for path in folder.glob("trunk-*.bin"))
    return min(most, int(FREE_SHARE * (shutil.disk_usage(folder).free + kept)))


class Trunk:
    """A file with the outputs of the lowest blocks for batches.

    Its name includes a digest of everything that the bits depend on. A file that exists is continued; a batch that a
    kill left incomplete fails its checksum and is computed again.

    Args:
        path: The beginning of the file's path.
        runner: The base and how it is run.
        same: Everything else that the bits depend on, as text: rows, layout, dtype, threads.
        packs: Tokens of each batch, padding included, by the positions of its rows.
        blocks: How many of the lowest blocks are cached.
        room: The largest size of the file in bytes; batches that do not fit are left out.
    """

    def __init__(
        self,
        path: Path,
        runner: Runner,
        same: str,
        packs: Mapping[tuple[int, ...], int],
        blocks: int,
        room: int,
    ):
        self._runner, self._blocks, base = runner, blocks, runner.base
        self._token = base.model.get_input_embeddings().embedding_dim * base.dtype.itemsize  # type: ignore[operator]
        inputs = repr((base.integrity(), same, list(packs.items()), blocks))
        self._path = path.with_name(f"{path.name}-{hashlib.sha256(inputs.encode()).hexdigest()[:16]}.bin")
        self._places: dict[tuple[int, ...], int] = {}
        self.bytes = 0
        for pack, tokens in packs.items():
            needed = MARK + tokens * self._token
            if self.bytes + needed <= room:
                self._places[pack] = self.bytes
                self.bytes += needed
        for other in path.parent.glob(f"{path.name}-*.bin"):
            if other != self._path:
                other.unlink()
        self._path.touch()

    def begin(self, batch: Batch, pack: Sequence[int]) -> Batch:
        """The batch, started from the blocks' output, which is read or computed; unchanged if the file is full."""
        place = self._places.get(tuple(pack))
        if place is None:
            return batch
        hidden = self._read(place, batch)
        if hidden is not None:
            return replace(batch, start=Start(hidden, self._blocks))
        started = self._runner.started(batch, self._blocks)
        assert started.start is not None
        self._write(place, started.start.hidden)
        return started

    def _read(self, place: int, batch: Batch) -> Tensor | None:
        size = batch.ids.numel() * self._token
        with self._path.open("rb") as file:
            file.seek(place)
            mark, content = file.read(MARK), bytearray(file.read(size))
        if len(content) < size or mark != _checksum(content):
            return None
        return torch.frombuffer(content, dtype=self._runner.base.dtype).view(*batch.ids.shape, -1).to(batch.ids.device)

    def _write(self, place: int, hidden: Tensor) -> None:
        content = hidden.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        try:
            with self._path.open("r+b") as file:
                file.seek(place)
                file.write(_checksum(content) + content)
        except OSError:  # the disk is full: what is there stays, and nothing is added
            self._places.clear()

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def _checksum(content: bytes | bytearray) -> bytes:
    return (zlib.crc32(content) or 1).to_bytes(MARK, "little")
