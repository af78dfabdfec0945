"""`run.guard(loader)`: places to stop in a loop that the run does not count."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

from holdfast.manager import heartbeat
from holdfast.run.session import Session


class Guarded(Iterator[Any]):
    """Iterates over `items` and looks for a stop in front of each.

    It never saves: the body around it is half done. It leaves at once if the last save
    was at this very place of the run, else when the loop around it can no longer come to a
    boundary with time for a save.
    """

    def __init__(self, session: Session, items: Iterable[Any]) -> None:
        self._session = session
        self._items = items
        self._iterator: Iterator[Any] | None = None

    def __iter__(self) -> Guarded:
        self._iterator = iter(self._items)
        return self

    def __next__(self) -> Any:
        stopping = self._session.stopping
        position = self._session.engine.position
        heartbeat.beat(self._session.manager.address, "guard", position.step)
        if stopping.requested:
            stopping.in_guard()
        if self._iterator is None:
            self._iterator = iter(self._items)
        return next(self._iterator)

    def __len__(self) -> int:
        return len(self._items)  # type: ignore[arg-type]
