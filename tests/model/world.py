"""The store, the network and the machine around the programs; what must always hold.

Everything that happens is one step: one operation of one thread with one of its possible
outcomes, a late request that lands, a crash, a power loss.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import combinations
from typing import Any, NamedTuple

from . import operations as op
from .entries import CHILD, PARENT, NumberAndId, Touch, next_entry
from .explore import FINISHED, Locals, Model, State, Violation
from .logs import Logs
from .programs import Start
from .protocol import Process
from .scenarios import Scenario, Thread
from .state import (
    ACKED,
    CRASHES,
    FAULTS,
    FLIGHT,
    HISTORY,
    LISTS,
    LOCALS,
    LOGS,
    PACKS,
    PENDING,
    VOLATILE,
    Effect,
    Interned,
    Listing,
    changed,
)

RUNS = {PARENT: 0, CHILD: 1}


Effects = Callable[[State, int], list[Effect]]
"""What an operation can do in a state, for a thread. Raises Violation."""


class Plan(NamedTuple):
    """How the operation of a local state is carried out."""

    effects: Effects
    eager: bool
    """Whether no other thread can notice when it happens."""


class World(Logs, Model):
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
                self._alone.append(self._alone[at])
        self._small = Interned()
        self.entries = self._small.entries
        self.locals = Locals(programs, self._decoded, merge)
        self.names = [t.process for t in self.threads] + [
            f"{self.threads[at].process} (restarted)" for at in self._restart_of
        ]
        self._plans: dict[int, Plan] = {}

    def _bound(self, thread: Thread, program: Start, suffix: str = "") -> Callable[[], op.Program]:
        process = Process(thread.process + suffix, self.scenario.settings)
        return lambda: program(process)

    def _decoded(self, result: Any) -> Any:
        """What the program is sent: entries travel as ("entry", small number)."""
        return self.entries[result[1]] if isinstance(result, tuple) else result

    # -- Model ----------------------------------------------------------------------

    def initial(self) -> State:
        logs = tuple(
            tuple(self._small.entry(entry) for entry in log)
            for log in (self.scenario.log, self.scenario.child_log)
        )
        state: list[Any] = [None] * 11
        state[LOGS] = logs  # entries by number, per run
        state[PACKS] = sum(self._small.bit(pack) for pack in self.scenario.packs)
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
        return {(self.names[thread], how) for thread, how in self.locals.endings}

    def outside(self, state: State) -> Hashable:
        """What is outside the programs, in words that do not depend on the search."""
        entries = self.entries
        logs, histories = (
            tuple(tuple(entries[eid] for eid in run) for run in state[at]) for at in (LOGS, HISTORY)
        )
        pending, volatile = (
            frozenset((run, entries[eid]) for run, eid in state[at]) for at in (PENDING, VOLATILE)
        )
        counts = (state[FAULTS], state[CRASHES], len(state[PENDING]))
        return logs, histories, pending, volatile, self._small.names(state[PACKS]), counts

    def describe(self, label: Any) -> str:
        who, text, operation = label
        if who is None:
            return text
        shown = operation
        if isinstance(operation, op.Put):
            shown = f"put {operation.run} {operation.entry}"
        return f"{self.names[who]:6} {shown} -> {text}"

    def successors(self, state: State) -> Iterator[tuple[Any, State | Violation]]:
        for at, local in enumerate(state[LOCALS]):
            if local == FINISHED:
                continue
            operation = self.locals.table[local].operation
            try:
                effects = self._plan(local).effects(state, at)
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
        return self._run_eager(changed(state, changes), at)

    # -- operations -------------------------------------------------------------------

    def _run_eager(self, state: State, at: int) -> State:
        """Take the steps of thread `at` that no other thread can notice."""
        while (local := state[LOCALS][at]) != FINISHED and (plan := self._plan(local)).eager:
            operation = self.locals.table[local].operation
            if isinstance(operation, op.DeleteOldest):
                first, last = operation.first, operation.last
                if self._oldest(state, RUNS[operation.run], first, last) is not None:
                    return state  # something is there to delete: that others can notice
            result, changes, _ = plan.effects(state, at)[0]
            locals_ = state[LOCALS]
            moved = self.locals.step(local, result)
            changes[LOCALS] = (*locals_[:at], moved, *locals_[at + 1 :])
            state = changed(state, changes)
        return state

    def _plan(self, local: int) -> Plan:
        plan = self._plans.get(local)
        if plan is None:
            thread, operation, _ = self.locals.table[local]
            plan = Plan(self._effects(operation), self._is_eager(thread, operation))
            self._plans[local] = plan
        return plan

    def _is_eager(self, thread: int, operation: Any) -> bool:
        match operation:
            case op.Acknowledge() | op.Observe() | op.DeleteOldest():
                return True
            case op.Sync():
                return not self.scenario.disk
            case op.InFlight() | op.Settled():
                return self._alone[thread]
            case op.PutPack():
                return not self.scenario.collects
        return False

    def _effects(self, operation: Any) -> Effects:
        """What an operation does, with what can be looked up beforehand looked up."""
        match operation:
            case op.Put(run, entry):
                which, eid = RUNS[run], self._small.entry(entry)
                return lambda state, at: self._put(state, which, eid)
            case op.Get(run, number):
                return lambda state, at: self._get(state, RUNS[run], number)
            case op.ListBegin(run):
                return lambda state, at: self._list_begin(state, at, RUNS[run])
            case op.Highest(run):
                return lambda state, at: self._highest(state, at, RUNS[run])
            case op.Shown(run, entry):
                return lambda state, at: self._shown(state, at, RUNS[run], entry)
            case op.ReadNewest(run):
                return lambda state, at: self._read_newest(state, RUNS[run])
            case op.DeleteOldest(run, first, last):
                return lambda state, at: self._delete_oldest(state, RUNS[run], first, last)
            case op.Turn(run, prune):
                return lambda state, at: self._turn(state, RUNS[run], prune)
            case op.Sync(run):
                return lambda state, at: self._sync(state, RUNS[run])
            case op.PutPack(name):
                bit = self._small.bit(name)
                return lambda state, at: self._put_pack(state, at, bit)
            case op.ListPacks():
                assert self.scenario.collects, "the scenario must say that packs are listed"
                return lambda state, at: [(self._small.names(state[PACKS]), {}, "listed")]
            case op.DeletePack(name):
                bit = self._small.bit(name)
                return lambda state, at: self._delete_pack(state, name, bit)
            case op.InFlight():
                return lambda state, at: self._in_flight(state, at)
            case op.Settled():
                return lambda state, at: [(None, {FLIGHT: self._flight(state, at, 0)}, "done")]
            case op.Acknowledge(run, entry):
                eid = self._small.entry(entry)
                return lambda state, at: self._acknowledge(state, RUNS[run], eid)
            case op.Observe(run, entry):
                eid = self._small.entry(entry) if entry.number else None
                return lambda state, at: self._observe(state, RUNS[run], eid)
        raise TypeError(operation)

    def _put(self, state: State, run: int, eid: int) -> list[Effect]:
        effects: list[Effect] = []
        if self._listings_hold(state, run):
            return []
        free = self._find(state[LOGS][run], self.entries[eid].number) is None
        if free:
            effects.append(("ok", self._created(state, run, eid), "ok"))
        else:
            effects.append(("exists", {}, "exists"))
        if self.scenario.spoils and state[FAULTS]:
            spoiled = self._small.entry(self.entries[eid]._replace(spoiled=True))
            fewer = {FAULTS: state[FAULTS] - 1}
            if free:
                there = self._created(state, run, spoiled) | fewer
                effects.append(("wrong", there, "created, with other bytes"))
            late = {PENDING: tuple(sorted((*state[PENDING], (run, spoiled)))), **fewer}
            effects.append(("error", late, "error, other bytes are on their way"))
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
            return [(None, {}, "absent"), *self._failed_read(state)]
        if self.entries[found].spoiled:
            return [("damaged", {}, "damaged"), *self._failed_read(state)]
        return [(("entry", found), {}, self.entries[found].id), *self._failed_read(state)]

    def _failed_read(self, state: State) -> list[Effect]:
        if self.scenario.unreadable and state[FAULTS]:
            return [("error", {FAULTS: state[FAULTS] - 1}, "error")]
        return []

    def _read_newest(self, state: State, run: int) -> list[Effect]:
        log = state[LOGS][run]
        return [(("entry", log[-1]) if log else None, {}, "read"), *self._failed_read(state)]

    def _list_begin(self, state: State, at: int, run: int) -> list[Effect]:
        lists, shown = state[LISTS], tuple(self.entries[eid].number for eid in state[LOGS][run])
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
        answers = {floor, *(number for number in possible if number >= floor)}
        return [(number, ended, str(number)) for number in sorted(answers, reverse=True)]

    def _shown(self, state: State, at: int, run: int, entry: NumberAndId) -> list[Effect]:
        highest, begun = self._highest(state, at, run), state[LISTS][at]
        if begun is None:
            found = self._find(state[LOGS][run], entry[0])
            shows = found is not None and self.entries[found].id == entry[1]
            return highest if shows else [(0, {}, f"no {entry}")]
        # What may be shown at its number may be it: that is more than can be.
        absent: Effect = (0, highest[0][1], f"no {entry}")
        return [*(highest if entry[0] in begun[2] else []), absent]

    def _listings_hold(self, state: State, run: int) -> bool:
        """Whether a listing has to end before one more entry is created."""
        spans = self.scenario.listing_spans
        return any(begun and begun[0] == run and begun[3] >= spans for begun in state[LISTS])

    def _oldest(self, state: State, run: int, first: int, last: int) -> int | None:
        for eid in state[LOGS][run]:
            if first <= self.entries[eid].number <= last:
                return eid
        return None

    def _delete_oldest(self, state: State, run: int, first: int, last: int) -> list[Effect]:
        old = self._oldest(state, run, first, last)
        if old is None:
            return [(False, {}, "nothing to delete")]
        gone = self.entries[old]
        log = tuple(eid for eid in state[LOGS][run] if eid != old)
        changes = self._log_changed(state, run, log, gone.number, False)
        return [(True, changes, f"deleted {gone.number}")]

    def _turn(self, state: State, run: int, prune: bool) -> list[Effect]:
        if not state[LOGS][run] or self._listings_hold(state, run):
            return []
        settings = self.scenario.settings
        base = self.entries[state[LOGS][run][-1]]
        if base.spoiled:
            return []  # guests refuse a damaged log
        touch = Touch().draft(base, base, frozenset())
        entry = next_entry(touch, base, f"t{base.number + 1}", "churn", settings)
        changes = self._created(state, run, self._small.entry(entry))
        last = entry.number - settings.keep_entries if prune else 0
        for eid in changes[LOGS][run]:
            number = self.entries[eid].number
            if settings.oldest_prunable() <= number <= last:
                log = tuple(e for e in changes[LOGS][run] if e != eid)
                changes |= self._log_changed(changed(state, changes), run, log, number, False)
        pruned = f", log pruned up to {last}" if prune else ""
        return [(entry.number, changes, f"{entry.id} committed{pruned}")]

    def _sync(self, state: State, run: int) -> list[Effect]:
        volatile = tuple(item for item in state[VOLATILE] if item[0] != run)
        return [(None, {VOLATILE: volatile}, "done")]

    def _in_flight(self, state: State, at: int) -> list[Effect]:
        return [(self._small.names(state[FLIGHT][self._process_of[at]]), {}, "read")]

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
        for run, history in enumerate(state[HISTORY]):
            if history and self._small.facts[history[-1]][run] & bit:
                needs = f"{self.entries[history[-1]]} needs it"
                raise Violation("I5" if run else "I1", f"{name} is deleted, but {needs}")
        return [(None, {PACKS: state[PACKS] & ~bit}, "done")]

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
            yield label, changed(state, changes)

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
                self._chosen(tuple(after), run, log)
                self._check_packs(run, log[-1], state[PACKS])
        return tuple(after)
