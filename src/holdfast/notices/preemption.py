"""Notices for programs that have no `Run`."""

from __future__ import annotations

import os
import time
import warnings
from contextlib import suppress
from types import TracebackType
from typing import NoReturn, Self

from holdfast.errors import Preempted
from holdfast.notices import listening
from holdfast.notices.grace import grace_s
from holdfast.notices.notice import Notice
from holdfast.notices.signals import StopSignals, in_notebook

_RUN_ME_AGAIN = 75


class Preemption:
    """Whether this process is about to be stopped. Ask where your program can save.

        with holdfast.Preemption() as preemption:
            for step in range(start, 1_000_000):
                train(step)
                if preemption.requested:
                    ckpts.save(step + 1, state).result()
                    preemption.exit()

    Inside the block SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 are requests to stop (a second Ctrl-C
    raises KeyboardInterrupt), and so is what clouds, Slurm and notice files say. Handlers that
    were there before are called too, and are back after the block. Signals need the main thread;
    a block elsewhere warns, and hears the rest. A `holdfast.Run` needs none of this.

    grace: for how long this process may live after a signal, in seconds or as text ("2min"); by
    default what HOLDFAST_GRACE says.
    exit_code: with which `exit` leaves: "run me again".
    quiet: print no line when a request comes.
    """

    def __init__(
        self,
        *,
        grace: float | str | None = None,
        exit_code: int = _RUN_ME_AGAIN,
        quiet: bool = False,
    ) -> None:
        self._grace_s = grace_s(grace)
        self._exit_code = exit_code
        self._quiet = quiet
        self._notices: list[Notice] = []
        """Of any thread and of signals' handlers, so that these lists only grow."""
        self._deadlines_s: list[float] = []
        self._signals = StopSignals(
            inside=lambda frame: True, notice=self._stop, again=self._signalled
        )

    def __enter__(self) -> Self:
        if not self._signals.install():
            warnings.warn(
                "this is not the main thread: signals will not be requests to stop",
                RuntimeWarning,
                stacklevel=2,
            )
        self._leave = listening.listen(self._hear)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._leave()
        self._signals.restore()

    @property
    def requested(self) -> bool:
        """Whether this process will be stopped, so that it should save and leave."""
        return self._signals.requested

    @property
    def notice(self) -> Notice | None:
        """What was said: the first notice that stops this process, else the newest that only
        warns (`stops` is False: a save is wise, the work goes on); None while nothing was."""
        stopping = (one for one in self._notices if one.stops)
        return next(stopping, self._notices[-1] if self._notices else None)

    @property
    def remaining_s(self) -> float | None:
        """Seconds until this process is stopped, as far as anybody said: a notice, the grace
        after a signal, the time limit of a Slurm job (which is known without a request). None
        if nobody did."""
        now = time.time()
        known = list(self._deadlines_s)
        if (limit := listening.deadline_s()) is not None and limit > now:
            known.append(limit)
        return max(0.0, min(known) - now) if known else None

    def exit(self) -> NoReturn:
        """Leave the program: SystemExit with the status that says "run me again". In a notebook
        `holdfast.Preempted` is raised instead."""
        if in_notebook():
            raise Preempted(f"{self._signals.name or 'stopped'}: run this again to go on")
        raise SystemExit(self._exit_code)

    def _hear(self, notice: Notice) -> None:
        """In a poller's thread."""
        self._notices.append(notice)
        if notice.deadline_s is not None and notice.stops:
            self._deadlines_s.append(notice.deadline_s)
        if notice.stops and not self.requested:
            self._signals.request(notice.source)
        else:
            self._say(notice)

    def _stop(self, source: str) -> None:
        """The first request. Also in a signal's handler, which must use no buffer."""
        said = next((one for one in self._notices if one.source == source), None)
        if said is None:
            said = Notice(source, deadline_s=self._signalled(source))
            self._notices.append(said)
        self._say(said)

    def _signalled(self, source: str) -> float | None:
        """A grace that was said begins with a signal."""
        if self._grace_s is None:
            return None
        deadline_s = time.time() + self._grace_s
        self._deadlines_s.append(deadline_s)
        return deadline_s

    def _say(self, notice: Notice) -> None:
        if self._quiet:
            return
        said = f"{notice.source}: {notice.text}" if notice.text else notice.source
        what = "this program is asked to stop" if notice.stops else "this program may be stopped"
        with suppress(OSError):
            os.write(2, f"holdfast: {said}: {what}\n".encode(errors="backslashreplace"))
