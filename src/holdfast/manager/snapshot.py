"""The bytes of a state at one moment: copied, or left where they are for as long as they
stay the same (see `overlap`), so that training can go on."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from enum import Enum

import msgspec
import numpy as np

from holdfast.core.adapters import LeafSource
from holdfast.core.copying import copy_leaves
from holdfast.core.encode import CapturedLeaf
from holdfast.core.types import KiB, Node
from holdfast.manager.overlap import LiveLeaf, Overlap

# Large leaves start on cache lines, so that copies into the snapshot stay fast.
_ALIGN = 64
# Smaller leaves are copied at once: a copy takes less time than the care for one in place.
SMALL_BYTES = 64 * KiB


class Way(Enum):
    """How a large leaf is read."""

    COPIED = 1
    """It is copied before the save returns."""
    LIVE = 2
    """In place, up to the next barrier."""
    UNCHANGED = 3
    """In place at any time: it should be what it was at the save before. That it is, is
    checked."""


Choose = Callable[[LeafSource, str], Way]
"""For the leaf of that source and path."""


class HeldLeaf(msgspec.Struct, frozen=True, gc=False):
    """One leaf and where its bytes are: in the snapshot, in the copy of a file, or live."""

    path: str
    source: LeafSource
    data: memoryview | None = None
    """Of the snapshot."""
    live: LiveLeaf | None = None
    unchanged: bool = False
    """See `Way.UNCHANGED`."""


@dataclass(frozen=True)
class Snapshot:
    """Everything one save needs; nothing in it changes when training goes on."""

    step: int
    time_s: float
    tree: Node
    runtime: Node
    leaves: tuple[HeldLeaf, ...]
    overlap: Overlap
    marks: Mapping[str, object]
    """What leaves that no barrier protects looked like; see `LeafSource.mark`."""
    pickled: bool

    def read(self, leaf: HeldLeaf, offset: int, into: Sequence[memoryview]) -> None:
        """Fill the pieces `into` with a range of a leaf. Raises TornRead, SaveFailed."""
        if leaf.live is not None:
            self.overlap.read(leaf.live, offset, into)
            return
        for piece in into:
            if leaf.data is None:
                leaf.source.copy_range(offset, piece)
            else:
                part = leaf.data[offset : offset + piece.nbytes]
                np.copyto(np.frombuffer(piece, np.uint8), np.frombuffer(part, np.uint8))
            offset += piece.nbytes

    @property
    def copied_nbytes(self) -> int:
        """Bytes that were copied while the training stood still."""
        copied = sum(leaf.data.nbytes for leaf in self.leaves if leaf.data is not None)
        return copied + self.overlap.copied_nbytes

    def close(self) -> None:
        """Let go of copies that lie outside the snapshot's memory."""
        self.overlap.close()
        for leaf in self.leaves:
            if leaf.data is None:
                leaf.source.close()


class _Region:
    """Memory that grows to the largest request and is used again: fresh memory costs ten
    times a copy into old."""

    def __init__(self) -> None:
        self._memory = np.empty(0, np.uint8)

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def of(self, nbytes: int) -> memoryview:
        if self._memory.nbytes < nbytes:
            self._memory = np.empty(0, np.uint8)  # free the old one first
            self._memory = np.empty(nbytes, np.uint8)
        return self._memory[:nbytes].data


class SnapshotMemory:
    """What the saves of a manager are copied to.

    `take` blocks until the previous snapshot was given back, which bounds the memory
    of saves to one copy of the state.
    """

    def __init__(self) -> None:
        self._free = threading.Lock()
        self._at_once = _Region()
        self._at_barrier = _Region()

    @property
    def nbytes(self) -> int:
        """Bytes of memory that is held for copies."""
        return self._at_once.nbytes + self._at_barrier.nbytes

    def take(
        self, leaves: Sequence[CapturedLeaf], choose: Choose
    ) -> tuple[tuple[HeldLeaf, ...], Overlap]:
        """Copy every source that is neither streamed nor read in place. `give_back` must
        follow."""
        self._free.acquire()
        try:
            held = tuple(self._hold(leaves, choose))
            live = [leaf.live for leaf in held if leaf.live is not None]
            return held, Overlap(live, self._at_barrier.of)
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

    def _hold(self, leaves: Sequence[CapturedLeaf], choose: Choose) -> Iterator[HeldLeaf]:
        elsewhere: dict[int, HeldLeaf] = {}
        sources: list[LeafSource] = []
        starts: list[int] = []
        total = 0
        for number, leaf in enumerate(leaves):
            source = leaf.source
            nbytes = source.nbytes
            if source.streamed:
                elsewhere[number] = HeldLeaf(leaf.path, source)
                continue
            if nbytes >= SMALL_BYTES:
                way = choose(source, leaf.path)
                if way is Way.LIVE:
                    live = LiveLeaf(leaf.path, source)
                    elsewhere[number] = HeldLeaf(leaf.path, source, live=live)
                    continue
                if way is Way.UNCHANGED:
                    elsewhere[number] = HeldLeaf(leaf.path, source, unchanged=True)
                    continue
                total = -(-total // _ALIGN) * _ALIGN
            sources.append(source)
            starts.append(total)
            total += nbytes
        memory = self._at_once.of(total)
        copy_leaves(sources, np.frombuffer(memory, np.uint8), starts)
        at = iter(starts)
        for number, leaf in enumerate(leaves):
            held = elsewhere.get(number)
            if held is None:
                start, source = next(at), leaf.source
                held = HeldLeaf(leaf.path, source, memory[start : start + source.nbytes])
                source.close()
            yield held
