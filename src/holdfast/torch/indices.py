"""The indices of an epoch: who makes them, in which random streams, and in which groups.

`Groups` says how the samples of the epoch in progress become batches. Where a loader was
changed inside an epoch, that goes on behind as many samples as were taken, in batches of
the new size (`regrouped`).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, Self

import numpy as np
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    RandomSampler,
    SequentialSampler,
    SubsetRandomSampler,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from holdfast.errors import LoopError
from holdfast.run.console import plural
from holdfast.run.randomness import PrivateStreams
from holdfast.torch.workers import SeededIndex

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

# What these yield does not depend on how long the data are, or begins as it did.
_LENGTH_DOES_NOT_MATTER = (SequentialSampler, SubsetRandomSampler, WeightedRandomSampler)

SIZES = ("batch_sampler.batch_size", "batch_sampler.drop_last")
"""The attributes of a BatchSampler that say what its batches are, not what their order is."""

END = object()
"""No index: the source has ended."""


class EpochIndices:
    """The sampler of our copy of a loader. torch asks it for an iterator once or twice per
    epoch and gets the epoch's one."""

    def __init__(self, loader: DataLoader[Any]) -> None:
        self._loader = loader
        self.source: Iterator[Any] = iter(())

    def __iter__(self) -> Iterator[Any]:
        return self.source

    def __len__(self) -> int:
        return len(index_sampler(self._loader))


def index_sampler(loader: DataLoader[Any]) -> Any:
    return loader.sampler if loader.batch_sampler is None else loader.batch_sampler


def is_shard(batches: object) -> bool:
    """Whether it is Accelerate's BatchSamplerShard, which deals the batches of a BatchSampler
    in it to ranks, and has no state."""
    kind = type(batches)
    return kind.__name__ == "BatchSamplerShard" and kind.__module__ == "accelerate.data_loader"


def batches_of(loader: DataLoader[Any]) -> Any:
    """The batch sampler, that of all ranks; None without batches."""
    found: Any = loader.batch_sampler
    return found.batch_sampler if is_shard(found) else found


def sample_sampler(loader: DataLoader[Any]) -> Any:
    """The sampler of single samples, where torch makes the batches."""
    return loader.sampler if loader.batch_sampler is None else batches_of(loader).sampler


def samplers(loader: DataLoader[Any]) -> list[Any]:
    """The sampler that yields indices for all ranks and those it wraps as `.sampler`."""
    found = [loader.sampler if loader.batch_sampler is None else batches_of(loader)]
    while (inner := getattr(found[-1], "sampler", None)) is not None and len(found) < 8:
        found.append(inner)
    return found


def is_eager(loader: DataLoader[Any]) -> bool:
    """Whether all draws from global generators are made for the first index."""
    plain = (*_EAGER_SAMPLERS, list, tuple, range, np.ndarray, torch.Tensor)
    return all(type(one) in plain for one in samplers(loader))


def in_private(source: Iterator[Any]) -> Iterator[Any]:
    """A sampler of unknown habits: it may draw for each index, while training draws too
    and workers ask for indices ahead."""
    streams = PrivateStreams()
    while True:
        with streams:
            index = next(source, END)
        if index is END:
            return
        yield index


def seeded(indices: Iterator[Any], base_seed: int, first: int) -> Iterator[SeededIndex]:
    """`indices` for workers, numbered from `first` in the epoch."""
    for number, index in enumerate(indices, first):
        yield SeededIndex(base_seed, number, index)


def twin_of(generator: torch.Generator | None) -> torch.Generator:
    """A generator, or the global one, once more."""
    twin = torch.Generator()
    twin.set_state((torch.default_generator if generator is None else generator).get_state())
    return twin


def length_of(dataset: Any) -> int | None:
    try:
        return len(dataset)
    except (TypeError, NotImplementedError):
        return None


def draw_base_seed(generator: torch.Generator | None) -> int:
    """As torch draws a loader's base seed."""
    return int(torch.empty((), dtype=torch.int64).random_(generator=generator).item())


# -- groups -------------------------------------------------------------------


