"""Compressing the chunks of a save, and copying compressed ones, in two staging blocks."""

from __future__ import annotations

from collections.abc import Callable

from holdfast.core.digest import digest
from holdfast.core.shuffle_zstd import Encoder, Undecodable, decode
from holdfast.core.types import KiB
from holdfast.manager.staging import Staging

# What is smaller is not worth a frame: its name and its place in the manifest take as much.
MIN_ENCODED_BYTES = 4 * KiB
# Else a chunk stays as it is, and a restore need not decompress it. What has any structure
# saves a tenth at least, random bytes nothing (docs/design/saving.md).
SAVES_ONE_IN = 16


class EncodingRoom:
    """Takes its blocks when they are first needed; `close` gives them back. Use by one
    thread at a time."""

    def __init__(self, staging: Staging) -> None:
        self._staging = staging
        self._blocks: list[memoryview] = []
        self._encoder: Encoder | None = None

    def room(self, nbytes: int) -> memoryview:
        """Where a chunk's bytes go, to be `encoded` there."""
        return self._block(0)[:nbytes]

    def encoded(self, nbytes: int, itemsize: int) -> memoryview | None:
        """The chunk in `room`, compressed; None if it is better stored as it is."""
        if self._encoder is None:
            self._encoder = Encoder()
        into = self._block(1)[: nbytes - nbytes // SAVES_ONE_IN]
        size = self._encoder.encode(self.room(nbytes), itemsize, into)
        return None if size is None else into[:size]

    def checked(
        self,
        read: Callable[[memoryview], None],
        stored_nbytes: int,
        nbytes: int,
        itemsize: int,
        expected: str,
    ) -> memoryview:
        """The stored bytes of a compressed chunk, which `read` brings, after a comparison of
        what they hold with its digest. Raises Undecodable."""
        stored, raw = self.room(stored_nbytes), self._block(1)[:nbytes]
        read(stored)
        decode(stored, itemsize, raw)
        if digest(raw) != expected:
            raise Undecodable("they do not match their digest")
        return stored

    def close(self) -> None:
        """Give the blocks back."""
        while self._blocks:
            self._staging.give_back(self._blocks.pop())

    def _block(self, number: int) -> memoryview:
        while len(self._blocks) <= number:
            self._blocks.append(self._staging.take())
        return self._blocks[number]
