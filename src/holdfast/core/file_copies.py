"""The bytes of tracked files: copied while a save is captured, or read where they are.

Nothing can tell afterwards whether a file still is what it was: writes through a memory
map move no time stamp, and an append moves the same one as a write in the middle. So
files are treated as tensors are: the bytes of the moment of `save` are copied before
it returns. Small ones go into memory, the rest into a temporary file that has no name;
file systems that can share blocks between files (Btrfs, XFS, NFS 4.2) copy nothing.

A save whose caller waits for it needs no copy: nobody is to change the files meanwhile. Large
ones are read in place then, and one that does change is seen by its time stamps.
"""

from __future__ import annotations

import os
import sys
import tempfile
from collections.abc import Callable
from functools import partial

from holdfast.core.adapters import LeafSource
from holdfast.core.arrays import BytesSource
from holdfast.core.types import KiB, MiB
from holdfast.errors import SaveFailed

IN_PLACE_BYTES = MiB  # smaller files are copied in less time than the care for them takes
IN_PLACE_FILES = 64  # each is open until it was read: a process may have 256 files on macOS
MEMORY_BYTES = 32 * MiB  # of files that one save holds in memory; more goes to a disk
_ALIGN = 64 * KiB  # the largest block of a file system that shares blocks
_BLOCK_BYTES = MiB
_KERNEL_COPY_BYTES = 256 * MiB  # Ctrl-C comes between two calls
_ATTEMPTS = 3
_PREFIX = ".holdfast-"  # seen only where a file system makes no file without a name

Read = Callable[[int, memoryview], object]
"""Fill a buffer from an offset on."""


class FileCopies:
    """The copies that one save holds. `in_place` says of a leaf's path whether nobody changes
    that file before the save has ended; None: of no file."""

    def __init__(self, in_place: Callable[[str], bool] | None = None) -> None:
        self._in_place = in_place
        self._places_left = IN_PLACE_FILES
        self._memory_left = MEMORY_BYTES
        self._spills: dict[int, _Spill] = {}

    def take(self, fd: int, name: str, path: str = "") -> LeafSource:
        """The open file `name`, the leaf `path`, as it is now: a copy, unless it is left where
        it is.

        The caller's own threads must leave alone what is in the file already, as they
        must a tensor. A file that is appended to meanwhile is copied up to the length
        that it had. If other changes are seen, or the copy fails, so does the save, when
        it comes to read this file: earlier checkpoints are whole and training goes on.
        """
        nbytes = os.fstat(fd).st_size
        stays = nbytes >= IN_PLACE_BYTES and self._in_place is not None and self._in_place(path)
        if stays and self._places_left:
            self._places_left -= 1
            return _FileInPlace(os.dup(fd), nbytes)
        try:
            for _ in range(_ATTEMPTS):
                before = os.fstat(fd)
                nbytes = before.st_size
                copy = self._copy(fd, nbytes, name)
                if copy is None:
                    continue  # it was cut
                if _stamp(os.fstat(fd)) == _stamp(before):
                    return copy
                # An append looks like any other change. What reads the same twice was
                # there, all of it at once, in between.
                if _same(partial(read_at, fd), copy.copy_range, nbytes):
                    return copy
                copy.close()
            error = SaveFailed(
                f"file {name!r} changed while it was copied",
                hint="Write it under another name and rename it, or save when nobody writes it.",
            )
        except OSError as cause:
            error = SaveFailed(
                f"file {name!r} could not be copied: {cause.strerror or cause}",
                hint="A save needs space for a copy of it, in its folder or in the system's "
                "folder for temporary files.",
            )
            error.__cause__ = cause
        return _FailedSource(error, nbytes)

    def _copy(self, fd: int, nbytes: int, name: str) -> LeafSource | None:
        """A copy of the first `nbytes`; None if there are not so many."""
        if nbytes > self._memory_left:
            return self._spill(os.fstat(fd).st_dev, name).copy(fd, nbytes)
        data = bytearray(nbytes)
        if read_at(fd, 0, memoryview(data)) < nbytes:
            return None
        self._memory_left -= nbytes
        return BytesSource(data)

    def _spill(self, device: int, name: str) -> _Spill:
        spill = self._spills.get(device)
        if spill is None or spill.closed:
            spill = self._spills[device] = _Spill(os.path.dirname(os.path.realpath(name)))
        return spill


