"""How a leaf's bytes are cut into chunks: pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import product
from math import prod

from holdfast.core.types import KiB, MiB
from holdfast.errors import StateError

CHUNK_BYTES = 8 * MiB  # large enough for full speed, small enough to dedup and to restart
# Of tensors whose rows change sparsely: a few hundred rows, and a manifest entry of
# about a five-hundredth of that (docs/design/saving.md).
SPARSE_CHUNK_BYTES = 64 * KiB

Box = tuple[tuple[int, ...], tuple[int, ...], int, int]
"""(start, shape, offset_bytes, nbytes) of one box of a leaf."""

ITEMSIZES = {
    "BOOL": 1,
    "U8": 1,
    "I8": 1,
    "F8_E5M2": 1,
    "F8_E4M3": 1,
    "F8_E8M0": 1,
    "F8_E4M3FNUZ": 1,
    "F8_E5M2FNUZ": 1,
    "U16": 2,
    "I16": 2,
    "F16": 2,
    "BF16": 2,
    "U32": 4,
    "I32": 4,
    "F32": 4,
    "C64": 8,
    "U64": 8,
    "I64": 8,
    "F64": 8,
}

NAMED = {
    "bool": "BOOL",
    "uint8": "U8",
    "int8": "I8",
    "float8_e5m2": "F8_E5M2",
    "float8_e4m3fn": "F8_E4M3",
    "float8_e8m0fnu": "F8_E8M0",
    "float8_e4m3fnuz": "F8_E4M3FNUZ",
    "float8_e5m2fnuz": "F8_E5M2FNUZ",
    "uint16": "U16",
    "int16": "I16",
    "float16": "F16",
    "bfloat16": "BF16",
    "uint32": "U32",
    "int32": "I32",
    "float32": "F32",
    "complex64": "C64",
    "uint64": "U64",
    "int64": "I64",
    "float64": "F64",
}
"""Dtypes that safetensors can name, as torch and JAX call them -> that name."""


def itemsize(dtype: str) -> int:
    """Bytes of one element of a safetensors dtype. Raises StateError if unknown.

    >>> itemsize("BF16")
    2
    """
    try:
        return ITEMSIZES[dtype]
    except KeyError:
        raise StateError(
            f"unknown stored dtype {dtype!r}", hint="Upgrade: pip install -U holdfast"
        ) from None


def boxes(shape: Sequence[int], itemsize: int, chunk_bytes: int = CHUNK_BYTES) -> Iterator[Box]:
    """The boxes that tile a leaf, in C order. Each is contiguous and at most
    `chunk_bytes` long (but at least one element); an empty leaf has none.

    >>> [(start, size) for start, size, _, _ in boxes((2, 3), 1, chunk_bytes=2)]
    [((0, 0), (1, 2)), ((0, 2), (1, 1)), ((1, 0), (1, 2)), ((1, 2), (1, 1))]
    """
    shape = tuple(shape)
    total = prod(shape) * itemsize
    if total == 0:
        return
    if total <= chunk_bytes or not shape:
        yield (0,) * len(shape), shape, 0, total
        return
    # The first dimension whose rows fit in a chunk is the one to cut.
    cut = 0
    row_bytes = total // shape[0]
    while row_bytes > chunk_bytes and cut < len(shape) - 1:
        cut += 1
        row_bytes //= shape[cut]
    rows = max(1, chunk_bytes // row_bytes)
    tail = shape[cut + 1 :]
    zeros = (0,) * len(tail)
    ones = (1,) * cut
    offset = 0
    for lead in product(*(range(n) for n in shape[:cut])):
        for row in range(0, shape[cut], rows):
            count = min(rows, shape[cut] - row)
            nbytes = count * row_bytes
            yield (*lead, row, *zeros), (*ones, count, *tail), offset, nbytes
            offset += nbytes


def box_offset(leaf_shape: Sequence[int], start: Sequence[int], shape: Sequence[int]) -> int | None:
    """First element of a box in the leaf's C order; None unless the box lies in
    the leaf and is contiguous there.

    >>> box_offset((2, 3), (1, 0), (1, 3)), box_offset((2, 3), (0, 1), (2, 1))
    (3, None)
    """
    if not len(leaf_shape) == len(start) == len(shape):
        return None
    offset = 0
    inside = False  # past the first dimension that the box does not cross one by one
    for size, first, count in zip(leaf_shape, start, shape, strict=True):
        if first < 0 or count < 0 or first + count > size:
            return None
        if inside and count != size:
            return None
        inside = inside or count != 1
        offset = offset * size + first
    return offset
