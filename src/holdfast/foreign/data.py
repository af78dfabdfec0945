"""Where the bytes of a foreign tensor are, and how they are read in pieces.

Everything here is lazy: nothing is read before `read` asks for a range, and no more memory
is taken than that range needs (a tensor that is stored in another order of its dimensions
is mapped). NumPy is imported where elements must be moved, and only there.
"""

from __future__ import annotations

import mmap
import zlib
from collections.abc import Callable, Hashable
from dataclasses import dataclass
from math import prod
from typing import Any, Protocol, TypeAlias

from holdfast.core.types import KiB
from holdfast.errors import DamagedObject
from holdfast.foreign.harmless import SIZES
from holdfast.foreign.source import FileSource, PartSource, Source

_PIECE_BYTES = 256 * KiB


class Data(Protocol):
    """Random access to a tensor's bytes, in C order and little-endian."""

    def read(self, offset: int, into: memoryview) -> None:
        """Fill `into` from `offset` on. Raises DamagedObject."""
        ...


@dataclass(frozen=True, eq=False)
class ForeignTensor:
    """A tensor or an array of a foreign file, not read yet."""

    dtype: str
    """As safetensors names it, or one of the others in `harmless.SIZES`; of NumPy's without a
    name there, its own code ("<U5")."""
    shape: tuple[int, ...]
    data: Data
    numpy: bool = False
    """NumPy's, not PyTorch's."""
    itemsize: int = 0
    same: Hashable = None
    """Tensors for which this is equal, and not None, are the same bytes."""

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * (self.itemsize or SIZES[self.dtype])


@dataclass(frozen=True, eq=False)
class ForeignBytes:
    """Bytes, or a text, not read yet."""

    nbytes: int
    data: Data
    text: bool = False


@dataclass(frozen=True, eq=False)
class ForeignObject:
    """What is no plain value: nothing was made of it."""

    name: str
    """Its class, or why it is none."""


Tree: TypeAlias = Any
"""Dicts, lists, tuples, sets and plain values around the three above."""


@dataclass(frozen=True)
class Span:
    """A range of a file, as it is."""

    source: Source
    offset: int
    nbytes: int

    def read(self, offset: int, into: memoryview) -> None:
        _check(self.source.name, offset, len(into), self.nbytes)
        for at in range(0, len(into), _PIECE_BYTES):
            piece = into[at : at + _PIECE_BYTES]
            piece[:] = self.source.read(self.offset + offset + at, len(piece))


class Inflated:
    """A range of what a deflated entry of a zip archive holds, unpacked as it is read.

    Reading in order costs one pass; to go back means to begin anew.
    """

    def __init__(self, source: Source, start: int, packed: int, skip: int, nbytes: int) -> None:
        """`skip` bytes of what it holds come before the range."""
        self._source, self._start, self._packed = source, start, packed
        self._skip, self._nbytes = skip, nbytes
        self._begin()

    def _begin(self) -> None:
        self._unpacker = zlib.decompressobj(-zlib.MAX_WBITS)
        self._taken = 0
        self._at = -self._skip

    def read(self, offset: int, into: memoryview) -> None:
        _check(self._source.name, offset, len(into), self._nbytes)
        if offset < self._at:
            self._begin()
        while self._at < offset:
            self._at += len(self._next(min(_PIECE_BYTES, offset - self._at)))
        done = 0
        while done < len(into):
            piece = self._next(min(_PIECE_BYTES, len(into) - done))
            into[done : done + len(piece)] = piece
            done += len(piece)
            self._at += len(piece)

    def _next(self, most: int) -> bytes:
        """At least one byte."""
        while True:
            packed = self._unpacker.unconsumed_tail
            if not packed and self._taken < self._packed:
                count = min(_PIECE_BYTES, self._packed - self._taken)
                packed = self._source.read(self._start + self._taken, count)
                self._taken += count
            try:
                piece = self._unpacker.decompress(packed, most)
            except zlib.error as error:
                text = f"an entry cannot be unpacked ({error})"
                raise DamagedObject(self._source.name, text) from error
            if piece:
                return piece
            if self._unpacker.eof or not packed:
                raise DamagedObject(self._source.name, "an entry holds less than it says")


@dataclass(frozen=True)
class Held:
    """Bytes in memory."""

    data: bytes

    def read(self, offset: int, into: memoryview) -> None:
        into[:] = self.data[offset : offset + len(into)]


class Computed:
    """Bytes that are made when they are first asked for."""

    def __init__(self, make: Callable[[], bytes]) -> None:
        self._make = make
        self._data: bytes | None = None

    def read(self, offset: int, into: memoryview) -> None:
        if self._data is None:
            self._data = self._make()
        Held(self._data).read(offset, into)


