"""What the processes of the scenarios do with the protocol."""

from __future__ import annotations

from collections.abc import Callable

from .entries import (
    CHILD,
    NOTHING,
    PARENT,
    Bug,
    Damaged,
    Entry,
    Open,
    Pin,
    Record,
    Replace,
    Result,
    Save,
    Transaction,
    Unpin,
)
from .operations import DeletePack, Program, PutPack, Settled, Turn
from .protocol import Process

Start = Callable[[Process], Program]


def writer(
    saves: int,
    *,
    opened: Entry = NOTHING,
    keep: int = 2,
    reuse: bool = True,
    collect: bool = False,
) -> Start:
    """Open the run (unless `opened`, an entry of this process, has), save, collect orphans.

    Each save writes a pack, reuses one of the oldest checkpoint where `reuse` says so,
    and retires all but the newest `keep`.
    """

    def program(process: Process) -> Program:
        early = process.has(Bug.PACKS_BEFORE_OPEN) and opened is NOTHING
        if early:
            yield PutPack(f"{process.name}1")
        known, epoch = opened, opened.epoch
        if opened is NOTHING:
            known, epoch = yield from open_run(process, PARENT, 0)
            if not isinstance(known, Entry):
                return known
        serial, outcome = 1, None
        while serial <= saves and outcome is not Result.FENCED:
            if outcome is Result.UNKNOWN:  # the old base may be gone (R5)
                known = yield from process.read_newest(PARENT)
                if isinstance(known, Damaged):
                    known = known.entry
                if not isinstance(known, Entry):
                    return "log unreadable"
            again = outcome is Result.UNKNOWN and process.has(Bug.RETRY_REUSES_PACKS)
            name = f"{process.name}{serial - again}"
            outcome, known = yield from save(
                process, known, epoch, serial, name, (early and serial == 1) or again, keep, reuse
            )
            serial += 1
            del again, name
        if collect:
            outcome = yield from process.gc(epoch)
        return outcome

    return program


def open_run(process: Process, run: str, serial: int) -> Program:
    """(The newest entry known, the epoch that is ours), or why there is none (R6)."""
    base = yield from process.read_newest(run, may_be_new=True)
    if base == "error":
        return "log unreadable", 0
    number = 0
    if isinstance(base, Damaged):  # whoever opens the run repairs its log (R15)
        number, base = base.highest + 1, base.entry
    change = Open(process.name)
    result, newest, own, _ = yield from process.commit(run, base, change, serial, number)
    if result is not Result.COMMITTED:
        return result, 0
    return newest, (newest if process.has(Bug.EPOCH_OF_NEWEST) else own).epoch


def save(
    process: Process,
    head: Entry,
    epoch: int,
    serial: int,
    name: str,
    is_written: bool,
    keep: int,
    reuse: bool,
) -> Program:
    """(Result, the newest entry known)."""
    oldest = head.records[0].packs if head.records else ()
    reused = oldest[:1] if reuse else ()
    written: tuple[str, ...] = (name,)
    if process.has(Bug.REUSED_NAMES):  # named by content, and that is the oldest one's
        written, reused = reused, ()
    for pack in () if is_written else written:
        yield PutPack(pack)
    change = Save(name, written, reused, epoch, process.name, keep)
    outcome, head, entry, base = yield from process.commit(PARENT, head, change, serial)
    if outcome is Result.BASE_LOST:
        # Write what has gone anew, under a new name, and commit once more (R7).
        anew = f"{name}b"
        yield PutPack(anew)
        written = (*written, anew)
        change = Save(name, written, (), epoch, process.name, keep)
        outcome, head, entry, base = yield from process.commit(PARENT, head, change, serial + 5)
    if outcome is Result.COMMITTED:
        # All numbers sent before are below this one, so they are settled as well (R5).
        yield Settled()
        if not process.has(Bug.DELETE_BEFORE_ENTRY):
            yield from process.delete_retired(base, entry)
    elif (outcome is Result.FENCED and process.settings.tidy) or (
        outcome is Result.UNKNOWN and process.has(Bug.UNKNOWN_CLEANS_UP)
    ):
        for pack in written:
            yield DeletePack(pack)
    return outcome, head


def collector(epoch: int) -> Start:
    """gc in another thread of the process that opened `epoch`."""

    def program(process: Process) -> Program:
        return (yield from process.gc(epoch))

    return program


def foreign_collector() -> Start:
    """gc in a process that opened nothing: it refuses, but for a bug."""

    def program(process: Process) -> Program:
        base = yield from process.read_newest(PARENT)
        if not isinstance(base, Entry) or not process.has(Bug.GC_BY_ANOTHER_PROCESS):
            return "refused"
        epoch = base.epoch
        del base
        return (yield from process.gc(epoch))

    return program


def guest(*changes: Transaction) -> Start:
    """Change the list without being the writer: tag, pin, prune."""

    def program(process: Process) -> Program:
        outcome = None
        for serial, change in enumerate(changes, 1):
            base = yield from process.read_newest(PARENT)
            if not isinstance(base, Entry):
                return "log unreadable"
            outcome, _, entry, base = yield from process.commit(PARENT, base, change, serial)
            if outcome is Result.COMMITTED and not process.has(Bug.DELETE_BEFORE_ENTRY):
                yield from process.delete_retired(base, entry)
            del entry, base
        return outcome

    return program


def churn(turns: int, *, slowly: bool = False) -> Start:
    """Others, who make the log move on: one whole commit at a time, pruning with it or after."""

    def program(process: Process) -> Program:
        for _ in range(turns):
            number = yield Turn(PARENT, not slowly)
            if slowly:
                yield from process.prune_log(PARENT, number)
        return "done"

    return program


def forker(checkpoint: str, *, release: bool = False) -> Start:
    """Start the child run from a checkpoint of the parent; later give it back (R13, R14)."""

    def program(process: Process) -> Program:
        base = yield from process.read_newest(PARENT)
        if not isinstance(base, Entry):
            return "log unreadable"
        packs = next((r.packs for r in base.records if r.name == checkpoint), None)
        if packs is None:
            return Result.NOT_FOUND
        child, epoch = yield from open_run(process, CHILD, 1)
        if not isinstance(child, Entry):
            return child
        if child.records:
            return "not empty"
        take = Replace("save", (Record(f"{process.name}1", (), (), packs),), epoch)
        if process.has(Bug.REFER_BEFORE_PIN):
            result, child, _, _ = yield from process.commit(CHILD, child, take, 2)
        result, _, _, _ = yield from process.commit(PARENT, base, Pin(checkpoint, "child"), 3)
        del base
        if result is not Result.COMMITTED:
            return f"pin: {result}"
        if not process.has(Bug.REFER_BEFORE_PIN):
            result, child, _, _ = yield from process.commit(CHILD, child, take, 2)
        if result is not Result.COMMITTED:
            if process.has(Bug.FAILED_FORK_UNPINS):
                yield from unpin(process)
            return f"fork: {result}"
        if not release:
            return "forked"
        if process.has(Bug.UNPIN_BEFORE_CHILD):
            yield from unpin(process)
        let_go = Replace("save", (Record(f"{process.name}2", ()),), epoch)
        result, _, _, _ = yield from process.commit(CHILD, child, let_go, 4)
        if result is Result.COMMITTED and not process.has(Bug.UNPIN_BEFORE_CHILD):
            yield from unpin(process)
        return f"release: {result}"

    return program


def unpin(process: Process) -> Program:
    base = yield from process.read_newest(PARENT)
    if isinstance(base, Entry):
        yield from process.commit(PARENT, base, Unpin("child"), 5)
