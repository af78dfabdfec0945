"""The bytes of a state at one moment: copied, or left where they are for as long as they
stay the same (see `overlap`), so that training can go on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from enum import Enum
from itertools import repeat

import msgspec
import numpy as np

from holdfast.core.adapters import LeafSource
from holdfast.core.copying import copy_bytes, copy_leaves
from holdfast.core.encode import CapturedLeaf
from holdfast.core.transfers import Transfer, Transport, transport_of, wait_for
from holdfast.core.types import KiB, Node
from holdfast.errors import SaveFailed
from holdfast.manager.overlap import LiveLeaf, Overlap
from holdfast.manager.shares import Share

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
    share: Share | None = None
    """What of the leaf this rank writes; None: it writes all, and there are no others."""

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the whole leaf."""
        return self.source.shape if self.share is None else self.share.shape


@dataclass(frozen=True)
class Snapshot:
    """Everything one save needs; nothing in it changes when training goes on."""

    step: int
    time_s: float
    tree: Node
    runtime: Node
    leaves: tuple[HeldLeaf, ...]
    overlap: Overlap
    memory: SnapshotMemory
    """Where copies of leaves are."""
    marks: Mapping[str, object]
    """What leaves that no barrier protects looked like; see `LeafSource.mark`."""
    pickled: bool
    replicas: Mapping[str, str] = field(default_factory=dict[str, str])
    """See `records.Fragment.marks`."""

    def read(self, leaf: HeldLeaf, offset: int, into: Sequence[memoryview]) -> None:
        """Fill the pieces `into` with a range of a leaf. Raises TornRead, SaveFailed."""
        if leaf.live is not None:
            self.overlap.read(leaf.live, offset, into)
            return
        for piece in into:
            if leaf.data is None:
                leaf.source.copy_range(offset, piece)
            else:
                copy_bytes(piece, leaf.data[offset : offset + piece.nbytes])
            offset += piece.nbytes

    @property
    def copied_nbytes(self) -> int:
        """Bytes that were copied while the training stood still."""
        copied = sum(leaf.data.nbytes for leaf in self.leaves if leaf.data is not None)
        return copied + self.overlap.copied_nbytes

    def close(self) -> None:
        """Let go of copies that lie outside the snapshot's memory, and of that memory."""
        self.overlap.close()
        for leaf in self.leaves:
            if leaf.data is None:
                leaf.source.close()


class _Region:
    """Memory that grows to the largest request and is used again: fresh memory costs ten
    times a copy into old."""

    def __init__(self) -> None:
        self._memory = memoryview(b"")

    @property
    def nbytes(self) -> int:
        return self._memory.nbytes

    def of(self, nbytes: int, transport: Transport | None) -> memoryview:
        if self._memory.nbytes < nbytes:
            self._memory = memoryview(b"")  # free the old one first
            if transport is None:
                self._memory = np.empty(nbytes, np.uint8).data
            else:
                self._memory = transport.memory(nbytes)
        return self._memory[:nbytes]


class _Regions:
    """One for the host's own copies, and one for those of each transport."""

    def __init__(self) -> None:
        self._regions: defaultdict[Transport | None, _Region] = defaultdict(_Region)

    @property
    def nbytes(self) -> int:
        return sum(region.nbytes for region in list(self._regions.values()))

    def of(self, nbytes: int, transport: Transport | None) -> memoryview:
        return self._regions[transport].of(nbytes, transport) if nbytes else memoryview(b"")


@dataclass
class _Batch:
    """Leaves that are copied at once, side by side."""

    transport: Transport | None
    sources: list[LeafSource] = field(default_factory=list[LeafSource])
    starts: list[int] = field(default_factory=list[int])
    nbytes: int = 0
    memory: memoryview = field(default=memoryview(b""), repr=False)

    def begin(self, transport: Transport) -> Transfer:
        places = zip(self.sources, self.starts, strict=True)
        rooms = [self.memory[start : start + source.nbytes] for source, start in places]
        return transport.begin(self.sources, [0] * len(rooms), rooms)


class _Batches:
    """One for the host's own copies, and one for those of each transport."""

    def __init__(self) -> None:
        self._of_kind: dict[type, _Batch] = {}
        self.all: dict[Transport | None, _Batch] = {}

    def of(self, kind: type[LeafSource]) -> _Batch:
        """For the sources of a class."""
        batch = self._of_kind.get(kind)
        if batch is None:
            transport = transport_of(kind)
            batch = self.all.setdefault(transport, _Batch(transport))
            self._of_kind[kind] = batch
        return batch


