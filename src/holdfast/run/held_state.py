"""`hold=`: a copy of the state in memory, for a loop that does not come back to a boundary.

It is taken at a boundary, as a save is, so that a resume from it is as exact. A newer one
takes the place, and the memory, of the one before.
"""

from __future__ import annotations

from typing import Any

from holdfast.core.schedule import Schedule
from holdfast.core.units import format_size
from holdfast.run.console import Console
from holdfast.run.contents import Contents


class HeldState:
    """What one run holds. Used by the loop's thread, but for `take`."""

    def __init__(
        self, manager: Any, schedule: Schedule | None, contents: Contents, console: Console
    ) -> None:
        """`schedule` says when to hold; None: never."""
        self._manager = manager
        self._schedule = schedule
        self._contents = contents
        self._console = console
        self.on = schedule is not None
        self._held: list[tuple[int, Any]] = []
        """None, or one: the bodies that were completed, and the captured state."""
        self._last_step: int | None = None
        self._last_s = 0.0
        self._said = False

    def start(self, step: int | None, now_s: float) -> None:
        """Training starts, or a save was taken, which makes what is held superfluous."""
        self._last_step, self._last_s = step, now_s

    def boundary(self, step: int, ticks: int, now_s: float, *, epoch_end: bool) -> None:
        """Hold the state, if that is due and nothing was saved here."""
        if self._schedule is None:
            return
        if self._schedule.due(step, now_s, self._last_step, self._last_s, epoch_end) is None:
            return
        self.drop()
        content = self._contents.now()
        captured = self._manager.hold(
            content.step, content.state, metrics=content.metrics, loop=content.loop
        )
        self._held.append((ticks, captured))
        self.start(step, now_s)
        if not self._said:
            self._said = True
            self._console.say(
                f"{self._manager.address}: hold= keeps a copy of the state in memory: "
                f"{format_size(captured.nbytes)}"
            )

    def take(self, after: int | None) -> Any | None:
        """What is held, to be committed by the caller and nobody else; None if there is
        nothing, or nothing newer than a save after `after` bodies. From any thread."""
        try:
            ticks, captured = self._held.pop()  # one call into C: one of two threads gets it
        except IndexError:
            return None
        if after is not None and ticks <= after:
            captured.drop()
            return None
        return captured

    def drop(self) -> None:
        """Give up what is held."""
        if (captured := self.take(None)) is not None:
            captured.drop()
