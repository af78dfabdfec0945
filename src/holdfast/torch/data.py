"""Feeds for `torch.utils.data.DataLoader`.

Map-style datasets: the epoch's order is made again from what the random states were when
the epoch began, and consumed batches are skipped as indices, without loading them. In
workers, random numbers are seeded per batch (`holdfast.torch.workers`).

Iterable datasets: consumed batches are loaded again and thrown away, unless the dataset
knows its own position (`state_dict`) and runs in this process.

The user's loader object is never changed: iteration uses a private copy of it, which
shares its dataset, sampler and generators. See docs/design/data-order.md.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from holdfast.errors import LoaderInterrupted, LoopError
from holdfast.run.feed import BaseFeed, Policy, Stateful
from holdfast.run.held import DATA_NAMES, Held
from holdfast.run.iterables import AskedFeed, CountedFeed
from holdfast.run.randomness import PrivateStreams, libraries
from holdfast.run.search import find_generators
from holdfast.torch.randomness import TORCH
from holdfast.torch.workers import (
    SeededIndex,
    WorkerInit,
    death_watch,
    stop_workers,
    watch,
)

__all__ = ["feed", "random_library"]

random_library = TORCH

logger = logging.getLogger("holdfast")

# These draw from the global generator at most once, for the first index, or only from
# generators of their own: their later indices need no private streams.
_EAGER_SAMPLERS = (
    BatchSampler,
    DistributedSampler,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)


def feed(loader: Any, *, policy: Policy = "refuse") -> BaseFeed | None:
    """The feed for a DataLoader; None if `loader` is something else."""
    if not isinstance(loader, DataLoader):
        return None
    if isinstance(loader, Stateful):
        return AskedFeed(loader, policy=policy, guard=death_watch.waiting)
    kind = type(loader)
    if (
        kind.__iter__ is not DataLoader.__iter__
        or kind._get_iterator is not DataLoader._get_iterator
    ):
        # It decides what an epoch is. All that is known is what it yields.
        if loader.persistent_workers:
            logger.warning(
                "%s has an __iter__ of its own and persistent_workers=True: random numbers drawn "
                "in its workers go on from epoch to epoch and cannot be replayed",
                kind.__name__,
            )
        return CountedFeed(loader, policy=policy, guard=death_watch.waiting)
    if isinstance(loader.dataset, IterableDataset):
        return StreamFeed(loader, policy=policy)
    return MapFeed(loader, policy=policy)


class _LoaderFeed(BaseFeed):
    """What both kinds of dataset share."""

    loader: DataLoader[Any]

    def __init__(self, loader: DataLoader[Any], *, policy: Policy = "refuse") -> None:
        super().__init__(loader, policy=policy)
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
        try:
            # Of a copy: torch remembers that it was asked, and warns if it was wrong.
            return len(_copy_of(self.loader))
        except (TypeError, NotImplementedError):
            return None

    def _begin(self) -> None:
        self._held.begin()
        self._epoch = {"rng": self.random.capture(), "held": self._held.state()}
        self._iterate(0)

    def _prepare(self, saved: dict[str, Any]) -> list[str]:
        self._epoch = {"rng": saved["rng"], "held": saved["held"]}
        return self._held.restore(saved["held"])

    def _resume(self, saved: dict[str, Any]) -> None:
        self.random.apply(saved["rng"])
        self._iterate(self._taken)
        self._held.put(saved.get("generators", {}))

    def _settle(self, saved: dict[str, Any]) -> None:
        self._epoch = {"rng": saved["rng"], "held": saved["held"]}
        self._held.settle(saved["held_now"])

    def _record(self) -> dict[str, Any]:
        return {
            **self._epoch,
            "held_now": self._held.state() if self._at == "end" else {},
            "generators": self._held.generators() if self._at == "inside" and self._exact() else {},
        }

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

    def _share(self, before: _LoaderFeed) -> list[str]:
        return self._held.inherit(before._held)

    def _drop(self) -> None:
        iterator, self._iterator = self._iterator, None
        stop_workers(iterator)


# -- map-style ----------------------------------------------------------------


class MapFeed(_LoaderFeed):
    """A dataset with indices: consumed batches are skipped as indices."""

    kind = "map"

    def __init__(self, loader: DataLoader[Any], *, policy: Policy = "refuse") -> None:
        super().__init__(loader, policy=policy)
        self._indices = _Indices(loader)
        self._copy: DataLoader[Any] | None = None  # holds the workers that persist
        # In workers these are seeded per batch; here they are part of the state.
        found = [] if loader.num_workers else data_generators(loader)
        self._augmenting = Held({str(number): one for number, one in enumerate(found)})
        self.held.append(self._augmenting)
        self._generators = len(found)

    def identity(self) -> dict[str, Any]:
        loader = self.loader
        return {
            "type": self.name,
            "batches": self.length(),
            "samples": _length(loader.dataset),
            "batch_size": loader.batch_size,
            "drop_last": loader.drop_last,
            "sampler": [type(one).__qualname__ for one in _samplers(loader)],
            # How many does not matter. But without any, random numbers come from the
            # global streams.
            "workers": "some" if loader.num_workers else "none",
            "generators in the dataset": self._generators,
        }

    def _find_held(self) -> Held:
        loader = self.loader
        roots = {
            "batch_sampler": loader.batch_sampler,
            "sampler": loader.sampler,
            "generator": loader.generator,
        }
        return Held(
            {name: root for name, root in roots.items() if root is not None},
            lambda value: value is not loader.dataset and _is_iterable_object(value),
            closed=lambda name, value: name in DATA_NAMES or value is loader.dataset,
        )

    def _exact(self) -> bool:
        return super()._exact() or _is_eager(self.loader)  # else indices are made ahead

    def _iterate(self, skip: int) -> None:
        # Draws as torch does without workers: the sampler's `iter`, a base seed, the
        # first index. How many workers there are and whether they persist changes nothing.
        loader = self.loader
        source = iter(_index_sampler(loader))
        twin = _twin(loader.generator)
        base_seed = _draw_seed(loader.generator)
        indices = source if _is_eager(loader) else _in_private(source)
        for number in range(skip):
            if next(indices, _END) is _END:
                raise LoopError(
                    f"{self.name} has only {number:,} batches now; {skip:,} had been taken "
                    "when the checkpoint was made",
                    hint="Put its data and sampler back as they were.",
                )
        self._indices.source = _seeded(indices, base_seed, skip) if loader.num_workers else indices
        if self._copy is None or not loader.persistent_workers:
            which = "sampler" if loader.batch_sampler is None else "batch_sampler"
            self._copy = _copy_of(loader, **{which: self._indices}, **self._worker_options())
        # torch draws a base seed where it starts workers: from here, the same one again.
        self._copy.__dict__["generator"] = twin
        self._start_iterator(self._copy)

    def _begin(self) -> None:
        self._augmenting.begin()
        super()._begin()

    def _resume(self, saved: dict[str, Any]) -> None:
        super()._resume(saved)
        self._augmenting.restore(saved["augmenting"])

    def _settle(self, saved: dict[str, Any]) -> None:
        super()._settle(saved)
        self._augmenting.settle(saved["augmenting"])

    def _record(self) -> dict[str, Any]:
        return {**super()._record(), "augmenting": self._augmenting.state()}

    def _ended(self) -> None:
        super()._ended()
        self._augmenting.end()

    def _share(self, before: MapFeed) -> list[str]:
        own = self._augmenting.inherit(before._augmenting)
        return [*super()._share(before), *(f"a generator in its dataset ({one})" for one in own)]

    def _abandon(self) -> None:
        super()._abandon()
        self._copy = None

    def _drop(self) -> None:
        if self.loader.persistent_workers:
            self._iterator = None  # torch goes on with the same one in the next epoch
        else:
            super()._drop()

    def shutdown(self) -> None:
        self.close()
        if self._copy is not None:
            stop_workers(self._copy._iterator)
            self._copy = None


class _Indices:
    """The sampler of our copy. torch asks it for an iterator once or twice per epoch and
    gets the epoch's one."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        self.source: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        return self.source

    def __len__(self) -> int:
        return len(_index_sampler(self._loader))


