"""The time limit of a Slurm job, which Slurm tells every process of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping

from holdfast.notices.notice import Notice
from holdfast.notices.notifier import Notifier, Over

# For who does not look at the time limit at each step: `holdfast.Preemption`, and a run that is
# in a long validation. As long as Slurm's KillWait, by default: what SIGTERM would leave.
_LEAD_S = 30.0
_INTERVAL_S = 1.0


def end_s(environ: Mapping[str, str]) -> float | None:
    """When the job ends, Unix time; None where nobody says.

    >>> end_s({"SLURM_JOB_END_TIME": "1764200000"}), end_s({})
    (1764200000.0, None)
    """
    try:
        end = float(environ.get("SLURM_JOB_END_TIME", ""))
    except ValueError:
        return None
    return end if 0 < end < float("inf") else None


def slurm_notifier(end: float, *, clock: Callable[[], float] = time.time) -> Notifier:
    """Says so shortly before `end`."""
    text = f"this job ends at {time.strftime('%H:%M:%S', time.localtime(end))}"

    def ask() -> list[Notice]:
        left_s = end - clock()
        if left_s < 0:  # the limit was extended: nobody knows until when
            raise Over("the time limit has passed")
        return [Notice("Slurm", text, end)] if left_s < _LEAD_S else []

    return Notifier("Slurm", ask, _INTERVAL_S)
