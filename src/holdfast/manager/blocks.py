"""The bytes of the mean of checkpoints, as they are asked for: a few blocks are in memory."""

from __future__ import annotations

import threading
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

from holdfast.core.arrays import box_destination
from holdfast.core.averaging import Format, Mean
from holdfast.core.leaves import ChunkIndex
from holdfast.core.plan import boxes, itemsize
from holdfast.core.records import Leaf
from holdfast.core.types import MiB
from holdfast.errors import DamagedObject
from holdfast.manager.mixing import Part, Side
from holdfast.manager.reader import Wanted

# Blocks that are read together, so that thousands of small tensors do not cost a request each
# for every checkpoint. With sums and temporary numbers it takes up to ten times as much memory.
GROUP_BYTES = 16 * MiB


@dataclass(frozen=True)
class _Block:
    """A range of a leaf."""

    position: int
    """Of the leaf among the parts."""
    offset: int
    nbytes: int
    at: int
    """Where its bytes lie in its group."""
    start: tuple[int, ...]
    shape: tuple[int, ...]


class Blocks:
    """Reads the parts of a mean. Asked for in their order each byte of the checkpoints is read
    once, by other threads too; in another order it is right, and slow. A chunk that reaches
    through several groups (of a leaf that was divided by columns) is read for each of them."""

    def __init__(
        self, parts: Sequence[Part], sides: Sequence[Side], weights: Sequence[float]
    ) -> None:
        self._parts = parts
        self._sides = sides
        self._weights = weights
        self._groups: list[list[_Block]] = []
        self._places: list[list[tuple[int, int]]] = []
        """Of each part: (offset, number of the group) of its blocks."""
        filled = GROUP_BYTES
        for position, part in enumerate(parts):
            self._places.append([])
            size = itemsize(part.leaf.dtype)
            for start, shape, offset, nbytes in boxes(part.leaf.shape, size):
                if filled + nbytes > GROUP_BYTES:
                    self._groups.append([])
                    filled = 0
                self._groups[-1].append(_Block(position, offset, nbytes, filled, start, shape))
                self._places[-1].append((offset, len(self._groups) - 1))
                filled += nbytes
        self._lock = threading.Lock()
        self._number = -1
        """Of the group that is in memory."""
        self._data = memoryview(b"")
        self._indexes: dict[tuple[int, int], ChunkIndex] = {}

    @property
    def nbytes_to_read(self) -> int:
        """Of all checkpoints together."""
        every = len(self._sides)
        return sum(
            block.nbytes * (every if self._parts[block.position].format else 1)
            for group in self._groups
            for block in group
        )

    def read(self, position: int, offset: int, into: memoryview) -> None:
        """Fill `into` with bytes of a part. From any thread. Raises DamagedObject,
        CheckpointRemoved, StoreUnavailable."""
        while into.nbytes:
            with self._lock:
                places = self._places[position]
                group = places[bisect_right(places, offset, key=lambda place: place[0]) - 1][1]
                if group != self._number:
                    self._number, self._data = -1, memoryview(b"")
                    self._data = self._computed(self._groups[group])
                    self._number = group
                block = next(
                    b
                    for b in self._groups[group]
                    if b.position == position and b.offset <= offset < b.offset + b.nbytes
                )
                inside = offset - block.offset
                count = min(into.nbytes, block.nbytes - inside)
                into[:count] = self._data[block.at + inside : block.at + inside + count]
            into, offset = into[count:], offset + count

    def _computed(self, group: Sequence[_Block]) -> memoryview:
        first = group[0].position
        self._indexes = {key: v for key, v in self._indexes.items() if key[1] >= first}
        data = memoryview(bytearray(group[-1].at + group[-1].nbytes))
        means: dict[int, Mean] = {}
        last = len(self._sides) - 1
        for member, side in enumerate(self._sides):
            weight = self._weights[member]
            wanted: list[Wanted] = []
            averaged: list[_Block] = []
            for block in group:
                part = self._parts[block.position]
                if part.format is not None and weight:
                    averaged.append(block)
                    wanted += self._wanted(member, part.of[member], block, data)
                elif part.format is None and member == last:
                    wanted += self._wanted(member, part.of[-1], block, data)
            try:
                side.reader.read(wanted)
            except DamagedObject as error:
                error.message = f"{side.ref}: {error.message}"
                raise
            for block in averaged:
                mean = means.get(block.at)
                if mean is None:
                    mean = means[block.at] = Mean(self._format(block))
                mean.add(data[block.at : block.at + block.nbytes], weight)
        for block in group:
            if block.at in means:
                means[block.at].write(data[block.at : block.at + block.nbytes])
        return data

    def _format(self, block: _Block) -> Format:
        format = self._parts[block.position].format
        assert format is not None
        return format

    def _wanted(self, member: int, leaf: Leaf, block: _Block, data: memoryview) -> list[Wanted]:
        """The chunks of a checkpoint that a block lies in, which may be cut at other places."""
        index = self._indexes.get((member, block.position))
        if index is None:
            index = self._indexes[member, block.position] = ChunkIndex(leaf)
        place = data[block.at : block.at + block.nbytes]
        box = box_destination(place, leaf.dtype, block.start, block.shape)
        return [
            Wanted(leaf, chunk, box.write) for chunk in index.reaching(block.start, block.shape)
        ]
