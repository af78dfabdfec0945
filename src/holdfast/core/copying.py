"""The copy of many leaves at once: what a save does before the training goes on."""

from __future__ import annotations

import os
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from holdfast.core.adapters import LeafSource
from holdfast.core.threads import share_out
from holdfast.core.types import Buffer, MiB

Region: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"
"""Memory to copy to: writable bytes in one dimension, without gaps."""

_COPY_BYTES = 16 * MiB  # Ctrl-C comes between two copies, and threads share out so much
# Four fill the memory's bandwidth of most machines; what is copied in 2 ms needs none.
_THREADS = 4
_PARALLEL_BYTES = 32 * MiB


class CopyMany(Protocol):
    """What a class of sources may have as its `copy_many`, a static or class method."""

    def __call__(
        self, sources: Sequence[Any], region: Region, starts: Sequence[int]
    ) -> Sequence[int]:
        """Copy those of `sources`, all of this class, that it can copy faster than their
        `copy_range` does, each to its place in `region`. The numbers of the others."""
        ...


def copy_leaves(sources: Sequence[LeafSource], region: Region, starts: Sequence[int]) -> None:
    """Copy the bytes of every source to `region`, each from its place in `starts` on.

    None may be streamed, and none is closed. Places need no alignment, which only makes
    large copies faster. Large copies release the GIL; many small ones hold it, since
    each time another thread might keep it for milliseconds.
    """
    room = region.size
    of_kind: defaultdict[type, list[int]] = defaultdict(list)
    for number, (source, start) in enumerate(zip(sources, starts, strict=True)):
        if not 0 <= start <= room - source.nbytes:
            raise ValueError(f"{source.nbytes} bytes at {start} of {room}")
        of_kind[type(source)].append(number)
    for kind, numbers in of_kind.items():
        copy_many: CopyMany | None = getattr(kind, "copy_many", None)
        if copy_many is not None:
            alike = [sources[number] for number in numbers]
            left = copy_many(alike, region, [starts[number] for number in numbers])
            numbers = [numbers[number] for number in left]
        places = [(sources[number], starts[number]) for number in numbers]
        copy_ranges(
            (source, 0, region[start : start + source.nbytes].data) for source, start in places
        )


def copy_ranges(ranges: Iterable[tuple[LeafSource, int, memoryview]]) -> None:
    """Fill each memory with the bytes of a source from an offset on, of any length.

    In several threads where there is much to copy: fresh memory is cleared page by page as
    it is touched, which takes one thread five times as long as the copy. The first error
    is raised when no thread copies any more.
    """
    pieces = [
        (source, offset + first, into[first : first + _COPY_BYTES])
        for source, offset, into in ranges
        for first in range(0, into.nbytes, _COPY_BYTES)
    ]
    much = sum(into.nbytes for _, _, into in pieces) >= _PARALLEL_BYTES
    threads = min(_THREADS, os.cpu_count() or 1) if much else 1

    def copy(pieces: Iterator[tuple[LeafSource, int, memoryview]]) -> None:
        for source, offset, into in pieces:
            source.copy_range(offset, into)

    share_out(pieces, copy, threads=threads, name="holdfast-copy")


def copy_bytes(into: Buffer, data: Buffer) -> None:
    """Fill `into` with as many bytes of `data`. Releases the GIL."""
    np.copyto(np.frombuffer(into, np.uint8), np.frombuffer(data, np.uint8))
