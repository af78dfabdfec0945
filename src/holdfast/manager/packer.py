"""From a snapshot to packs: cut in chunks, leave out what is stored already."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import msgspec

from holdfast.core.digest import digest_of
from holdfast.core.packing import PackChunk, header_room
from holdfast.core.plan import CHUNK_BYTES, boxes, itemsize
from holdfast.core.records import Chunk, Leaf, Pack
from holdfast.core.types import GiB, MiB
from holdfast.errors import DamagedObject
from holdfast.manager.pack_stream import PackStream
from holdfast.manager.progress import Work
from holdfast.manager.snapshot import SMALL_BYTES, HeldLeaf, Snapshot
from holdfast.manager.staging import Staging, WriteThreads
from holdfast.manager.stored import Digests, Stored
from holdfast.repo import keys
from holdfast.repo.saves import Save
from holdfast.repo.writer import Writer

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


class _Piece(msgspec.Struct, gc=False):
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
    digest: str = ""

    def entry(self) -> PackChunk:
        """In a pack."""
        source = self.leaf.source
        name = self.leaf.path
        if self.nbytes != source.nbytes:
            name = f"{name}[{self.offset}:{self.offset + self.nbytes}]"
        return PackChunk(name, source.dtype, self.extent, self.nbytes)


@dataclass
class _OpenPack:
    stream: PackStream
    entries: list[PackChunk] = field(default_factory=list[PackChunk])
    places: list[tuple[_Piece, int]] = field(default_factory=list[tuple[_Piece, int]])


class Packer:
    """Writes one snapshot's new chunks; use once, from one thread at a time."""

    def __init__(
        self,
        writer: Writer,
        save: Save,
        stored: Stored | None,
        digests: Digests,
        staging: Staging,
        *,
        low: Callable[[], bool],
        work: Work,
    ) -> None:
        """`low`: whether nobody waits for this save. `work`: where it says how far it is."""
        self._writer = writer
        self._save = save
        self._work = work
        self._stored = stored
        self._digests = digests
        self._staging = staging
        # A chunk lies in two blocks at most: there are always enough.
        self._chunk_bytes = min(CHUNK_BYTES, staging.block_bytes)
        self._threads = WriteThreads(low=low)
        self._packs: list[Pack] = []
        self._index: dict[str, int] = {}
        self._open: _OpenPack | None = None
        self._candidates: deque[_Piece] = deque()
        """Pieces that may still have to be written, in their order."""
        self._chunks: list[list[Chunk | None]] = []
        """Of each leaf; None until it is known in which pack a chunk lies, and where."""
        self._reusable: list[tuple[_Piece, Pack, int]] = []
        self.read_s = 0.0
        """Seconds for bringing bytes into blocks, and below for their digests."""
        self.digest_s = 0.0
        self._metadata = {"holdfast.checkpoint": str(save.ordinal)}

    def write(
        self, snapshot: Snapshot
    ) -> Generator[None, None, tuple[tuple[Leaf, ...], tuple[Pack, ...]]]:
        """(leaves, packs) for the manifest; every pack is durable when this returns.

        Yields after each chunk: another thread may go on there. Raises
        StoreError; SaveFailed if a file could not be copied; TornRead; DamagedObject.
        """
        try:
            yield from self._write(snapshot)
        finally:
            if self._open is not None:
                self._open.stream.close()
            self._threads.stop()
        leaves = tuple(
            Leaf(leaf.path, leaf.source.dtype, leaf.source.shape, tuple(filter(None, chunks)))
            for leaf, chunks in zip(snapshot.leaves, self._chunks, strict=True)
        )
        return leaves, tuple(self._packs)

    def _write(self, snapshot: Snapshot) -> Generator[None, None, None]:
        snapshot.overlap.reach()
        small: list[_Piece] = []
        large: list[_Piece] = []
        for position, leaf in enumerate(snapshot.leaves):
            source = leaf.source
            self._chunks.append([])
            size = itemsize(source.dtype)
            for number, box in enumerate(boxes(source.shape, size, self._chunk_bytes)):
                piece = _Piece(leaf, position, number, *box)
                self._chunks[position].append(None)
                in_memory = leaf.data is not None and piece.nbytes < SMALL_BYTES
                (small if in_memory else large).append(piece)
        # What is small is known before a pack is begun, so that the pack's header has no
        # room for thousands of entries that it will not have.
        start = time.perf_counter()
        new = [piece for piece in small if not self._is_stored(piece)]
        self.digest_s += time.perf_counter() - start
        yield
        # In-place reads first: what they have not reached at the barrier is copied there.
        self._candidates = deque([*large, *new])
        self._work.begin(sum(piece.nbytes for piece in self._candidates))
        while self._candidates:
            piece = self._candidates.popleft()
            self._take(snapshot, piece)
            self._work.done_nbytes += piece.nbytes
            yield
        yield from self._reuse(snapshot)
        self._finish_pack()

    @property
    def write_s(self) -> float:
        """Seconds of the threads that write."""
        return self._threads.busy_s

    def _is_stored(self, piece: _Piece) -> bool:
        data = piece.leaf.data
        assert data is not None
        part = data[piece.offset : piece.offset + piece.nbytes]
        piece.digest = self._digests.digest(piece.leaf.path, piece.offset, [part])
        return self._found(piece)

    def _found(self, piece: _Piece) -> bool:
        place = self._stored.take(piece.digest, piece.nbytes) if self._stored else None
        if place is not None:
            self._reusable.append((piece, *place))
        return place is not None

    def _take(self, snapshot: Snapshot, piece: _Piece) -> None:
        """Bring a chunk into the open pack, unless it is stored already."""
        stream = self._stream(piece)
        room = stream.room(piece.nbytes)
        start = time.perf_counter()
        snapshot.read(piece.leaf, piece.offset, room)
        read = time.perf_counter()
        self.read_s += read - start
        if not piece.digest:
            piece.digest = self._digests.digest(
                piece.leaf.path, piece.offset, room, unchanged=piece.leaf.unchanged
            )
            self.digest_s += time.perf_counter() - read
            if self._found(piece):
                return
        self._keep(piece)

    def _keep(self, piece: _Piece) -> None:
        pack = self._open
        assert pack is not None
        pack.entries.append(piece.entry())
        pack.places.append((piece, pack.stream.keep(piece.nbytes)))

    def _stream(self, piece: _Piece) -> PackStream:
        """The open pack, with room for one more piece."""
        if self._open is not None and self._open.stream.nbytes + piece.nbytes > PACK_BYTES:
            self._finish_pack()
        if self._open is None:
            # A pack that is needed for a half already is kept: nothing moves out of it.
            used = self._used()
            doubtful = [p for p, pack, _ in self._reusable if not _is_kept(pack, used)]
            left = [piece, *self._candidates, *doubtful]
            self._open = _OpenPack(
                PackStream(
                    self._writer,
                    self._save,
                    self._staging,
                    self._threads,
                    head_nbytes=header_room((p.entry() for p in left), self._metadata),
                    at_most_bytes=min(PACK_BYTES, sum(p.nbytes for p in left)),
                )
            )
        return self._open.stream

    def _finish_pack(self) -> None:
        if self._open is None:
            return
        pack = self._open
        if pack.entries:
            number = self._number(pack.stream.finish(pack.entries, self._metadata))
            for piece, offset in pack.places:
                self._place(piece, number, offset)
        pack.stream.close()
        self._open = None

    def _reuse(self, snapshot: Snapshot) -> Generator[None, None, None]:
        """Refer to stored chunks, but move those out of packs that hold little else."""
        used = self._used()
        moving: list[tuple[_Piece, Pack, int]] = []
        for piece, pack, at in self._reusable:
            if _is_kept(pack, used):
                self._place(piece, self._number(pack), at)
            else:
                moving.append((piece, pack, at))
        self._reusable = []
        if sum(piece.nbytes for piece, _, _ in moving) >= OWN_PACK_BYTES:
            self._finish_pack()  # what does not change lies apart from what does
        self._candidates = deque(piece for piece, _, _ in moving)
        for piece, pack, at in moving:
            self._candidates.popleft()
            room = self._stream(piece).room(piece.nbytes)
            if piece.leaf.data is not None:
                snapshot.read(piece.leaf, piece.offset, room)
            else:
                self._read_back(piece, pack, at, room)
            self._keep(piece)
            yield

    def _used(self) -> Counter[str]:
        """Bytes of each stored pack that this checkpoint refers to so far."""
        used: Counter[str] = Counter()
        for piece, pack, _ in self._reusable:
            used[pack.name] += piece.nbytes
        return used

    def _read_back(self, piece: _Piece, pack: Pack, at: int, room: Sequence[memoryview]) -> None:
        """Read a chunk from where it is stored: the live one may have changed by now."""
        for part in room:
            self._writer.read_pack(pack, at, part)
            at += part.nbytes
        if digest_of(room) != piece.digest:
            raise DamagedObject(
                keys.pack_key(pack.name),
                "its bytes do not match their digest",
                leaf=piece.leaf.path,
            )

    def _place(self, piece: _Piece, pack: int, at: int) -> None:
        self._chunks[piece.position][piece.number] = Chunk(
            piece.start, piece.extent, pack, at, piece.nbytes, piece.digest
        )

    def _number(self, pack: Pack) -> int:
        if pack.name not in self._index:
            self._index[pack.name] = len(self._packs)
            self._packs.append(pack)
        return self._index[pack.name]


def _is_kept(pack: Pack, used: Counter[str]) -> bool:
    return used[pack.name] * WORTH_KEEPING >= pack.nbytes
