"""A save that goes on in the background."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from holdfast.core.aside import Latch
from holdfast.errors import SaveFailed
from holdfast.manager.history import SaveEvent
from holdfast.manager.info import CheckpointInfo

logger = logging.getLogger("holdfast")


class Pending:
    """Returned by `CheckpointManager.save`; becomes a checkpoint or an error.

    >>> import holdfast
    >>> with holdfast.CheckpointManager("memory://pending") as ckpts:
    ...     ckpts.save(1, {"x": 1}).result().step
    1
    """

    def __init__(self, step: int, *, hurry: Callable[[], None] = lambda: None) -> None:
        """Made by the thread that asks for the save. `hurry` is called when somebody begins
        to wait."""
        self.step = step
        self.stats: SaveEvent | None = None
        """What the save has cost, once it is committed."""
        self._hurry = hurry
        self._ended = Latch()
        self._info: CheckpointInfo | None = None
        self._error: BaseException | None = None
        self._calls: list[Callable[[], None]] = []
        self._thread = threading.get_ident()
        # One tuple, exchanged at once: the saver reads it meanwhile, and a signal's handler
        # that waits, too, could not wait for a lock.
        self._waits: tuple[float, float | None] = (0.0, None)
        """Seconds of waits that are over, and since when there is another one."""

    def done(self) -> bool:
        """Whether the save has been committed or has failed."""
        return self._ended.is_set

    def result(self, timeout_s: float | None = None) -> CheckpointInfo:
        """Wait until the checkpoint is committed and durable.

        Raises what made the save fail, or SaveFailed after `timeout_s` seconds (the
        save goes on).
        """
        with self.awaited():
            if not self.done():
                self._hurry()
            self._ended.wait(timeout_s)
        if not self.done():
            raise SaveFailed(
                f"the save of step {self.step} is not done after {timeout_s} s",
                hint="It goes on; call result() again to wait longer.",
            )
        if self._error is not None:
            raise self._error
        assert self._info is not None
        return self._info

    def exception(self) -> BaseException | None:
        """The error of a save that is done, without raising it."""
        return self._error if self.done() else None

    def when_done(self, call: Callable[[], None]) -> None:
        """Have `call` called when the save has been committed or has failed: by the thread that
        saves, which goes on when it returns, or at once if that was before."""
        self._calls.append(call)
        if self.done():
            self._call()

    @contextmanager
    def awaited(self) -> Iterator[None]:
        """Inside, the caller does nothing but wait for the end of the save."""
        over_s, since = self._waits
        if threading.get_ident() != self._thread or since is not None or self.done():
            yield
            return
        start = time.perf_counter()
        self._waits = (over_s, start)
        try:
            yield
        finally:
            self._waits = (over_s + time.perf_counter() - start, None)

    @property
    def result_s(self) -> float:
        """For how long the thread that asked for the save has waited for its end."""
        over_s, since = self._waits
        return over_s if since is None else over_s + time.perf_counter() - since

    def committed(self, info: CheckpointInfo) -> None:
        """Called by the saver."""
        self._info = info
        self._ended.set()
        self._call()

    def failed(self, error: BaseException) -> None:
        """Called by the saver."""
        self._error = error
        self._ended.set()
        self._call()

    def _call(self) -> None:
        while self._calls:
            try:
                call = self._calls.pop(0)
            except IndexError:
                return  # another thread was there before
            try:
                call()
            except Exception:  # of whoever asked for it; the saver goes on
                logger.exception("what was to follow the save of step %d has failed", self.step)