@dataclass(frozen=True)
class Swapped:
    """Big-endian elements of `itemsize` bytes, turned round."""

    inner: Data
    itemsize: int

    def read(self, offset: int, into: memoryview) -> None:
        import numpy as np

        start = offset - offset % self.itemsize
        end = -(-(offset + len(into)) // self.itemsize) * self.itemsize
        whole = bytearray(end - start)
        self.inner.read(start, memoryview(whole))
        turned = np.frombuffer(whole, np.uint8).reshape(-1, self.itemsize)[:, ::-1].tobytes()
        into[:] = turned[offset - start : offset - start + len(into)]


class Strided:
    """Elements that are not in C order: `strides` (in elements) tell where each is."""

    def __init__(
        self, inner: Data, reach: int, shape: tuple[int, ...], strides: tuple[int, ...], size: int
    ) -> None:
        """The elements, of `size` bytes, are in the first `reach` bytes of `inner`."""
        self._inner, self._reach, self._size = inner, reach, size
        self._shape, self._strides = shape, strides
        self._view: Any = None

    def read(self, offset: int, into: memoryview) -> None:
        import numpy as np

        if self._view is None:
            self._view = self._mapped(np)
        first = offset // self._size
        last = -(-(offset + len(into)) // self._size)
        data = self._view.flat[first:last].tobytes()
        skip = offset - first * self._size
        into[:] = data[skip : skip + len(into)]

    def _mapped(self, np: Any) -> Any:
        strides = tuple(step * self._size for step in self._strides)
        place = _place(self._inner)
        if place is None:
            data = bytearray(self._reach)
            self._inner.read(0, memoryview(data))
            base = np.frombuffer(data, np.uint8)
        else:
            # Mapped, since a tensor may be larger than memory and is gathered from all over.
            file, start = place
            page = start - start % mmap.ALLOCATIONGRANULARITY
            length = start - page + self._reach
            mapped = mmap.mmap(file.fileno(), length, prot=mmap.PROT_READ, offset=page)
            base = np.frombuffer(mapped, np.uint8)[start - page :]
        return np.ndarray(self._shape, np.dtype((np.void, self._size)), base, 0, strides)


def _place(data: Data) -> tuple[FileSource, int] | None:
    """The file in which a span lies, and where; None for what lies in no file."""
    if not isinstance(data, Span):
        return None
    source, offset = data.source, data.offset
    while isinstance(source, PartSource):
        offset += source.start
        source = source.whole
    return (source, offset) if isinstance(source, FileSource) else None


@dataclass(frozen=True)
class Box:
    """A part of a tensor: where it starts in it, its sizes, its own bytes in C order."""

    start: tuple[int, ...]
    shape: tuple[int, ...]
    data: Data


class Boxes:
    """A tensor in several boxes, put together some rows at a time."""

    def __init__(self, name: str, shape: tuple[int, ...], size: int, boxes: list[Box]) -> None:
        """`size` is that of an element, in bytes. `name` is for errors."""
        # Leading dimensions of one element would make a "row" of the whole tensor.
        drop = next((i for i, n in enumerate(shape) if n != 1), len(shape))
        self._name, self._size = name, size
        self._shape = shape[drop:] or (1,)
        cut = [Box(b.start[drop:] or (0,), b.shape[drop:] or (1,), b.data) for b in boxes]
        self._boxes = sorted(cut, key=lambda box: box.start)

    def read(self, offset: int, into: memoryview) -> None:
        import numpy as np

        row_bytes = prod(self._shape[1:]) * self._size
        # At most about as many rows at once as a piece has: `into` may be 8 MiB.
        first, end = offset // row_bytes, -(-(offset + len(into)) // row_bytes)
        rows = np.zeros((end - first, *self._shape[1:]), np.dtype((np.void, self._size)))
        seen = np.zeros(rows.shape, bool)
        for box in self._boxes:
            low, high = max(first, box.start[0]), min(end, box.start[0] + box.shape[0])
            if low >= high:
                continue
            inner = prod(box.shape[1:]) * self._size
            part = bytearray((high - low) * inner)
            box.data.read((low - box.start[0]) * inner, memoryview(part))
            place = (
                slice(low - first, high - first),
                *(slice(at, at + n) for at, n in zip(box.start[1:], box.shape[1:], strict=True)),
            )
            rows[place] = np.frombuffer(part, rows.dtype).reshape(high - low, *box.shape[1:])
            seen[place] = True
        if not seen.all():
            raise DamagedObject(self._name, "its parts leave holes in it")
        skip = offset - first * row_bytes
        into[:] = rows.tobytes()[skip : skip + len(into)]


def _check(name: str, offset: int, nbytes: int, most: int) -> None:
    if offset < 0 or offset + nbytes > most:
        raise DamagedObject(name, f"bytes {offset} to {offset + nbytes} of {most} were asked for")
