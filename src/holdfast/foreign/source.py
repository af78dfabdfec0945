"""Where the bytes of a foreign file come from: ranges, never the whole."""

from __future__ import annotations

import os
import stat
from typing import Protocol, Self

from holdfast.errors import DamagedObject, UsageError


class Source(Protocol):
    """Random access to bytes whose number is known."""

    name: str
    nbytes: int

    def read(self, offset: int, nbytes: int) -> bytes:
        """Exactly these bytes. Raises DamagedObject unless all of them are there."""
        ...


class BytesSource:
    """Bytes in memory."""

    def __init__(self, data: bytes, name: str = "the file") -> None:
        self.name = name
        self.nbytes = len(data)
        self._data = data

    def read(self, offset: int, nbytes: int) -> bytes:
        check_range(self, offset, nbytes)
        return self._data[offset : offset + nbytes]


class FileSource:
    """A regular file. Use it as a context manager."""

    def __init__(self, path: str) -> None:
        """Raises OSError, UsageError for a folder, a pipe or a device."""
        self.name = path
        # Opening a named pipe for reading would wait for its writer.
        self._fd = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        found = os.fstat(self._fd)
        self.nbytes = found.st_size
        if not stat.S_ISREG(found.st_mode):
            self.close()
            raise UsageError(f"{path} is not a regular file")

    def read(self, offset: int, nbytes: int) -> bytes:
        check_range(self, offset, nbytes)
        pieces: list[bytes] = []
        while nbytes:
            piece = os.pread(self._fd, nbytes, offset)
            if not piece:
                raise DamagedObject(self.name, "it became shorter while it was read")
            pieces.append(piece)
            offset += len(piece)
            nbytes -= len(piece)
        return pieces[0] if len(pieces) == 1 else b"".join(pieces)

    def fileno(self) -> int:
        return self._fd

    def close(self) -> None:
        os.close(self._fd)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class Reopened:
    """A file that is opened for each read: of thousands, all cannot be open at once."""

    def __init__(self, path: str) -> None:
        self.name = path
        with FileSource(path) as source:
            self.nbytes = source.nbytes

    def read(self, offset: int, nbytes: int) -> bytes:
        with FileSource(self.name) as source:
            return source.read(offset, nbytes)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None: ...


class PartSource:
    """A range of another source, as if it were a file of its own."""

    def __init__(self, whole: Source, start: int, nbytes: int, name: str) -> None:
        """Raises DamagedObject unless the range is there."""
        check_range(whole, start, nbytes)
        self.whole = whole
        self.start = start
        self.nbytes = nbytes
        self.name = name

    def read(self, offset: int, nbytes: int) -> bytes:
        check_range(self, offset, nbytes)
        return self.whole.read(self.start + offset, nbytes)


def check_range(source: Source, offset: int, nbytes: int) -> None:
    """Raise DamagedObject unless the range lies in `source`: before anything is allocated."""
    if not (offset >= 0 and nbytes >= 0 and offset + nbytes <= source.nbytes):
        raise DamagedObject(
            source.name, f"bytes {offset} to {offset + nbytes} are named; it has {source.nbytes}"
        )
