"""Something that is done now and then beside other work."""

from __future__ import annotations

import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager


@contextmanager
def ticking(tick: Callable[[], object], every_s: float, name: str) -> Generator[None, None, None]:
    """While the block runs, call `tick` every `every_s` seconds, in a thread of that name.

    Not at all where no thread can be started: the work in the block matters more. After the block
    `tick` is not called any more.
    """
    over = threading.Event()

    def work() -> None:
        while not over.wait(every_s):
            tick()

    # A daemon: a crashed main thread must not hang on it.
    thread = threading.Thread(target=work, name=name, daemon=True)
    try:
        thread.start()
    except RuntimeError:  # too many threads, or the interpreter is ending
        yield
        return
    try:
        yield
    finally:
        over.set()
        thread.join()