class SnapshotMemory:
    """What one save is copied to."""

    def __init__(self) -> None:
        self._at_once = _Regions()
        self._at_barrier = _Regions()

    @property
    def nbytes(self) -> int:
        """Bytes of memory that is held for copies."""
        return self._at_once.nbytes + self._at_barrier.nbytes

    def take(
        self, leaves: Sequence[CapturedLeaf], choose: Choose, shares: Sequence[Share] = ()
    ) -> tuple[tuple[HeldLeaf, ...], Overlap]:
        """Copy every source that is neither streamed nor read in place. Once for each save.
        Where a device could not copy, the overlap says so to who reads. `shares`: what of
        each leaf this rank writes, if there are others."""
        ways: dict[int, Way] = {}
        batches = _Batches()
        in_place: defaultdict[Transport | None, list[LeafSource]] = defaultdict(list)
        for number, leaf in enumerate(leaves):
            source = leaf.source
            if source.streamed:
                continue
            nbytes = source.nbytes
            batch = batches.of(type(source))
            if nbytes >= SMALL_BYTES:
                way = choose(source, leaf.path)
                if way is not Way.COPIED:
                    ways[number] = way
                    in_place[batch.transport].append(source)
                    continue
                batch.nbytes = -(-batch.nbytes // _ALIGN) * _ALIGN
            batch.sources.append(source)
            batch.starts.append(batch.nbytes)
            batch.nbytes += nbytes
        for transport, batch in batches.all.items():
            batch.memory = self._at_once.of(batch.nbytes, transport)
        reached: list[Transfer] = []
        failed = None
        try:
            _copy_at_once(batches.all.values())
            for transport, sources in in_place.items():
                if transport is not None:
                    reached.append(transport.reached(sources))
        except SaveFailed as error:
            failed = error
        held = tuple(_held(leaves, shares or repeat(None), ways, batches))
        live = [leaf.live for leaf in held if leaf.live is not None]
        return held, Overlap(live, self._at_barrier.of, reached=reached, failed=failed)


class SnapshotMemories:
    """The memory of a manager's saves, used again by the next one.

    A save has its memory to itself, and nothing is ever waited for: what it does not give back,
    since its caller was interrupted, is freed with it.
    """

    def __init__(self) -> None:
        self._spare: list[SnapshotMemory] = []

    def take(self) -> SnapshotMemory:
        """What the save before this one has given back; else there is none yet, or it is still
        in use."""
        try:
            return self._spare.pop()
        except IndexError:
            return SnapshotMemory()

    def give_back(self, memory: SnapshotMemory) -> None:
        """Let the next save use it. From any thread."""
        self._spare = [memory]  # one is enough


def _copy_at_once(batches: Collection[_Batch]) -> None:
    """Devices copy side by side with the host, which then waits for them: the caller may
    change everything, from any thread and through any of a device's queues."""
    begun: list[Transfer] = []
    try:
        for batch in batches:
            if batch.transport is None or not batch.sources:
                continue
            begun.append(batch.begin(batch.transport))
        for batch in batches:
            if batch.transport is None:
                copy_leaves(batch.sources, np.frombuffer(batch.memory, np.uint8), batch.starts)
    finally:
        wait_for(begun)


def _held(
    leaves: Sequence[CapturedLeaf],
    shares: Iterable[Share | None],
    ways: Mapping[int, Way],
    batches: _Batches,
) -> Iterator[HeldLeaf]:
    starts = {transport: iter(batch.starts) for transport, batch in batches.all.items()}
    for number, (leaf, share) in enumerate(zip(leaves, shares, strict=False)):
        path, source = leaf.path, leaf.source
        way = ways.get(number)
        if way is Way.LIVE:
            yield HeldLeaf(path, source, live=LiveLeaf(path, source), share=share)
        elif way is Way.UNCHANGED or source.streamed:
            yield HeldLeaf(path, source, unchanged=way is Way.UNCHANGED, share=share)
        else:
            batch = batches.of(type(source))
            start = next(starts[batch.transport])
            yield HeldLeaf(path, source, batch.memory[start : start + source.nbytes], share=share)
            source.close()
