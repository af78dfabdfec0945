"""What the feeds of DataLoaders share, whatever kind of dataset is behind them."""

from __future__ import annotations

import logging
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils.data import DataLoader

from holdfast.errors import LoaderInterrupted
from holdfast.run.feed import BaseFeed, Policy
from holdfast.run.held import Held
from holdfast.torch.indices import index_sampler, length_of, samplers
from holdfast.torch.workers import WorkerInit, death_watch, stop_workers, watch

logger = logging.getLogger("holdfast")


class LoaderFeed(BaseFeed):
    """What both kinds of dataset share."""

    loader: DataLoader[Any]

    def __init__(self, loader: DataLoader[Any], *, policy: Policy = "refuse") -> None:
        super().__init__(loader, policy=policy)
        self._tell = [index_sampler(loader), *samplers(loader), loader.dataset]
        self._iterator: Any = None
        self._held = self._find_held()
        self.held = [self._held]
        self._epoch: dict[str, Any] = {}
        if loader.num_workers and not loader.in_order:
            logger.warning(
                "%s has in_order=False: Holdfast delivers its batches in order, because an "
                "order that depends on timing cannot be resumed",
                self.name,
            )

    def _find_held(self) -> Held:
        raise NotImplementedError

    def _iterate(self, skip: int) -> None:
        """Make the iterator, `skip` batches into the epoch."""
        raise NotImplementedError

    def length(self) -> int | None:
        # Of a copy: torch remembers that it was asked, and warns if it was wrong.
        return length_of(copy_of(self.loader))

    def _begin(self) -> None:
        self._held.begin()
        self._epoch = {"rng": self.random.capture(), "held": self._held.state()}
        self._iterate(0)

    def _rewind(self, saved: dict[str, Any]) -> None:
        self._held.restore(saved["held"])

    def _prepare(self, saved: dict[str, Any]) -> list[str]:
        self._epoch = {"rng": saved["rng"], "held": saved["held"]}
        return self._held.restore(saved["held"])

    def _resume(self, saved: dict[str, Any]) -> None:
        self.random.apply(self._epoch["rng"])
        self._iterate(self._taken)
        if saved.get("ahead", self._ahead()) == self._ahead() and not self._is_free(saved):
            self._held.put(saved.get("generators", {}))
        # Else they were more or fewer batches ahead of this one, and torch's samplers draw
        # again at their end: the replay has brought them to where they must be here.

    def _settle(self, saved: dict[str, Any]) -> None:
        self._epoch = {"rng": saved["rng"], "held": saved["held"]}
        self._held.settle(saved["held_now"])

    def _record(self) -> dict[str, Any]:
        return {
            **self._epoch,
            "held_now": self._held.state() if self._at == "end" else {},
            "generators": self._held.generators() if self._at == "inside" and self._exact() else {},
            "ahead": self._ahead(),
        }

    def _is_free(self, saved: dict[str, Any]) -> bool:
        """Whether the state is that of another rank, and this one draws what it likes, since
        the order of the samples does not depend on it."""
        return False

    def _ahead(self) -> int:
        """How many batches workers are given beyond the one that is handed out."""
        loader = self.loader
        return loader.num_workers * (loader.prefetch_factor or 0)

    def _exact(self) -> bool:
        """Whether generators are where the batches handed out have left them, and a replay
        will. Then what others drew from them meanwhile is in their states: the training
        loop, or another loader that shares one."""
        return not self.loader.num_workers

    def _worker_options(self) -> dict[str, Any]:
        """What our copy of a loader with workers has instead of the user's options."""
        loader = self.loader
        if not loader.num_workers:
            return {}
        context = loader.multiprocessing_context or torch.multiprocessing
        return {"worker_init_fn": WorkerInit(loader, context), "in_order": True}

    def _start_iterator(self, loader: DataLoader[Any]) -> None:
        with self._guarded():
            self._iterator = iter(loader)
        if loader.num_workers:
            watch(self._iterator)

    def _next(self) -> Any:
        if self._iterator is None:
            raise LoaderInterrupted(
                f"the workers of {self.name} died at an earlier batch of this epoch",
                hint="Start the program again: the run goes on from its last checkpoint.",
            )
        try:
            with self._guarded():
                return next(self._iterator)
        except LoaderInterrupted:
            self._abandon()
            raise

    def _guarded(self) -> AbstractContextManager[None]:
        if not self.loader.num_workers:
            return nullcontext()
        return death_watch.waiting(self._iterator)

    def _abandon(self) -> None:
        """Workers have died: get rid of the others without waiting for them."""
        iterator, self._iterator = self._iterator, None
        stop_workers(iterator, kill=True)

    def _ended(self) -> None:
        self._held.end()

    def _share(self, before: LoaderFeed) -> list[str]:
        return self._held.inherit(before._held)

    def _drop(self) -> None:
        iterator, self._iterator = self._iterator, None
        stop_workers(iterator)


def copy_of(loader: DataLoader[Any], **changes: Any) -> DataLoader[Any]:
    """A loader that shares everything but `changes` (attributes that DataLoader does not
    let anyone set) and its workers."""
    copied = object.__new__(type(loader))
    copied.__dict__.update(vars(loader), _iterator=None, **changes)
    return copied
