"""Notices and signals of a process that a test has for itself."""

from __future__ import annotations

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

from holdfast.notices import signals
from holdfast.notices.notice import Notice


class Told:
    """A stand-in for the pollers, `holdfast.notices.listening`: tells what a test says."""

    def __init__(self) -> None:
        self.listeners: list[Callable[[Notice], None]] = []

    def listen(self, tell: Callable[[Notice], None]) -> Callable[[], None]:
        self.listeners.append(tell)
        return lambda: self.listeners.remove(tell)

    def tell(self, notice: Notice) -> None:
        """As a poller does: from another thread."""
        for listener in list(self.listeners):
            thread = threading.Thread(target=listener, args=(notice,))
            thread.start()
            thread.join()


@contextmanager
def signals_of_a_new_process() -> Iterator[None]:
    """No run of an earlier test listens, and handlers are those that Python starts with: tests
    that were started in the background ignore SIGINT."""
    dispatcher = signals._dispatcher
    before = {number: signal.getsignal(number) for number in signals._SIGNALS}
    signals._dispatcher = signals._Dispatcher()
    for number in before:
        signal.signal(number, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        yield
    finally:
        signals._dispatcher = dispatcher
        for number, handler in before.items():
            signal.signal(number, handler)
