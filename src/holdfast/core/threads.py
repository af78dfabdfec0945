"""Work that several threads share out among themselves."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator, Sequence
from contextlib import suppress
from typing import TypeVar

_T = TypeVar("_T")


def share_out(
    items: Sequence[_T], worker: Callable[[Iterator[_T]], None], *, threads: int, name: str
) -> None:
    """Have `worker` called by the calling thread and by up to `threads - 1` others, called
    `name`. Each takes the next item from its iterator, in order; every item goes to one.

    After an error, or Ctrl-C, the iterators end. The first error is raised when no thread
    works any more. Where no more threads can be started, fewer share.
    """
    waiting = iter(items)
    taking = threading.Lock()
    errors: list[BaseException] = []
    helpers: list[threading.Thread] = []

    def left() -> Iterator[_T]:
        while not errors:
            with taking:
                try:
                    item = next(waiting)
                except StopIteration:
                    return
            yield item

    def work() -> None:
        try:
            worker(left())
        except BaseException as error:  # noqa: BLE001 - raised below
            errors.append(error)

    try:
        with suppress(RuntimeError):  # the interpreter ends, or there are too many
            for _ in range(min(threads, len(items)) - 1):
                # A daemon, whoever the caller is: one that waits for a dead server must not
                # keep the process from its end.
                helper = threading.Thread(target=work, name=name, daemon=True)
                helper.start()
                helpers.append(helper)
        work()
        for helper in helpers:
            helper.join()
    except BaseException as error:  # Ctrl-C outside of `work`
        errors.append(error)
        for helper in helpers:
            helper.join()
        raise
    if errors:
        raise errors[0]
