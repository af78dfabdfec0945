"""The logs of a world, and what must hold of them after every change."""

from __future__ import annotations

from typing import Any

from .entries import Entry
from .explore import State, Violation
from .invariants import check_next, check_usable
from .scenarios import Scenario
from .state import (
    ACKED,
    HISTORY,
    LISTS,
    LOGS,
    PACKS,
    VOLATILE,
    Effect,
    Interned,
    list_changed,
)


class Logs:
    """What of a world is about its logs. Violations are raised where they come to be."""

    scenario: Scenario
    entries: list[Entry]
    _small: Interned

    def _find(self, log: tuple[int, ...], number: int) -> int | None:
        for eid in log:
            if self.entries[eid].number == number:
                return eid
        return None

    def _created(self, state: State, run: int, eid: int) -> dict[int, Any]:
        log = tuple(sorted((*state[LOGS][run], eid), key=lambda found: self.entries[found].number))
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
                list_changed(begun, number, created) if begun and begun[0] == run else begun
                for begun in state[LISTS]
            )
        return changes

    def _chosen(self, state: State, run: int, log: tuple[int, ...]) -> dict[int, Any]:
        """Check what a reader would choose now; extend the history (I1 to I4, I7, I8)."""
        if not log:
            raise Violation("I3", "the log is empty")
        history, entries = state[HISTORY][run], self.entries
        log = tuple(eid for eid in log if not entries[eid].spoiled)
        if not log and not history:
            return {}  # a new run: damaged entries only
        if not log:
            raise Violation("I3", "no entry of the log can be used")
        newest = entries[log[-1]]
        under = self._find(log, newest.parent[0]) if newest.parent else None
        check_usable(newest, None if under is None else entries[under])
        if history and log[-1] == history[-1]:
            return {}
        if history:
            added = {record.name for eid in history for record in entries[eid].records}
            check_next(entries[history[-1]], newest, added)
        self._check_packs(run, log[-1], state[PACKS])
        extended = (*history, log[-1])
        both = state[HISTORY]
        return {HISTORY: (extended, both[1]) if run == 0 else (both[0], extended)}

    def _check_packs(self, run: int, eid: int, packs: int) -> None:
        missing = self._small.facts[eid][run] & ~packs
        if missing:
            names = ", ".join(sorted(self._small.names(missing)))
            raise Violation("I5" if run else "I1", f"{self.entries[eid]} needs {names}: deleted")

    def _acknowledge(self, state: State, run: int, eid: int) -> list[Effect]:
        if eid not in state[HISTORY][run]:
            raise Violation("I3", f"{self.entries[eid]} is acknowledged, and not in the history")
        if not self.scenario.disk:
            return [(None, {}, "done")]
        if (run, eid) in state[VOLATILE]:
            raise Violation("I2", f"{self.entries[eid]} is acknowledged, and not durable")
        return [(None, {ACKED: tuple(sorted({*state[ACKED], (run, eid)}))}, "done")]

    def _observe(self, state: State, run: int, eid: int | None) -> list[Effect]:
        if eid is None:
            if state[HISTORY][run]:
                raise Violation("I3", "a run that has entries is taken for a new one")
        elif eid not in state[HISTORY][run]:
            entry = self.entries[eid]
            raise Violation("I3", f"{entry} is taken for the newest, and not in the history")
        return [(None, {}, "done")]
