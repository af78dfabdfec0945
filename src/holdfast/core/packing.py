"""Headers of packs, which are safetensors files: written, and read with suspicion.

A safetensors file is: 8 bytes little-endian header length N, N bytes of JSON
`{"name": {"dtype", "shape", "data_offsets": [begin, end]}, "__metadata__": {str: str}}`,
then the data, without holes. Readers of other makes accept negative or overflowing
shapes and headers of any size; this one does not.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any

import msgspec

from holdfast.core.plan import ITEMSIZES, itemsize
from holdfast.core.types import Buffer
from holdfast.errors import DamagedObject, StateError

ALIGNMENT = 4096  # of the data: direct I/O and page-wise mapping
MAX_HEADER_BYTES = 100_000_000  # safetensors' own limit
MAX_ENTRIES = 1_000_000
MAX_DIMENSIONS = 64  # NumPy's and torch's limit
_MAX_BYTES = 1 << 62  # sums of two such numbers still fit in 64 bits


class PackChunk(msgspec.Struct, frozen=True, gc=False):
    """One chunk to be written: an entry of the pack's header."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    nbytes: int

    def encoded(self, codec: str, nbytes: int) -> PackChunk:
        """The entry of this chunk if it is stored as `nbytes` that other readers must not
        take for its items."""
        return PackChunk(f"{self.name}[{codec}]", "U8", (nbytes,), nbytes)

    def widest(self, codec: str) -> PackChunk:
        """For `header_room` only: takes as much as this entry, and as an `encoded` one that
        is no longer."""
        return PackChunk(f"{self.name}[{codec}]", self.dtype, (*self.shape, self.nbytes), 0)


@dataclass(frozen=True)
class PackEntry:
    """One entry of a header that was read. `offset` is from the start of the file."""

    dtype: str
    shape: tuple[int, ...]
    offset: int
    nbytes: int


@dataclass(frozen=True)
class PackHeader:
    entries: dict[str, PackEntry]
    metadata: dict[str, str]
    data_offset: int
    """Where the data starts."""


