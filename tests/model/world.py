"""The store, the network and the machine around the programs; what must always hold.

A state is a tuple of small values (see `World.initial`). Everything that happens is one
step: one operation of one thread with one of its possible outcomes, a late request that
lands, a crash, a power loss.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import combinations
from typing import Any, NamedTuple

from . import operations as op
from .entries import CHILD, PARENT, Entry, Record, Settings, Touch, next_entry
from .explore import FINISHED, Locals, Model, State, Violation
from .programs import Start
from .protocol import Process

RUNS = {PARENT: 0, CHILD: 1}


class Thread(NamedTuple):
    """A program in a process. Threads of one process share what is in flight."""

    process: str
    program: Start
    restart: Start | None = None
    """What runs after a crash of the process; without it the process stays dead."""


@dataclass(frozen=True)
class Scenario:
    """A bounded configuration."""

    name: str
    threads: Sequence[Thread]
    log: Sequence[Entry]
    packs: Sequence[str]
    child_log: Sequence[Entry] = ()
    settings: Settings = field(default_factory=Settings)
    faults: int = 0
    """How many requests on the log fail. A failed put has not arrived: it lands at any
    later moment or never (a lost reply is one that lands at once)."""
    duplicates: bool = False
    """Whether a fault may also be a put that arrives once more, later (its reply is
    right): HTTP clients and proxies repeat requests."""
    unreadable: bool = False
    """Whether a fault may also be a read that fails."""
    listing_spans: int = 99
    """Most entries that are created while one listing goes on."""
    collects: bool = False
    """Whether anyone lists packs. If not, the moment at which a pack is written does not
    matter, and it is written at once."""
    crashes: int = 0
    disk: bool = False
    """Whether what is visible may be lost with the power until it is synced."""

    def world(self, *, merge: bool = True) -> World:
        return World(self, merge=merge)


# Positions in a state.
LOGS, PACKS, FLIGHT, PENDING, LISTS, FAULTS, CRASHES, HISTORY, VOLATILE, ACKED, LOCALS = range(11)

Effect = tuple[Hashable, dict[int, Any], str]
"""The result that the thread gets, what changes in the state, how to tell it."""


class World(Model):
    """A scenario's transition system."""

    def __init__(self, scenario: Scenario, *, merge: bool = True) -> None:
        self.scenario = scenario
        self.threads = list(scenario.threads)
        self.processes = sorted({t.process for t in self.threads})
        self._process_of = [self.processes.index(t.process) for t in self.threads]
        self._alone = [
            sum(t.process == other.process for other in self.threads) == 1 for t in self.threads
        ]
        programs = [self._bound(t, t.program) for t in self.threads]
        self._restart_of: dict[int, int] = {}
        for at, thread in enumerate(self.threads):
            if thread.restart is not None:
                self._restart_of[at] = len(programs)
                programs.append(self._bound(thread, thread.restart, "r"))
        self.entries: list[Entry] = []
        self._entry_index: dict[Entry, int] = {}
        self._pack_bits: dict[str, int] = {}
        self._facts: list[tuple[int, int]] = []
        self.locals = Locals(programs, self._decoded, merge)
        self._names = [t.process for t in self.threads] + [
            f"{self.threads[at].process} (restarted)" for at in self._restart_of
        ]
        self._plans: dict[int, Callable[[State, int], list[Effect]]] = {}

    def _bound(
        self, thread: Thread, program: Start, suffix: str = ""
    ) -> Callable[[], op.Program]:
        process = Process(thread.process + suffix, self.scenario.settings)
        return lambda: program(process)

    # -- small values for big ones ------------------------------------------------

    def _entry(self, entry: Entry) -> int:
        found = self._entry_index.get(entry)
        if found is None:
            found = self._entry_index[entry] = len(self.entries)
            self.entries.append(entry)
            own = sum({self._bit(pack) for pack in entry.packs()})
            lent = sum({self._bit(pack) for r in entry.records for pack in r.borrowed})
            self._facts.append((own, lent))
        return found

    def _decoded(self, result: Any) -> Any:
        """What the program is sent: entries travel as ("entry", small number)."""
        return self.entries[result[1]] if isinstance(result, tuple) else result

    def _bit(self, pack: str) -> int:
        return self._pack_bits.setdefault(pack, 1 << len(self._pack_bits))

    def _pack_names(self, bits: int) -> frozenset[str]:
        return frozenset(name for name, bit in self._pack_bits.items() if bits & bit)

    # -- Model ----------------------------------------------------------------------

    def initial(self) -> State:
        logs = tuple(
            tuple(self._entry(entry) for entry in log)
            for log in (self.scenario.log, self.scenario.child_log)
        )
        state: list[Any] = [None] * 11
        state[LOGS] = logs  # entries by number, per run
        state[PACKS] = sum(self._bit(pack) for pack in self.scenario.packs)
        state[FLIGHT] = (0,) * len(self.processes)
        state[PENDING] = ()  # requests that have not arrived: (run, entry)
        state[LISTS] = (None,) * len(self.threads)  # begun: (certain, possible) numbers
        state[FAULTS] = self.scenario.faults
        state[CRASHES] = self.scenario.crashes
        state[HISTORY] = logs  # what readers could choose, in turn
        state[VOLATILE] = ()  # visible and not synced: (run, entry)
        state[ACKED] = ()  # acknowledged, where power can fail: (run, entry)
        state[LOCALS] = tuple(self.locals.start(at) for at in range(len(self.threads)))
        current = tuple(state)
        for at in range(len(self.threads)):
            current = self._run_eager(current, at)
        return current

    def endings(self) -> Iterable[tuple[str, str]]:
        return {(self._names[thread], how) for thread, how in self.locals.endings}

    def describe(self, label: Any) -> str:
        who, text, operation = label
        if who is None:
            return text
        shown = operation
        if isinstance(operation, op.Put):
            shown = f"put {operation.run} {operation.entry}"
        return f"{self._names[who]:6} {shown} -> {text}"

    def successors(self, state: State) -> Iterator[tuple[Any, State | Violation]]:
        for at, local in enumerate(state[LOCALS]):
            if local == FINISHED:
                continue
            operation = self.locals.table[local].operation
            try:
                effects = self._effects(state, at, local)
            except Violation as violation:
                yield (at, "VIOLATION", operation), violation
                continue
            for result, changes, text in effects:
                label = (at, text, operation)
                try:
                    yield label, self._after(state, at, local, result, changes)
                except Violation as violation:
                    yield label, violation
        yield from self._landings(state)
        if state[CRASHES]:
            yield from self._power_losses(state) if self.scenario.disk else self._crashes(state)

    def _after(
        self, state: State, at: int, local: int, result: Hashable, changes: dict[int, Any]
    ) -> State:
        locals_ = state[LOCALS]
        moved = self.locals.step(local, result)
        changes[LOCALS] = (*locals_[:at], moved, *locals_[at + 1 :])
        return self._run_eager(_with(state, changes), at)

    # -- operations -------------------------------------------------------------------

    def _run_eager(self, state: State, at: int) -> State:
        """Take the steps of thread `at` that no other thread can notice."""
        while True:
            local = state[LOCALS][at]
            if local == FINISHED:
                return state
            operation = self.locals.table[local].operation
            match operation:
                case op.Acknowledge(run, entry):
                    result, changes = None, self._acknowledged(state, RUNS[run], entry)
                case op.Observe(run, entry):
                    self._observed(state, RUNS[run], entry)
                    result, changes = None, {}
                case op.Sync() if not self.scenario.disk:
                    result, changes = None, {}
                case op.InFlight() | op.Settled() if self._alone[at]:
                    ((result, changes, _),) = self._effects(state, at, local)
                case op.PutPack() if not self.scenario.collects:
                    ((result, changes, _),) = self._effects(state, at, local)
                case op.DeleteOldest():
                    ((result, changes, _),) = self._effects(state, at, local)
                    if result:
                        return state
                case _:
                    return state
            locals_ = state[LOCALS]
            moved = self.locals.step(local, result)
            changes[LOCALS] = (*locals_[:at], moved, *locals_[at + 1 :])
            state = _with(state, changes)

    def _effects(self, state: State, at: int, local: int) -> list[Effect]:
        plan = self._plans.get(local)
        if plan is None:
            plan = self._plans[local] = self._plan(self.locals.table[local].operation)
        return plan(state, at)

    def _plan(self, operation: Any) -> Callable[[State, int], list[Effect]]:
        """What an operation does, with everything looked up that can be beforehand."""
        match operation:
            case op.Put(run, entry):
                which, eid = RUNS[run], self._entry(entry)
                return lambda state, at: self._put(state, which, eid)
            case op.Get(run, number):
                which = RUNS[run]
                return lambda state, at: self._get(state, which, number)
            case op.ListBegin(run):
                which = RUNS[run]
                return lambda state, at: self._list_begin(state, at, which)
            case op.Highest(run):
                which = RUNS[run]
                return lambda state, at: self._highest(state, at, which)
            case op.ReadNewest(run):
                which = RUNS[run]
                return lambda state, at: self._read_newest(state, which)
            case op.DeleteOldest(run, last):
                which = RUNS[run]
                return lambda state, at: self._delete_entry(state, which, last)
            case op.Turn(run, prune):
                which = RUNS[run]
                return lambda state, at: self._turn(state, which, prune)
            case op.Sync(run):
                which = RUNS[run]
                return lambda state, at: [
                    (None, {VOLATILE: tuple(v for v in state[VOLATILE] if v[0] != which)}, "done")
                ]
            case op.PutPack(name):
                bit = self._bit(name)
                return lambda state, at: self._put_pack(state, at, bit)
            case op.ListPacks():
                assert self.scenario.collects
                return lambda state, at: [(self._pack_names(state[PACKS]), {}, "")]
            case op.DeletePack(name):
                bit = self._bit(name)
                return lambda state, at: self._delete_pack(state, name, bit)
            case op.InFlight():
                return lambda state, at: [
                    (self._pack_names(state[FLIGHT][self._process_of[at]]), {}, "")
                ]
            case op.Settled():
                return lambda state, at: [
                    (None, {FLIGHT: self._flight(state, at, 0)}, "settled")
                ]
        raise TypeError(operation)

    def _put(self, state: State, run: int, eid: int) -> list[Effect]:
        effects: list[Effect] = []
        if self._listings_hold(state, run):
            return []
        if self._find(state[LOGS][run], self.entries[eid].number) is None:
            effects.append(("ok", self._created(state, run, eid), "ok"))
        else:
            effects.append(("exists", {}, "exists"))
        if state[FAULTS]:
            later = {
                FAULTS: state[FAULTS] - 1,
                PENDING: tuple(sorted((*state[PENDING], (run, eid)))),
            }
            effects.append(("error", later, "error, the request is on its way"))
            if self.scenario.duplicates and effects[0][0] == "ok":
                again = effects[0][1] | later
                effects.append(("ok", again, "ok, and the request comes once more"))
        return effects

    def _get(self, state: State, run: int, number: int) -> list[Effect]:
        found = self._find(state[LOGS][run], number)
        if found is None:
            effects: list[Effect] = [(None, {}, "absent")]
        else:
            effects = [(("entry", found), {}, self.entries[found].id)]
        return effects + self._failed_read(state)

    def _failed_read(self, state: State) -> list[Effect]:
        if self.scenario.unreadable and state[FAULTS]:
            return [("error", {FAULTS: state[FAULTS] - 1}, "error")]
        return []

    def _read_newest(self, state: State, run: int) -> list[Effect]:
        log = state[LOGS][run]
        effects: list[Effect] = [(("entry", log[-1]) if log else None, {}, "read")]
        return effects + self._failed_read(state)

    def _list_begin(self, state: State, at: int, run: int) -> list[Effect]:
        numbers = frozenset(self.entries[eid].number for eid in state[LOGS][run])
        lists = state[LISTS]
        shown = tuple(sorted(numbers))
        begun: Listing = (run, shown, shown, 0)
        return [(None, {LISTS: (*lists[:at], begun, *lists[at + 1 :])}, "begun")]

    def _highest(self, state: State, at: int, run: int) -> list[Effect]:
        lists = state[LISTS]
        if lists[at] is None:
            log = state[LOGS][run]
            highest = self.entries[log[-1]].number if log else 0
            return [(highest, {}, str(highest))]
        _, certain, possible, _ = lists[at]
        floor = max(certain, default=0)
        ended = {LISTS: (*lists[:at], None, *lists[at + 1 :])}
        answers = {floor} | {number for number in possible if number >= floor}
        return [(number, ended, str(number)) for number in sorted(answers, reverse=True)]

    def _listings_hold(self, state: State, run: int) -> bool:
        """Whether a listing has to end before one more entry is created."""
        spans = self.scenario.listing_spans
        return any(begun and begun[0] == run and begun[3] >= spans for begun in state[LISTS])

    def _delete_entry(self, state: State, run: int, last: int) -> list[Effect]:
        old = [eid for eid in state[LOGS][run] if self.entries[eid].number <= last]
        if not old:
            return [(False, {}, "nothing to delete")]
        gone = self.entries[old[0]]
        log = tuple(eid for eid in state[LOGS][run] if eid != old[0])
        changes = self._log_changed(state, run, log, gone.number, False)
        return [(True, changes, f"deleted {gone.number}")]

    def _turn(self, state: State, run: int, prune: bool) -> list[Effect]:
        if not state[LOGS][run] or self._listings_hold(state, run):
            return []
        settings = self.scenario.settings
        base = self.entries[state[LOGS][run][-1]]
        touch = Touch().draft(base, base, frozenset())
        entry = next_entry(touch, base, f"t{base.number + 1}", "churn", settings)
        changes = self._created(state, run, self._entry(entry))
        last = entry.number - settings.keep_entries if prune else 0
        for eid in changes[LOGS][run]:
            number = self.entries[eid].number
            if number <= last:
                log = tuple(e for e in changes[LOGS][run] if e != eid)
                changes |= self._log_changed(_with(state, changes), run, log, number, False)
        pruned = f", log pruned up to {last}" if prune else ""
        return [(entry.number, changes, f"{entry.id} committed{pruned}")]

    def _put_pack(self, state: State, at: int, bit: int) -> list[Effect]:
        existed = state[PACKS] & bit
        changes = {
            PACKS: state[PACKS] | bit,
            FLIGHT: self._flight(state, at, state[FLIGHT][self._process_of[at]] | bit),
        }
        return [("exists" if existed else "ok", changes, "exists" if existed else "ok")]

    def _flight(self, state: State, at: int, bits: int) -> tuple[int, ...]:
        process = self._process_of[at]
        flight = state[FLIGHT]
        return (*flight[:process], bits, *flight[process + 1 :])

    def _delete_pack(self, state: State, name: str, bit: int) -> list[Effect]:
        for run, kind in ((0, 0), (1, 1)):
            if state[HISTORY][run]:
                head = state[HISTORY][run][-1]
                if self._facts[head][kind] & bit:
                    needed = "the child borrows it" if run else f"{self.entries[head]} needs it"
                    raise Violation("I5" if run else "I1", f"pack {name} is deleted, but {needed}")
        return [(None, {PACKS: state[PACKS] & ~bit}, "done")]

    # -- the log ----------------------------------------------------------------------

    def _find(self, log: tuple[int, ...], number: int) -> int | None:
        entries = self.entries
        return next((eid for eid in log if entries[eid].number == number), None)

    def _created(self, state: State, run: int, eid: int) -> dict[int, Any]:
        log = tuple(
            sorted((*state[LOGS][run], eid), key=lambda found: self.entries[found].number)
        )
        changes = self._log_changed(state, run, log, self.entries[eid].number, True)
        if self.scenario.disk:
            changes[VOLATILE] = tuple(sorted((*state[VOLATILE], (run, eid))))
        return changes

    def _log_changed(
        self, state: State, run: int, log: tuple[int, ...], number: int, created: bool
    ) -> dict[int, Any]:
        logs = (log, state[LOGS][1]) if run == 0 else (state[LOGS][0], log)
        changes: dict[int, Any] = {LOGS: logs}
        changes |= self._chosen(state, run, log)
        if any(begun and begun[0] == run for begun in state[LISTS]):
            changes[LISTS] = tuple(
                _list_changed(begun, number, created) if begun and begun[0] == run else begun
                for begun in state[LISTS]
            )
        return changes

    def _chosen(self, state: State, run: int, log: tuple[int, ...]) -> dict[int, Any]:
        """Check what a reader would choose now; extend the history (I1 to I4, I7, I8)."""
        history = state[HISTORY][run]
        if not log:
            raise Violation("I3", "the log is empty")
        newest = self.entries[log[-1]]
        if newest.parent is not None:
            under = self._find(log, newest.parent[0])
            if under is None or self.entries[under].id != newest.parent[1]:
                raise Violation("I3", f"no reader can use {newest}: its parent is not there")
        if history and log[-1] == history[-1]:
            return {}
        if history:
            before = self.entries[history[-1]]
            if newest.parent != (before.number, before.id):
                raise Violation("I3", f"readers go from {before} to {newest}")
            self._check_step(history, before, newest)
        own, lent = self._facts[log[-1]]
        missing = (lent if run else own) & ~state[PACKS]
        if missing:
            names = ", ".join(sorted(self._pack_names(missing)))
            raise Violation("I5" if run else "I1", f"{newest} needs {names}: deleted")
        extended = (*history, log[-1])
        both = state[HISTORY]
        return {HISTORY: (extended, both[1]) if run == 0 else (both[0], extended)}

    def _check_step(self, history: tuple[int, ...], before: Entry, newest: Entry) -> None:
        """One entry of the history after another."""
        if newest.action == "open":
            if newest.epoch != before.epoch + 1:
                raise Violation("I4", f"{newest} opens an epoch that is not new")
        elif (newest.epoch, newest.holder) != (before.epoch, before.holder):
            raise Violation("I4", f"{newest} follows epoch {before.epoch}")
        if newest.action == "save" and newest.author != before.holder:
            raise Violation("I4", f"{newest} is by {newest.author}, {before.holder} is the writer")
        new = {record.name: record for record in newest.records}
        for record in before.records:
            kept = new.pop(record.name, None)
            if kept is None:
                _check_retired(record, newest)
            elif newest.action != "unpin" and not set(kept.pins) >= set(record.pins):
                raise Violation("I7", f"{newest} drops a pin of {record.name}")
        for name in new:
            if any(name == r.name for eid in history for r in self.entries[eid].records):
                raise Violation("I8", f"{newest} adds {name}, which was added before")

    def _acknowledged(self, state: State, run: int, entry: Entry) -> dict[int, Any]:
        eid = self._entry(entry)
        if eid not in state[HISTORY][run]:
            raise Violation("I3", f"{entry} is acknowledged, and not in the history")
        if not self.scenario.disk:
            return {}
        if (run, eid) in state[VOLATILE]:
            raise Violation("I2", f"{entry} is acknowledged, and not durable")
        return {ACKED: tuple(sorted({*state[ACKED], (run, eid)}))}

    def _observed(self, state: State, run: int, entry: Entry | None) -> None:
        if entry is None:
            if state[HISTORY][run]:
                raise Violation("I3", "a run that has entries is taken for a new one")
        elif self._entry(entry) not in state[HISTORY][run]:
            raise Violation("I3", f"{entry} is taken for the newest, and not in the history")

    # -- what happens by itself ---------------------------------------------------------

    def _landings(self, state: State) -> Iterator[tuple[Any, State | Violation]]:
        for run, eid in dict.fromkeys(state[PENDING]):
            entry = self.entries[eid]
            if self._listings_hold(state, run):
                continue
            if self._find(state[LOGS][run], entry.number) is not None:
                continue  # it would find the number taken, now as when it never arrives
            pending = list(state[PENDING])
            pending.remove((run, eid))
            label = (None, f"       the late put of {entry} lands", None)
            try:
                changes = self._created(state, run, eid)
            except Violation as violation:
                yield label, violation
                continue
            changes[PENDING] = tuple(pending)
            yield label, _with(state, changes)

    def _crashes(self, state: State) -> Iterator[tuple[Any, State | Violation]]:
        for process, name in enumerate(self.processes):
            threads = [at for at, of in enumerate(self._process_of) if of == process]
            if not any(at in self._restart_of for at in threads):
                continue  # a process that is never scheduled again is as good as dead
            if all(state[LOCALS][at] == FINISHED for at in threads):
                continue
            yield (None, f"       {name} crashes", None), self._restarted(state, threads)

    def _restarted(self, state: State, threads: list[int]) -> State:
        after = list(state)
        locals_, flight, lists = list(state[LOCALS]), list(state[FLIGHT]), list(state[LISTS])
        for at in threads:
            flight[self._process_of[at]] = 0
            lists[at] = None
            again = self._restart_of.get(at)
            locals_[at] = FINISHED if again is None else self.locals.start(again)
        after[LOCALS], after[FLIGHT], after[LISTS] = tuple(locals_), tuple(flight), tuple(lists)
        after[CRASHES] = state[CRASHES] - 1
        return tuple(after)

    def _power_losses(self, state: State) -> Iterator[tuple[Any, State | Violation]]:
        """Everything stops; any subset of what was not synced is gone."""
        for count in range(len(state[VOLATILE]) + 1):
            for lost in combinations(state[VOLATILE], count):
                names = ", ".join(repr(self.entries[eid]) for _, eid in lost) or "nothing"
                label = (None, f"       power loss; lost: {names}", None)
                try:
                    yield label, self._without(state, lost)
                except Violation as violation:
                    yield label, violation

    def _without(self, state: State, lost: tuple[tuple[int, int], ...]) -> State:
        after = list(self._restarted(state, list(range(len(self.threads)))))
        after[VOLATILE] = after[PENDING] = ()
        for run, eid in lost:
            if (run, eid) in state[ACKED]:
                raise Violation("I2", f"{self.entries[eid]} was acknowledged, and is gone")
        logs, histories = [], []
        for run in (0, 1):
            gone = {eid for which, eid in lost if which == run}
            logs.append(tuple(eid for eid in state[LOGS][run] if eid not in gone))
            histories.append(tuple(eid for eid in state[HISTORY][run] if eid not in gone))
        after[LOGS], after[HISTORY] = tuple(logs), tuple(histories)
        for run, log in enumerate(logs):
            if log:
                after_state = tuple(after)
                self._chosen(after_state, run, log)
                own, lent = self._facts[log[-1]]
                if (lent if run else own) & ~state[PACKS]:
                    raise Violation("I1", f"{self.entries[log[-1]]} is back, its packs are not")
        return tuple(after)


def _with(state: State, changes: dict[int, Any]) -> State:
    after = list(state)
    for position, value in changes.items():
        after[position] = value
    return tuple(after)


Listing = tuple[int, tuple[int, ...], tuple[int, ...], int]
"""A listing that was begun: the run, what it certainly shows, what it may show, and how
many entries were created meanwhile."""


def _list_changed(begun: Listing, number: int, created: bool) -> Listing:
    run, certain, possible, count = begun
    if created:
        return run, certain, tuple(sorted({*possible, number})), count + 1
    return run, tuple(n for n in certain if n != number), possible, count


def _check_retired(record: Record, newest: Entry) -> None:
    if newest.action not in {"save", "prune"}:
        raise Violation("I2", f"{newest} loses {record.name}")
    if record.pins:
        raise Violation("I7", f"{newest} retires {record.name}, pinned for {record.pins}")
