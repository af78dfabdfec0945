"""Power fails at any file system call of a copy: what was acknowledged is there, none is half."""

from __future__ import annotations

from dataclasses import dataclass, field

import pytest

from holdfast.repo import log
from holdfast.repo.pace import Pace
from holdfast.repo.repo import Repo
from holdfast.stores.faulty import Died
from holdfast.stores.local import LocalStore
from holdfast.stores.memory import MemoryStore
from tests.repo.copies import copy_all, made, only_pack, opened
from tests.repo.support import check, keep_last
from tests.support.crashfs import CrashFileSystem

DISKS_PER_CALL = 4
COPY = "/runs/copy"


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_CREATE_BACKOFF_S", 0.0)


@dataclass
class Copying:
    """Three checkpoints are copied, the first is retired with the third; `allowed` are the
    lists that may be found after the last call that returned."""

    source: MemoryStore
    allowed: tuple[list[int], ...] = field(default=([],))

    def run(self, fs: CrashFileSystem) -> None:
        store = LocalStore(COPY, fs)
        done: list[int] = []
        records = Repo(self.source).records()
        with opened(self.source, store, pace=Pace()) as copies:
            for record, after in zip(records, ([1], [1, 2], [2, 3]), strict=True):
                self.allowed = (done, after)
                copies.copy(record.id, retire=keep_last(2))
                done = after
                self.allowed = (after,)


def test_power_loss_at_every_call_of_a_copy() -> None:
    source = made(1, 2, 3)
    whole = CrashFileSystem()
    Copying(source).run(whole)
    calls = whole.calls
    assert check(LocalStore(COPY, whole)) == [2, 3]
    disks = 0
    for number in range(1, calls + 1):
        fs = CrashFileSystem(stop_at=number)
        job = Copying(source)
        with pytest.raises(Died):
            job.run(fs)
        for disk in fs.crash_states(limit=DISKS_PER_CALL, seed=number):
            disks += 1
            store = LocalStore(COPY, disk)
            assert check(store) in job.allowed, f"call {number}: {fs.history[-1]}"
            copy_all(source, store)
            assert check(store) == [1, 2, 3]
    assert disks > 300


def test_power_loss_while_something_is_replaced() -> None:
    """Before: missing. After: whole. Never listed as something else."""
    source = made(1, 2)
    first = Repo(source).records()[0]

    def hurt(fs: CrashFileSystem) -> LocalStore:
        store = LocalStore(COPY, fs)
        copy_all(source, store)
        store.delete([only_pack(first)])
        return store

    counted = CrashFileSystem()
    store = hurt(counted)
    before = counted.calls
    copy_all(source, store)
    for number in range(before + 1, counted.calls + 1, 2):
        fs = CrashFileSystem(stop_at=number)
        store = hurt(fs)
        with pytest.raises(Died):
            copy_all(source, store)
        for disk in fs.crash_states(limit=3, seed=number):
            again = LocalStore(COPY, disk)
            assert [record.step for record in Repo(again).records()] == [1, 2]
            copy_all(source, again)
            assert check(again) == [1, 2]
