"""When the processes of a rehearsal die."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass

_LONGEST_WAIT_S = 5.0


@dataclass(frozen=True)
class Kill:
    """A process is to be killed in the body that follows `step` completed steps."""

    step: int
    after_s: float
    signal: str


def save_interval(steps: int) -> int:
    """Steps between two saves, so that there is room for several kills.

    >>> save_interval(30), save_interval(4)
    (5, 1)
    """
    return max(1, steps // 6)


def signals(count: int, chance: random.Random) -> list[str]:
    """What kills: one in three is a SIGTERM, at least one of two or more.

    >>> sorted(signals(4, random.Random(0)))
    ['SIGKILL', 'SIGKILL', 'SIGKILL', 'SIGTERM']
    """
    terms = max(count // 3, 1 if count > 1 else 0)
    names = ["SIGTERM"] * terms + ["SIGKILL"] * (count - terms)
    chance.shuffle(names)
    return names


def first_cut(checkpoints: Sequence[int], chance: random.Random) -> int:
    """The step of the checkpoint from which the killed processes begin: an early one."""
    early = sorted(set(checkpoints))
    return chance.choice(early[: max(1, len(early) // 3)])


def next_kill(
    signal: str,
    *,
    at: int,
    every: int,
    steps: int,
    left: int,
    step_s: float,
    chance: random.Random,
) -> Kill | None:
    """The next kill of a run that goes on from `at`, with `left` kills to come, this one
    included. None: there is no room for one more.

    It comes after the next save, so that each process brings the run on, and at a random
    moment of the step or after it.

    >>> next_kill("SIGKILL", at=5, every=5, steps=10, left=1, step_s=0.1, chance=random.Random(0))
    """
    earliest = at + every
    latest = min(steps - 1, earliest + max(0, (steps - 1 - earliest) // left))
    if latest < earliest:
        return None
    wait_s = min(chance.uniform(0, 1.5 * step_s), _LONGEST_WAIT_S)
    return Kill(chance.randint(earliest, latest), wait_s, signal)
