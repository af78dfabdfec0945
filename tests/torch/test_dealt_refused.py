"""What cannot go on inside an epoch on another number of ranks, and what a new rank gets."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, IterableDataset, RandomSampler
from torch.utils.data.distributed import DistributedSampler
from torchdata.stateful_dataloader import StatefulDataLoader

from holdfast.core.group import Ranks
from holdfast.errors import LoopError
from holdfast.run.feeds import FeedBook
from holdfast.run.iterables import open_feed
from tests.core.tree_harness import roundtrip
from tests.run.feed_checks import plain, seed_everything
from tests.torch.test_data import Augmented, WithGenerators
from tests.torch.test_data_by_sample import Numbers, rest

pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated")  # torchdata

Make = Callable[[Ranks], Any]


class Part(IterableDataset[Any]):
    """Every W-th number."""

    def __init__(self, rank: int, world_size: int) -> None:
        self.rank, self.world_size = rank, world_size

    def __iter__(self) -> Iterator[int]:
        return iter(range(self.rank, 12, self.world_size))


class Own(BatchSampler):
    """Of a user: nobody knows which samples its batches have."""


class Reversed(DistributedSampler[Any]):
    """Deals otherwise than torch does."""

    def __iter__(self) -> Iterator[int]:
        return reversed(list(super().__iter__()))  # type: ignore[return-value]


def sampler_of(ranks: Ranks, kind: type[Any] = DistributedSampler) -> Any:
    return kind(Numbers(12), ranks.size, ranks.rank, seed=1)


REFUSED: dict[str, tuple[Make, str]] = {
    "shuffled by each": (
        lambda ranks: DataLoader(Numbers(12), 2, shuffle=True),
        "each rank has data or an order of its own",
    ),
    "a sampler of torch": (
        lambda ranks: DataLoader(Numbers(12), 2, sampler=RandomSampler(range(12))),
        "each rank has data or an order of its own",
    ),
    "another way of dealing": (
        lambda ranks: DataLoader(Numbers(12), 2, sampler=sampler_of(ranks, Reversed)),
        "each rank has data or an order of its own",
    ),
    "a batch sampler of a user": (
        lambda ranks: DataLoader(Numbers(12), batch_sampler=Own(sampler_of(ranks), 2, False)),
        "only its Own knows which samples the other ranks had",
    ),
    "a stream": (
        lambda ranks: DataLoader(Part(*ranks), 2),
        "each rank has data or an order of its own",
    ),
    "StatefulDataLoader": (
        lambda ranks: StatefulDataLoader(Numbers(12), 2, sampler=sampler_of(ranks)),
        "each rank has data or an order of its own",
    ),
    "a list": (lambda ranks: [1, 2, 3, 4, 5, 6], "each rank has data or an order of its own"),
    "an array": (lambda ranks: np.arange(6), "each rank has data or an order of its own"),
    "an iterable": (
        lambda ranks: _Iterable(),
        "each rank has data or an order of its own",
    ),
}


class _Iterable:
    def __iter__(self) -> Iterator[int]:
        return iter(range(6))


def opened(make: Make, ranks: Ranks, saved: Any = None, policy: Any = "refuse") -> tuple[Any, bool]:
    feed: Any = open_feed(make(ranks), policy=policy)
    feed.ranks = lambda: ranks
    return feed, feed.open(saved)


def saved_after(make: Make, items: int, size: int = 2) -> Any:
    seed_everything(3)
    feed, _ = opened(make, Ranks(0, size))
    for _ in range(items):
        feed.take()
    return roundtrip(feed.state())


@pytest.mark.parametrize("name", REFUSED)
def test_refused_inside_an_epoch(name: str, caplog: pytest.LogCaptureFixture) -> None:
    make, why = REFUSED[name]
    saved = saved_after(make, 2)
    for policy in ("refuse", "by-sample"):
        with pytest.raises(LoopError, match="the number of ranks was 2, is 3") as error:
            opened(make, Ranks(2, 3), saved, policy)
        assert why in str(error.value)
        assert "(2 items taken on each)" in str(error.value)
        assert "Start it on 2 ranks" in error.value.hint
        assert 'data="restart-epoch"' in error.value.hint
        assert "DistributedSampler" in error.value.hint
    feed, as_saved = opened(make, Ranks(0, 3), saved, "restart-epoch")
    assert not as_saved
    again = rest(feed)
    seed_everything(3)
    begun, _ = opened(make, Ranks(0, 3))
    assert again == rest(begun)
    assert "the number of ranks was 2, is 3. The epoch begins anew." in caplog.text


@pytest.mark.parametrize("name", REFUSED)
def test_allowed_before_the_first_item_and_at_the_end(name: str) -> None:
    make, _ = REFUSED[name]
    new, length = Ranks(2, 3), len(rest(opened(make, Ranks(2, 3))[0]))
    feed, as_saved = opened(make, new, saved_after(make, 0))
    assert not as_saved
    assert len(rest(feed)) == length
    ended, _ = opened(make, Ranks(0, 2))
    rest(ended)
    feed, as_saved = opened(make, new, roundtrip(ended.state()))
    assert as_saved
    with pytest.raises(StopIteration):
        feed.take()
    feed.open(None)
    assert len(rest(feed)) == length


def test_a_new_rank_that_begins_anew_has_an_order_of_its_own() -> None:
    make, _ = REFUSED["shuffled by each"]
    saved = saved_after(make, 2)
    orders = [rest(opened(make, Ranks(rank, 3), saved, "restart-epoch")[0]) for rank in range(3)]
    assert orders[0] != orders[1] != orders[2] != orders[0]


def test_data_that_are_a_part_themselves() -> None:
    """A map-style dataset that says so; nothing else in its loader does."""

    class Files(Numbers):
        def __init__(self, ranks: Ranks) -> None:
            super().__init__(12 // ranks.size)
            self.rank, self.world_size = ranks

    def make(ranks: Ranks) -> Any:
        return DataLoader(Files(ranks), 2)

    for before, after in ((2, 1), (1, 2)):
        feed = open_feed(make(Ranks(0, before)))
        feed.open(None)
        feed.take()
        with pytest.raises(LoopError, match=f"the number of ranks was {before}, is {after}"):
            open_feed(make(Ranks(0, after))).open(roundtrip(feed.state()))


def test_checkpoints_of_before_that_do_not_speak_of_ranks() -> None:
    """They go on on as many ranks, and from then on also on others."""

    def make(ranks: Ranks) -> Any:
        return DataLoader(Numbers(12), 2, sampler=sampler_of(ranks))

    saved = saved_after(make, 1)
    for name in ("ranks", "deal", "taken_by_all", "order_length"):
        del saved[name]
    with pytest.raises(LoopError, match="batches was 3, is 2"):
        opened(make, Ranks(0, 3), saved)
    feed, _ = opened(make, Ranks(0, 2), saved)
    feed.take()
    again, _ = opened(make, Ranks(0, 1), roundtrip(feed.state()))
    assert [one for item in rest(again) for one in item] == list(sampler_of(Ranks(0, 1)))[8:]


def test_numbers_to_count_by_are_the_same_on_all_ranks(caplog: pytest.LogCaptureFixture) -> None:
    saved = saved_after(lambda ranks: range(10), 4)
    feed, as_saved = opened(lambda ranks: range(10), Ranks(2, 3), saved)
    assert as_saved
    assert [feed.take() for _ in range(6)] == [4, 5, 6, 7, 8, 9]
    assert not caplog.text


def test_a_change_that_the_number_of_ranks_does_not_explain_is_refused() -> None:
    def make(ranks: Ranks, samples: int = 12, seed: int = 1) -> Any:
        sampler: Any = DistributedSampler(Numbers(samples), ranks.size, ranks.rank, seed=seed)
        return DataLoader(Numbers(12), 2, sampler=sampler)

    saved = saved_after(make, 2)
    with pytest.raises(LoopError, match=r"is 3; batch_sampler\.sampler\.seed was 1, is 2"):
        opened(lambda ranks: make(ranks, seed=2), Ranks(0, 3), saved)
    with pytest.raises(LoopError, match="samples in its order was 12, is 13"):
        opened(lambda ranks: make(ranks, samples=13), Ranks(0, 3), saved)


def test_an_item_that_is_half_done_stays_what_it_was() -> None:
    book = FeedBook()

    def make(ranks: Ranks) -> Any:
        return DataLoader(Numbers(12), 2, sampler=sampler_of(ranks))

    saved, loader = saved_after(make, 2), make(Ranks(0, 3))
    feed = book.feed_for([loader], "min")
    with pytest.raises(LoopError, match="with loops of its own"):
        book.open("batches#0", [loader], "min", feed, saved, again=True)
    assert book.open("batches#0", [loader], "min", feed, saved)


def test_two_loaders_in_one_loop_are_dealt_together() -> None:
    def loaders(ranks: Ranks) -> list[Any]:
        return [
            DataLoader(Numbers(12), size, sampler=sampler_of(ranks), drop_last=True)
            for size in (1, 2)
        ]

    order = list(sampler_of(Ranks(0, 1)))
    first = loaders(Ranks(0, 2))
    feed = FeedBook().feed_for(first, "min")
    feed.open(None)
    feed.take()
    saved = roundtrip(feed.state())
    again = FeedBook().feed_for(loaders(Ranks(0, 1)), "min")
    again.open(saved)
    small, large = again.take()
    assert (small.tolist(), large.tolist()) == ([order[2]], order[4:6])


def test_a_book_gives_its_feeds_the_ranks_of_the_run() -> None:
    book = FeedBook()
    feed: Any = book.feed_for([[1, 2]], "min")
    book.ranks = Ranks(1, 4)  # a run knows them when its first epoch is opened
    assert feed.whose() == Ranks(1, 4)


def test_torchdatas_sampler_says_whose_it_is() -> None:
    """So that nothing but the loader need know of the ranks."""
    make = REFUSED["StatefulDataLoader"][0]
    feed = open_feed(make(Ranks(0, 2)))
    feed.open(None)
    feed.take()
    with pytest.raises(LoopError, match="the number of ranks was 2, is 3"):
        open_feed(make(Ranks(0, 3))).open(roundtrip(feed.state()))


# -- what a rank that was not there before draws --------------------------------


def test_a_new_rank_draws_other_numbers_than_rank_0() -> None:
    """Seeds of workers follow from the random states in which the epoch began, those of
    rank 0 in what a new rank is given."""

    def make(ranks: Ranks) -> Any:
        sampler: Any = DistributedSampler(Numbers(12), ranks.size, ranks.rank, shuffle=False)
        return DataLoader(Augmented(12), 2, sampler=sampler, num_workers=1)

    def next_of(rank: int) -> Any:
        feed, _ = opened(make, Ranks(rank, 3), saved)
        again, _ = opened(make, Ranks(rank, 3), roundtrip(feed.state()))
        items = [plain(feed.take()), plain(again.take())]
        feed.shutdown()
        again.shutdown()
        assert items[0] == items[1], "and a resume on as many draws them again"
        return items[0]

    saved = saved_after(make, 1)
    old, new, newer = next_of(0), next_of(1), next_of(2)
    assert old[0] != new[0] != newer[0]  # the indices
    assert len({str(item[1:]) for item in (old, new, newer)}) == 3
    assert next_of(2) == newer


def test_generators_of_a_new_rank_stay_its_own() -> None:
    """Those in its data set and its loader: the order comes from none of them."""

    def make(ranks: Ranks) -> Any:
        data = WithGenerators()
        generator = torch.Generator().manual_seed(ranks.rank)
        sampler: Any = DistributedSampler(data, ranks.size, ranks.rank)
        return DataLoader(data, 1, sampler=sampler, generator=generator)

    saved = saved_after(make, 1)
    for rank in (0, 2):
        feed, _ = opened(make, Ranks(rank, 3), saved)
        state = torch.Generator().manual_seed(rank)
        if rank == 0:
            state.set_state(_generator_in(saved))
        else:
            torch.empty((), dtype=torch.int64).random_(generator=state)  # the base seed
        assert torch.equal(feed.loader.generator.get_state(), state.get_state())


def _generator_in(saved: Any) -> torch.Tensor:
    generator = torch.Generator()
    generator.set_state(
        torch.from_numpy(np.array(saved["generators"]["generator"]["state"]["state"]))
    )
    return generator.get_state()
