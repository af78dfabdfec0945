"""A save that goes on in the background."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import Future
from concurrent.futures import TimeoutError as FutureTimeout

from holdfast.errors import SaveFailed
from holdfast.manager.history import SaveEvent
from holdfast.manager.info import CheckpointInfo


class Pending:
    """Returned by `CheckpointManager.save`; becomes a checkpoint or an error.

    >>> import holdfast
    >>> with holdfast.CheckpointManager("memory://pending") as ckpts:
    ...     ckpts.save(1, {"x": 1}).result().step
    1
    """

    def __init__(self, step: int, *, hurry: Callable[[], None] = lambda: None) -> None:
        """`hurry` is called when somebody begins to wait."""
        self.step = step
        self.stats: SaveEvent | None = None
        """What the save has cost, once it is committed."""
        self._hurry = hurry
        self._future: Future[CheckpointInfo] = Future()

    def done(self) -> bool:
        """Whether the save has been committed or has failed."""
        return self._future.done()

    def result(self, timeout_s: float | None = None) -> CheckpointInfo:
        """Wait until the checkpoint is committed and durable.

        Raises what made the save fail, or SaveFailed after `timeout_s` seconds (the
        save goes on).
        """
        if not self.done():
            self._hurry()
        try:
            return self._future.result(timeout_s)
        except FutureTimeout:
            if self._future.done():
                raise
            raise SaveFailed(
                f"the save of step {self.step} is not done after {timeout_s} s",
                hint="It goes on; call result() again to wait longer.",
            ) from None

    def exception(self) -> BaseException | None:
        """The error of a save that is done, without raising it."""
        return self._future.exception() if self._future.done() else None

    def committed(self, info: CheckpointInfo) -> None:
        """Called by the saver."""
        self._future.set_result(info)

    def failed(self, error: BaseException) -> None:
        """Called by the saver."""
        self._future.set_exception(error)
