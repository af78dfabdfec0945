"""From a snapshot to packs: cut in chunks, leave out what is stored already."""

from __future__ import annotations

import time
from collections import Counter, deque
from collections.abc import Callable, Generator, Sequence
from dataclasses import dataclass, field

import msgspec

from holdfast.core.codecs import RAW
from holdfast.core.copying import copy_bytes
from holdfast.core.digest import digest_of
from holdfast.core.packing import PackChunk, header_room
from holdfast.core.plan import itemsize
from holdfast.core.records import Chunk, Leaf, Pack
from holdfast.core.shuffle_zstd import Undecodable
from holdfast.core.types import GiB, MiB
from holdfast.errors import DamagedObject
from holdfast.manager.cutting import Cutting
from holdfast.manager.encoding import MIN_ENCODED_BYTES, EncodingRoom
from holdfast.manager.pack_stream import PackStream
from holdfast.manager.progress import Work
from holdfast.manager.snapshot import SMALL_BYTES, HeldLeaf, Snapshot
from holdfast.manager.staging import WRITERS, Staging, WriteThreads
from holdfast.manager.stored import Digests, Place, Stored
from holdfast.manager.whole_pack import WholePack
from holdfast.repo import keys
from holdfast.repo.pack_writer import PackWriter
from holdfast.repo.saves import Save

# One pack per save for most states; above, several files of a size that copies
# and uploads well. Object stores take 5 GiB in one PUT.
PACK_BYTES = GiB
# Of a run with a mirror: a bucket takes a pack in one request, from memory.
MIRRORED_PACK_BYTES = 64 * MiB
# A stored chunk is referred to where it lies if its pack is needed for at least a half;
# else the chunk is written again. Otherwise one buffer that never changes would keep the
# gigabyte of weights that it was first saved with for ever. So a checkpoint never keeps
# more than twice its size.
WORTH_KEEPING = 2
# From so many bytes on, such chunks get a pack of their own: next time it is needed as a
# whole, and nothing of it is written. Fewer are written anew each time instead, since a
# pack costs two fsyncs, or a request.
OWN_PACK_BYTES = 8 * MiB
# Small chunks that are compared in one go.
_AT_ONCE = 1000


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
    place: Place | None = None
    """Where its bytes are stored already."""

    @property
    def itemsize(self) -> int:
        return itemsize(self.leaf.source.dtype)

    def entry(self) -> PackChunk:
        """In a pack, as it is."""
        source = self.leaf.source
        name = self.leaf.path
        if name.endswith(("]", "#")) or name == "__metadata__":
            name += "#"  # none is another leaf's with what is added, or the header's own
        if self.nbytes != source.nbytes:
            name = f"{name}[{self.offset}:{self.offset + self.nbytes}]"
        return PackChunk(name, source.dtype, self.extent, self.nbytes)


@dataclass
class _OpenPack:
    stream: PackStream | WholePack
    entries: list[PackChunk] = field(default_factory=list[PackChunk])
    kept: list[tuple[_Piece, int, int, str]] = field(
        default_factory=list[tuple[_Piece, int, int, str]]
    )
    """(chunk, offset behind the header, stored bytes, codec)."""


