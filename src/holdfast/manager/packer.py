"""From a snapshot to packs: cut in chunks, leave out what is stored already."""

from __future__ import annotations

from collections.abc import Collection, Generator
from dataclasses import dataclass, field

from holdfast.core.digest import digest
from holdfast.core.packing import PackChunk, pack_header
from holdfast.core.plan import boxes, itemsize
from holdfast.core.records import Chunk, Leaf, Manifest, Pack
from holdfast.core.types import Buffer, GiB, MiB
from holdfast.manager.snapshot import HeldLeaf, Snapshot
from holdfast.repo.writer import Save, Writer

# One pack per save for most states; above, several files of a size that copies
# and uploads well. Object stores take 5 GiB in one PUT.
PACK_BYTES = GiB
# Streamed leaves are held in memory until their pack is written.
HELD_BYTES = 64 * MiB


class Stored:
    """The chunks of an earlier checkpoint that a save may refer to.

    Each is handed out once, so that ranges in a manifest never overlap.
    """

    def __init__(
        self,
        manifest: Manifest,
        *,
        distrusted: Collection[str] = (),
        born_after: int = 0,
    ) -> None:
        self._found: dict[tuple[str, int], list[tuple[Pack, int]]] = {}
        for leaf in manifest.leaves:
            for chunk in leaf.chunks:
                pack = manifest.packs[chunk.pack]
                if pack.name in distrusted or pack.born <= born_after or chunk.codec:
                    continue
                place = (pack, chunk.offset)
                self._found.setdefault((chunk.digest, chunk.nbytes), []).append(place)

    def take(self, digest: str, nbytes: int) -> tuple[Pack, int] | None:
        """Where these bytes are stored, if they are."""
        places = self._found.get((digest, nbytes))
        return places.pop() if places else None


@dataclass
class _OpenPack:
    chunks: list[PackChunk] = field(default_factory=list[PackChunk])
    parts: list[Buffer] = field(default_factory=list[Buffer])
    owners: list[tuple[int, int]] = field(default_factory=list[tuple[int, int]])
    """(leaf, position in its chunk list) of each chunk."""
    nbytes: int = 0
    held: int = 0


class Packer:
    """Writes one snapshot's new chunks; use once."""

    def __init__(self, writer: Writer, save: Save, stored: Stored | None) -> None:
        self._writer = writer
        self._save = save
        self._stored = stored
        self._packs: list[Pack] = []
        self._index: dict[str, int] = {}
        self._open = _OpenPack()
        self._chunks: list[list[Chunk]] = []

    def write(
        self, snapshot: Snapshot
    ) -> Generator[None, None, tuple[tuple[Leaf, ...], tuple[Pack, ...]]]:
        """(leaves, packs) for the manifest; every pack is durable when this returns.

        Yields after each chunk: another thread may go on there. Raises
        StoreError; SaveFailed if a file could not be copied.
        """
        for position, leaf in enumerate(snapshot.leaves):
            self._chunks.append([])
            for box in boxes(leaf.source.shape, itemsize(leaf.source.dtype)):
                self._add(position, leaf, *box)
                yield
        self._flush()
        leaves = tuple(
            Leaf(leaf.path, leaf.source.dtype, leaf.source.shape, tuple(chunks))
            for leaf, chunks in zip(snapshot.leaves, self._chunks, strict=True)
        )
        return leaves, tuple(self._packs)

    def _add(
        self,
        position: int,
        leaf: HeldLeaf,
        start: tuple[int, ...],
        extent: tuple[int, ...],
        offset: int,
        nbytes: int,
    ) -> None:
        """Refer to the stored copy of one chunk, or add it to the open pack."""
        dtype, shape = leaf.source.dtype, leaf.source.shape
        data = leaf.read(offset, nbytes)
        found = digest(data)
        place = self._stored.take(found, nbytes) if self._stored else None
        if place is not None:
            pack, at = place
            chunk = Chunk(start, extent, self._number(pack), at, nbytes, found)
            self._chunks[position].append(chunk)
            return
        if self._open.nbytes + nbytes > PACK_BYTES or self._open.held >= HELD_BYTES:
            self._flush()
        whole = extent == shape
        name = leaf.path if whole else f"{leaf.path}[{offset}:{offset + nbytes}]"
        self._open.chunks.append(PackChunk(name, dtype, extent, nbytes))
        self._open.parts.append(data)
        self._open.owners.append((position, len(self._chunks[position])))
        self._open.nbytes += nbytes
        self._open.held += nbytes if leaf.data is None else 0
        # Pack and offset are known once the pack's header is.
        self._chunks[position].append(Chunk(start, extent, -1, -1, nbytes, found))

    def _flush(self) -> None:
        pack = self._open
        if not pack.chunks:
            return
        self._open = _OpenPack()
        metadata = {"holdfast.checkpoint": str(self._save.ordinal)}
        header, offsets = pack_header(pack.chunks, metadata)
        number = self._number(self._writer.put_pack(self._save, header, pack.parts))
        for (leaf, at), offset in zip(pack.owners, offsets, strict=True):
            old = self._chunks[leaf][at]
            self._chunks[leaf][at] = Chunk(
                old.start, old.shape, number, offset, old.nbytes, old.digest
            )

    def _number(self, pack: Pack) -> int:
        if pack.name not in self._index:
            self._index[pack.name] = len(self._packs)
            self._packs.append(pack)
        return self._index[pack.name]
