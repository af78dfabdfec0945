"""The processes that train together, as far as saves and restores must know them.

Nothing here starts processes or connects them: that is for torchrun, Ray, Slurm or Metaflow.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol


class Ranks(NamedTuple):
    """Which process this is, of how many."""

    rank: int
    size: int


ALONE = Ranks(0, 1)


class Group(Protocol):
    """Processes that have called, and go on to call, the same things in the same order.

    The methods are called by all of them, from the thread that trains; none is ever called
    from another thread. Values are plain: None, bool, int, float, str, bytes, lists and dicts
    of them.
    """

    @property
    def ranks(self) -> Ranks: ...

    def broadcast(self, value: object) -> Any:
        """What rank 0 gave; what the others give is not looked at. Raises GroupError if the
        others do not come."""
        ...

    def gather(self, value: object) -> list[Any]:
        """What each rank gave, in the order of ranks. Raises GroupError."""
        ...

    def highest_later(self, numbers: Sequence[int]) -> Callable[[], list[int]]:
        """Begin to find the highest of each number; returns what waits for that. The numbers
        fit in 64 bits, and there are as many on every rank. Raises GroupError."""
        ...
