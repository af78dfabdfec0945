"""Where a program is about to change what a save still reads in place.

A framework's adapter that offers `barrier(drain)` knows such places (in front of an
optimizer's step), and which leaves stay the same in between; see `manager.overlap`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any, Protocol

from holdfast.core.adapters import LeafSource
from holdfast.run.watching import watch_all


class Barrier(Protocol):
    """What an adapter's `barrier(drain)` returns."""

    def watch(self, tracked: Mapping[str, Any]) -> None: ...
    def protected(self) -> Callable[[LeafSource], bool]: ...
    def close(self) -> None: ...


class Barriers:
    """Those of every framework in use. Used by the loop's thread."""

    def __init__(self, drain: Callable[[], None]) -> None:
        """`drain` returns when nothing is read in place any more."""
        self._drain = drain
        self._barriers: dict[str, Barrier] = {}

    def watch(self, adapters: Iterable[Any], tracked: Mapping[str, Any]) -> None:
        """These are the objects that are saved."""
        watch_all(self._barriers, "barrier", adapters, tracked, self._drain)

    def in_place(self) -> Callable[[LeafSource, str], bool]:
        """Which leaves of a save that begins now stay the same up to the next barrier."""
        protected = [barrier.protected() for barrier in self._barriers.values()]
        return lambda source, path: any(holds(source) for holds in protected)

    def close(self) -> None:
        for barrier in self._barriers.values():
            barrier.close()
