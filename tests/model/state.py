"""What a state of the world is: a tuple of small values, by position (see `World.initial`).

Small, since there are hundreds of thousands: entries and packs are numbers and bits.
"""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

from .entries import Entry
from .explore import State

LOGS, PACKS, FLIGHT, PENDING, LISTS, FAULTS, CRASHES, HISTORY, VOLATILE, ACKED, LOCALS = range(11)

Effect = tuple[Hashable, dict[int, Any], str]
"""The result that the thread gets, what changes in the state, how to tell it."""

Listing = tuple[int, tuple[int, ...], tuple[int, ...], int]
"""A listing that was begun: the run, what it certainly shows, what it may show, and how
many entries were created meanwhile."""


def changed(state: State, changes: dict[int, Any]) -> State:
    """`state` with other values at some positions."""
    after = list(state)
    for position, value in changes.items():
        after[position] = value
    return tuple(after)


def list_changed(begun: Listing, number: int, created: bool) -> Listing:
    """What a listing may show after entry `number` was created or deleted meanwhile."""
    run, certain, possible, count = begun
    if created:
        return run, certain, tuple(sorted({*possible, number})), count + 1
    return run, tuple(n for n in certain if n != number), possible, count


class Interned:
    """Small values for big ones."""

    def __init__(self) -> None:
        self.entries: list[Entry] = []
        self.facts: list[tuple[int, int]] = []
        """Packs of the parent run that an entry needs: its own, if it is one of the parent
        run; borrowed ones, if of the child."""
        self._numbers: dict[Entry, int] = {}
        self._bits: dict[str, int] = {}

    def entry(self, entry: Entry) -> int:
        found = self._numbers.get(entry)
        if found is None:
            found = self._numbers[entry] = len(self.entries)
            self.entries.append(entry)
            own = sum({self.bit(pack) for pack in entry.packs()})
            lent = sum({self.bit(pack) for r in entry.records for pack in r.borrowed})
            self.facts.append((own, lent))
        return found

    def bit(self, pack: str) -> int:
        return self._bits.setdefault(pack, 1 << len(self._bits))

    def names(self, bits: int) -> frozenset[str]:
        return frozenset(name for name, bit in self._bits.items() if bits & bit)
