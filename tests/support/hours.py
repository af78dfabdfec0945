"""Hours that pass at once: the clock of a `Retry` that waits for nothing."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

from holdfast.stores.retrying import Retry


class Hours:
    """A clock that stands still but while somebody sleeps. From any thread."""

    def __init__(self) -> None:
        self.now = 1000.0
        self.sleeps: list[float] = []
        self.after_sleep: Callable[[], None] = lambda: None
        """Called when somebody has slept; may change what goes wrong."""
        self._lock = threading.Lock()

    def clock(self) -> float:
        return self.now

    def sleep(self, seconds: float) -> None:
        with self._lock:
            self.sleeps.append(seconds)
            self.now += seconds
        self.after_sleep()

    def retry(self, draw: float = 1.0, **settings: Any) -> Retry:
        """Waits the same share of what it may, each time."""
        return Retry(clock=self.clock, sleep=self.sleep, draw=lambda: draw, **settings)
