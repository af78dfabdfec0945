"""What saves cost the training: for how long it stands still, and for how much it is slower.

A save reports how long the loop waited for it. That steps take longer while one is written
shows only in the times between boundaries: those of quiet steps beside those behind a save.
Such times are noisy, so the slow-down is a median of several saves. Times are arguments.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from holdfast.core.interval import middle

_QUIET = 51  # steps without a save that tell how long one takes
_FEW = 5
_RECENT = 7  # saves, as many as the interval looks back


class Stalls:
    """Follows the boundaries of a loop and its saves."""

    def __init__(self) -> None:
        self._before_s: float | None = None
        self._quiet: deque[float] = deque(maxlen=_QUIET)
        self._slower: deque[float] = deque(maxlen=_RECENT)
        self._writing = False
        self._behind: list[float] | None = None
        """Times of the steps behind the last save; None if they cannot be compared."""
        self._odd = False
        self._ready: list[Any] = []

    def begun(self, now_s: float) -> None:
        """A save was taken, and its call has returned."""
        self._before_s, self._writing, self._behind = now_s, True, []

    def durable(self, stats: Any) -> None:
        """The event of a save that is in the store. Those that were waited for say nothing
        about others."""
        if stats is not None and not stats.blocked:
            self._ready.append(stats)

    def boundary(self, now_s: float, *, regular: bool) -> list[tuple[float, float]]:
        """A step was completed. `regular`: nothing but a step was done since the boundary
        before. Returns what the saves that became durable have cost, and how long they took."""
        comparable = regular and not self._odd
        self._odd = not regular  # the next one has the start of a loader in it
        if self._before_s is not None:
            took_s = now_s - self._before_s
            if not self._writing and comparable:
                self._quiet.append(took_s)
            elif self._behind is not None:
                self._behind = [*self._behind, took_s] if comparable else None
        self._before_s = now_s
        ready, self._ready = self._ready, []
        return [self._cost(stats) for stats in ready]

    def _cost(self, stats: Any) -> tuple[float, float]:
        if self._behind and len(self._quiet) >= _FEW:
            slower_s = sum(self._behind) - len(self._behind) * middle(self._quiet)
            self._slower.append(slower_s - stats.barrier_s)  # that is a part of these steps
        self._writing, self._behind = False, None
        slower_s = max(0.0, middle(self._slower)) if self._slower else 0.0
        return stats.stall_s + slower_s, stats.total_s - stats.waited_s


def stalls_of(events: Iterable[Any]) -> Iterator[tuple[float, float]]:
    """What saves of earlier processes have cost at least, and how long they took: of those
    that are in a history and were committed while training went on."""
    for event in events:
        if hasattr(event, "stall_s") and not event.error and not event.blocked:
            yield event.stall_s, event.total_s - event.waited_s
