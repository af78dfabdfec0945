"""The operating-system calls that the local store makes, and no others.

`LocalStore` reaches the disk only through a `FileSystem`, so that the tests can put
a simulated disk in its place, cut its power after any call and look at what is left.
"""

from __future__ import annotations

import errno
import fcntl
import mmap
import os
import sys
from collections.abc import Sequence
from contextlib import suppress
from typing import Any, NamedTuple, Protocol

from holdfast.core.types import MiB
from holdfast.stores.base import BLOCK_ALIGNMENT

MAX_WRITE_BYTES = 64 * MiB  # one call; Linux moves at most 2 GiB - 4 KiB
MAX_WRITE_BUFFERS = 512  # IOV_MAX is 1024 on Linux and macOS; POSIX promises 16

DIRECT_BYTES = 1 * MiB
"""Shorter reads go through the page cache: there it reads ahead of them."""
UNSUPPORTED = frozenset({errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL})
"""What a file system says about a call that it does not have."""

_RENAME_NOREPLACE = 1  # <linux/fs.h>
_RENAME_EXCL = 4  # <sys/stdio.h> of macOS


class FileStatus(NamedTuple):
    """What the store needs from `struct stat`."""

    device: int
    inode: int
    mode: int
    size_bytes: int
    modified_s: float


class FileSystem(Protocol):
    """Calls on files and folders; errors are `OSError` as the kernel gives them.

    `folder` is the descriptor of an open folder; the name beside it is one segment,
    and a symbolic link there is never followed. `folder=None`: the name is an
    absolute path, in which links are followed. May be called from any thread.
    """

    def open_folder(self, name: str, folder: int | None = None) -> int:
        """A descriptor for `scan`, `sync` and as `folder`. `".."` is the parent."""
        ...

    def open_file(self, name: str, folder: int) -> int:
        """Open for reading. Does not wait on pipes: check that it is a regular file."""
        ...

    def create(self, name: str, folder: int) -> int:
        """Make an empty file, open for writing. FileExistsError if the name is taken."""
        ...

    def open_to_write(self, name: str, folder: int) -> int:
        """Open a file for writing, made if it is absent. As `open_file`, it may be a pipe."""
        ...

    def close(self, fd: int) -> None:
        """Never fails: what matters was synced before, so there is nothing to learn."""
        ...

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        """Write the buffers one after the other; how many bytes were taken, maybe fewer."""
        ...

    def read(self, fd: int, nbytes: int, offset: int) -> bytes:
        """At most `nbytes` bytes; fewer only at the end of the file or by chance."""
        ...

    def read_into(self, fd: int, into: memoryview, offset: int, *, cached: bool = False) -> int:
        """As `read`, into memory that is there already; how many bytes were read. `cached`: they
        stay in the page cache, for others."""
        ...

    def allocate(self, fd: int, nbytes: int) -> None:
        """Reserve space and set the size. Fails where the file system cannot."""
        ...

    def truncate(self, fd: int, nbytes: int) -> None:
        """Set the size; what was allocated or written behind it is given up."""
        ...

    def direct(self, fd: int, on: bool) -> None:
        """Write past the page cache from now on, or no longer. Address, offset and length
        of such a write are multiples of 4096, else it may fail with EINVAL. Fails where
        the system or the file system cannot."""
        ...

    def sync(self, fd: int) -> None:
        """Make a file's content, or a folder's names, survive a loss of power."""
        ...

    def status(self, fd: int) -> FileStatus: ...

    def status_of(self, name: str, folder: int | None = None) -> FileStatus:
        """Of the name itself, be it a symbolic link."""
        ...

    def scan(self, folder: int) -> list[str]:
        """All names in a folder, in no order."""
        ...

    def make_folder(self, name: str, folder: int | None = None) -> None: ...

    def link(self, name: str, folder: int, new_name: str, new_folder: int) -> None:
        """A second name for a file. FileExistsError if it is taken."""
        ...

    def rename_new(self, name: str, folder: int, new_name: str, new_folder: int) -> None:
        """Rename, but FileExistsError if the new name is taken. Not on every system."""
        ...

    def unlink(self, name: str, folder: int) -> None: ...


