"""A deadline that is known from the start, without a notice: the end of a job's time."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable

from holdfast.notices.notice import Notice
from holdfast.run import deadline
from holdfast.run.costs import Costs
from holdfast.run.deadline import Deadline

_STEPS = 64  # of which the longest counts as the next one: few, since epochs end among them
_LOOK_S = 60.0  # a limit can be extended


class TimeLimit:
    """Tells the boundary at which the last save has to be taken. Used by the loop's thread."""

    def __init__(
        self,
        deadline_s: Callable[[], float | None],
        costs: Costs,
        clock: Callable[[], float] = time.monotonic,
        wall: Callable[[], float] = time.time,
    ) -> None:
        """`deadline_s`: Unix time, as far as is known."""
        self._deadline_s = deadline_s
        self._costs = costs
        self._clock = clock
        self._wall = wall
        self._steps: deque[float] = deque(maxlen=_STEPS)
        self._before_s: float | None = None
        self._look_s = float("-inf")

    def boundary(self) -> Notice | None:
        """What to tell the run at this boundary; None while there is time for another step."""
        now = self._clock()
        if self._before_s is not None:
            self._steps.append(now - self._before_s)
        self._before_s = now
        if now < self._look_s:
            return None
        at = self._deadline_s()
        if at is None:
            self._look_s = now + _LOOK_S
            return None
        left_s = at - self._wall()
        step_s, end = max(self._steps, default=0.0), Deadline(now + left_s, said=True)
        slack_s = deadline.slack_s(now, end, self._costs.p95_s(), step_s)
        if slack_s < 0 < left_s:
            clock_time = time.strftime("%H:%M:%S", time.localtime(at))
            return Notice("time limit", f"this job ends at {clock_time}", at)
        # Steps may become longer: the next look is long before it can be too late.
        self._look_s = now + min(_LOOK_S, max(0.0, slack_s) / 4)
        return None
