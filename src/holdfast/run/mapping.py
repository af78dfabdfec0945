"""`run.map`: one function over many items, of which only the missing ones are computed.

The parent process names, stores and reads; the executor only computes. At most `max_pending`
items are between the one that was taken from the iterable last and the one that is handed out
next, so the iterable may be endless. What an executor has computed is stored from the thread
that says so, through a few threads of ours, whether the program asks for the next item or not.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sized
from concurrent.futures import Future, ThreadPoolExecutor, wait
from typing import Any, Protocol

from holdfast.core.calls import Call, Rule, call_of, name_of, short_name
from holdfast.errors import Preempted
from holdfast.manager.progress import Work, counting
from holdfast.manager.results import Found, Results, names_in
from holdfast.notices.signals import StopSignals, in_notebook
from holdfast.run.console import Console, plural
from holdfast.run.stopping import Stopping

_LOOK_S = 0.2  # how soon a signal or a failed item is seen while another is waited for
_QUICK_S = 0.01
_THREADS = 8  # storing is mostly waiting, for a disk or a network


class Executor(Protocol):
    """What is needed of an executor: `concurrent.futures`, and what resembles it."""

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Any:
        """A future with `add_done_callback`, `result`, `exception`, `cancel`, `cancelled`."""
        ...


class _Here:
    """Computes in the thread that submits."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self.took_s = 0.0
        """The item before."""

    def submit(self, fn: Callable[..., Any], /, *args: Any) -> Future[Any]:
        future: Future[Any] = Future()
        start = self._clock()
        try:
            future.set_result(fn(*args))
        except Exception as error:  # noqa: BLE001 - raised where the item is waited for
            future.set_exception(error)
        self.took_s = self._clock() - start
        return future


class _Slot:
    """One item on its way."""

    def __init__(self, index: int, item: Any, call: Call) -> None:
        self.index = index
        self.item = item
        self.call = call
        self.reading: Future[Found | None] | None = None
        """Of one that is stored."""
        self.computing: Any = None
        """The executor's future."""
        self.kept: Future[Any] = Future()
        """Of one that is computed: the value as it was stored."""

    @property
    def failed(self) -> bool:
        """Whether it has ended with an error of its own."""
        kept = self.kept
        return kept.done() and not kept.cancelled() and kept.exception() is not None


