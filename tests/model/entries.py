"""What the log of the model holds, and the transactions that make the next entry."""

from __future__ import annotations

from dataclasses import dataclass
from enum import Enum, auto
from typing import NamedTuple

PARENT, CHILD = "parent", "child"
"""The two runs of the model; the child is forked from the parent."""

NumberAndId = tuple[int, str]


class Bug(Enum):
    """One rule of the protocol left out; its number in docs/design/commit-protocol.md."""

    NO_PARENT_CHECK = "R1: read whatever is highest"
    READS_AFTER_LISTING = "R1: choose by the listing that came before the reads"
    NO_READ_BACK = "R3: an entry that exists is a failure"
    ANOTHERS_MEANS_LOST = "R3: another's entry at the number means that ours is lost"
    RETRY_WITH_NEW_ID = "R3: send an absent entry again under a new id"
    NO_CHECK_AFTER_CREATE = "R4: created is committed"
    PARENT_CHECK_AFTER_CREATE = "R4: created on top of a parent that matches is committed"
    SHORT_LINEAGE_MEANS_LOST = "R4: what the lineage does not reach is lost"
    RETRY_REUSES_PACKS = "R5: after an unknown commit send the same checkpoint again"
    EPOCH_OF_NEWEST = "R6: take the newest entry's epoch for that of the own open entry"
    NO_FENCING = "R6: do not look at the epoch of a new base"
    PACKS_BEFORE_OPEN = "R6: write packs before the open entry is committed"
    NO_RECHECK_AFTER_REBASE = "R7: check reused packs on the first base only"
    STALE_RETENTION = "R7: decide what to retire on the first base only"
    REUSED_NAMES = "R8: name packs by their content"
    DELETE_BEFORE_ENTRY = "R9: delete packs before the entry that retires them"
    UNKNOWN_CLEANS_UP = "R9: delete the packs of a save whose fate is unknown"
    KEEP_FIRST_ENTRY = "R10: never prune a run's first entry"
    PRUNE_PARENT = "R10: prune the log up to the newest entry's parent"
    GC_BY_ANOTHER_PROCESS = "R11: collect in a process that did not open the epoch"
    GC_IGNORES_EPOCH = "R11: collect although the epoch is another's"
    GC_IGNORES_FLIGHT = "R11: collect what saves have in flight"
    GC_READS_BEFORE_LISTING = "R11: read the newest entry, then list packs"
    GC_LOOKS_AT_FLIGHT_LAST = "R11: read the newest entry, then look what is in flight"
    GC_WITHOUT_SYNC = "R12: collect by an entry that is not durable"
    BUILD_WITHOUT_SYNC = "R12: build on an entry that is not durable"
    PIN_WITHOUT_RECHECK = "R13: check the checkpoint on the first base only"
    REFER_BEFORE_PIN = "R13: refer to the parent's packs before they are pinned"
    FAILED_FORK_UNPINS = "R13: a fork that fails takes its pin away"
    UNPIN_BEFORE_CHILD = "R14: unpin before the child's log has let go"
    LEAVE_OUT_WHAT_IS_THERE = "R15: leave a number out where another's entry is"
    LEAVE_OUT_UNKNOWN = "R15: leave a number out where the put failed"
    PRUNE_BY_NUMBER = "R15: prune the log as if no number was left out"
    LEFT_OUT_MEANS_LOST = "R15: what was sent before a number was left out is lost with the last"
    DELETE_SPOILED = "R15: delete an entry that arrived wrong, and send it again"


@dataclass(frozen=True)
class Settings:
    """How fine the model is, and which rules it leaves out."""

    bugs: frozenset[Bug] = frozenset()
    ancestors: int = 2
    """Entries that an entry names besides itself and its parent, at most."""
    keep_entries: int = 2
    """Newest entries that log pruning leaves: two are the fewest that the rules allow."""
    atomic_reads: bool = False
    """Whether `read_newest` is one step."""
    mixed_lists: bool = False
    """Whether listings of the log are no snapshots."""
    one_listing: bool = False
    """Whether listings say what is in an entry, so that one tells of an entry that was
    just created whether it is the newest."""
    tidy: bool = False
    """Whether a save that is fenced deletes its packs. Allowed, as its entry is then
    surely lost; a wrong verdict shows at once."""
    retries: int = 1
    """How often an absent entry is sent again."""
    read_attempts: int = 3
    """How often a reader looks again before it gives up."""

    def oldest_prunable(self) -> int:
        """The lowest entry that log pruning deletes."""
        return 2 if Bug.KEEP_FIRST_ENTRY in self.bugs else 1


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
    parent: NumberAndId | None
    ancestors: tuple[NumberAndId, ...]
    epoch: int
    holder: str
    """Who opened the epoch."""
    author: str
    action: str
    records: tuple[Record, ...]
    spoiled: bool = False
    """Whether the store holds other bytes than were sent: nobody can read it."""

    def lineage(self) -> dict[int, str]:
        parent = (self.parent,) if self.parent else ()
        return dict(((self.number, self.id), *parent, *self.ancestors))

    def packs(self) -> set[str]:
        return {pack for record in self.records for pack in record.packs}

    def __repr__(self) -> str:
        listed = " ".join("+".join((r.name, *r.pins)) for r in self.records)
        wrong = ", spoiled" if self.spoiled else ""
        return (
            f"<{self.number} {self.id}: {self.action}, epoch {self.epoch}, lists {listed}{wrong}>"
        )


