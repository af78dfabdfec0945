"""Many leaves are copied at once, by their class where it can."""

from __future__ import annotations

import threading
from collections.abc import Sequence

import numpy as np
import pytest

from holdfast.core import copying
from holdfast.core.arrays import ArraySource, BytesSource
from holdfast.core.copying import Region, copy_leaves, copy_ranges
from holdfast.errors import SaveFailed


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


class Watched(ArraySource):
    """Notes which threads copy, and fails where it is told to."""

    def __init__(self, array: np.ndarray, fails_at: int = -1) -> None:
        super().__init__(array)
        self.threads: set[int] = set()
        self.copies = 0
        self.fails_at = fails_at
        self.both = threading.Barrier(2)

    def copy_range(self, offset: int, into: memoryview) -> None:
        self.copies += 1
        if threading.get_ident() not in self.threads:
            self.threads.add(threading.get_ident())
            self.both.wait(60)  # the first piece of each: no thread does all alone
        if offset == self.fails_at:
            raise SaveFailed("no")
        super().copy_range(offset, into)


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> int:
    """Pieces of a kilobyte, taken by two threads."""
    monkeypatch.setattr(copying, "_COPY_BYTES", 1024)
    monkeypatch.setattr(copying, "_PARALLEL_BYTES", 4096)
    monkeypatch.setattr(copying, "_THREADS", 2)
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    return 1024


def test_what_is_large_is_copied_by_several_threads(pieces: int) -> None:
    data = np.random.default_rng(0).integers(0, 255, 20 * pieces + 7, np.uint8)
    source = Watched(data)
    room = bytearray(data.nbytes - 5)
    copy_ranges([(source, 5, memoryview(room))])
    assert room == data[5:].tobytes()
    assert len(source.threads) == 2
    assert threading.get_ident() in source.threads


def test_the_first_error_ends_all_copies(pieces: int) -> None:
    data = np.ones(1000 * pieces, np.uint8)
    source = Watched(data, fails_at=pieces)
    before = set(threading.enumerate())
    with pytest.raises(SaveFailed, match="no"):
        copy_ranges([(source, 0, memoryview(bytearray(data.nbytes)))])
    assert set(threading.enumerate()) <= before, "nobody copies any more"
    assert source.copies < 1000


@pytest.mark.parametrize("at_once", [True, False], ids=["little", "no more threads"])
def test_one_thread_is_enough(pieces: int, at_once: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(self: threading.Thread) -> None:
        assert not at_once, "for so little"
        raise RuntimeError("can't start new thread")

    monkeypatch.setattr(threading.Thread, "start", refuse)
    data = np.random.default_rng(0).integers(0, 255, pieces * (3 if at_once else 9), np.uint8)
    room = bytearray(data.nbytes)
    copy_ranges([(ArraySource(data), 0, memoryview(room))])
    assert room == data.tobytes()