class Packer:
    """Writes one snapshot's new chunks; use once, from one thread at a time. `close` must
    follow."""

    def __init__(
        self,
        writer: PackWriter,
        save: Save,
        stored: Stored | None,
        digests: Digests,
        staging: Staging,
        *,
        low: Callable[[], bool],
        work: Work,
        cutting: Cutting,
        codec: str = RAW,
        mirrored: bool = False,
    ) -> None:
        """`low`: whether nobody waits for this save. `work`: where it says how far it is.
        `codec`: how new chunks are stored where that saves something. `mirrored`: the packs
        are going to be copied to another store."""
        self._writer = writer
        self._save = save
        self._work = work
        self._stored = stored
        self._digests = digests
        self._staging = staging
        self._cutting = cutting
        self._codec = codec
        self._encoding = EncodingRoom(staging)
        whole = min(writer.whole_bytes, staging.whole_bytes)
        self._whole = whole > 0
        self._pack_bytes = whole or (MIRRORED_PACK_BYTES if mirrored else PACK_BYTES)
        self._threads = WriteThreads(low=low, count=writer.parallel if whole else WRITERS)
        self._packs: list[Pack] = []
        self._index: dict[str, int] = {}
        self._open: _OpenPack | None = None
        self._candidates: deque[_Piece] = deque()
        """Pieces that may still have to be written, in their order."""
        self._chunks: list[list[Chunk | None]] = []
        """Of each leaf; None until it is known in which pack a chunk lies, and where."""
        self._reusable: list[_Piece] = []
        self.read_s = 0.0
        """Seconds for bringing bytes into blocks, and below for their digests."""
        self.digest_s = 0.0
        self.compress_s = 0.0
        self.finish_s = 0.0
        """Seconds that `finish` has waited."""
        self.packed_nbytes = 0
        """Bytes of the chunks that were put in packs, before they were compressed."""
        self._metadata = {"holdfast.checkpoint": str(save.ordinal)}

    def write(
        self, snapshot: Snapshot
    ) -> Generator[None, None, tuple[tuple[Leaf, ...], tuple[Pack, ...]]]:
        """(leaves, packs) for the manifest; every pack is durable once `finish` has returned.

        Yields after each chunk: another thread may go on there. Raises
        StoreError; SaveFailed if a file could not be copied; TornRead; DamagedObject.
        """
        yield from self._write(snapshot)
        leaves = tuple(
            Leaf(leaf.path, leaf.source.dtype, leaf.shape, tuple(filter(None, chunks)))
            for leaf, chunks in zip(snapshot.leaves, self._chunks, strict=True)
        )
        return leaves, tuple(self._packs)

    def finish(self) -> None:
        """Wait for the packs that are still on their way. Raises StoreError."""
        start = time.perf_counter()
        self._threads.wait()
        self.finish_s = time.perf_counter() - start
        self._threads.check()

    def close(self) -> None:
        """Let go of memory and threads, whatever became of the save."""
        if self._open is not None:
            self._open.stream.close()
        self._encoding.close()
        self._threads.stop()

    def _write(self, snapshot: Snapshot) -> Generator[None, None, None]:
        snapshot.overlap.reach()
        small: list[_Piece] = []
        large: list[_Piece] = []
        for position, leaf in enumerate(snapshot.leaves):
            source = leaf.source
            self._chunks.append([])
            # A chunk lies in two blocks at most: there are always enough.
            if leaf.share is None:
                cut = self._cutting.boxes(leaf.path, source, self._staging.block_bytes)
            else:
                cut = leaf.share.boxes
            for number, box in enumerate(cut):
                piece = _Piece(leaf, position, number, *box)
                self._chunks[position].append(None)
                in_memory = leaf.data is not None and piece.nbytes <= SMALL_BYTES
                (small if in_memory else large).append(piece)
        self._cutting.tell_unseen(leaf.path for leaf in snapshot.leaves)
        # What is small is known before a pack is begun, so that the pack's header has no
        # room for thousands of entries that it will not have.
        new: list[_Piece] = []
        for first in range(0, len(small), _AT_ONCE):
            start = time.perf_counter()
            some = small[first : first + _AT_ONCE]
            new += [piece for piece in some if not self._is_stored(piece)]
            self.digest_s += time.perf_counter() - start
            yield
        # What is read in place first: what was not reached at the barrier is copied there.
        large.sort(key=lambda piece: piece.leaf.live is None)
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
        if self._stored is not None:
            piece.place = self._stored.take(
                piece.digest, piece.nbytes, piece.itemsize, (piece.leaf.path, piece.start)
            )
        if piece.place is None:
            return False
        self._reusable.append(piece)
        return True

    def _take(self, snapshot: Snapshot, piece: _Piece) -> None:
        """Bring a chunk into the open pack, unless it is stored already."""
        stream = self._stream(piece)
        encode = self._is_encoded(piece)
        if encode:
            room = [self._encoding.room(piece.nbytes)]
        else:
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
        if encode:
            self._put_encoded(piece)
        else:
            self._keep(piece)

    def _is_encoded(self, piece: _Piece) -> bool:
        """Whether it is tried."""
        return self._codec != RAW and piece.nbytes >= MIN_ENCODED_BYTES

    def _put_encoded(self, piece: _Piece) -> None:
        """Bring a chunk, which is in the room for encoding, into the open pack."""
        start = time.perf_counter()
        data = self._encoding.encoded(piece.nbytes, piece.itemsize)
        self.compress_s += time.perf_counter() - start
        if data is None:
            self._put(piece, self._encoding.room(piece.nbytes))
        else:
            self._put(piece, data, self._codec)

    def _put(self, piece: _Piece, data: memoryview, codec: str = RAW) -> None:
        assert self._open is not None
        at = 0
        for part in self._open.stream.room(data.nbytes):
            copy_bytes(part, data[at : at + part.nbytes])
            at += part.nbytes
        self._keep(piece, data.nbytes, codec)

    def _keep(self, piece: _Piece, nbytes: int | None = None, codec: str = RAW) -> None:
        """A chunk is part of the open pack: its `nbytes`, by default its own, are there."""
        pack = self._open
        assert pack is not None
        entry = piece.entry()
        if codec != RAW:
            assert nbytes is not None
            entry = entry.encoded(codec, nbytes)
        at = pack.stream.keep(entry.nbytes)
        pack.entries.append(entry)
        pack.kept.append((piece, at, entry.nbytes, codec))
        self.packed_nbytes += piece.nbytes

    def _stream(self, piece: _Piece) -> PackStream | WholePack:
        """The open pack, with room for one more piece."""
        if self._open is not None and self._open.stream.nbytes + piece.nbytes > self._pack_bytes:
            self._finish_pack()
        if self._open is None and self._whole:
            self._open = _OpenPack(
                WholePack(self._writer, self._save, self._staging, self._threads)
            )
        if self._open is None:
            # A pack that is needed for a half already is kept: nothing moves out of it.
            used = self._used()
            doubtful = [p for p in self._reusable if not _is_kept(p, used)]
            left = [piece, *self._candidates, *doubtful]
            self._open = _OpenPack(
                PackStream(
                    self._writer,
                    self._save,
                    self._staging,
                    self._threads,
                    head_nbytes=header_room(map(self._largest_entry, left), self._metadata),
                    at_most_bytes=min(self._pack_bytes, sum(p.nbytes for p in left)),
                )
            )
        return self._open.stream

    def _largest_entry(self, piece: _Piece) -> PackChunk:
        """What its entry in a header takes at most."""
        codec = piece.place.codec if piece.place else RAW
        if self._is_encoded(piece):
            codec = self._codec
        entry = piece.entry()
        return entry if codec == RAW else entry.widest(codec)

    def _finish_pack(self) -> None:
        if self._open is None:
            return
        pack = self._open
        self._encoding.close()  # a long header needs a block
        if pack.entries:
            made = pack.stream.finish(pack.entries, self._metadata)
            number, start = self._number(made), made.head_nbytes
            for piece, at, nbytes, codec in pack.kept:
                self._refer(piece, number, start + at, nbytes, codec)
        pack.stream.close()
        self._open = None

    def _reuse(self, snapshot: Snapshot) -> Generator[None, None, None]:
        """Refer to stored chunks, but move those out of packs that hold little else."""
        used = self._used()
        moving: deque[_Piece] = deque()
        for piece in self._reusable:
            if _is_kept(piece, used):
                assert piece.place is not None
                pack, at, nbytes, codec = piece.place
                self._refer(piece, self._number(pack), at, nbytes, codec)
            else:
                moving.append(piece)
        self._reusable = []
        if sum(piece.place.nbytes for piece in moving if piece.place) >= OWN_PACK_BYTES:
            self._finish_pack()  # what does not change lies apart from what does
        self._candidates = moving
        while moving:
            piece = moving.popleft()
            if piece.leaf.data is not None:
                self._take(snapshot, piece)
            else:
                self._move(piece)
            yield

    def _used(self) -> Counter[str]:
        """Bytes of each stored pack that this checkpoint refers to so far."""
        used: Counter[str] = Counter()
        for piece in self._reusable:
            assert piece.place is not None
            used[piece.place.pack.name] += piece.place.nbytes
        return used

    def _move(self, piece: _Piece) -> None:
        """Copy a chunk from where it is stored: the live one may have changed by now."""
        place = piece.place
        assert place is not None
        stream = self._stream(piece)
        encode = self._is_encoded(piece)
        try:
            if place.codec != RAW:
                stored = self._encoding.checked(
                    lambda into: self._read_back(place, [into]),
                    place.nbytes,
                    piece.nbytes,
                    piece.itemsize,
                    piece.digest,
                )
                self._put(piece, stored, place.codec)
                return
            room = [self._encoding.room(piece.nbytes)] if encode else stream.room(piece.nbytes)
            self._read_back(place, room)
            if digest_of(room) != piece.digest:
                raise Undecodable("they do not match their digest")
        except Undecodable as error:
            raise DamagedObject(
                keys.pack_key(place.pack.name),
                f"the bytes at {place.offset}: {error}",
                leaf=piece.leaf.path,
            ) from None
        if encode:
            self._put_encoded(piece)
        else:
            self._keep(piece)

    def _read_back(self, place: Place, room: Sequence[memoryview]) -> None:
        at = place.offset
        for part in room:
            self._writer.read_pack(place.pack, at, part)
            at += part.nbytes

    def _refer(self, piece: _Piece, pack: int, at: int, nbytes: int, codec: str) -> None:
        self._chunks[piece.position][piece.number] = Chunk(
            piece.start, piece.extent, pack, at, nbytes, piece.digest, codec
        )

    def _number(self, pack: Pack) -> int:
        if pack.name not in self._index:
            self._index[pack.name] = len(self._packs)
            self._packs.append(pack)
        return self._index[pack.name]


def _is_kept(piece: _Piece, used: Counter[str]) -> bool:
    assert piece.place is not None
    pack = piece.place.pack
    return used[pack.name] * WORTH_KEEPING >= pack.nbytes
