"""Copying checkpoints of a run into another run, its copy, whatever stores the two are in.

A copy has the run's id, and of each checkpoint the same manifest, byte for byte, and packs of
the same names: it is the same run at another place. It has a log of its own, to which this
process adds as its writer, by the ordinary commit protocol. Reasons, and what may happen at
which moment: docs/design/replication.md.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from types import TracebackType
from typing import Self

from holdfast.core.process import is_alive
from holdfast.core.records import Entry, Holder, Manifest, Pack, Record
from holdfast.errors import (
    BaseLost,
    CheckpointRemoved,
    CorruptionError,
    DamagedObject,
    ObjectNotFound,
)
from holdfast.repo import keys
from holdfast.repo.check import MANIFEST_MAX_BYTES
from holdfast.repo.copies import (
    Source,
    as_copied,
    changes_of,
    check_line,
    check_target,
    look_at,
    put_manifest,
    updated,
    with_copy,
)
from holdfast.repo.head import Draft, Head
from holdfast.repo.holding import refuse_if_held
from holdfast.repo.pace import Pace
from holdfast.repo.pack_copy import PackJob, copy_packs, size_problem
from holdfast.repo.ranges import Check, Proven, Range, ranges_of
from holdfast.repo.record import not_held
from holdfast.repo.repo import Repo
from holdfast.repo.saves import Save
from holdfast.repo.writer import Retire, Writer
from holdfast.stores.addresses import join_address, relative_address

# Packs that others' transactions took while we counted on them are copied once more.
_ATTEMPTS = 5
# More manifests are not read to learn what is known of a pack: then it is read itself.
_MANIFESTS = 8

Alive = Callable[[Holder], bool | None]


@dataclass(frozen=True)
class Copied:
    """What became of one checkpoint."""

    record: Record
    """As the target lists it."""
    added: bool
    """It was not listed there before."""
    packs: Mapping[str, int] = field(default_factory=dict[str, int])
    """Packs that were written -> bytes."""
    replaced: tuple[str, ...] = ()
    """Keys of objects that were damaged or missing there, although it was listed."""

    @property
    def nbytes(self) -> int:
        return sum(self.packs.values())


class Replicator:
    """Copies checkpoints of `source` into `target`, whose writer it is until it is closed.

    Opened with `open`. From one thread at a time; `pace` from any.
    """

    def __init__(
        self,
        source: Repo,
        target: Repo,
        writer: Writer,
        *,
        pace: Pace | None = None,
        on_bytes: Callable[[int], None] = lambda nbytes: None,
    ) -> None:
        self.source = source
        self.target = target
        self.writer = writer
        self.pace = pace or Pace()
        self._on_bytes = on_bytes
        self._sizes = target.pack_sizes()
        """Packs that are in the target, or were: name -> bytes."""
        ids = (keys.manifest_id(info.key) for info in target.store.list(keys.MANIFESTS))
        self._manifests = {id for id in ids if id}
        self._in_doubt: set[str] = set()
        """Checkpoints whose entry was sent and may have landed."""
        self._proven: dict[str, set[Proven]] = {}
        """Of packs in the target, what was found to be right when it came there."""

    @classmethod
    def open(
        cls,
        source: Repo,
        target: Repo,
        *,
        take_over: bool = False,
        alive: Alive = is_alive,
        pace: Pace | None = None,
        on_bytes: Callable[[int], None] = lambda nbytes: None,
    ) -> Self:
        """Become the writer of `target`, which is made a copy of `source` where there is none.

        Refuses where a process writes the target, or may do so on another machine, unless
        `take_over`, or `alive` says that it does not. Raises RunHeld; OtherRun where the
        target is no copy of the source, or went on by itself; NoStore where the source is
        none; StoreUnfit, StoreReadOnly, StoreUnavailable.
        """
        of = look_at(source)
        check_target(source, target, of)
        refuse_if_held(_readable(target), target.address, take_over=take_over, alive=alive)
        info = source.info()
        parent = ""
        if info.parent:
            address, _, id = info.parent.rpartition("@")
            there = join_address(source.address, address)
            parent = f"{relative_address(target.address, there)}@{id}"
        writer = Writer.open(
            target,
            take_over=take_over,
            parent=parent,
            copy_of=info,
            above=of.head.entry.epoch,
            alive=lambda holder: alive(holder) is not False,
        )
        try:
            check_line(target.address, of, target.log.records(writer.head.entry))
            return cls(source, target, writer, pace=pace, on_bytes=on_bytes)
        except BaseException:
            writer.close()
            raise

    def close(self) -> None:
        """Give the target up."""
        self.writer.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def records(self) -> tuple[Record, ...]:
        """What the target lists, as of the last commit of this process."""
        with self.target.lock:
            return self.target.log.records(self.writer.head.entry)

    def sizes(self) -> dict[str, int]:
        """Packs that are in the target, for all that is known: name -> bytes. From any thread."""
        return self._sizes.copy()

    # -- one checkpoint --------------------------------------------------------

    def copy(
        self,
        id: str,
        *,
        verify: bool = False,
        keep: str | None = None,
        retire: Retire = lambda records: (),
    ) -> Copied:
        """Have the target list the source's checkpoint `id`, whole and with what the source's
        log says of it now. Returns when that is durable.

        Packs that the target has are not copied again: their bytes were compared with the
        digests when they came there, or are now; with `verify`, in any case. What is missing
        or damaged there is replaced. `keep` is the retention rule to record, the source's if
        None; `retire` names what the target gives up in the same entry.

        Raises CheckpointRemoved if the source no longer lists it; DamagedObject if it is
        damaged in the source: nothing was listed then; Fenced, CommitUnknown, StoreFull,
        StoreUnavailable; CopyStopped. Copying again goes on with what is there.
        """
        of = look_at(self.source)
        record = of.record(id)
        if record is None:
            raise CheckpointRemoved(
                f"checkpoint {id:.12} of {self.source.address} was removed before it was copied"
            )
        data, manifest = self.source.sealed_manifest(record)
        copy = as_copied(record, manifest)
        save = self.writer.begin()
        save.manifest = id
        save.copied.update(copy.packs)
        packs: dict[str, int] = {}
        replaced: list[str] = []
        try:
            attempts = _ATTEMPTS
            while True:
                own = self._bring(record, data, manifest, verify, packs, replaced)
                try:
                    added = self._list(of, copy, own, keep, retire, save)
                    break
                except BaseLost:
                    attempts -= 1
                    if not attempts:
                        raise
                    self.writer.refresh()
        except BaseException:
            if save.entry is not None:
                self._in_doubt.add(id)
            self.writer.abandon(save)
            raise
        listed = next(r for r in reversed(self.records()) if r.id == id)
        return Copied(listed, added, packs, () if added else tuple(replaced))

    def _bring(
        self,
        record: Record,
        data: bytes,
        manifest: Manifest,
        verify: bool,
        packs: dict[str, int],
        replaced: list[str],
    ) -> set[str]:
        """Have packs and manifest in the target, durable; the names of packs that no other
        checkpoint there holds."""
        live = {name for listed in self.records() for name in listed.packs}
        ranges = ranges_of(manifest)
        known = not verify and self._has_manifest(record.id, data)
        jobs: list[PackJob] = []
        own: set[str] = set()
        suspects: list[Pack] = []
        for pack in manifest.packs:
            there = self._sizes.get(pack.name)
            if pack.name not in live:
                own.add(pack.name)
                if there is not None:
                    there = self._size_now(pack.name)  # another process may have removed it
            if there == pack.nbytes:
                if not known:
                    suspects.append(pack)
                continue
            jobs.append(self._job(record, pack, ranges[pack.name], replaces=there is not None))
        open_ = self._not_proven({pack.name: ranges[pack.name] for pack in suspects}, verify)
        wrong = [p for p in suspects if not self._is_right(p, open_.get(p.name, ()))]
        mends = [self._job(record, pack, ranges[pack.name], replaces=True) for pack in wrong]
        if jobs or mends:
            self._forget_unfinished(record.id)

        def done(job: PackJob) -> None:
            packs[job.name] = self._sizes[job.name] = job.nbytes
            replaced.append(job.key)

        def bring(jobs: Sequence[PackJob]) -> None:
            store = self.target.store
            copy_packs(jobs, store, pace=self.pace, on_bytes=self._on_bytes, on_pack=done)

        # In this order: a manifest that is in the target says that what is there of its packs
        # was compared with it. So a copy that was interrupted goes on without reading back.
        bring(mends)
        if self._put_manifest(record.id, data):
            replaced.append(keys.manifest_key(record.id))
        bring(jobs)
        # No more than one manifest's worth: what the next one shares is mostly in this one.
        self._proven = {
            name: self._proven.get(name, set()) | {r.proves for r in found}
            for name, found in ranges.items()
        }
        return own

    def _job(
        self, record: Record, pack: Pack, ranges: Sequence[Range], *, replaces: bool
    ) -> PackJob:
        key = keys.pack_key(pack.name)
        try:
            problem = size_problem(pack.name, self.source.pack_size(pack), pack.nbytes)
        except ObjectNotFound as error:
            self.source.explain_absence(record, key, error)
        if problem:
            raise problem

        def read(offset: int, into: memoryview) -> None:
            try:
                self.source.read_pack(pack, offset, into)
            except ObjectNotFound as error:
                self.source.explain_absence(record, key, error)

        return PackJob(pack.name, pack.nbytes, read, [Check(pack.name, ranges)], replaces)

    def _size_now(self, name: str) -> int | None:
        try:
            return self.target.store.size(keys.pack_key(name))
        except ObjectNotFound:
            return None

    def _not_proven(
        self, ranges: Mapping[str, Sequence[Range]], verify: bool
    ) -> dict[str, set[Range]]:
        """Of packs that are in the target, what was not compared when they came there.

        A pack that one checkpoint brought may hold chunks that only others use.
        """
        open_ = {name: set(found) for name, found in ranges.items()}
        if verify:
            return open_
        _subtract(open_, self._proven)
        manifests = 0
        for listed in reversed(self.records()):
            if not open_ or manifests == _MANIFESTS:
                break
            if open_.keys().isdisjoint(listed.packs):
                continue
            manifests += 1
            try:
                found = ranges_of(self.target.manifest(listed))
            except (CorruptionError, CheckpointRemoved):
                continue
            _subtract(open_, {name: {r.proves for r in rs} for name, rs in found.items()})
        return open_

    def _is_right(self, pack: Pack, ranges: Collection[Range]) -> bool:
        """Whether the pack that is in the target has these bytes."""
        if not ranges:
            return True

        def read(offset: int, into: memoryview) -> None:
            self.target.store.read_into(keys.pack_key(pack.name), offset, into)

        job = PackJob(pack.name, pack.nbytes, read, [Check(pack.name, ranges)])
        try:
            copy_packs([job], None, pace=self.pace)
        except DamagedObject:
            return False
        return True

    # -- manifests -------------------------------------------------------------

    def _has_manifest(self, id: str, data: bytes) -> bool:
        if id not in self._manifests:
            return False
        try:
            found = self.target.store.get(keys.manifest_key(id), max_bytes=MANIFEST_MAX_BYTES)
        except (ObjectNotFound, DamagedObject):
            return False
        return found == data

    def _forget_unfinished(self, id: str) -> None:
        """Before packs are written for another checkpoint, which are compared with that one's
        digests only: an unlisted manifest would say too much of them."""
        listed = {record.id for record in self.records()}
        unfinished = self._manifests - listed - self._in_doubt - {id}
        if unfinished:
            self.target.store.delete(map(keys.manifest_key, unfinished))
            self._manifests -= unfinished

    def _put_manifest(self, id: str, data: bytes) -> bool:
        """Put it unless it is there; whether it was missing or damaged."""
        if self._has_manifest(id, data):
            self.target.store.settle(keys.manifest_key(id))
            return False
        put_manifest(self.target, id, data)
        self._manifests.add(id)
        return True

    # -- the list --------------------------------------------------------------

    def _list(
        self,
        of: Source,
        copy: Record,
        own: Collection[str],
        keep: str | None,
        retire: Retire,
        save: Save,
    ) -> bool:
        """Commit the checkpoint; whether it was not listed before. Raises BaseLost."""
        added = True

        def change(head: Head, records: tuple[Record, ...]) -> Draft:
            nonlocal added
            if lost := not_held(copy, records, own):
                raise BaseLost(lost)
            old = next((r for r in records if r.id == copy.id), None)
            added = old is None
            listed = with_copy(records, copy)
            retired = set(retire(listed)) - {copy.id}
            kept = tuple(r for r in listed if r.id not in retired or r.pins)
            return Draft(kept, "copy", changes_of(of, head, records, kept, keep))

        self.writer.transact(change, save)
        return added

    def update(
        self,
        ids: Collection[str] | None = None,
        *,
        keep: str | None = None,
        retire: Retire = lambda records: (),
    ) -> Head:
        """Bring metrics, tags, notes and pins of copies up to date, of all or of `ids`, and
        take what `retire` names off the list, in one entry.

        Pinned ones stay. Raises Fenced, CommitUnknown, StoreUnavailable.
        """
        of = look_at(self.source)

        def change(head: Head, records: tuple[Record, ...]) -> Draft:
            listed = updated(records, of.records, ids)
            retired = set(retire(listed))
            kept = tuple(r for r in listed if r.id not in retired or r.pins)
            return Draft(kept, "sync", changes_of(of, head, records, kept, keep))

        return self.writer.transact(change)


def _subtract(open_: dict[str, set[Range]], proven: Mapping[str, Collection[Proven]]) -> None:
    """Take out of `open_` what is proven, and the packs of which nothing is left."""
    for name in list(open_):
        known = proven.get(name, ())
        left = {r for r in open_[name] if r.proves not in known}
        if left:
            open_[name] = left
        else:
            del open_[name]


def _readable(target: Repo) -> Entry | None:
    try:
        head = target.head()
    except CorruptionError:
        return None  # no entry says who holds it
    return head.entry if head else None
