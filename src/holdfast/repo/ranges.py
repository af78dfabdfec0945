"""What a manifest says about the bytes of its packs, and bytes compared with it.

The bytes of a pack that is copied come in order, block after block. Each range (the header,
each chunk) is digested as it passes, so that no pack need fit in memory; only a compressed
chunk is put together first, since its digest is of what it holds.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable
from typing import NamedTuple

from blake3 import blake3

from holdfast.core.codecs import PACKAGE_HINT, can_decode, decoded_nbytes
from holdfast.core.digest import digest
from holdfast.core.plan import itemsize
from holdfast.core.records import Manifest
from holdfast.errors import DamagedObject, StateError
from holdfast.repo import keys


class Range(NamedTuple):
    """Bytes of a pack whose digest is known."""

    offset: int
    nbytes: int
    digest: str
    codec: str = ""
    decoded_nbytes: int = 0
    """Of a compressed one: bytes of what it holds."""
    itemsize: int = 1
    leaf: str = ""
    """For people: whose bytes these are."""

    @property
    def end(self) -> int:
        return self.offset + self.nbytes

    @property
    def proves(self) -> tuple[int, int, str, str]:
        """What it says, whoever says it."""
        return self.offset, self.nbytes, self.digest, self.codec


Proven = tuple[int, int, str, str]
"""`Range.proves` of bytes that were found to be right."""


def ranges_of(manifest: Manifest) -> dict[str, list[Range]]:
    """The ranges of every pack of the manifest, by its name, in the order of their bytes.

    Those of one pack do not overlap: `check_manifest` has made sure.
    """
    found: list[list[Range]] = [[] for _ in manifest.packs]
    for pack, ranges in zip(manifest.packs, found, strict=True):
        if pack.head_nbytes:
            ranges.append(Range(0, pack.head_nbytes, pack.head_digest, leaf="the header"))
    for leaf in manifest.leaves:
        size = itemsize(leaf.dtype)
        for chunk in leaf.chunks:
            decoded = decoded_nbytes(leaf, chunk) if chunk.codec else 0
            found[chunk.pack].append(
                Range(
                    chunk.offset,
                    chunk.nbytes,
                    chunk.digest,
                    chunk.codec,
                    decoded,
                    size,
                    leaf.path,
                )
            )
    return {pack.name: sorted(r) for pack, r in zip(manifest.packs, found, strict=True)}


def united(parts: Iterable[Collection[Range]]) -> list[list[Range]]:
    """All ranges that several manifests have in one pack, each of them once, in lists of
    ranges that do not overlap."""
    seen: set[Proven] = set()
    lists: list[list[Range]] = []
    for part in parts:
        new = [found for found in part if found.proves not in seen]
        seen.update(found.proves for found in new)
        if new:
            lists.append(sorted(new))
    return lists


class Check:
    """Compares the bytes of a pack, as they come, with the ranges of one manifest."""

    def __init__(self, name: str, ranges: Collection[Range]) -> None:
        """Raises StateError if a package is missing that decompresses one of them."""
        self._key = keys.pack_key(name)
        self._ranges = sorted(ranges)
        self._at = 0
        self._hasher = blake3()
        self._stored = bytearray()
        """Of a compressed range that began in an earlier block."""
        for found in self._ranges:
            if not can_decode(found.codec):
                raise StateError(
                    f"{found.leaf!r} in {self._key} is compressed with zstd, and the package "
                    "that decompresses is not installed, so that it cannot be verified",
                    hint=f"{PACKAGE_HINT} and try again.",
                )

    def feed(self, offset: int, data: memoryview) -> None:
        """The pack's bytes from `offset` on, which follow those of the last call.

        Raises DamagedObject.
        """
        end = offset + data.nbytes
        while self._at < len(self._ranges):
            found = self._ranges[self._at]
            if found.offset >= end:
                return
            piece = data[max(found.offset, offset) - offset : min(found.end, end) - offset]
            if found.end > end:
                self._keep(found, piece)
                return
            self._finish(found, piece)
            self._at += 1

    def end(self) -> None:
        """The pack ends here. Raises DamagedObject if a range goes on behind it."""
        if self._at < len(self._ranges):
            found = self._ranges[self._at]
            raise DamagedObject(self._key, f"it ends before byte {found.end:,}", leaf=found.leaf)

    def _keep(self, found: Range, piece: memoryview) -> None:
        if found.codec:
            self._stored += piece
        else:
            self._hasher.update(piece)

    def _finish(self, found: Range, piece: memoryview) -> None:
        if found.codec:
            stored = memoryview(self._stored + piece) if self._stored else piece
            self._stored = bytearray()
            right = self._decoded_digest(found, stored) == found.digest
        elif piece.nbytes == found.nbytes:
            right = digest(piece) == found.digest
        else:
            self._hasher.update(piece)
            right = self._hasher.hexdigest() == found.digest
            self._hasher = blake3()
        if not right:
            raise DamagedObject(
                self._key,
                f"the bytes at {found.offset} do not match their digest",
                leaf=found.leaf,
            )

    def _decoded_digest(self, found: Range, stored: memoryview) -> str:
        from holdfast.core.shuffle_zstd import Undecodable, decode  # NumPy: not for all commands

        raw = memoryview(bytearray(found.decoded_nbytes))
        try:
            decode(stored, found.itemsize, raw)
        except Undecodable as error:
            raise DamagedObject(
                self._key,
                f"the bytes at {found.offset} cannot be decompressed ({error})",
                leaf=found.leaf,
            ) from None
        return digest(raw)
