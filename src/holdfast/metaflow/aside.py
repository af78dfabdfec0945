"""Work that no signal's handler breaks into: `@timeout` raises from one, at any instruction."""

from __future__ import annotations

import _thread
import threading
from collections.abc import Callable
from functools import wraps
from typing import Any, ParamSpec, TypeVar

P = ParamSpec("P")
R = TypeVar("R")


def aside(function: Callable[P, R]) -> Callable[P, R]:
    """The function, done to its end even where a handler raises meanwhile: that is raised when
    it has ended.

    Handlers run in the main thread only, so the function runs in another. Interrupted in the
    main thread, it could leave a lock of `threading` taken, or a thread half started.
    """

    @wraps(function)
    def call(*args: P.args, **kwargs: P.kwargs) -> R:
        if threading.current_thread() is not threading.main_thread():
            return function(*args, **kwargs)
        outcome: list[Any] = []
        ended = _thread.allocate_lock()
        ended.acquire()

        def work() -> None:
            try:
                outcome.append((function(*args, **kwargs), None))
            except BaseException as error:  # noqa: BLE001 - raised by who has called
                outcome.append((None, error))
            finally:
                ended.release()

        # Not `threading.Thread`, whose start a handler can break into.
        try:
            _thread.start_new_thread(work, ())
        except RuntimeError:  # the process ends: some versions of Python start none any more
            return function(*args, **kwargs)
        try:
            ended.acquire()
        except BaseException:
            if not outcome:  # else it may have been acquired before the handler raised
                ended.acquire()
            raise
        result, error = outcome[0]
        if error is not None:
            raise error
        return result

    return call
