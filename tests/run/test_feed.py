"""Feeds over plain Python iterables."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from holdfast.core.rng import apply_rng, capture_rng
from holdfast.errors import LoopError
from holdfast.run.iterables import AskedFeed, CountedFeed, SequenceFeed, open_feed
from tests.run.feed_checks import check_every_stop, plain, record, seed_everything, without_holdfast

ITEMS = 6


class Squares(Sequence[int]):
    """A sequence by the book."""

    def __init__(self) -> None:
        self.read: list[int] = []

    def __len__(self) -> int:
        return ITEMS

    def __getitem__(self, index: Any) -> int:
        if index >= ITEMS:
            raise IndexError(index)
        self.read.append(index)
        return index * index


class Backwards(list[int]):
    """A list that is not iterated over by index."""

    def __iter__(self) -> Iterator[int]:
        return reversed(self)


class Shuffled:
    """Shuffles in place in each epoch, and draws for each item."""

    def __init__(self) -> None:
        self.order = list(range(ITEMS))
        self.by_class = {"a": [1, 2], "b": [3]}
        self.rng = np.random.default_rng(4)
        self.epochs = 0

    def __iter__(self) -> Iterator[Any]:
        self.epochs += 1
        self.by_class["a"].append(self.epochs)
        random.shuffle(self.order)
        for number in list(self.order):
            yield [number, self.epochs, len(self.by_class["a"]), self.rng.random(), _draws()]


class Permuted:
    def __init__(self) -> None:
        self.rng = np.random.RandomState(2)

    def __iter__(self) -> Iterator[Any]:
        return iter(self.rng.permutation(ITEMS).tolist())


class Wrapper:
    """Reads another one ahead, and draws through a method that it holds."""

    def __init__(self) -> None:
        self.inner = Permuted()
        self.noise = {"draw": random.Random(9).random}

    def __iter__(self) -> Iterator[Any]:
        before = None
        for item in self.inner:
            if before is not None:
                yield [before, self.noise["draw"]()]
            before = item


class Indexed:
    """The old protocol: no `__iter__`."""

    def __getitem__(self, index: int) -> Any:
        if index >= ITEMS:
            raise IndexError(index)
        return [index, _draws()]


class Drawing:
    """Draws everything for its first item."""

    def __iter__(self) -> Iterator[Any]:
        yield from zip(
            np.random.permutation(ITEMS), torch.randperm(ITEMS), [random.random()] * ITEMS,
            strict=True,
        )  # fmt: skip


def _draws() -> list[float]:
    return [random.random(), np.random.rand(), torch.rand(()).item()]


REPEATABLE: dict[str, Callable[[], Any]] = {
    "range": lambda: range(3, 15, 2),
    "list": lambda: ["a", "b", "c"],
    "tuple": lambda: (1, 2),
    "empty": list,
    "array": lambda: np.arange(12.0).reshape(4, 3),
    "sequence": Squares,
    "subclass": lambda: Backwards([1, 2, 3]),
    "dict": lambda: {"b": 1, "a": 2},
    "shuffled": Shuffled,
    "indexed": Indexed,
    "wrapper": Wrapper,
    "drawing": Drawing,
}


@pytest.mark.parametrize("name", REPEATABLE)
def test_stopped_at_every_item(name: str) -> None:
    check_every_stop(REPEATABLE[name])


@pytest.mark.parametrize("name", ["array", "subclass", "drawing"])
def test_same_bits_as_without_holdfast(name: str) -> None:
    ours, theirs = record(REPEATABLE[name]), without_holdfast(REPEATABLE[name])
    assert ours.steps == theirs.steps
    assert ours.final_rng == theirs.final_rng


def test_sequences_are_not_read_to_skip() -> None:
    squares = Squares()
    feed = open_feed(squares)
    assert isinstance(feed, SequenceFeed)
    feed.open(None)
    feed.take()
    feed.take()
    again = Squares()
    other = open_feed(again)
    other.open(feed.state())
    assert other.take() == 4
    assert again.read == [2]


@pytest.mark.parametrize(
    ("loader", "kind"),
    [
        ([1], SequenceFeed),
        (np.zeros(2), SequenceFeed),
        (Backwards([1]), CountedFeed),
        ({"a": 1}, CountedFeed),
        ("text", CountedFeed),
        (iter([1]), CountedFeed),
        (Indexed(), CountedFeed),
    ],
)
def test_the_feed_of_each_kind_of_loader(loader: Any, kind: type) -> None:
    assert type(open_feed(loader)) is kind


def test_lengths() -> None:
    assert open_feed(range(7)).length() == 7
    assert open_feed(iter([1, 2])).length() is None
    assert open_feed(Drawing()).length() is None


@pytest.mark.parametrize("loader", [{1, 2}, frozenset("ab")])
def test_sets_are_refused(loader: Any) -> None:
    with pytest.raises(LoopError, match="another order in each process"):
        open_feed(loader)


@pytest.mark.parametrize("loader", [3, None, object()])
def test_what_is_not_iterable_is_refused(loader: Any) -> None:
    with pytest.raises(LoopError, match="cannot be iterated over"):
        open_feed(loader)


def test_a_sequence_of_another_length_is_refused() -> None:
    feed = open_feed([1, 2, 3])
    feed.open(None)
    feed.take()
    with pytest.raises(LoopError, match="length was 3, is 4"):
        open_feed([1, 2, 3, 4]).open(feed.state())


# -- iterators: once ----------------------------------------------------------


def numbers() -> Iterator[Any]:
    for number in range(100):
        yield [number, _draws()]


def test_an_exhausted_iterator_is_an_error_in_the_next_epoch() -> None:
    feed = open_feed(iter([1, 2]))
    feed.open(None)
    assert [feed.take(), feed.take()] == [1, 2]
    with pytest.raises(StopIteration):
        feed.take()
    feed.close()
    with pytest.raises(LoopError, match="iterated over to its end") as caught:
        feed.open(None)
    assert "one per epoch" in caught.value.hint


@pytest.mark.parametrize("stop", range(8))
def test_one_iterator_for_several_loops(stop: int) -> None:
    """Each epoch takes three items and breaks, as with an endless generator."""

    def epochs(feed: Any, first: int) -> list[Any]:
        seen: list[Any] = []
        for number in range(first, 9):
            if number % 3 == 0:
                feed.close()
                feed.open(None)
            seen.append(plain([feed.take(), _draws()]))
        return seen

    seed_everything(1)
    feed: Any = open_feed(numbers())
    for number in range(stop):
        if number % 3 == 0:
            feed.close()
            feed.open(None)
        feed.take()
        _draws()
    saved, rng = feed.state(), capture_rng()
    expected = epochs(feed, stop)

    seed_everything(5)
    again = open_feed(numbers())
    again.open(saved)
    apply_rng(rng)
    assert epochs(again, stop) == expected


def test_a_new_iterator_for_each_epoch() -> None:
    seed_everything(1)
    feed = open_feed(iter([1, 2]))
    feed.open(None)
    while True:
        try:
            feed.take()
        except StopIteration:
            break
    saved = feed.state()
    following = open_feed(iter([3, 4]))
    following.open(saved)
    following.open(None)
    assert following.take() == 3


def test_an_iterator_that_has_become_shorter_is_an_error() -> None:
    feed = open_feed(iter([1, 2, 3]))
    feed.open(None)
    feed.take()
    feed.take()
    with pytest.raises(LoopError, match="has only 1 item now; 2 had been taken"):
        open_feed(iter([1])).open(feed.state())


def test_files_are_read_on(tmp_path: Path) -> None:
    path = tmp_path / "lines"
    path.write_text("a\nb\nc\n")
    with path.open() as first, path.open() as second:
        feed = open_feed(first)
        feed.open(None)
        assert feed.take() == "a\n"
        other = open_feed(second)
        other.open(feed.state())
        assert other.take() == "b\n"


# -- asked --------------------------------------------------------------------


class Positioned:
    """As torchdata's loaders: an epoch left early is not gone on with."""

    def __init__(self) -> None:
        self.position = 0
        self._resume_at = 0

    def __iter__(self) -> Iterator[int]:
        self.position, self._resume_at = self._resume_at, 0
        while self.position < 5:
            self.position += 1
            yield self.position

    def state_dict(self) -> dict[str, int]:
        return {"position": self.position % 5}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self._resume_at = state["position"]


def test_an_epoch_left_early_is_not_gone_on_with() -> None:
    feed = open_feed(Positioned())
    assert isinstance(feed, AskedFeed)
    feed.open(None)
    feed.take()
    feed.take()
    inside = feed.state()
    feed.close()
    left = feed.state()

    other = open_feed(Positioned())
    other.open(inside)
    assert other.take() == 3
    other = open_feed(Positioned())
    other.open(left)
    other.open(None)
    assert other.take() == 1


def test_state_is_a_tree_that_checkpoints_can_hold() -> None:
    from holdfast.core.tree import capture

    feed = open_feed(Shuffled())
    for _ in range(2):
        feed.open(None)
        feed.take()
    captured = capture({"feed": feed.state()})
    assert not captured.pickled
