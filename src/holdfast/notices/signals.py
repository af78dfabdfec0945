"""SIGTERM, SIGINT, SIGUSR1 and SIGUSR2 become a flag that the loop reads at its next boundary.

A handler runs between any two instructions of the training step, so it saves nothing
and only remembers the signal. A second SIGINT stops at once. SIGUSR1 and SIGUSR2 are what
Slurm's `--signal=` and other schedulers send before they kill.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

_SCHEDULERS = (signal.SIGUSR1, signal.SIGUSR2)
_SIGNALS = (signal.SIGTERM, signal.SIGINT, *_SCHEDULERS)

# A loader notices that its worker died of a signal before this process has run its own
# handler for the same signal: they are sent to a process group one after the other.
_LATE_SIGNAL_S = 2.0


class StopSignals:
    """Whether one run was asked to stop.

    `inside(frame)` tells whether `frame`, the code that was interrupted, will come to a
    boundary of the run at all (False: the signal is not for it). `notice` gets the
    signal's name once, inside the handler: it must not use buffered output. `again` gets
    those that come later.
    """

    def __init__(
        self,
        *,
        inside: Callable[[FrameType | None], bool],
        notice: Callable[[str], None],
        again: Callable[[str], object] = lambda name: None,
    ) -> None:
        self.inside = inside
        self._notice = notice
        self._again = again
        self._interrupts = 0
        self.name = ""
        """What asked for a stop: "SIGTERM", or another reason; "" while nothing did."""
        self.requested_s = 0.0
        """When, on the monotonic clock."""

    @property
    def requested(self) -> bool:
        return bool(self.name)

    @property
    def installed(self) -> bool:
        return self in _dispatcher.listeners

    def install(self) -> bool:
        """Take the signals over; False in threads other than the main one."""
        if threading.current_thread() is not threading.main_thread():
            return False
        _dispatcher.add(self)
        return True

    def restore(self) -> None:
        """Give the signals back to the handlers before us, where nobody has replaced
        ours since."""
        _dispatcher.remove(self)

    def wait(self, timeout_s: float = _LATE_SIGNAL_S) -> bool:
        """Whether a stop is requested, now or within `timeout_s`."""
        deadline = time.monotonic() + timeout_s
        while not self.name and time.monotonic() < deadline:
            time.sleep(0.01)
        return self.requested

    def receive(self, number: int) -> None:
        """In a signal handler. Raises KeyboardInterrupt at a second SIGINT."""
        if number == signal.SIGINT:
            self._interrupts += 1
            if self._interrupts > 1:
                raise KeyboardInterrupt
        self.request(signal.Signals(number).name)

    def request(self, why: str) -> None:
        """Ask for a stop, for a reason that is no signal: "preempted". From any thread."""
        if not self.name:
            self.name = why
            self.requested_s = time.monotonic()
            self._notice(self.name)
        else:
            self._again(why)


class _Dispatcher:
    """The one handler of this process, for all its runs: chains of handlers that are
    taken off in another order than they were put on would leave dead ones in place."""

    def __init__(self) -> None:
        self.listeners: list[StopSignals] = []
        self._previous: dict[int, Any] = {}
        self._pid = os.getpid()

    def add(self, listener: StopSignals) -> None:
        if listener not in self.listeners:
            self.listeners.append(listener)
        self._pid = os.getpid()
        caught = _caught()
        for number in _SIGNALS:
            previous = signal.getsignal(number)
            # Ignored before we came: a shell put the job into the background (nohup).
            # None: a handler that was not installed from Python and cannot be put back.
            if previous == self._handle or previous is signal.SIG_IGN or previous is None:
                continue
            if previous is signal.SIG_DFL and number in _SCHEDULERS and number in caught:
                continue
            self._previous[number] = previous
            signal.signal(number, self._handle)

    def remove(self, listener: StopSignals) -> None:
        if listener in self.listeners:
            self.listeners.remove(listener)
        self.give_back()

    def give_back(self) -> None:
        if self.listeners or threading.current_thread() is not threading.main_thread():
            return
        for number in _SIGNALS:
            if signal.getsignal(number) == self._handle:
                signal.signal(number, self._previous[number])

    def _handle(self, number: int, frame: FrameType | None) -> None:
        previous = self._previous[number]
        mine = os.getpid() == self._pid  # else: a forked child, such as a loader's worker
        concerned = [one for one in self.listeners if mine and one.inside(frame)]
        if not concerned:
            _deliver(number, frame, previous)
            return
        for listener in concerned:
            listener.receive(number)
        if callable(previous) and previous is not signal.default_int_handler:
            previous(number, frame)


_dispatcher = _Dispatcher()


def _caught() -> frozenset[int]:
    """The signals that have a handler of any language. Those of C show as SIG_DFL in Python:
    `faulthandler.register(SIGUSR1)`, with which people ask a process where it is."""
    try:
        with open("/proc/self/status", "rb") as file:
            [mask] = [line.split()[1] for line in file if line.startswith(b"SigCgt:")]
    except (OSError, ValueError):
        return frozenset()
    bits = int(mask, 16)
    return frozenset(number for number in _SIGNALS if bits >> (number - 1) & 1)


def give_back() -> None:
    """Give the signals back, if no run waits for them any more: in the main thread, where the
    last one was closed in another."""
    _dispatcher.give_back()


def is_awaited(frame: FrameType | None) -> bool:
    """Whether `frame` comes to a boundary of a run, which a signal is for."""
    return any(one.inside(frame) for one in _dispatcher.listeners)


def stop_all(why: str) -> None:
    """Ask every run of this process to stop at its next boundary. From any thread."""
    for one in list(_dispatcher.listeners):
        one.request(why)


def _deliver(number: int, frame: FrameType | None, handler: Any) -> None:
    """What would have happened had we never taken the signal over."""
    if callable(handler):
        handler(number, frame)
        return
    signal.signal(number, handler)
    os.kill(os.getpid(), number)


def in_notebook() -> bool:
    """Whether this code runs in a Jupyter kernel, which must not be exited."""
    import sys

    ipython = sys.modules.get("IPython")
    if ipython is None:
        return False
    shell = ipython.get_ipython()
    return shell is not None and hasattr(shell, "kernel")
