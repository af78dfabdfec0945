"""Iterable datasets in this process, and loaders that are more than a DataLoader."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import ChainDataset, DataLoader, Dataset, IterableDataset

from holdfast.run.iterables import open_feed
from holdfast.torch.stream_feed import StreamFeed
from tests.run.feed_checks import check_every_stop, record, without_holdfast

SAMPLES = 11


class Stream(IterableDataset[Any]):
    """A shuffle buffer over numbers, drawing all the time."""

    def __init__(self) -> None:
        self.epochs = 0
        self.rng = random.Random(8)
        self.produced = 0

    def __iter__(self) -> Iterator[Any]:
        self.epochs += 1
        buffer: list[int] = []
        for number in range(SAMPLES):
            buffer.append(number)
            if len(buffer) > 4:
                yield self._emit(buffer)
        while buffer:
            yield self._emit(buffer)

    def _emit(self, buffer: list[int]) -> Any:
        self.produced += 1
        number = buffer.pop(random.randrange(len(buffer)))
        return [number, self.epochs, self.rng.random(), np.random.rand(), torch.rand(2)]


class PositionedStream(IterableDataset[Any]):
    """Knows where it is."""

    def __init__(self) -> None:
        self.position = 0
        self.produced: list[int] = []

    def __iter__(self) -> Iterator[Any]:
        while self.position < SAMPLES:
            self.position += 1
            self.produced.append(self.position)
            yield [self.position, random.random(), np.random.rand(), torch.rand(2)]
        self.position = 0

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.position = state["position"]


class Buffered(IterableDataset[Any]):
    """Shuffles what another dataset yields, in a buffer of its own."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset
        self.rng = np.random.default_rng(1)

    def __iter__(self) -> Iterator[Any]:
        buffer: list[Any] = []
        for item in self.dataset:
            buffer.append(item)
            if len(buffer) > 3:
                yield buffer.pop(int(self.rng.integers(len(buffer))))
        yield from buffer


class Noise:
    """A transform or collate_fn with a generator of its own."""

    def __init__(self) -> None:
        self.generator = torch.Generator().manual_seed(3)

    def __call__(self, item: Any) -> Any:
        return [item, torch.rand((), generator=self.generator)]


class Transformed(IterableDataset[Any]):
    def __init__(self) -> None:
        self.transforms = [Noise(), Noise()]

    def __iter__(self) -> Iterator[Any]:
        for number in range(SAMPLES):
            yield [transform(number) for transform in self.transforms]


STREAMS: dict[str, Callable[[], Any]] = {
    "batches": lambda: DataLoader(Stream(), 3),
    "drop_last": lambda: DataLoader(Stream(), 3, drop_last=True),
    "batch_size=None": lambda: DataLoader(Stream(), None),
    "generator": lambda: DataLoader(Stream(), 3, generator=torch.Generator().manual_seed(7)),
    "knows its position": lambda: DataLoader(PositionedStream(), 2),
    "chained": lambda: DataLoader(ChainDataset([Stream(), Stream()]), 3),
    "wrapped": lambda: DataLoader(Buffered(Buffered(Stream())), 3),
    "transforms with generators": lambda: DataLoader(Transformed(), 3),
    "collate_fn with a generator": lambda: DataLoader(Stream(), 3, collate_fn=Noise()),
}


@pytest.mark.parametrize("name", STREAMS)
def test_stopped_at_every_batch_of_a_stream(name: str) -> None:
    check_every_stop(STREAMS[name])


def test_a_stream_that_knows_its_position_is_not_replayed() -> None:
    first = open_feed(STREAMS["knows its position"]())
    first.open(None)
    for _ in range(3):
        first.take()
    saved = first.state()
    dataset = PositionedStream()
    feed = open_feed(DataLoader(dataset, 2))
    assert isinstance(feed, StreamFeed)
    feed.open(saved)
    feed.take()
    assert dataset.produced == [7, 8]


def test_a_stream_that_knows_its_position_is_as_without_holdfast() -> None:
    make = STREAMS["knows its position"]
    assert record(make).steps == without_holdfast(make).steps


# -- loaders that are more than a DataLoader ----------------------------------


class Drawing(Dataset[Any]):
    """Random augmentation with all three libraries."""

    def __len__(self) -> int:
        return SAMPLES

    def __getitem__(self, index: int) -> Any:
        return [int(index), random.random(), np.random.rand(), torch.rand(2)]


class Echoing(DataLoader[Any]):
    """Decides for itself what an epoch is, one batch ahead."""

    def __iter__(self) -> Iterator[Any]:  # type: ignore[override]
        held = None
        for batch in super().__iter__():
            if held is not None:
                yield held
                yield held
            held = batch
        yield held


class Positioned:
    """A loader with a position, as torchdata's."""

    def __init__(self) -> None:
        self.asked = 0
        self.next = 0

    def __iter__(self) -> Iterator[Any]:
        while self.next < 6:
            self.next += 1
            yield [self.next, torch.rand(2)]
        self.next = 0

    def state_dict(self) -> dict[str, int]:
        self.asked += 1
        return {"next": self.next}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.next = state["next"]


class PositionedLoader(Positioned, DataLoader[Any]):
    def __init__(self) -> None:
        DataLoader.__init__(self, range(6))  # type: ignore[arg-type]
        self.asked = self.next = 0


def test_stopped_at_every_batch_of_a_loader_of_its_own() -> None:
    check_every_stop(lambda: Echoing(Drawing(), 3, shuffle=True))


@pytest.mark.parametrize("kind", [Positioned, PositionedLoader])
def test_stopped_at_every_batch_of_a_loader_with_a_position(kind: Any) -> None:
    check_every_stop(kind)


def test_a_loader_with_a_position_is_asked_at_saves_only() -> None:
    loader = Positioned()
    feed = open_feed(loader)
    feed.open(None)
    for _ in range(5):
        feed.take()
    assert loader.asked == 0
    feed.state()
    assert loader.asked == 1
