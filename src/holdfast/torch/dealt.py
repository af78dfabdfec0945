"""Loaders whose samplers deal one order of samples out to all ranks, from any place of it.

A `Dealer` knows one way of dealing: torch's `DistributedSampler` by sample, Accelerate's
`BatchSamplerShard` by batch, or by parts of a batch.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from itertools import chain, islice
from typing import Any, Protocol

from torch.utils.data import BatchSampler, DataLoader
from torch.utils.data.distributed import DistributedSampler

from holdfast.core.group import Ranks
from holdfast.run.dealing import Deal, ranks_in
from holdfast.torch.indices import (
    Groups,
    is_eager,
    is_shard,
    length_of,
    regrouped,
    sample_sampler,
)

BATCH_SIZE = "batch_sampler.batch_size"
"""The attribute that may be another one, too, where a BatchSampler's batches are dealt: of so
many more or fewer ranks, say, that a step has as many samples as before."""

_SIZES = frozenset({"num_replicas", "rank", "num_samples", "total_size"})
"""The attributes of a DistributedSampler that another number of ranks explains."""


class Dealer(Protocol):
    """One loader's way. `items` are those of the epoch that each rank has had, and the rest is
    what lies behind `deal.behind` samples of the order."""

    free: bool
    """The order comes from no generator of the loader: those are each rank's own."""

    def explains(self, change: str) -> bool:
        """Whether a change of an attribute (see Held.restore) comes from the number of ranks, or
        from the state being that of another one."""
        ...

    def total(self) -> int | None:
        """Samples in the order, where that is known."""
        ...

    def taken(self, deal: Deal, groups: Groups | None, items: int, lacking: int) -> int:
        """Samples of the order that all ranks together have had. `lacking`: so many fewer on
        each, since the last batch was short."""
        ...

    def moved(self, deal: Deal, groups: Groups | None) -> tuple[Deal, Groups | None]:
        """Where an epoch goes on that comes from another number of ranks, with groups that
        begin anew."""
        ...

    def rest(self, deal: Deal, groups: Groups | None) -> Iterator[Any]:
        """This rank's items of the rest."""
        ...

    def left(self, deal: Deal, groups: Groups | None) -> int | None:
        """How many these are, where that is known."""
        ...


def dealer_of(loader: DataLoader[Any], ranks: Ranks) -> Dealer | None:
    """None: the loader deals in a way that is not known, or each rank has an order of its own.
    `ranks`: whose part of the data it has (see `BaseFeed.whose`)."""
    batches = loader.batch_sampler
    if is_shard(batches):
        inner: Any = batches
        return ByBatch(loader) if type(inner.batch_sampler) is BatchSampler else None
    if batches is not None and type(batches) is not BatchSampler:
        return None
    sampler = sample_sampler(loader)
    if isinstance(sampler, DistributedSampler):
        return BySample(loader) if type(sampler).__iter__ is DistributedSampler.__iter__ else None
    return Alone(sampler) if ranks.size == 1 and ranks_in(sampler) is None else None


class BySample:
    """DistributedSampler: each rank gets every W-th sample."""

    free = True

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._sampler: Any = sample_sampler(loader)
        self._path = "sampler" if loader.batch_sampler is None else "batch_sampler.sampler"

    def explains(self, change: str) -> bool:
        path, _, name = change.split()[0].rpartition(".")
        return path == self._path and name in _SIZES

    def total(self) -> int:
        return len(self._sampler.dataset)

    def taken(self, deal: Deal, groups: Groups | None, items: int, lacking: int) -> int:
        assert groups is not None
        return deal.behind + deal.size * (groups.after(items) - lacking)

    def moved(self, deal: Deal, groups: Groups | None) -> tuple[Deal, Groups | None]:
        assert groups is not None
        return deal, groups.behind(deal.items, 0, 0)

    def rest(self, deal: Deal, groups: Groups | None) -> Iterator[Any]:
        assert groups is not None
        alone = copy.copy(self._sampler)  # so the sampler itself says the whole order
        alone.num_replicas, alone.rank = 1, 0
        alone.num_samples = alone.total_size = self.total()
        order, sampler = list(alone), self._sampler
        own = deal.of(order, sampler.rank, drop_last=sampler.drop_last)
        return regrouped(iter(own), groups, eager=True)

    def left(self, deal: Deal, groups: Groups | None) -> int | None:
        assert groups is not None
        sampler = self._sampler
        return groups.left(deal.each(self.total(), drop_last=sampler.drop_last))


class ByBatch:
    """BatchSamplerShard: each rank gets every W-th batch, or with `split_batches` its part of
    each. The rest is a BatchSampler's, dealt by the shard itself."""

    free = False

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._shard: Any = loader.batch_sampler
        self._eager = is_eager(loader)

    def explains(self, change: str) -> bool:
        # The shard's attributes are not compared. Its place in the order is counted in samples.
        return change.split()[0] == BATCH_SIZE

    def total(self) -> int | None:
        return length_of(self._shard.batch_sampler.sampler)

    def taken(self, deal: Deal, groups: Groups | None, items: int, lacking: int) -> int:
        each = self._shard.batch_sampler.batch_size
        batches = (items - deal.items) * (1 if self._shard.split_batches else deal.size)
        return deal.behind + batches * each

    def moved(self, deal: Deal, groups: Groups | None) -> tuple[Deal, Groups | None]:
        return deal, groups

    def rest(self, deal: Deal, groups: Groups | None) -> Iterator[Any]:
        items = iter(self._of_rest(deal))
        # Now, where the random states are those of the epoch's start: a sampler may draw from them.
        first = list(islice(items, 1))
        return chain(first, items)

    def left(self, deal: Deal, groups: Groups | None) -> int | None:
        return None if self.total() is None else len(self._of_rest(deal))

    def _of_rest(self, deal: Deal) -> Any:
        shard = copy.copy(self._shard)
        shard.batch_sampler = _Rest(shard.batch_sampler, deal.behind, eager=self._eager)
        return shard


class _Rest:
    """A BatchSampler's batches behind some samples of its order."""

    def __init__(self, batches: BatchSampler, behind: int, *, eager: bool) -> None:
        self.batch_size, self.drop_last = batches.batch_size, batches.drop_last
        self._sampler: Any = batches.sampler
        self._behind = behind
        self._eager = eager

    def __iter__(self) -> Iterator[list[Any]]:
        groups = Groups(self.batch_size, self.drop_last, 0, 0, self._behind)
        return regrouped(iter(self._sampler), groups, eager=self._eager)

    def __len__(self) -> int:
        groups = Groups(self.batch_size, self.drop_last, 0, 0, self._behind)
        return groups.left(len(self._sampler))


class Alone:
    """Any sampler in a process that trains alone: it has the whole order, and its groups say
    where it is."""

    free = False

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler

    def explains(self, change: str) -> bool:
        return change.split()[0] == BATCH_SIZE

    def total(self) -> int | None:
        return length_of(self._sampler)

    def taken(self, deal: Deal, groups: Groups | None, items: int, lacking: int) -> int:
        assert groups is not None
        return groups.after(items) - lacking

    def moved(self, deal: Deal, groups: Groups | None) -> tuple[Deal, Groups | None]:
        assert groups is not None
        return Deal(1), groups.behind(deal.items, deal.behind, 0)

    def rest(self, deal: Deal, groups: Groups | None) -> Iterator[Any]:
        raise NotImplementedError

    def left(self, deal: Deal, groups: Groups | None) -> int | None:
        raise NotImplementedError
