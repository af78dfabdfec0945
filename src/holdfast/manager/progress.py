"""How far long work is: counted where it is done, shown where somebody waits for it.

`working` makes a `Work` the current one of its context; saves and restores that are begun
there count their bytes in it. Counting is an addition per chunk, whether anybody looks or not.
"""

from __future__ import annotations

import sys
import threading
import time
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, TextIO

from holdfast.core.ticking import ticking
from holdfast.core.units import format_seconds, format_size
from holdfast.manager import heartbeat

_BAR_AFTER_S = 1.0  # what is over sooner needs none
_LINE_AFTER_S = 5.0  # in a log, only what may be missed as time of training
_REDRAW_S = 0.2
_LABEL_WIDTH = 36  # the end of it: numbers and a bar have to fit beside it in 80 columns


@dataclass
class Work:
    """Bytes of one save, or of one or more restores. Read from any thread at any time;
    who counts from several threads uses a `counter`, or a lock of its own."""

    done_nbytes: int = 0
    total_nbytes: int = 0
    """As far as it is known."""
    whole: bool = False
    """`total_nbytes` is all of it."""

    def begin(self, nbytes: int) -> None:
        """So much is to be done in all, from now on."""
        self.done_nbytes, self.total_nbytes, self.whole = 0, nbytes, True

    def extend(self, nbytes: int) -> None:
        """So much is to be done besides, or is a part of what `begin` has said."""
        if not self.whole:
            self.total_nbytes += nbytes


def counter(work: Work) -> Callable[[int], None]:
    """Adds to the bytes of `work` that are done. From any thread."""
    lock = threading.Lock()

    def count(nbytes: int) -> None:
        with lock:
            work.done_nbytes += nbytes

    return count


_current: ContextVar[Work | None] = ContextVar("holdfast_work", default=None)


def current_work() -> Work:
    """What to count in: of whoever waits, or else one that nobody looks at."""
    return _current.get() or Work()


@contextmanager
def working(
    doing: str,
    done: str,
    say: Callable[[str], None],
    *,
    stream: TextIO | None = None,
    clock: Callable[[], float] = time.perf_counter,
) -> Generator[Work, None, None]:
    """Show how far the saves, restores and copies are that are begun in the block.

    On a terminal (`stream`, stderr unless it is given) a bar named `doing`, once it has
    lasted for a second. Elsewhere nothing, and one line at the end through `say` if it took
    more than 5 seconds: `done`, how many bytes, how long. After an error, or where there was
    nothing to do, no line.
    """
    stream = sys.stderr if stream is None else stream  # None, too, where a program has none
    start = clock()
    with counted() as work:
        if stream is not None and _is_terminal(stream):
            with _drawing(Meter(doing, work, stream, clock)):
                yield work
        else:
            yield work
            seconds = clock() - start
            if seconds > _LINE_AFTER_S and work.done_nbytes:
                say(done_line(done, work.done_nbytes, seconds))


@contextmanager
def counted() -> Generator[Work, None, None]:
    """Count what the saves, restores and copies that are begun in the block have done, and
    show nothing. A supervisor sees that they make progress."""
    work = Work()
    token = _current.set(work)
    try:
        with heartbeat.following(lambda: work.done_nbytes):
            yield work
    finally:
        _current.reset(token)


@contextmanager
def counting(doing: str, work: Work, *, shown: bool) -> Generator[None, None, None]:
    """As `working`, of things that the block counts in `work` itself as if they were bytes. On
    a terminal only, if `shown` and it is known how many there are."""
    stream = sys.stderr
    if not shown or stream is None or not _is_terminal(stream):
        yield
        return
    with _drawing(Meter(doing, work, stream, time.perf_counter, show="{:,}".format)):
        yield


def done_line(done: str, nbytes: int, seconds: float) -> str:
    """
    >>> done_line("runs/gpt: saved step 41,200", 14_200_000_000, 12.0)
    'runs/gpt: saved step 41,200: 14.2 GB in 12.0 s (1.18 GB/s)'
    """
    rate = format_size(round(nbytes / seconds))
    return f"{done}: {format_size(nbytes)} in {format_seconds(seconds)} ({rate}/s)"


class Meter:
    """The bar of one `Work` on a terminal. `tick` and `close` from one thread at a time."""

    def __init__(
        self,
        label: str,
        work: Work,
        stream: TextIO,
        clock: Callable[[], float],
        *,
        show: Callable[[int], str] = format_size,
    ) -> None:
        self._show = show
        self._label = label if len(label) <= _LABEL_WIDTH else f"...{label[3 - _LABEL_WIDTH :]}"
        self._work = work
        self._stream = stream
        self._clock = clock
        self._start_s = clock()
        self._bar: Any = None
        self._broken = False

    def tick(self) -> None:
        """Draw how far it is, if it has lasted long enough and how long it is, is known."""
        total, done = self._work.total_nbytes, self._work.done_nbytes
        if self._broken or not total or self._clock() - self._start_s < _BAR_AFTER_S:
            return
        try:
            if self._bar is None:
                self._bar = self._begin(total)
            self._bar.length, self._bar.finished = total, False  # it may have become longer
            ahead = min(done, total) - self._bar.pos
            if ahead > 0:  # else nothing was done, or it began again
                self._bar.update(ahead)
        except (OSError, ValueError):
            self._broken = True  # the terminal is gone: work must not fail of that

    def close(self) -> None:
        """Leave the bar as it is, and the cursor on a line of its own."""
        self.tick()
        if self._bar is not None:
            with suppress(OSError, ValueError):
                self._bar.render_finish()

    def _begin(self, total: int) -> Any:
        import click  # only a terminal needs it

        progressbar: Any = click.progressbar
        bar = progressbar(
            length=total,
            label=self._label,
            file=self._stream,
            width=0,  # what the terminal has: a line that is too long would not be overwritten
            item_show_func=self._sizes,
        )
        bar.start -= self._clock() - self._start_s  # or it would promise too early an end
        bar.__enter__()
        return bar

    def _sizes(self, _: object) -> str:
        return f"{self._show(self._work.done_nbytes)} of {self._show(self._work.total_nbytes)}"


@contextmanager
def _drawing(meter: Meter) -> Generator[None, None, None]:
    """Draw from a thread of its own: the caller's does the work, or waits for it."""
    try:
        with ticking(meter.tick, _REDRAW_S, "holdfast-progress"):
            yield
    finally:
        meter.close()


def _is_terminal(stream: TextIO) -> bool:
    try:
        return stream.isatty()
    except ValueError:  # closed
        return False
