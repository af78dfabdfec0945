"""What the disk holds and what the page cache holds of it."""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterator
from pathlib import Path

import numpy as np

_COLD = 0.02
"""The share of a folder that may still be cached in a cold restore."""

_libc = ctypes.CDLL(None, use_errno=True)


def sync_tree(folder: Path) -> None:
    """fsync every file and folder below `folder`, itself, and the name of it."""
    for path in [*files_of(folder), *(p for p in folder.rglob("*") if p.is_dir()), folder]:
        sync(path)
    sync(folder.parent)


def sync(path: Path) -> None:
    """fsync one file or folder."""
    fd = os.open(path, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def files_of(folder: Path) -> Iterator[Path]:
    """Every regular file below a folder, or the file itself."""
    if folder.is_file():
        yield folder
    else:
        yield from (path for path in folder.rglob("*") if path.is_file())


def nbytes_of(folder: Path) -> int:
    """Bytes of all files below a folder."""
    return sum(path.stat().st_size for path in files_of(folder))


def drop_cache(folder: Path) -> None:
    """Let the page cache forget what is below `folder`; only clean pages go, so sync first."""
    for path in files_of(folder):
        fd = os.open(path, os.O_RDONLY)
        try:
            os.fsync(fd)
            os.posix_fadvise(fd, 0, 0, os.POSIX_FADV_DONTNEED)
        finally:
            os.close(fd)


def warm_cache(folder: Path) -> None:
    """Read every file once, so that the page cache holds it."""
    block = bytearray(8 << 20)
    for path in files_of(folder):
        with open(path, "rb", buffering=0) as file:
            while file.readinto(block):
                pass


def cool(path: Path) -> bool:
    """Drop what the page cache holds below `path`; False if it will not go."""
    for _ in range(5):  # pages that a processor has just put aside stay for a moment
        drop_cache(path)
        if cached_share(path) <= _COLD:
            return True
    return False


def cached_share(folder: Path) -> float:
    """Which part of the files below `folder` is in the page cache (mincore), 0 to 1."""
    resident = pages = 0
    for path in files_of(folder):
        nbytes = path.stat().st_size
        if nbytes == 0:
            continue
        count = -(-nbytes // mmap.PAGESIZE)
        found = np.zeros(count, np.uint8)
        with open(path, "rb") as file, mmap.mmap(file.fileno(), 0, prot=mmap.PROT_READ) as view:
            seen = np.frombuffer(view, np.uint8)
            start, into = ctypes.c_void_p(seen.ctypes.data), ctypes.c_void_p(found.ctypes.data)
            failed = _libc.mincore(start, ctypes.c_size_t(nbytes), into)
            del seen  # else the map cannot be closed
        if failed:
            raise OSError(ctypes.get_errno(), "mincore failed", str(path))
        resident += int(np.count_nonzero(found & 1))
        pages += count
    return resident / pages if pages else 0.0
