"""DataLoaders in this process: interrupted at every batch, every bit compared."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
)
from torch.utils.data.distributed import DistributedSampler

from holdfast.errors import LoopError
from holdfast.run.iterables import open_feed
from holdfast.torch.map_feed import MapFeed
from tests.run.feed_checks import (
    Prologue,
    check_every_stop,
    nothing,
    plain,
    record,
    seed_everything,
    without_holdfast,
)

SAMPLES = 11


class Augmented(Dataset[Any]):
    """Random augmentation with all three libraries; counts what is loaded."""

    def __init__(self, samples: int = SAMPLES) -> None:
        self.samples = samples
        self.loaded: list[int] = []

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Any:
        self.loaded.append(int(index))
        return [int(index), random.random(), np.random.rand(), torch.rand(2)]


class WithGenerators(Augmented):
    """Augmentation from generators of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.random = random.Random(3)
        self.numpy = {"rng": np.random.default_rng(3), "old": np.random.RandomState(3)}
        torch_generator = torch.Generator().manual_seed(3)
        self.transform = lambda: torch.rand((), generator=torch_generator)

    def __getitem__(self, index: int) -> Any:
        draws = [self.random.random(), self.numpy["rng"].random(), self.numpy["old"].rand()]
        return [int(index), *draws, self.transform()]


def jitter(batch: list[Any]) -> Any:
    """A collate_fn that draws."""
    return [batch, random.random(), torch.rand(()), np.random.rand()]


class LazySampler(Sampler[int]):
    """Draws for every index, from the global generators of all libraries, and what it
    draws next depends on what it drew before."""

    def __iter__(self) -> Iterator[int]:
        left = list(range(SAMPLES))
        while left:
            draw = random.random() + np.random.rand() + torch.rand(()).item()
            yield left.pop(int(draw / 3 * len(left)))

    def __len__(self) -> int:
        return SAMPLES


class EagerSampler(Sampler[int]):
    """Draws the whole order in `__iter__`, not in the iterator."""

    def __iter__(self) -> Iterator[int]:
        return iter(np.random.permutation(SAMPLES).tolist())

    def __len__(self) -> int:
        return SAMPLES


class ReshufflingSampler(Sampler[int]):
    """Shuffles one list in place, again and again, and counts its epochs."""

    def __init__(self) -> None:
        self.order = list(range(SAMPLES))
        self.weights = torch.ones(SAMPLES)
        self.table = np.zeros(3)
        self.rounds = 0
        self.rng = np.random.default_rng(5)
        self.python = random.Random(5)

    def __iter__(self) -> Iterator[int]:
        self.rounds += 1
        self.weights += self.rounds
        self.table[1] += 1
        self.python.shuffle(self.order)
        offset = self.rounds + int(self.weights[0]) + int(self.table[1])
        for index in list(self.order):
            yield (index + offset + int(self.rng.integers(2))) % SAMPLES

    def __len__(self) -> int:
        return SAMPLES


class ManySources(Sampler[int]):
    """Holds others in containers, and a generator in an object of another kind."""

    def __init__(self) -> None:
        self.parts = [RandomSampler(range(SAMPLES), generator=generator()), ReshufflingSampler()]
        self.pools = {"one": WithGenerators()}

    def __iter__(self) -> Iterator[int]:
        order = [index for part in self.parts for index in part]
        self.pools["one"].random.shuffle(order)
        return iter(order)

    def __len__(self) -> int:
        return 2 * SAMPLES


class Buckets:
    """A batch sampler as people write them: no base class, batches of several types."""

    def __init__(self, sampler: Any) -> None:
        self.sampler = sampler

    def __iter__(self) -> Iterator[Any]:
        pending: list[int] = []
        for index in self.sampler:
            pending.append(index)
            if len(pending) == 3:
                yield tuple(pending) if random.random() < 0.5 else pending
                pending = []
        yield (index for index in pending)

    def __len__(self) -> int:
        return SAMPLES // 3 + 1


def generator() -> torch.Generator:
    return torch.Generator().manual_seed(7)


