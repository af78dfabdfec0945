"""How files of a local store are filled: all at once, or block by block past the cache.

Direct I/O (O_DIRECT) writes from the caller's memory to the disk. It takes no memory and
next to no processor time, and a sync after it has nothing left to write. Where a file system
refuses it, at once or at the first write, the rest goes through the page cache.
"""

from __future__ import annotations

import errno
import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack
from typing import NamedTuple

from holdfast.core.types import Buffer, MiB
from holdfast.stores.base import BLOCK_ALIGNMENT
from holdfast.stores.filesystem import (
    MAX_WRITE_BUFFERS,
    MAX_WRITE_BYTES,
    UNSUPPORTED,
    FileSystem,
)

PREALLOCATE_BYTES = 1 * MiB  # below, one more call costs more than it saves
# A file of unknown size grows in such steps: few calls and long extents, and no more than
# this is taken from others for a moment.
GROW_BYTES = 256 * MiB

FULL = frozenset({errno.ENOSPC, errno.EDQUOT, errno.EFBIG})


class Temporary(NamedTuple):
    """A file without its final name."""

    fd: int
    name: str
    folder: int
    """Descriptor of the folder that holds it."""


def fill(fs: FileSystem, fd: int, parts: Sequence[Buffer]) -> None:
    """Write the concatenation of `parts` to an empty file."""
    views = [memoryview(part).cast("B") for part in parts if memoryview(part).nbytes]
    total = sum(view.nbytes for view in views)
    if total >= PREALLOCATE_BYTES:
        try:
            fs.allocate(fd, total)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
    write_all(fs, fd, views, 0)


def write_all(fs: FileSystem, fd: int, views: Sequence[memoryview], offset: int) -> None:
    """Write all bytes of `views`, one after the other, from `offset` on."""
    for batch in _batches(views):
        while batch:
            written = fs.write(fd, batch, offset)
            if written <= 0:
                raise OSError(errno.EIO, "a write of some bytes wrote none")
            offset += written
            batch = _after(batch, written)


class Blocks:
    """A new file that is written in blocks; implements base.NewObject.

    `place` gives the filled file its name, durably; `translated` makes our errors of the
    system's.
    """

    def __init__(
        self,
        fs: FileSystem,
        temporary: AbstractContextManager[Temporary],
        place: Callable[[Temporary], bool],
        translated: Callable[[], AbstractContextManager[None]],
        at_most_bytes: int,
    ) -> None:
        self._fs = fs
        self._place = place
        self._translated = translated
        self._at_most = at_most_bytes
        self._stack = ExitStack()
        self._lock = threading.Lock()
        self._allocated = 0
        self._rest: list[tuple[int, bytes]] = []
        """(offset, bytes) too short for a direct write; written at the end."""
        try:
            with translated():
                self._file = self._stack.enter_context(temporary)
                self._direct = self._try_direct()
        except BaseException:
            self.discard()
            raise

    def _try_direct(self) -> bool:
        try:
            self._fs.direct(self._file.fd, True)
        except OSError as error:
            if error.errno not in UNSUPPORTED:
                raise
            return False
        return True

    def write(self, offset: int, data: memoryview) -> None:
        with self._translated():
            self._allocate(offset + data.nbytes)
            whole = data.nbytes
            if self._direct:
                whole -= data.nbytes % BLOCK_ALIGNMENT
                if whole < data.nbytes:
                    self._rest.append((offset + whole, bytes(data[whole:])))
            self._write(offset, data[:whole])

    def _write(self, offset: int, data: memoryview) -> None:
        try:
            write_all(self._fs, self._file.fd, [data], offset)
        except OSError as error:
            # The file system takes no direct writes, or wants a larger alignment. Another
            # thread may have found that out meanwhile: once more in any case.
            if error.errno != errno.EINVAL:
                raise
            self._buffered()
            write_all(self._fs, self._file.fd, [data], offset)

    def _buffered(self) -> None:
        with self._lock:
            if self._direct:
                self._fs.direct(self._file.fd, False)
                self._direct = False

    def _allocate(self, nbytes: int) -> None:
        """Have room for so many bytes. Only a matter of speed: what fails here fails again
        when the bytes are written, if they are."""
        with self._lock:
            if nbytes <= self._allocated:
                return
            self._allocated = max(nbytes, min(self._allocated + GROW_BYTES, self._at_most))
            try:
                self._fs.allocate(self._file.fd, self._allocated)
            except OSError as error:
                if error.errno not in UNSUPPORTED | FULL:
                    raise

    def publish(self, nbytes: int) -> bool:
        with self._translated():
            if self._rest:
                self._buffered()
            for offset, data in self._rest:
                write_all(self._fs, self._file.fd, [memoryview(data)], offset)
            if self._allocated != nbytes:
                self._fs.truncate(self._file.fd, nbytes)
            return self._place(self._file)

    def discard(self) -> None:
        self._stack.close()


# -- buffers -------------------------------------------------------------------------


def _batches(views: Sequence[memoryview]) -> Iterator[list[memoryview]]:
    """Groups of views for one call each: long ones are cut, short ones go together."""
    batch: list[memoryview] = []
    nbytes = 0
    for view in views:
        at = 0
        while at < view.nbytes:
            piece = view[at : at + MAX_WRITE_BYTES - nbytes]
            batch.append(piece)
            nbytes += piece.nbytes
            at += piece.nbytes
            if nbytes == MAX_WRITE_BYTES or len(batch) == MAX_WRITE_BUFFERS:
                yield batch
                batch, nbytes = [], 0
    if batch:
        yield batch


def _after(batch: list[memoryview], nbytes: int) -> list[memoryview]:
    """What is left of `batch` when its first `nbytes` are written."""
    for index, view in enumerate(batch):
        if nbytes < view.nbytes:
            return [view[nbytes:], *batch[index + 1 :]]
        nbytes -= view.nbytes
    return []
