"""How fast a copy may go, and when it must stop."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable

from holdfast.errors import CopyStopped


class Pace:
    """At most so many bytes per second; None: as fast as it goes. From any thread.

    Every block is asked for before it is read. The first goes at once, and each later one
    when those before it have had their time, however many threads ask: no bursts.

    >>> pace = Pace(1_000_000)
    >>> pace.take(100)
    """

    def __init__(
        self,
        bytes_per_s: int | None = None,
        *,
        clock: Callable[[], float] = time.monotonic,
        wait: Callable[[threading.Condition, float], object] = threading.Condition.wait,
    ) -> None:
        """`clock` and `wait` are for tests that cannot wait."""
        self._bytes_per_s = bytes_per_s
        self._clock = clock
        self._wait = wait
        self._next_s = clock()
        self._stopped = False
        self._changed = threading.Condition()

    def take(self, nbytes: int) -> None:
        """Return when so many bytes may be moved. Raises CopyStopped after `stop`."""
        with self._changed:
            start = max(self._next_s, self._clock())
            if self._bytes_per_s is not None:
                self._next_s = start + nbytes / self._bytes_per_s
            while not self._stopped and self._bytes_per_s is not None:
                left = start - self._clock()
                if left <= 0:
                    break
                self._wait(self._changed, left)
            if self._stopped:
                raise CopyStopped(
                    "the copy was stopped before it was complete",
                    hint="Copy again: what is there by now is used.",
                )

    def limit(self, bytes_per_s: int | None) -> None:
        """Another limit from now on; with None whoever waits goes on at once."""
        with self._changed:
            self._bytes_per_s = bytes_per_s
            self._next_s = self._clock()
            self._changed.notify_all()

    def stop(self) -> None:
        """Let every `take`, also those that wait, raise CopyStopped."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
