"""A run as readers and guests see it: its live checkpoints, their manifests and bytes.

A *guest* is any process that changes the list without being the writer: it tags,
pins, prunes. Its transactions keep the writer's epoch, so the writer rebases on them.
"""

from __future__ import annotations

import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import NoReturn, TypeVar

import msgspec

from holdfast.core.address import printable
from holdfast.core.records import Entry, Manifest, Pack, Record, RunInfo
from holdfast.core.sealed import seal, unseal
from holdfast.core.types import MiB
from holdfast.core.units import format_list
from holdfast.errors import (
    CheckpointNotFound,
    CheckpointRemoved,
    CorruptionError,
    DamagedObject,
    NoStore,
    ObjectNotFound,
    StoreError,
)
from holdfast.repo import keys
from holdfast.repo.check import MANIFEST_MAX_BYTES, check_manifest
from holdfast.repo.head import REBUILT, Draft, Head
from holdfast.repo.layout import difference
from holdfast.repo.log import Log, logger
from holdfast.repo.record import localized
from holdfast.stores.addresses import join_address
from holdfast.stores.base import Store
from holdfast.stores.open import open_store

# A reader that is overtaken between an entry and its segments looks again. Each time some
# commits must have come between, so one that loses so often is slower than all writers.
_LIST_ATTEMPTS = 10

_T = TypeVar("_T")


@dataclass(frozen=True)
class Removal:
    """What a transaction took off the list: deleted once its entry is durable."""

    manifests: tuple[str, ...]
    packs: tuple[str, ...]
    segments: tuple[str, ...]
    borrowed: frozenset[str] = frozenset()
    """Parent runs that no listed checkpoint needs any more."""

    @property
    def keys(self) -> list[str]:
        # Manifests first: a manifest without packs would look like damage to repair.
        return [
            *(keys.manifest_key(id) for id in self.manifests),
            *(keys.pack_key(name) for name in self.packs),
            *(keys.segment_key(name) for name in self.segments),
        ]


def manifest_of(id: str, data: bytes) -> Manifest:
    """The manifest with this id that `data` holds, checked. Raises DamagedObject."""
    key = keys.manifest_key(id)
    found, manifest = unseal(data, Manifest, key)
    if found != id:
        raise DamagedObject(key, "it is not the manifest that the log names")
    check_manifest(manifest, key)
    return manifest


