"""From a snapshot to packs: cut in chunks, leave out what is stored already."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Generator, Sequence
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
# A stored chunk is referred to where it lies if its pack is needed for at least a half;
# else the chunk is written again. Otherwise one buffer that never changes would keep the
# gigabyte of weights that it was first saved with for ever. So a checkpoint never keeps
# more than twice its size.
WORTH_KEEPING = 2
# From so many bytes on, such chunks get a pack of their own: next time it is needed as a
# whole, and nothing of it is written. Fewer are written anew each time instead, since a
# pack costs two fsyncs, or a request.
OWN_PACK_BYTES = 8 * MiB
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


@dataclass(frozen=True)
class _Piece:
    """A chunk of the snapshot, and where it goes in the manifest."""

    leaf: HeldLeaf
    position: int
    """Of the leaf."""
    number: int
    """Among the leaf's chunks."""
    start: tuple[int, ...]
    extent: tuple[int, ...]
    offset: int
    nbytes: int
    digest: str

    @property
    def name(self) -> str:
        """In a pack."""
        if self.extent == self.leaf.source.shape:
            return self.leaf.path
        return f"{self.leaf.path}[{self.offset}:{self.offset + self.nbytes}]"

    def read(self) -> memoryview:
        return self.leaf.read(self.offset, self.nbytes)


@dataclass
class _OpenPack:
    pieces: list[_Piece] = field(default_factory=list[_Piece])
    parts: list[Buffer] = field(default_factory=list[Buffer])
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
        self._chunks: list[list[Chunk | None]] = []
        """Of each leaf; None until it is known in which pack a chunk lies, and where."""

    def write(
        self, snapshot: Snapshot
    ) -> Generator[None, None, tuple[tuple[Leaf, ...], tuple[Pack, ...]]]:
        """(leaves, packs) for the manifest; every pack is durable when this returns.

        Yields after each chunk: another thread may go on there. Raises
        StoreError; SaveFailed if a file could not be copied.
        """
        reusable: list[tuple[_Piece, Pack, int]] = []
        for position, leaf in enumerate(snapshot.leaves):
            source = leaf.source
            self._chunks.append([])
            for number, box in enumerate(boxes(source.shape, itemsize(source.dtype))):
                start, extent, offset, nbytes = box
                data = leaf.read(offset, nbytes)
                found = digest(data)
                piece = _Piece(leaf, position, number, start, extent, offset, nbytes, found)
                self._chunks[position].append(None)
                place = self._stored.take(found, nbytes) if self._stored else None
                if place is None:
                    self._add(piece, data)
                else:
                    reusable.append((piece, *place))
                yield
        yield from self._reuse(reusable)
        self._flush()
        leaves = tuple(
            Leaf(leaf.path, leaf.source.dtype, leaf.source.shape, tuple(filter(None, chunks)))
            for leaf, chunks in zip(snapshot.leaves, self._chunks, strict=True)
        )
        return leaves, tuple(self._packs)

    def _reuse(self, reusable: Sequence[tuple[_Piece, Pack, int]]) -> Generator[None, None, None]:
        """Refer to stored chunks, but move those out of packs that hold little else."""
        used: Counter[str] = Counter()
        for piece, pack, _ in reusable:
            used[pack.name] += piece.nbytes
        moving: list[_Piece] = []
        for piece, pack, at in reusable:
            if used[pack.name] * WORTH_KEEPING < pack.nbytes:
                moving.append(piece)
            else:
                self._place(piece, self._number(pack), at)
        if sum(piece.nbytes for piece in moving) >= OWN_PACK_BYTES:
            self._flush()  # what does not change lies apart from what does
        for piece in moving:
            self._add(piece, piece.read())
            yield

    def _place(self, piece: _Piece, pack: int, at: int) -> None:
        self._chunks[piece.position][piece.number] = Chunk(
            piece.start, piece.extent, pack, at, piece.nbytes, piece.digest
        )

    def _add(self, piece: _Piece, data: Buffer) -> None:
        """Write a chunk with the open pack."""
        if self._open.nbytes + piece.nbytes > PACK_BYTES or self._open.held >= HELD_BYTES:
            self._flush()
        self._open.pieces.append(piece)
        self._open.parts.append(data)
        self._open.nbytes += piece.nbytes
        self._open.held += piece.nbytes if piece.leaf.data is None else 0

    def _flush(self) -> None:
        pack = self._open
        if not pack.pieces:
            return
        self._open = _OpenPack()
        metadata = {"holdfast.checkpoint": str(self._save.ordinal)}
        chunks = [PackChunk(p.name, p.leaf.source.dtype, p.extent, p.nbytes) for p in pack.pieces]
        header, offsets = pack_header(chunks, metadata)
        number = self._number(self._writer.put_pack(self._save, header, pack.parts))
        for piece, offset in zip(pack.pieces, offsets, strict=True):
            self._place(piece, number, offset)

    def _number(self, pack: Pack) -> int:
        if pack.name not in self._index:
            self._index[pack.name] = len(self._packs)
            self._packs.append(pack)
        return self._index[pack.name]
