"""Bytes that come in blocks of any size are compared with every digest."""

from __future__ import annotations

from itertools import pairwise

import hypothesis.strategies as st
import pytest
from hypothesis import given

from holdfast.core.digest import digest
from holdfast.errors import DamagedObject
from holdfast.repo.ranges import Check, Range, united

DATA = bytes(range(256)) * 2


@st.composite
def ranges(draw: st.DrawFn) -> list[Range]:
    """Some ranges of DATA, in order, none of them overlapping another."""
    cuts = sorted(draw(st.sets(st.integers(0, len(DATA)), min_size=2, max_size=12)))
    found = [
        Range(first, end - first, digest(DATA[first:end]), leaf=f"{first}")
        for first, end in pairwise(cuts)
    ]
    return [r for r in found if draw(st.booleans())] or found[:1]


def feed(check: Check, data: bytes, block: int) -> None:
    for at in range(0, len(data), block):
        check.feed(at, memoryview(data)[at : at + block])
    check.end()


@given(ranges(), st.integers(1, 600))
def test_right_bytes_pass_whatever_the_blocks(found: list[Range], block: int) -> None:
    feed(Check("p", found), DATA, block)


@given(ranges(), st.integers(1, 600), st.integers(0, len(DATA) * 8 - 1))
def test_a_flipped_bit_is_found_where_a_range_has_it(
    found: list[Range], block: int, bit: int
) -> None:
    data = bytearray(DATA)
    data[bit // 8] ^= 1 << bit % 8
    hit = [r for r in found if r.offset <= bit // 8 < r.end]
    if not hit:
        feed(Check("p", found), bytes(data), block)
        return
    with pytest.raises(DamagedObject, match="do not match") as error:
        feed(Check("p", found), bytes(data), block)
    assert error.value.leaf == hit[0].leaf


@given(ranges(), st.integers(1, 600), st.data())
def test_bytes_that_end_too_early_are_damage(
    found: list[Range], block: int, data: st.DataObject
) -> None:
    end = data.draw(st.integers(0, max(r.end for r in found) - 1))
    with pytest.raises(DamagedObject):
        feed(Check("p", found), DATA[:end], block)


def test_what_two_manifests_say_is_compared_once() -> None:
    one, two = Range(0, 4, "a", leaf="x"), Range(4, 4, "b", leaf="y")
    other, clash = Range(0, 4, "a", leaf="another name"), Range(2, 4, "c", leaf="z")
    assert united([[two, one], [other], [clash, other]]) == [[one, two], [clash]]
