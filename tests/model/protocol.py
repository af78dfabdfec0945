"""The commit protocol, written as the implementation would be.

Each method is a generator: it yields one operation on the store and is sent the
operation's result; everything between two yields is local. The explorer interleaves
processes in every possible way; the world says what the store may answer, and checks what
must always hold. `docs/design/commit-protocol.md` numbers the rules that comments name.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto

from .entries import (
    NOTHING,
    PARENT,
    Bug,
    Damaged,
    Entry,
    Result,
    Settings,
    Transaction,
    next_entry,
)
from .operations import (
    Acknowledge,
    DeleteOldest,
    DeletePack,
    Get,
    Highest,
    InFlight,
    ListBegin,
    ListPacks,
    Observe,
    Program,
    Put,
    ReadNewest,
    Shown,
    Sync,
)


class Verdict(Enum):
    """What became of an entry that was sent."""

    COMMITTED = auto()
    LOST = auto()
    ABSENT = auto()
    UNKNOWN = auto()


@dataclass(frozen=True, eq=False)
class Process:
    """A process that follows the protocol. `name` makes the ids of its entries its own."""

    name: str
    settings: Settings

    def has(self, bug: Bug) -> bool:
        return bug in self.settings.bugs

    # -- R1: the newest entry -------------------------------------------------------

    def read_newest(
        self, run: str, created: Entry | None = None, *, may_be_new: bool = False
    ) -> Program:
        """The newest entry, or "error" if it cannot be read; `Damaged` if entries above it
        are damaged.

        `created`: an entry that this process has just created; where to look first.
        `may_be_new`: NOTHING for an empty log. To others than the process that opens the
        run an empty listing says only that the log moved on.
        """
        if self.settings.atomic_reads:
            entry = (yield ReadNewest(run)) or NOTHING
        else:
            entry = yield from self._search(run, created, may_be_new)
        newest = entry.entry if isinstance(entry, Damaged) else entry
        if isinstance(newest, Entry):
            yield Observe(run, newest)
        return entry

    def _search(self, run: str, created: Entry | None, may_be_new: bool) -> Program:
        number = created.number if created else (yield from self._highest(run))
        if created and created.parent and self.settings.one_listing:
            if self.settings.mixed_lists:
                yield ListBegin(run)
            if (yield Shown(run, created.parent)) == number:
                return created
        for _ in range(self.settings.read_attempts):
            if number == 0 and may_be_new:
                return NOTHING
            entry, at = None, number
            while at:
                entry = yield from self._usable(run, at, created)
                if entry != "damaged":
                    break
                entry, at = None, at - 1  # R15: nobody can have built on it
            if entry is None and number and at == 0 and may_be_new:
                entry = NOTHING  # damaged ones only
            if entry == "error":
                return "error"
            if entry is not None and self.has(Bug.READS_AFTER_LISTING):
                return entry
            # What was read at `number` is the newest only if nothing is above it *now*:
            # between a listing and the reads the number may have been pruned, and taken
            # again by a late request. Never a lower number, for the same reason.
            above = yield from self._highest(run)
            if entry is not None and above == number:
                return entry if at == number else Damaged(entry, number)
            number = above
        return "error"

    def _usable(self, run: str, number: int, created: Entry | None) -> Program:
        """Entry `number` if its parent is there and matches, else None; or "damaged"."""
        entry = created
        if created is None or created.number != number:
            entry = yield Get(run, number)
        if entry is None or entry in ("error", "damaged") or entry.parent is None:
            return entry
        if self.has(Bug.NO_PARENT_CHECK):
            return entry
        parent = yield Get(run, entry.parent[0])
        if parent == "error":
            return "error"
        if parent is None or parent == "damaged" or parent.id != entry.parent[1]:
            return None
        return entry

    def _highest(self, run: str) -> Program:
        if self.settings.mixed_lists:
            yield ListBegin(run)
        return (yield Highest(run))

    # -- R2 to R5: adding an entry ----------------------------------------------------

    def commit(
        self, run: str, base: Entry, change: Transaction, serial: int, number: int = 0
    ) -> Program:
        """(Result, the newest entry known, the committed entry, the base it was made from).

        `serial` tells this process's commits apart. `number`: of the entry, if it is not the
        one after `base`, for entries between them are damaged.
        """
        first = base
        while True:
            draft = change.draft(base, first, self.settings.bugs)  # decided on each base
            if isinstance(draft, Result):
                return draft, base, None, None
            number = number or base.number + 1
            id = f"{self.name}{serial}.{number}"
            entry = next_entry(draft, base, id, self.name, self.settings, number)
            if base.author != self.name and not self.has(Bug.BUILD_WITHOUT_SYNC):
                yield Sync(run)  # R12
            if self.has(Bug.DELETE_BEFORE_ENTRY):
                yield from self.delete_retired(base, entry)
            if self.has(Bug.PARENT_CHECK_AFTER_CREATE):
                verdict, newest = yield from self._send_and_check_parent(run, entry, base)
            else:
                verdict, newest, entry = yield from self._send(run, entry)
            if verdict is Verdict.COMMITTED:
                yield Acknowledge(run, entry)
                gap = bool(base.number) and base.number < entry.number - 1
                parent = base.number if gap and not self.has(Bug.PRUNE_BY_NUMBER) else 0
                yield from self.prune_log(run, entry.number, parent)
                return Result.COMMITTED, newest, entry, base
            if verdict is not Verdict.LOST:
                return Result.UNKNOWN, base, None, None
            base, number = newest, 0  # rebase

    def _send(self, run: str, entry: Entry) -> Program:
        """(Verdict, newest entry, `entry`): put, then see what is newest, whatever the reply."""
        number = entry.number
        for attempt in range(1 + self.settings.retries):
            if attempt and self.has(Bug.RETRY_WITH_NEW_ID):
                entry = entry._replace(id=f"{entry.id}'")
            reply = yield Put(run, entry)
            while self._leaves_out(reply):  # R15
                if self.has(Bug.DELETE_SPOILED):
                    yield DeleteOldest(run, entry.number, entry.number)
                else:
                    entry = entry._replace(number=entry.number + 1, id=f"{entry.id}+")
                reply = yield Put(run, entry)
            if reply == "ok":
                yield Sync(run)  # a part of put-if-absent on a file system
                if self.has(Bug.NO_CHECK_AFTER_CREATE):
                    return Verdict.COMMITTED, entry, entry
            wrong = yield from self._jump_to_conclusion(run, entry, reply)
            newest = yield from self.read_newest(run, entry if reply == "ok" else None)
            if isinstance(newest, Damaged):
                newest = newest.entry
            if not isinstance(newest, Entry):
                return Verdict.UNKNOWN, None, entry
            verdict = wrong or self._judge(newest, entry)
            left_out = entry.number > number and not self.has(Bug.LEFT_OUT_MEANS_LOST)
            if verdict is Verdict.LOST and left_out:
                # R15: an earlier try of what we sent first may have landed, and be pruned.
                verdict = Verdict.UNKNOWN
            if verdict is Verdict.COMMITTED and reply != "ok":
                yield Sync(run)  # R12: it is there, and perhaps not durable
            if verdict is not Verdict.ABSENT:
                return verdict, newest, entry
            del reply, newest, verdict, left_out
        return Verdict.UNKNOWN, None, entry

    def _leaves_out(self, reply: str) -> bool:
        """Whether the entry's number is left out, and the next one taken on the same parent."""
        return (
            reply == "wrong"
            or (reply == "exists" and self.has(Bug.LEAVE_OUT_WHAT_IS_THERE))
            or (reply == "error" and self.has(Bug.LEAVE_OUT_UNKNOWN))
        )

    def _judge(self, newest: Entry, entry: Entry) -> Verdict:
        """What the newest entry says about `entry` (R4)."""
        named = newest.lineage().get(entry.number)
        if named is not None:
            return Verdict.COMMITTED if named == entry.id else Verdict.LOST
        if newest.number < entry.number:
            return Verdict.ABSENT
        if self.has(Bug.SHORT_LINEAGE_MEANS_LOST):
            return Verdict.LOST
        return Verdict.UNKNOWN

    def _jump_to_conclusion(self, run: str, entry: Entry, reply: str) -> Program:
        """What some bugs conclude from the reply, or from what is at the number."""
        if reply == "exists" and self.has(Bug.NO_READ_BACK):
            return Verdict.LOST
        if reply != "ok" and self.has(Bug.ANOTHERS_MEANS_LOST):
            found = yield Get(run, entry.number)
            if isinstance(found, Entry) and found.id != entry.id:
                return Verdict.LOST
        return None

    def _send_and_check_parent(self, run: str, entry: Entry, base: Entry) -> Program:
        """As `_send`, by reading the number back and checking the parent: a bug."""
        for _ in range(1 + self.settings.retries):
            reply = yield Put(run, entry)
            found = entry if reply == "ok" else (yield Get(run, entry.number))
            if found == entry:
                yield Sync(run)
                parent = (yield Get(run, base.number)) if base.number else NOTHING
                if isinstance(parent, Entry) and parent.id == base.id:
                    return Verdict.COMMITTED, entry
            newest = yield from self.read_newest(run)
            if found == "error" or not isinstance(newest, Entry):
                return Verdict.UNKNOWN, None
            verdict = self._judge(newest, entry)
            if verdict is not Verdict.ABSENT:
                return verdict, newest
            del reply, found, newest, verdict
        return Verdict.UNKNOWN, None

    # -- R9 and R10: deleting -----------------------------------------------------------

    def delete_retired(self, base: Entry, entry: Entry) -> Program:
        """Delete the packs that `base` kept alive and `entry`, which is committed, does not."""
        dead = tuple(sorted(base.packs() - entry.packs()))
        del base, entry
        for pack in dead:
            yield DeletePack(pack)

    def prune_log(self, run: str, newest: int, parent: int = 0) -> Program:
        """Ascending, one by one; the newest entries stay, two at least. `parent`: number of the
        newest one's parent, where damaged entries lie between the two."""
        last = newest - (1 if self.has(Bug.PRUNE_PARENT) else self.settings.keep_entries)
        last = min(last, parent - 1) if parent else last
        while (yield DeleteOldest(run, self.settings.oldest_prunable(), last)):
            pass

    # -- R11: collecting orphans ----------------------------------------------------------

    def gc(self, epoch: int) -> Program:
        """Delete packs that nothing lists. Only in the process that opened `epoch`."""
        names = flying = None
        if not self.has(Bug.GC_READS_BEFORE_LISTING):
            names = yield ListPacks()
            if not self.has(Bug.GC_LOOKS_AT_FLIGHT_LAST):
                flying = yield InFlight()
        newest = yield from self.read_newest(PARENT)
        if names is None:
            names = yield ListPacks()
        if flying is None:
            flying = yield InFlight()
        if not isinstance(newest, Entry):
            return "log unreadable"
        if newest.epoch != epoch and not self.has(Bug.GC_IGNORES_EPOCH):
            return Result.FENCED
        if not self.has(Bug.GC_WITHOUT_SYNC):
            yield Sync(PARENT)  # R12
        if self.has(Bug.GC_IGNORES_FLIGHT):
            flying = frozenset[str]()
        orphans = tuple(sorted(names - flying - newest.packs()))
        del names, flying, newest
        for name in orphans:
            yield DeletePack(name)
        return "collected"
