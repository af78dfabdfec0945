"""Copying packs from store to store: block by block, in parallel, every digest compared.

Threads take the blocks of all packs in their order. Reading and writing overlap; between
the two each block waits for its turn, since digests are computed in order. A pack is
published when all of its blocks are there and all of its digests were right: what is in
the target is a whole pack with the right bytes, wherever a copy was stopped.
"""

from __future__ import annotations

import mmap
import threading
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from holdfast.core.threads import share_out
from holdfast.core.types import MiB
from holdfast.errors import DamagedObject, StoreUnavailable
from holdfast.repo import keys
from holdfast.repo.pace import Pace
from holdfast.repo.ranges import Check
from holdfast.stores.base import NewObject, Store

BLOCK_BYTES = 8 * MiB
THREADS = 4

Read = Callable[[int, memoryview], None]
"""Fills memory with the bytes of a pack from an offset on. Raises DamagedObject, …"""


@dataclass(frozen=True)
class PackJob:
    """A pack to copy."""

    name: str
    nbytes: int
    read: Read
    checks: Sequence[Check]
    replaces: bool = False
    """What is at its key is damaged, and is deleted when the new one is ready."""

    @property
    def key(self) -> str:
        return keys.pack_key(self.name)


def copy_packs(
    jobs: Sequence[PackJob],
    target: Store | None,
    *,
    pace: Pace,
    on_bytes: Callable[[int], None] = lambda nbytes: None,
    on_pack: Callable[[PackJob], None] = lambda job: None,
    threads: int = THREADS,
) -> None:
    """Bring every pack into `target`, whole, verified and durable; without one, only verify.

    Uses a block of memory per thread, however large the packs are. `on_pack` is told of each
    that is there, `on_bytes` of each block that was moved, or of all of a pack where the target
    takes it in one request; both from any thread. The first error stops it: DamagedObject,
    CopyStopped, and what the stores raise. Packs that were published by then stay.
    """
    if not jobs:
        return
    turn = threading.Condition()
    packs = [_Copy(job, target, turn) for job in jobs]
    blocks = [(pack, number) for pack in packs for number in range(pack.blocks)]
    by_block = target is None or not target.whole_bytes
    largest = min(BLOCK_BYTES, max(job.nbytes for job in jobs))

    def work(mine: Iterator[tuple[_Copy, int]]) -> None:
        # Page-aligned, as direct I/O wants it.
        memory = memoryview(mmap.mmap(-1, max(largest, 1)))
        try:
            for pack, number in mine:
                nbytes = pack.nbytes_of(number)
                pace.take(nbytes)
                if not pack.copy(number, memory[:nbytes]):
                    return  # another thread has failed, and its error will be raised
                complete = pack.is_complete()
                if complete:
                    pack.publish()
                    pack.discard()  # now: what it takes must not add up over all packs
                    on_pack(pack.job)
                if by_block:
                    on_bytes(nbytes)
                elif complete:  # only now it is sent
                    on_bytes(pack.job.nbytes)
        except BaseException:
            with turn:  # whoever waits for this block would wait for ever
                for pack in packs:
                    pack.failed = True
                turn.notify_all()
            raise

    try:
        share_out(blocks, work, threads=threads, name="holdfast-copy")
    finally:
        for pack in packs:
            pack.discard()


class _Copy:
    """One pack on its way."""

    def __init__(self, job: PackJob, target: Store | None, turn: threading.Condition) -> None:
        self.job = job
        self.blocks = max(1, -(-job.nbytes // BLOCK_BYTES))
        self.failed = False
        self._target = target
        self._turn = turn
        self._next = 0
        """The block whose turn it is to be digested."""
        self._left = self.blocks
        """Blocks that are not written yet."""
        self._new: NewObject | None = None
        self._whole: memoryview | None = None
        """All of a pack that has only one block."""
        self._creating = threading.Lock()

    def nbytes_of(self, number: int) -> int:
        return min(BLOCK_BYTES, self.job.nbytes - number * BLOCK_BYTES)

    def copy(self, number: int, memory: memoryview) -> bool:
        """Read, digest and write a block; False if a copy has failed elsewhere."""
        offset = number * BLOCK_BYTES
        self.job.read(offset, memory)
        with self._turn:
            self._turn.wait_for(lambda: self.failed or self._next == number)
            if self.failed:
                return False
        for check in self.job.checks:
            check.feed(offset, memory)
            if number == self.blocks - 1:
                check.end()
        with self._turn:
            self._next = number + 1
            self._turn.notify_all()
        if self._target is not None:
            if self.blocks == 1:
                self._whole = memory  # this very thread publishes it
            else:
                self._create(self._target).write(offset, memory)
        with self._turn:
            self._left -= 1
        return True

    def is_complete(self) -> bool:
        """Whether every block is written. Says so once: to the thread that is to publish it."""
        with self._turn:
            if self._left:
                return False
            self._left = -1
            return True

    def publish(self) -> None:
        target, job = self._target, self.job
        if target is None:
            return
        if job.replaces:
            # Not before now: for as short as can be, there is neither the damaged one, of
            # which others may use what is right, nor the new one.
            target.delete([job.key])
        if self._whole is not None:
            created = target.put_new(job.key, [self._whole])
        else:
            created = self._create(target).publish(job.nbytes)
        if not created:
            # Its name is unique and stands for these bytes: a try whose reply was lost, or
            # another copy's.
            target.settle(job.key)
            size = target.size(job.key)
            if size != job.nbytes:
                raise StoreUnavailable(
                    f"{job.key} in {target.address} is there with {size:,} bytes instead of "
                    f"{job.nbytes:,}",
                    hint="Another process may be writing there. Try again.",
                )

    def discard(self) -> None:
        if self._new is not None:
            self._new.discard()

    def _create(self, target: Store) -> NewObject:
        with self._creating:
            if self._new is None:
                self._new = target.create(self.job.key, at_most_bytes=self.job.nbytes)
            return self._new


def size_problem(name: str, size: int, nbytes: int) -> DamagedObject | None:
    """What is wrong with a pack of this size."""
    if size == nbytes:
        return None
    return DamagedObject(keys.pack_key(name), f"it has {size:,} bytes, not {nbytes:,}")