class OsFileSystem:
    """The real one. Long calls release the GIL; descriptors do not pass to children."""

    def open_folder(self, name: str, folder: int | None = None) -> int:
        flags = os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC
        if folder is not None:
            flags |= os.O_NOFOLLOW
        return os.open(name, flags, dir_fd=folder)

    def open_file(self, name: str, folder: int) -> int:
        flags = os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        return os.open(name, flags, dir_fd=folder)

    def create(self, name: str, folder: int) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC
        return os.open(name, flags, 0o666, dir_fd=folder)

    def open_to_write(self, name: str, folder: int) -> int:
        flags = os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC
        return os.open(name, flags, 0o666, dir_fd=folder)

    def close(self, fd: int) -> None:
        with suppress(OSError):
            os.close(fd)

    def write(self, fd: int, buffers: Sequence[memoryview], offset: int) -> int:
        return os.pwritev(fd, buffers, offset)

    def read(self, fd: int, nbytes: int, offset: int) -> bytes:
        return os.pread(fd, nbytes, offset)

    def read_into(self, fd: int, into: memoryview, offset: int, *, cached: bool = False) -> int:
        small = into.nbytes < DIRECT_BYTES or offset % BLOCK_ALIGNMENT
        if cached or small or sys.platform != "linux":
            return os.preadv(fd, [into], offset)
        there = _cached_bytes(fd, offset, into.nbytes)
        if there:
            return os.preadv(fd, [into[:there]], offset)  # the next call goes on from there
        return _read_direct(fd, into, offset)

    def allocate(self, fd: int, nbytes: int) -> None:
        # Not posix_fallocate: where the file system cannot, the C library writes a
        # byte into every block instead, which over a network takes minutes.
        call = _libc_function("fallocate") if sys.platform == "linux" else None
        if call is None:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        import ctypes

        _check(call(ctypes.c_int(fd), ctypes.c_int(0), ctypes.c_int64(0), ctypes.c_int64(nbytes)))

    def truncate(self, fd: int, nbytes: int) -> None:
        os.ftruncate(fd, nbytes)

    def direct(self, fd: int, on: bool) -> None:
        flag: int | None = getattr(os, "O_DIRECT", None)
        if flag is None:
            raise OSError(errno.ENOTSUP, os.strerror(errno.ENOTSUP))
        flags = fcntl.fcntl(fd, fcntl.F_GETFL)
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | flag if on else flags & ~flag)

    def sync(self, fd: int) -> None:
        # On macOS fsync only hands the bytes to the drive, which may keep them in its cache.
        full: int | None = getattr(fcntl, "F_FULLFSYNC", None)
        if full is not None:
            try:
                fcntl.fcntl(fd, full)
                return
            except OSError as error:
                if error.errno not in (errno.ENOTSUP, errno.EINVAL, errno.ENOTTY):
                    raise
        os.fsync(fd)

    def status(self, fd: int) -> FileStatus:
        return _status(os.fstat(fd))

    def status_of(self, name: str, folder: int | None = None) -> FileStatus:
        return _status(os.stat(name, dir_fd=folder, follow_symlinks=False))

    def scan(self, folder: int) -> list[str]:
        return os.listdir(folder)

    def make_folder(self, name: str, folder: int | None = None) -> None:
        os.mkdir(name, dir_fd=folder)

    def link(self, name: str, folder: int, new_name: str, new_folder: int) -> None:
        os.link(name, new_name, src_dir_fd=folder, dst_dir_fd=new_folder, follow_symlinks=False)

    def rename_new(self, name: str, folder: int, new_name: str, new_folder: int) -> None:
        on_linux = sys.platform == "linux"
        call = _libc_function("renameat2" if on_linux else "renameatx_np")
        if call is None:
            raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS))
        import ctypes

        flags = ctypes.c_uint(_RENAME_NOREPLACE if on_linux else _RENAME_EXCL)
        _check(
            call(
                ctypes.c_int(folder),
                os.fsencode(name),
                ctypes.c_int(new_folder),
                os.fsencode(new_name),
                flags,
            ),
            new_name,
        )

    def unlink(self, name: str, folder: int) -> None:
        os.unlink(name, dir_fd=folder)


def _cached_bytes(fd: int, offset: int, nbytes: int) -> int:
    """How many of the file's bytes from `offset` on, up to `nbytes`, are in the page cache;
    all of them where that cannot be known.

    With mincore(2), since it moves nothing. A read with RWF_NOWAIT tells, too, but starts
    reading ahead, and a direct read then waits for that: cold, it took four times as long.
    """
    import ctypes  # here: it takes milliseconds, and most processes never need it

    pages = (ctypes.c_ubyte * -(-nbytes // mmap.PAGESIZE))()
    try:
        # Never written to, and so never copied: only a writable map has an address in Python.
        view = mmap.mmap(
            fd,
            nbytes,
            flags=mmap.MAP_PRIVATE,
            prot=mmap.PROT_READ | mmap.PROT_WRITE,
            offset=offset,
        )
    except (OSError, ValueError):
        return nbytes
    with view:
        start = ctypes.c_ubyte.from_buffer(view)
        call = _libc_function("mincore")
        failed = call is None or call(ctypes.byref(start), ctypes.c_size_t(nbytes), pages) != 0
        del start
    if failed:
        return nbytes
    first_absent = bytes(pages).find(0)
    return nbytes if first_absent < 0 else first_absent * mmap.PAGESIZE


def _read_direct(fd: int, into: memoryview, offset: int) -> int:
    """Read whole pages past the page cache; through it where the file system, or the
    address of `into`, does not allow that."""
    nbytes = into.nbytes - into.nbytes % BLOCK_ALIGNMENT
    flags = fcntl.fcntl(fd, fcntl.F_GETFL)
    try:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags | os.O_DIRECT)
        return os.preadv(fd, [into[:nbytes]], offset)
    except OSError as error:
        if error.errno not in UNSUPPORTED:
            raise
    finally:
        fcntl.fcntl(fd, fcntl.F_SETFL, flags)
    return os.preadv(fd, [into], offset)


def _status(found: os.stat_result) -> FileStatus:
    return FileStatus(found.st_dev, found.st_ino, found.st_mode, found.st_size, found.st_mtime)


def _libc_function(name: str) -> Any:
    """A function of the C library, or None if it has no such function."""
    import ctypes  # here: it takes milliseconds, and most processes never need it

    return getattr(ctypes.CDLL(None, use_errno=True), name, None)


def _check(result: int, name: str = "") -> None:
    """Raise the error of a C function that returned -1."""
    if result != 0:
        import ctypes

        code = ctypes.get_errno()
        raise OSError(code, os.strerror(code), name)
