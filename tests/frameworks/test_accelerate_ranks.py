"""Loaders that Accelerate has prepared, on other numbers of ranks than at the save.

`prepare_data_loader` with the number of processes builds what each of them has, in one process.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import pytest
from accelerate.data_loader import prepare_data_loader
from accelerate.state import PartialState
from torch.utils.data import DataLoader

from holdfast.core.group import Ranks
from holdfast.errors import LoopError
from holdfast.run.feed import BaseFeed
from holdfast.run.iterables import open_feed
from tests.core.tree_harness import roundtrip
from tests.run.feed_checks import seed_everything
from tests.torch.test_data_by_sample import Numbers

World = tuple[int, int]
"""The number of ranks, and the items that each takes."""
EVER = 10**6


def loader_of(
    rank: int, size: int, *, samples: int = 22, drop_last: bool = False, **kind: Any
) -> Any:
    PartialState(cpu=True)
    batch = 12 if kind.get("split_batches") else 2
    plain = DataLoader(Numbers(samples), batch, shuffle=True, drop_last=drop_last)
    return prepare_data_loader(
        plain,
        num_processes=size,
        process_index=rank,
        **{"use_seedable_sampler": True, "data_seed": 4, **kind},
    )


def feeds_of(size: int, saved: list[Any], **kind: Any) -> list[BaseFeed]:
    found: list[BaseFeed] = []
    for rank in range(size):
        seed_everything(50 + rank)
        feed: Any = open_feed(loader_of(rank, size, **kind))
        feed.ranks = lambda rank=rank: Ranks(rank, size)
        feed.open((saved[rank] if rank < len(saved) else saved[0]) if saved else None)
        found.append(feed)
    return found


def _one(feed: BaseFeed) -> Iterator[Any]:
    with suppress(StopIteration):
        yield feed.take()


def rows(feeds: list[BaseFeed], items: int) -> list[list[list[int]]]:
    """For each item, what each rank got."""
    found: list[list[list[int]]] = []
    while len(found) < items:
        batches: list[Any] = [next(_one(feed), None) for feed in feeds]
        if any(batch is None for batch in batches):
            assert all(batch is None for batch in batches), "the ranks are out of step"
            break
        found.append([batch.tolist() for batch in batches])
    return found


def epoch_of(worlds: list[World], **kind: Any) -> tuple[list[int], int]:
    """The samples of an epoch, in their order, and the items of rank 0."""
    saved: list[Any] = []
    got: list[int] = []
    taken = 0
    feeds: list[BaseFeed] = []
    for size, items in worlds:
        feeds = feeds_of(size, saved, **kind)
        found = rows(feeds, items)
        got += [sample for row in found for item in row for sample in item]
        taken += len(found)
        saved = [roundtrip(feed.state()) for feed in feeds]
    return got, taken


@pytest.mark.parametrize("drop_last", [False, True])
@pytest.mark.parametrize("kind", [{}, {"split_batches": True}], ids=["batches", "split"])
@pytest.mark.parametrize(("before", "after"), [(4, 2), (2, 4), (3, 2), (1, 2), (2, 1)])
def test_no_sample_is_lost_or_doubled(
    before: int, after: int, kind: dict[str, Any], drop_last: bool
) -> None:
    kind = {**kind, "drop_last": drop_last, "samples": 31}
    whole, length = epoch_of([(1, EVER)], **kind, even_batches=False)
    order, _ = epoch_of([(1, EVER)], samples=31)
    assert sorted(order) == list(range(31))
    assert whole == order[: len(whole)]
    for items in range(length // before):
        got, _ = epoch_of([(before, items), (after, EVER)], **kind)
        left = 31 - len(got)
        assert got[:31] == order[: len(got)]
        if drop_last:
            assert 0 <= left < 12
        else:
            assert left <= 0
            assert set(got[31:]) <= set(order)
            assert -left < 12
    got, _ = epoch_of([(before, 1), (after, 1), (before, EVER)], **kind)
    assert got[:31] == order[: len(got)]


def test_in_a_later_epoch_and_the_one_after_it() -> None:
    """Accelerate seeds each epoch's order by its number."""
    (alone,) = feeds_of(1, [])
    orders: list[list[int]] = []
    for _ in range(3):
        orders.append([sample for row in rows([alone], EVER) for sample in row[0]])
        alone.open(None)
    feeds = feeds_of(2, [])
    rows(feeds, EVER)
    for feed in feeds:
        feed.open(None)
    got = [sample for row in rows(feeds, 2) for item in row for sample in item]
    feeds = feeds_of(3, [roundtrip(feed.state()) for feed in feeds])
    got += [sample for row in rows(feeds, EVER) for item in row for sample in item]
    assert got[:22] == orders[1]
    for feed in feeds:
        feed.open(None)
    got = [sample for row in rows(feeds, EVER) for item in row for sample in item]
    assert got[:22] == orders[2]
    assert orders[0] != orders[1] != orders[2]


def test_an_order_that_one_process_drew_for_itself_is_not_that_of_two() -> None:
    """Without `use_seedable_sampler` one process draws it from the global generator."""
    (feed,) = feeds_of(1, [], use_seedable_sampler=False)
    feed.take()
    saved = roundtrip(feed.state())
    with pytest.raises(LoopError, match="the number of ranks was 1, is 2") as error:
        feeds_of(2, [saved], use_seedable_sampler=False)
    assert "generator" in str(error.value)


def test_one_process_that_reads_for_all_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    loader = loader_of(0, 1, dispatch_batches=True, put_on_device=True)
    assert open_feed(loader).open(None)
    monkeypatch.setattr(loader.state, "num_processes", 2)
    with pytest.raises(LoopError, match="one process reads the batches of all"):
        open_feed(loader)
