"""Arrays that share memory: stored once, and views of one buffer again after loading.

Frameworks use it alike. A `SharedMemory` per buffer (a NumPy base, a torch storage)
is kept in `Encoder.alias(key, keep)`; each array of that buffer is given to `place`
(the first one may become a leaf by itself, and be given to `add` when a second comes).

- An array that shares no element with another is a leaf of its own, however large
  the buffer around it is.
- Equal views (same start, shape, strides and dtype) are one leaf.
- Views that overlap become one leaf of bytes: the range that they span together. Their
  nodes then have `shape`, `strides` and `offset` (the last two in bytes). It has as many
  holders as they had if all of them had the same, and is else the process's own.
  Nodes and sources given out before are changed in place, which is why a tree may
  be used only after everything was encoded.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from math import prod
from typing import Any, NamedTuple, Protocol, cast

import numpy as np

from holdfast.core.adapters import Encoder, LeafSource
from holdfast.core.arrays import byte_span
from holdfast.core.placement import Placement

_EXACT_OVERLAP_WORK = 10_000  # steps of NumPy's solver before overlap is taken for granted


class Layout(NamedTuple):
    """Where an array's elements lie: addresses, strides and sizes in bytes."""

    start: int
    shape: tuple[int, ...]
    strides: tuple[int, ...]
    itemsize: int
    kind: Hashable
    """What else must agree for two arrays to be one leaf: the dtype."""


class Movable(LeafSource, Protocol):
    """A leaf source that can become another one while the tree is still being built."""

    def become(self, source: LeafSource) -> None: ...


@dataclass(slots=True, eq=False)
class _Group:
    """The arrays of one leaf: equal ones, or ones that overlap."""

    low: int
    high: int
    leaf: int
    source: Movable
    members: list[tuple[Layout, dict[str, Any]]]
    holders: tuple[int, ...] | None
    """The ranks that hold all of it; None: it is this process's own."""


class SharedMemory:
    """The arrays of one buffer that were captured so far."""

    def __init__(self, open_bytes: Callable[[int, int], LeafSource]) -> None:
        """`open_bytes(low, high)` gives the buffer's bytes between two addresses,
        as a `U8` leaf of one dimension."""
        self._open_bytes = open_bytes
        # By address: thousands of parameters may be views of one flat buffer.
        self._groups: list[_Group] = []
        self._longest = 0  # of what the groups ever spanned

    def add(
        self,
        layout: Layout,
        node: dict[str, Any],
        source: Movable,
        placement: Placement | None = None,
    ) -> None:
        """An array that already is a leaf: the buffer's first. Buffers with a second
        one are rare, so that it is enough to make a SharedMemory then."""
        low, high = byte_span(layout.start, layout.shape, layout.strides, layout.itemsize)
        members = [(layout, node)]
        self._insert(_Group(low, high, node["leaf"], source, members, _holders(placement)))

    def _insert(self, group: _Group) -> None:
        insort(self._groups, group, key=_low)
        self._longest = max(self._longest, group.high - group.low)

    def _between(self, low: int, high: int) -> list[_Group]:
        """The groups that span some of these bytes, in the order of their leaves."""
        first = bisect_left(self._groups, low - self._longest, key=_low)
        last = bisect_left(self._groups, high, first, key=_low)
        found = [group for group in self._groups[first:last] if low < group.high]
        return sorted(found, key=lambda group: group.leaf)

    def place(
        self,
        encoder: Encoder,
        layout: Layout,
        node: dict[str, Any],
        open_source: Callable[[], Movable],
        path: str,
        placement: Placement | None = None,
    ) -> dict[str, Any]:
        """Complete `node` (its tag and dtype) with the leaf that holds the array, and
        return it.

        `open_source` gives the array's elements as a leaf of its own. `placement`: it is a
        replica of what other processes hold, too.
        """
        low, high = byte_span(layout.start, layout.shape, layout.strides, layout.itemsize)
        sharing: list[_Group] = []
        for group in self._between(low, high):
            for known, known_node in group.members:
                if known == layout:
                    fields = {name: known_node[name] for name in _PLACE if name in known_node}
                    node.update(fields)
                    group.members.append((layout, node))
                    return node
            if any(_overlap(known, layout) for known, _ in group.members):
                sharing.append(group)
        if not sharing:
            source = open_source()
            node["leaf"] = encoder.leaf(source, path, placement)
            members = [(layout, node)]
            group = _Group(low, high, node["leaf"], source, members, _holders(placement))
            self._insert(group)
            if overlaps_itself(layout):
                self._store_bytes(group, encoder)
            return node
        group, *others = sharing
        self._groups.remove(group)  # it spans more now
        group.members.append((layout, node))
        group.low, group.high = min(low, group.low), max(high, group.high)
        if any(other.holders != _holders(placement) for other in sharing):
            group.holders = None
        for other in others:
            # Leaves turn out to be one: the later ones stay behind, without bytes.
            group.members += other.members
            group.low, group.high = min(group.low, other.low), max(group.high, other.high)
            other.source.become(self._open_bytes(other.low, other.low))
            encoder.place(other.leaf, _whole(other.source, group.holders))
            self._groups.remove(other)
        self._insert(group)
        self._store_bytes(group, encoder)
        return node

    def _store_bytes(self, group: _Group, encoder: Encoder) -> None:
        group.source.become(self._open_bytes(group.low, group.high))
        encoder.place(group.leaf, _whole(group.source, group.holders))
        for layout, node in group.members:
            node.pop("order", None)
            node["leaf"] = group.leaf
            node["shape"] = list(layout.shape)
            node["strides"] = list(layout.strides)
            node["offset"] = layout.start - group.low


def _holders(placement: Placement | None) -> tuple[int, ...] | None:
    return placement.holders if placement is not None else None


def _whole(source: LeafSource, holders: tuple[int, ...] | None) -> Placement | None:
    if holders is None:
        return None
    return Placement(source.shape, (0,) * len(source.shape), holders)


def _low(group: _Group) -> int:
    return group.low


_PLACE = ("leaf", "order", "shape", "strides", "offset")


def overlaps_itself(layout: Layout) -> bool:
    """Whether elements lie on each other, as after broadcasting: all bytes between the
    first and the last are fewer than the elements claim."""
    low, high = byte_span(layout.start, layout.shape, layout.strides, layout.itemsize)
    return high - low < layout.itemsize * prod(layout.shape)


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
                max_work=cast(Any, _EXACT_OVERLAP_WORK),  # NumPy's stubs know only 0 and -1
            )
        )
    except (np.exceptions.TooHardError, ValueError):
        return True
