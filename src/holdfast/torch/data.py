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
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from holdfast.errors import LoaderInterrupted, LoopError
from holdfast.run.feed import BaseFeed, Policy, Stateful, describe
from holdfast.run.held import DATA_NAMES, Held
from holdfast.run.iterables import AskedFeed, CountedFeed
from holdfast.run.randomness import PrivateStreams, libraries
from holdfast.run.search import find_generators
from holdfast.torch.indices import (
    END,
    SIZES,
    EpochIndices,
    Groups,
    ShortBatch,
    draw_base_seed,
    in_private,
    index_sampler,
    is_eager,
    regrouped,
    same_order,
    sample_sampler,
    samplers,
    seeded,
    told,
    twin_of,
)
from holdfast.torch.randomness import TORCH
from holdfast.torch.workers import WorkerInit, death_watch, stop_workers, watch

__all__ = ["feed", "random_library"]

random_library = TORCH

logger = logging.getLogger("holdfast")


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
        # Of a copy: torch remembers that it was asked, and warns if it was wrong.
        return _length(_copy_of(self.loader))

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
        if saved.get("ahead", self._ahead()) == self._ahead():
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
        self._indices = EpochIndices(loader)
        self._groups = Groups.of(loader)
        self._short = ShortBatch()
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
            "batches": super().length(),
            "samples": _length(loader.dataset),
            "batch_size": loader.batch_size,
            "drop_last": loader.drop_last,
            "sampler": [type(one).__qualname__ for one in samplers(loader)],
            # How many does not matter. But without any, random numbers come from the
            # global streams.
            "workers": "some" if loader.num_workers else "none",
            "generators in the dataset": self._generators,
        }

    def length(self) -> int | None:
        groups = self._groups
        if groups is None or not groups.goes_on:
            return super().length()
        samples = _length(sample_sampler(self.loader))
        return None if samples is None else groups.behind_items + groups.left(samples)

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
        return super()._exact() or is_eager(self.loader)  # else indices are made ahead

    def _iterate(self, skip: int) -> None:
        # Draws as torch does without workers: the sampler's `iter`, a base seed, the
        # first index. How many workers there are and whether they persist changes nothing.
        loader, groups = self.loader, self._groups
        source = iter(index_sampler(loader))
        twin = twin_of(loader.generator)
        base_seed = draw_base_seed(loader.generator)
        first = 0
        if groups is not None and groups.goes_on:
            # torch's BatchSampler asks for the sampler's `iter` at the first batch.
            samples = source if groups.size is None else iter(sample_sampler(loader))
            indices = regrouped(samples, groups, eager=is_eager(loader))
            first = groups.behind_items
        else:
            indices = source if is_eager(loader) else in_private(source)
        if groups is not None:
            indices = self._short.watch(indices, groups, first)
        for number in range(first, skip):
            if next(indices, END) is END:
                raise LoopError(
                    f"{self.name} has only {number:,} batches now; {skip:,} had been taken "
                    "when the checkpoint was made",
                    hint="Put its data and sampler back as they were.",
                )
        self._indices.source = seeded(indices, base_seed, skip) if loader.num_workers else indices
        if self._copy is None or not loader.persistent_workers:
            which = "sampler" if loader.batch_sampler is None else "batch_sampler"
            self._copy = _copy_of(loader, **{which: self._indices}, **self._worker_options())
        # torch draws a base seed where it starts workers: from here, the same one again.
        self._copy.__dict__["generator"] = twin
        self._start_iterator(self._copy)

    def _begin(self) -> None:
        self._augmenting.begin()
        self._groups = Groups.of(self.loader)
        super()._begin()

    def _resume(self, saved: dict[str, Any]) -> None:
        if saved.get("groups") is not None:
            self._groups = Groups.from_tree(saved["groups"])
        super()._resume(saved)
        self._augmenting.restore(saved["augmenting"])

    def _settle(self, saved: dict[str, Any]) -> None:
        super()._settle(saved)
        self._augmenting.settle(saved["augmenting"])

    def _record(self) -> dict[str, Any]:
        groups = self._groups
        counted = (
            {}
            if groups is None
            else {
                "groups": groups.to_tree(),
                "samples_taken": groups.after(self._taken) - self._short.lacking(self._taken),
                "sampler_length": _length(sample_sampler(self.loader)),
            }
        )
        return {**super()._record(), "augmenting": self._augmenting.state(), **counted}

    # -- going on by sample ------------------------------------------------------

    def _fixed_because(self, saved: dict[str, Any]) -> str:
        if saved.get("kind") != self.kind:
            return "it is another kind of loader now"
        batches = self.loader.batch_sampler
        now, before = Groups.of(self.loader), saved.get("groups")
        if now is None:
            return f"its batches are made by a {describe(batches)}, which alone knows their sizes"
        if before is None:
            return "the checkpoint does not say how many samples its batches had"
        if (now.size is None) != (before["size"] is None):
            return "with batch_size=None, an item of its sampler may be more than one sample"
        return ""

    def _regroup(self, saved: dict[str, Any]) -> str:
        loader = self.loader
        changes = self._held.restore(saved["held"])
        problems = [one for one in changes if one.split()[0] not in SIZES]
        groups = Groups.of(loader)
        assert groups is not None  # else it is fixed
        was, now = saved["identity"], self._identity
        changed = {key for key in now if was.get(key) != now[key]}
        samples = _length(sample_sampler(loader))
        if samples != saved["sampler_length"]:
            changed.add("sampler length")
        same = not problems and same_order(loader, changed)
        taken = int(saved["samples_taken"])
        first = int(saved["groups"]["first"])
        self._groups = groups = groups.behind(self._taken, taken, first)
        self._epoch = {"rng": saved["rng"], "held": self._held.state()}
        self.random.apply(saved["rng"])
        self._iterate(self._taken)
        if same and was["workers"] == now["workers"] == "none":
            self._held.put(saved["generators"])  # else they may be ahead, by how much depends
        self._augmenting.restore(saved["augmenting"])
        return told(groups, taken, samples, same=same, workers="workers" in changed)

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


def _is_iterable_object(value: object) -> bool:
    return (
        hasattr(type(value), "__iter__")
        and hasattr(value, "__dict__")
        and not isinstance(value, Dataset | torch.Tensor | torch.nn.Module | type)
    )


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