_END = object()


def _in_private(source: Iterator[Any]) -> Iterator[Any]:
    """A sampler of unknown habits: it may draw for each index, while training draws too
    and workers ask for indices ahead."""
    streams = PrivateStreams()
    while True:
        with streams:
            index = next(source, _END)
        if index is _END:
            return
        yield index


def _seeded(indices: Iterator[Any], base_seed: int, first: int) -> Iterator[SeededIndex]:
    for number, index in enumerate(indices, first):
        yield SeededIndex(base_seed, number, index)


def _index_sampler(loader: DataLoader[Any]) -> Any:
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


def _samplers(loader: DataLoader[Any]) -> list[Any]:
    """The sampler that yields indices and those it wraps as `.sampler`."""
    found = [_index_sampler(loader)]
    while (inner := getattr(found[-1], "sampler", None)) is not None and len(found) < 8:
        found.append(inner)
    return found


def _is_eager(loader: DataLoader[Any]) -> bool:
    plain = (*_EAGER_SAMPLERS, list, tuple, range, np.ndarray, torch.Tensor)
    return all(type(one) in plain for one in _samplers(loader))


def _is_iterable_object(value: object) -> bool:
    return (
        hasattr(type(value), "__iter__")
        and hasattr(value, "__dict__")
        and not isinstance(value, Dataset | torch.Tensor | torch.nn.Module | type)
    )


