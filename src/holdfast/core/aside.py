"""Waiting, and starting threads, where a signal's handler may raise at any instruction.

Handlers run in the main thread, between any two instructions of whatever Python code is there,
that of `threading` too: a `Condition`, an `Event`, a `Future` or `Thread.start` that an
exception of Ctrl-C or an alarm breaks into can leave a lock taken, and who needs it next waits
for ever. So what the main thread of a program calls uses these instead:

- one call into C, which is done or not done: an attribute that is set, `list.append`, `list.pop`,
  `with` a plain lock (whose taking is no call of its own), the start of a bare thread;
- a thread of its own for what takes several steps (`aside`), for no handler runs there.
"""

from __future__ import annotations

import _thread
import threading
import weakref
from collections.abc import Callable
from contextlib import suppress
from contextvars import copy_context
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


class Latch:
    """Is set once, by one thread; any can wait for that.

    >>> latch = Latch()
    >>> latch.wait(0.001)
    False
    >>> latch.set()
    >>> latch.wait()
    True
    """

    def __init__(self) -> None:
        self.is_set = False
        self._waiting: list[_thread.LockType] = []
        """One that is taken for each that waits, so that nobody holds another one up."""

    def set(self) -> None:
        """Let go all that wait. Raises nothing."""
        self.is_set = True
        with suppress(IndexError):
            while True:
                self._waiting.pop().release()

    def wait(self, timeout_s: float | None = None) -> bool:
        """Until it is set, at most `timeout_s` seconds; whether it is. What a signal's handler
        raises is raised at once, and changes nothing."""
        if self.is_set:
            return True
        mine = _thread.allocate_lock()
        mine.acquire()
        self._waiting.append(mine)
        try:
            if not self.is_set:  # else `set` may have been through with its list
                mine.acquire(timeout=-1 if timeout_s is None else max(0.0, timeout_s))
        finally:
            with suppress(ValueError):
                self._waiting.remove(mine)
        return self.is_set


class NoThread(RuntimeError):
    """No thread can be started: there are too many, or the interpreter is ending."""


def _nothing() -> None: ...


class Helper:
    """A daemon thread that works from now on. Its start waits for nothing. Raises NoThread."""

    def __init__(self, work: Callable[[], object], *, name: str) -> None:
        self._work = work
        self._name = name
        self._ended = Latch()
        self._thread: Callable[[], threading.Thread | None] = lambda: None
        try:
            _thread.start_new_thread(self._start, ())
        except RuntimeError as error:
            if not str(error).startswith("can't"):
                raise  # a handler's
            raise NoThread(str(error)) from None

    def _start(self) -> None:
        # Made and dropped here: even freeing a `Thread` calls Python code.
        thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        self._thread = weakref.ref(thread)
        try:
            thread.start()
        except RuntimeError:
            self._run()  # then without a name

    def _run(self) -> None:
        try:
            self._work()
        finally:
            self._work = _nothing  # and all that it has used can be freed
            self._ended.set()

    @property
    def works(self) -> bool:
        """Whether it has not come to its end."""
        return not self._ended.is_set

    def join(self, timeout_s: float | None = None) -> None:
        """Block until it has ended, at most `timeout_s` seconds for its work."""
        if self._ended.wait(timeout_s) and (thread := self._thread()) is not None:
            with suppress(RuntimeError):  # it could not be started
                thread.join()


def aside(function: Callable[P, R]) -> Callable[P, R]:
    """The function, done to its end even where a handler raises meanwhile: that is raised when
    it has ended, or at once if it had not begun. A second one is raised at once.

    In the main thread it runs in another one, with the caller's context variables. For what is
    short: Ctrl-C waits for it. It must not need a lock that its caller holds.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if threading.get_ident() != threading.main_thread().ident:
            return function(*args, **kwargs)
        outcome: list[Any] = []
        ended = Latch()
        turn = [None]
        """Who takes it says whether there is anything to wait for."""
        context = copy_context()

        def work() -> None:
            if not _taken(turn):
                return
            try:
                outcome.append((context.run(function, *args, **kwargs), None))
            except BaseException as error:  # noqa: BLE001 - raised by who has called
                outcome.append((None, error))
            finally:
                ended.set()

        try:
            Helper(work, name="holdfast-aside")
            ended.wait()
        except NoThread:
            return function(*args, **kwargs)
        except BaseException:
            if not _taken(turn):
                ended.wait()
            raise
        result, error = outcome[0]
        if error is not None:
            raise error
        return result

    return call


def _taken(turn: list[None]) -> bool:
    try:
        turn.pop()
    except IndexError:
        return False
    return True
