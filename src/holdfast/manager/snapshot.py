"""The bytes of a state at one moment, copied so that training can go on."""

from __future__ import annotations

import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from holdfast.core.adapters import LeafSource
from holdfast.core.encode import CapturedLeaf
from holdfast.core.types import MiB, Node

# Leaves start on cache lines, so that copies into the snapshot stay fast.
_ALIGN = 64
_COPY_BYTES = 64 * MiB


@dataclass(frozen=True)
class HeldLeaf:
    """One leaf and where its bytes are: in the snapshot, or in the copy of a file."""

    path: str
    source: LeafSource
    data: memoryview | None

    def read(self, offset: int, nbytes: int) -> memoryview:
        """The bytes of a range; a view of the snapshot, or a new buffer if streamed."""
        if self.data is not None:
            return self.data[offset : offset + nbytes]
        buffer = memoryview(bytearray(nbytes))
        self.source.copy_range(offset, buffer)
        return buffer


@dataclass(frozen=True)
class Snapshot:
    """Everything one save needs; nothing in it changes when training goes on."""

    step: int
    time_s: float
    tree: Node
    runtime: Node
    leaves: tuple[HeldLeaf, ...]
    pickled: bool

    def close(self) -> None:
        """Let go of copies that lie outside the snapshot's memory."""
        for leaf in self.leaves:
            if leaf.data is None:
                leaf.source.close()


class SnapshotMemory:
    """One region that every save reuses: fresh memory costs ten times a copy into old.

    `take` blocks until the previous snapshot was given back, which bounds the memory
    of saves to one copy of the state.
    """

    def __init__(self) -> None:
        self._free = threading.Lock()
        self._region = np.empty(0, np.uint8)

    def take(self, leaves: Sequence[CapturedLeaf]) -> tuple[HeldLeaf, ...]:
        """Copy every source that is not streamed. `give_back` must follow."""
        self._free.acquire()
        try:
            return tuple(self._copy(leaves))
        except BaseException:
            self._free.release()
            raise

    def give_back(self) -> None:
        """Let the next save use the memory. From any thread."""
        self._free.release()

    def wait(self) -> None:
        """Block until no snapshot is in use."""
        with self._free:
            pass

    def _copy(self, leaves: Sequence[CapturedLeaf]) -> Iterator[HeldLeaf]:
        total = sum(_padded(x.source.nbytes) for x in leaves if not x.source.streamed)
        if self._region.nbytes < total:
            self._region = np.empty(0, np.uint8)  # free the old one first
            self._region = np.empty(total, np.uint8)
        at = 0
        for leaf in leaves:
            source = leaf.source
            if source.streamed:
                yield HeldLeaf(leaf.path, source, None)
                continue
            data = self._region[at : at + source.nbytes].data
            for start in range(0, source.nbytes, _COPY_BYTES):
                source.copy_range(start, data[start : start + _COPY_BYTES])
            source.close()
            at += _padded(source.nbytes)
            yield HeldLeaf(leaf.path, source, data)


def _padded(nbytes: int) -> int:
    return -(-nbytes // _ALIGN) * _ALIGN
