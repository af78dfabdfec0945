"""Ctrl-C ends a command, whatever it waits for."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import socket
import threading
from collections.abc import Callable, Iterator

# For what is in progress to end in order: a file, a child process. A request to a server that
# does not answer takes minutes, and Python hears of a signal only after it.
GRACE_S = 5.0


@contextlib.contextmanager
def ends_when_interrupted(say: Callable[[], int]) -> Iterator[None]:
    """If the block is not left within seconds of a Ctrl-C, or before a second one, the process
    ends there and then, with the status that `say` returns.

    It is as if it was killed: stores stay whole. In the main thread of a program only.
    """
    hears, tells = socket.socketpair()
    tells.setblocking(False)  # as `set_wakeup_fd` wants it
    before = signal.set_wakeup_fd(tells.fileno(), warn_on_full_buffer=False)
    left = threading.Event()

    def watch() -> None:
        with hears:
            while signals := hears.recv(1):
                if signals[0] == signal.SIGINT:
                    select.select([hears], [], [], GRACE_S)
                    if not left.is_set():
                        os._exit(say())
                    return

    # A daemon: it waits for a signal that mostly never comes.
    watching = threading.Thread(target=watch, name="holdfast-interrupts", daemon=True)
    with contextlib.suppress(RuntimeError):  # there are too many threads
        watching.start()
    try:
        yield
    finally:
        signal.set_wakeup_fd(before)
        left.set()
        tells.close()
