"""How a run ends where it is asked to: with a save, at a place to come back to."""

from __future__ import annotations

import time
from collections.abc import Callable
from contextlib import suppress
from math import inf
from typing import NoReturn

from holdfast.core.aside import Helper, Latch, NoThread
from holdfast.core.units import format_seconds
from holdfast.errors import HoldfastError, Preempted
from holdfast.manager import heartbeat
from holdfast.notices import listening
from holdfast.notices.notice import Notice
from holdfast.notices.signals import StopSignals, in_notebook
from holdfast.run import deadline
from holdfast.run.console import Console, plural
from holdfast.run.deadline import Deadline
from holdfast.run.engine import Engine
from holdfast.run.events import RunEvents
from holdfast.run.held_state import HeldState
from holdfast.run.leaving import leave
from holdfast.run.saves import Saves
from holdfast.run.time_limit import TimeLimit

Listen = Callable[[Callable[[Notice], None]], Callable[[], None]]

_LOOK_S = 1.0  # a later notice may bring the deadline forward
_AFTER_S = deadline.MARGIN_S / 2  # `run.guard` leaves by itself, and by the front door
_BUSY_S = 0.05  # between two looks whether a save has ended
_watching: list[Stopping] = []
"""Runs of this process that were asked to stop, and that have not come to it."""


