"""Waiting for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable


def within(seconds: float, is_so: Callable[[], bool], *, every: float = 0.005) -> bool:
    """Whether `is_so()` becomes true in that time. `every`: seconds between two looks."""
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(every)
    return True