class _Spill:
    """A temporary file without a name, which holds copies one behind the other."""

    def __init__(self, folder: str) -> None:
        try:  # beside the file: only there can blocks be shared
            self._file = tempfile.TemporaryFile(dir=folder, prefix=_PREFIX, buffering=0)  # noqa: SIM115 - released by its last user
        except OSError:
            self._file = tempfile.TemporaryFile(prefix=_PREFIX, buffering=0)  # noqa: SIM115
        self._end = 0
        self._users = 0

    @property
    def closed(self) -> bool:
        return self._file.closed

    def copy(self, fd: int, nbytes: int) -> LeafSource | None:
        """As `FileCopies._copy`."""
        start = self._end
        self._users += 1
        copied = False
        try:
            copied = _copy_into(fd, self._file.fileno(), start, nbytes)
        finally:
            if not copied:
                self.release()
        if not copied:
            return None
        self._end = -(-(start + nbytes) // _ALIGN) * _ALIGN
        return _SpilledSource(self, start, nbytes)

    def read(self, offset: int, into: memoryview) -> None:
        read_at(self._file.fileno(), offset, into)

    def release(self) -> None:
        self._users -= 1
        if not self._users:
            # A forked child may hold the descriptor for long: let the space go at once.
            self._file.truncate(0)
            self._file.close()


class _SpilledSource:
    """A file's bytes in a temporary file; see `adapters.LeafSource`."""

    dtype = "U8"
    streamed = True

    def __init__(self, spill: _Spill, start: int, nbytes: int) -> None:
        self._spill: _Spill | None = spill
        self._start = start
        self.nbytes = nbytes
        self.shape: tuple[int, ...] = (nbytes,)

    def copy_range(self, offset: int, into: memoryview) -> None:
        assert self._spill is not None
        self._spill.read(self._start + offset, into)

    def mark(self) -> object:
        return None

    def close(self) -> None:
        if self._spill is not None:
            self._spill.release()
            self._spill = None


class _FileInPlace:
    """A file that is read where it is; see `adapters.LeafSource`. One that is appended to is read
    up to the length that it had."""

    dtype = "U8"
    streamed = False

    def __init__(self, fd: int, nbytes: int) -> None:
        self._file = open(fd, "rb", buffering=0)  # noqa: SIM115 - closed by its last user
        self.nbytes = nbytes
        self.shape: tuple[int, ...] = (nbytes,)

    def copy_range(self, offset: int, into: memoryview) -> None:
        read_at(self._file.fileno(), offset, into)  # one that was cut has another mark

    def mark(self) -> object:
        return _stamp(os.fstat(self._file.fileno()))

    def close(self) -> None:
        self._file.close()


class _FailedSource:
    """A file that could not be copied: the save that reads it fails."""

    dtype = "U8"
    streamed = True

    def __init__(self, error: SaveFailed, nbytes: int) -> None:
        self._error = error
        self.nbytes = max(1, nbytes)  # nothing would be read of an empty leaf
        self.shape: tuple[int, ...] = (self.nbytes,)

    def copy_range(self, offset: int, into: memoryview) -> None:
        raise self._error

    def mark(self) -> object:
        return None

    def close(self) -> None: ...


def _stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns


def read_at(fd: int, offset: int, into: memoryview) -> int:
    """Fill `into` from a place in a file; bytes read, fewer only where the file ends."""
    done = 0
    while done < len(into):
        count = os.preadv(fd, [into[done:]], offset + done)
        if count == 0:
            break
        done += count
    return done


def same_start(first: int, second: int, nbytes: int) -> bool:
    """Whether two open files of at least `nbytes` bytes start with the same ones."""
    return _same(partial(read_at, first), partial(read_at, second), nbytes)


def _same(first: Read, second: Read, nbytes: int) -> bool:
    block = min(nbytes, _BLOCK_BYTES)
    ours, theirs = memoryview(bytearray(block)), memoryview(bytearray(block))
    for offset in range(0, nbytes, _BLOCK_BYTES):
        count = min(_BLOCK_BYTES, nbytes - offset)
        first(offset, ours[:count])
        second(offset, theirs[:count])
        if ours[:count] != theirs[:count]:
            return False
    return True


def _copy_into(fd: int, target: int, at: int, nbytes: int) -> bool:
    """Copy the first `nbytes` of a file to a place in another; False if there are fewer."""
    done = _copied_by_kernel(fd, target, at, nbytes)
    buffer = memoryview(bytearray(min(_BLOCK_BYTES, nbytes - done)))
    while done < nbytes:
        part = buffer[: nbytes - done]
        count = read_at(fd, done, part)
        written = 0
        while written < count:
            written += os.pwrite(target, part[written:count], at + done + written)
        done += count
        if count < len(part):
            return False
    return True


def _copied_by_kernel(fd: int, target: int, at: int, nbytes: int) -> int:
    """How many bytes the kernel copied; the rest, or why it did not, is the caller's to see."""
    done = 0
    if sys.platform != "linux":
        return done
    while done < nbytes:
        length = min(nbytes - done, _KERNEL_COPY_BYTES)
        try:
            count = os.copy_file_range(fd, target, length, done, at + done)
        except OSError:
            break  # not between these two; a full disk says so again when written to
        if count == 0:
            break
        done += count
    return done
