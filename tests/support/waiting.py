"""Waiting for what another thread or process does."""

from __future__ import annotations

import time
from collections.abc import Callable


def within(seconds: float, is_so: Callable[[], bool]) -> bool:
    """Whether `is_so()` becomes true in that time."""
    end = time.monotonic() + seconds
    while not is_so():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True
