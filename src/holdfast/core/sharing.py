"""Arrays that share memory: stored once, and views of one buffer again after loading.

Frameworks use it alike. A `SharedMemory` per buffer (a NumPy base, a torch storage)
is kept in `Encoder.alias(key, keep)`; each array of that buffer is given to `place`.

- An array that shares no element with another is a leaf of its own, however large
  the buffer around it is.
- Equal views (same start, shape, strides and dtype) are one leaf.
- Views that overlap become one leaf of bytes: the range that they span together. Their
  nodes lose `dtype`-shaped leaves and say `offset` and `strides` (in bytes) instead.
  Nodes and sources given out before are changed in place, which is why a tree may
  be used only after everything was encoded.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np

from holdfast.core.adapters import Encoder, LeafSource
from holdfast.core.arrays import byte_span

_EXACT_OVERLAP_WORK = 10_000  # steps of NumPy's solver before overlap is taken for granted


class Layout(NamedTuple):
    """Where an array's elements lie: addresses, strides and sizes in bytes."""

    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    kind: Hashable
    """What else must agree for two arrays to be one leaf: the dtype."""


class MovableSource:
    """A leaf source that can be replaced while the tree is still being built."""

    def __init__(self, source: LeafSource) -> None:
        self.source = source

    @property
    def dtype(self) -> str:
        return self.source.dtype

    @property
    def shape(self) -> tuple[int, ...]:
        return self.source.shape

    @property
    def nbytes(self) -> int:
        return self.source.nbytes

    @property
    def streamed(self) -> bool:
        return self.source.streamed

    def copy_range(self, offset: int, into: memoryview) -> None:
        self.source.copy_range(offset, into)

    def close(self) -> None:
        self.source.close()


@dataclass
class _Group:
    """Arrays of one leaf: equal views, or views that overlap (then `nodes` > 1)."""

    low: int
    high: int
    leaf: int
    source: MovableSource
    members: list[tuple[Layout, dict[str, Any]]] = field(
        default_factory=list[tuple[Layout, dict[str, Any]]]
    )
    as_bytes: bool = False


class SharedMemory:
    """The arrays of one buffer that were captured so far."""

    def __init__(self, open_bytes: Callable[[int, int], LeafSource]) -> None:
        """`open_bytes(low, high)` gives the buffer's bytes between two addresses,
        as a `U8` leaf of one dimension."""
        self._open_bytes = open_bytes
        self._groups: list[_Group] = []

    def place(
        self,
        encoder: Encoder,
        layout: Layout,
        node: dict[str, Any],
        source: Callable[[], LeafSource],
        path: str,
    ) -> dict[str, Any]:
        """Complete `node` (its tag and dtype) with the leaf that holds the array.

        `source` opens the array's elements as a leaf of its own.
        """
        low, high = byte_span(layout.start, layout.shape, layout.strides, layout.itemsize)
        touched = [group for group in self._groups if group.low < high and low < group.high]
        sharing: list[_Group] = []
        for group in touched:
            for known, known_node in group.members:
                if known == layout:
                    node.update({key: value for key, value in known_node.items() if key not in node and key != "id"})
                    group.members.append((layout, node))
                    return node
            if any(_overlap(known, layout) for known, _ in group.members):
                sharing.append(group)
        inside_itself = high - low < layout.itemsize * _count(layout.shape)
        if not sharing and not inside_itself:
            movable = MovableSource(source())
            node["leaf"] = encoder.leaf(movable, path)
            self._groups.append(_Group(low, high, node["leaf"], movable, [(layout, node)]))
            return node
        if sharing:
            first, *others = sharing
        else:
            movable = MovableSource(self._open_bytes(low, high))
            first = _Group(low, high, encoder.leaf(movable, path), movable)
            others = []
            self._groups.append(first)
        first.members.append((layout, node))
        for other in others:
            # Two leaves turn out to be one: the later one stays behind, without bytes.
            first.members += other.members
            other.source.source = self._open_bytes(other.low, other.low)
            self._groups.remove(other)
        first.low = min(low, first.low, *(other.low for other in others))
        first.high = max(high, first.high, *(other.high for other in others))
        first.source.source = self._open_bytes(first.low, first.high)
        for member, member_node in first.members:
            member_node.pop("order", None)
            member_node["leaf"] = first.leaf
            member_node["shape"] = list(member.shape)
            member_node["strides"] = list(member.strides)
            member_node["offset"] = member.start - first.low
        return node


def _count(shape: Sequence[int]) -> int:
    count = 1
    for size in shape:
        count *= size
    return count


class _Elements:
    """Stands for memory that NumPy's overlap solver looks at but never reads."""

    def __init__(self, layout: Layout) -> None:
        self.__array_interface__ = {
            "data": (layout.start, True),
            "shape": layout.shape,
            "strides": layout.strides,
            "typestr": f"|V{layout.itemsize}",
            "version": 3,
        }


def _overlap(one: Layout, other: Layout) -> bool:
    """Whether two arrays have a byte in common (True also if that is hard to tell)."""
    try:
        return bool(
            np.shares_memory(
                np.asarray(_Elements(one)),
                np.asarray(_Elements(other)),
                max_work=_EXACT_OVERLAP_WORK,
            )
        )
    except (np.exceptions.TooHardError, ValueError):
        return True
