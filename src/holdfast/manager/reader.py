"""Reading a checkpoint's bytes: in parallel, each chunk verified before it is used."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass

from holdfast.core.adapters import Destination
from holdfast.core.digest import digest
from holdfast.core.progress import current_work
from holdfast.core.records import Chunk, Leaf, Manifest, Pack, Record
from holdfast.core.types import KiB, MiB
from holdfast.errors import DamagedObject, ObjectNotFound
from holdfast.repo import keys
from holdfast.repo.repo import Repo

THREADS = 4
# Neighbouring chunks are fetched in one read, so that 20,000 small tensors do not
# cost 20,000 calls; a hole up to this size is cheaper to read than to skip.
READ_BYTES = 8 * MiB
_HOLE_BYTES = 64 * KiB

Sink = Callable[[Leaf, Chunk, memoryview], None]
"""Takes the verified bytes of a chunk. From any thread; must not keep the view."""


@dataclass(frozen=True)
class Wanted:
    """A chunk to read, and what to do with its bytes."""

    leaf: Leaf
    chunk: Chunk
    sink: Sink


@dataclass(frozen=True)
class _Batch:
    """Chunks of one pack that are read together."""

    pack: Pack
    offset: int
    nbytes: int
    items: tuple[Wanted, ...]


class ChunkReader:
    """Reads chunks of one checkpoint."""

    def __init__(self, repo: Repo, record: Record, manifest: Manifest) -> None:
        self._repo = repo
        self._record = record
        self._manifest = manifest
        self._local = threading.local()
        self.bytes_read = 0
        self._work = current_work()
        self._lock = threading.Lock()

    def check_packs(self, leaves: Iterable[Leaf]) -> None:
        """Compare the sizes of the packs that `leaves` need with what the manifest says.

        Before anything is allocated for them. Raises DamagedObject, CheckpointRemoved.
        """
        for index in sorted({chunk.pack for leaf in leaves for chunk in leaf.chunks}):
            pack = self._manifest.packs[index]
            try:
                size = self._repo.pack_size(pack)
            except ObjectNotFound as error:
                self._missing(pack, error)
            else:
                if size != pack.nbytes:
                    raise DamagedObject(
                        keys.pack_key(pack.name), f"it has {size} bytes, not {pack.nbytes}"
                    )

    def fetch(self, requests: Sequence[tuple[int, Destination]]) -> None:
        """Read and verify these leaves now; raises as `check_packs` and `read`."""
        self.check_packs(self._manifest.leaves[index] for index, _ in requests)
        self.read(wanted_for(self._manifest, requests))

    def read(self, wanted: Sequence[Wanted]) -> None:
        """Deliver every chunk to its sink. The first error stops the rest.

        Raises DamagedObject naming the leaf; CheckpointRemoved; StoreUnavailable; and
        what sinks raise.
        """
        batches = list(_batches(self._manifest, wanted))
        self._work.extend(sum(batch.nbytes for batch in batches))
        if len(batches) <= 1:
            for batch in batches:
                self._read(batch)
            return
        with ThreadPoolExecutor(THREADS, thread_name_prefix="holdfast-read") as pool:
            futures = [pool.submit(self._read, batch) for batch in batches]
            done, waiting = wait(futures, return_when=FIRST_EXCEPTION)
            for future in waiting:
                future.cancel()
            wait(waiting)
            for future in done:
                future.result()

    def survey(self, wanted: Sequence[Wanted]) -> list[DamagedObject]:
        """As `read`, but go on after damage and return all of it (for `verify`)."""
        problems: list[DamagedObject] = []

        def attempt(batch: _Batch) -> None:
            try:
                self._read(batch)
                return
            except DamagedObject:
                pass  # find out which of its chunks it is
            for item in batch.items:
                alone = _Batch(batch.pack, item.chunk.offset, item.chunk.nbytes, (item,))
                try:
                    self._read(alone)
                except DamagedObject as error:
                    problems.append(error)

        with ThreadPoolExecutor(THREADS, thread_name_prefix="holdfast-read") as pool:
            for _ in pool.map(attempt, _batches(self._manifest, wanted)):
                pass
        return problems

    def _read(self, batch: _Batch) -> None:
        buffer = self._buffer(batch.nbytes)
        key = keys.pack_key(batch.pack.name)
        try:
            self._repo.read_pack(batch.pack, batch.offset, buffer)
        except ObjectNotFound as error:
            self._missing(batch.pack, error)
        except DamagedObject as error:
            raise DamagedObject(key, error.reason, leaf=batch.items[0].leaf.path) from None
        for item in batch.items:
            at = item.chunk.offset - batch.offset
            data = buffer[at : at + item.chunk.nbytes]
            if digest(data) != item.chunk.digest:
                raise DamagedObject(
                    key,
                    f"the bytes at {item.chunk.offset} do not match their digest",
                    leaf=item.leaf.path,
                )
            item.sink(item.leaf, item.chunk, data)
        with self._lock:
            self.bytes_read += batch.nbytes
            self._work.done_nbytes += batch.nbytes

    def _missing(self, pack: Pack, error: ObjectNotFound) -> None:
        self._repo.explain_absence(self._record, keys.pack_key(pack.name), error)

    def _buffer(self, nbytes: int) -> memoryview:
        """This thread's staging block, grown to the largest batch."""
        block: bytearray | None = getattr(self._local, "block", None)
        if block is None or len(block) < nbytes:
            block = self._local.block = bytearray(max(nbytes, min(READ_BYTES, 2 * nbytes)))
        return memoryview(block)[:nbytes]


def pack_heads(manifest: Manifest) -> list[Wanted]:
    """The headers of all packs: our reads do not use them, other readers do.

    They lie before the first chunk, so they are read with it.
    """
    return [
        Wanted(
            Leaf("the header", "U8", (), ()),
            Chunk((), (), index, 0, pack.head_nbytes, pack.head_digest),
            lambda leaf, chunk, data: None,
        )
        for index, pack in enumerate(manifest.packs)
        if pack.head_nbytes
    ]


def wanted_for(manifest: Manifest, requests: Iterable[tuple[int, Destination]]) -> list[Wanted]:
    """The chunks of requested leaves, written to their destinations."""
    wanted: list[Wanted] = []
    for index, destination in requests:
        leaf = manifest.leaves[index]

        def deliver(
            leaf: Leaf, chunk: Chunk, data: memoryview, to: Destination = destination
        ) -> None:
            to.write(chunk.start, chunk.shape, data)

        wanted.extend(Wanted(leaf, chunk, deliver) for chunk in leaf.chunks)
    return wanted


def _batches(manifest: Manifest, wanted: Iterable[Wanted]) -> Iterator[_Batch]:
    ordered = sorted(wanted, key=lambda item: (item.chunk.pack, item.chunk.offset))
    group: list[Wanted] = []
    start = end = 0
    for item in ordered:
        chunk = item.chunk
        stop = chunk.offset + chunk.nbytes
        joins = (
            group
            and group[0].chunk.pack == chunk.pack
            and chunk.offset - end <= _HOLE_BYTES
            and stop - start <= READ_BYTES
        )
        if not joins:
            if group:
                yield _batch(manifest, group, start, end)
            group, start = [], chunk.offset
        group.append(item)
        end = stop if len(group) == 1 else max(end, stop)
    if group:
        yield _batch(manifest, group, start, end)


def _batch(manifest: Manifest, group: list[Wanted], start: int, end: int) -> _Batch:
    return _Batch(manifest.packs[group[0].chunk.pack], start, end - start, tuple(group))
