"""Loaders that Ray Train has prepared: `run.batches(prepare_data_loader(loader))`.

Without a cluster: what Ray puts around a loader is made by hand, as it does.
"""

from __future__ import annotations

import random
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler, IterableDataset, TensorDataset

import holdfast
from holdfast.core.group import Ranks
from holdfast.run.feed import BaseFeed
from holdfast.run.iterables import open_feed
from tests.core.tree_harness import roundtrip
from tests.support.jobs import Copying, Countdown, fresh_address


class Noisy(TensorDataset):
    """Draws for each sample."""

    def __getitem__(self, index: int) -> Any:
        return super().__getitem__(index)[0] + torch.rand(1)


class Stream(IterableDataset[Any]):
    def __iter__(self) -> Any:
        for _ in range(10):
            yield torch.rand(1) + random.random()


pytestmark = pytest.mark.ray


def prepared(loader: Any) -> Any:
    from ray.train.torch.train_loop_utils import (  # pyright: ignore[reportMissingImports]
        _WrappedDataLoader,
    )

    return _WrappedDataLoader(loader, torch.device("cpu"), auto_transfer=True)


def loop(address: str, die: Any, *, stream: bool = False, **loading: Any) -> Any:
    """All that was seen and drawn."""
    torch.manual_seed(3)
    random.seed(3)
    data: Any = Stream() if stream else Noisy(torch.arange(10.0))
    loader = prepared(DataLoader(data, batch_size=4, shuffle=not stream, **loading))
    model = torch.nn.Linear(1, 1)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.1)
    with holdfast.Run(address, every=1, quiet=True) as run:
        run.track(model=model, optimizer=optimizer)
        seen = run.box(seen=[]).seen
        for epoch in run.epochs(3):
            for batch in run.batches(loader):
                loss = model(batch.reshape(-1, 1)).square().mean()
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                seen.append([epoch, batch.flatten().tolist(), loss.item(), torch.rand(1).item()])
                die()
                if epoch == 1 and len(seen) == 6:
                    break
            seen.append(torch.rand(1).item())
    return seen


@pytest.mark.parametrize("kind", [{}, {"num_workers": 1}, {"stream": True}], ids=str)
def test_killed_anywhere(kind: dict[str, Any]) -> None:
    address = fresh_address()
    places = Copying(address)
    whole = loop(address, places, **kind)
    assert places.calls == 8
    for place, left in enumerate(places.left):
        if not kind.get("num_workers") or place in (1, 3):
            assert loop(left, Countdown(), **kind) == whole, f"killed at place {place}"


def test_it_is_what_ray_hands_out() -> None:
    """The batches, and what is drawn on the way, are those of a plain loop over it."""

    def drawn(around: Any) -> list[Any]:
        torch.manual_seed(3)
        loader = prepared(DataLoader(Noisy(torch.arange(10.0)), batch_size=4, shuffle=True))
        return [[*batch.flatten().tolist(), torch.rand(1).item()] for batch in around(loader)]

    run = holdfast.Run(fresh_address(), quiet=True)
    assert drawn(run.batches) == drawn(lambda loader: loader)
    run.close()


def feeds_of(size: int, saved: list[Any]) -> list[BaseFeed]:
    found: list[BaseFeed] = []
    for rank in range(size):
        sampler: Any = DistributedSampler(range(22), size, rank, seed=4)  # pyright: ignore
        loader: Any = DataLoader(range(22), 2, sampler=sampler)  # pyright: ignore
        feed: Any = open_feed(prepared(loader))
        feed.ranks = lambda rank=rank: Ranks(rank, size)
        feed.open(saved[rank if rank < len(saved) else 0] if saved else None)
        found.append(feed)
    return found


@pytest.mark.parametrize(("before", "after"), [(2, 1), (1, 2), (4, 2)])
def test_on_another_number_of_ranks_no_sample_is_lost_or_doubled(before: int, after: int) -> None:
    got: list[int] = []
    feeds = feeds_of(before, [])
    got += [number for feed in feeds for number in feed.take().tolist()]
    feeds = feeds_of(after, [roundtrip(feed.state()) for feed in feeds])
    while True:
        try:
            got += [number for feed in feeds for number in feed.take().tolist()]
        except StopIteration:
            break
    assert sorted(got[:22]) == list(range(22))


class Rewinding:
    """As many loaders are written: an iterator which its own `iter` makes ready."""

    def __init__(self) -> None:
        self._left: list[int] = []

    def __iter__(self) -> Any:
        self._left = [1, 2, 3]
        return self

    def __next__(self) -> int:
        if not self._left:
            raise StopIteration
        return self._left.pop(0)


def test_an_iterator_that_begins_in_its_own_iter_is_not_empty() -> None:
    run = holdfast.Run(fresh_address(), quiet=True)
    assert list(run.batches(Rewinding())) == [1, 2, 3]  # pyright: ignore
    run.close()
