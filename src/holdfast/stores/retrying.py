"""When to ask a server again that did not do what was asked."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

_T = TypeVar("_T")


class Passing(Exception):
    """The server did not answer, or said that it cannot now. What was asked may have been
    done, or may still be."""


@dataclass(frozen=True)
class Retry:
    """Exponential backoff with full jitter, up to a deadline. From any thread.

    The waits are random numbers between 0 and a bound that doubles, so that many clients
    that were turned away together do not come back together (M. Brooker, "Exponential
    Backoff And Jitter", AWS Architecture Blog, 2015).
    """

    deadline_s: float = 120.0
    """After so many seconds no new try begins."""
    first_s: float = 0.2
    """The first bound."""
    longest_s: float = 15.0
    """No bound is larger. What S3 asks of clients that it throttles is to slow down for
    seconds."""
    clock: Callable[[], float] = time.monotonic
    sleep: Callable[[float], None] = time.sleep
    draw: Callable[[], float] = random.SystemRandom().random  # no program's seed is touched

    def call(self, work: Callable[[], _T]) -> _T:
        """What `work` returns. It is called again after `Passing`; the last is raised."""
        begun = self.clock()
        bound = self.first_s
        while True:
            try:
                return work()
            except Passing:
                wait = self.draw() * bound
                if self.clock() + wait - begun >= self.deadline_s:
                    raise
            self.sleep(wait)
            bound = min(2 * bound, self.longest_s)
