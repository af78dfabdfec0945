"""Reading a checkpoint's bytes: in parallel, each chunk verified before it is used.

Each thread has one staging block, which it fills again and again: a batch of chunks is
read into it, compared there with the digests, and only then given to where it goes. A
compressed chunk is decoded into a second block first. So the memory of a restore beside the
state itself is `Store.parallel` times a block, or two, and nothing live ever holds a byte that was
not verified. Reasons and numbers: docs/design/restore.md.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import NamedTuple

from holdfast.core.adapters import Destination
from holdfast.core.codecs import PACKAGE_HINT, can_decode, decoded_nbytes
from holdfast.core.digest import digest
from holdfast.core.group import ALONE, Ranks
from holdfast.core.leaves import chunks_for
from holdfast.core.plan import itemsize
from holdfast.core.records import Chunk, Leaf, Manifest, Pack, Record
from holdfast.core.shuffle_zstd import Undecodable, decode
from holdfast.core.threads import share_out
from holdfast.core.types import KiB, MiB
from holdfast.core.values import collector_paused
from holdfast.errors import DamagedObject, ObjectNotFound, StateError
from holdfast.manager.progress import current_work
from holdfast.manager.staging import new_block
from holdfast.repo import keys
from holdfast.repo.repo import Repo
from holdfast.stores.base import BLOCK_ALIGNMENT

# Neighbouring chunks are fetched in one read, so that 20,000 small tensors do not
# cost 20,000 calls; a hole up to this size is cheaper to read than to skip.
READ_BYTES = 8 * MiB
# Of files, where a call costs microseconds: fresh memory to read into costs more.
_FILE_READ_BYTES = 2 * MiB
_HOLE_BYTES = 64 * KiB
# A list has the sizes of a thousand packs, and an object store takes as long for it as for one.
_LIST_FROM = 8
# Long reads are made of whole pages at page-aligned offsets: a store can then read them
# past the page cache. The few bytes around the chunks are not worth a call of their own.
_WHOLE_PAGES_FROM = 1 * MiB

Sink = Callable[[Sequence[int], Sequence[int], memoryview], None]
"""Takes the verified bytes of a box of the leaf, as `Destination.write`. From any thread;
must not keep the view."""


class Wanted(NamedTuple):
    """A chunk to read, and what to do with its bytes."""

    leaf: Leaf
    chunk: Chunk
    sink: Sink
    shared: bool = False
    """Other ranks want it, too."""


@dataclass(frozen=True)
class _Batch:
    """Chunks of one pack that are read together."""

    pack: Pack
    offset: int
    nbytes: int
    items: Sequence[Wanted]

    @property
    def shared(self) -> bool:
        return any(item.shared for item in self.items)


class _Memory(NamedTuple):
    """Of one thread."""

    block: memoryview
    """For the largest batch."""
    decoded: memoryview
    """For the largest chunk that is compressed."""


class ChunkReader:
    """Reads chunks of one checkpoint."""

    def __init__(
        self, repo: Repo, record: Record, manifest: Manifest, ranks: Ranks = ALONE
    ) -> None:
        """`ranks`: with whom this process reads the checkpoint."""
        self._repo = repo
        self._ranks = ranks
        self._record = record
        self._manifest = manifest
        self.bytes_read = 0
        self._work = current_work()
        self._lock = threading.Lock()

    def check_packs(self, leaves: Iterable[Leaf]) -> None:
        """Compare the sizes of the packs that `leaves` need with what the manifest says.

        Before anything is allocated for them. Raises DamagedObject, CheckpointRemoved.
        """
        self._check_packs({chunk.pack for leaf in leaves for chunk in leaf.chunks})

    def _check_packs(self, packs: Collection[int]) -> None:
        needed = sorted(packs)
        sizes = self._repo.pack_sizes() if len(needed) >= _LIST_FROM else {}
        for index in needed:
            pack = self._manifest.packs[index]
            # Of a parent, or newer than the list: asked for by itself.
            size = None if pack.run else sizes.get(pack.name)
            try:
                size = self._repo.pack_size(pack) if size is None else size
            except ObjectNotFound as error:
                self._missing(pack, error)
            else:
                if size != pack.nbytes:
                    raise DamagedObject(
                        keys.pack_key(pack.name), f"it has {size} bytes, not {pack.nbytes}"
                    )

    def fetch(self, requests: Sequence[tuple[int, Destination]]) -> None:
        """Read and verify these leaves now, or the parts of them that are wanted; raises as
        `check_packs` and `read`."""
        wanted = wanted_for(self._manifest, requests, self._ranks)
        self._check_packs({one.chunk.pack for one in wanted})
        self.read(wanted)

    def read(self, wanted: Sequence[Wanted]) -> None:
        """Deliver every chunk to its sink. The first error stops the rest.

        Raises DamagedObject naming the leaf; CheckpointRemoved; StoreUnavailable; what
        sinks raise; and StateError, with nothing read, if a package is missing.
        """
        with collector_paused():
            batches = self._batches(wanted)
        self._work.extend(sum(batch.nbytes for batch in batches))
        self._each(self._begun_apart(batches), self._read)

    def _begun_apart(self, batches: list[_Batch]) -> list[_Batch]:
        """Ranks that want the same begin at different places: of one machine each then finds in
        the page cache what the others have read."""
        if not any(batch.shared for batch in batches):
            return batches
        first = len(batches) * self._ranks.rank // self._ranks.size
        return batches[first:] + batches[:first]

    def survey(self, wanted: Sequence[Wanted]) -> list[DamagedObject]:
        """As `read`, but go on after damage and return all of it (for `verify`)."""
        problems: list[DamagedObject] = []

        def attempt(batch: _Batch, memory: _Memory) -> None:
            try:
                self._read(batch, memory)
                return
            except DamagedObject:
                pass  # find out which of its chunks it is
            for item in batch.items:
                alone = _Batch(batch.pack, item.chunk.offset, item.chunk.nbytes, (item,))
                try:
                    self._read(alone, memory)
                except DamagedObject as error:
                    problems.append(error)

        self._each(self._batches(wanted), attempt)
        return problems

    def _batches(self, wanted: Sequence[Wanted]) -> list[_Batch]:
        most = READ_BYTES if self._repo.store.whole_bytes else min(READ_BYTES, _FILE_READ_BYTES)
        return _batches(self._manifest, wanted, most)

    def _each(self, batches: Sequence[_Batch], work: Callable[[_Batch, _Memory], None]) -> None:
        """Do `work` on every batch, with staging blocks that are large enough for it.

        In threads, which take the batches in order; nothing else of this process reads
        further ahead. The first error ends it once the work in progress is done.
        """
        largest = max((batch.nbytes for batch in batches), default=0)
        encoded = [item for batch in batches for item in batch.items if item.chunk.codec]
        self._check_packages(encoded)
        decoded = max((decoded_nbytes(item.leaf, item.chunk) for item in encoded), default=0)

        def run(batches: Iterator[_Batch]) -> None:
            room = new_block(decoded) if decoded else memoryview(b"")
            memory = _Memory(new_block(largest), room)
            for batch in batches:
                work(batch, memory)

        share_out(batches, run, threads=self._repo.store.parallel, name="holdfast-read")

    def _check_packages(self, encoded: Sequence[Wanted]) -> None:
        """Before any byte goes anywhere: it is no damage, and all of the restore or nothing."""
        for item in encoded:
            if not can_decode(item.chunk.codec):
                raise StateError(
                    f"checkpoint {self._repo.address}@{self._record.step} is compressed with "
                    f"zstd ({item.leaf.path!r}, for one), and the package that decompresses is "
                    "not installed",
                    hint=f"{PACKAGE_HINT} and try again. Nothing was changed.",
                )

    def _read(self, batch: _Batch, memory: _Memory) -> None:
        """Read into the block, verify and deliver. Damage is looked at twice: what came may
        be other bytes than what is stored."""
        try:
            self._read_once(batch, memory, partial(self._repo.read_pack, shared=batch.shared))
        except DamagedObject:
            if self._repo.has_copy:
                self._read_nearest(batch, memory)
            else:
                self._read_once(batch, memory, self._repo.read_pack)

    def _read_nearest(self, batch: _Batch, memory: _Memory) -> None:
        """All from the copy; if it is damaged as well, each chunk from where it is right."""
        try:
            self._read_once(batch, memory, self._repo.read_copy)
            return
        except DamagedObject:
            pass
        for item in batch.items:
            alone = _Batch(batch.pack, item.chunk.offset, item.chunk.nbytes, (item,))
            try:
                self._read_once(alone, memory, self._repo.read_pack)
            except DamagedObject:
                self._read_once(alone, memory, self._repo.read_copy)

    def _read_once(
        self, batch: _Batch, memory: _Memory, read: Callable[[Pack, int, memoryview], None]
    ) -> None:
        buffer = memory.block[: batch.nbytes]
        key = keys.pack_key(batch.pack.name)
        try:
            read(batch.pack, batch.offset, buffer)
        except ObjectNotFound as error:
            self._missing(batch.pack, error)
        except DamagedObject as error:
            raise DamagedObject(key, error.reason, leaf=batch.items[0].leaf.path) from None
        for leaf, chunk, sink, _ in batch.items:
            at = chunk.offset - batch.offset
            data = buffer[at : at + chunk.nbytes]
            if chunk.codec:
                stored, data = data, memory.decoded[: decoded_nbytes(leaf, chunk)]
                try:
                    decode(stored, itemsize(leaf.dtype), data)
                except Undecodable as error:
                    raise DamagedObject(
                        key,
                        f"the bytes at {chunk.offset} cannot be decompressed ({error})",
                        leaf=leaf.path,
                    ) from None
            if digest(data) != chunk.digest:
                raise DamagedObject(
                    key,
                    f"the bytes at {chunk.offset} do not match their digest",
                    leaf=leaf.path,
                )
            sink(chunk.start, chunk.shape, data)
        with self._lock:
            self.bytes_read += batch.nbytes
            self._work.done_nbytes += batch.nbytes

    def _missing(self, pack: Pack, error: ObjectNotFound) -> None:
        self._repo.explain_absence(self._record, keys.pack_key(pack.name), error)


def pack_heads(manifest: Manifest, packs: Collection[int] | None = None) -> list[Wanted]:
    """The headers of all packs, or of these: our reads do not use them, other readers do.

    They lie before the first chunk, so they are read with it.
    """
    return [
        Wanted(
            Leaf("the header", "U8", (), ()),
            Chunk((), (), index, 0, pack.head_nbytes, pack.head_digest),
            lambda start, shape, data: None,
        )
        for index, pack in enumerate(manifest.packs)
        if pack.head_nbytes and (packs is None or index in packs)
    ]


def wanted_for(
    manifest: Manifest, requests: Iterable[tuple[int, Destination]], ranks: Ranks = ALONE
) -> list[Wanted]:
    """The chunks of requested leaves, written to their destinations: of a destination that
    holds a part, those that reach into it. What one of several `ranks` wants as a whole, all
    do."""
    wanted: list[Wanted] = []
    for index, destination in requests:
        leaf = manifest.leaves[index]
        write = destination.write
        shared = ranks.size > 1 and getattr(destination, "part", None) is None
        wanted += [Wanted(leaf, chunk, write, shared) for chunk in chunks_for(leaf, destination)]
    return wanted


def _batches(manifest: Manifest, wanted: Iterable[Wanted], most: int) -> list[_Batch]:
    """The reads that get all chunks, of `most` bytes where no chunk is longer, in the order in
    which they lie in the packs."""
    ordered = sorted(wanted, key=lambda item: (item.chunk.pack, item.chunk.offset))
    batches: list[_Batch] = []
    group: list[Wanted] = []
    start = end = 0
    for item in ordered:
        chunk = item.chunk
        stop = chunk.offset + chunk.nbytes
        joins = (
            group
            and group[0].chunk.pack == chunk.pack
            and chunk.offset - end <= _HOLE_BYTES
            and stop - start <= most
        )
        if not joins:
            if group:
                batches.append(_batch(manifest, group, start, end))
            group, start = [], chunk.offset
        group.append(item)
        end = stop if len(group) == 1 else max(end, stop)
    if group:
        batches.append(_batch(manifest, group, start, end))
    return batches


def _batch(manifest: Manifest, group: list[Wanted], start: int, end: int) -> _Batch:
    pack = manifest.packs[group[0].chunk.pack]
    if end - start >= _WHOLE_PAGES_FROM:
        start -= start % BLOCK_ALIGNMENT
        end = min(-(-end // BLOCK_ALIGNMENT) * BLOCK_ALIGNMENT, pack.nbytes)
    return _Batch(pack, start, end - start, group)
