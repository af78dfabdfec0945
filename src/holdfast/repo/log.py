"""The run's transaction log: who is newest, and how one more entry is added.

Entry n+1 is created with put-if-absent on top of entry n. `docs/design/commit-protocol.md`
numbers the rules and says which failure each of them prevents; `tests/model` explores
them exhaustively.
"""

from __future__ import annotations

import hashlib
import logging
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from enum import Enum

import msgspec

from holdfast.core.records import Entry, Record
from holdfast.core.sealed import seal, unseal, unseal_id
from holdfast.core.units import format_list
from holdfast.errors import (
    CommitUnknown,
    CorruptionError,
    DamagedObject,
    HoldfastError,
    ObjectNotFound,
    StoredWrong,
    StoreUnavailable,
)
from holdfast.repo import keys
from holdfast.repo.head import REBUILT, Draft, Head, Transaction
from holdfast.repo.layout import lay_out, read_parts
from holdfast.repo.segments import ENTRY_MAX_BYTES, Segments
from holdfast.stores.base import Store

logger = logging.getLogger(__name__)

# Ancestors that an entry names, and entries left in the log. A process that slept for
# longer cannot tell whether its entry counted, and says so. Two would be safe.
ANCESTORS = 64
KEEP_ENTRIES = 32
# Above it, as many are removed at a time: a request for each commit would cost more.
PRUNED_TOGETHER = 16
# A reader must see no newer entry after it read one: beside a busy writer it tries again.
_READ_ATTEMPTS = 25
_READ_BACKOFF_S = 0.001
_CREATE_ATTEMPTS = 4
_CREATE_BACKOFF_S = 0.05


class _Outcome(Enum):
    CREATED = 1
    TAKEN = 2
    SPOILED = 3
    """Ours is there, and holds other bytes than were sent."""


