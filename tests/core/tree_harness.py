"""Saves and restores a tree in memory, as the manager does with a store."""

from __future__ import annotations

import struct
from collections.abc import Mapping, MutableMapping, Sequence
from typing import Any

import msgspec

from holdfast.core.plan import boxes, itemsize
from holdfast.core.records import Chunk, Leaf
from holdfast.core.tree import Captured, TreeDecoder, capture
from holdfast.core.types import KiB

CHUNK_BYTES = 1 * KiB  # small: leaves of tests have several boxes


class Saved:
    """A tree after its trip through JSON, with the bytes of its leaves."""

    def __init__(self, captured: Captured, chunk_bytes: int = CHUNK_BYTES) -> None:
        self.json = msgspec.json.encode(captured.tree)
        self.tree = msgspec.json.decode(self.json)
        self.pickled = captured.pickled
        self.leaves: list[Leaf] = []
        self.bytes: list[bytes] = []
        for leaf in captured.leaves:
            source = leaf.source
            data = bytearray(source.nbytes)
            chunks: list[Chunk] = []
            parts = list(boxes(source.shape, itemsize(source.dtype), chunk_bytes))
            for start, shape, offset, nbytes in parts:
                source.copy_range(offset, memoryview(data)[offset : offset + nbytes])
                chunks.append(Chunk(start, shape, 0, offset, nbytes, ""))
            source.close()
            self.leaves.append(Leaf(leaf.path, source.dtype, source.shape, tuple(chunks)))
            self.bytes.append(bytes(data))

    def fetch(self, requests: Sequence[tuple[int, Any]]) -> None:
        for index, destination in requests:
            for chunk in reversed(self.leaves[index].chunks):
                data = self.bytes[index][chunk.offset : chunk.offset + chunk.nbytes]
                destination.write(chunk.start, chunk.shape, memoryview(data))

    def decoder(self, **options: Any) -> TreeDecoder:
        return TreeDecoder(self.leaves, fetch=self.fetch, **options)

    def restore(
        self,
        into: MutableMapping[str, Any] | None = None,
        *,
        strict: bool = True,
        allow_pickle: bool = False,
        **selection: Any,
    ) -> dict[str, Any]:
        decoder = self.decoder(allow_pickle=allow_pickle)
        values = decoder.apply(self.tree, into, **selection)
        decoder.report(strict=strict)
        self.fetch(decoder.requests)
        decoder.run()
        return values


def save(state: Mapping[str, object], **options: Any) -> Saved:
    return Saved(capture(state, **options))


def roundtrip(value: object, **options: Any) -> Any:
    """The value after a save and a restore without a live target."""
    saved = save({"value": value}, **options)
    return saved.restore(allow_pickle=bool(options.get("allow_pickle")))["value"]


def float_bits(value: float) -> bytes:
    return struct.pack(">d", value)
