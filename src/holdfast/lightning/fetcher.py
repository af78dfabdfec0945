"""What Lightning's loop asks for batches, in place of its own fetcher."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from types import FrameType
from typing import Any

from holdfast.errors import UsageError
from holdfast.lightning.package import is_a

_DIRECT = "_DataLoaderIterDataFetcher"
"""Gives `training_step` the iterator itself."""

Take = Callable[[FrameType], tuple[Any, bool]]


class Fetcher(Iterator[Any]):
    """Hands out what `take` gives it, as Lightning's fetchers do: (batch, number, 0)."""

    def __init__(self, take: Take) -> None:
        self.fetched = 0
        self.done = False
        """Whether the batch that was handed out is the last of its epoch."""
        self._take = take
        self._combined: Any = None
        self._start_profiler: Callable[[], None] = _nothing
        self._stop_profiler: Callable[[], None] = _nothing

    def setup(self, combined_loader: Any) -> None:
        self._combined = combined_loader

    def __iter__(self) -> Fetcher:
        _tell_length(self._combined)
        self.reset()
        return self

    def __next__(self) -> Any:
        self._start_profiler()
        try:
            # For the frame that asks: this one would look like a wrapper around the loop.
            batch, self.done = self._take(sys._getframe(1))
        except StopIteration:
            self.done = True
            raise
        finally:
            self._stop_profiler()
        self.fetched += 1
        return batch, self.fetched - 1, 0

    def reset(self) -> None:
        self.fetched, self.done = 0, False

    def teardown(self) -> None:
        self.reset()
        if self._combined is not None:
            self._combined.reset()


def feed_by(loop: Any, take: Take) -> None:
    """Have `loop`, a trainer's fit loop, ask `take` for batches.

    It makes a fetcher when it sets up its data, and at once starts the loaders' workers with
    it and draws the order of the first epoch, which would then be drawn twice. So it is
    given another one where it keeps it.
    """
    kind = type(loop)
    if getattr(kind, "_feeds", False):
        kind = kind.__mro__[1]

    def put(self: Any, fetcher: Any) -> None:
        if is_a(fetcher, _DIRECT):
            raise UsageError(
                "training_step takes `dataloader_iter`: how many batches it reads in a step, and "
                "when, is not known, so it cannot be resumed",
                hint="Take a batch: def training_step(self, batch, batch_idx).",
            )
        self.__dict__["_data_fetcher"] = fetcher and Fetcher(take)

    def get(self: Any) -> Any:
        return self.__dict__.get("_data_fetcher")

    loop.__class__ = type(
        kind.__name__, (kind,), {"_data_fetcher": property(get, put), "_feeds": 1}
    )


class _Sized:
    """The length of a loader, and nothing to iterate over."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __len__(self) -> int:
        return len(self._loader)

    def __iter__(self) -> Iterator[Any]:
        return iter(())


def _tell_length(combined: Any) -> None:
    """Make a CombinedLoader know its length, for which it must have been iterated over."""
    loaders = combined._flattened
    combined._flattened = [_Sized(loader) for loader in loaders]
    try:
        iter(combined)
    finally:
        combined._flattened = loaders


def _nothing() -> None:
    pass
