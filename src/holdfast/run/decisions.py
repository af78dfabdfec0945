"""What is done at a boundary: whether to save there, and whether to stop."""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

from holdfast.run.agreement import Agreed, Agreement
from holdfast.run.stopping import Stopping
from holdfast.run.triggers import Triggers


class Decision(NamedTuple):
    reason: str
    """Why to save; "" for no save."""
    stop: bool


class Decisions:
    """Of one rank: by itself, or with all others. Used by the loop's thread."""

    def __init__(self, triggers: Triggers, stopping: Stopping, clock: Callable[[], float]) -> None:
        self._triggers = triggers
        self._stopping = stopping
        self._clock = clock
        self._agreement: Agreement | None = None
        self._wish = ""
        self._stop = False
        self._first = True

    @property
    def rules(self) -> str:
        """When to save, as it was given."""
        return str(self._triggers.schedule)

    def agree(self, agreement: Agreement, *, first: bool) -> None:
        """From now on all ranks do the same at the same boundaries. The clock of the `first`
        counts."""
        self._agreement = agreement
        self._first = first
        self._stopping.alone = False

    def at(self, step: int, *, epoch_end: bool, last: bool, around: bool) -> Decision:
        """At a boundary. `last`: no item follows in this loop. `around`: of a loop with others
        inside. Raises GroupError if the ranks are not at the same place."""
        if self._agreement is not None:
            return self._with_others(self._agreement, step, epoch_end, last, around)
        reason = self._triggers.due(step, self._clock(), epoch_end=epoch_end, last=last)
        return Decision(reason, not last and self._stopping.boundary())

    def _with_others(
        self, agreement: Agreement, step: int, epoch_end: bool, last: bool, around: bool
    ) -> Decision:
        triggers = self._triggers
        agreed = agreement.heard()
        wish = triggers.wish()
        if self._first:
            wish = wish or triggers.due_by_clock(step, self._clock(), epoch_end=epoch_end)
        self._wish = wish or self._wish
        stop = self._stopping.boundary()
        if around:
            agreement.tell(step, save=bool(wish), stop=stop)
            agreed = _either(agreed, agreement.heard())
        wanted = (self._wish or "another rank") if agreed.save else ""
        reason = triggers.due_by_step(step, wanted, epoch_end=epoch_end, last=last)
        if reason:
            self._wish = ""
        if not around:
            # What is saved here, or held back up to the next boundary, need not be wanted.
            save = bool(wish) and not reason and not triggers.holds
            agreement.tell(step, save=save, stop=stop)
        self._stop = self._stop or agreed.stop
        if self._stop:
            self._stopping.with_others()
        return Decision(reason, self._stop and not last)

    def end(self) -> None:
        """The loops are over. Raises GroupError if they are not on other ranks."""
        if self._agreement is not None:
            self._agreement.leave()


def _either(one: Agreed, other: Agreed) -> Agreed:
    return Agreed(one.save or other.save, one.stop or other.stop)
