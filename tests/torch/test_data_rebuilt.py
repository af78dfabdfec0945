"""Loaders that the program builds anew in each epoch: killed everywhere, every bit compared.

A loader that was seen in one epoch only may last or not: nobody can tell. It is taken to
last, so kills at the end of the first epoch are left out where that is wrong.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, RandomSampler, Sampler

import holdfast
from tests.run.feed_checks import plain
from tests.support.jobs import Countdown, Script, kill_everywhere

SAMPLES, BATCH, EPOCHS = 6, 3, 4
BATCHES = SAMPLES // BATCH

CALLS = 2 + 2 * BATCHES
"""`die()` calls in an epoch."""

FIRST_END = range(CALLS, CALLS + 3)
"""Those after the save at the end of the first epoch, up to the next save."""


class Noisy(Dataset[Any]):
    """Augmentation from the global generators and, if it is given one, from its own."""

    def __init__(self, rng: np.random.Generator | None = None) -> None:
        self.rng = rng

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        own = 0.0 if self.rng is None else self.rng.random()
        return index, own, random.random(), np.random.rand(), torch.rand(())


class Stream(IterableDataset[Any]):
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def __iter__(self) -> Iterator[Any]:
        for index in range(SAMPLES):
            yield index, self.rng.random()


class Drawing(Sampler[int]):
    """An order from a generator that it is given."""

    def __init__(self, rng: Any) -> None:
        self.rng = rng

    def __iter__(self) -> Iterator[int]:
        if isinstance(self.rng, random.Random):
            return iter(self.rng.sample(range(SAMPLES), SAMPLES))
        return iter(self.rng.permutation(SAMPLES).tolist())

    def __len__(self) -> int:
        return SAMPLES


class Rounds(Sampler[int]):
    """Counts its epochs, and shuffles a list in place."""

    def __init__(self, order: list[int] | None = None) -> None:
        self.rounds = 0
        self.order = list(range(SAMPLES)) if order is None else order

    def __iter__(self) -> Iterator[int]:
        self.rounds += 1
        self.order.append(self.order.pop(0))
        return iter([(index + 10 * self.rounds) % SAMPLES for index in self.order])

    def __len__(self) -> int:
        return SAMPLES


Make = Callable[[int], Any]
"""The loader of an epoch."""


def no_generator(workers: int = 0) -> Make:
    return lambda epoch: DataLoader(Noisy(), BATCH, shuffle=True, num_workers=workers)


def one_dataset() -> Make:
    dataset = Noisy(np.random.default_rng(3))
    return lambda epoch: DataLoader(dataset, BATCH, shuffle=True)


def new_dataset() -> Make:
    return lambda epoch: DataLoader(Noisy(np.random.default_rng(epoch)), BATCH, shuffle=True)


def torch_seeded() -> Make:
    return lambda epoch: DataLoader(
        Noisy(), BATCH, shuffle=True, generator=torch.Generator().manual_seed(epoch)
    )


def numpy_seeded() -> Make:
    return lambda epoch: DataLoader(
        Noisy(), BATCH, sampler=Drawing(np.random.default_rng([1, epoch]))
    )


def python_seeded() -> Make:
    return lambda epoch: DataLoader(Noisy(), BATCH, sampler=Drawing(random.Random(epoch)))


def always_one_seed() -> Make:
    return lambda epoch: DataLoader(
        Noisy(), BATCH, shuffle=True, generator=torch.Generator().manual_seed(7)
    )


def torch_shared(workers: int = 0) -> Make:
    shared = torch.Generator().manual_seed(7)

    def make(epoch: int) -> Any:
        sampler = RandomSampler(range(SAMPLES), generator=shared)
        return DataLoader(Noisy(), BATCH, sampler=sampler, generator=shared, num_workers=workers)

    return make


def numpy_shared() -> Make:
    shared = np.random.default_rng(7)
    return lambda epoch: DataLoader(Noisy(), BATCH, sampler=Drawing(shared))


def python_shared() -> Make:
    shared = random.Random(7)
    return lambda epoch: DataLoader(Noisy(), BATCH, sampler=Drawing(shared))


def from_the_clock() -> Make:
    shared = np.random.default_rng(np.random.SeedSequence(random.getrandbits(128)))
    return lambda epoch: DataLoader(Noisy(), BATCH, sampler=Drawing(shared))


def shared_and_seeded() -> Make:
    shared = torch.Generator()
    return lambda epoch: DataLoader(
        Noisy(), BATCH, shuffle=True, generator=shared.manual_seed(epoch)
    )


def new_sampler() -> Make:
    return lambda epoch: DataLoader(Noisy(), BATCH, sampler=Rounds())


def one_sampler(workers: int = 0) -> Make:
    sampler = Rounds()
    return lambda epoch: DataLoader(Noisy(), BATCH, sampler=sampler, num_workers=workers)


def one_list() -> Make:
    order = list(range(SAMPLES))
    return lambda epoch: DataLoader(Noisy(), BATCH, sampler=Rounds(order))


def stream() -> Make:
    shared = random.Random(4)
    return lambda epoch: DataLoader(Stream(shared), BATCH)


def new_stream() -> Make:
    return lambda epoch: DataLoader(Stream(random.Random(4)), BATCH)


def exchanged() -> Make:
    """Two that last, one after the other."""
    rngs = [torch.Generator().manual_seed(number) for number in range(2)]
    both = [DataLoader(Noisy(), BATCH, shuffle=True, generator=rng) for rng in rngs]
    return lambda epoch: both[epoch >= 2]


def script(kind: Callable[[], Make]) -> Script:
    def run_it(address: str, die: Countdown, trace: list[Any]) -> None:
        torch.manual_seed(1)
        run = holdfast.Run(address, every=1, quiet=True).track(trace=trace)
        make = kind()
        for epoch in run.epochs(EPOCHS):
            die()
            loader = make(epoch)
            # Places are told apart by name: two loaders that take turns need that.
            name = str(epoch >= 2) if kind is exchanged else ""
            for batch in run.batches(loader, name=name):
                die()
                trace.append(plain([epoch, batch, random.random(), torch.rand(())]))
                die()
            die()
        trace.append(plain([random.random(), np.random.rand(), torch.rand(())]))

    return run_it


def check(kind: Callable[[], Make], kills: Callable[[int], bool] | None = None) -> None:
    assert kill_everywhere(script(kind), only=kills) == EPOCHS * CALLS


@pytest.mark.parametrize(
    "kind",
    [
        no_generator,
        one_dataset,
        new_dataset,
        torch_seeded,
        numpy_seeded,
        torch_shared,
        numpy_shared,
        python_shared,
        shared_and_seeded,
        one_sampler,
        stream,
        exchanged,
    ],
)
def test_killed_anywhere(kind: Callable[[], Make]) -> None:
    check(kind)


@pytest.mark.parametrize("kind", [new_sampler, python_seeded, always_one_seed, new_stream])
def test_killed_anywhere_but_at_the_end_of_the_first_epoch(kind: Callable[[], Make]) -> None:
    check(kind, lambda number: number not in FIRST_END)


def test_what_could_not_be_known_is_said(caplog: pytest.LogCaptureFixture) -> None:
    check(new_sampler, lambda number: False)
    assert "is built anew" not in caplog.text
    with pytest.raises(AssertionError, match="killed at place"):
        check(new_sampler, lambda number: number in FIRST_END)
    assert "which nobody could know" in caplog.text
    assert "batch_sampler.sampler.rounds" in caplog.text


@pytest.mark.parametrize("kind", [no_generator, torch_shared, one_sampler])
def test_killed_at_some_places_with_workers(kind: Callable[..., Make]) -> None:
    places = (CALLS, CALLS + 3, 2 * CALLS + 1, 3 * CALLS + 5)
    check(lambda: kind(workers=2), lambda number: number in places)