class _Entry(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


_ENTRIES = msgspec.json.Decoder(_Entry)  # made here: see the end of `core.records`

# Around the name, dtype and shape of an entry, with the largest offsets that can be.
_ENTRY_BYTES = len(msgspec.json.encode(_Entry("", (), (_MAX_BYTES, _MAX_BYTES)))) + 2


def pack_header(
    chunks: Sequence[PackChunk], metadata: Mapping[str, str], *, nbytes: int = 0
) -> tuple[bytes, list[int]]:
    """(header with its length, offset in the file of each chunk).

    The chunks follow the header in this order, without gaps. The header is padded
    with spaces so that the data starts at a multiple of 4096; with `nbytes`, there.
    """
    relative: list[int] = []
    position = 0
    entries: dict[str, Any] = {"__metadata__": dict(metadata)} if metadata else {}
    for chunk in chunks:
        if chunk.name in entries or chunk.name == "__metadata__":
            raise StateError(f"two chunks of a pack are named {chunk.name!r}")
        if prod(chunk.shape) * itemsize(chunk.dtype) != chunk.nbytes:
            raise StateError(
                f"chunk {chunk.name!r}: {chunk.nbytes} bytes are not "
                f"{chunk.dtype}{list(chunk.shape)}"
            )
        end = position + chunk.nbytes
        entries[chunk.name] = _Entry(chunk.dtype, chunk.shape, (position, end))
        relative.append(position)
        position = end
    body = msgspec.json.encode(entries)
    padding = (nbytes - 8 - len(body)) if nbytes else -(8 + len(body)) % ALIGNMENT
    if padding < 0:
        raise StateError(f"a header of {8 + len(body)} bytes does not fit in {nbytes}")
    length = len(body) + padding
    if length > MAX_HEADER_BYTES:
        raise StateError(f"a pack of {len(chunks)} chunks would have a header of {length} bytes")
    header = b"".join((length.to_bytes(8, "little"), body, b" " * padding))
    return header, [len(header) + offset for offset in relative]


def header_room(chunks: Iterable[PackChunk], metadata: Mapping[str, str]) -> int:
    """How many bytes the header of a pack with some of these chunks takes at most."""
    nbytes = 8 + len(msgspec.json.encode({"__metadata__": dict(metadata)}))
    for chunk in chunks:
        shape = sum(len(str(size)) for size in chunk.shape) + len(chunk.shape)
        nbytes += len(msgspec.json.encode(chunk.name)) + len(chunk.dtype) + shape + _ENTRY_BYTES
    return -(-nbytes // ALIGNMENT) * ALIGNMENT


def header_bytes(first: Buffer, file_bytes: int, name: str) -> int:
    """How many bytes from the start of the file the header takes, its length included.

    `first` holds at least the file's first 8 bytes, `file_bytes` is its real size.
    Raises DamagedObject for a length that cannot be, before anything is allocated.
    """
    if len(first) < 8 or file_bytes < 8:
        raise DamagedObject(name, "it is too short to be a safetensors file")
    length = int.from_bytes(first[:8], "little")
    if length > MAX_HEADER_BYTES:
        raise DamagedObject(name, f"its header claims {length} bytes, more than any real one")
    if 8 + length > file_bytes:
        raise DamagedObject(name, f"its header of {length} bytes is longer than the file")
    return 8 + length


def read_header(data: Buffer, file_bytes: int, name: str) -> PackHeader:
    """The header at the start of `data`, which holds at least `header_bytes(...)` bytes.

    Every entry lies in the file, none overlap, no name is there twice, and every
    shape agrees with its bytes. Raises DamagedObject otherwise.
    """
    end = header_bytes(data, file_bytes, name)
    if len(data) < end:
        raise DamagedObject(name, "its header is cut off")
    body = bytes(memoryview(data)[8:end])
    try:
        # Typed first, which bounds memory; duplicate names are invisible to it.
        raw = msgspec.json.decode(body, type=dict[str, msgspec.Raw])
        if len(raw) > MAX_ENTRIES:
            raise DamagedObject(name, f"its header has {len(raw)} entries")
        metadata = msgspec.json.decode(raw.pop("__metadata__", b"{}"), type=dict[str, str])
        found = {key: _ENTRIES.decode(value) for key, value in raw.items()}
        json.loads(body, object_pairs_hook=_no_duplicates)
    except (ValueError, RecursionError) as error:  # msgspec's errors are ValueErrors
        raise DamagedObject(name, f"its header is malformed ({error})") from None
    entries = {key: _checked(entry, key, end, file_bytes, name) for key, entry in found.items()}
    position = end
    for key, entry in sorted(entries.items(), key=lambda item: (item[1].offset, item[1].nbytes)):
        if entry.offset < position and entry.nbytes:
            raise DamagedObject(name, "its bytes overlap another entry's", leaf=key)
        position = max(position, entry.offset + entry.nbytes)
    return PackHeader(entries, metadata, end)


def _no_duplicates(pairs: list[tuple[str, object]]) -> None:
    names = [key for key, _ in pairs]
    if len(set(names)) != len(names):
        twice = next(key for key in names if names.count(key) > 1)
        raise ValueError(f"{twice!r} is there twice")


def _checked(entry: _Entry, key: str, start: int, file_bytes: int, name: str) -> PackEntry:
    if entry.dtype not in ITEMSIZES:
        raise DamagedObject(name, f"unknown dtype {entry.dtype!r}", leaf=key)
    shape = tuple(entry.shape)
    if len(shape) > MAX_DIMENSIONS or any(size < 0 for size in shape):
        raise DamagedObject(name, "its shape cannot be", leaf=key)
    begin, stop = entry.data_offsets
    if not 0 <= begin <= stop <= file_bytes - start:
        raise DamagedObject(name, "its bytes are outside the file", leaf=key)
    nbytes = ITEMSIZES[entry.dtype] * prod(shape)
    # An empty shape may still hold sizes that overflow elsewhere: [0, 2**62].
    if max(shape, default=0) >= _MAX_BYTES or nbytes != stop - begin:
        raise DamagedObject(
            name, f"{entry.dtype}{list(shape)} does not fit its {stop - begin} bytes", leaf=key
        )
    return PackEntry(entry.dtype, shape, start + begin, nbytes)
