"""What a decoder needs of the leaves: checked sizes, and destinations in memory."""

from __future__ import annotations

import os
from bisect import bisect_left, bisect_right
from collections.abc import Callable, Sequence
from itertools import accumulate
from math import prod
from typing import Any

from holdfast.core.adapters import Destination
from holdfast.core.packing import MAX_DIMENSIONS
from holdfast.core.plan import ITEMSIZES, Part, itemsize, overlap, runs, tiles
from holdfast.core.records import Chunk, Leaf
from holdfast.errors import DamagedObject

_MAX_BYTES = 1 << 62


def check_leaf(leaf: Leaf) -> tuple[str, tuple[int, ...]]:
    """(dtype, shape) of a leaf whose chunks tile it exactly and hold as many bytes as
    it claims. Raises DamagedObject; allocates nothing."""
    size = ITEMSIZES.get(leaf.dtype)
    if size is None:
        raise DamagedObject("the manifest", f"unknown dtype {leaf.dtype!r}", leaf=leaf.path)
    shape = leaf.shape
    if len(shape) > MAX_DIMENSIONS or any(not 0 <= n < _MAX_BYTES for n in shape):
        raise DamagedObject("the manifest", "its shape cannot be", leaf=leaf.path)
    chunks = leaf.chunks
    if (  # nearly every leaf: one chunk that is all of it
        len(chunks) == 1
        and chunks[0].shape == shape
        and chunks[0].nbytes == prod(shape) * size
        and len(chunks[0].start) == len(shape)
        and not any(chunks[0].start)
    ):
        return leaf.dtype, shape
    for chunk in chunks:
        if chunk.codec == "" and chunk.nbytes != prod(chunk.shape) * size:
            raise DamagedObject("the manifest", "a chunk's size is wrong", leaf=leaf.path)
    if not tiles(shape, [(chunk.start, chunk.shape) for chunk in chunks]):
        elements = sum(prod(chunk.shape) for chunk in chunks)
        raise DamagedObject(
            "the manifest",
            "its chunks do not tile it"
            if elements == prod(shape)
            else f"{leaf.dtype}{list(shape)} is not what its {elements * size} stored bytes hold",
            leaf=leaf.path,
        )
    return leaf.dtype, shape


def chunks_for(leaf: Leaf, destination: Destination) -> Sequence[Chunk]:
    """The chunks that a destination needs: all, or those that reach into its `part`."""
    part: Part | None = getattr(destination, "part", None)
    if part is None:
        return leaf.chunks
    return [chunk for chunk in leaf.chunks if overlap(chunk.start, chunk.shape, *part)]


class ChunkIndex:
    """Finds the chunks that reach into boxes which follow each other in a leaf's C order."""

    def __init__(self, leaf: Leaf) -> None:
        found: list[tuple[int, int, int]] = []
        for number, chunk in enumerate(leaf.chunks):
            first = last = 0
            for size, start, count in zip(leaf.shape, chunk.start, chunk.shape, strict=True):
                first = first * size + start
                last = last * size + start + count - 1
            found.append((first, last, number))
        found.sort()
        self._shape = leaf.shape
        self._chunks = [leaf.chunks[number] for _, _, number in found]
        self._firsts = [first for first, _, _ in found]
        # The last element of all chunks so far: those whose numbers are smaller end before.
        self._lasts = list(accumulate((last for _, last, _ in found), max))

    def reaching(self, start: Sequence[int], shape: Sequence[int]) -> list[Chunk]:
        """The chunks that have an element of this box, by where they begin."""
        first = last = 0
        for size, begin, count in zip(self._shape, start, shape, strict=True):
            first = first * size + begin
            last = last * size + begin + count - 1
        low = bisect_left(self._lasts, first)
        high = bisect_right(self._firsts, last)
        return [
            chunk
            for chunk in self._chunks[low:high]
            if overlap(chunk.start, chunk.shape, start, shape)
        ]


class BufferDestination:
    """A one-dimensional `U8` leaf goes into a bytearray; see `adapters.Destination`."""

    def __init__(self, buffer: bytearray) -> None:
        self._view = memoryview(buffer)

    def write(self, start: Sequence[int], shape: Sequence[int], data: memoryview) -> None:
        self._view[start[0] : start[0] + shape[0]] = data

    def release(self) -> None:
        """The buffer can be resized again."""
        self._view.release()


class FileDestination:
    """A leaf goes into a file that is open already, from a byte on; see
    `adapters.Destination`."""

    def __init__(self, fd: int, offset: int, dtype: str, shape: Sequence[int]) -> None:
        self._fd = fd
        self._offset = offset
        self._itemsize = itemsize(dtype)
        self._shape = shape

    def write(self, start: Sequence[int], shape: Sequence[int], data: memoryview) -> None:
        size = self._itemsize
        for first, inside, count in runs(self._shape, start, shape):
            at = self._offset + first * size
            run = data[inside * size : (inside + count) * size]
            while run:
                done = os.pwrite(self._fd, run, at)
                run, at = run[done:], at + done


class Later:
    """A value that exists only once its bytes have arrived: long `str` and `bytes`,
    and immutable containers of them. `settle` gives it in a finisher."""

    __slots__ = ("_build", "_value")

    def __init__(self, build: Callable[[], Any]) -> None:
        self._build: Callable[[], Any] | None = build
        self._value: Any = None

    def get(self) -> Any:
        if self._build is not None:
            self._value = self._build()
            self._build = None
        return self._value


def settle(value: Any) -> Any:
    """`value`, or what it stands for if it had to wait for its bytes. Only for
    finishers: there every earlier finisher has run.

    >>> settle(3), settle(Later(lambda: "late"))
    (3, 'late')
    """
    return value.get() if type(value) is Later else value


def then(value: Any, make: Callable[[Any], Any]) -> Any:
    """`make(value)`, now or when the value is there."""
    if type(value) is Later:
        return Later(lambda: make(value.get()))
    return make(value)


def together(items: list[Any], make: Callable[[list[Any]], Any]) -> Any:
    """`make(items)`, now or when the last of them is there."""
    if any(type(item) is Later for item in items):
        return Later(lambda: make([settle(item) for item in items]))
    return make(items)
