"""How a run ends where it is asked to: with a save, at a place to come back to."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import NoReturn

from holdfast.core.aside import Helper, Latch, NoThread
from holdfast.core.units import format_seconds
from holdfast.errors import Preempted
from holdfast.notices.notice import Notice
from holdfast.notices.signals import StopSignals, in_notebook
from holdfast.run import deadline
from holdfast.run.console import Console, plural
from holdfast.run.deadline import Deadline
from holdfast.run.engine import Engine
from holdfast.run.events import RunEvents
from holdfast.run.saves import Saves

_LOOK_S = 1.0  # a later notice may bring the deadline forward


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
        want: Callable[[str], None],
        events: RunEvents,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        """`grace_s` is for how long this process may live after a signal, if anybody said so;
        `want` asks for a save at the next boundary."""
        self.signals = StopSignals(inside=engine.inside, notice=self._notice)
        self.saved = saved
        self.deadline: Deadline | None = None
        self._engine = engine
        self._console = console
        self._address = address
        self._exit_code = exit_code
        self._grace_s = grace_s
        self._save = save
        self._saves = saves
        self._want = want
        self._events = events
        self._clock = clock
        self._heard: Notice | None = None
        """The notice that asked for the stop."""
        self._asked_s = 0.0
        self._over = Latch()

    @property
    def requested(self) -> bool:
        return self.signals.requested

    # -- who asks for a stop -----------------------------------------------------------

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
            self._console.notice(f"{self._address}: {_said(notice)}")
            return
        self._heard = notice
        self.deadline = at
        self.signals.request(notice.source)

    def _notice(self, source: str) -> None:
        """The stop was asked for. Also in a signal's handler."""
        self._asked_s = now = self._clock()
        said = self._heard
        usual = self._grace_s if self._grace_s is not None else deadline.ASSUMED_GRACE_S
        self.deadline = deadline.earlier(
            self.deadline, Deadline(now + usual, said=self._grace_s is not None)
        )
        who = source if said is None else _said(said)
        more = "; once more stops at once" if source == "SIGINT" else ""
        self._console.notice(f"{self._address}: {who}: finishing this step, then saving{more}")
        try:
            Helper(self._watch, name="holdfast-deadline")
        except NoThread:
            pass  # the interpreter is ending, and so is the loop

    # -- what the loop does about it ---------------------------------------------------

    def here(self) -> None:
        """Save and leave the process, if this is a place to come back to."""
        if not self.saved():
            if not self._engine.position.replayable:
                return
            self.check_time()
            self._save("preempted")
        self.exit(f"saved step {self._engine.position.step:,}")

    def in_tail(self) -> None:
        """A loop inside another has ended, and the rest of the outer body is to come.

        A resume from here runs the tail alone, without what the body left in variables. So
        that is for the worst case: usually there is time for the tail.
        """
        if not self.requested or not self._engine.position.replayable:
            return
        if not self.saved():
            self.check_time()
            self._save("preempted")
        self._console.say(
            f"{self._address}: saved step {self._engine.position.step:,}; stopping when "
            f"{self._engine.position.top.label} goes on"
        )

    def in_guard(self) -> None:
        """In an evaluation, where nothing can be saved: leave if nothing would be lost, or when
        the loop can no longer come to a boundary in time."""
        if self.saved():
            self.exit(f"stopped after step {self._engine.position.step:,}")
        if self._clock() >= self._latest_s():
            self.exit(f"stopped in an evaluation; {self._lost()}", loud=True)

    def check_time(self) -> None:
        """Leave without a save, if a stop was asked for and none fits before the deadline."""
        if not self.requested:
            return
        fit = deadline.fit(
            self._clock(), self.deadline, self._saves.costs.p95_s(), behind=self._saves.in_progress
        )
        if fit.fits:
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
        after_s = self._clock() - self._asked_s
        self._events.stopping(self._heard or Notice(self.signals.name), after_s, self._exit_code)
        if in_notebook():
            raise Preempted(line)
        raise SystemExit(self._exit_code)

    def rest(self) -> None:
        """No stop is waited for any more."""
        self.signals.restore()
        self._over.set()

    # -- when the loop does not come back ----------------------------------------------

    def _latest_s(self) -> float:
        assert self.deadline is not None
        return deadline.latest_s(self._asked_s, self.deadline, self._saves.costs.p95_s())

    def _watch(self) -> None:
        """In a thread of its own, from the request on."""
        while (left_s := self._latest_s() - self._clock()) > 0:
            if self._over.wait(min(left_s, _LOOK_S)):
                return
        if self._over.is_set or self._saves.busy:
            return
        self._console.loud(
            f"{self._address}: {self.signals.name}: the loop did not come back in time for a "
            f"save; {self._lost()}"
        )

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
