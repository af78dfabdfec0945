"""What `accelerator.prepare(…)` returns: optimizers, schedulers and loaders in wrappers.

Accelerate is not imported: its classes are known by their module.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch

from holdfast.errors import LoaderInterrupted, LoopError
from holdfast.run.feed import BaseFeed
from holdfast.torch.indices import samplers
from holdfast.torch.loaders import copy_of

_INNER = {"accelerate.optimizer": "optimizer", "accelerate.scheduler": "scheduler"}
"""Modules of wrappers -> the attribute that has what is wrapped."""

_LOADERS = "accelerate.data_loader"


def unwrapped(value: Any) -> Any:
    """The optimizer or scheduler in one of Accelerate's; anything else as it is."""
    name = _INNER.get(type(value).__module__)
    return getattr(value, name, value) if name is not None else value


def is_prepared(loader: Any) -> bool:
    """Whether a loader is one of Accelerate's (whose `__class__` claims to be torch's)."""
    return any(
        kind.__module__ == _LOADERS and kind.__name__ == "DataLoaderAdapter"
        for kind in type(loader).__mro__
    )


def inner_loader(loader: Any) -> Any:
    """The DataLoader in a prepared loader, whose sampler has its generator already.

    Accelerate's SeedableRandomSampler makes it when it is first gone through: only then would
    a new process have what a checkpoint of the second epoch says.
    """
    for sampler in samplers(loader.base_dataloader):
        if type(sampler).__name__ == "SeedableRandomSampler" and sampler.generator is None:
            sampler.generator = torch.Generator(device=torch.get_default_device())
            sampler.generator.manual_seed(sampler.initial_seed)
    return loader.base_dataloader


def _dispatches(loader: Any) -> bool:
    """Whether one process fetches the batches of several."""
    kinds = {kind.__name__ for kind in type(loader).__mro__}
    return "DataLoaderDispatcher" in kinds and loader.state.num_processes > 1


