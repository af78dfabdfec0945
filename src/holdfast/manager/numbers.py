"""How far two leaves of the same type and shape are apart, element by element."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from holdfast.core.codecs import decoded_nbytes
from holdfast.core.plan import itemsize
from holdfast.core.records import Chunk, Leaf
from holdfast.manager.comparison import Apart
from holdfast.manager.reader import ChunkReader, Wanted

# At a time: as 64-bit floats with all that is computed from them it stays below 100 MiB.
_ELEMENTS = 1 << 20

Array = np.ndarray[Any, Any]


def apart(
    a: ChunkReader, leaf_a: Leaf, b: ChunkReader, leaf_b: Leaf, *, numeric: bool, row_bytes: int = 1
) -> Apart:
    """Compare two leaves of one dtype and shape. Reads only what differs by its digest,
    at most one chunk of each at a time.

    `numeric`: the dtype says what the bytes are; else they are compared as rows of
    `row_bytes`. Raises DamagedObject, CheckpointRemoved, StoreUnavailable.
    """
    unequal = _unequal(a, leaf_a, b, leaf_b)
    return apart_in(unequal, leaf_a.dtype, leaf_a.shape, numeric=numeric, row_bytes=row_bytes)


def apart_in(
    unequal: Iterable[tuple[memoryview, memoryview]],
    dtype: str,
    shape: Sequence[int],
    *,
    numeric: bool,
    row_bytes: int = 1,
) -> Apart:
    """As `apart`, of stretches of the two that lie at the same places."""
    size = itemsize(dtype) if numeric else row_bytes
    differing = nan_in_one = 0
    largest = 0.0 if numeric else None
    for bytes_a, bytes_b in unequal:
        for at in range(0, len(bytes_a), _ELEMENTS * size):
            part_a, part_b = (
                bytes_a[at : at + _ELEMENTS * size],
                bytes_b[at : at + _ELEMENTS * size],
            )
            if not numeric:
                rows = np.frombuffer(part_a, np.uint8) != np.frombuffer(part_b, np.uint8)
                differing += int(rows.reshape(-1, size).any(axis=1).sum())
                continue
            decode = _decoder(dtype)
            found = _apart(decode(part_a), decode(part_b))
            differing += found.differing
            nan_in_one += found.nan_in_one
            largest = max(largest or 0.0, found.largest or 0.0)
    elements = math.prod(shape) * itemsize(dtype) // size
    return Apart(elements, differing, largest, nan_in_one)


def _apart(a: Array, b: Array) -> Apart:
    nan_a, nan_b = np.isnan(a), np.isnan(b)
    unequal = (a != b) & ~(nan_a & nan_b)
    # Infinity less infinity, and numbers too large for their difference, are no news.
    with np.errstate(invalid="ignore", over="ignore"):
        distance = np.abs(a[unequal] - b[unequal])
    finite = distance[np.isfinite(distance)]
    return Apart(
        a.size,
        int(unequal.sum()),
        float(finite.max()) if finite.size else 0.0,
        int((nan_a != nan_b).sum()),
    )


def _unequal(
    a: ChunkReader, leaf_a: Leaf, b: ChunkReader, leaf_b: Leaf
) -> Iterator[tuple[memoryview, memoryview]]:
    """The stretches of two leaves that are not known to be equal, as bytes of the same place.

    Chunks tile a leaf in order, but may be cut at other places in the two.
    """
    cursor_a, cursor_b = Cursor(a, leaf_a), Cursor(b, leaf_b)
    while not cursor_a.done and not cursor_b.done:
        chunk_a, chunk_b = cursor_a.chunk, cursor_b.chunk
        whole = cursor_a.used == cursor_b.used == 0 and cursor_a.left == cursor_b.left
        nbytes = min(cursor_a.left, cursor_b.left)
        if whole and chunk_a.digest == chunk_b.digest:
            cursor_a.skip(nbytes)
            cursor_b.skip(nbytes)
        else:
            yield cursor_a.take(nbytes), cursor_b.take(nbytes)


class Cursor:
    """A place in a leaf's chunks."""

    def __init__(self, reader: ChunkReader, leaf: Leaf) -> None:
        self._reader = reader
        self._leaf = leaf
        self._index = 0
        self._data: bytes | None = None
        self.used = 0
        """Bytes of the chunk that were passed."""

    @property
    def done(self) -> bool:
        return self._index >= len(self._leaf.chunks)

    @property
    def chunk(self) -> Chunk:
        return self._leaf.chunks[self._index]

    @property
    def left(self) -> int:
        return decoded_nbytes(self._leaf, self.chunk) - self.used

    def skip(self, nbytes: int) -> None:
        self.used += nbytes
        if self.left == 0:
            self._index += 1
            self.used, self._data = 0, None

    def take(self, nbytes: int) -> memoryview:
        if self._data is None:
            taken: list[bytes] = []

            def keep(start: Sequence[int], shape: Sequence[int], data: memoryview) -> None:
                taken.append(data.tobytes())  # the view is reused

            self._reader.read([Wanted(self._leaf, self.chunk, keep)])
            self._data = taken[0]
        view = memoryview(self._data)[self.used : self.used + nbytes]
        self.skip(nbytes)
        return view


