"""The engine of a run's loops: follows them, keeps the position, leads back to a saved one.

It tells its host when a boundary is reached; what to save there is the host's decision.
Nothing but the random states behind a `break` depends on when objects are collected
(see `loop.Items`).
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from types import FrameType
from typing import Any, Protocol

from holdfast.errors import HoldfastError, LoopError
from holdfast.run import position as at
from holdfast.run.callsite import Callsite
from holdfast.run.feed import Feed, LoaderInterrupted
from holdfast.run.loop import Habits, Loop, Status
from holdfast.run.position import Closed, Frame, Label, Mark, Position, Replay, Skip
from holdfast.run.random_states import RandomStates
from holdfast.run.readahead import ReadAhead
from holdfast.run.survey import digest_of


class Host(Protocol):
    """What the engine asks of the run."""

    random: RandomStates
    """Of everything that the next line of the program may draw from."""

    def start(self) -> Replay | None:
        """Before anything else: restore. The way back, if there is one."""
        ...

    def land(self, *, over: bool, rng: bool) -> None:
        """The saved place is reached: restore once more, with the random states if
        `rng`. `over`: it is the end of the outermost loop."""
        ...

    def before_item(self, loop: Loop) -> None:
        """Before each item; cheap after the first."""
        ...

    def took(self, loop: Loop, item: Any) -> None:
        """An item was taken, and its body is about to run."""
        ...

    def acted(self) -> bool:
        """Whether something was logged or an optimizer stepped since the last item."""
        ...

    def left(self, loop: Loop, following: Loop) -> None:
        """An outermost loop was left early, and another one starts after it."""
        ...

    def redrawn(self, passed: Label, following: Loop) -> None:
        """Between the loop `passed`, which was left early, and `following`, random numbers
        were drawn that differ from those of the saved run."""
        ...

    def opened(self, loop: Loop, *, first_inside: bool) -> None:
        """A loop is about to start; `first_inside`: no other ran in this body."""
        ...

    def open_feed(self, loop: Loop, saved: Any) -> bool:
        """Open the loop's feed (see `Feed.open`) for a new epoch (None) or a saved place."""
        ...

    def passed(self, loop: Loop) -> None:
        """The loop had ended before the checkpoint. Random states may be moved."""
        ...

    def completed(self, *, is_step: bool) -> None:
        """A body ran to its end; the position is the one after it."""
        ...

    def boundary(self, loop: Loop, *, last: bool) -> None:
        """In front of the next item. `last`: there will be none."""
        ...

    def tail(self) -> None:
        """A loop inside another has ended; the rest of the outer body is to come."""
        ...

    def outermost_done(self) -> None:
        """The outermost loop is exhausted."""
        ...

    def interrupted(self, error: LoaderInterrupted) -> None:
        """A loader's workers died of a signal in front of the next item."""
        ...


