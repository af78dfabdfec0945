"""A stand-in for the pollers of a process, `holdfast.notices.listening`."""

from __future__ import annotations

import threading
from collections.abc import Callable

from holdfast.notices.notice import Notice


class Told:
    """Tells its listeners what a test says."""

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
