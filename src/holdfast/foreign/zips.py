"""Zip archives, read with suspicion.

Readers of zip files differ in what they believe: the list at the end or the headers
before each entry, the first or the last of two equal names. An archive is taken only
where they must all agree.
"""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import pairwise

from holdfast.core.types import MiB
from holdfast.errors import DamagedObject
from holdfast.foreign.data import Data, Inflated, Span
from holdfast.foreign.source import PartSource, Source

MAX_ENTRIES = 250_000
MAX_LIST_BYTES = 64 * MiB
_END = struct.Struct("<4s4H2IH")
_END_64 = struct.Struct("<4sQ2H2I4Q")
_LOCATOR_64 = struct.Struct("<4sIQI")
_LISTED = struct.Struct("<4s6H3I5H2I")
_LOCAL = struct.Struct("<4s5H3I2H")
_ENCRYPTED = 0x2041  # encrypted, strongly encrypted, names hidden
_STORED, _DEFLATED = 0, 8


@dataclass(frozen=True, slots=True)
class ZipEntry:
    name: str
    method: int
    packed_bytes: int
    nbytes: int
    """As the list says; a packed entry may hold more or less."""
    offset: int
    encrypted: bool
    crc: int = 0


@dataclass(frozen=True)
class Archive:
    """An archive's list of entries, by name."""

    source: Source
    entries: dict[str, ZipEntry]
    notes: tuple[str, ...] = field(default=())

    def read(self, name: str, *, max_bytes: int) -> bytes:
        """The first `max_bytes` bytes of an entry, or all of them if it has fewer.

        Raises DamagedObject for an entry that is encrypted, packed in an unknown way,
        or not what the list says.
        """
        entry = self.entries[name]
        if entry.encrypted:
            raise DamagedObject(self.source.name, f"its entry {name!r} is encrypted")
        start = self._data_start(entry)
        if entry.method == _STORED:
            if entry.packed_bytes != entry.nbytes:
                raise DamagedObject(self.source.name, f"its entry {name!r} has two sizes")
            return self.source.read(start, min(entry.nbytes, max_bytes))
        if entry.method != _DEFLATED:
            raise DamagedObject(
                self.source.name,
                f"its entry {name!r} is packed by the unknown method {entry.method}",
            )
        # What is not compressible grows by some bytes in each 16 KiB.
        packed = self.source.read(start, min(entry.packed_bytes, max_bytes + max_bytes // 512 + 64))
        try:
            return zlib.decompressobj(-zlib.MAX_WBITS).decompress(packed, max_bytes)
        except zlib.error as error:
            raise DamagedObject(
                self.source.name, f"its entry {name!r} cannot be unpacked ({error})"
            ) from error

    def data(self, name: str, skip: int = 0) -> Data:
        """What an entry holds behind its first `skip` bytes, to be read in pieces.

        Raises as `read` does.
        """
        self.read(name, max_bytes=1)
        entry = self.entries[name]
        start, nbytes = self._data_start(entry), max(0, entry.nbytes - skip)
        if entry.method == _STORED:
            return Span(self.source, start + skip, nbytes)
        return Inflated(self.source, start, entry.packed_bytes, skip, nbytes)

    def part(self, name: str) -> Source | None:
        """An entry as a file of its own; None if it is compressed. Raises as `read` does."""
        self.read(name, max_bytes=1)
        entry = self.entries[name]
        if entry.method != _STORED:
            return None
        where = f"{self.source.name}: {name}"
        return PartSource(self.source, self._data_start(entry), entry.nbytes, where)

    def check(self) -> Iterator[str]:
        """Read every entry to its end; yields what does not have its size or its CRC-32."""
        buffer = memoryview(bytearray(MiB))
        # In the order of the file, as it is read fastest.
        for entry in sorted(self.entries.values(), key=lambda entry: entry.offset):
            crc = 0
            try:
                data = self.data(entry.name)
                for at in range(0, entry.nbytes, MiB):
                    piece = buffer[: min(MiB, entry.nbytes - at)]
                    data.read(at, piece)
                    crc = zlib.crc32(piece, crc)
            except DamagedObject as error:
                yield error.reason
                continue
            if crc != entry.crc:
                yield f"its entry {entry.name!r} does not have its CRC-32"

    def _data_start(self, entry: ZipEntry) -> int:
        header = self.source.read(entry.offset, _LOCAL.size)
        fields = _LOCAL.unpack(header)
        name_length, extra_length = fields[-2], fields[-1]
        name = self.source.read(entry.offset + _LOCAL.size, name_length)
        if fields[0] != b"PK\3\4" or _decoded(name) != entry.name or fields[3] != entry.method:
            raise DamagedObject(
                self.source.name,
                f"the header of its entry {entry.name!r} is not what its list says",
            )
        start = entry.offset + _LOCAL.size + name_length + extra_length
        if start + entry.packed_bytes > self.source.nbytes:
            raise DamagedObject(self.source.name, f"its entry {entry.name!r} is cut off")
        return start


def read_archive(source: Source) -> Archive:
    """The entries of the archive in `source`. Reads their list only.

    Raises DamagedObject if the list is missing or too long, if two entries have one
    name, or if their bytes overlap (so that a small file poses as a large one).
    """
    count, list_bytes, list_offset, list_end, shift = _find_list(source)
    if count > MAX_ENTRIES or list_bytes > MAX_LIST_BYTES:
        raise DamagedObject(
            source.name, f"its list of {count:,} entries is longer than any real one"
        )
    before = list_end - list_bytes - list_offset
    if before < 0 or (shift is not None and shift != before):
        raise DamagedObject(source.name, "its list of entries lies outside of it")
    data = source.read(list_end - list_bytes, list_bytes)
    entries: dict[str, ZipEntry] = {}
    at = 0
    for _ in range(count):
        entry, at = _listed(source, data, at, before)
        if entry.name in entries:
            raise DamagedObject(source.name, f"two of its entries are named {entry.name!r}")
        entries[entry.name] = entry
    _check_overlaps(source, entries, list_end - list_bytes)
    notes = [f"{before:,} bytes lie before the archive"] if before else []
    return Archive(source, entries, tuple(notes))


def ends_like_zip(source: Source) -> bool:
    """Whether programs that look at the end of a file would take it for a zip archive."""
    return _end_record(source)[0] >= 0


def _end_record(source: Source) -> tuple[int, bytes]:
    """(offset, bytes) of the record that ends an archive; (-1, b"") without one."""
    tail_bytes = min(source.nbytes, _END.size + 0xFFFF)
    tail = source.read(source.nbytes - tail_bytes, tail_bytes)
    at = tail.rfind(b"PK\5\6")
    if at < 0:
        return -1, b""
    return source.nbytes - tail_bytes + at, tail[at : at + _END.size]


def _find_list(source: Source) -> tuple[int, int, int, int, int | None]:
    """(number of entries, bytes of the list, stated offset of the list, its real end, by how
    much a stated offset is wrong if that is stated, too)."""
    at, record = _end_record(source)
    if at < 0:
        raise DamagedObject(source.name, "it is a zip archive without its end: it is cut off")
    # Some readers take the last record, others the last whose comment ends the file.
    if len(record) < _END.size or at + _END.size + _END.unpack(record)[-1] != source.nbytes:
        reason = "more bytes follow its zip archive, which programs read in different ways"
        raise DamagedObject(source.name, reason)
    _, disk, list_disk, _, count, list_bytes, offset, _ = _END.unpack(record)
    if disk not in (0, 0xFFFF) or list_disk not in (0, 0xFFFF):
        raise DamagedObject(source.name, "it is a part of an archive in several files")
    if at < _LOCATOR_64.size:
        return count, list_bytes, offset, at, None
    magic, _, end_at, _ = _LOCATOR_64.unpack(source.read(at - _LOCATOR_64.size, _LOCATOR_64.size))
    if magic != b"PK\6\7":
        return count, list_bytes, offset, at, None
    # Some readers look right before the locator, others where it says: it must be one place.
    real = at - _LOCATOR_64.size - _END_64.size
    if real < 0 or end_at > real:
        raise DamagedObject(source.name, "the end of its zip archive is malformed")
    fields = _END_64.unpack(source.read(real, _END_64.size))
    if fields[0] != b"PK\6\6" or fields[1] != _END_64.size - 12:
        raise DamagedObject(source.name, "the end of its zip archive is malformed")
    return fields[7], fields[8], fields[9], real, real - end_at


def _listed(source: Source, data: bytes, at: int, before: int) -> tuple[ZipEntry, int]:
    if at + _LISTED.size > len(data):
        raise DamagedObject(source.name, "its list of entries is cut off")
    fields = _LISTED.unpack_from(data, at)
    name_length, extra_length, comment_length = fields[10], fields[11], fields[12]
    name_at = at + _LISTED.size
    extra_at = name_at + name_length
    end = extra_at + extra_length + comment_length
    if fields[0] != b"PK\1\2" or end > len(data):
        raise DamagedObject(source.name, "its list of entries is malformed")
    packed, nbytes, offset = fields[8], fields[9], fields[16]
    wide = _wide(data[extra_at : extra_at + extra_length])
    try:
        nbytes = next(wide) if nbytes == 0xFFFFFFFF else nbytes
        packed = next(wide) if packed == 0xFFFFFFFF else packed
        offset = next(wide) if offset == 0xFFFFFFFF else offset
    except StopIteration:
        raise DamagedObject(source.name, "its list of entries is malformed") from None
    name = _decoded(data[name_at:extra_at])
    return ZipEntry(
        name, fields[4], packed, nbytes, before + offset, bool(fields[3] & _ENCRYPTED), fields[7]
    ), end


def _wide(extra: bytes) -> Iterator[int]:
    """The 64-bit numbers of an entry's extra field."""
    at = 0
    while at + 4 <= len(extra):
        tag, length = struct.unpack_from("<2H", extra, at)
        if tag == 1:
            body = extra[at + 4 : at + 4 + length]
            yield from struct.unpack(f"<{len(body) // 8}Q", body[: len(body) // 8 * 8])
            return
        at += 4 + length


def _decoded(name: bytes) -> str:
    return name.decode("utf-8", "surrogateescape")


def _check_overlaps(source: Source, entries: dict[str, ZipEntry], limit: int) -> None:
    placed = sorted(entries.values(), key=lambda entry: entry.offset)
    for entry, following in pairwise([*placed, ZipEntry("", 0, 0, 0, limit, False)]):
        least = _LOCAL.size + len(entry.name.encode("utf-8", "surrogateescape"))
        if entry.offset < 0 or entry.offset + least + entry.packed_bytes > following.offset:
            raise DamagedObject(
                source.name, f"its entry {entry.name!r} overlaps others, or lies outside of it"
            )
