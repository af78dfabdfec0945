"""Loaders that were changed inside an epoch which goes on behind the samples taken."""

from __future__ import annotations

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
    SubsetRandomSampler,
    WeightedRandomSampler,
)

from holdfast.core.rng import apply_rng, capture_rng
from holdfast.run.iterables import open_feed
from tests.core.tree_harness import roundtrip
from tests.run.feed_checks import plain, seed_everything, train_step
from tests.torch.test_data import (
    SAMPLES,
    Augmented,
    LazySampler,
    ReshufflingSampler,
    WithGenerators,
    distributed,
    generator,
)

Make = Callable[[int], DataLoader[Any]]


class Numbers(Dataset[Any]):
    """Its items are their indices."""

    def __init__(self, samples: int = SAMPLES) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> int:
        return int(index)


class Endless(Sampler[int]):
    """Has no length."""

    def __init__(self, samples: int = SAMPLES) -> None:
        self.samples = samples

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.samples))


def written_for(samples: int) -> Any:
    """A sampler that has its length in its code."""

    class Written(Sampler[int]):
        def __iter__(self) -> Iterator[int]:
            return iter(range(samples))

        def __len__(self) -> int:
            return samples

    return Written()


def rest(feed: Any) -> list[list[int]]:
    """The items that are left, with a training step after each."""
    items: list[list[int]] = []
    while True:
        try:
            item = feed.take()
        except StopIteration:
            train_step()
            return items
        items.append(np.atleast_1d(item).tolist())
        train_step()


def flat(items: list[list[int]]) -> list[int]:
    return [index for item in items for index in item]


def stopped(loader: Any, items: int) -> tuple[Any, Any]:
    """What a checkpoint has after so many items of the first epoch."""
    seed_everything(1)
    feed = open_feed(loader)
    feed.open(None)
    for _ in range(items):
        feed.take()
        train_step()
    saved = roundtrip(feed.state()), capture_rng()
    feed.shutdown()
    return saved


def gone_on(loader: Any, saved: tuple[Any, Any], policy: Any = "by-sample") -> Any:
    seed_everything(99)
    state, rng = saved
    feed = open_feed(loader, policy=policy)
    assert feed.open(state) is True
    apply_rng(rng)
    return feed


ORDERS: dict[str, Make] = {
    "shuffled": lambda size: DataLoader(Numbers(), size, shuffle=True),
    "a generator": lambda size: DataLoader(Numbers(), size, shuffle=True, generator=generator()),
    "batch_sampler": lambda size: DataLoader(
        Numbers(),
        batch_sampler=BatchSampler(
            RandomSampler(range(SAMPLES), generator=generator()), size, drop_last=False
        ),
    ),
    "replacement": lambda size: DataLoader(
        Numbers(),
        size,
        sampler=RandomSampler(
            range(SAMPLES), replacement=True, num_samples=70, generator=generator()
        ),
    ),
    "weighted": lambda size: DataLoader(
        Numbers(), size, sampler=WeightedRandomSampler([0.1, 0.2, 0.7], 9, generator=generator())
    ),
    "subset": lambda size: DataLoader(
        Numbers(), size, sampler=SubsetRandomSampler([1, 4, 9, 2, 0], generator=generator())
    ),
    "distributed": lambda size: DataLoader(Numbers(), size, sampler=distributed()),
    "a list": lambda size: DataLoader(Numbers(), size, sampler=[3, 1, 2, 9, 8]),
    "lazy": lambda size: DataLoader(Numbers(), size, sampler=LazySampler()),
    "lazy, workers": lambda size: DataLoader(Numbers(), size, sampler=LazySampler(), num_workers=2),
    "reshuffled": lambda size: DataLoader(Numbers(), size, sampler=ReshufflingSampler()),
    "no length": lambda size: DataLoader(Numbers(), size, sampler=Endless()),
}