class Damaged(NamedTuple):
    """The newest entry that can be used, where there are higher ones that cannot."""

    entry: Entry
    highest: int


class Result(Enum):
    """How a transaction ended."""

    COMMITTED = auto()
    FENCED = auto()
    BASE_LOST = auto()
    NOT_FOUND = auto()
    NOTHING_TO_DO = auto()
    UNKNOWN = auto()


class Draft(NamedTuple):
    """What the next entry says."""

    action: str
    records: tuple[Record, ...]
    epoch: int
    holder: str


NOTHING = Entry(0, "", None, (), 0, "", "", "", ())
"""The base of a run's first entry."""


def next_entry(
    draft: Draft, base: Entry, id: str, author: str, settings: Settings, number: int = 0
) -> Entry:
    """The entry that follows `base` and says what `draft` wants (R2). `number`: if not the
    next one."""
    lineage = sorted(base.lineage().items(), reverse=True) if base.number else []
    return Entry(
        number=number or base.number + 1,
        id=id,
        parent=lineage[0] if lineage else None,
        ancestors=tuple(lineage[1 : 1 + settings.ancestors]),
        epoch=draft.epoch,
        holder=draft.holder,
        author=author,
        action=draft.action,
        records=draft.records,
    )


# -- transactions: a draft on each base, or why there is none --------------------------
#
# `first` is the base that the transaction began with. Only bugs look at it.


def keep_newest(records: tuple[Record, ...], count: int) -> tuple[Record, ...]:
    """Retention: the `count` newest and whatever is pinned."""
    cut = len(records) - count
    return tuple(r for i, r in enumerate(records) if i >= cut or r.pins)


class Save(NamedTuple):
    """Add a checkpoint, retire older ones (R7)."""

    checkpoint: str
    written: tuple[str, ...]
    reused: tuple[str, ...]
    epoch: int
    holder: str
    keep: int

    def draft(self, base: Entry, first: Entry, bugs: frozenset[Bug]) -> Draft | Result:
        if base.epoch != self.epoch and Bug.NO_FENCING not in bugs:
            return Result.FENCED
        checked = first if Bug.NO_RECHECK_AFTER_REBASE in bugs else base
        if not checked.packs().issuperset(self.reused):
            return Result.BASE_LOST
        records = base.records
        if all(record.name != self.checkpoint for record in records):
            records = (*records, Record(self.checkpoint, self.written + self.reused))
        kept = keep_newest(records, self.keep)
        if Bug.STALE_RETENTION in bugs:
            stay = keep_newest((*first.records, records[-1]), self.keep)
            gone = {r.name for r in first.records} - {r.name for r in stay}
            kept = tuple(r for r in records if r.name not in gone)
        return Draft("save", kept, self.epoch, self.holder)


class Open(NamedTuple):
    """Become the writer."""

    holder: str

    def draft(self, base: Entry, first: Entry, bugs: frozenset[Bug]) -> Draft:
        del first, bugs
        return Draft("open", base.records, base.epoch + 1, self.holder)


class Pin(NamedTuple):
    """Tag or pin a checkpoint, as a guest (R13)."""

    checkpoint: str
    reason: str

    def draft(self, base: Entry, first: Entry, bugs: frozenset[Bug]) -> Draft | Result:
        checked = first if Bug.PIN_WITHOUT_RECHECK in bugs else base
        if all(record.name != self.checkpoint for record in checked.records):
            return Result.NOT_FOUND
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
    """Apply retention as a guest: keep the newest `keep`, or those of `only` (R7)."""

    keep: int
    only: tuple[str, ...] = ()
    """If given, the policy keeps these instead of the newest (say, the best)."""

    def draft(self, base: Entry, first: Entry, bugs: frozenset[Bug]) -> Draft | Result:
        decided_on = first if Bug.STALE_RETENTION in bugs else base
        if self.only:
            stay = {r.name for r in decided_on.records if r.pins or r.name in self.only}
        else:
            stay = {r.name for r in keep_newest(decided_on.records, self.keep)}
        gone = {r.name for r in decided_on.records} - stay
        records = tuple(r for r in base.records if r.name not in gone)
        if not records or records == base.records:
            return Result.NOTHING_TO_DO
        return Draft("prune", records, base.epoch, base.holder)


class Touch(NamedTuple):
    """Change nothing that matters here (log a metric), as a guest."""

    def draft(self, base: Entry, first: Entry, bugs: frozenset[Bug]) -> Draft:
        del first, bugs
        return Draft("touch", base.records, base.epoch, base.holder)


class Replace(NamedTuple):
    """The child's writer lists other checkpoints."""

    action: str
    records: tuple[Record, ...]
    epoch: int

    def draft(self, base: Entry, first: Entry, bugs: frozenset[Bug]) -> Draft | Result:
        del first, bugs
        if base.epoch != self.epoch:
            return Result.FENCED
        return Draft(self.action, self.records, base.epoch, base.holder)


Transaction = Save | Open | Pin | Unpin | Prune | Touch | Replace
