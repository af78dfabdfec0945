"""The part of a state that one of several ranks writes."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from math import prod

import msgspec

from holdfast.core.adapters import LeafSource
from holdfast.core.digest import digest
from holdfast.core.encode import CapturedLeaf
from holdfast.core.group import Ranks
from holdfast.core.placement import Division, Placement
from holdfast.core.plan import Box, itemsize

_SAMPLE_BYTES = 64

Cut = Callable[[str, LeafSource], Iterable[Box]]
"""The boxes of a source, of a leaf of that path, that become chunks."""


class Share(msgspec.Struct, frozen=True, gc=False):
    """What this rank writes of one leaf."""

    shape: tuple[int, ...]
    """Of the whole leaf."""
    boxes: tuple[Box, ...]
    """In the whole leaf; their bytes lie in the source one after the other."""
    own: bool


class PartSource:
    """A range of another source; implements core.adapters.LeafSource."""

    streamed = False

    def __init__(self, source: LeafSource, offset: int, shape: tuple[int, ...]) -> None:
        self._source = source
        self._offset = offset
        self.dtype = source.dtype
        self.shape = shape
        self.nbytes = prod(shape) * itemsize(source.dtype)

    def copy_range(self, offset: int, into: memoryview) -> None:
        self._source.copy_range(self._offset + offset, into)

    def mark(self) -> object:
        return self._source.mark()

    def close(self) -> None:
        self._source.close()


def divide(
    leaves: Sequence[CapturedLeaf], ranks: Ranks, cut: Cut
) -> tuple[list[CapturedLeaf], list[Share]]:
    """What of `leaves` this rank has to read, and what it writes of each. What others write
    is read by none but them: it costs this rank neither time nor memory."""
    held = [(leaf.placement, leaf.source.nbytes) for leaf in leaves if leaf.placement is not None]
    division = Division(ranks.rank, held)
    captured: list[CapturedLeaf] = []
    shares: list[Share] = []
    for leaf in leaves:
        placement, source = leaf.placement, leaf.source
        if placement is None:
            captured.append(leaf)
            shares.append(Share(source.shape, tuple(cut(leaf.path, source)), own=True))
            continue
        all_boxes = _boxes(leaf.path, source, placement, cut)
        boxes = [box for box in all_boxes if division.takes(placement, box[3])]
        captured.append(CapturedLeaf(leaf.path, _part(source, boxes)))
        shares.append(Share(placement.shape, _from_the_first(boxes), own=False))
    return captured, shares


def _boxes(path: str, source: LeafSource, placement: Placement, cut: Cut) -> Iterator[Box]:
    """The boxes of a source where they lie in the whole leaf, with offsets in the source."""
    offset = 0
    for first, shape in placement.parts(source.shape):
        part = source if placement.boxes is None else PartSource(source, offset, shape)
        for start, extent, inside, nbytes in cut(path, part):
            moved = tuple(map(sum, zip(start, first, strict=True)))
            yield moved, extent, offset + inside, nbytes
        offset += part.nbytes


def _part(source: LeafSource, boxes: Sequence[Box]) -> LeafSource:
    nbytes = sum(box[3] for box in boxes)
    if nbytes == source.nbytes:
        return source
    return PartSource(source, boxes[0][2] if boxes else 0, (nbytes // itemsize(source.dtype),))


def _from_the_first(boxes: Sequence[Box]) -> tuple[Box, ...]:
    """The boxes, with offsets from that of the first one on."""
    first = boxes[0][2] if boxes else 0
    return tuple((start, shape, offset - first, nbytes) for start, shape, offset, nbytes in boxes)


def replicas(leaves: Sequence[CapturedLeaf], ranks: Ranks) -> dict[str, str]:
    """Name in the state -> digest of a sample of what all ranks should hold alike in it. Where a
    rank has other values it has another digest; one that it shares with no other says nothing."""
    samples: dict[str, bytearray] = {}
    for leaf in leaves:
        placement = leaf.placement
        if placement is not None and len(placement.holders) == ranks.size:
            name = leaf.path.partition("/")[0]
            samples.setdefault(name, bytearray()).extend(_sample(leaf.source))
    return {name: digest(sample) for name, sample in samples.items()}


def _sample(source: LeafSource) -> bytes:
    """The first, the middle and the last bytes."""
    size = min(_SAMPLE_BYTES, source.nbytes)
    found = bytearray(3 * size)
    for number, offset in enumerate((0, (source.nbytes - size) // 2, source.nbytes - size)):
        source.copy_range(offset, memoryview(found)[number * size : (number + 1) * size])
    return bytes(found)
