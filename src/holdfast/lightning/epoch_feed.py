"""The feed of one epoch of Lightning's: that of its loaders, and what its loop asks beside."""

from __future__ import annotations

import copy
from collections.abc import Iterable
from typing import Any

from holdfast.errors import LoopError
from holdfast.run.feed import TOGETHER, Feed
from holdfast.run.random_states import RandomStates

_AS_BEFORE = (
    "Put it back as it was for the rest of this epoch. On another number of processes it goes on "
    'where Lightning deals the samples out to them: with strategy="ddp", for devices=1, too.'
)


class EpochFeed:
    """Around the feed of the loaders: it ends where Lightning ends an epoch, and it knows
    whether the item that it handed out is the last.

    Where nobody knows how many there are it takes one ahead, as Lightning does. Its state is then
    that in front of the one that waits, with the random states from before it was loaded: a
    resume loads it once more.
    """

    def __init__(self, feed: Feed) -> None:
        self.name, self.held, self.moves = feed.name, feed.held, feed.moves
        self.feed = feed
        self._random = RandomStates()
        self._number, self._samplers = 0, list[Any]()
        self.most: int | None = None
        """Items in the epoch in progress, if anybody knows."""
        self._taken = 0
        self._ended = False
        self._waiting: list[Any] = []
        self._before: dict[str, Any] | None = None
        """What `state` gives while an item waits."""

    def begin(self, most: float, number: int = 0, samplers: Iterable[Any] = ()) -> None:
        """An epoch of at most so many items (infinity: nobody knows) is about to be opened, for
        which Lightning has told these samplers its `number`."""
        self._number, self._samplers = number, list(samplers)
        self.most = None if most == float("inf") else int(most)

    def end(self) -> None:
        """No item follows in this epoch."""
        self._ended = True

    @property
    def last(self) -> bool:
        """Whether no item follows the one that was handed out, as far as is known."""
        return not self._waiting if self.most is None else self._taken >= self.most

    # -- Feed --------------------------------------------------------------------

    def open(self, saved: dict[str, Any] | None, *, fixed: str = "") -> bool:
        self._ended, self._waiting, self._before = False, [], None
        self._taken = 0 if saved is None else int(saved["handed_out"])
        if saved is None:
            # Again: they may have been brought to where an epoch of another training had ended.
            for sampler in self._samplers:
                sampler.set_epoch(self._number)
        whole = self.feed.length()
        try:
            # As for several loaders: it can be dealt out anew, not in batches of another size.
            as_saved = self.feed.open(saved, fixed=fixed or TOGETHER)
        except LoopError as error:
            error.hint = _AS_BEFORE
            raise
        if saved is not None and self.most is not None:
            self._fit(whole)
        waited = None if saved is None else saved["waiting"]
        if waited is not None:
            self._random.apply(waited)
        if saved is None or waited is not None:
            self._look_ahead()
        return as_saved

    def take(self) -> Any:
        if self._ended or (self.most is not None and self._taken >= self.most):
            raise StopIteration
        if self.most is not None:
            item = self.feed.take()
        elif self._waiting:
            item = self._waiting.pop()
            self._look_ahead()
        else:
            raise StopIteration
        self._taken += 1
        return item

    def state(self) -> dict[str, Any]:
        if self._before is not None:
            return {**self._before, "handed_out": self._taken}
        return {**self.feed.state(), "handed_out": self._taken, "waiting": None}

    def length(self) -> int | None:
        if self._ended:
            return self._taken
        return self.most

    def close(self) -> None:
        self._waiting, self._before = [], None
        self.feed.close()

    def shutdown(self) -> None:
        self.feed.shutdown()

    def inherit(self, before: Any) -> None:
        self.feed.inherit(before.feed if isinstance(before, EpochFeed) else before)

    def _fit(self, whole: int | None) -> None:
        """A saved place was opened, in an epoch that may have been dealt out anew: then it is not
        as long as one that begins, which has `whole` items."""
        length = self.feed.length()
        if length is None or length == whole or self.most is None:
            return
        self.most = length if self.most == whole else min(length, self.most)
        if self.most <= self._taken:
            # Lightning does what belongs to the last batch of an epoch in that one alone.
            raise LoopError(
                f"{self.name}: the number of ranks has changed, and for the new one no batch is "
                "left of the epoch in which the run stopped",
                hint="Start it once on as many ranks as before, up to the end of that epoch.",
            )

    def _look_ahead(self) -> None:
        if self.most is not None:
            return
        # A loader's own state may be what it goes on to change.
        before = {**copy.deepcopy(self.feed.state()), "waiting": self._random.capture()}
        self._before = None
        try:
            self._waiting.append(self.feed.take())
        except StopIteration:
            return
        self._before = before
