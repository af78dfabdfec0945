"""The commit protocol, as the programs of the processes that follow it.

Each program is a generator. It yields one operation on the store (`Put`, `Get`, …) and
is sent that operation's result; everything between two yields is local. The explorer
(`explore`) interleaves the programs in every possible way; the world (`world`) says what
the store may answer and checks what must always hold.

`docs/design/commit-protocol.md` numbers the rules (R1, R2, …) that the comments name. A
`Bug` is one rule left out; the tests show that each of them matters.
"""

from __future__ import annotations

from collections.abc import Generator
from dataclasses import dataclass
from enum import Enum, auto
from typing import Any, NamedTuple

# -- what the log holds ---------------------------------------------------------------

PARENT, CHILD = "parent", "child"
"""The two runs of the model; the child is forked from the parent."""

KEEP_ENTRIES = 2
"""Newest entries that log pruning leaves: the fewest that the rules allow."""

NameAndNumber = tuple[int, str]


class Record(NamedTuple):
    """A live checkpoint."""

    name: str
    packs: tuple[str, ...]
    pins: tuple[str, ...] = ()
    """Tags and pins: reasons why it must stay."""
    borrowed: tuple[str, ...] = ()
    """Packs of the parent run that it needs."""


class Entry(NamedTuple):
    """Entry `number` of a run's log."""

    number: int
    id: str
    parent: NameAndNumber | None
    ancestors: tuple[NameAndNumber, ...]
    epoch: int
    holder: str
    """Who opened the epoch."""
    author: str
    action: str
    records: tuple[Record, ...]

    def lineage(self) -> dict[int, str]:
        named = dict([*self.ancestors, (self.number, self.id)])
        if self.parent:
            named[self.parent[0]] = self.parent[1]
        return named

    def packs(self) -> set[str]:
        return {pack for record in self.records for pack in record.packs}

    def __repr__(self) -> str:
        records = " ".join(
            r.name + "".join(f"+{pin}" for pin in r.pins) for r in self.records
        )
        return f"<{self.number} {self.id}: {self.action}, epoch {self.epoch}, lists {records}>"


# -- what a process asks of the store -------------------------------------------------


class Put(NamedTuple):
    """Create log entry `entry.number` unless there is one: "ok", "exists", "error"."""

    run: str
    entry: Entry


class Get(NamedTuple):
    """Log entry `number`: an Entry, None (absent) or "error"."""

    run: str
    number: int


class Highest(NamedTuple):
    """The highest number that a listing of the log shows; 0 for none.

    Where the scenario says so the listing is no snapshot: `ListBegin` starts it.
    """

    run: str


class ListBegin(NamedTuple):
    run: str


class ReadNewest(NamedTuple):
    """`read_newest` as one step, for scenarios where its own races do not matter."""

    run: str


class DeleteEntry(NamedTuple):
    """Delete the lowest entry that is above `keep` and at most `last`; was there one?"""

    run: str
    keep: int
    last: int


class DeleteNewestOld(NamedTuple):
    """As `DeleteEntry`, the highest first (a bug)."""

    run: str
    keep: int
    last: int


class Sync(NamedTuple):
    """Make the visible log durable (fsync of the directory)."""

    run: str


class PutPack(NamedTuple):
    """Write a pack; its name is registered as in flight before."""

    name: str


class ListPacks(NamedTuple):
    """Names of all packs of the parent run."""


class DeletePack(NamedTuple):
    name: str


class InFlight(NamedTuple):
    """The names that this process's saves have in flight."""


class Settled(NamedTuple):
    """Nothing that this process's saves wrote is in flight any more."""


class Turn(NamedTuple):
    """Another guest commits something that matters to nobody, and prunes the log."""

    run: str


class Acknowledge(NamedTuple):
    """Tell the user that the entry is committed (no operation; the world checks it)."""

    run: str
    entry: Entry