class Log:
    """Reads and extends one run's log. Not thread-safe: its owner holds a lock."""

    def __init__(self, store: Store, *, clock: Callable[[], float] = time.time) -> None:
        self._store = store
        self._clock = clock
        self.segments = Segments(store)
        self._decoded: tuple[str, Entry] | None = None
        """The entry read last, by its id: who asks again for the newest decodes nothing."""
        self._lists: tuple[tuple[Entry, tuple[Record, ...]], ...] = ()
        """What the last two entries list: a commit's, and the one that it was made from. A
        list of thousands is not put together anew for each commit, and its records stay the
        same objects, which compare quickly."""
        self._oldest_known = 1
        self._durable = ""
        """Id of the newest entry that is known to be synced."""
        self._sent: dict[str, str] = {}
        """Of the entry that was sent last, and its parent: id -> MD5 digest."""
        self._lists_md5 = False
        """The store's listings say the MD5 digests of entries."""
        self._last = 0
        """Number of the newest entry that was read or committed; 0 for none."""
        self._spoiled: set[int] = set()
        """Numbers of entries that the store created for us with other bytes."""

    # -- reading ---------------------------------------------------------------

    def read(self) -> Head | None:
        """The newest entry whose parent is there and matches; None without a log.

        Damaged entries are passed over and named in `Head.damage`. Raises
        CorruptionError if there are entries and none can be used.
        """
        # Mostly nobody has committed since: then no listing is needed to find where to look.
        numbers = [self._last] if self._last else self._list()
        seen: list[int] = []
        damage: dict[int, str] = {}
        for attempt in range(_READ_ATTEMPTS):
            if attempt:  # no sleep of nothing: it gives the processor away
                time.sleep(_READ_BACKOFF_S * attempt)
            if not numbers:
                return None
            before, damage = damage, {}
            found = self._newest_of(numbers, damage)
            # What was read counts only if nothing is above it now: since the listing the
            # number may have been pruned, and taken again by a late request.
            listed = self._list()
            if found is not None and listed[:1] == numbers[:1]:
                self._last = found[0].number
                return Head(*found, damage=tuple(damage.values()))
            # Looking again helps where others go on; what is twice the same stays so.
            if numbers == seen == listed and damage == before and len(damage) >= len(numbers):
                break
            seen, numbers = numbers, listed
        if not damage:
            raise StoreUnavailable(
                f"the log of {self._store.address} changes faster than it can be read",
                hint="Try again.",
            )
        raise CorruptionError(
            f"no entry of the log of {self._store.address} can be used:"
            + format_list(list(damage.values())),
            hint=REBUILT,
        )

    def _list(self) -> list[int]:
        numbers = self._newer_than(0)
        self._oldest_known = min(numbers, default=1)
        return numbers

    def _newer_than(self, number: int) -> list[int]:
        """The numbers of entries above it, highest first."""
        return sorted(self._listed(number), reverse=True)

    def _listed(self, number: int) -> dict[int, str]:
        """Entries above it: number -> MD5 digest, "" where the store does not say it."""
        after = keys.entry_key(number) if number else ""
        found = {
            above: info.md5
            for info in self._store.list(keys.LOG, after=after)
            if (above := keys.entry_number(info.key)) is not None
        }
        self._lists_md5 = bool(found) and all(found.values())
        return found

    def _newest_of(self, numbers: list[int], damage: dict[int, str]) -> tuple[Entry, str] | None:
        """The first usable entry of `numbers` (descending); None to list again."""
        for number in numbers:
            try:
                id, entry = self._get(number)
            except ObjectNotFound:
                return None  # pruned since the listing: there is a newer one
            except DamagedObject as error:
                damage[number] = error.brief
                continue
            if entry.parent is None:
                return entry, id
            try:
                if self._is_at(*entry.parent):
                    return entry, id
                # A late write of a writer that was overtaken; never part of the chain.
                damage[number] = (
                    f"{keys.entry_key(number)}: it does not continue entry {entry.parent[0]}"
                )
            except ObjectNotFound:
                if number == numbers[0] and self._moved_on(number):
                    return None
                damage[number] = f"{keys.entry_key(number)}: the entry before it is missing"
            except DamagedObject as error:
                # The entry itself is whole and its parent was there when it was made.
                damage[entry.parent[0]] = error.brief
                return entry, id
        return None

    def _moved_on(self, number: int) -> bool:
        return bool(self._newer_than(number))

    def _get(self, number: int) -> tuple[str, Entry]:
        key = keys.entry_key(number)
        id, data = self._sealed(key)
        if self._decoded is None or self._decoded[0] != id:
            self._decoded = unseal(data, Entry, key)
        entry = self._decoded[1]
        if entry.number != number:
            raise DamagedObject(key, f"it says that it is entry {entry.number}")
        return id, entry

    def _is_at(self, number: int, id: str) -> bool:
        """Whether the entry at `number` is the one with this id: then it is not decoded."""
        if self._sealed(keys.entry_key(number))[0] == id:
            return True
        self._get(number)  # raises if it is no entry of this number
        return False

    def _sealed(self, key: str) -> tuple[str, bytes]:
        """(id, bytes) of an entry; read again once before it counts as damaged, for bytes can
        change on their way."""
        data = self._store.get(key, max_bytes=ENTRY_MAX_BYTES)
        try:
            return unseal_id(data, key), data
        except DamagedObject:
            data = self._store.get(key, max_bytes=ENTRY_MAX_BYTES)
            return unseal_id(data, key), data

    def records(self, entry: Entry) -> tuple[Record, ...]:
        """Every live checkpoint, oldest first. Reads segments not seen before.

        Raises DamagedObject for a segment that is damaged or not there; `entry` may then
        just be no longer the newest.
        """
        if (known := self._known(entry)) is not None:
            return known
        parts = list(read_parts(entry, self.segments.read))
        records = tuple(record for part in reversed(parts) for record in part)
        self._lists = ((entry, records), *self._lists[:1])
        return records

    def newest_first(self, entry: Entry) -> Iterator[Record]:
        """Every live checkpoint, newest first. Reads segments only as far as it is asked."""
        known = self._known(entry)
        for part in read_parts(entry, self.segments.read) if known is None else (known,):
            yield from reversed(part)

    def _known(self, entry: Entry) -> tuple[Record, ...] | None:
        return next((records for of, records in self._lists if of is entry), None)

    # -- committing ------------------------------------------------------------

    def commit(
        self,
        transaction: Transaction,
        *,
        base: Head | None,
        run: str,
        segment_name: Callable[[], str] | None = None,
        on_send: Callable[[int, Entry], None] | None = None,
    ) -> tuple[Head, Head | None]:
        """Add one entry; (the new head, the one it was made from).

        `base` is the newest entry known, None for a run's first. `segment_name`
        gives names for new segments; without it (a guest, whose segments the
        writer's gc could take for orphans) all changed records stay in the entry.
        `on_send` is told each entry before it is sent, so that the caller can
        protect what it refers to while its fate is unknown. Where the store creates an
        entry with other bytes, the same change goes to the next number.

        Raises what `transaction` raises; CommitUnknown if the entry may or may not
        be there; CorruptionError.
        """
        while True:
            try:
                records = self.records(base.entry) if base else ()
            except DamagedObject:
                newest = self.read()
                if newest is None or base is None or newest.id == base.id:
                    raise
                base = newest  # it has other segments; those of our base are deleted
                continue
            draft = transaction(base or Head(_nothing(run), ""), records)
            entry = self._entry(draft, base, records, run, segment_name)
            if base is not None:
                # Another process made it visible and may not have synced it yet: a power
                # loss must not leave our entry without its parent.
                with suppress(ObjectNotFound):  # pruned: the log has moved on, as we shall see
                    self.settle(base)
            number = entry.number
            id, entry, outcome = self._send(entry, base, on_send)
            newest = self._newest_after(entry, id, outcome)
            named = newest.names(entry.number)
            # Where a number was left out, an earlier try of what was sent for it may have
            # landed, committed and been pruned: another's entry here says nothing about that.
            if named is None or (named != id and entry.number != number):
                raise CommitUnknown(
                    f"entry {entry.number} of {self._store.address} was sent, and the log has "
                    "moved too far to tell whether it counts",
                    hint="It is not reported as saved; the next save writes everything anew.",
                )
            if named == id:
                self._durable = id
                self._last = entry.number
                self._lists = ((entry, draft.records),)
                if base is not None:
                    self._lists += ((base.entry, records),)
                self._prune(entry)
                return Head(entry, id), base
            base = newest

    def settle(self, head: Head) -> None:
        """Make the entry durable, whoever wrote it. Raises ObjectNotFound if it is pruned."""
        if head.id != self._durable:
            self._store.settle(keys.entry_key(head.number))
            self._durable = head.id

    def _entry(
        self,
        draft: Draft,
        base: Head | None,
        records: tuple[Record, ...],
        run: str,
        segment_name: Callable[[], str] | None,
    ) -> Entry:
        before = base.entry if base else _nothing(run)
        layout = lay_out(
            before, records, draft.records, self.segments.read, writes=segment_name is not None
        )
        entry = msgspec.structs.replace(
            before,
            run=run,
            number=before.number + 1,
            commit=keys.new_nonce(),
            parent=(base.number, base.id) if base else None,
            ancestors=(((before.parent,) if before.parent else ()) + before.ancestors)[:ANCESTORS],
            time_s=self._clock(),
            action=draft.action,
            segments=self.segments.put(layout, segment_name, run),
            edited=layout.edited,
            records=layout.tail,
            rebuilt=False,
        )
        return msgspec.structs.replace(entry, **draft.changes)

    def _send(
        self, entry: Entry, base: Head | None, on_send: Callable[[int, Entry], None] | None
    ) -> tuple[str, Entry, _Outcome]:
        """(id, the entry as it was sent last, what became of that): `entry`, or the same with
        the next number where the store holds other bytes than ours at this one.

        Both follow the same parent, and that is safe only because nobody can have built on
        what no reader can use, or been told that it counts: it is our own (R15).
        """
        for _ in range(len(self._spoiled) + _CREATE_ATTEMPTS):
            if on_send:
                on_send(entry.number, entry)
            known = entry.number in self._spoiled
            id, outcome = self._create(entry, base)
            if outcome is not _Outcome.SPOILED:
                return id, entry, outcome
            if not known:
                logger.warning(
                    "entry %d of the log of %s did not arrive as it was sent: it is left out",
                    entry.number,
                    self._store.address,
                )
            entry = msgspec.structs.replace(entry, number=entry.number + 1, commit=keys.new_nonce())
        raise CommitUnknown(
            f"{_CREATE_ATTEMPTS} entries in a row of the log of {self._store.address} did not "
            "arrive as they were sent",
            hint="Something between here and the server changes what is sent; see its log.",
        )

    def _create(self, entry: Entry, base: Head | None) -> tuple[str, _Outcome]:
        """Create the entry, or find out what is there instead."""
        id, data = seal(entry)
        key = keys.entry_key(entry.number)
        parent = entry.parent[1] if entry.parent else ""
        self._sent = {
            parent: self._sent.get(parent, ""),
            id: hashlib.md5(data, usedforsecurity=False).hexdigest(),
        }
        for attempt in range(_CREATE_ATTEMPTS):
            cause: BaseException | None = None
            try:
                if self._store.put_new(key, [data]):
                    return id, _Outcome.CREATED
            except StoreUnavailable as error:
                cause = error
                if isinstance(error, StoredWrong):
                    self._spoiled.add(entry.number)
            # Whatever the store said, only what is there now counts: a reply can be
            # lost, and a conflict can be our own first try.
            try:
                found, _ = self._get(entry.number)
                if found == id:
                    self._store.settle(key)
                    return id, _Outcome.CREATED
                return id, _Outcome.TAKEN
            except ObjectNotFound:
                pass
            except (DamagedObject, StoreUnavailable) as error:
                if (
                    isinstance(error, DamagedObject)
                    and entry.number in self._spoiled
                    and self._stays(key)
                ):
                    return id, _Outcome.SPOILED
                raise CommitUnknown(
                    f"entry {entry.number} of {self._store.address} was sent, and cannot be "
                    f"read back: {error.message}",
                    hint="It is not reported as saved; the next save settles it.",
                ) from error
            if cause is None:
                return id, _Outcome.TAKEN  # was there, is pruned: others moved on
            newest = self._read_or_unknown(entry)
            if (newest.id if newest else None) != (base.id if base else None):
                return id, _Outcome.TAKEN  # what the newest entry names decides
            if attempt + 1 < _CREATE_ATTEMPTS:
                time.sleep(_CREATE_BACKOFF_S * 2**attempt)
            else:
                raise CommitUnknown(
                    f"entry {entry.number} of {self._store.address} could not be written: {cause}",
                    hint="It is not reported as saved; the next save settles it.",
                ) from cause
        raise AssertionError("unreachable")

    def _stays(self, key: str) -> bool:
        """Whether two reads of what is damaged give the same bytes: it is so in the store, and
        not only on its way here."""
        try:
            first, second = (self._store.get(key, max_bytes=ENTRY_MAX_BYTES) for _ in range(2))
            if first != second:
                return False
            unseal_id(first, key)
        except DamagedObject:
            return True
        except (ObjectNotFound, StoreUnavailable):
            return False
        return False

    def _read_or_unknown(self, entry: Entry) -> Head | None:
        try:
            return self.read()
        except (CorruptionError, StoreUnavailable) as error:
            raise self._unknown(entry, error) from error

    def _newest_after(self, entry: Entry, id: str, outcome: _Outcome) -> Head:
        """The newest entry once `entry` was sent; only it says what became of `entry`.

        What is at the entry's number does not: an overtaken writer can create a number
        that others used and pruned long ago, and another's late write can stand where
        ours was pruned.
        """
        try:
            if outcome is _Outcome.CREATED and self._is_newest(entry):
                return Head(entry, id)
        except StoreUnavailable as error:
            raise self._unknown(entry, error) from error
        newest = self._read_or_unknown(entry)
        if newest is None:
            raise CommitUnknown(f"the log of {self._store.address} has vanished")
        return newest

    def _is_newest(self, entry: Entry) -> bool:
        """Whether the entry's parent is in its place, and nothing is above the entry."""
        if entry.parent and self._lists_md5 and (md5 := self._sent.get(entry.parent[1])):
            # A listing says both in one request.
            listed = self._listed(entry.parent[0] - 1)
            if listed.get(entry.parent[0]) == md5:
                return max(listed) == entry.number
        return self._continues(entry) and self._newer_than(entry.number - 1)[:1] == [entry.number]

    def _continues(self, entry: Entry) -> bool:
        try:
            return not entry.parent or self._is_at(*entry.parent)
        except (ObjectNotFound, DamagedObject):
            return False

    def _unknown(self, entry: Entry, error: HoldfastError) -> CommitUnknown:
        return CommitUnknown(
            f"entry {entry.number} of {self._store.address} was sent, and the log cannot "
            f"be read back: {error.message}"
        )

    def _prune(self, newest: Entry) -> None:
        """Remove old entries, lowest first, so that the highest always has its parent."""
        last = newest.number - KEEP_ENTRIES
        if newest.parent:
            last = min(last, newest.parent[0] - 1)  # far below, if damaged ones lie between
        old = range(self._oldest_known, last + 1)
        if len(old) < PRUNED_TOGETHER:
            return
        try:
            self._store.delete([keys.entry_key(number) for number in old])
            self._oldest_known = last + 1
        except StoreUnavailable as error:
            logger.warning("could not remove old log entries: %s", error)


def _nothing(run: str) -> Entry:
    """What a run's first transaction starts from."""
    return Entry(run=run, number=0, commit="", parent=None, epoch=0, time_s=0.0, action="")