class Repo:
    """One run in one store. Methods may be called from any thread."""

    has_copy = False
    """Whether what is damaged here may be whole elsewhere (`repo.nearest`)."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        self.store = store
        self.clock = clock
        self.log = Log(store, clock=clock)
        self.lock = threading.RLock()
        self._info: RunInfo | None = None
        self._told: tuple[str, ...] = ()
        """Damage of the log that was reported."""
        self._parents: dict[str, Store] = {}
        self._users: tuple[tuple[Record, ...], Counter[str]] = (), Counter()
        """The list that the last commit of this process left, and of it: pack -> how many
        records need it. So a writer that retires one of thousands looks at few."""

    @property
    def address(self) -> str:
        return self.store.address

    # -- reading ---------------------------------------------------------------

    def info(self) -> RunInfo:
        """What `holdfast.json` says; where it is damaged or gone, what the log repeats
        of it. Raises NoStore where there is no run; CorruptionError."""
        if self._info is None:
            self._info = self._read_info()
        return self._info

    def _read_info(self) -> RunInfo:
        try:
            return unseal(self.store.get(keys.RUN_INFO, max_bytes=MiB), RunInfo, keys.RUN_INFO)[1]
        except ObjectNotFound as error:
            problem, cause = f"{keys.RUN_INFO} is missing", error
        except DamagedObject as error:
            problem, cause = error.message, error
        head = self.head()
        if head is not None:
            logger.error("%s: %s; going by its log", printable(self.address), problem)
            return RunInfo(run=head.entry.run, created_s=0.0)  # it does not know when
        if isinstance(cause, DamagedObject):
            raise DamagedObject(
                keys.RUN_INFO,
                cause.reason,
                hint="It is all that there is of this run, which has no log and no checkpoints. "
                f"Unless a process is just beginning it, delete {keys.RUN_INFO} in "
                f"{printable(self.address)} and start again.",
            ) from None
        raise NoStore(
            f"there is no run in {printable(self.address)}",
            hint="Check the address; `holdfast ls FOLDER` lists the runs in a folder.",
        ) from None

    def elsewhere(self) -> str:
        """Where the run is, if here is only what one node keeps of it; "" if that is not so."""
        if "://" in self.address:
            return ""
        try:
            self.info()
        except NoStore:
            from holdfast.repo.mirrors import remembered  # most processes never need it

            return remembered(self.store)
        return ""

    def put_info(self, info: RunInfo) -> bool:
        """Create `holdfast.json`; False if there is one. Raises as `Store.put_new`."""
        created = self.store.put_new(keys.RUN_INFO, [seal(info)[1]])
        if created:
            self._info = info
        return created

    def head(self) -> Head | None:
        """The newest entry, read anew; None for a run that has none yet.

        Damage is logged, once. Raises CorruptionError if no entry can be used, or if
        there is none although there are checkpoints: that is not a new run.
        """
        with self.lock:
            head = self.log.read()
            if head is None and any(
                keys.manifest_id(i.key) for i in self.store.list(keys.MANIFESTS)
            ):
                # The log of a run is older than its manifests: it may be a new one.
                head = self.log.read()
                if head is None:
                    raise CorruptionError(
                        f"the log of {self.address} is missing, but not its checkpoints",
                        hint=REBUILT,
                    )
            if head is not None and head.damage and head.damage != self._told:
                self._told = head.damage
                logger.error(
                    "the log of %s is damaged; it is read as of entry %d:%s\n"
                    "  The run's job rebuilds the list of checkpoints when it starts.",
                    printable(self.address),
                    head.number,
                    format_list(head.damage),
                )
        return head

    def check_log(self, head: Head) -> None:
        """Raise DamagedObject unless everything that the log lists can be known."""
        if head.damage:
            raise DamagedObject(
                f"the log of {self.address}", "its list must be rebuilt first", hint=REBUILT
            )

    def records(self) -> tuple[Record, ...]:
        """Live checkpoints in the order of their commits, oldest first."""
        return self.listed()[1]

    def listed(self) -> tuple[Head | None, tuple[Record, ...]]:
        """The newest entry and all that it lists; (None, ()) for a run that has none yet."""
        return self._newest(self.log.records, ())

    def newest(self, count: int) -> tuple[Record, ...]:
        """The newest `count` checkpoints, newest first. Of a long list only the end is read."""

        def some(entry: Entry) -> tuple[Record, ...]:
            return tuple(islice(self.log.newest_first(entry), count))

        return self._newest(some, ())[1]

    def find(self, wanted: Callable[[Record], bool]) -> Record | None:
        """The newest checkpoint that is `wanted`. Reads no further back than it must."""

        def search(entry: Entry) -> Record | None:
            return next(filter(wanted, self.log.newest_first(entry)), None)

        return self._newest(search, None)[1]

    def _newest(self, read: Callable[[Entry], _T], nothing: _T) -> tuple[Head | None, _T]:
        """The newest entry and what `read` finds in it and its segments."""
        with self.lock:
            head = self.head()
            attempts = _LIST_ATTEMPTS
            while head is not None:
                try:
                    return head, read(head.entry)
                except DamagedObject:
                    # A newer entry may have other segments, and these be deleted.
                    attempts -= 1
                    seen, head = head, self.head()
                    if attempts == 0 or (head is not None and head.id == seen.id):
                        raise
        return None, nothing

    def manifest(self, record: Record) -> Manifest:
        """The manifest of a live checkpoint, checked.

        Raises DamagedObject; CheckpointRemoved if a prune took it meanwhile.
        """
        return self.sealed_manifest(record)[1]

    def sealed_manifest(self, record: Record) -> tuple[bytes, Manifest]:
        """As `manifest`, and its bytes as they are stored."""
        key = keys.manifest_key(record.id)
        try:
            data = self.store.get(key, max_bytes=MANIFEST_MAX_BYTES)
        except ObjectNotFound as error:
            self.explain_absence(record, key, error)
        return data, localized(manifest_of(record.id, data), record.packs)

    def explain_absence(self, record: Record, key: str, cause: Exception) -> NoReturn:
        """Raise CheckpointRemoved or DamagedObject for an object that is not there."""
        if self.find(lambda listed: listed.id == record.id) is None:
            raise CheckpointRemoved(
                f"checkpoint {record.step} of {self.address} was removed while it was read",
                hint="Read again: a newer checkpoint is there.",
            ) from cause
        raise DamagedObject(key, f"it is missing (checkpoint {record.step})") from cause

    def read_pack(self, pack: Pack, offset: int, into: memoryview, *, shared: bool = False) -> None:
        """Fill `into` from a pack of this run or of the parent that holds it. `shared`: see
        `stores.base.Store`.

        Raises ObjectNotFound, DamagedObject, StoreUnavailable.
        """
        self._store_of(pack).read_into(keys.pack_key(pack.name), offset, into, shared=shared)

    def pack_size(self, pack: Pack) -> int:
        """Bytes of the pack as the store reports them. Raises ObjectNotFound."""
        return self._store_of(pack).size(keys.pack_key(pack.name))

    def read_copy(self, pack: Pack, offset: int, into: memoryview) -> None:
        """As `read_pack`, where another place has the run too (`has_copy`), from there."""
        raise ObjectNotFound(keys.pack_key(pack.name), self.address)

    def pack_sizes(self) -> dict[str, int]:
        """Bytes of the run's own packs that are there, by name, as the store lists them."""
        infos = self.store.list(keys.PACKS)
        return {name: info.size_bytes for info in infos if (name := keys.pack_of(info.key))}

    def _store_of(self, pack: Pack) -> Store:
        if not pack.run:
            return self.store
        with self.lock:
            if pack.run not in self._parents:
                self._parents[pack.run] = open_store(join_address(self.address, pack.run))
            return self._parents[pack.run]

    # -- guests' transactions --------------------------------------------------

    def amend(
        self,
        action: str,
        change: Callable[[tuple[Record, ...]], Iterable[Record]],
        *,
        base: Head | None = None,
    ) -> tuple[Head, Removal]:
        """Commit a changed list without becoming the writer; delete what it dropped.

        Raises what `change` raises, NoStore, CommitUnknown, CorruptionError when the
        log must be repaired first.
        """

        def transaction(head: Head, records: tuple[Record, ...]) -> Draft:
            self.check_log(head)
            return Draft(tuple(change(records)), action)

        with self.lock:
            run = self.info().run
            base = base or self.head()
            if base is None:
                raise NoStore(f"the run in {self.address} has no checkpoints yet")
            head, before = self.log.commit(transaction, base=base, run=run)
            removal = self.removed(before, head)
        self.delete(removal)
        return head, removal

    def removed(self, before: Head | None, after: Head) -> Removal:
        """What `before` listed and `after` does not."""
        if before is None:
            return Removal((), (), ())
        old, new = self.log.records(before.entry), self.log.records(after.entry)
        gone, added = difference(old, new)
        known, users = self._users
        if known is not old:  # another process made it
            users = Counter(name for record in old for name in record.packs)
        for record in added:
            users.update(record.packs.keys())
        for record in gone:
            users.subtract(record.packs.keys())
        self._users = new, users
        packs = dict.fromkeys(name for record in gone for name in record.packs)
        borrowed = {run for record in gone for run in record.borrowed}
        if borrowed:
            borrowed.difference_update(*(record.borrowed for record in new))
        segments = {ref.name for ref in after.entry.segments}
        spare = tuple(name for name in packs if not users[name])
        for name in spare:
            del users[name]
        return Removal(
            tuple(record.id for record in gone),
            spare,
            tuple(ref.name for ref in before.entry.segments if ref.name not in segments),
            frozenset(borrowed),
        )

    def delete(self, removal: Removal) -> None:
        """Delete objects that no entry lists. A failure leaves them to gc."""
        self.log.segments.forget(removal.segments)
        if not removal.keys:
            return
        try:
            self.store.delete(removal.keys)
        except StoreError as error:
            logger.warning("could not delete what was retired; gc will: %s", error.message)

    def edit_record(self, action: str, id: str, **fields: object) -> Record:
        """Replace fields of one live record (tags, pins, metrics)."""
        return self.update_record(action, id, lambda record: fields)

    def update_record(
        self, action: str, id: str, fields: Callable[[Record], Mapping[str, object]]
    ) -> Record:
        """As `edit_record`, from the record's newest value. Raises CheckpointNotFound."""
        result: list[Record] = []

        def change(records: tuple[Record, ...]) -> list[Record]:
            result.clear()
            changed = [
                r if r.id != id else msgspec.structs.replace(r, **fields(r)) for r in records
            ]
            result.extend(r for r in changed if r.id == id)
            if not result:
                raise CheckpointNotFound(f"{self.address} has no checkpoint {id:.12} any more")
            return changed

        self.amend(action, change)
        return result[0]

    def close(self) -> None:
        """Close the store and those of parents."""
        for parent in self._parents.values():
            parent.close()
        self.store.close()
