"""Loaders with a DistributedSampler, on other numbers of ranks than at the save."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from torch.utils.data import BatchSampler, DataLoader
from torch.utils.data.distributed import DistributedSampler

from holdfast.core.rng import apply_rng, capture_rng
from holdfast.run.dealing import Deal
from holdfast.run.iterables import open_feed
from tests.core.tree_harness import roundtrip
from tests.run.feed_checks import seed_everything, train_step
from tests.torch.test_data_by_sample import Numbers


@dataclass(frozen=True)
class World:
    """A start of the program on so many ranks, and the items that each of them takes."""

    size: int
    batch: int | None = 2
    items: int = 10**6
    workers: int = 0
    persistent: bool = False


@dataclass(frozen=True)
class Data:
    samples: int = 23
    shuffle: bool = True
    sampler_drops: bool = False
    loader_drops: bool = False
    epoch: int = 0
    listed: bool = False
    """A BatchSampler is given, instead of a batch size."""

    def loader(self, world: World, rank: int) -> DataLoader[Any]:
        sampler: Any = DistributedSampler(
            range(self.samples),  # type: ignore[arg-type]
            num_replicas=world.size,
            rank=rank,
            shuffle=self.shuffle,
            seed=7,
            drop_last=self.sampler_drops,
        )
        sampler.set_epoch(self.epoch)
        kind: dict[str, Any] = {
            "num_workers": world.workers,
            "persistent_workers": world.persistent,
        }
        if self.listed and world.batch:
            kind["batch_sampler"] = BatchSampler(sampler, world.batch, self.loader_drops)
        else:
            drops = self.loader_drops and world.batch is not None
            kind.update(batch_size=world.batch, sampler=sampler, drop_last=drops)
        return DataLoader(Numbers(self.samples), **kind)

    def order(self) -> list[int]:
        """That of all ranks, as torch says it."""
        alone = replace(self, sampler_drops=False).loader(World(1, None), 0)
        return list(alone.sampler)


def states_for(saved: Sequence[Any], size: int) -> list[Any]:
    """What each rank of a new world is given: its own state, or that of rank 0."""
    return [saved[rank] if rank < len(saved) else saved[0] for rank in range(size)]


def run_worlds(
    data: Data, worlds: Sequence[World], policy: Any = "by-sample"
) -> tuple[list[list[list[list[int]]]], list[Any]]:
    """For each world, for each rank, the items that it took; and the feeds of the last."""
    saved: list[Any] = []
    feeds: list[Any] = []
    taken: list[list[list[list[int]]]] = []
    for world in worlds:
        states = states_for(saved, world.size) if saved else [None] * world.size
        saved, feeds = [], []
        taken.append([])
        for rank, state in enumerate(states):
            seed_everything(100 + rank)
            feed = open_feed(data.loader(world, rank), policy=policy)
            feed.open(None if state is None else state[0])
            if state is not None:
                apply_rng(state[1])
            items: list[list[int]] = []
            while len(items) < world.items:
                try:
                    items.append(np.atleast_1d(feed.take()).tolist())
                except StopIteration:
                    break
                train_step()
            saved.append((roundtrip(feed.state()), capture_rng()))
            taken[-1].append(items)
            feeds.append(feed)
            if world is not worlds[-1]:
                feed.shutdown()
    return taken, feeds


def dealt(ranks: list[list[list[int]]]) -> list[int]:
    """The samples of all ranks of one world in their common order."""
    own = [[sample for item in items for sample in item] for items in ranks]
    assert len({len(samples) for samples in own}) == 1, "the ranks are out of step"
    return [sample for turn in zip(*own, strict=True) for sample in turn]


def check(data: Data, worlds: Sequence[World]) -> None:
    """No sample is lost or doubled within the epoch but at its end, as the sampler has it."""
    taken, feeds = run_worlds(data, worlds)
    order = data.order()
    got = [sample for ranks in taken for sample in dealt(ranks)]
    before = sum(len(dealt(ranks)) for ranks in taken[:-1])
    all_taken = zip(taken[:-1], worlds[:-1], strict=True)
    ended = any(len(ranks[0]) < world.items for ranks, world in all_taken)
    last = worlds[-1]
    assert got[: len(order)] == order[: len(got)]
    again = got[len(order) :]  # padding, as the sampler makes it: the first ones of the order
    assert again == (order * (len(again) // len(order) + 1))[: len(again)] if order else not again
    missing = len(order) - len(got)
    if not data.sampler_drops and not data.loader_drops:
        assert missing <= 0
    if data.sampler_drops and not data.loader_drops:
        assert missing < max(world.size for world in worlds)
    if data.loader_drops:
        each = 1 if data.sampler_drops else 0
        assert missing < max(world.size * ((world.batch or 1) + each) for world in worlds)
    if before < len(order):  # else the epoch had ended with what the world before took
        assert len(again) < last.size
    done = sum(len(ranks[0]) for ranks in taken)
    for feed in feeds:
        assert ended or feed.length() == done
        feed.shutdown()


# -- the arithmetic -----------------------------------------------------------


@given(st.integers(1, 30), st.integers(1, 6), st.booleans(), st.booleans())
def test_a_deal_from_the_start_is_the_samplers_own(
    samples: int, size: int, drop_last: bool, shuffle: bool
) -> None:
    data = Data(samples, shuffle, sampler_drops=drop_last)
    for rank in range(size):
        own = list(data.loader(World(size), rank).sampler)
        assert Deal(size).of(data.order(), rank, drop_last=drop_last) == own


def test_the_rest_is_completed_with_the_first_ones_or_cut() -> None:
    order = list("abcdefgh")
    deals = [Deal(3, behind=4).of(order, rank, drop_last=False) for rank in range(3)]
    assert deals == [["e", "h"], ["f", "a"], ["g", "b"]]
    deals = [Deal(3, behind=4).of(order, rank, drop_last=True) for rank in range(3)]
    assert deals == [["e"], ["f"], ["g"]]
    assert Deal(3, behind=9).of(order, 0, drop_last=False) == []
    assert Deal(5).of(["a"], 3, drop_last=False) == ["a"]


# -- feeds --------------------------------------------------------------------

SIZES = [(4, 2), (2, 4), (3, 2), (1, 2), (2, 1)]


@pytest.mark.parametrize("drops", [False, True])
@pytest.mark.parametrize(("before", "after"), SIZES)
def test_at_every_place_of_an_epoch(before: int, after: int, drops: bool) -> None:
    data = Data(sampler_drops=drops, epoch=3)
    length = len(data.loader(World(before), 0))
    for items in range(length + 1):
        check(data, [World(before, items=items), World(after)])


def test_there_and_back_within_one_epoch() -> None:
    for samples in range(23, 27):
        data = Data(samples)
        check(data, [World(4, items=1), World(2, items=2), World(3)])
        check(data, [World(4, items=1), World(2, items=2), World(2, items=1), World(4)])
        check(data, [World(1, items=3), World(5, items=1), World(1, items=2), World(2)])


@pytest.mark.parametrize(
    "kind", [{"listed": True}, {"shuffle": False}, {"loader_drops": True}, {"samples": 3}]
)
def test_kinds_of_loaders(kind: dict[str, Any]) -> None:
    for items in range(4):
        check(Data(**kind), [World(2, items=items), World(3, items=1), World(1)])


def test_single_samples_as_items() -> None:
    for items in range(7):
        check(Data(), [World(4, None, items=items), World(3, None)])


@pytest.mark.parametrize("persistent", [False, True])
def test_with_workers(persistent: bool) -> None:
    check(Data(), [World(2, 3, 2, 1, persistent), World(1, 3, 2, 2, persistent), World(2, 3)])


def test_another_batch_size_at_the_same_time_and_later() -> None:
    for items in range(1, 4):
        check(Data(), [World(2, 3, items), World(3, 2)])
        check(Data(), [World(2, 3, items), World(3, 2, 1), World(3, 1, 2), World(1, 4)])
        check(Data(), [World(2, 3, 1), World(2, 1, items), World(4, 2)])


WORLDS = st.builds(World, st.integers(1, 5), st.integers(1, 4), st.integers(0, 5))


@settings(max_examples=60, deadline=None)
@given(
    st.builds(
        Data, st.integers(1, 40), st.booleans(), st.booleans(), st.booleans(), st.integers(0, 3)
    ),
    st.lists(WORLDS, min_size=1, max_size=3),
    st.integers(1, 5),
    st.booleans(),
)
def test_any_worlds(data: Data, worlds: list[World], size: int, same_batch: bool) -> None:
    if same_batch:
        worlds = [replace(world, batch=worlds[0].batch) for world in worlds]
    check(data, [*worlds, World(size, worlds[-1].batch)])
