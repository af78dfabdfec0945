from __future__ import annotations

from math import prod

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from holdfast.core.plan import CHUNK_BYTES, ITEMSIZES, box_offset, boxes, itemsize
from holdfast.errors import StateError

SHAPES = st.lists(st.integers(0, 6), max_size=4).map(tuple)


@given(SHAPES, st.sampled_from([1, 2, 4, 8]), st.integers(1, 100))
def test_boxes_tile_the_leaf_in_order(shape: tuple[int, ...], size: int, chunk: int) -> None:
    array = np.arange(prod(shape)).reshape(shape)
    seen: list[int] = []
    for start, counts, offset, nbytes in boxes(shape, size, chunk):
        assert offset == len(seen) * size
        assert nbytes == prod(counts) * size
        assert 0 < nbytes <= max(chunk, size)
        assert box_offset(shape, start, counts) == len(seen)
        part = array[tuple(slice(a, a + n) for a, n in zip(start, counts, strict=True))]
        seen += part.reshape(-1).tolist()
    assert seen == list(range(prod(shape)))


def test_a_scalar_is_one_box_and_an_empty_leaf_none() -> None:
    assert list(boxes((), 8)) == [((), (), 0, 8)]
    assert list(boxes((3, 0), 8)) == []


def test_large_leaves_have_chunks_of_8_mib() -> None:
    sizes = [nbytes for *_, nbytes in boxes((1024, 1024, 6), 4)]
    # Rows of 24 KiB: 341 of them fit.
    assert max(sizes) == CHUNK_BYTES // (24 * 1024) * 24 * 1024
    assert sum(sizes) == 1024 * 1024 * 24
    assert len(list(boxes((1 << 40,), 1, 1 << 38))) == 4


@given(SHAPES, st.data())
def test_box_offset_knows_contiguous_boxes(shape: tuple[int, ...], data: st.DataObject) -> None:
    start = tuple(data.draw(st.integers(0, n)) for n in shape)
    counts = tuple(
        data.draw(st.integers(1, max(1, n - a))) for n, a in zip(shape, start, strict=True)
    )
    array = np.arange(prod(shape)).reshape(shape)
    part = array[tuple(slice(a, a + n) for a, n in zip(start, counts, strict=True))]
    offset = box_offset(shape, start, counts)
    if part.shape != counts:
        assert offset is None
        return
    flat = part.reshape(-1).tolist()
    contiguous = flat == list(range(flat[0], flat[0] + len(flat)))
    assert (offset is not None) == contiguous
    assert offset is None or offset == flat[0]


@pytest.mark.parametrize(
    ("start", "shape"), [((0,), (2, 2)), ((-1, 0), (1, 2)), ((0, 0), (3, 2)), ((0, 1), (1, 2))]
)
def test_box_offset_refuses_boxes_outside(start: tuple[int, ...], shape: tuple[int, ...]) -> None:
    assert box_offset((2, 2), start, shape) is None


def test_item_sizes() -> None:
    assert {itemsize(dtype) for dtype in ITEMSIZES} == {1, 2, 4, 8}
    with pytest.raises(StateError, match="F128"):
        itemsize("F128")