class ResumableMap:
    """One `run.map`. Iterated once, by one thread."""

    def __init__(
        self,
        results: Results,
        rule: Rule,
        items: Iterable[Any],
        *,
        executor: Executor | None,
        here: Callable[[Any], Any],
        max_pending: int,
        console: Console,
        stopping: Stopping,
        address: str,
        exit_code: int,
        check: Callable[[], None],
        on_end: Callable[[], None] = lambda: None,
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        """`here` is called in place of the function where there is no executor; `check` raises
        where the run cannot be used."""
        self._results = results
        self._rule = rule
        self._items = items
        self._here = _Here(clock) if executor is None else None
        self._executor = executor or self._here
        self._compute = rule.function if executor is not None else here
        self._max_pending = max_pending
        self._console = console
        self._stopping = stopping
        self._address = address
        self._exit_code = exit_code
        self._check = check
        self._on_end = on_end
        self._function = name_of(rule.function)
        self._label = f"{address}: {short_name(self._function)}"
        self._window: deque[_Slot] = deque()
        self._stored: set[tuple[str, str]] = set()
        """What was there at the start."""
        self._arguments: set[str] = set()
        """Of those."""
        self._told = False
        self._failed = False
        self._found = self._computed = 0
        self._work = Work(total_nbytes=len(items) if isinstance(items, Sized) else 0, whole=True)
        self._signals = StopSignals(inside=lambda frame: True, notice=self._notice)

    def __iter__(self) -> Iterator[Any]:
        self._check()
        self._stored = self._results.names(self._function)
        self._arguments = {arguments for arguments, _ in self._stored}
        if not self._stopping.signals.installed:
            self._signals.install()
        threads = ThreadPoolExecutor(_THREADS, thread_name_prefix="holdfast-results")
        try:
            with counting(self._label, self._work, shown=not self._console.quiet):
                yield from self._each(threads)
            self._console.say(f"{self._label}: {self._count()}")
        finally:
            self._signals.restore()
            self._cancel()
            # What was handed in is stored. What still runs is stored when it ends, by the
            # thread that says so.
            threads.shutdown()
            self._on_end()

    def _each(self, threads: ThreadPoolExecutor) -> Iterator[Any]:
        items = enumerate(self._items)
        more = True
        while True:
            while more and len(self._window) < self._max_pending and not self._failed:
                self._look()
                try:
                    index, item = next(items)
                except StopIteration:
                    more = False
                    break
                self._window.append(self._begin(index, item, threads))
            if not self._window:
                return
            value = self._value(self._window[0], threads)
            self._window.popleft()
            self._work.done_nbytes += 1
            yield value
            self._check()

    def _begin(self, index: int, item: Any, threads: ThreadPoolExecutor) -> _Slot:
        slot = _Slot(index, item, call_of(self._rule, (item,), {}))
        name = names_in(slot.call)
        if name in self._stored:
            slot.reading = threads.submit(self._results.find, slot.call)
            return slot
        if name[0] in self._arguments and not self._told:
            self._told = True
            self._console.say(
                f"{self._label}: its code has changed since results were stored: "
                "computing them again"
            )
        if self._here is None:
            self._submit(slot, threads)
        return slot

    def _submit(self, slot: _Slot, threads: ThreadPoolExecutor) -> None:
        def done(future: Any) -> None:
            self._after(slot, future, threads)

        assert self._executor is not None
        slot.computing = self._executor.submit(self._compute, slot.item)
        slot.computing.add_done_callback(done)

    # -- in the executor's threads, and ours ---------------------------------------------

    def _after(self, slot: _Slot, future: Any, threads: ThreadPoolExecutor) -> None:
        """The executor is through with an item."""
        if future.cancelled():
            slot.kept.cancel()
            return
        error = future.exception()
        if error is not None:
            self._failed = True
            slot.kept.set_exception(error)
            return
        try:
            threads.submit(self._keep, slot, future.result())
        except RuntimeError:  # the loop over the map was left: there is nobody else to do it
            self._keep(slot, future.result())

    def _keep(self, slot: _Slot, value: Any) -> None:
        try:
            slot.kept.set_result(self._results.keep(slot.call, value))
        except BaseException as error:  # noqa: BLE001 - raised where the item is waited for
            self._failed = True
            slot.kept.set_exception(error)

    # -- in the program's thread ---------------------------------------------------------

    def _value(self, slot: _Slot, threads: ThreadPoolExecutor) -> Any:
        """The result of the item whose turn it is."""
        if slot.reading is not None:
            self._wait_for(slot.reading)
            found = slot.reading.result()
            if found is not None:
                self._found += 1
                return found.value
        self._look()
        if slot.computing is None:  # without an executor, or what was stored is damaged
            self._submit(slot, threads)
        if self._here is not None:
            self._ahead(slot, threads)
        self._wait_for(slot.kept)
        if slot.failed:
            self._fail()
        self._computed += 1
        return slot.kept.result()

    def _ahead(self, head: _Slot, threads: ThreadPoolExecutor) -> None:
        """Compute quick items while the one before is being stored: a disk takes ten
        milliseconds for each, and stores eight in the same time."""
        assert self._here is not None
        for slot in self._window:
            if head.kept.done() or self._failed or self._here.took_s > _QUICK_S:
                return
            if slot.computing is None and slot.reading is None:
                self._look()
                self._submit(slot, threads)

    def _wait_for(self, future: Future[Any]) -> None:
        while not future.done():
            wait([future], timeout=_LOOK_S)
            self._look()
            if self._failed:
                self._fail()

    def _fail(self) -> None:
        """An item has failed. The others that run come to their end first."""
        self._cancel()
        for slot in self._window:
            while slot.computing is not None and not slot.kept.done():
                wait([slot.kept], timeout=_LOOK_S)
                self._look()
        for slot in self._window:
            if slot.failed:
                error = slot.kept.exception()
                assert error is not None
                error.add_note(self._note(slot))
                raise error

    def _note(self, slot: _Slot) -> str:
        return f"in run.map({short_name(self._function)}), item {slot.index:,}"

    def _cancel(self) -> None:
        """What has not begun does not begin."""
        for slot in self._window:
            if slot.computing is not None:
                slot.computing.cancel()

    # -- a stop --------------------------------------------------------------------------

    def _look(self) -> None:
        """Leave the process if a signal has asked for it."""
        if self._stopping.requested:
            self._stopping.in_guard()
        if not self._signals.requested:
            return
        line = f"{self._label}: {self._signals.name}: {self._count()} so far; " + _AGAIN
        self._console.say(line)
        if in_notebook():
            raise Preempted(line)
        raise SystemExit(self._exit_code)

    def _notice(self, source: str) -> None:
        more = "; once more stops at once" if source == "SIGINT" else ""
        self._console.notice(f"{self._label}: {source}: stopping{more}")

    def _count(self) -> str:
        were = f" ({self._found:,} were stored)" if self._found else ""
        return f"{plural(self._found + self._computed, 'item')}{were}"


_AGAIN = "run the same command again to go on"
