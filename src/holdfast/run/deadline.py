"""Whether a save still fits in what is left before this process is stopped, and when it is too
late to begin one.

Pure: clocks are arguments, and times are seconds of one monotonic clock.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import ceil

MARGIN_S = 1.0
"""For the way out: the loader's workers, the last lines, Python's own end."""
ASSUMED_GRACE_S = 30.0
"""Kubernetes' and Slurm's (KillWait) default, from SIGTERM to SIGKILL."""

_NEWEST = 64  # saves that count: a store's or a state's past says little about today's
_SIMILAR = 2.0  # a state at most so many times as large, or as small


@dataclass(frozen=True)
class Deadline:
    """When this process will be stopped."""

    at_s: float
    said: bool
    """Somebody said so: a notice, `grace=`. Else it is what is usual."""


def after_signal(now_s: float, grace_s: float | None) -> Deadline:
    """`grace_s`: what the user said.

    >>> after_signal(100.0, None)
    Deadline(at_s=130.0, said=False)
    """
    if grace_s is None:
        return Deadline(now_s + ASSUMED_GRACE_S, said=False)
    return Deadline(now_s + grace_s, said=True)


def earlier(one: Deadline | None, other: Deadline | None) -> Deadline | None:
    """What counts of two: the earlier one that was said, and what is usual only where
    nothing was said."""
    if one is None or other is None:
        return one or other
    if one.said != other.said:
        return one if one.said else other
    return min(one, other, key=lambda deadline: deadline.at_s)


@dataclass(frozen=True)
class Cost:
    """What a save has cost that was committed."""

    seconds: float
    """Until it was durable."""
    nbytes: int
    """Of the state."""
    blocked: bool
    """Its caller waited, as for the last save; else it went on beside the training, at low
    priority."""


def p95_s(costs: Sequence[Cost]) -> float | None:
    """In what time 95 % of a run's saves are durable; None if there was none. In their order.

    Only those of a state as large as the newest count, and those that were waited for, if
    there are any. Of less than 20 it is the slowest.

    >>> p95_s([Cost(9.0, 10, False), Cost(2.0, 10, True), Cost(3.0, 10, True)])
    3.0
    """
    if not costs:
        return None
    nbytes = costs[-1].nbytes
    near = [
        cost
        for cost in costs
        if cost.nbytes <= nbytes * _SIMILAR and nbytes <= cost.nbytes * _SIMILAR
    ]
    waited_for = [cost for cost in near if cost.blocked]
    return percentile_s([cost.seconds for cost in (waited_for or near)[-_NEWEST:]])


def percentile_s(seconds: Iterable[float], part: float = 0.95) -> float | None:
    """The smallest of `seconds` that so large a part of them does not exceed."""
    ordered = sorted(seconds)
    return ordered[max(0, ceil(part * len(ordered)) - 1)] if ordered else None


@dataclass(frozen=True)
class Fit:
    """Whether to begin the last save."""

    fits: bool
    needed_s: float | None = None
    """Measured; None if nothing was."""
    left_s: float | None = None
    """Until the deadline; None if there is none."""


def fit(
    now_s: float,
    deadline: Deadline | None,
    save_s: float | None,
    *,
    behind: int = 0,
    margin_s: float = MARGIN_S,
) -> Fit:
    """Whether a save of `save_s` that begins now is durable before the deadline. `behind`:
    saves that have to end before it begins.

    Where nothing was measured it is tried. So it is where the deadline is only what is usual: a
    save that is killed harms nothing, and one that was never begun loses steps for a guess.

    >>> fit(100.0, Deadline(130.0, said=True), 40.0).fits
    False
    >>> fit(100.0, Deadline(130.0, said=False), 40.0).fits
    True
    """
    needed_s = None if save_s is None else save_s * (1 + behind)
    if deadline is None:
        return Fit(True, needed_s)
    left_s = max(0.0, deadline.at_s - now_s)
    if needed_s is None or not deadline.said:
        return Fit(True, needed_s, left_s)
    return Fit(needed_s + margin_s <= left_s, needed_s, left_s)


def latest_s(asked_s: float, deadline: Deadline, save_s: float | None) -> float:
    """When a last save has to begin that is to be durable before the deadline; never before
    `asked_s`, when the stop was asked for.

    Without a measurement, half of the time is for it; and never more where the deadline is only
    what is usual, which is no reason to give up at once.

    >>> latest_s(100.0, Deadline(130.0, said=True), 4.0)
    125.0
    """
    half_s = max(0.0, deadline.at_s - asked_s) / 2
    needed_s = half_s if save_s is None else save_s + MARGIN_S
    if not deadline.said:
        needed_s = min(needed_s, half_s)
    return max(asked_s, deadline.at_s - needed_s)


def slack_s(now_s: float, deadline: Deadline, save_s: float | None, step_s: float) -> float:
    """How much time there is beside another step and a save; below 0, this boundary is the last
    one at which a save is durable before the deadline. A save that was not measured takes as
    long as is usual.

    >>> slack_s(100.0, Deadline(130.0, said=True), 4.0, 20.0)
    5.0
    """
    save_s = ASSUMED_GRACE_S if save_s is None else save_s
    return deadline.at_s - now_s - step_s - save_s - MARGIN_S
