"""What the saves of a run have cost, so that a last one is begun only if it fits."""

from __future__ import annotations

import logging
from collections import deque
from collections.abc import Callable, Iterable
from typing import Any

from holdfast.core.aside import Helper, NoThread
from holdfast.manager.history import SaveEvent
from holdfast.run import deadline

logger = logging.getLogger("holdfast")

_READ_S = 1.0  # a store that does not answer must not take the time that the save needs


def cost_of(event: SaveEvent) -> deadline.Cost:
    """Without the wait for the save before it, which a last save need not share."""
    seconds = max(0.0, event.total_s - event.waited_s)
    return deadline.Cost(seconds, event.nbytes, event.blocked)


class Costs:
    """Of this process's saves, and of those before it, from the run's history. From any
    thread."""

    def __init__(self, read: Callable[[], Iterable[Any]]) -> None:
        """`read` is that of the run's history, which is asked at most once."""
        self._read = read
        self._own: deque[deadline.Cost] = deque(maxlen=256)
        self._before: list[deadline.Cost] = []
        self._reader: Helper | None = None
        self._waited = False

    def add(self, event: SaveEvent | None) -> None:
        """A save of this process is committed."""
        if event is not None and not event.error:
            self._own.append(cost_of(event))

    def p95_s(self) -> float | None:
        """See `deadline.p95_s`. May wait for the store, for a second, the first time."""
        if self._reader is None:
            try:
                self._reader = Helper(self._look_back, name="holdfast-costs")
            except NoThread:
                return deadline.p95_s(list(self._own))
        if not self._waited:
            self._reader.join(_READ_S)
            self._waited = True
        return deadline.p95_s([*self._before, *self._own])

    def _look_back(self) -> None:
        try:
            events = list(self._read())
        except Exception as error:  # noqa: BLE001 - of a store, perhaps one that is being closed
            logger.debug("what saves before this process have cost is not known: %s", error)
            return
        self._before = [
            cost_of(event) for event in events if isinstance(event, SaveEvent) and not event.error
        ]