def distributed(**options: Any) -> DistributedSampler[Any]:
    return DistributedSampler(range(SAMPLES), num_replicas=2, rank=1, **options)  # type: ignore[arg-type]


def set_epoch(loader: Any, epoch: int) -> None:
    loader.sampler.set_epoch(epoch)


def set_inner_epoch(loader: Any, epoch: int) -> None:
    loader.batch_sampler.sampler.set_epoch(epoch)


def reseed(loader: Any, epoch: int) -> None:
    loader.generator.manual_seed(100 + epoch)


WEIGHTS = [float(index + 1) for index in range(SAMPLES)]


def _with_shared_generator() -> Any:
    shared = generator()
    sampler = RandomSampler(range(SAMPLES), generator=shared)
    return DataLoader(Augmented(), 3, sampler=sampler, generator=shared)


# Bit-equal to a loop without Holdfast, too.
LIKE_TORCH: dict[str, Callable[[], Any]] = {
    "in order": lambda: DataLoader(Augmented(), 3),
    "shuffled": lambda: DataLoader(Augmented(), 3, shuffle=True),
    "drop_last": lambda: DataLoader(Augmented(), 3, shuffle=True, drop_last=True),
    "generator": lambda: DataLoader(Augmented(), 3, shuffle=True, generator=generator()),
    "generator, in order": lambda: DataLoader(Augmented(), 3, generator=generator()),
    "shared generator": _with_shared_generator,
    "batch_size=None": lambda: DataLoader(Augmented(), None, shuffle=True),
    "collate_fn": lambda: DataLoader(Augmented(), 3, shuffle=True, collate_fn=jitter),
    "generators in the dataset": lambda: DataLoader(WithGenerators(), 3, shuffle=True),
    "tensors": lambda: DataLoader(TensorDataset(torch.arange(SAMPLES)), 3, shuffle=True),
    "a list": lambda: DataLoader(list(range(SAMPLES)), 3, shuffle=True),  # type: ignore[arg-type]
    "replacement": lambda: DataLoader(
        Augmented(), 3, sampler=RandomSampler(range(SAMPLES), replacement=True, num_samples=70)
    ),
    "replacement, generator": lambda: DataLoader(
        Augmented(),
        8,
        sampler=RandomSampler(
            range(SAMPLES), replacement=True, num_samples=70, generator=generator()
        ),
    ),
    "num_samples": lambda: DataLoader(
        Augmented(), 3, sampler=RandomSampler(range(SAMPLES), num_samples=3 * SAMPLES - 1)
    ),
    "weighted": lambda: DataLoader(Augmented(), 3, sampler=WeightedRandomSampler(WEIGHTS, 9)),
    "subset": lambda: DataLoader(Augmented(), 3, sampler=SubsetRandomSampler([1, 4, 9, 2, 0])),
    "list of batches": lambda: DataLoader(Augmented(), batch_sampler=[[1, 2], [5], [0, 3, 4]]),
    "eager sampler": lambda: DataLoader(Augmented(), 3, sampler=EagerSampler()),
    "reshuffling sampler": lambda: DataLoader(Augmented(), 3, sampler=ReshufflingSampler()),
    "many sources": lambda: DataLoader(Augmented(), 3, sampler=ManySources()),
}

PREPARED: dict[str, tuple[Callable[[], Any], Prologue]] = {
    "distributed": (lambda: DataLoader(Augmented(), 2, sampler=distributed()), set_epoch),
    "distributed, drop_last": (
        lambda: DataLoader(Augmented(), 2, sampler=distributed(drop_last=True)),
        set_epoch,
    ),
    "distributed in a batch sampler": (
        lambda: DataLoader(
            Augmented(), batch_sampler=BatchSampler(distributed(), 2, drop_last=False)
        ),
        set_inner_epoch,
    ),
    "generator seeded in the prologue": (
        lambda: DataLoader(Augmented(), 3, shuffle=True, generator=generator()),
        reseed,
    ),
}

