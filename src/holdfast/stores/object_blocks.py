"""Objects of a bucket that come in blocks, and are put whole once all blocks are there.

Small ones wait in memory, large ones in a temporary file: packs that a local run wrote have up
to a GiB, and several are on their way at once.
"""

from __future__ import annotations

import errno
import mmap
import os
import tempfile
from collections.abc import Callable, Sequence
from contextlib import ExitStack

from holdfast.core.copying import copy_bytes
from holdfast.core.types import Buffer, MiB
from holdfast.core.units import format_size
from holdfast.errors import StoreError, StoreFull, StoreUnavailable
from holdfast.stores.base import NewObject
from holdfast.stores.filesystem import UNSUPPORTED, OsFileSystem
from holdfast.stores.filling import FULL, write_all

# A mirrored run's packs are smaller. Four threads copy: what lies in memory is bounded.
IN_MEMORY_BYTES = 80 * MiB

Put = Callable[[Sequence[Buffer]], bool]
"""Stores the concatenation of its argument as the object, as `Store.put_new` does."""


def blocks(put: Put, address: str, at_most_bytes: int) -> NewObject:
    """An object of the store at `address` that is given to `put` when it is published.

    Raises StoreFull where its temporary file has no room: now, and not in the middle of it.
    """
    if at_most_bytes <= IN_MEMORY_BYTES:
        return _InMemory(put, at_most_bytes)
    return _InFile(put, address, at_most_bytes)


class _InMemory:
    """Implements base.NewObject."""

    def __init__(self, put: Put, at_most_bytes: int) -> None:
        self._put = put
        self._memory: mmap.mmap | None = mmap.mmap(-1, max(1, at_most_bytes))

    def write(self, offset: int, data: memoryview) -> None:
        assert self._memory is not None
        with memoryview(self._memory) as memory:
            copy_bytes(memory[offset : offset + data.nbytes], data.cast("B"))

    def publish(self, nbytes: int) -> bool:
        assert self._memory is not None
        with memoryview(self._memory) as memory, memory[:nbytes] as view:
            return self._put([view])

    def discard(self) -> None:
        self._memory = None


class _InFile:
    """Implements base.NewObject. The file has no name: it is gone with the process."""

    def __init__(self, put: Put, address: str, at_most_bytes: int) -> None:
        self._put = put
        self._address = address
        self._nbytes = at_most_bytes
        self._fs = OsFileSystem()
        self._stack = ExitStack()
        try:
            new = tempfile.TemporaryFile(prefix="holdfast-")  # noqa: SIM115 - the stack closes it
            file = self._stack.enter_context(new)
            self._fd = file.fileno()
            self._reserve()
        except OSError as error:
            self.discard()
            raise self._failure(error) from error

    def _reserve(self) -> None:
        try:
            self._fs.allocate(self._fd, self._nbytes)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise

    def write(self, offset: int, data: memoryview) -> None:
        # Not through a mapping: a full file system would kill the process (SIGBUS).
        try:
            write_all(self._fs, self._fd, [data.cast("B")], offset)
        except OSError as error:
            raise self._failure(error) from error

    def publish(self, nbytes: int) -> bool:
        with (
            mmap.mmap(self._fd, nbytes, access=mmap.ACCESS_READ) as file,
            memoryview(file) as view,
        ):
            return self._put([view])

    def discard(self) -> None:
        self._stack.close()

    def _failure(self, error: OSError) -> StoreError:
        size = format_size(self._nbytes)
        try:
            folder = tempfile.gettempdir()
        except OSError:  # none of the usual ones can be written
            folder = os.environ.get("TMPDIR", "")
        message = (
            f"{self._address}: an object of {size} is put together in a temporary file first, "
            f"and that cannot be written in {folder or 'any folder'}: {error.strerror or error}"
        )
        hint = f"Set TMPDIR to a folder with room for several files of {size}."
        if error.errno in FULL or error.errno == errno.ENOMEM:
            return StoreFull(message, hint=hint)
        return StoreUnavailable(message, hint=hint)