class PreparedFeed(BaseFeed):
    """A prepared loader: Accelerate's own iteration, through a feed of the DataLoader in it.

    That iteration takes a batch more than it hands out, to know which is the last. So a
    checkpoint holds where the inner feed and the random states were before that batch, which a
    resume takes again before it puts back the random states of the save.
    """

    kind = "prepared"
    base = "base_dataloader"
    """The attribute with the DataLoader in it."""

    def __init__(self, loader: Any, inner: BaseFeed) -> None:
        super().__init__(loader)
        if _dispatches(loader):
            raise LoopError(
                f"{self.name}: with dispatch_batches one process reads the batches of all, and "
                "where it is in its data is not known to the others",
                hint="DataLoaderConfiguration(dispatch_batches=False), or for the Trainer "
                'accelerator_config={"dispatch_batches": False}: each process reads its own.',
            )
        self.held = inner.held
        self.moves = inner.moves
        self._inner = inner
        self._fetched = 0
        self._before: dict[str, Any] = {}
        """The inner feed and the random states before the last batch was fetched."""
        self._kept: list[Any] = []
        """The batch that a resume has fetched again; an exception if there was none."""
        self._prepared: Any = None
        self._batches: Iterator[Any] | None = None

    def open(self, saved: dict[str, Any] | None, *, fixed: str = "") -> bool:
        self._drop()
        self._inner.random, self._inner.ranks = self.random, self.ranks
        if saved is None or saved["at"] == "new":
            self._set_epoch(self._epoch())
            self._inner.open(None)
            self._start(taken=0)
            return True
        self._set_epoch(saved.get("iteration", self._epoch()))
        # A loader that was not prepared when it was saved has the inner state only.
        as_saved = self._inner.open(saved.get("inner", saved), fixed=fixed)
        if saved["at"] == "end":
            self._at = "end"
            return as_saved
        self._start(taken=int(saved["taken"]) if as_saved else 0)
        if as_saved and "ahead" in saved:
            self.random.apply(saved["ahead"])
            try:
                self._kept.append(self._fetch())
            except StopIteration as end:
                self._kept.append(end)
        return as_saved

    def take(self) -> Any:
        if self._at != "inside":
            raise StopIteration
        assert self._batches is not None
        try:
            # A resume behind the last batch: not every iteration of theirs can be empty.
            over = bool(self._kept) and isinstance(self._kept[0], StopIteration)
            batch = next(iter(()) if over else self._batches)
        except StopIteration:
            self._at = "end"
            self._set_epoch(getattr(self._prepared, "iteration", 0) + over)
            self._drop()
            raise
        self._taken += 1
        return batch

    def state(self) -> dict[str, Any]:
        if self._at == "new":
            return {"kind": self.kind, "at": "new", "taken": 0}
        saved = {
            "kind": self.kind,
            "at": self._at,
            "taken": self._taken,
            "iteration": self._epoch(),
        }
        if self._at == "inside" and self._fetched > self._taken:
            return {**saved, **self._before}
        return {**saved, "inner": self._inner.state()}

    def length(self) -> int | None:
        return self._inner.length()

    def left(self, saved: dict[str, Any]) -> int | None:
        self._inner.ranks = self.ranks
        return self._inner.left(saved.get("inner", saved))

    def close(self) -> None:
        if self._at == "inside":
            self._at = "end"
            self._end()
        self._drop()
        self._inner.close()

    def shutdown(self) -> None:
        self.close()
        self._inner.shutdown()

    def inherit(self, before: Any) -> None:
        self._inner.inherit(before._inner if isinstance(before, PreparedFeed) else before)

    def _start(self, *, taken: int) -> None:
        skipped = 0 if taken else getattr(self.loader, "skip_batches", 0)
        self._batches = self._iterate(_Base(self, getattr(self.loader, self.base)), skipped)
        self._taken, self._fetched = taken, taken - skipped
        self._at = "inside"

    def _iterate(self, base: _Base, skipped: int) -> Iterator[Any]:
        """The wrapper's own iteration, over `base`. Nothing is fetched before its first `next`."""
        self._prepared = copy_of(self.loader, base_dataloader=base, skip_batches=skipped)
        return iter(self._prepared)

    def _end(self) -> None:
        """An epoch was left early."""
        self._prepared.end()

    def _epoch(self) -> int | None:
        """By which Accelerate seeds the order; None if this loader has no such number."""
        return getattr(self.loader, "iteration", None)

    def _set_epoch(self, number: int | None) -> None:
        if self._epoch() is not None:
            self.loader.iteration = number
            self.loader.set_epoch(number)

    def _fetch(self) -> Any:
        before = {"inner": self._inner.state(), "ahead": self.random.capture()}
        try:
            return self._inner.take()
        finally:
            # That there is none is known ahead, too. (When a worker dies nothing is.)
            if not isinstance(sys.exception(), LoaderInterrupted):
                self._before = before
                self._fetched += 1

    def _fetching(self) -> Iterator[Any]:
        """For Accelerate's iteration, which begins anew after a resume."""
        while True:
            batch = self._kept.pop() if self._kept else None
            if isinstance(batch, StopIteration):
                return
            if batch is None:
                try:
                    batch = self._fetch()
                except StopIteration:
                    return
            yield batch

    def _drop(self) -> None:
        self._batches = None
        self._kept.clear()


class _Base:
    """In a private copy of a prepared loader: the DataLoader, whose batches the feed fetches."""

    def __init__(self, feed: PreparedFeed, base: Any) -> None:
        self._feed = feed
        self._base = base

    def __iter__(self) -> Iterator[Any]:
        return self._feed._fetching()

    def __len__(self) -> int:
        return len(self._base)

    def __getattr__(self, name: str) -> Any:
        if name in ("state_dict", "load_state_dict"):
            raise AttributeError(name)  # the inner feed asks it
        return getattr(self._base, name)