@pytest.mark.parametrize("name", ORDERS)
def test_the_samples_that_were_left_come_in_their_order(name: str) -> None:
    """In the sizes 4, 2 and 3 that follow each other, and in any library's streams."""
    make = ORDERS[name]
    seed_everything(1)
    whole = open_feed(make(4))
    whole.open(None)
    order = flat(rest(whole))
    whole.shutdown()
    for items in range(1, -(-len(order) // 4)):
        first = stopped(make(4), items)
        feed = gone_on(make(2), first)
        left = order[4 * items :]
        got = [np.atleast_1d(feed.take()).tolist()]
        train_step()
        again = roundtrip(feed.state()), capture_rng()
        got += rest(feed)
        feed.shutdown()
        assert got == [left[at : at + 2] for at in range(0, len(left), 2)]
        third = gone_on(make(3), again)
        assert rest(third) == [left[at : at + 3] for at in range(2, len(left), 3)]
        third.shutdown()


@pytest.mark.parametrize("name", ["a generator", "batch_sampler", "replacement", "reshuffled"])
def test_the_next_epoch_is_as_if_nothing_had_changed(name: str) -> None:
    """Generators and attributes of the sampler are where the first epoch left them."""
    make = ORDERS[name]
    whole = open_feed(make(4))
    whole.open(None)
    rest(whole)
    whole.open(None)
    second = flat(rest(whole))
    for items in range(3):
        feed = gone_on(make(3), stopped(make(4), items))
        rest(feed)
        feed.open(None)
        got = rest(feed)
        assert flat(got) == second
        assert feed.length() == len(got) == -(-len(second) // 3)


@pytest.mark.parametrize("workers", [0, 2])
@pytest.mark.parametrize("name", ["shuffled", "a generator", "lazy"])
def test_stopped_again_everywhere_in_such_an_epoch(name: str, workers: int) -> None:
    """Not changed since, so no policy is needed, and every bit is as if not stopped."""

    def make(size: int) -> Any:
        order = ORDERS[name](size)
        return DataLoader(
            Augmented(), size, sampler=order.sampler, generator=order.generator, num_workers=workers
        )

    first = stopped(make(4), 1)
    feed = gone_on(make(2), first)
    stops: list[Any] = []
    steps: list[Any] = []
    while True:
        stops.append((roundtrip(feed.state()), capture_rng()))
        try:
            steps.append(plain([feed.take(), train_step()]))
        except StopIteration:
            break
    feed.shutdown()
    final = plain(capture_rng())
    for number, stop in enumerate(stops):
        again = gone_on(make(2), stop, policy="refuse")
        assert again.length() == 1 + 4
        assert [plain([again.take(), train_step()]) for _ in steps[number:]] == steps[number:]
        with pytest.raises(StopIteration):
            again.take()
        again.shutdown()
        assert plain(capture_rng()) == final


def test_generators_in_the_dataset_go_on() -> None:
    def draws(feed: Any, items: int) -> list[Any]:
        columns = [feed.take() for _ in range(items)]
        return [value for item in columns for value in zip(*map(list, item), strict=True)]

    def make(size: int) -> Any:
        return DataLoader(WithGenerators(), size)

    feed = open_feed(make(4))
    feed.open(None)
    whole = draws(feed, 3)
    assert draws(gone_on(make(2), stopped(make(4), 1)), 4) == whole[4:]


def test_in_workers_batches_are_numbered_on() -> None:
    """So no random number comes twice, and those of one batch depend on its number only."""

    def make(size: int) -> Any:
        return DataLoader(Augmented(), size, shuffle=True, num_workers=1)

    seed_everything(1)
    feed = open_feed(make(4))
    feed.open(None)
    taken = [feed.take(), feed.take()]
    feed.shutdown()
    feed = gone_on(make(2), stopped(make(4), 1))
    again = feed.take()
    feed.shutdown()
    # Index and draws of the first two samples of item number 1.
    assert [part[:2].tolist() for part in taken[1]] == [part.tolist() for part in again]
    assert not set(taken[0][1].tolist()) & set(again[1].tolist())


def test_what_training_drew_from_the_samplers_generator_counts() -> None:
    """Where no worker has made it run ahead."""
    loader = ORDERS["a generator"](4)
    feed = open_feed(loader)
    feed.open(None)
    feed.take()
    torch.rand(3, generator=loader.generator)
    saved = roundtrip(feed.state()), capture_rng()
    other = ORDERS["a generator"](3)
    gone_on(other, saved)
    assert loader.generator is not None
    assert other.generator is not None
    assert torch.equal(other.generator.get_state(), loader.generator.get_state())


def test_a_batch_size_that_the_run_had_set_is_put_back() -> None:
    """Not edited in the program, which sets it when training has come so far."""

    def loader(samples: int) -> Any:
        return DataLoader(Numbers(samples), 2)

    first = loader(11)
    feed = open_feed(first)
    first.batch_sampler.batch_size = 4
    feed.open(None)
    feed.take()
    again = gone_on(loader(14), (roundtrip(feed.state()), capture_rng()))
    assert rest(again) == [[4, 5, 6, 7], [8, 9, 10, 11], [12, 13]]


# -- what is said -------------------------------------------------------------

SAID: dict[str, tuple[Callable[[], Any], str]] = {
    "size": (
        lambda: DataLoader(Numbers(), 2, shuffle=True),
        "DataLoader changed, and the run stopped inside an epoch of it (2 items taken): batches "
        "was 4, is 6; batch_size was 3, is 2. The epoch goes on behind 6 samples; left: 5 samples "
        "in 3 items.",
    ),
    "drop_last": (
        lambda: DataLoader(Numbers(), 6, shuffle=True, drop_last=True),
        "drop_last was False, is True. The epoch goes on behind 6 samples; left: 5 samples in 0 "
        "items, so it ends here.",
    ),
    "shorter": (
        lambda: DataLoader(Numbers(5), 3, shuffle=True),
        "samples was 11, is 5. The epoch goes on behind 6 samples; left: 0 samples in 0 items, so "
        "it ends here. Their order may be another one now: samples may repeat or be missing this "
        "once.",
    ),
    "longer": (
        lambda: DataLoader(Numbers(12), 3, shuffle=True),
        "left: 6 samples in 2 items. Their order may be another one",
    ),
    "another sampler": (lambda: DataLoader(Numbers(), 3), "Their order may be another one"),
    "no length": (
        lambda: DataLoader(Numbers(), 3, sampler=Endless()),
        "behind 6 samples. Their order may be another one",
    ),
    "replacement": (
        lambda: DataLoader(Numbers(), 3, sampler=RandomSampler(range(SAMPLES), replacement=True)),
        "sampler.replacement was False, is True. The epoch goes on behind 6 samples; left: 5 "
        "samples in 2 items. Their order may be another one",
    ),
    "workers": (
        lambda: DataLoader(Numbers(), 3, shuffle=True, num_workers=1),
        "left: 5 samples in 2 items. Transforms draw other random numbers from here on.",
    ),
}


@pytest.mark.parametrize("name", SAID)
def test_a_line_says_what_becomes_of_the_epoch(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, words = SAID[name]
    feed = gone_on(make(), stopped(DataLoader(Numbers(), 3, shuffle=True), 2))
    assert words in caplog.text
    assert ("Their order" in caplog.text) == ("Their order" in words)
    assert ("Transforms" in caplog.text) == ("Transforms" in words)
    length = feed.length()
    items = rest(feed)
    assert length in (2 + len(items), None)
    feed.shutdown()


def test_data_appended_keeps_the_order_of_a_sampler_in_order(
    caplog: pytest.LogCaptureFixture,
) -> None:
    feed = gone_on(DataLoader(Numbers(14), 3), stopped(DataLoader(Numbers(), 4), 2))
    assert rest(feed) == [[8, 9, 10], [11, 12, 13]]
    assert "Their order" not in caplog.text


def test_another_length_in_the_code_of_a_sampler_may_be_another_order(
    caplog: pytest.LogCaptureFixture,
) -> None:
    saved = stopped(DataLoader(Numbers(), 4, sampler=written_for(9)), 1)
    gone_on(DataLoader(Numbers(), 2, sampler=written_for(11)), saved)
    assert "left: 7 samples in 4 items. Their order may be another one" in caplog.text


def test_nothing_changed_is_said_in_no_line(caplog: pytest.LogCaptureFixture) -> None:
    make = ORDERS["shuffled"]
    gone_on(make(4), stopped(make(4), 1))
    assert not caplog.text


@pytest.mark.parametrize("taken", [2, 3])
def test_a_last_batch_that_was_short_has_fewer_samples(taken: int) -> None:
    """Without a length nobody knows that it is the last, so a run may stop behind it."""

    def make(size: int, samples: int) -> Any:
        return DataLoader(Numbers(), size, sampler=Endless(samples))

    saved = stopped(make(4, 9), taken)
    feed = gone_on(make(2, 9), saved)
    assert flat(rest(feed)) == list(range(min(4 * taken, 9), 9))
    more = gone_on(make(2, 11), saved)
    assert flat(rest(more)) == list(range(min(4 * taken, 9), 11))


def test_single_samples() -> None:
    """With batch_size=None each sample is an item."""
    saved = stopped(DataLoader(Numbers(), None), 4)
    feed = gone_on(DataLoader(Numbers(14), None), saved)
    assert feed.length() == 14
    assert flat(rest(feed)) == list(range(4, 14))


def test_begun_anew_after_it_went_on_by_sample() -> None:
    def make(size: int) -> Any:
        return DataLoader(Numbers(), size, shuffle=True)

    feed = gone_on(make(2), stopped(make(4), 1))
    feed.take()
    other = open_feed(make(3), policy="restart-epoch")
    assert other.open(roundtrip(feed.state())) is False
    assert other.length() == 4
    items = rest(other)
    seed_everything(1)
    whole = open_feed(make(3))
    whole.open(None)
    assert items == rest(whole)
