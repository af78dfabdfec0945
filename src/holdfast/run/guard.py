"""`run.guard(loader)`: places to stop in a loop that the run does not count."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from typing import Any

from holdfast.manager import heartbeat
from holdfast.run.session import Session

# After a stop was asked for, an evaluation may go on for so long to reach a place where
# the steps since the last save can be saved. Most schedulers kill after 30 s.
GRACE_S = 15.0


class Guarded(Iterator[Any]):
    """Iterates over `items` and looks for a stop in front of each.

    It never saves: the body around it is half done. It leaves at once if the last save
    was at this very place of the run, else when `grace_s` have gone by since the signal.
    """

    def __init__(self, session: Session, items: Iterable[Any], grace_s: float = GRACE_S) -> None:
        self._session = session
        self._items = items
        self._iterator: Iterator[Any] | None = None
        self._grace_s = grace_s

    def __iter__(self) -> Guarded:
        self._iterator = iter(self._items)
        return self

    def __next__(self) -> Any:
        stopping = self._session.stopping
        position = self._session.engine.position
        heartbeat.beat(self._session.manager.address, "guard", position.step)
        if stopping.requested:
            if stopping.saved():
                stopping.exit(f"stopped after step {self._session.engine.position.step:,}")
            if time.monotonic() - stopping.signals.requested_s > self._grace_s:
                stopping.exit("stopped; the steps since the last save will run again")
        if self._iterator is None:
            self._iterator = iter(self._items)
        return next(self._iterator)

    def __len__(self) -> int:
        return len(self._items)  # type: ignore[arg-type]
