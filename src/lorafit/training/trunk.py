"""The trunk: the lowest blocks, where a plan adapts none of them. What they make of a pack never changes, so it is
computed once and read from disk in later epochs.

Read, not mapped: pages of a mapped file count as memory of the process, and a disk that fills up would end it by a
signal. What is read is small beside a step.
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

from lorafit.bases.base import Base
from lorafit.data.batches import Batch, Start
from lorafit.tasks.completion import trunk

MARK = 4  # bytes before each pack: its checksum, zeros where it has not been written
FREE_SHARE = 0.5  # of the free disk that the file may take at most


def room_for(folder: Path, most: int) -> int:
    """Bytes that may be kept in `folder`, where `most` are wanted: what is there already counts as free."""
    kept = sum(path.stat().st_size for path in folder.glob("trunk-*.bin"))
    return min(most, int(FREE_SHARE * (shutil.disk_usage(folder).free + kept)))


class Trunk:
    """A file of what the lowest `blocks` blocks make of packs, as many of them as `room` bytes hold.

    packs: tokens, filling included, by the rows' positions. same: what else the bits depend on, in words: rows, layout,
    dtype, threads. The file is called `name` and a digest of all that, base and blocks. One that is there already is
    gone on with; a pack left half by a kill fails its checksum and is computed again.
    """

    def __init__(
        self,
        folder: Path,
        name: str,
        base: Base,
        same: str,
        packs: Mapping[tuple[int, ...], int],
        blocks: int,
        room: int,
    ):
        self._base, self._blocks = base, blocks
        self._token = base.model.get_input_embeddings().embedding_dim * base.dtype.itemsize  # type: ignore[operator]
        told = repr((base.integrity(), same, list(packs.items()), blocks))
        self._path = folder / f"{name}-{hashlib.sha256(told.encode()).hexdigest()[:16]}.bin"
        self._places: dict[tuple[int, ...], int] = {}
        self.bytes = 0
        for pack, tokens in packs.items():
            needed = MARK + tokens * self._token
            if self.bytes + needed <= room:
                self._places[pack] = self.bytes
                self.bytes += needed
        for other in folder.glob(f"{name}-*.bin"):
            if other != self._path:
                other.unlink()
        self._path.touch()

    def begin(self, batch: Batch, pack: Sequence[int]) -> Batch:
        """The batch with its start: read, or computed and written. As it was where there is no room for it."""
        place = self._places.get(tuple(pack))
        if place is None:
            return batch
        hidden = self._read(place, batch)
        if hidden is None:
            hidden = trunk(self._base, batch, self._blocks)
            self._write(place, hidden)
        return replace(batch, start=Start(hidden, self._blocks))

    def _read(self, place: int, batch: Batch) -> Tensor | None:
        size = batch.ids.numel() * self._token
        with self._path.open("rb") as file:
            file.seek(place)
            mark, content = file.read(MARK), bytearray(file.read(size))
        if len(content) < size or mark != _checksum(content):
            return None
        return torch.frombuffer(content, dtype=self._base.dtype).view(*batch.ids.shape, -1).to(batch.ids.device)

    def _write(self, place: int, hidden: Tensor) -> None:
        content = hidden.cpu().contiguous().view(torch.uint8).numpy().tobytes()
        try:
            with self._path.open("r+b") as file:
                file.seek(place)
                file.write(_checksum(content) + content)
        except OSError:  # no room any more: what is there stays, nothing is added
            self._places.clear()

    def remove(self) -> None:
        self._path.unlink(missing_ok=True)


def _checksum(content: bytes | bytearray) -> bytes:
    return (zlib.crc32(content) or 1).to_bytes(MARK, "little")