class Observe(NamedTuple):
    """Take the entry for the newest (no operation; the world checks it)."""

    run: str
    entry: Entry


Program = Generator[Any, Any, Any]

# -- rules that can be left out -------------------------------------------------------


class Bug(Enum):
    """One deliberate mistake."""

    NO_RECHECK_AFTER_REBASE = auto()
    STALE_RETENTION = auto()
    REUSED_NAMES = auto()
    GC_BY_ANOTHER_PROCESS = auto()
    GC_READS_BEFORE_LISTING = auto()
    GC_READS_FLIGHT_LAST = auto()
    GC_IGNORES_FLIGHT = auto()
    GC_IGNORES_EPOCH = auto()
    GC_WITHOUT_SYNC = auto()
    PACKS_BEFORE_OPEN = auto()
    DELETE_BEFORE_ENTRY = auto()
    NO_CHECK_AFTER_CREATE = auto()
    CHECK_PARENT_ONLY = auto()
    NO_PARENT_CHECK = auto()
    NO_SECOND_LISTING = auto()
    PRUNE_FIRST_ENTRY = auto()
    PRUNE_OUT_OF_ORDER = auto()
    NO_FENCING = auto()
    FENCED_SAVE_CLEANS_UP = auto()
    PIN_WITHOUT_RECHECK = auto()
    REFER_BEFORE_PIN = auto()
    UNPIN_BEFORE_CHILD = auto()
    FAILED_FORK_UNPINS = auto()
    SHORT_LIST_MEANS_LOST = auto()
    NO_READ_BACK = auto()
    ANOTHERS_MEANS_LOST = auto()
    RETRY_WITH_NEW_ID = auto()
    RETRY_REUSES_PACKS = auto()
    UNKNOWN_CLEANS_UP = auto()


class Verdict(Enum):
    """What became of an entry that was sent."""

    COMMITTED = auto()
    LOST = auto()
    ABSENT = auto()
    UNKNOWN = auto()


class Result(Enum):
    """How a transaction ended."""

    COMMITTED = auto()
    FENCED = auto()
    BASE_LOST = auto()
    NOT_FOUND = auto()
    NOTHING_TO_DO = auto()
    UNKNOWN = auto()


# -- transactions: the next entry from the newest one ---------------------------------


class Draft(NamedTuple):
    """What the next entry says."""

    action: str
    records: tuple[Record, ...]
    epoch: int
    holder: str


def keep_newest(records: tuple[Record, ...], count: int) -> tuple[Record, ...]:
    """Retention: the `count` newest and whatever is pinned."""
    cut = len(records) - count
    return tuple(r for i, r in enumerate(records) if i >= cut or r.pins)


class Save(NamedTuple):
    """Add a checkpoint, retire older ones."""

    checkpoint: str
    written: tuple[str, ...]
    reused: tuple[str, ...]
    epoch: int
    holder: str
    keep: int
    doomed: tuple[str, ...] | None = None
    """Checkpoints to retire, chosen once and for all (a bug)."""

    def draft(self, base: Entry, first: Entry, bugs: frozenset[Bug]) -> Draft | Result:
        if base.epoch != self.epoch and Bug.NO_FENCING not in bugs:
            return Result.FENCED  # R6
        checked = first if Bug.NO_RECHECK_AFTER_REBASE in bugs else base
        if not checked.packs().issuperset(self.reused):
            return Result.BASE_LOST  # R8
        if any(record.name == self.checkpoint for record in base.records):
            records = base.records
        else:
            records = (*base.records, Record(self.checkpoint, self.written + self.reused))
        if Bug.STALE_RETENTION in bugs:
            stay = {r.name for r in keep_newest((*first.records, records[-1]), self.keep)}
            gone = {r.name for r in first.records} - stay
            kept = tuple(r for r in records if r.name not in gone)
        else:
            kept = keep_newest(records, self.keep)  # R9
        return Draft("save", kept, self.epoch, self.holder)


