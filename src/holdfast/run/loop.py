"""The iterators that `run.epochs`, `run.batches` and `run.range` return.

A loop is an iterator object, not a generator, and `__next__` is the boundary: being asked
for the next item is the only sign that a body was completed. What follows from it is the
engine's business.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from enum import Enum
from types import FrameType
from typing import TYPE_CHECKING, Any

from holdfast.errors import HoldfastError, LoopError, brief
from holdfast.run.callsite import Callsite
from holdfast.run.feed import Feed
from holdfast.run.feeds import Mode
from holdfast.run.position import Label, Mark
from holdfast.run.readahead import Origin, ReadAhead

if TYPE_CHECKING:
    from holdfast.run.engine import Engine


class IndexFeed:
    """The feed of `epochs` and `range`: numbers, nothing to fetch."""

    def __init__(self, numbers: range | None) -> None:
        self.name, self.moves, self.held = "numbers", False, list[Any]()
        self._numbers = numbers
        self._taken = 0

    def open(self, saved: dict[str, Any] | None, *, fixed: str = "") -> bool:
        self._taken = 0 if saved is None else int(saved["taken"])
        return True

    def take(self) -> int:
        if self._numbers is None:
            item = self._taken
        elif self._taken < len(self._numbers):
            item = self._numbers[self._taken]
        else:
            raise StopIteration
        self._taken += 1
        return item

    def state(self) -> dict[str, Any]:
        return {"taken": self._taken}

    def length(self) -> int | None:
        return None if self._numbers is None else len(self._numbers)

    def end(self) -> None:
        """No number follows those that were taken."""
        self._numbers = (
            range(self._taken) if self._numbers is None else self._numbers[: self._taken]
        )

    def close(self) -> None:
        pass

    def shutdown(self) -> None:
        pass

    def inherit(self, before: Any) -> None:
        pass


class Status(Enum):
    NEW = "new"
    OPEN = "open"
    EXHAUSTED = "exhausted"
    LEFT = "left"
    """Closed by the engine: the program went on without it."""


class Loop(Iterator[Any]):
    """One loop of a run; iterate over it once."""

    def __init__(
        self,
        engine: Engine,
        label: Label,
        feed: Feed,
        *,
        counted: bool,
        loaders: Sequence[Any] = (),
        mode: Mode = "min",
        origin: Origin | None = None,
    ) -> None:
        self.label = label
        self.feed = feed
        self.counted = counted
        self.loaders = loaders
        self.mode: Mode = mode
        self.place = ""
        """Where in the program's loops it was opened: "epochs/batches#0"."""
        self.status = Status.NEW
        self.site: Callsite | None = None
        self.origin = origin
        self.watch: ReadAhead | None = None
        """From the first item to the second, where wrappers stand around the loop."""
        self.habits = Habits()
        self.retake: Mark | None = None
        """The mark of the item to take again on the way back."""
        self.last_child: Habits | None = None
        self.epoch_end: bool | None = None
        """Whether the item in progress is the last of an epoch, where a framework goes through
        epochs in one loop; None where it does not."""
        self.waits = False
        """Whether what ranks want is waited for at the end of the item in progress, as behind an
        epoch: a framework that goes through its evaluations in one loop has just made one."""
        self.left: Any = None
        """The random states where its `for` let go of it, if that was seen."""
        self._engine = engine

    def __iter__(self) -> Items:
        if self.status is Status.EXHAUSTED:
            raise LoopError(
                f"this {self.label} loop has ended; it can be iterated over once",
                hint="Call run.epochs, run.batches or run.range where the loop starts: "
                "`for x in run.batches(loader):`.",
            )
        return Items(self)

    def __next__(self) -> Any:
        return self.advance(sys._getframe(1))

    def advance(self, caller: FrameType) -> Any:
        """The next item, for the frame that asks for it."""
        try:
            return self._engine.advance(self, caller)
        except HoldfastError as error:
            raise brief(error)  # noqa: B904 -- it is the same error

    def end(self) -> None:
        """The item in progress is the last, however many there were to be: for loops that a
        framework goes through and may stop early. Only of `epochs` and `range`."""
        assert isinstance(self.feed, IndexFeed)
        self.feed.end()

    def let_go(self) -> None:
        """The `for` has dropped the loop; see `Items`."""
        self._engine.let_go(self)

    def __len__(self) -> int:
        length = self.feed.length()
        if length is None:
            raise TypeError(f"the length of this {self.label} loop is not known")
        return length

    def __length_hint__(self) -> int:
        return self.feed.length() or 0


class Items(Iterator[Any]):
    """What a `for` holds while it goes through a loop.

    CPython drops it at the moment when the `for` is left, and this is how a `break` is seen:
    nothing else is called. It serves one purpose only, to know the random states of that
    moment; if it is dropped later (the program holds it in a variable) they are taken where
    the next loop opens, and a resume that finds them changed in between says so.
    """

    __slots__ = ("_loop",)

    def __init__(self, loop: Loop) -> None:
        self._loop = loop

    def __next__(self) -> Any:
        return self._loop.advance(sys._getframe(1))

    def __del__(self) -> None:
        self._loop.let_go()


@dataclass
class Habits:
    """What a loop at one place of the program was seen to do.

    Marks cost tens of microseconds; a loop that was never seen to contain another is
    not marked at each item, and one that no other follows not at its end. Unknown
    counts as yes. Where a habit changes, saves wait for the end of that body.
    """

    nests: bool | None = None
    followed: bool | None = None
