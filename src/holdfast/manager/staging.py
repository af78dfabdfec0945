"""Blocks of memory between the state and the disk, and the threads that write them.

A fixed number of aligned blocks is reused by all saves: fresh memory costs ten times a copy
into old, and direct I/O needs its alignment. Whoever wants a block waits for the disk, so
the blocks bound what a save takes beside the state itself.
"""

from __future__ import annotations

import mmap
import os
import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from queue import SimpleQueue

from holdfast.core.types import MiB
from holdfast.errors import UsageError

# 8 MiB reach a disk's full speed with two writes in flight (docs/design/saving.md).
BLOCK_BYTES = 8 * MiB
# One block is filled, one keeps the pack's header until the end, one is written by each
# thread: below that nothing overlaps.
MIN_BLOCKS = 5
WRITERS = 2
# A chunk that is compressed or moved is in two, besides those of packs.
_SPARE_BLOCKS = 3

# A thread that nobody waits for yields to the training loop's threads (Linux: per thread).
_NICE = 19


def yield_to_others() -> None:
    """Give the calling thread the lowest priority. It cannot be raised again."""
    if sys.platform == "linux":
        with suppress(OSError):  # a sandbox that forbids it: better a save than none
            os.setpriority(os.PRIO_PROCESS, threading.get_native_id(), _NICE)


class Staging:
    """At most `nbytes` of memory in blocks, made when first needed. From any thread."""

    def __init__(self, nbytes: int) -> None:
        self.block_bytes = BLOCK_BYTES
        self._limit = nbytes // self.block_bytes
        if self._limit < MIN_BLOCKS:
            raise UsageError(
                f"memory of {nbytes:,} bytes is too little to save with",
                hint=f"Give at least {MIN_BLOCKS * self.block_bytes // MiB} MiB, or leave it out.",
            )
        self._free: list[memoryview] = []
        self._made = 0
        self._changed = threading.Condition()

    @property
    def whole_bytes(self) -> int:
        """How large a pack may be that is collected in blocks before it is written: one on
        its way can be beside one that is filled, and chunks can be compressed."""
        return max(1, (self._limit - _SPARE_BLOCKS) // 2) * self.block_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of the blocks that were made so far."""
        return self._made * self.block_bytes

    def take(self) -> memoryview:
        """A block, aligned to pages. Waits until there is one."""
        with self._changed:
            while not self._free:
                if self._made < self._limit:
                    self._made += 1
                    return new_block(self.block_bytes)
                self._changed.wait()
            return self._free.pop()

    def give_back(self, block: memoryview) -> None:
        """Let others use a block."""
        with self._changed:
            self._free.append(block)
            self._changed.notify()


def new_block(nbytes: int) -> memoryview:
    """Fresh memory that starts at a page, in large pages where the system has them: direct
    I/O goes to few places then, which costs a tenth of the processor time."""
    if not nbytes:
        return memoryview(b"")
    if sys.platform == "win32":
        return memoryview(mmap.mmap(-1, nbytes))
    # Private: large pages do nothing for the shared mapping that is Python's default.
    block = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    if sys.platform == "linux":
        with suppress(OSError):  # a kernel without them
            block.madvise(mmap.MADV_HUGEPAGE)
    return memoryview(block)


class WriteThreads:
    """Threads that carry out writes for one save. Used by one thread at a time."""

    def __init__(self, *, low: Callable[[], bool], count: int = WRITERS) -> None:
        """`low`, asked in front of each write: whether its thread is to have low priority
        from now on."""
        self._low = low
        self._count = count
        self._queue: SimpleQueue[Callable[[], None] | None] = SimpleQueue()
        self._threads: list[threading.Thread] = []
        self._lock = threading.Lock()
        self._done = threading.Condition(self._lock)
        self._open = 0
        self._error: BaseException | None = None
        self.busy_s = 0.0
        """Seconds for which writes were in progress, of all threads together."""

    def run(self, write: Callable[[], None]) -> None:
        """Have `write` called soon. Raises what an earlier one raised."""
        self.check()
        if not self._start():
            write()
            return
        with self._lock:
            self._open += 1
        self._queue.put(write)

    def check(self) -> None:
        """Raise what a write has raised."""
        if self._error is not None:
            raise self._error

    @contextmanager
    def timed(self) -> Generator[None, None, None]:
        """What is done inside counts as writing."""
        start = time.perf_counter()
        try:
            yield
        finally:
            with self._lock:
                self.busy_s += time.perf_counter() - start

    def wait(self) -> None:
        """Until every write was made, or has failed."""
        with self._done:
            self._done.wait_for(lambda: self._open == 0)

    def stop(self) -> None:
        """End the threads, once they have done what they were given."""
        for _ in self._threads:
            self._queue.put(None)
        for thread in self._threads:
            thread.join()
        self._threads = []

    def _start(self) -> bool:
        """Whether there are threads; none can be started when the interpreter ends."""
        while len(self._threads) < self._count:
            # Daemons, for a crashed main thread must not hang on a dead disk.
            thread = threading.Thread(target=self._work, name="holdfast-write", daemon=True)
            try:
                thread.start()
            except RuntimeError:
                break
            self._threads.append(thread)
        return bool(self._threads)

    def _work(self) -> None:
        lowered = False
        while (write := self._queue.get()) is not None:
            if not lowered and self._low():
                yield_to_others()
                lowered = True
            try:
                with self.timed():
                    write()
            except BaseException as error:  # noqa: BLE001 - raised again by `check`
                self._error = self._error or error
            finally:
                with self._done:
                    self._open -= 1
                    self._done.notify_all()