class Open(NamedTuple):
    """Become the writer."""

    holder: str

    def draft(self, base: Entry, first: Entry, bugs: frozenset[Bug]) -> Draft | Result:
        del first, bugs
        return Draft("open", base.records, base.epoch + 1, self.holder)


class Pin(NamedTuple):
    """Tag or pin a checkpoint, as a guest."""

    checkpoint: str
    reason: str

    def draft(self, base: Entry, first: Entry, bugs: frozenset[Bug]) -> Draft | Result:
        checked = first if Bug.PIN_WITHOUT_RECHECK in bugs else base
        if all(record.name != self.checkpoint for record in checked.records):
            return Result.NOT_FOUND  # R10
        records = tuple(
            r._replace(pins=tuple(sorted({*r.pins, self.reason})))
            if r.name == self.checkpoint
            else r
            for r in base.records
        )
        return Draft("pin", records, base.epoch, base.holder)


class Unpin(NamedTuple):
    """Take a pin away, as a guest."""

    reason: str

    def draft(self, base: Entry, first: Entry, bugs: frozenset[Bug]) -> Draft | Result:
        del first, bugs
        if all(self.reason not in r.pins for r in base.records):
            return Result.NOTHING_TO_DO
        records = tuple(
            r._replace(pins=tuple(p for p in r.pins if p != self.reason)) for r in base.records
        )
        return Draft("unpin", records, base.epoch, base.holder)


class Prune(NamedTuple):
    """Apply retention as a guest: keep the newest `keep` and those named."""

    keep: int
    only: tuple[str, ...] = ()
    """If given, the policy keeps these instead of the newest (say, the best)."""

    def draft(self, base: Entry, first: Entry, bugs: frozenset[Bug]) -> Draft | Result:
        decided_on = first if Bug.STALE_RETENTION in bugs else base  # R9
        if self.only:
            stay = {r.name for r in decided_on.records if r.pins or r.name in self.only}
        else:
            stay = {r.name for r in keep_newest(decided_on.records, self.keep)}
        gone = {r.name for r in decided_on.records} - stay
        records = tuple(r for r in base.records if r.name not in gone)
        if records == base.records or not records:
            return Result.NOTHING_TO_DO
        return Draft("prune", records, base.epoch, base.holder)


class Touch(NamedTuple):
    """Change nothing that matters here (log a metric), as a guest: a rebase for others."""

    def draft(self, base: Entry, first: Entry, bugs: frozenset[Bug]) -> Draft | Result:
        del first, bugs
        return Draft("touch", base.records, base.epoch, base.holder)


class ForkTo(NamedTuple):
    """The child's first checkpoint, or its retirement."""

    records: tuple[Record, ...]
    action: str
    epoch: int
    holder: str

    def draft(self, base: Entry, first: Entry, bugs: frozenset[Bug]) -> Draft | Result:
        del first, bugs
        if base.epoch != self.epoch:
            return Result.FENCED
        return Draft(self.action, self.records, base.epoch, base.holder)


Transaction = Save | Open | Pin | Unpin | Prune | Touch | ForkTo


# -- the protocol ---------------------------------------------------------------------


@dataclass(frozen=True)
class Settings:
    """How fine the model is, and what it leaves out."""

    bugs: frozenset[Bug] = frozenset()
    ancestors: int = 2
    """Entries that an entry names besides itself and its parent, at most."""
    atomic_reads: bool = False
    """Whether `read_newest` is one step."""
    mixed_lists: bool = False
    """Whether listings of the log are no snapshots."""
    prune_log: bool = True
    retries: int = 1
    """How often an absent entry is sent again."""
    read_attempts: int = 3
    """How often a reader lists again before it gives up."""


