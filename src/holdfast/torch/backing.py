"""New tensors whose elements lie in a file: a state that is larger than memory can be decoded.

The file has no name: nothing is left of it when the process ends, however it ends. Bytes are
written to it with calls that can fail (a full disk), and only read through its mapping, where a
failure would end the process.
"""

from __future__ import annotations

import contextlib
import mmap
import tempfile
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

import torch

from holdfast.core.leaves import FileDestination
from holdfast.core.types import MiB

# A process can have some 65,000 mappings: tensors share them.
_SEGMENT_BYTES = 64 * MiB
_ALIGNMENT = 64  # what torch's own memory has

_backing: ContextVar[Backing | None] = ContextVar("backing", default=None)


class Backing:
    """A file without a name, and the tensors in it."""

    def __init__(self, folder: Path) -> None:
        self._file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 -- closed by close()
        self._segment: mmap.mmap | None = None
        self._start = 0  # of the segment, in the file
        self._used = 0

    def place(
        self, nbytes: int, dtype: str, shape: tuple[int, ...]
    ) -> tuple[torch.Tensor, FileDestination]:
        """A new tensor of `nbytes` bytes in a storage of its own, and where the bytes of a
        leaf of `dtype` and `shape` go that fill it."""
        if self._segment is None or self._used + nbytes > len(self._segment):
            self._start += len(self._segment) if self._segment is not None else 0
            size = max(_SEGMENT_BYTES, -(-nbytes // mmap.PAGESIZE) * mmap.PAGESIZE)
            self._file.truncate(self._start + size)
            self._segment = mmap.mmap(self._file.fileno(), size, offset=self._start)
            self._used = 0
        at = self._used
        self._used += -(-nbytes // _ALIGNMENT) * _ALIGNMENT
        # It keeps the mapping for as long as it lives.
        raw = torch.frombuffer(self._segment, dtype=torch.uint8, count=nbytes, offset=at)
        return raw, FileDestination(self._file.fileno(), self._start + at, dtype, shape)

    def close(self) -> None:
        """Tensors stay as they are, no more bytes come."""
        self._segment = None
        self._file.close()


@contextlib.contextmanager
def file_backed(folder: Path) -> Iterator[None]:
    """Tensors that are decoded to new ones inside, on the CPU, lie in a file in `folder`.

    They must not be written to. Those of other memory formats come as contiguous ones.
    """
    backing = Backing(folder)
    token = _backing.set(backing)
    try:
        yield
    finally:
        _backing.reset(token)
        backing.close()


def backing_of(device: torch.device) -> Backing | None:
    """Where new tensors for `device` go, if not to its memory."""
    return _backing.get() if device.type == "cpu" else None