@dataclass(frozen=True)
class Groups:
    """How an epoch's samples become items of the loop."""

    size: int | None
    """Samples in a batch; None: each sample is an item (`batch_size=None`)."""
    drop_last: bool
    first: int
    """Samples in the first item of the epoch: a sampler of unknown habits drew so many
    from the global streams (see `in_private`)."""
    behind_items: int = 0
    behind_samples: int = 0
    """What was taken before the groups had this size."""

    @classmethod
    def of(cls, loader: DataLoader[Any]) -> Groups | None:
        """Those of an epoch that begins; None: the loader's batches are not of one size."""
        batches = loader.batch_sampler
        if batches is None:
            return cls(None, False, 1)
        if type(batches) is not BatchSampler:
            return None
        return cls(batches.batch_size, batches.drop_last, batches.batch_size)

    @property
    def goes_on(self) -> bool:
        """Whether the epoch began in groups of another size."""
        return self.behind_items > 0

    def after(self, items: int) -> int:
        """Samples in the first `items` items of the epoch, if none of them is short."""
        return self.behind_samples + (items - self.behind_items) * (self.size or 1)

    def left(self, samples: int) -> int:
        """Items left behind `behind_samples`, of an order with `samples` in all."""
        size = self.size or 1
        left = max(0, samples - self.behind_samples)
        return left // size if self.drop_last else -(-left // size)

    def behind(self, items: int, samples: int, first: int) -> Groups:
        """These groups, behind what was taken of an epoch that began with groups of
        `first` samples."""
        if items == 0:
            return self
        return replace(self, first=first, behind_items=items, behind_samples=samples)

    def to_tree(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_tree(cls, tree: dict[str, Any]) -> Self:
        return cls(**{name: tree[name] for name in cls.__dataclass_fields__})


def regrouped(samples: Iterator[Any], groups: Groups, *, eager: bool) -> Iterator[Any]:
    """The items that are left of an epoch whose order is `samples`.

    What was taken is drawn from `samples` before this returns. Not `eager`: in the
    streams in which an uninterrupted epoch would have drawn it.
    """
    streams = nullcontext() if eager else PrivateStreams()
    for turn in (groups.first, groups.behind_samples - groups.first):
        with streams:
            taken = deque(islice(samples, max(0, turn)), maxlen=1)
        if groups.size is None and taken and isinstance(taken[-1], list):
            raise LoopError(
                "the sampler of a loader with batch_size=None yields lists of indices, and "
                "nobody knows how many samples the lists had before the loader was changed",
                hint='Put it back as it was, or run the epoch again: data="restart-epoch".',
            )

    def rest() -> Iterator[Any]:
        while True:
            with streams:
                batch = list(islice(samples, groups.size or 1))
            if not batch or (groups.drop_last and len(batch) < (groups.size or 1)):
                return
            yield batch[0] if groups.size is None else batch

    return rest()


class ShortBatch:
    """Notices that the last batch of an epoch has fewer samples than the others."""

    def __init__(self) -> None:
        self._number = 0
        self._lacking = 0

    def watch(self, indices: Iterator[Any], groups: Groups, first: int) -> Iterator[Any]:
        """`indices`, unchanged; they are those of item `first` and the next ones."""
        self._lacking = 0
        for number, batch in enumerate(indices, first):
            if groups.size is not None and len(batch) < groups.size:
                self._number, self._lacking = number, groups.size - len(batch)
            yield batch

    def lacking(self, items: int) -> int:
        """How many samples fewer than in full batches the first `items` have."""
        return self._lacking if items > self._number else 0


def same_order(loader: DataLoader[Any], changed: set[str]) -> bool:
    """Whether the samples that were taken are still the first ones of the epoch, where
    the facts named in `changed` (see `MapFeed.identity`) are others than before."""
    harmless = {"batches", "batch_size", "drop_last", "workers", "generators in the dataset"}
    if type(sample_sampler(loader)) in _LENGTH_DOES_NOT_MATTER:
        harmless |= {"samples", "sampler length"}
    return changed <= harmless


def told(groups: Groups, taken: int, samples: int | None) -> str:
    """What became of an epoch that goes on by sample, for people. `samples`: in its order."""
    text = f"The epoch goes on behind {plural(taken, 'sample')}"
    if samples is not None:
        left, items = max(0, samples - taken), groups.left(samples)
        text += f"; left: {plural(left, 'sample')} in {plural(items, 'item')}"
        text += "" if items else ", so it ends here"
    return text


def cautions(*, same: bool, workers: bool) -> str:
    """What is not as before in such an epoch. `same`: its order is; `workers`: there are some
    now, or none any more."""
    text = ""
    if not same:
        text += ". Their order may be another one now: samples may repeat or be missing this once"
    if workers:
        text += ". Transforms draw other random numbers from here on"
    return text