# -- from stored bytes to numbers ----------------------------------------------

_WIDE: dict[str, str] = {
    "F64": "<f8",
    "F32": "<f4",
    "F16": "<f2",
    "I64": "<i8",
    "I32": "<i4",
    "I16": "<i2",
    "I8": "i1",
    "U64": "<u8",
    "U32": "<u4",
    "U16": "<u2",
    "U8": "u1",
    "BOOL": "u1",
}


@cache
def _decoder(dtype: str) -> Callable[[memoryview], Array]:
    """From bytes to 64-bit floats (complex ones for `C64`)."""
    if dtype in _WIDE:
        return lambda data: np.frombuffer(data, _WIDE[dtype]).astype(np.float64)
    if dtype == "C64":
        return lambda data: np.frombuffer(data, "<c8").astype(np.complex128)
    if dtype == "BF16":
        return lambda data: (
            (np.frombuffer(data, "<u2").astype("<u4") << 16).view("<f4").astype(np.float64)
        )
    table = np.array([eight_bit_float(dtype, byte) for byte in range(256)])
    return lambda data: table[np.frombuffer(data, np.uint8)]


_EIGHT_BIT = {
    # (bits of the mantissa, bias of the exponent)
    "F8_E4M3": (3, 7),
    "F8_E5M2": (2, 15),
    "F8_E4M3FNUZ": (3, 8),
    "F8_E5M2FNUZ": (2, 16),
}


def eight_bit_float(dtype: str, byte: int) -> float:
    """The number that a byte stands for, after "FP8 formats for deep learning" (2022) and
    the OCP microscaling formats (E8M0); "FNUZ" have no infinity and one NaN, at -0.

    >>> [eight_bit_float("F8_E4M3", byte) for byte in (0x38, 0x7E, 0x01, 0xB8)]
    [1.0, 448.0, 0.001953125, -1.0]
    """
    if dtype == "F8_E8M0":
        return math.nan if byte == 255 else 2.0 ** (byte - 127)
    bits, bias = _EIGHT_BIT[dtype]
    sign = -1.0 if byte & 0x80 else 1.0
    exponent, mantissa = (byte & 0x7F) >> bits, byte & ((1 << bits) - 1)
    if dtype.endswith("FNUZ"):
        if byte == 0x80:
            return math.nan
    elif dtype == "F8_E4M3":
        if byte & 0x7F == 0x7F:
            return math.nan
    elif exponent == 31:
        return math.nan if mantissa else sign * math.inf
    if exponent == 0:
        return sign * mantissa * 2.0 ** (1 - bias - bits)
    return sign * (1 + mantissa / (1 << bits)) * 2.0 ** (exponent - bias)
