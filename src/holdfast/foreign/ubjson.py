"""UBJSON as XGBoost writes it: JSON in binary, with arrays of numbers of one type.

A parser of our own: it is short, and leaves the arrays where they are. Numbers are
big-endian. https://ubjson.org, with its optimized containers.
"""

from __future__ import annotations

import struct
from typing import Any

from holdfast.core.types import KiB, MiB
from holdfast.errors import DamagedObject
from holdfast.foreign.data import ForeignTensor, Span, Swapped
from holdfast.foreign.source import Source

MAX_VALUES = 1_000_000
_DEPTH = 64
_WINDOW_BYTES = 256 * KiB
_MAX_TEXT_BYTES = 16 * MiB
_LENGTHS = {b"i": ">b", b"U": ">B", b"I": ">h", b"l": ">i", b"L": ">q"}
_NUMBERS = {**_LENGTHS, b"d": ">f", b"D": ">d"}
_DTYPES = {
    b"i": ("I8", 1),
    b"U": ("U8", 1),
    b"I": ("I16", 2),
    b"l": ("I32", 4),
    b"L": ("I64", 8),
    b"d": ("F32", 4),
    b"D": ("F64", 8),
}
_CONSTANTS = {b"T": True, b"F": False, b"Z": None, b"N": None}


def parse(source: Source) -> Any:
    """The one value in `source`: dicts, lists and plain values; arrays of numbers of one
    type are tensors that are not read. Raises DamagedObject."""
    parser = _Parser(source)
    value = parser.value(parser.take(1), 0)
    if parser.at != source.nbytes:
        raise DamagedObject(source.name, f"{source.nbytes - parser.at:,} bytes follow its end")
    return value


class _Parser:
    def __init__(self, source: Source) -> None:
        self._source = source
        self._window = b""
        self._start = 0
        self._values = 0
        self.at = 0

    def take(self, nbytes: int) -> bytes:
        """The next bytes; few of them."""
        begin = self.at - self._start
        if begin < 0 or begin + nbytes > len(self._window):
            count = min(max(nbytes, _WINDOW_BYTES), self._source.nbytes - self.at)
            if count < nbytes:
                raise self._damage("it is cut off")
            self._start, self._window, begin = self.at, self._source.read(self.at, count), 0
        self.at += nbytes
        return self._window[begin : begin + nbytes]

    def _damage(self, text: str) -> DamagedObject:
        return DamagedObject(self._source.name, f"{text} at byte {self.at:,}")

    def value(self, marker: bytes, depth: int) -> Any:
        self._values += 1
        if self._values > MAX_VALUES or depth > _DEPTH:
            raise self._damage("it has more values than any real model, or deeper ones,")
        if marker == b"{":
            return self._object(depth)
        if marker == b"[":
            return self._array(depth)
        if marker in _NUMBERS:
            return self._number(marker)
        if marker in _CONSTANTS:
            return _CONSTANTS[marker]
        if marker in (b"S", b"H"):
            return self._text()
        if marker == b"C":
            return self.take(1).decode("latin1")
        raise self._damage(f"{marker!r} is no type of UBJSON")

    def _number(self, marker: bytes) -> Any:
        how = _NUMBERS[marker]
        return struct.unpack(how, self.take(struct.calcsize(how)))[0]

    def _length(self) -> int:
        marker = self.take(1)
        if marker not in _LENGTHS:
            raise self._damage(f"{marker!r} is no length")
        length = self._number(marker)
        if length < 0:
            raise self._damage("a length is negative")
        return length

    def _text(self) -> str:
        length = self._length()
        if length > _MAX_TEXT_BYTES:
            raise self._damage(f"a text claims {length:,} bytes")
        return self.take(length).decode("utf-8", "backslashreplace")

    def _head(self) -> tuple[bytes, int | None]:
        """(the type of all items, or b""; their number, or None)."""
        kind, count = b"", None
        marker = self.take(1)
        if marker == b"$":
            kind = self.take(1)
            marker = self.take(1)
            if marker != b"#":
                raise self._damage("a type without a number of items")
        if marker == b"#":
            count = self._length()
        else:
            self.at -= 1
        return kind, count

    def _object(self, depth: int) -> dict[str, Any]:
        kind, count = self._head()
        found: dict[str, Any] = {}
        while count is None or count > 0:
            if count is None and self.take(1) == b"}":
                break
            if count is None:
                self.at -= 1
            else:
                count -= 1
            key = self._text()
            if key in found:
                raise self._damage(f"{key[:80]!r} is there twice")
            found[key] = self.value(kind or self.take(1), depth + 1)
        return found

    def _array(self, depth: int) -> Any:
        kind, count = self._head()
        if kind in _DTYPES and count is not None:
            dtype, size = _DTYPES[kind]
            if count > (self._source.nbytes - self.at) // size:
                raise self._damage(f"an array claims {count:,} numbers")
            span = Span(self._source, self.at, count * size)
            self.at += count * size
            data = Swapped(span, size) if size > 1 else span
            return ForeignTensor(dtype, (count,), data, numpy=True)
        found: list[Any] = []
        while count is None or len(found) < count:
            marker = kind or self.take(1)
            if count is None and marker == b"]":
                break
            found.append(self.value(marker, depth + 1))
        return found