def _twin(generator: torch.Generator | None) -> torch.Generator:
    twin = torch.Generator()
    twin.set_state((torch.default_generator if generator is None else generator).get_state())
    return twin


def _draw_seed(generator: torch.Generator | None) -> int:
    """As torch draws a loader's base seed."""
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())


# -- iterable -----------------------------------------------------------------


class StreamFeed(_LoaderFeed):
    """An iterable dataset: consumed batches are loaded again and thrown away, unless it
    runs in this process and knows its own position."""

    kind = "stream"

    def __init__(self, loader: DataLoader[Any], *, policy: Policy = "refuse") -> None:
        super().__init__(loader, policy=policy)
        # In workers it runs ahead of the batches that were handed out.
        self._asked = isinstance(loader.dataset, Stateful) and not loader.num_workers
        self._streams: AbstractContextManager[Any] = nullcontext()
        if loader.persistent_workers:
            logger.warning(
                "%s: workers of an IterableDataset start anew in each epoch in spite of "
                "persistent_workers=True, so that the epoch can be replayed",
                self.name,
            )

    def identity(self) -> dict[str, Any]:
        loader = self.loader
        return {
            "type": self.name,
            "samples": _length(loader.dataset),
            "batch_size": loader.batch_size,
            "drop_last": loader.drop_last,
            "workers": loader.num_workers,
            "dataset": type(loader.dataset).__qualname__,
        }

    def _find_held(self) -> Held:
        loader = self.loader
        roots = {
            "dataset": loader.dataset,
            "collate_fn": loader.collate_fn,
            "generator": loader.generator,
        }
        return Held(
            {name: root for name, root in roots.items() if root is not None},
            lambda value: isinstance(value, Dataset),
        )

    def _prepare(self, saved: dict[str, Any]) -> list[str]:
        super()._prepare(saved)  # differences in a dataset are not known to matter
        return []

    def _exact(self) -> bool:
        # Asked for its position, it starts as it did when the epoch began.
        return super()._exact() and not self._asked

    def _resume(self, saved: dict[str, Any]) -> None:
        if not self._asked:
            super()._resume(saved)
            return
        self.random.apply(saved["rng"])
        if saved["dataset"] is None:
            self._iterator = iter(())
        else:
            self.loader.dataset.load_state_dict(saved["dataset"])  # type: ignore[attr-defined]
            self._iterate(0)

    def _iterate(self, skip: int) -> None:
        alone = self._asked or self.loader.num_workers > 0
        self._streams = nullcontext() if alone else PrivateStreams()
        options = {**self._worker_options(), "persistent_workers": False}
        self._start_iterator(_copy_of(self.loader, **options))
        for number in range(skip):
            try:
                self._next()
            except StopIteration:
                raise LoopError(
                    f"the dataset of {self.name} has only {number:,} batches now; {skip:,} had "
                    "been taken when the checkpoint was made",
                    hint="Put its data back as it was.",
                ) from None

    def _next(self) -> Any:
        with self._streams:
            return super()._next()

    def _record(self) -> dict[str, Any]:
        # Once it is exhausted (a last, short batch shows that) it is not asked: its
        # position is that of the end or already that of a new start, who knows.
        fetcher = getattr(self._iterator, "_dataset_fetcher", None)
        asked = self._asked and fetcher is not None and not fetcher.ended
        dataset: Any = self.loader.dataset
        return {**super()._record(), "dataset": dataset.state_dict() if asked else None}


# -- both ---------------------------------------------------------------------


def data_generators(loader: DataLoader[Any]) -> list[Any]:
    """Generator objects in the dataset and collate_fn, each once."""
    known = libraries()
    found = [*find_generators(loader.dataset, known), *find_generators(loader.collate_fn, known)]
    return list({id(generator): generator for _, generator in found}.values())


def _copy_of(loader: DataLoader[Any], **changes: Any) -> DataLoader[Any]:
    """A loader that shares everything but `changes` (attributes that DataLoader does not
    let anyone set) and its workers."""
    copied = object.__new__(type(loader))
    copied.__dict__.update(vars(loader), _iterator=None, **changes)
    return copied


def _length(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return None
