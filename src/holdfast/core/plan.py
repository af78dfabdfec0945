"""How a leaf's bytes are cut into chunks, and where boxes of it lie: pure arithmetic."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
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
Part = tuple[tuple[int, ...], tuple[int, ...]]
"""(start, shape) of a box, in elements."""

# How often each box may be looked at by `tiles`: enough for any tiling that cuts six
# dimensions (63 times), and for grids of any; a hostile one could ask for 2**64.
_LOOKS = 64

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


def is_inside(leaf_shape: Sequence[int], start: Sequence[int], shape: Sequence[int]) -> bool:
    """Whether a box lies in the leaf and is not empty.

    >>> is_inside((2, 3), (1, 1), (1, 2)), is_inside((2, 3), (1, 1), (2, 2))
    (True, False)
    """
    return len(leaf_shape) == len(start) == len(shape) and all(
        first >= 0 and count > 0 and first + count <= size
        for size, first, count in zip(leaf_shape, start, shape, strict=True)
    )


def in_c_order(leaf_shape: Sequence[int], parts: Iterable[Part]) -> bool:
    """Whether boxes tile a leaf so that their bytes, one after the other, are its bytes in
    C order: what `boxes` gives.

    >>> in_c_order((2, 2), [((0, 0), (1, 2)), ((1, 0), (1, 2))])
    True
    >>> in_c_order((2, 2), [((0, 0), (2, 1)), ((0, 1), (2, 1))])
    False
    """
    elements = 0
    for start, shape in parts:
        count = prod(shape)
        if count <= 0 or box_offset(leaf_shape, start, shape) != elements:
            return False
        elements += count
    return elements == prod(leaf_shape)


def tiles(leaf_shape: Sequence[int], parts: Sequence[Part]) -> bool:
    """Whether boxes (start, shape), in any order, tile a leaf: none is empty or reaches out
    of it, and each element of the leaf lies in exactly one of them. An empty leaf has none.

    Takes time in proportion to the number of boxes. False also for a tiling that it would
    take too long to follow, which has to cut more than six dimensions, not as a grid.

    >>> tiles((2, 2), [((0, 1), (2, 1)), ((0, 0), (2, 1))])
    True
    >>> tiles((2, 2), [((0, 0), (2, 1)), ((0, 0), (1, 2)), ((1, 1), (1, 1))])
    False
    """
    if len(parts) == 1:  # nearly every leaf
        start, shape = parts[0]
        whole = tuple(shape) == tuple(leaf_shape) and min(shape, default=1) > 0
        return whole and len(start) == len(shape) and not any(start)
    if in_c_order(leaf_shape, parts):
        return True
    if not all(is_inside(leaf_shape, start, shape) for start, shape in parts):
        return False
    if sum(prod(shape) for _, shape in parts) != prod(leaf_shape):
        return False
    return _cancel(leaf_shape, parts)


def _cancel(leaf_shape: Sequence[int], parts: Sequence[Part]) -> bool:
    """Whether the sum of the boxes, taken as functions that are 1 inside and 0 outside, is
    that of the leaf.

    A function that is 0 far away is 0 everywhere if and only if its differences along a
    dimension are. Those of a box are one slice at its start and, negative, one behind its
    end. So the sum less the leaf is followed dimension by dimension, one place after the
    other: slices that are equal cancel, as faces of neighbours do, and if nothing is left in
    the end, it was 0.
    """
    cut = [
        dimension
        for dimension, size in enumerate(leaf_shape)
        if any(shape[dimension] != size for _, shape in parts)
    ]
    leaf = tuple(number for dimension in cut for number in (0, leaf_shape[dimension]))
    # Boxes as (start, extent, start, extent, …), with how often each is in the sum.
    terms: dict[tuple[int, ...], int] = {leaf: -1}
    for start, shape in parts:
        box = tuple(number for dimension in cut for number in (start[dimension], shape[dimension]))
        terms[box] = terms.get(box, 0) + 1
    left = _LOOKS * len(terms)
    waiting = [{box: times for box, times in terms.items() if times}]
    while waiting:
        terms = waiting.pop()
        left -= len(terms)
        if len(terms) == 1 or left < 0:
            return False  # a box alone is not 0
        faces: dict[int, dict[tuple[int, ...], int]] = {}
        for box, times in terms.items():
            rest = box[2:]
            for place, change in ((box[0], times), (box[0] + box[1], -times)):
                there = faces.setdefault(place, {})
                total = there.get(rest, 0) + change
                if total:
                    there[rest] = total
                else:
                    del there[rest]
        waiting += [there for there in faces.values() if there]
    return True


def runs(
    leaf_shape: Sequence[int], start: Sequence[int], shape: Sequence[int]
) -> Iterator[tuple[int, int, int]]:
    """The contiguous runs of a box in the leaf's C order, as few as there can be: (first
    element in the leaf, first element in the box, number of elements), ascending.

    >>> list(runs((2, 3), (0, 1), (2, 2)))
    [(1, 0, 2), (4, 2, 2)]
    """
    if not prod(shape):
        return
    cut = max(len(shape) - 1, 0)
    while cut > 0 and shape[cut] == leaf_shape[cut]:
        cut -= 1
    count = prod(shape[cut:])
    first, step = 0, 1
    places: list[range] = []
    for dimension in range(len(shape) - 1, -1, -1):
        if dimension >= cut:
            first += start[dimension] * step
        else:
            low = start[dimension] * step
            places.insert(0, range(low, low + shape[dimension] * step, step))
        step *= leaf_shape[dimension]
    for number, offsets in enumerate(product(*places)):
        yield first + sum(offsets), number * count, count


def overlap(
    start: Sequence[int],
    shape: Sequence[int],
    other_start: Sequence[int],
    other_shape: Sequence[int],
) -> Part | None:
    """The box that two boxes of one leaf have in common; None if there is none.

    >>> overlap((0, 0), (2, 2), (1, 0), (4, 1))
    ((1, 0), (1, 1))
    """
    low = tuple(map(max, start, other_start))
    high = [
        min(a + m, b + n) for a, m, b, n in zip(start, shape, other_start, other_shape, strict=True)
    ]
    extent = tuple(end - first for first, end in zip(low, high, strict=True))
    return (low, extent) if all(count > 0 for count in extent) else None


def meeting(
    start: Sequence[int], shape: Sequence[int], part: Part
) -> tuple[tuple[slice, ...], tuple[slice, ...]] | None:
    """Where what a chunk and a part of its leaf have in common lies: (in an array of the
    chunk, in an array of the part); None if that is nothing. For `Destination.write`.

    >>> meeting((0, 0), (2, 2), ((1, 0), (4, 1)))
    ((slice(1, 2, None), slice(0, 1, None)), (slice(0, 1, None), slice(0, 1, None)))
    """
    common = overlap(start, shape, *part)
    if common is None:
        return None
    return slices(*common, start), slices(*common, part[0])


def slices(
    start: Sequence[int], shape: Sequence[int], origin: Sequence[int] | None = None
) -> tuple[slice, ...]:
    """The index of a box in an array; in one that begins at `origin`.

    >>> slices((2,), (3,)), slices((2,), (3,), (1,))
    ((slice(2, 5, None),), (slice(1, 4, None),))
    """
    zero = origin if origin is not None else (0,) * len(start)
    return tuple(
        slice(first - less, first - less + count)
        for first, count, less in zip(start, shape, zero, strict=True)
    )
