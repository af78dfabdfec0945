"""Ways to cut a leaf in boxes, as several processes would or as nobody would."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod

import numpy as np
from hypothesis import strategies as st

from holdfast.core.plan import Part

SHAPES = st.lists(st.integers(0, 5), max_size=4).map(tuple)


@st.composite
def tilings(draw: st.DrawFn, shape: Sequence[int], most: int = 12) -> list[Part]:
    """Boxes that tile a leaf, in any order: a box is cut in two, again and again."""
    if not prod(shape):
        return []
    found: list[Part] = [((0,) * len(shape), tuple(shape))]
    for _ in range(draw(st.integers(0, most - 1))):
        number = draw(st.integers(0, len(found) - 1))
        start, extent = found[number]
        long = [dimension for dimension, size in enumerate(extent) if size > 1]
        if not long:
            continue
        dimension = draw(st.sampled_from(long))
        count = draw(st.integers(1, extent[dimension] - 1))
        found[number : number + 1] = halves((start, extent), dimension, count)
    return draw(st.permutations(found))


def halves(part: Part, dimension: int, count: int) -> list[Part]:
    """A box cut in two, the first of which has `count` in that dimension."""
    start, shape = part
    low, high = list(shape), list(shape)
    low[dimension], high[dimension] = count, shape[dimension] - count
    second = list(start)
    second[dimension] += count
    return [(start, tuple(low)), (tuple(second), tuple(high))]


@st.composite
def parts_of(draw: st.DrawFn, shape: Sequence[int]) -> Part:
    """A box of a leaf, perhaps empty."""
    start = tuple(draw(st.integers(0, size)) for size in shape)
    return start, tuple(
        draw(st.integers(0, size - first)) for size, first in zip(shape, start, strict=True)
    )


def counts(shape: Sequence[int], parts: Sequence[Part]) -> np.ndarray:
    """How many of the boxes each element of a leaf lies in."""
    found = np.zeros(shape, int)
    for start, extent in parts:
        found[tuple(slice(a, a + n) for a, n in zip(start, extent, strict=True))] += 1
    return found