class Stopping:
    """What one run does about a request to stop. Used by the loop's thread, but for `hear`.

    `save` saves the step that was completed last, and returns when that is durable; `saved`
    tells whether nothing was completed since the last save, and that one is.
    """

    def __init__(
        self,
        engine: Engine,
        console: Console,
        address: str,
        *,
        exit_code: int,
        grace_s: float | None,
        save: Callable[[str], None],
        saved: Callable[[], bool],
        saves: Saves,
        held: HeldState,
        want: Callable[[str], None],
        events: RunEvents,
        mirrored: Callable[[float], object],
        listen: Listen = listening.listen,
        deadline_s: Callable[[], float | None] = listening.deadline_s,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`grace_s` is for how long this process may live after a signal, if anybody said so;
        `want` asks for a save at the next boundary; `mirrored` waits so long for the mirror;
        `listen` has notices told until what it returns is called; `deadline_s` is what is known
        without a notice, Unix time."""
        self.signals = StopSignals(inside=engine.inside, notice=self._notice, again=self._again)
        self.saved = saved
        self.alone = True
        """No other ranks train with this one: it stops where it likes."""
        self.deadline: Deadline | None = None
        self._engine = engine
        self._console = console
        self._address = address
        self._exit_code = exit_code
        self._grace_s = grace_s
        self._save = save
        self._saves = saves
        self._held = held
        self._want = want
        self._mirrored = mirrored
        self._listen = listen
        self._stop_listening: Callable[[], None] | None = None
        self._limit = TimeLimit(deadline_s, saves.costs, clock)
        self._events = events
        self._clock = clock
        self._heard: Notice | None = None
        """The notice that asked for the stop."""
        self._asked_s = 0.0
        self._begin()

    def _begin(self) -> None:
        self._over = Latch()
        """The loop has come to its end, or was left."""
        self._turn = [None]
        """Whoever takes it makes the last save: the loop's thread, or the one that watches."""
        self._mine = False
        """The loop's thread has taken it."""
        self._given_back = Latch()
        """The watching thread is done, and this process goes on."""

    @property
    def requested(self) -> bool:
        return self.signals.requested

    # -- who asks for a stop -----------------------------------------------------------

    def await_requests(self) -> bool:
        """A loop begins: from now on it is to be asked to stop. False if signals cannot be, off
        the main thread."""
        if self._over.is_set:
            self._begin()
        if self._stop_listening is None:
            self._stop_listening = self._listen(self.hear)
        return self.signals.install()

    def boundary(self) -> bool:
        """Whether to stop at this boundary, since somebody asked for it, or since it is the last
        one with time for a save."""
        if not self.requested and (notice := self._limit.boundary()) is not None:
            self.hear(notice)
        return self.requested

    def with_others(self) -> None:
        """All ranks have agreed to stop here, whoever was asked to."""
        if not self.requested:
            self.signals.request("another rank")

    def hear(self, notice: Notice) -> None:
        """Somebody says that this process will be stopped, or may be. From any thread."""
        if not notice.stops:
            self._want("notice")
            self._events.noticed(notice)
            what = "saving when this step is complete, and going on"
            self._console.notice(f"{self._address}: {_said(notice)}: {what}")
            return
        at = None
        if notice.deadline_s is not None:
            at = Deadline(self._clock() + notice.deadline_s - time.time(), said=True)
        if self.requested:
            self.deadline = deadline.earlier(self.deadline, at)
            self._events.noticed(notice)
            self._console.notice(f"{self._address}: {_said(notice)}")
            return
        self._heard = notice
        self.deadline = at
        self.signals.request(notice.source)

    def _notice(self, source: str) -> None:
        """The stop was asked for. Also in a signal's handler."""
        self._asked_s = self._clock()
        said = self._heard
        if self.deadline is None:  # else a notice brings its own
            self.deadline = deadline.after_signal(self._asked_s, self._grace_s)
        who = source if said is None else _said(said)
        more = "; once more stops at once" if source == "SIGINT" else ""
        self._console.notice(f"{self._address}: {who}: finishing this step, then saving{more}")
        if self not in _watching:
            _watching.append(self)
        try:
            Helper(self._watch, name="holdfast-deadline")
        except NoThread:
            pass  # the interpreter is ending, and so is the loop

    def _again(self, source: str) -> None:
        """A signal after the request: a grace that was said begins, and may end earlier."""
        if self._grace_s is not None:
            grace = deadline.after_signal(self._clock(), self._grace_s)
            self.deadline = deadline.earlier(self.deadline, grace)

    # -- what the loop does about it ---------------------------------------------------

    def here(self) -> None:
        """Save and leave the process, if this is a place to come back to."""
        if not self._engine.position.replayable and not self.saved():
            return
        self._claim()
        if not self.saved():
            self.check_time()
            self._save("preempted")
        self.exit(f"saved step {self._engine.position.step:,}")

    def before_first(self) -> None:
        """In front of a loop's first item: the signal may have come after the last boundary."""
        if self.requested and self.alone:
            self.here()

    def interrupted(self) -> None:
        """A loader's workers died of a signal, of which this process is about to hear."""
        if self.alone and self.signals.installed and self.signals.wait():
            self.here()

    def in_tail(self) -> None:
        """A loop inside another has ended, and the rest of the outer body is to come.

        A resume from here runs the tail alone, without what the body left in variables. So
        that is for the worst case: usually there is time for the tail.
        """
        if not self.requested or not self.alone or not self._engine.position.replayable:
            return
        self._claim()
        if not self.saved():
            self.check_time()
            self._save("preempted")
        self._give_up_turn()
        self._console.say(
            f"{self._address}: saved step {self._engine.position.step:,}; stopping when "
            f"{self._engine.position.top.label} goes on"
        )

    def in_guard(self) -> None:
        """In an evaluation, where nothing can be saved: leave if nothing would be lost, or when
        the loop can no longer come to a boundary in time. Never alone where others train, too."""
        if not self.alone:
            return
        if self.saved():
            self.exit(f"stopped after step {self._engine.position.step:,}")
        if self._clock() < self._latest_s():
            return
        self._claim()
        saved = self._commit_held() if self._held.on and self._fit(margin_s=0.0).fits else ""
        what = f"stopped in an evaluation{'; ' if saved else ''}{saved}"
        self.exit(f"{what}; {self._lost()}", loud=True)

    def check_time(self) -> None:
        """Leave without a save, if a stop was asked for and none fits before the deadline."""
        if not self.requested or not self.alone:
            return
        self._claim()
        if (fit := self._fit()).fits:
            return
        needed, left = format_seconds(fit.needed_s or 0.0), format_seconds(fit.left_s or 0.0)
        self.exit(
            f"no save was begun, for it takes {needed} (p95) and {left} are left; {self._lost()}",
            loud=True,
        )

    def exit(self, what: str, *, loud: bool = False) -> NoReturn:
        """Leave because of a signal: by SystemExit, or Preempted in a notebook."""
        line = f"{self._address}: {self.signals.name}: {what}; run the same command again to go on"
        (self._console.loud if loud else self._console.say)(line)
        self.rest()
        self._tell_history()
        if in_notebook():
            raise Preempted(line)
        self._tell_supervisor()
        raise SystemExit(self._exit_code)

    def _tell_supervisor(self) -> None:
        heartbeat.leaving(self._exit_code, self._heard.source if self._heard else "")

    def _tell_history(self) -> None:
        ago_s = self._clock() - self._asked_s
        self._events.stopping(self._heard or Notice(self.signals.name), ago_s, self._exit_code)

    def rest(self) -> None:
        """No stop is waited for any more."""
        self.signals.restore()
        if (stop := self._stop_listening) is not None:
            self._stop_listening = None
            stop()
        self._over.set()
        with suppress(ValueError):
            _watching.remove(self)

    # -- when the loop does not come back ----------------------------------------------

    def _fit(self, margin_s: float = deadline.MARGIN_S) -> deadline.Fit:
        behind, save_s = self._saves.in_progress, self._saves.costs.p95_s()
        return deadline.fit(self._clock(), self.deadline, save_s, behind=behind, margin_s=margin_s)

    def _latest_s(self) -> float:
        if self.deadline is None:
            return inf  # it is being set, by the thread that asks for the stop
        return deadline.latest_s(self._asked_s, self.deadline, self._saves.costs.p95_s())

    def _claim(self) -> None:
        """The loop's thread came back: it makes the last save. If the watching thread has begun
        to, this returns when that one has failed, or never."""
        if self._mine:
            return
        if self._take_turn():
            self._mine = True
        else:
            self._given_back.wait()

    def _take_turn(self) -> bool:
        try:
            self._turn.pop()  # one call into C: one of two threads gets it
        except IndexError:
            return False
        return True

    def _give_up_turn(self) -> None:
        """The loop's thread is going to be away again."""
        if self._mine:
            self._mine = False
            self._turn.append(None)

    def _watch(self) -> None:
        """In a thread of its own, from the request on."""
        over = self._over
        while (left_s := self._latest_s() + _AFTER_S - self._clock()) > 0:
            if over.wait(min(left_s, _LOOK_S)):
                return
        # Never in the loop's thread's place while that one is at it.
        while self._saves.busy or not self._take_turn():
            if over.wait(_BUSY_S):
                return
        try:
            self._instead()
        finally:
            self._given_back.set()

    def _instead(self) -> None:
        """What the watching thread does in place of the loop's: it commits what is held, and
        ends the process. Only if that is durable: else the loop may still come back."""
        name = f"{self._address}: {self.signals.name}"
        late = "the loop did not come back in time"
        saved = self._commit_held() if self._held.on and self._fit(margin_s=0.0).fits else ""
        if not saved:
            if not self._over.is_set:
                self._console.loud(f"{name}: {late} for a save; {self._lost()}")
            return
        again = "run the same command again to go on"
        self._console.loud(f"{name}: {late}: {saved}; {self._lost()}; {again}")
        if in_notebook():
            return  # a kernel must not be exited
        assert self.deadline is not None
        self._mirrored(max(0.0, self.deadline.at_s - self._clock() - deadline.MARGIN_S))
        with suppress(ValueError):
            _watching.remove(self)
        self._await_others()
        self._tell_history()
        self._events.ended(self._engine.position.step, finished=False)
        self._tell_supervisor()
        leave(self._exit_code)

    def _await_others(self) -> None:
        """Until no other run of this process can still save something."""
        while others := list(_watching):
            in_save = any(other._saves.busy for other in others)
            late = all(other._given_back.is_set for other in others)
            assert self.deadline is not None
            if not in_save and (late or self._clock() > self.deadline.at_s):
                return
            self._over.wait(_BUSY_S)

    def _commit_held(self) -> str:
        """What makes the last boundary a checkpoint, in words; "" if nothing does."""
        durable = self._saves.durable_ticks
        captured = self._held.take(durable)
        if captured is None:
            return "its last step is saved" if durable == self._engine.ticks else ""
        try:
            self._saves.stands_at(captured.commit().step)
        except (HoldfastError, OSError) as error:
            self._console.loud(f"{self._address}: the state held could not be saved: {error}")
            return ""
        return f"saved the state held of step {captured.step:,}"

    def _lost(self) -> str:
        """What stands, and what will run again."""
        stands, step = self._saves.stands, self._engine.position.step
        again = plural(step - (stands or 0), "step")
        if self._saves.in_progress:
            return f"a save of {again} is still on its way"
        if stands is None:
            return f"there is no checkpoint, and {again} will run again"
        return f"the checkpoint of step {stands:,} stands, and {again} will run again"


def _said(notice: Notice) -> str:
    return f"{notice.source}: {notice.text}" if notice.text else notice.source
