"""How far two leaves of the same type and shape are apart, element by element."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from typing import Any

import numpy as np

from holdfast.core.arrays import box_destination
from holdfast.core.leaves import ChunkIndex
from holdfast.core.plan import CHUNK_BYTES, Part, boxes, in_c_order, itemsize
from holdfast.core.records import Chunk, Leaf
from holdfast.core.types import MiB
from holdfast.manager.comparison import Apart
from holdfast.manager.reader import ChunkReader, Wanted

# At a time: as 64-bit floats with all that is computed from them it stays below 100 MiB.
_ELEMENTS = 1 << 20
# Of each of two leaves, where they are cut in different ways and one not in C order.
_ACROSS_BYTES = 128 * MiB

Array = np.ndarray[Any, Any]


def apart(
    a: ChunkReader, leaf_a: Leaf, b: ChunkReader, leaf_b: Leaf, *, numeric: bool, row_bytes: int = 1
) -> Apart:
    """Compare two leaves of one dtype and shape. Reads only what differs by its digest. If
    the two are cut alike, or in C order, at most one chunk of each is in memory.

    `numeric`: the dtype says what the bytes are; else they are compared as rows of
    `row_bytes`. Raises DamagedObject, CheckpointRemoved, StoreUnavailable.
    """
    unequal = _unequal(a, leaf_a, b, leaf_b, row_bytes)
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
    a: ChunkReader, leaf_a: Leaf, b: ChunkReader, leaf_b: Leaf, row_bytes: int
) -> Iterator[tuple[memoryview, memoryview]]:
    """The stretches of two leaves that are not known to be equal, as bytes of the same places."""
    cut_a, cut_b = _by_box(leaf_a), _by_box(leaf_b)
    whole_rows = row_bytes == 1 or all(shape[-1:] == leaf_a.shape[-1:] for _, shape in cut_a)
    if cut_a.keys() == cut_b.keys() and whole_rows:
        for box, chunk in cut_a.items():
            if chunk.digest != cut_b[box].digest:
                yield (
                    assembled(a, leaf_a, [chunk], *box),
                    assembled(b, leaf_b, [cut_b[box]], *box),
                )
        return
    index_a, index_b = ChunkIndex(leaf_a), ChunkIndex(leaf_b)
    for start, shape in stretches(leaf_a, leaf_b):
        here_a, here_b = index_a.reaching(start, shape), index_b.reaching(start, shape)
        equal = set(map(_proof, here_a)) & set(map(_proof, here_b))
        # Both are 0 where they are equal.
        left_a = [chunk for chunk in here_a if _proof(chunk) not in equal]
        left_b = [chunk for chunk in here_b if _proof(chunk) not in equal]
        if left_a:
            yield (
                assembled(a, leaf_a, left_a, start, shape),
                assembled(b, leaf_b, left_b, start, shape),
            )


def _by_box(leaf: Leaf) -> dict[Part, Chunk]:
    return {(chunk.start, chunk.shape): chunk for chunk in leaf.chunks}


def _proof(chunk: Chunk) -> tuple[tuple[int, ...], tuple[int, ...], str]:
    """Equal for chunks that have the same bytes at the same place."""
    return chunk.start, chunk.shape, chunk.digest


def stretches(*leaves: Leaf) -> Iterator[Part]:
    """(start, shape) of boxes that tile leaves of one dtype and shape, one behind the other in
    C order: so large that what is read again, where a chunk reaches through several, is little.
    """
    ordered = all(in_c_order(leaf.shape, _by_box(leaf)) for leaf in leaves)
    most = CHUNK_BYTES if ordered else _ACROSS_BYTES
    for start, shape, _, _ in boxes(leaves[0].shape, itemsize(leaves[0].dtype), most):
        yield start, shape


def assembled(
    reader: ChunkReader,
    leaf: Leaf,
    chunks: Iterable[Chunk],
    start: Sequence[int],
    shape: Sequence[int],
    into: memoryview | None = None,
) -> memoryview:
    """What verified chunks have of a box of their leaf, as its bytes; the rest is 0, or what
    is there in `into`. Raises DamagedObject, CheckpointRemoved, StoreUnavailable."""
    if into is None:
        into = memoryview(bytearray(math.prod(shape) * itemsize(leaf.dtype)))
    write = box_destination(into, leaf.dtype, start, shape).write
    reader.read([Wanted(leaf, chunk, write) for chunk in chunks])
    return into


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