# Draw for each index: they get a random stream of their own.
LAZY: dict[str, Callable[[], Any]] = {
    "lazy sampler": lambda: DataLoader(Augmented(), 3, sampler=LazySampler()),
    "lazy sampler, batch_size=None": lambda: DataLoader(Augmented(), None, sampler=LazySampler()),
    "buckets": lambda: DataLoader(
        Augmented(), batch_sampler=Buckets(RandomSampler(range(SAMPLES)))
    ),
    "buckets of a lazy sampler": lambda: DataLoader(
        Augmented(), batch_sampler=Buckets(LazySampler())
    ),
}


@pytest.mark.parametrize("name", LIKE_TORCH)
def test_stopped_at_every_batch(name: str) -> None:
    check_every_stop(LIKE_TORCH[name])


@pytest.mark.parametrize("name", PREPARED)
def test_stopped_at_every_batch_with_a_prologue(name: str) -> None:
    check_every_stop(*PREPARED[name])


def test_a_generator_that_the_prologue_seeds_with_the_same_number() -> None:
    """At the end of the first epoch it looks like one that nobody seeds (stop 5)."""

    def prologue(loader: Any, epoch: int) -> None:
        loader.generator.manual_seed(7)

    make = LIKE_TORCH["generator"]
    check_every_stop(make, prologue, only=lambda number: number != 5)


@pytest.mark.parametrize("name", LAZY)
def test_stopped_at_every_batch_of_a_lazy_sampler(name: str) -> None:
    check_every_stop(LAZY[name])


@pytest.mark.parametrize("name", [*LIKE_TORCH, *PREPARED])
def test_same_bits_as_without_holdfast(name: str) -> None:
    make, prologue = PREPARED[name] if name in PREPARED else (LIKE_TORCH[name], nothing)
    ours, theirs = record(make, prologue), without_holdfast(make, prologue)
    assert ours.steps == theirs.steps
    assert ours.final_rng == theirs.final_rng


def test_skipped_batches_are_not_loaded() -> None:
    dataset = Augmented()
    feed = open_feed(DataLoader(dataset, 3, shuffle=True))
    feed.open(None)
    for _ in range(2):
        feed.take()
    saved = feed.state()

    fresh = Augmented()
    again = open_feed(DataLoader(fresh, 3, shuffle=True))
    again.open(saved)
    assert fresh.loaded == []
    again.take()
    feed.take()
    assert fresh.loaded == dataset.loaded[6:]


def test_the_users_loader_is_left_alone() -> None:
    loader = DataLoader(Augmented(), 3, shuffle=True)
    before = dict(vars(loader))
    feed = open_feed(loader)
    assert isinstance(feed, MapFeed)
    assert feed.length() == 4
    feed.open(None)
    feed.take()
    feed.close()
    assert vars(loader) == before
    assert len(list(loader)) == 4


def test_take_after_the_end_stays_at_the_end() -> None:
    feed = open_feed(DataLoader(Augmented(), 6))
    feed.open(None)
    feed.take()
    feed.take()
    for _ in range(2):
        with pytest.raises(StopIteration):
            feed.take()
    feed.open(None)
    feed.take()


def test_an_epoch_left_early_is_not_gone_on_with() -> None:
    def run(feed: Any) -> list[Any]:
        feed.open(None)
        return [plain(feed.take()) for _ in range(4)]

    def make() -> Any:
        return DataLoader(Augmented(), 3, shuffle=True, generator=generator())

    seed_everything(1)
    feed = open_feed(make())
    feed.open(None)
    feed.take()
    feed.close()
    saved = feed.state()
    seed_everything(2)
    expected = run(feed)

    other = open_feed(make())
    other.open(saved)
    with pytest.raises(StopIteration):
        other.take()
    seed_everything(2)
    assert run(other) == expected


# -- a loader that was changed ------------------------------------------------


def _stopped(make: Callable[[], Any], taken: int = 2) -> dict[str, Any]:
    feed = open_feed(make())
    feed.open(None)
    for _ in range(taken):
        feed.take()
    saved = feed.state()
    feed.shutdown()
    return saved


