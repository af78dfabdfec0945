"""Packs of many blocks: every digest is compared on the way, in bounded memory."""

from __future__ import annotations

import threading

import pytest

from holdfast.core.digest import digest
from holdfast.errors import (
    CopyStopped,
    DamagedObject,
)
from holdfast.repo import keys, pack_copy
from holdfast.repo.pace import Pace
from holdfast.repo.pack_copy import PackJob, copy_packs
from holdfast.repo.ranges import Check, Range
from holdfast.repo.repo import Repo
from holdfast.stores.base import NewObject
from holdfast.stores.faulty import Died, Effect, Fault, FaultPlan, FaultyStore
from holdfast.stores.memory import MemoryStore
from tests.repo.copies import (
    check_manager,
    check_steps,
    copy_all,
    damage,
    large_run,
    opened,
    shared_pack,
)
from tests.repo.support import check, packs


@pytest.fixture
def large(monkeypatch: pytest.MonkeyPatch) -> MemoryStore:
    """A run with packs of many blocks."""
    monkeypatch.setattr(pack_copy, "BLOCK_BYTES", 4096)
    return large_run()


def test_packs_of_many_blocks_are_copied_whole(large: MemoryStore) -> None:
    target = MemoryStore("target")
    sizes: list[int] = []
    with opened(large, target, on_bytes=sizes.append) as copies:
        total = sum(copies.copy(r.id).nbytes for r in Repo(large).records())
    assert check_manager(target, large)
    assert max(sizes) == 4096
    assert sum(sizes) == total == sum(i.size_bytes for i in target.list(keys.PACKS))


@pytest.mark.parametrize("part", range(12))
def test_one_wrong_bit_anywhere_in_a_large_pack_is_found(large: MemoryStore, part: int) -> None:
    first, second = Repo(large).records()
    for record in (first, second):
        [key] = [keys.pack_key(n) for n in record.packs if record is first or n not in first.packs]
        size = large.size(key)
        ranges = Repo(large).manifest(record)
        at = size * part // 12
        damage(large, key, at)
        covered = any(
            chunk.offset <= at < chunk.offset + chunk.nbytes
            for leaf in ranges.leaves
            for chunk in leaf.chunks
            if keys.pack_key(ranges.packs[chunk.pack].name) == key
        ) or at < next(p.head_nbytes for p in ranges.packs if keys.pack_key(p.name) == key)
        target = MemoryStore("target")
        with opened(large, target) as copies:
            if covered:
                with pytest.raises(DamagedObject):
                    copies.copy(record.id)
                assert check(target) == []
                assert key.removeprefix(keys.PACKS) not in packs(target)
            else:
                copies.copy(record.id)
        damage(large, key, at)


def test_what_a_pack_brought_for_one_checkpoint_is_compared_for_another(
    large: MemoryStore,
) -> None:
    """The second uses a part of the first one's pack. The rest of it is damaged in the source:
    with the second it comes along, and must not pass for a whole first one."""
    target = MemoryStore("target")
    first, second = Repo(large).records()
    shared, _, small = shared_pack(large)
    damage(large, shared, small)
    with opened(large, target) as copies:
        copies.copy(second.id)
    for _ in range(2):  # another process, which finds what the first one left
        with opened(large, target) as copies, pytest.raises(DamagedObject, match="'small'"):
            copies.copy(first.id)
        assert check_steps(target) == [2]
    damage(large, shared, small)
    with opened(large, target) as copies:
        assert set(copies.copy(first.id).packs) == {keys.pack_of(shared)}  # it was wrong
    assert check_manager(target, large)


def test_a_manifest_that_a_copy_left_says_nothing_of_packs_that_came_later(
    large: MemoryStore,
) -> None:
    target = MemoryStore("target")
    first, second = Repo(large).records()
    fault = Fault(Effect.DIE_BEFORE, operation="create")
    with pytest.raises(Died):
        opened(large, FaultyStore(target, FaultPlan((fault,)))).copy(first.id)
    assert target.size(keys.manifest_key(first.id))
    shared, _, small = shared_pack(large)
    damage(large, shared, small)
    with opened(large, target) as copies:
        copies.copy(second.id)
    with opened(large, target) as copies, pytest.raises(DamagedObject, match="'small'"):
        copies.copy(first.id)
    assert check_steps(target) == [2]


