"""What saves cost the training: for how long it stands still, and for how much it is slower.

A save reports how long the loop waited for it. That steps take longer while one is written
shows only in the times between boundaries: those of quiet steps beside those behind a save.
Such times are noisy, so the slow-down is a median of several saves, and counts only where it
stands out from what steps differ by anyway. Times are arguments.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

from holdfast.core.interval import middle

_QUIET = 51  # steps without a save that tell how long one takes
_FEW = 5
_RECENT = 15  # saves: enough for what is about as much as a step differs from the next
_SIGMA = 1.4826  # standard deviation over median absolute deviation, of normal noise
_MEDIAN_ERROR = 1.2533  # of a median, over that of a mean
_STANDS_OUT, _IS_GONE = 2.0, 0.5  # times that error; two, so that it does not come and go


class Stalls:
    """Follows the boundaries of a loop and its saves."""

    def __init__(self) -> None:
        self._before_s: float | None = None
        self._quiet: deque[float] = deque(maxlen=_QUIET)
        self._slower: deque[tuple[float, float]] = deque(maxlen=_RECENT)
        """By save: seconds, and the standard deviation that chance alone gives them."""
        self._stands_out = False
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
            usual_s = middle(self._quiet)
            spread_s = _SIGMA * middle(abs(took_s - usual_s) for took_s in self._quiet)
            steps = len(self._behind)
            slower_s = sum(self._behind) - steps * usual_s
            # The barrier is a part of these steps, and of the stall.
            self._slower.append((slower_s - stats.barrier_s, spread_s * math.sqrt(steps)))
        self._writing, self._behind = False, None
        return stats.stall_s + self._slower_s(), stats.total_s - stats.waited_s

    def _slower_s(self) -> float:
        if not self._slower:
            return 0.0
        slower_s = middle(each for each, _ in self._slower)
        spread_s = middle(spread for _, spread in self._slower)
        error_s = _MEDIAN_ERROR * spread_s / math.sqrt(len(self._slower))
        limit = _IS_GONE if self._stands_out else _STANDS_OUT
        self._stands_out = slower_s > limit * error_s
        return slower_s if self._stands_out else 0.0


def stalls_of(events: Iterable[Any]) -> Iterator[tuple[float, float]]:
    """What saves of earlier processes have cost at least, and how long they took: of those
    that are in a history and were committed while training went on."""
    for event in events:
        if hasattr(event, "stall_s") and not event.error and not event.blocked:
            yield event.stall_s, event.total_s - event.waited_s
