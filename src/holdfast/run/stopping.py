"""How a run ends where it is asked to: with a save, at a place to come back to."""

from __future__ import annotations

from collections.abc import Callable
from typing import NoReturn

from holdfast.errors import Preempted
from holdfast.notices.signals import StopSignals, in_notebook
from holdfast.run.console import Console
from holdfast.run.engine import Engine


class Stopping:
    """What one run does about a request to stop. Used by the loop's thread.

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
        save: Callable[[str], None],
        saved: Callable[[], bool],
    ) -> None:
        self.signals = StopSignals(inside=engine.inside, notice=self._notice)
        self.saved = saved
        self._engine = engine
        self._console = console
        self._address = address
        self._exit_code = exit_code
        self._save = save

    @property
    def requested(self) -> bool:
        return self.signals.requested

    def here(self) -> None:
        """Save and leave the process, if this is a place to come back to."""
        if not self.saved():
            if not self._engine.position.replayable:
                return
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
            self._save("preempted")
        self._console.say(
            f"{self._address}: saved step {self._engine.position.step:,}; stopping when "
            f"{self._engine.position.top.label} goes on"
        )

    def exit(self, what: str) -> NoReturn:
        """Leave because of a signal: by SystemExit, or Preempted in a notebook."""
        line = f"{self._address}: {self.signals.name}: {what}; run the same command again to go on"
        self._console.say(line)
        self.signals.restore()
        if in_notebook():
            raise Preempted(line)
        raise SystemExit(self._exit_code)

    def _notice(self, signal: str) -> None:
        more = "; once more stops at once" if signal == "SIGINT" else ""
        self._console.notice(f"{self._address}: {signal}: finishing this step, then saving{more}")
