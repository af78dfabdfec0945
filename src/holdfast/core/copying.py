"""The copy of many leaves at once: what a save does before the training goes on."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np

from holdfast.core.adapters import LeafSource
from holdfast.core.types import MiB

Region: TypeAlias = "np.ndarray[Any, np.dtype[np.uint8]]"
"""Memory to copy to: writable bytes in one dimension, without gaps."""

_COPY_BYTES = 64 * MiB  # Ctrl-C comes between two copies


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
        for number in numbers:
            source, start = sources[number], starts[number]
            copy_from(source, 0, region[start : start + source.nbytes].data)


def copy_from(source: LeafSource, offset: int, into: memoryview) -> None:
    """As `LeafSource.copy_range`, for ranges of any length."""
    for first in range(0, into.nbytes, _COPY_BYTES):
        source.copy_range(offset + first, into[first : first + _COPY_BYTES])