def test_a_pack_that_ends_before_what_is_said_of_it_is_damage() -> None:
    found = Range(10, 20, digest(b""), leaf="x")
    job = PackJob("p", 15, lambda offset, into: None, [Check("p", [found])])
    with pytest.raises(DamagedObject, match="ends before byte 30"):
        copy_packs([job], MemoryStore("target"), pace=Pace())


def test_memory_is_a_block_per_thread(large: MemoryStore, monkeypatch: pytest.MonkeyPatch) -> None:
    blocks: list[int] = []
    real = pack_copy.mmap.mmap

    def counted(fd: int, nbytes: int) -> object:
        blocks.append(nbytes)
        return real(fd, nbytes)

    monkeypatch.setattr(pack_copy.mmap, "mmap", counted)
    with opened(large, MemoryStore("target")) as copies:
        copies.copy(Repo(large).records()[0].id)
    assert blocks
    assert len(blocks) <= pack_copy.THREADS
    assert max(blocks) == 4096


def test_a_copy_that_is_told_to_stop_goes_on_later(large: MemoryStore) -> None:
    target, pace = MemoryStore("target"), Pace()
    record = Repo(large).records()[0]
    seen: list[int] = []

    counting = threading.Lock()

    def count(nbytes: int) -> None:
        with counting:  # no thread finishes the copy before the third block has stopped it
            seen.append(nbytes)
            if len(seen) == 3:
                pace.stop()

    copies = opened(large, target, pace=pace, on_bytes=count)
    with pytest.raises(CopyStopped):
        copies.copy(record.id)
    assert check(target) == []
    assert packs(target) == set()
    copies.close()
    copy_all(large, target)
    assert check_manager(target, large)


class Counting(MemoryStore):
    """Knows how many of its new objects hold something at a time."""

    def __init__(self) -> None:
        super().__init__("counting")
        self.held: set[object] = set()
        self.most = 0
        self._counting = threading.Lock()

    def create(self, key: str, *, at_most_bytes: int) -> NewObject:
        new = super().create(key, at_most_bytes=at_most_bytes)
        discard = new.discard
        with self._counting:
            self.held.add(new)
            self.most = max(self.most, len(self.held))

        def release() -> None:
            with self._counting:
                self.held.discard(new)
            discard()

        new.discard = release
        return new


def test_of_many_packs_few_are_held_at_a_time(monkeypatch: pytest.MonkeyPatch) -> None:
    """In memory, or in temporary files, where the target is a bucket."""
    monkeypatch.setattr(pack_copy, "BLOCK_BYTES", 4096)
    data = bytes(10_000)

    def read(offset: int, into: memoryview) -> None:
        into[:] = data[offset : offset + into.nbytes]

    store, there = Counting(), list[str]()
    jobs = [PackJob(f"{n:032x}", len(data), read, []) for n in range(40)]
    copy_packs(jobs, store, pace=Pace(), on_pack=lambda job: there.append(job.name))
    assert sorted(there) == [job.name for job in jobs]
    assert 1 <= store.most <= pack_copy.THREADS
    assert not store.held


class Requests(MemoryStore):
    """Takes objects whole, as a bucket does."""

    @property
    def whole_bytes(self) -> int:
        return 1 << 20


def test_what_goes_in_one_request_counts_when_that_is_over(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(pack_copy, "BLOCK_BYTES", 4096)
    store, counted = Requests("requests"), list[int]()

    def read(offset: int, into: memoryview) -> None:
        into[:] = bytes(into.nbytes)

    def count(nbytes: int) -> None:
        assert len(list(store.list(keys.PACKS))) > len(counted)
        counted.append(nbytes)

    jobs = [PackJob(f"{n:032x}", nbytes, read, []) for n, nbytes in enumerate((10_000, 17, 4097))]
    copy_packs(jobs, store, pace=Pace(), on_bytes=count, threads=1)
    assert counted == [10_000, 17, 4097]