def next_entry(draft: Draft, base: Entry, id: str, author: str, settings: Settings) -> Entry:
    """The entry that follows `base` and says what `draft` wants (R2)."""
    ancestors = ((base.parent,) if base.parent else ()) + base.ancestors
    return Entry(
        number=base.number + 1,
        id=id,
        parent=(base.number, base.id),
        ancestors=ancestors[: settings.ancestors],
        epoch=draft.epoch,
        holder=draft.holder,
        author=author,
        action=draft.action,
        records=draft.records,
    )


@dataclass(frozen=True, eq=False)
class Process:
    """A process, or one of its threads; `name` makes its entry ids its own."""

    name: str
    settings: Settings

    def has(self, bug: Bug) -> bool:
        return bug in self.settings.bugs

    # -- reading (R1) -------------------------------------------------------------

    def read_newest(self, run: str, created: Entry | None = None) -> Program:
        """The newest entry; None for an empty log, "error" if it cannot be read.

        `created`: an entry that this process has just created, where to look first.
        """
        if self.settings.atomic_reads:
            entry = yield ReadNewest(run)
        else:
            entry = yield from self._search(run, created)
        if isinstance(entry, Entry):
            yield Observe(run, entry)
        return entry

    def _search(self, run: str, created: Entry | None) -> Program:
        number = created.number if created else (yield from self._highest(run))
        for _ in range(self.settings.read_attempts):
            if number == 0:
                return None
            entry = yield from self._usable(run, number, created)
            if entry == "error":
                return "error"
            if entry is not None and self.has(Bug.NO_SECOND_LISTING):
                return entry
            # What was read at `number` is the newest only if nothing is above it *now*:
            # the number may have been pruned, and taken again by a late request, between
            # a listing and the reads. Never a lower number, for the same reason.
            above = yield from self._highest(run)
            if entry is not None and above == number:
                return entry
            number = above
        return "error"

    def _usable(self, run: str, number: int, created: Entry | None) -> Program:
        """Entry `number` if its parent is there and matches, else None."""
        entry = created
        if created is None or created.number != number:
            entry = yield Get(run, number)
        if entry is None or entry == "error" or entry.parent is None:
            return entry
        if self.has(Bug.NO_PARENT_CHECK):
            return entry
        parent = yield Get(run, entry.parent[0])
        if parent == "error":
            return "error"
        return entry if parent is not None and parent.id == entry.parent[1] else None

    def _highest(self, run: str) -> Program:
        if self.settings.mixed_lists:
            yield ListBegin(run)
        return (yield Highest(run))

    # -- committing (R2 to R5) ------------------------------------------------------

    def commit(self, run: str, base: Entry | None, transaction: Transaction, serial: int) -> Program:
        """(Result, newest entry known, the entry, its base)."""
        first = base
        while True:
            draft = transaction.draft(base, first, self.settings.bugs)
            if isinstance(draft, Result):
                return draft, base, None, None
            entry = next_entry(
                draft, base, f"{self.name}{serial}.{base.number + 1}", self.name, self.settings
            )
            if self.has(Bug.DELETE_BEFORE_ENTRY):
                yield from self.delete_retired(base, entry)
            if self.has(Bug.CHECK_PARENT_ONLY):
                verdict, newest = yield from self._send_and_check_parent(run, entry, base)
            else:
                verdict, newest = yield from self._send(run, entry)
            if verdict is Verdict.COMMITTED:
                yield Acknowledge(run, entry)
                if self.settings.prune_log:
                    yield from self._prune_log(run, entry.number)
                return Result.COMMITTED, newest, entry, base
            if verdict is not Verdict.LOST:
                return Result.UNKNOWN, None, entry, None
            base = newest

    def _send(self, run: str, entry: Entry) -> Program:
        """Put, then look at the newest entry, whatever the reply was (R3, R4)."""
        for attempt in range(1 + self.settings.retries):
            if attempt and self.has(Bug.RETRY_WITH_NEW_ID):
                entry = entry._replace(id=entry.id + "'")
            reply = yield Put(run, entry)
            if reply == "ok":
                yield Sync(run)
                if self.has(Bug.NO_CHECK_AFTER_CREATE):
                    return Verdict.COMMITTED, entry
            if reply == "exists" and self.has(Bug.NO_READ_BACK):
                newest = yield from self.read_newest(run)
                return (Verdict.LOST, newest) if newest != "error" else (Verdict.UNKNOWN, None)
            if reply != "ok" and self.has(Bug.ANOTHERS_MEANS_LOST):
                found = yield Get(run, entry.number)
                if isinstance(found, Entry) and found.id != entry.id:
                    newest = yield from self.read_newest(run)
                    return (Verdict.LOST, newest) if newest != "error" else (Verdict.UNKNOWN, None)
            newest = yield from self.read_newest(run, entry if reply == "ok" else None)
            if newest == "error" or newest is None:
                return Verdict.UNKNOWN, None
            verdict = self._judge(newest, entry)
            if verdict is Verdict.COMMITTED and reply != "ok":
                yield Sync(run)
            if verdict is not Verdict.ABSENT:
                return verdict, newest
        return Verdict.UNKNOWN, None

    def _judge(self, newest: Entry, entry: Entry) -> Verdict:
        named = newest.lineage().get(entry.number)
        if named == entry.id:
            return Verdict.COMMITTED
        if named is not None:
            return Verdict.LOST
        if newest.number < entry.number:
            return Verdict.ABSENT
        return Verdict.LOST if self.has(Bug.SHORT_LIST_MEANS_LOST) else Verdict.UNKNOWN

    def _send_and_check_parent(self, run: str, entry: Entry, base: Entry) -> Program:
        """The first version of R3 and R4: read back the number, then check the parent."""
        created = False
        for _ in range(1 + self.settings.retries):
            reply = yield Put(run, entry)
            if reply == "ok":
                yield Sync(run)
                created = True
                break
            found = yield Get(run, entry.number)
            if found == "error":
                return Verdict.UNKNOWN, None
            if found == entry:
                yield Sync(run)
                created = True
                break
            newest = yield from self.read_newest(run)
            if newest == "error" or newest is None:
                return Verdict.UNKNOWN, None
            if found is not None or reply == "exists":
                return Verdict.LOST, newest
            if newest.id != base.id:
                return self._judge(newest, entry), newest
        if not created:
            return Verdict.UNKNOWN, None
        parent = yield Get(run, base.number)
        if parent == "error":
            return Verdict.UNKNOWN, None
        if parent is not None and parent.id == base.id:
            return Verdict.COMMITTED, entry
        newest = yield from self.read_newest(run)
        if newest == "error" or newest is None:
            return Verdict.UNKNOWN, None
        return self._judge(newest, entry), newest

    def _prune_log(self, run: str, newest: int) -> Program:
        """Ascending, one by one; the first entry and the newest two stay (R5)."""
        keep = 0 if self.has(Bug.PRUNE_FIRST_ENTRY) else 1
        out_of_order = self.has(Bug.PRUNE_OUT_OF_ORDER)
        while True:
            delete = DeleteNewestOld if out_of_order else DeleteEntry
            deleted = yield delete(run, keep, newest - KEEP_ENTRIES)
            if not deleted:
                return

    def delete_retired(self, base: Entry, entry: Entry) -> Program:
        """Delete what `base` kept alive and `entry` does not (R7)."""
        dead = tuple(sorted(base.packs() - entry.packs()))
        for pack in dead:
            yield DeletePack(pack)

    # -- programs -------------------------------------------------------------------

    def writer(
        self,
        saves: int,
        head: Entry | None,
        *,
        keep: int = 1,
        reuse: str = "oldest",
        gc_after: bool = False,
    ) -> Program:
        """Open the run (unless `head` was opened by it), save, collect orphans."""
        early = self.has(Bug.PACKS_BEFORE_OPEN) and head is None
        if early:
            yield PutPack(f"{self.name}-0")
        if head is None:
            head = yield from self.open()
            if not isinstance(head, Entry):
                return f"not opened: {head}"
        epoch = head.epoch
        outcome = None
        for serial in range(1, 1 + saves):
            if outcome is Result.UNKNOWN:
                head = yield from self.read_newest(PARENT)  # R4: never a cached base
                if not isinstance(head, Entry):
                    return "log unreadable"
            again = outcome is Result.UNKNOWN and self.has(Bug.RETRY_REUSES_PACKS)
            outcome, head = yield from self.save(
                head, epoch, serial, keep, reuse, early and serial == 1, again
            )
            if outcome is Result.FENCED:
                break
        if gc_after:
            yield from self.gc(epoch)
        return str(outcome)

    def open(self) -> Program:
        base = yield from self.read_newest(PARENT)
        if not isinstance(base, Entry):
            return base
        result, head, _, _ = yield from self.commit(PARENT, base, Open(self.name), 0)
        return head if result is Result.COMMITTED else str(result)

    def save(
        self,
        head: Entry,
        epoch: int,
        serial: int,
        keep: int,
        reuse: str,
        written_already: bool,
        again: bool,
    ) -> Program:
        source = head.records[0 if reuse == "oldest" else -1]
        reused = source.packs[-1:] if reuse != "nothing" else ()
        # A failed save is not tried again: its checkpoint would be added twice.
        name = f"{self.name}{serial - 1 if again else serial}"
        written = (f"{self.name}-{serial - 2 if again else serial - 1}",)
        if self.has(Bug.REUSED_NAMES):
            # Named by content, which is that of the oldest checkpoint.
            written, reused = source.packs[:1], ()
        if not written_already and not again:
            for pack in written:
                yield PutPack(pack)
        transaction = Save(name, written, reused, epoch, self.name, keep)
        outcome, newest, entry, base = yield from self.commit(PARENT, head, transaction, serial)
        if outcome is Result.BASE_LOST:
            # Write anew what has gone, under a new name, and commit once more (R8).
            extra = (f"{self.name}-{serial - 1}b",)
            yield PutPack(extra[0])
            written = written + extra
            transaction = Save(name, written, (), epoch, self.name, keep)
            outcome, newest, entry, base = yield from self.commit(
                PARENT, newest, transaction, serial + 10
            )
        if outcome is Result.COMMITTED:
            # Numbers sent earlier are settled too: all are below this one (R4).
            yield Settled()
            if not self.has(Bug.DELETE_BEFORE_ENTRY):
                yield from self.delete_retired(base, entry)
        elif self._cleans_up(outcome):
            for pack in written:
                yield DeletePack(pack)
        return outcome, newest

    def _cleans_up(self, outcome: Result) -> bool:
        """Whether a save that failed deletes its packs: never (R7)."""
        if outcome is Result.FENCED:
            return any(
                self.has(bug)
                for bug in (
                    Bug.FENCED_SAVE_CLEANS_UP,
                    Bug.NO_READ_BACK,
                    Bug.SHORT_LIST_MEANS_LOST,
                    Bug.ANOTHERS_MEANS_LOST,
                    Bug.RETRY_WITH_NEW_ID,
                )
            )
        return outcome is Result.UNKNOWN and self.has(Bug.UNKNOWN_CLEANS_UP)

    def gc(self, epoch: int) -> Program:
        """Delete packs that nothing lists (R11). Only in the process that opened `epoch`."""
        if self.has(Bug.GC_READS_BEFORE_LISTING):
            newest = yield from self.read_newest(PARENT)
            names = yield ListPacks()
            flying = yield InFlight()
        elif self.has(Bug.GC_READS_FLIGHT_LAST):
            names = yield ListPacks()
            newest = yield from self.read_newest(PARENT)
            flying = yield InFlight()
        else:
            names = yield ListPacks()
            flying = yield InFlight()
            newest = yield from self.read_newest(PARENT)
        if not isinstance(newest, Entry):
            return "gc: log unreadable"
        if newest.epoch != epoch and not self.has(Bug.GC_IGNORES_EPOCH):
            return "gc: fenced"
        if not self.has(Bug.GC_WITHOUT_SYNC):
            yield Sync(PARENT)
        if self.has(Bug.GC_IGNORES_FLIGHT):
            flying = frozenset()
        orphans = tuple(sorted(names - flying - newest.packs()))
        for name in orphans:
            yield DeletePack(name)
        return "gc: done"

    def collector(self, epoch: int) -> Program:
        """A thread that collects."""
        return (yield from self.gc(epoch))

    def guest_gc(self) -> Program:
        """gc in a process that opened nothing: allowed only as a bug."""
        base = yield from self.read_newest(PARENT)
        if not isinstance(base, Entry) or not self.has(Bug.GC_BY_ANOTHER_PROCESS):
            return "refused"
        return (yield from self.gc(base.epoch))

    def guest(self, *transactions: Transaction) -> Program:
        """Change the list without being the writer: tag, pin, prune."""
        outcome = None
        for serial, transaction in enumerate(transactions, 1):
            base = yield from self.read_newest(PARENT)
            if not isinstance(base, Entry):
                return "log unreadable"
            outcome, _, entry, base = yield from self.commit(PARENT, base, transaction, serial)
            if outcome is Result.COMMITTED and not self.has(Bug.DELETE_BEFORE_ENTRY):
                yield from self.delete_retired(base, entry)
            del entry, base
        return str(outcome)

    def churn(self, turns: int) -> Program:
        """Others, who make the log move on, one whole commit at a time."""
        for _ in range(turns):
            yield Turn(PARENT)

    def forker(self, checkpoint: str, *, release: bool = False) -> Program:
        """Start the child run from a checkpoint of the parent; later give it back (R10)."""
        base = yield from self.read_newest(PARENT)
        if not isinstance(base, Entry):
            return "log unreadable"
        source = next((r for r in base.records if r.name == checkpoint), None)
        if source is None:
            return str(Result.NOT_FOUND)
        child = yield from self.read_newest(CHILD)
        if not isinstance(child, Entry):
            return "child unreadable"
        result, child, _, _ = yield from self.commit(CHILD, child, Open(self.name), 4)
        if result is not Result.COMMITTED:
            return str(result)
        if child.records:
            return "child is not empty"
        epoch = child.epoch
        lent = (Record(f"{self.name}-copy", (), (), source.packs),)
        take = ForkTo(lent, "fork", epoch, self.name)
        if self.has(Bug.REFER_BEFORE_PIN):
            result, child, _, _ = yield from self.commit(CHILD, child, take, 1)
        result, _, _, _ = yield from self.commit(PARENT, base, Pin(checkpoint, "child"), 2)
        del base
        if result is not Result.COMMITTED:
            return f"pin: {result}"
        if not self.has(Bug.REFER_BEFORE_PIN):
            result, child, _, _ = yield from self.commit(CHILD, child, take, 1)
        if result is not Result.COMMITTED:
            if self.has(Bug.FAILED_FORK_UNPINS):
                yield from self._release_parent()
            return f"fork: {result}"
        if not release:
            return "forked"
        if self.has(Bug.UNPIN_BEFORE_CHILD):
            yield from self._release_parent()
        give = ForkTo((), "give back", epoch, self.name)
        result, _, _, _ = yield from self.commit(CHILD, child, give, 3)
        if result is Result.COMMITTED and not self.has(Bug.UNPIN_BEFORE_CHILD):
            yield from self._release_parent()
        return f"released: {result}"

    def _release_parent(self) -> Program:
        base = yield from self.read_newest(PARENT)
        if isinstance(base, Entry):
            yield from self.commit(PARENT, base, Unpin("child"), 5)
