"""What the machine itself can do: the ceilings that contenders are measured against.

Each function does one thing to `nbytes` bytes; the caller takes the time. Nothing is
digested, cut or named here, so no checkpoint can be faster by much.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from functools import cache
from pathlib import Path

import numpy as np

from holdfast.manager.staging import new_block

BLOCK = 8 << 20  # where throughput stops growing on the disks that were tried
_THREADS = 4


class MemoryCopy:
    """Copies `nbytes` into memory that was used before."""

    def __init__(self, nbytes: int) -> None:
        self._source, self._target = np.ones(nbytes, np.uint8), np.zeros(nbytes, np.uint8)

    def __call__(self) -> None:
        np.copyto(self._target, self._source)


def write_buffered(path: Path, nbytes: int) -> None:
    """Write through the page cache, one thread, then fsync."""
    block = _noise()
    with open(path, "wb", buffering=0) as out:
        for start in range(0, nbytes, BLOCK):
            out.write(block[: min(BLOCK, nbytes - start)])
        os.fsync(out.fileno())


def write_direct(path: Path, nbytes: int) -> None:
    """Write past the page cache: parallel, aligned, preallocated; then fsync.

    Raises OSError where the file system refuses O_DIRECT. Writes whole blocks.
    """
    fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_DIRECT, 0o644)
    try:
        total = -(-nbytes // BLOCK) * BLOCK
        os.posix_fallocate(fd, 0, total)

        def write(block: memoryview, start: int) -> None:
            done = os.pwrite(fd, block, start)
            if done != BLOCK:
                raise OSError(f"wrote {done} of {BLOCK} bytes")

        _in_parallel(total, write)
        os.fsync(fd)
    finally:
        os.close(fd)


def read_buffered(path: Path) -> None:
    """Read a file through the page cache into memory that is reused, one thread."""
    block = bytearray(BLOCK)
    with open(path, "rb", buffering=0) as file:
        while file.readinto(block):
            pass


def read_direct(path: Path) -> None:
    """Read a file of whole blocks past the page cache, in parallel."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECT)
    try:

        def read(block: memoryview, start: int) -> None:
            done = os.preadv(fd, [block], start)
            if done != BLOCK:
                raise OSError(f"read {done} of {BLOCK} bytes")

        _in_parallel(os.fstat(fd).st_size, read)
    finally:
        os.close(fd)


def direct_io_works(folder: Path) -> bool:
    """Whether the file system takes O_DIRECT (tmpfs and some network ones do not)."""
    probe = folder / "direct-io-probe"
    try:
        write_direct(probe, BLOCK)
    except OSError:
        return False
    finally:
        probe.unlink(missing_ok=True)
    return True


def memory_available() -> int:
    """Bytes that can be allocated without swapping (MemAvailable)."""
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith("MemAvailable:"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/meminfo has no MemAvailable")


def describe(folder: Path) -> str:
    """The machine in a few words: processor count, memory, file system."""
    with open("/proc/meminfo") as file:
        total = int(file.readline().split()[1]) / 2**20
    return f"{os.cpu_count()} CPUs, {total:.0f} GiB of memory, {_file_system(folder)}"


def _file_system(folder: Path) -> str:
    best = ("", "an unknown file system")
    for line in Path("/proc/mounts").read_text().splitlines():
        _, point, kind, *_ = line.split()
        if folder.resolve().is_relative_to(point) and len(point) >= len(best[0]):
            best = (point, kind)
    return best[1]


def _in_parallel(total: int, move: Callable[[memoryview, int], None]) -> None:
    """Call `move(block, start)` for each block of a file, each thread with a block of its own."""

    noise = _noise()

    def work(first: int) -> None:
        block = new_block(BLOCK)
        block[:] = noise
        for start in range(first * BLOCK, total, _THREADS * BLOCK):
            move(block, start)

    with ThreadPoolExecutor(_THREADS) as pool:
        list(pool.map(work, range(_THREADS)))


@cache
def _noise() -> memoryview:
    """A block of bytes that no disk can shorten."""
    return memoryview(np.random.default_rng(0).bytes(BLOCK))
