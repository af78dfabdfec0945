"""Gradient accumulation: boundaries between a backward and the step that uses it.

A save there holds the gradients, too. It is larger than others, so it waits for a
boundary after a step, if there is one soon.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from holdfast.run.watching import watch_all

MAX_WAIT = 100
"""Boundaries. Accumulations are shorter; a step that cannot be seen must not keep a run
from saving for ever."""


class Watch(Protocol):
    """What a framework's adapter offers as `gradients()`."""

    stepped: bool

    def watch(self, tracked: Mapping[str, Any]) -> None: ...
    def fresh(self) -> bool: ...
    def state(self) -> dict[str, Any]: ...
    def restore(self, state: Mapping[str, Any]) -> None: ...
    def close(self) -> None: ...


class Accumulation:
    """Where the loop is between a backward and its step, in every framework in use."""

    def __init__(self) -> None:
        self._watches: dict[str, Watch] = {}
        self._waited = 0

    def watch(self, adapters: Iterable[Any], tracked: Mapping[str, Any]) -> None:
        """Watch the optimizers among `tracked` from now on."""
        watch_all(self._watches, "gradients", adapters, tracked)

    def begin(self) -> None:
        """A body starts."""
        for watch in self._watches.values():
            watch.stepped = False

    @property
    def stepped(self) -> bool:
        """Whether an optimizer that is watched has stepped in the body in progress."""
        return any(watch.stepped for watch in self._watches.values())

    def defers(self) -> bool:
        """Whether a save that is due here is to wait: the body has left gradients and no
        optimizer stepped in it."""
        if self.stepped or not any(watch.fresh() for watch in self._watches.values()):
            self._waited = 0
            return False
        self._waited += 1
        return self._waited <= MAX_WAIT

    def state(self) -> dict[str, Any]:
        """For a checkpoint: all gradients that are not used up, as a plain tree."""
        return {name: watch.state() for name, watch in self._watches.items()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Make them what they were."""
        for name, watch in self._watches.items():
            watch.restore(state.get(name, {}))

    def close(self) -> None:
        for watch in self._watches.values():
            watch.close()
