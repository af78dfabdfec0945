"""Power fails at any file system call: what was acknowledged is there, nothing is half."""

from __future__ import annotations

import errno
from collections.abc import Callable
from dataclasses import dataclass, field

import pytest

from holdfast.errors import HoldfastError
from holdfast.repo import log
from holdfast.repo.repo import Repo
from holdfast.repo.writer import Writer
from holdfast.stores.faulty import Died
from holdfast.stores.local import LocalStore
from tests.repo.support import check, dead, keep_last, process, save
from tests.support.crashfs import CrashFileSystem
from tests.support.exhaustive import EXHAUSTIVE

DISKS_PER_CALL = 12
FEW = DISKS_PER_CALL if EXHAUSTIVE else 4
"""At two of three calls."""


@pytest.fixture(autouse=True)
def no_backoff(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(log, "_CREATE_BACKOFF_S", 0.0)


@dataclass
class Job:
    """A training job's storage calls; `done` is the list after the last acknowledged call."""

    done: list[int] = field(default_factory=list)
    allowed: tuple[list[int], ...] = ([],)

    def run(self, fs: CrashFileSystem) -> None:
        store = LocalStore("/runs/job", fs)
        writer = Writer.open(Repo(store), holder=process(), alive=dead)
        self.commit([1], lambda: save(writer, 1))
        base = Repo(store).manifest(Repo(store).records()[-1])
        self.commit([1, 2], lambda: save(writer, 2, reuse=base))
        base = Repo(store).manifest(Repo(store).records()[-1])
        self.commit([2, 3], lambda: save(writer, 3, reuse=base, retire=keep_last(2)))
        self.commit([3], lambda: Repo(store).amend("prune", lambda records: records[-1:]))
        writer = Writer.open(Repo(store), holder=process(), alive=dead)
        writer.collect()

    def commit(self, after: list[int], operation: Callable[[], object]) -> None:
        self.allowed = (self.done, after)
        operation()
        self.done = after
        self.allowed = (after,)


def whole_run() -> int:
    fs = CrashFileSystem()
    Job().run(fs)
    return fs.calls


def test_power_loss_at_every_call() -> None:
    disks = 0
    for number in range(1, whole_run() + 1):
        fs = CrashFileSystem(stop_at=number)
        job = Job()
        with pytest.raises(Died):
            job.run(fs)
        limit = FEW if number % 3 else DISKS_PER_CALL
        for disk in fs.crash_states(limit=limit, seed=number):
            disks += 1
            store = LocalStore("/runs/job", disk)
            assert check(store) in job.allowed, f"call {number}: {fs.history[-1]}"
            writer = Writer.open(Repo(store), holder=process(), alive=dead)
            save(writer, 9)
            writer.collect()
            assert check(store)[-1] == 9
    assert disks > 1000


def test_power_is_lost_twice() -> None:
    """The second loss comes while the next process opens, saves and collects."""
    total = whole_run()
    for number in range(total // 2, total, 9):
        fs = CrashFileSystem(stop_at=number)
        job = Job()
        with pytest.raises(Died):
            job.run(fs)
        for disk in fs.crash_states(limit=2, seed=number):
            before = check(LocalStore("/runs/job", disk))
            for again in range(3, 60, 7):
                second = next(iter(disk.crash_states(limit=1)))
                second.stop_at = second.calls + again
                try:
                    writer = Writer.open(
                        Repo(LocalStore("/runs/job", second)), holder=process(), alive=dead
                    )
                    save(writer, 9)
                except Died:
                    pass
                for last in second.crash_states(limit=6, seed=again):
                    assert check(LocalStore("/runs/job", last)) in (before, [*before, 9])


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("after", [False, True])
def test_a_failing_disk_leaves_nothing_half(code: int, after: bool) -> None:
    """Any call fails with `code`, once; the process goes on as far as it can."""
    # Each call fails in both ways, with one of the codes each.
    first = 1 if EXHAUSTIVE or after == (code == errno.EIO) else 2
    for number in range(first, whole_run() + 1, 1 if EXHAUSTIVE else 2):
        failing = {number: code}
        fs = CrashFileSystem(fail_after=failing) if after else CrashFileSystem(fail_at=failing)
        job = Job()
        try:
            job.run(fs)
        except HoldfastError:
            pass
        fs.restart()
        assert check(LocalStore("/runs/job", fs)) in job.allowed, f"call {number}"
        for disk in fs.crash_states(limit=4, seed=number):
            assert check(LocalStore("/runs/job", disk)) in job.allowed, f"call {number}"