class Engine:
    """Keeps the position of one run. Used by one thread."""

    def __init__(self, host: Host) -> None:
        self.position = Position()
        self.ticks = 0
        """Bodies completed in this process."""
        self.busy = False
        """In a boundary: the interrupted code is ours, and a stop will be seen."""
        self.ended = False
        """`finish` was called: every loop stops at its next item."""
        self.closed = False
        """The run is: nothing of it is saved any more."""
        self._failed: HoldfastError | None = None
        self._host = host
        self._loops: list[Loop] = []
        self._replay: Replay | None = None
        self.started = False
        """The state was restored, or there was nothing to restore."""
        self._thread: int | None = None
        self._habits: dict[str, Habits] = {}
        self._passed: Closed | None = None
        """On the way back: the loop that was passed over last, until the next one."""

    @property
    def landed(self) -> bool:
        """Whether the program is where the checkpoint was taken, or past it."""
        return self.started and self._replay is None

    def start(self) -> None:
        """Restore, if that was not done yet."""
        if self.started:
            return
        self._replay = self._host.start()
        self.started = True
        if self._replay is not None:
            self.position = replace(self.position, step=self._replay.saved.step)
            if self._replay.saved.untouched:
                self._replay = None  # this is the place: there is no way to go

    def inside(self, frame: FrameType | None) -> bool:
        """Whether code interrupted at `frame` will come to a boundary."""
        if self.busy:
            return True
        if not self._loops:
            return False
        site = self._loops[0].site
        return site is None or site.holds(frame, advancing=True) is not False

    def snapshot(self) -> Position:
        """The position to save, with the innermost feed's state."""
        if not self.position.inside:
            return self.position
        top = replace(self.position.top, feed=self._loops[-1].feed.state())
        return replace(self.position, frames=(*self.position.frames[:-1], top))

    def open_feeds(self) -> list[Feed]:
        """The feeds of the open loops."""
        return [loop.feed for loop in self._loops]

    @contextmanager
    def finishing(self) -> Iterator[None]:
        """The program has left its loops, or is to: close them all."""
        self.busy = self.ended = True
        try:
            while self._loops:
                self._close_top(broken=True)
            yield
        finally:
            self.busy = False

    # -- advancing ---------------------------------------------------------------

    def advance(self, loop: Loop, caller: FrameType) -> Any:
        """The loop's next item; StopIteration at its end."""
        self._check_thread(loop)
        self.busy = True
        try:
            self.check_failed()
            if self.ended:
                raise StopIteration
            if loop.status is Status.NEW:
                self.start()
                self._open(loop, caller)
                if loop.status is Status.OPEN:
                    item = self._take(loop)
                    loop.watch = ReadAhead.start(caller, loop.origin)
                    return item
            elif loop.status is Status.OPEN:
                loop.left = None
                if loop.watch is not None:
                    self._check_wrappers(loop, loop.watch, caller)
                self._settle(loop)
            elif loop.status is Status.LEFT:
                raise LoopError(
                    f"this {loop.label} loop was closed when the loop around it went on, or "
                    "another one was opened after it",
                    hint="Two loops cannot be advanced in turn; for two loaders use "
                    'run.batches(a, b, mode="min").',
                )
            if loop.status is not Status.OPEN:
                raise StopIteration
            return self._take(loop)
        except HoldfastError as error:
            # Another loop would start from its first item, with whatever state there is.
            self._failed = self._failed or error
            raise
        finally:
            self.busy = False

    def check_failed(self) -> None:
        """Raises LoopError if the loops ended with an error of ours."""
        failed = self._failed
        if failed is not None:
            again = "Make a new Run: it goes on from the newest checkpoint."
            raise LoopError(
                f"the loops of this run ended with an error: {failed.message}",
                hint=f"{failed.hint} {again}" if failed.hint else again,
            )

    def _check_thread(self, loop: Loop) -> None:
        thread = threading.get_ident()
        if thread == self._thread and loop.status is not Status.NEW:
            return
        made_on = loop.origin.thread if loop.origin is not None else thread
        if thread != (self._thread or thread) or thread != made_on:
            self._failed = self._failed or LoopError(
                f"the {loop.label} loop was advanced on a second thread, from where nobody can "
                "know when a step is complete",
                hint="A wrapper that reads ahead on a thread of its own goes inside: "
                "run.batches(wrapper(loader)). All loops of a run are made and iterated over on "
                "one thread; log() and save() work from any.",
            )
            raise self._failed
        self._thread = thread

    def _check_wrappers(self, loop: Loop, watch: ReadAhead, caller: FrameType) -> None:
        """At the second item, before the first counts as completed."""
        loop.watch = None
        nested = self._loops[-1] is not loop or loop.last_child is not None
        reader = watch.check(caller, active=nested or self._host.acted())
        if reader and not nested:
            number = self.position.top.completed
            raise LoopError(
                f"{reader} reads ahead of the {loop.label} loop: it asked for item "
                f"{number + 1:,} before it handed out item {number:,}. Being asked for the next "
                "item says that a step is complete, so a resume would skip a step that was "
                "never trained",
                hint="Put it inside, where it may read ahead: "
                "run.batches(Prefetcher(loader)), not Prefetcher(run.batches(loader)).",
            )

    def _take(self, loop: Loop) -> Any:
        self._host.before_item(loop)
        mark, loop.retake = loop.retake, None
        if mark is None and (loop.label.kind == "epochs" or loop.habits.nests is not False):
            mark = Mark(loop.feed.state(), self._host.random.capture())
        try:
            item = loop.feed.take()
        except StopIteration:
            self._exhaust(loop)
            raise
        except LoaderInterrupted as error:
            self._host.interrupted(error)
            raise
        self.position = at.take(self.position, mark)
        loop.last_child = None
        self._host.took(loop, item)
        return item

    def _settle(self, loop: Loop) -> None:
        """The body in progress of `loop` is over."""
        while self._loops[-1] is not loop:
            self._close_top(broken=True)
        if self.position.top.phase == "next":
            return  # the last attempt to take an item raised; nothing ran since
        if self._replay is not None:
            raise self._replay.mismatch(
                f"the body of {loop.label} {self.position.top.completed:,} ended without it"
            )
        if loop.habits.nests is None:
            loop.habits.nests = False
        if loop.last_child is not None and loop.last_child.followed is None:
            loop.last_child.followed = False
        step = self.position.step
        self.position = at.complete(self.position)
        self.ticks += 1
        self._host.completed(is_step=self.position.step > step)
        self._host.boundary(loop, last=self.position.top.completed == loop.feed.length())

    def _exhaust(self, loop: Loop) -> None:
        if self._replay is not None:
            raise self._replay.mismatch(
                f"{loop.label} has no item {self.position.top.completed:,} now"
            )
        loop.status = Status.EXHAUSTED
        self._close_top(broken=False)
        if self._loops:
            self._host.tail()
        else:
            self._host.outermost_done()

    def _close_top(self, *, broken: bool) -> None:
        loop = self._loops[-1]
        rng, guessed = loop.left, False
        if rng is None and self._matters(loop):
            rng, guessed = self._host.random.capture(), broken
        self.position = at.close(self.position, broken=broken, rng=rng, guessed=guessed)
        self._loops.pop()
        if self._loops:
            self._loops[-1].last_child = loop.habits
        if loop.status is Status.OPEN:
            loop.status = Status.LEFT
        if loop.watch is not None:
            loop.watch.stop()
            loop.watch = None
        loop.feed.close()

    def let_go(self, loop: Loop) -> None:
        """The `for` of a loop that has not ended has dropped it: by `break`, `return` or an
        exception. From here the program draws what a resume must see again."""
        if loop.status is not Status.OPEN or self.busy or not self.landed or sys.is_finalizing():
            return
        if self.closed:  # collected at any time: a framework may be half imported then
            return
        if threading.get_ident() == self._thread and self._matters(loop):
            loop.left = self._host.random.capture()

    def _matters(self, loop: Loop) -> bool:
        """Whether the random states behind the loop are needed: another one may follow."""
        return self._loops[0] is loop or loop.habits.followed is not False

    # -- opening -----------------------------------------------------------------

    def _open(self, loop: Loop, caller: FrameType) -> None:
        while self._loops and not self._in_body(self._loops[-1], caller):
            if self._replay is not None:
                raise self._replay.mismatch(f"the program left {self._loops[-1].label} before")
            if len(self._loops) == 1:
                self._host.left(self._loops[0], loop)
            self._close_top(broken=True)
        same = sum(one.label.name == loop.label.name for one in self.position.siblings)
        around = f"{self._loops[-1].place}/" if self._loops else ""
        loop.place = f"{around}{loop.label}#{same}"
        limit = loop.feed.length() if loop.label.kind != "batches" else None
        if self._replay is not None:
            met = self._replay.meet(self.position, loop.label, limit)
            self._check_redrawn(loop)
            if isinstance(met, Skip):
                self._skip(loop, met)
                return
            self._push(loop, caller, replace(met.frame, limit=limit, counted=loop.counted))
            self._reenter(loop, met.frame, lands=met.lands)
            return
        self._host.opened(loop, first_inside=not self.position.siblings)
        self._push(loop, caller, Frame(loop.label, loop.counted, limit))
        self._open_feed(loop, None)

    def _open_feed(self, loop: Loop, saved: Any) -> bool:
        as_saved = self._host.open_feed(loop, saved)
        if loop.label.kind == "batches":
            self._amend_top(limit=loop.feed.length())
        return as_saved

    def _in_body(self, loop: Loop, caller: FrameType) -> bool:
        return loop.site is None or loop.site.holds(caller) is not False

    def _push(self, loop: Loop, caller: FrameType, frame: Frame) -> None:
        loop.habits = self._habits.setdefault(loop.place, Habits())
        if self._loops:
            parent = self._loops[-1]
            parent.habits.nests = True
            if parent.last_child is not None:
                parent.last_child.followed = True
        self.position = at.enter(self.position, frame)
        self._loops.append(loop)
        loop.site = Callsite(caller)
        loop.status = Status.OPEN

    def _reenter(self, loop: Loop, saved: Frame, *, lands: bool) -> None:
        """Open the feed where it was; then the random states are those of that moment."""
        assert self._replay is not None
        if lands:
            as_saved = self._open_feed(loop, saved.feed)
            self._arrive(over=False, rng=as_saved)
            if not as_saved:
                self._amend_top(completed=0)  # the epoch begins anew, with this state
            return
        self._replay = self._replay.entered()
        assert saved.mark is not None  # only replayable positions are saved
        loop.retake = saved.mark
        if not self._open_feed(loop, saved.mark.feed):
            raise self._replay.mismatch(f"the data of {loop.label} has changed")
        self._host.random.apply(saved.mark.rng)
        # The body runs again from its start.
        self._amend_top(phase="next", nested=False, done=())

    def _skip(self, loop: Loop, met: Skip) -> None:
        closed: Closed = met.closed
        self._host.passed(loop)
        if met.lands:
            self._arrive(over=not self._loops, rng=True)
        # Behind a loop that was left, the program ran on before the save at its end.
        if closed.rng is not None and (closed.broken or not met.lands):
            self._host.random.apply(closed.rng)
        if met.lands:
            closed = replace(closed, rng=self._host.random.capture())
        self._passed = closed
        self.position = at.skip(self.position, closed)
        loop.status = Status.EXHAUSTED

    def _check_redrawn(self, loop: Loop) -> None:
        """On the way back, in front of a loop: whether what lies between it and a loop that
        was left has drawn random numbers, which are then others than the first time."""
        passed, self._passed = self._passed, None
        if passed is None or not passed.guessed:
            return
        if digest_of(self._host.random.capture()) != digest_of(passed.rng):
            self._host.redrawn(passed.label, loop)

    def _arrive(self, *, over: bool, rng: bool) -> None:
        self._host.land(over=over, rng=rng)
        self._replay = None

    def _amend_top(self, **changes: Any) -> None:
        top = replace(self.position.top, **changes)
        self.position = replace(self.position, frames=(*self.position.frames[:-1], top))
