"""How the local store reads: what is cached from the cache, the rest past it."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from holdfast.core.types import MiB
from holdfast.manager.staging import new_block
from holdfast.stores import filesystem
from holdfast.stores.base import BLOCK_ALIGNMENT
from holdfast.stores.filesystem import DIRECT_BYTES
from holdfast.stores.local import LocalStore

NBYTES = 3 * MiB + 1234
CONTENT = os.urandom(NBYTES)


@pytest.fixture
def store(tmp_path: Path) -> LocalStore:
    store = LocalStore(tmp_path / "run")
    assert store.put_new("packs/a", [CONTENT])
    return store


def forget(store: LocalStore, offset: int = 0, nbytes: int = 0) -> None:
    """Ask the system to take (a part of) the file from its cache; it is synced already."""
    fd = os.open(Path(store.address) / "packs/a", os.O_RDONLY)
    os.posix_fadvise(fd, offset, nbytes, os.POSIX_FADV_DONTNEED)
    os.close(fd)


@settings(
    suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=40, deadline=None
)
@given(data=st.data())
def test_every_range_is_what_was_written(store: LocalStore, data: st.DataObject) -> None:
    """Cached, not cached, cached in part; at pages or beside them, in aligned memory or not."""
    page = st.sampled_from([0, 1, BLOCK_ALIGNMENT - 1])
    pages = data.draw(st.integers(0, NBYTES // BLOCK_ALIGNMENT - 1))
    offset = pages * BLOCK_ALIGNMENT + data.draw(page)
    longest = NBYTES - offset
    nbytes = data.draw(st.sampled_from([1, longest, DIRECT_BYTES, DIRECT_BYTES + 1, 2 * MiB]))
    nbytes = min(nbytes, longest)
    forget(store, 0, data.draw(st.sampled_from([0, 1 * MiB, 2 * MiB])))
    beside = data.draw(page)
    block = new_block(nbytes + beside + 1)
    block[-1] = 0xEE
    into = block[beside : beside + nbytes]
    store.read_into("packs/a", offset, into)
    assert into == CONTENT[offset : offset + nbytes]
    assert block[-1] == 0xEE


class Kernel:
    """Reads as one that has the first `cached` bytes of every file in its cache, and
    says `refuses` to certain calls."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.cached = 0
        self.refuses: dict[str, int] = {}
        self.calls: list[tuple[str, int, int]] = []
        self._real_read, self._real_fcntl = os.preadv, fcntl.fcntl
        monkeypatch.setattr(filesystem.os, "preadv", self._read)
        monkeypatch.setattr(filesystem.fcntl, "fcntl", self._fcntl)
        monkeypatch.setattr(filesystem, "_cached_bytes", self._cached_bytes)

    def _cached_bytes(self, fd: int, offset: int, nbytes: int) -> int:
        return max(0, min(nbytes, self.cached - offset))

    def _read(self, fd: int, into: Sequence[memoryview], offset: int) -> int:
        (view,) = into
        direct = self._real_fcntl(fd, fcntl.F_GETFL) & os.O_DIRECT
        kind = "direct" if direct else "plain"
        self.calls.append((kind, offset, view.nbytes))
        if kind in self.refuses:
            raise OSError(self.refuses[kind], "refused")
        if direct:
            fd = os.open(f"/proc/self/fd/{fd}", os.O_RDONLY)  # a plain one: any address will do
        try:
            return self._real_read(fd, [view], offset)
        finally:
            if direct:
                os.close(fd)

    def _fcntl(self, fd: int, command: int, value: int = 0) -> int:
        if command == fcntl.F_SETFL and value & os.O_DIRECT and "O_DIRECT" in self.refuses:
            raise OSError(self.refuses["O_DIRECT"], "refused")
        return self._real_fcntl(fd, command, value)


@pytest.fixture
def kernel(monkeypatch: pytest.MonkeyPatch) -> Kernel:
    return Kernel(monkeypatch)


def read(store: LocalStore, offset: int, nbytes: int) -> None:
    into = new_block(nbytes)
    store.read_into("packs/a", offset, into)
    assert into == CONTENT[offset : offset + nbytes]


def test_what_is_cached_is_read_once_and_from_there(store: LocalStore, kernel: Kernel) -> None:
    kernel.cached = NBYTES
    read(store, 0, 2 * MiB)
    assert kernel.calls == [("plain", 0, 2 * MiB)]


def test_what_is_not_cached_is_read_past_the_cache(store: LocalStore, kernel: Kernel) -> None:
    read(store, MiB, 2 * MiB)
    assert kernel.calls == [("direct", MiB, 2 * MiB)]


def test_what_others_read_too_is_read_through_the_cache(store: LocalStore, kernel: Kernel) -> None:
    into = new_block(2 * MiB)
    store.read_into("packs/a", MiB, into, shared=True)
    assert into == CONTENT[MiB : 3 * MiB]
    assert kernel.calls == [("plain", MiB, 2 * MiB)]


def test_of_a_file_that_is_cached_in_part_only_the_rest(store: LocalStore, kernel: Kernel) -> None:
    kernel.cached = MiB
    read(store, 0, 3 * MiB)
    assert kernel.calls == [("plain", 0, MiB), ("direct", MiB, 2 * MiB)]


def test_the_end_of_a_file_is_no_whole_page(store: LocalStore, kernel: Kernel) -> None:
    read(store, 0, NBYTES)
    tail = NBYTES % BLOCK_ALIGNMENT
    assert kernel.calls == [
        ("direct", 0, NBYTES - tail),
        ("plain", NBYTES - tail, tail),
    ]


@pytest.mark.parametrize(("offset", "nbytes"), [(0, DIRECT_BYTES - 1), (1, 2 * MiB)])
def test_short_reads_and_those_beside_pages_are_plain(
    store: LocalStore, kernel: Kernel, offset: int, nbytes: int
) -> None:
    read(store, offset, nbytes)
    assert kernel.calls == [("plain", offset, nbytes)]


@pytest.mark.parametrize("call", ["direct", "O_DIRECT"])
@pytest.mark.parametrize("code", [errno.EINVAL, errno.EOPNOTSUPP])
def test_a_file_system_that_refuses_is_read_plainly(
    store: LocalStore, kernel: Kernel, call: str, code: int
) -> None:
    kernel.refuses = {call: code}
    read(store, 0, 2 * MiB)
    assert kernel.calls[-1] == ("plain", 0, 2 * MiB)


def test_what_is_in_the_cache_is_known(store: LocalStore) -> None:
    def cached(offset: int, nbytes: int) -> int:
        fd = os.open(Path(store.address) / "packs/a", os.O_RDONLY)
        try:
            return filesystem._cached_bytes(fd, offset, nbytes)
        finally:
            os.close(fd)

    assert (Path(store.address) / "packs/a").read_bytes() == CONTENT  # now it is
    assert cached(0, NBYTES) == NBYTES
    assert cached(MiB, 1234) == 1234
    forget(store, 2 * MiB)
    if cached(2 * MiB, BLOCK_ALIGNMENT) == 0:  # not on a file system that is all memory
        assert cached(0, NBYTES) == 2 * MiB
        assert cached(2 * MiB, BLOCK_ALIGNMENT) == 0, "asking brings nothing in"
    assert cached(0, NBYTES + 100 * BLOCK_ALIGNMENT) == NBYTES + 100 * BLOCK_ALIGNMENT, (
        "not to be known"
    )
