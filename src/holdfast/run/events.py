"""What a run tells its history: that its loop goes on, is alive, was told to stop, and ended.

For people, and for the failure rate (`holdfast.manager.goodput`). Nothing of it holds up
training: a line that is not taken is not kept.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable
from typing import Any

from holdfast.core import process
from holdfast.manager.history import (
    BeatEvent,
    EndEvent,
    Event,
    FallbackEvent,
    NoticeEvent,
    StartEvent,
)
from holdfast.notices.notice import Notice

BEAT_S = 30.0
"""So far apart are signs of life: when a process was killed is known to that."""

_imported_s = time.time()
_runs_before = 0
"""Of this process: what came before the second one is not its start-up."""


class RunEvents:
    """One run's. Used by the loop's thread, never in a signal's handler."""

    def __init__(
        self,
        add: Callable[[Event], None],
        address: str,
        *,
        wall: Callable[[], float] = time.time,
        clock: Callable[[], float] = time.monotonic,
        began_s: float | None = None,
    ) -> None:
        self._add = add
        self._wall = wall
        self._clock = clock
        self._began_s = _began(wall()) if began_s is None else began_s
        # A bucket's objects do not grow: each beat would be a request of the loop's thread.
        self._beat_s = 0.0 if "://" in address and not address.startswith("file:") else BEAT_S
        self._pid = os.getpid()
        self._started = False
        self._due_s = float("inf")
        self._why = ""
        self._told_by = ""
        self._exit_code: int | None = None

    def fell_back(self, restored: Any) -> None:
        """A restore took an older checkpoint, if it did."""
        if restored.skipped:
            self._add(
                FallbackEvent(
                    time_s=self._wall(),
                    step=restored.info.step,
                    id=restored.info.id,
                    skipped=len(restored.skipped),
                )
            )

    def going(self, step: int, resumed: Any) -> None:
        """The loop takes an item that was not trained on before, `step` being completed."""
        if self._started:
            if self._clock() >= self._due_s:
                self._due_s = self._clock() + self._beat_s
                self._add(BeatEvent(time_s=self._wall(), step=step))
            return
        self._started = True
        if self._beat_s:
            self._due_s = self._clock() + self._beat_s
        me = process.current()
        self._add(
            StartEvent(
                time_s=self._wall(),
                step=step,
                began_s=self._began_s,
                id=resumed.id if resumed else "",
                host=me.host,
                pid=me.pid,
                boot=me.boot,
                beat_s=self._beat_s,
            )
        )

    def noticed(self, notice: Notice, *, ago_s: float = 0.0) -> None:
        """Somebody said that the process will be stopped, or may be. From any thread."""
        self._add(
            NoticeEvent(
                time_s=self._wall() - ago_s,
                source=notice.source,
                text=notice.text,
                deadline_s=notice.deadline_s or 0.0,
            )
        )

    def stopping(self, notice: Notice, ago_s: float, exit_code: int) -> None:
        """The program leaves because it was told to."""
        self.noticed(notice, ago_s=ago_s)
        self._why = "interrupted" if notice.source == "SIGINT" else "preempted"
        self._exit_code = exit_code
        self._told_by = notice.source

    def ended(self, step: int, *, finished: bool) -> None:
        """The run is closed. Once."""
        if not self._started or self._pid != os.getpid():
            return
        self._started = False
        why, text = self._why, self._told_by
        if not why:
            error = _error()
            why = "finished" if finished else "closed"
            if isinstance(error, KeyboardInterrupt):
                why = "interrupted"
            elif isinstance(error, SystemExit):
                self._exit_code = (
                    error.code if isinstance(error.code, int) else int(bool(error.code))
                )
                why = "error" if self._exit_code and not finished else why
            elif error is not None and not finished:
                why, text = "error", type(error).__name__
        self._add(
            EndEvent(
                time_s=self._wall(),
                why=why,
                step=step,
                exit_code=self._exit_code,
                pid=self._pid,
                text=text,
            )
        )


def _error() -> BaseException | None:
    """What makes the program leave the run: it is being handled, or has ended the program."""
    handled = sys.exc_info()[1]
    if handled is not None or hasattr(sys, "ps1"):
        return handled  # an interactive session remembers its last error for good
    return getattr(sys, "last_value", None)


def _began(now_s: float) -> float:
    """When this process began; for all runs but its first, and in a notebook, now."""
    global _runs_before
    _runs_before += 1
    if _runs_before > 1 or "ipykernel" in sys.modules:
        return now_s
    age_s = process.age_s()
    return min(now_s, _imported_s) if age_s is None else now_s - age_s
