"""The newest entry of a run's log, and what a transaction makes of it."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Any

from holdfast.core.records import Entry, Record


@dataclass(frozen=True)
class Head:
    """The newest entry, as a reader chose it."""

    entry: Entry
    id: str
    damage: tuple[str, ...] = ()
    """What was wrong with newer entries; a writer must repair before it prunes."""

    @property
    def number(self) -> int:
        return self.entry.number

    def names(self, number: int) -> str | None:
        """The id of entry `number` as this entry's ancestry lists it, else None."""
        lineage = [(self.number, self.id)]
        if self.entry.parent:
            lineage.append(self.entry.parent)
        lineage.extend(self.entry.ancestors)
        return next((id for n, id in lineage if n == number), None)


@dataclass
class Draft:
    """What a transaction wants the next entry to say."""

    records: tuple[Record, ...]
    action: str
    changes: dict[str, Any] = field(default_factory=dict[str, Any])
    """Other fields of `Entry` to replace (epoch, holder, finished, …)."""


REBUILT = (
    "Start the run's job again (in code: CheckpointManager.acquire()), or run "
    "`holdfast doctor RUN --repair`: the list is rebuilt from the checkpoints that are whole."
)
"""What to do about a log that cannot be read or changed."""

Transaction = Callable[[Head, tuple[Record, ...]], Draft]
"""Makes the next entry from the newest one. Called again after each rebase; raises
to give up (Fenced, BaseLost, CheckpointNotFound, …)."""


def packs_of(records: Iterable[Record]) -> dict[str, int]:
    """Every pack that `records` need -> its size."""
    union: dict[str, int] = {}
    for record in records:
        union.update(record.packs)
    return union