CHANGED: dict[str, tuple[Callable[[], Any], str]] = {
    "batch size": (lambda: DataLoader(Augmented(), 2, shuffle=True), "batch_size was 3, is 2"),
    "length": (lambda: DataLoader(Augmented(12), 3, shuffle=True), "samples was 11, is 12"),
    "sampler": (
        lambda: DataLoader(Augmented(), 3),
        "sampler was ['BatchSampler', 'RandomSampler'], is ['BatchSampler', 'SequentialSampler']",
    ),
    "drop_last": (
        lambda: DataLoader(Augmented(), 3, shuffle=True, drop_last=True),
        "drop_last was False, is True",
    ),
    "workers": (
        lambda: DataLoader(Augmented(), 3, shuffle=True, num_workers=1),
        "workers was 'none', is 'some'",
    ),
    "another loader": (lambda: [1, 2, 3], "kind of loader was 'map', is 'sequence'"),
}


@pytest.mark.parametrize("name", CHANGED)
def test_a_changed_loader_is_refused_inside_an_epoch(name: str) -> None:
    make, words = CHANGED[name]
    saved = _stopped(lambda: DataLoader(Augmented(), 3, shuffle=True))
    with pytest.raises(LoopError) as caught:
        open_feed(make()).open(saved)
    assert words in caught.value.message
    assert "restart-epoch" in caught.value.hint


def test_a_changed_loader_restarts_the_epoch_if_told_to(caplog: pytest.LogCaptureFixture) -> None:
    seed_everything(4)
    saved = _stopped(lambda: DataLoader(Augmented(), 3, shuffle=True))
    seed_everything(4)
    whole = open_feed(DataLoader(Augmented(), 2, shuffle=True))
    whole.open(None)

    seed_everything(9)
    feed = open_feed(DataLoader(Augmented(), 2, shuffle=True), policy="restart-epoch")
    assert feed.open(saved) is False
    assert "begins anew" in caplog.text
    ours = [plain(feed.take()) for _ in range(6)]
    seed_everything(4)
    whole.open(None)
    assert ours == [plain(whole.take()) for _ in range(6)]


def test_a_changed_loader_is_fine_between_epochs(caplog: pytest.LogCaptureFixture) -> None:
    feed = open_feed(DataLoader(Augmented(), 6, shuffle=True))
    feed.open(None)
    feed.close()
    other = open_feed(DataLoader(Augmented(), 2, shuffle=True))
    assert other.open(feed.state()) is True
    assert "batch_size was 6, is 2" in caplog.text
    other.open(None)
    assert len(other.take()[0]) == 2


def test_a_samplers_changed_setting_is_refused() -> None:
    saved = _stopped(lambda: DataLoader(Augmented(), 2, sampler=distributed(seed=0)))
    with pytest.raises(LoopError, match=r"sampler\.seed was 0, is 1"):
        open_feed(DataLoader(Augmented(), 2, sampler=distributed(seed=1))).open(saved)


def test_other_indices_in_a_subset_are_refused() -> None:
    saved = _stopped(lambda: DataLoader(Augmented(), 1, sampler=SubsetRandomSampler([1, 2, 3])))
    feed = open_feed(DataLoader(Augmented(), 1, sampler=SubsetRandomSampler([1, 2, 4])))
    with pytest.raises(LoopError, match=r"sampler\.indices has changed"):
        feed.open(saved)


def test_a_sampler_that_became_shorter_is_an_error() -> None:
    class Shrinking(SequentialSampler):
        length = 8

        def __iter__(self) -> Iterator[int]:
            return iter(range(type(self).length))

        def __len__(self) -> int:
            return 8

    make: Any = lambda: DataLoader(Augmented(), 2, sampler=Shrinking(range(8)))  # noqa: E731
    saved = _stopped(make, taken=3)
    Shrinking.length = 3
    with pytest.raises(LoopError, match="has only 2 batches now; 3 had been taken"):
        open_feed(make()).open(saved)
