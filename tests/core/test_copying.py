"""Many leaves are copied at once, by their class where it can."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest

from holdfast.core.arrays import ArraySource, BytesSource
from holdfast.core.copying import Region, copy_leaves


class Odd(BytesSource):
    """Copies all sources together whose first byte is odd."""

    @staticmethod
    def copy_many(sources: Sequence[Odd], region: Region, starts: Sequence[int]) -> list[int]:
        left: list[int] = []
        for number, (source, start) in enumerate(zip(sources, starts, strict=True)):
            if source._data[0] % 2:
                region[start] = 255
            else:
                left.append(number)
        return left


def test_classes_copy_what_they_can_and_leave_the_others() -> None:
    sources = [
        Odd(b"\x01"),
        ArraySource(np.array([2, 3], np.uint8)),
        Odd(b"\x04"),
        BytesSource(b"\x05"),
        Odd(b"\x07"),
    ]
    region = np.zeros(8, np.uint8)
    copy_leaves(sources, region, [7, 0, 2, 4, 5])
    assert region.tolist() == [2, 3, 4, 0, 5, 255, 0, 255]


@pytest.mark.parametrize("start", [-1, 3])
def test_a_place_outside_of_the_region(start: int) -> None:
    region = np.zeros(4, np.uint8)
    with pytest.raises(ValueError, match="2 bytes at"):
        copy_leaves([BytesSource(b"ab")], region, [start])
    assert not region.any()
