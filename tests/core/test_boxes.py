"""Boxes of a leaf, compared with what NumPy says of an array of that shape."""

from __future__ import annotations

import random
import time
from itertools import pairwise, product
from math import prod

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from holdfast.core.leaves import ChunkIndex
from holdfast.core.plan import Part, boxes, in_c_order, is_inside, meeting, overlap, runs, tiles
from holdfast.core.records import Chunk, Leaf
from tests.support.tilings import SHAPES, counts, parts_of, tilings

LEAVES = st.lists(st.integers(1, 4), max_size=4).map(tuple)


@given(SHAPES, st.data())
def test_tilings_are_known(shape: tuple[int, ...], data: st.DataObject) -> None:
    found = data.draw(tilings(shape))
    assert tiles(shape, found)
    flat = np.arange(prod(shape)).reshape(shape)
    bytes_in_order = [n for start, extent in found for n in _items(flat, start, extent)]
    assert in_c_order(shape, found) == (bytes_in_order == list(range(prod(shape))))


@settings(max_examples=500)
@given(LEAVES, st.data())
def test_whatever_is_no_tiling_is_refused(shape: tuple[int, ...], data: st.DataObject) -> None:
    """One number of a tiling is changed, or several are, or a box is gone or twice there."""
    found = [(list(start), list(extent)) for start, extent in data.draw(tilings(shape))]
    for _ in range(data.draw(st.integers(1, 3))):
        number = data.draw(st.integers(0, len(found) - 1))
        what = data.draw(st.sampled_from(["move", "resize", "copy", "drop", "swap"]))
        start, extent = found[number]
        if what == "copy":
            found.append((list(start), list(extent)))
        elif what == "drop" and len(found) > 1:
            del found[number]
        elif what == "swap":
            found[number] = (start, found[data.draw(st.integers(0, len(found) - 1))][1][:])
        elif shape:
            numbers = start if what == "move" else extent
            numbers[data.draw(st.integers(0, len(shape) - 1))] += data.draw(
                st.sampled_from([1, -1])
            )
    family: list[Part] = [(tuple(start), tuple(extent)) for start, extent in found]
    sane = all(
        first >= 0 and count > 0 and first + count <= size
        for start, extent in family
        for size, first, count in zip(shape, start, extent, strict=True)
    )
    assert tiles(shape, family) == (sane and bool((counts(shape, family) == 1).all()))


@pytest.mark.parametrize("shape", [(2, 2), (1, 4), (2, 3), (2, 2, 2)])
def test_every_family_of_few_boxes(shape: tuple[int, ...]) -> None:
    """All families of up to three boxes (up to four that are there once, of the smallest),
    each against a count of every element."""
    ranges = [[(a, n) for a in range(s) for n in range(1, s - a + 1)] for s in shape]
    every: list[Part] = [
        (tuple(a for a, _ in box), tuple(n for _, n in box)) for box in product(*ranges)
    ]
    seen = 0
    for many in (1, 2, 3):
        for family in product(every, repeat=many):
            if sum(prod(extent) for _, extent in family) != prod(shape):
                continue  # cannot be one, and is refused by its sum
            right = bool((counts(shape, family) == 1).all())
            assert tiles(shape, family) == right
            seen += right
    assert seen > 5


def test_a_pinwheel_that_no_straight_cut_divides() -> None:
    wheel: list[Part] = [
        ((0, 0), (1, 2)),
        ((0, 2), (2, 1)),
        ((2, 1), (1, 2)),
        ((1, 0), (2, 1)),
        ((1, 1), (1, 1)),
    ]
    assert tiles((3, 3), wheel)
    assert not tiles((3, 3), [*wheel[:4], ((0, 0), (1, 1))])
    assert not tiles((3, 3), wheel[:4])


def test_holes_and_overlaps_of_one_size_are_no_tiling() -> None:
    assert not tiles((4,), [((0,), (2,)), ((1,), (2,))])
    assert not tiles((4,), [((0,), (2,)), ((0,), (2,))])
    # As many elements, and as many in each row and in each column.
    assert not tiles(
        (2, 2, 2), [((0, 0, 0), (2, 2, 1)), ((0, 0, 0), (1, 2, 2)), ((1, 0, 0), (1, 1, 1))]
    )


@pytest.mark.parametrize(
    ("shape", "family"),
    [
        ((2, 2), [((0,), (2, 2))]),
        ((2, 2), [((0, 0), (2,))]),
        ((2, 2), [((-1, 0), (2, 2)), ((1, 0), (1, 2))]),
        ((2, 2), [((1, 0), (2, 2))]),
        ((2, 2), [((0, 0), (2, 2)), ((0, 0), (0, 2))]),
        ((2, 2), [((0, 0), (-2, -2))]),
        ((2, 2), [((0, 0), (2, 2)), ((0, 0), (2, 2)), ((1, 1), (-2, 2))]),
        ((0, 2), [((0, 0), (0, 2))]),
        ((0, 2), [((0, 0), (1, 2))]),
        ((), [((), ()), ((), ())]),
        ((), []),
        ((3,), []),
        ((1 << 62, 4), [((0, 0), (1 << 62, 1)), ((0, 1), (1 << 62, 2))]),
    ],
)
def test_what_is_no_box_is_refused(shape: tuple[int, ...], family: list[Part]) -> None:
    assert not tiles(shape, family)


def test_sizes_that_no_machine_integer_holds() -> None:
    large = 1 << 200
    halves: list[Part] = [((0, 0), (large, 1)), ((0, 1), (large, 3))]
    assert tiles((large, 4), halves)
    assert not tiles((large, 4), [halves[0], ((1, 1), (large, 3))])
    assert tiles((0, 3), [])


def test_a_grid_of_many_dimensions_takes_time_for_its_boxes_only() -> None:
    shape = (2,) * 13
    grid: list[Part] = [(start, (1,) * 13) for start in product(range(2), repeat=13)]
    random.Random(1).shuffle(grid)
    assert tiles(shape, grid)
    assert not tiles(shape, [*grid[1:], grid[1]])
    # Dimensions that are not cut cost nothing.
    long = (3,) * 64
    assert tiles(long, [((1, *(0,) * 63), (2, *(3,) * 63)), ((0,) * 64, (1, *(3,) * 63))])


def test_hostile_tilings_are_given_up_in_time() -> None:
    """A cut of each of 64 dimensions in turn: 65 boxes, and 2**64 corners."""
    found: list[Part] = []
    start, shape = (0,) * 64, (2,) * 64
    for dimension in range(64):
        found += _half(start, shape, dimension, 0)
        start, shape = _half(start, shape, dimension, 1)[0]
    found.append((start, shape))
    random.Random(2).shuffle(found)
    assert sum(prod(extent) for _, extent in found) == 2**64
    begun = time.process_time()
    assert not tiles((2,) * 64, found)
    assert time.process_time() - begun < 2
    # Six of them are within what is promised.
    assert tiles((2,) * 6, [((*s[:6],), (*e[:6],)) for s, e in _turns(6)])


def _turns(dimensions: int) -> list[Part]:
    found: list[Part] = []
    start, shape = (0,) * dimensions, (2,) * dimensions
    for dimension in range(dimensions):
        found += _half(start, shape, dimension, 1)
        start, shape = _half(start, shape, dimension, 0)[0]
    return [*found, (start, shape)][::-1]


def _half(start: tuple[int, ...], shape: tuple[int, ...], dimension: int, side: int) -> list[Part]:
    first, extent = list(start), list(shape)
    first[dimension] += side
    extent[dimension] = 1
    return [(tuple(first), tuple(extent))]


def test_many_chunks_take_a_moment() -> None:
    """A leaf of 64 processes, 128 chunks each, by columns, in two orders of them."""
    columns: list[Part] = [
        ((row * 8, rank * 4), (8, 4)) for rank in range(64) for row in range(128)
    ]
    begun = time.process_time()
    assert tiles((1024, 256), columns)
    random.Random(3).shuffle(columns)
    assert tiles((1024, 256), columns)
    start, extent = columns[17]
    columns[17] = (start[0], start[1] - 1 if start[1] else 1), extent
    assert not tiles((1024, 256), columns)
    assert time.process_time() - begun < 2


@given(SHAPES, st.data())
def test_runs_are_the_bytes_of_a_box(shape: tuple[int, ...], data: st.DataObject) -> None:
    start, extent = data.draw(parts_of(shape))
    flat = np.arange(prod(shape)).reshape(shape)
    wanted = _items(flat, start, extent)
    found = list(runs(shape, start, extent))
    got: list[int] = []
    for first, at, count in found:
        assert at == len(got)
        assert count > 0
        got += range(first, first + count)
    assert got == wanted
    for (first, _, count), (then, _, _) in pairwise(found):
        assert first + count < then  # else they would be one


def test_runs_that_are_one() -> None:
    assert list(runs((), (), ())) == [(0, 0, 1)]
    assert list(runs((4, 1, 3), (1, 0, 0), (2, 1, 3))) == [(3, 0, 6)]
    assert list(runs((4, 3), (2, 1), (1, 2))) == [(7, 0, 2)]
    assert list(runs((1 << 40, 1 << 20), (0, 0), (1 << 40, 1 << 20))) == [(0, 0, 1 << 60)]
    for start, extent, offset, nbytes in boxes((3, 4, 5), 1, 12):
        assert list(runs((3, 4, 5), start, extent)) == [(offset, 0, nbytes)]


@given(SHAPES, st.data())
def test_overlaps_are_those_of_slices(shape: tuple[int, ...], data: st.DataObject) -> None:
    (start, extent), part = data.draw(parts_of(shape)), data.draw(parts_of(shape))
    flat = np.arange(prod(shape)).reshape(shape)
    wanted = sorted(set(_items(flat, start, extent)) & set(_items(flat, *part)))
    common = overlap(start, extent, *part)
    places = meeting(start, extent, part)
    assert (common is None) == (places is None) == (not wanted)
    if common is not None and places is not None:
        assert is_inside(shape, *common)
        assert _items(flat, *common) == wanted
        mine, theirs = places
        assert _box(flat, start, extent)[mine].reshape(-1).tolist() == wanted
        assert _box(flat, *part)[theirs].reshape(-1).tolist() == wanted


@given(SHAPES, st.integers(1, 30), st.data())
def test_the_index_finds_what_a_look_at_each_finds(
    shape: tuple[int, ...], most: int, data: st.DataObject
) -> None:
    parts = data.draw(tilings(shape))
    leaf = Leaf("x", "U8", shape, tuple(Chunk(*part, 0, 0, 0, "") for part in parts))
    index = ChunkIndex(leaf)
    for start, extent, _, _ in boxes(shape, 1, most):
        wanted = [c.start for c in leaf.chunks if overlap(c.start, c.shape, start, extent)]
        assert sorted(chunk.start for chunk in index.reaching(start, extent)) == sorted(wanted)


def _box(array: np.ndarray, start: tuple[int, ...], extent: tuple[int, ...]) -> np.ndarray:
    return array[(*(slice(a, a + n) for a, n in zip(start, extent, strict=True)), ...)]


def _items(array: np.ndarray, start: tuple[int, ...], extent: tuple[int, ...]) -> list[int]:
    return _box(array, start, extent).reshape(-1).tolist()
