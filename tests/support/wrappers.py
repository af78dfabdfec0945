"""Wrappers around loops, as people write them, in a module of their own."""

from __future__ import annotations

import collections
import itertools
from collections.abc import Callable, Iterable, Iterator
from typing import Any

# -- they read ahead ------------------------------------------------------------------


def one_ahead(items: Iterable[Any]) -> Iterator[Any]:
    source = iter(items)
    held = next(source)
    for item in source:
        yield held
        held = item
    yield held


def first_is_none(items: Iterable[Any]) -> Iterator[Any]:
    """timm's PrefetchLoader: it asks at one place only."""
    held = None
    for item in items:
        if held is not None:
            yield held
        held = [item]  # a copy, as on a device
    yield held


def shard(items: Iterable[Any]) -> Iterator[Any]:
    """accelerate's DataLoaderShard."""
    source = iter(items)
    try:
        current = next(source)
    except StopIteration:
        return
    while True:
        try:
            following = next(source)
            yield current
            current = following
        except StopIteration:
            yield current
            break


def to_device(items: Iterable[Any], size: int = 2) -> Iterator[Any]:
    """flax's prefetch_to_device."""
    source = iter(items)
    queue: collections.deque[Any] = collections.deque()

    def enqueue(n: int) -> None:
        for item in itertools.islice(source, n):
            queue.append(item)

    enqueue(size)
    while queue:
        yield queue.popleft()
        enqueue(1)


def filled(items: Iterable[Any]) -> Iterator[Any]:
    source = iter(items)
    queue: list[Any] = []

    def fetch() -> Any:
        return next(source, None)

    while True:
        while len(queue) < 2:
            queue.append(fetch())
        if queue[0] is None:
            return
        yield queue.pop(0)


def grouped(items: Iterable[Any], n: int = 2) -> Iterator[Any]:
    group: list[Any] = []
    for item in items:
        group.append(item)
        if len(group) == n:
            yield group
            group = []
    if group:
        yield group


class InInit:
    """NVIDIA's data_prefetcher, as an iterator."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.source = iter(items)
        self.preload()

    def preload(self) -> None:
        self.held = next(self.source, None)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        item = self.held
        if item is None:
            raise StopIteration
        self.preload()
        return item

    def next(self) -> Any:
        return next(self, None)


class InIter:
    def __init__(self, items: Iterable[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        self.source = iter(self.items)
        self.held = next(self.source, None)
        return self

    def __next__(self) -> Any:
        item, self.held = self.held, None
        if item is None:
            raise StopIteration
        self.held = next(self.source, None)
        return item

    def __len__(self) -> int:
        return len(self.items)  # type: ignore[arg-type]


class IterIsGenerator:
    def __init__(self, items: Iterable[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        yield from one_ahead(self.items)


class InNext:
    def __init__(self, items: Iterable[Any]) -> None:
        self.source = iter(items)
        self.queue: list[Any] = []

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        while len(self.queue) < 2:
            self.queue.append(next(self.source, None))
        if self.queue[0] is None:
            raise StopIteration
        return self.queue.pop(0)


def bar(items: Iterable[Any]) -> Iterator[Any]:
    """What tqdm does."""
    shown = []
    for item in items:
        yield item
        shown += ["="]


def made_elsewhere(run: Any, loader: Any) -> Iterator[Any]:
    return one_ahead(run.batches(loader))


Wrapper = Callable[[Iterable[Any]], Iterable[Any]]

READ_AHEAD: dict[str, Wrapper] = {
    "generator": one_ahead,
    "generator, at one place": first_is_none,
    "accelerate": shard,
    "flax": to_device,
    "helper function": filled,
    "groups": grouped,
    "class, __init__": InInit,
    "class, __iter__": InIter,
    "class, __iter__ is a generator": IterIsGenerator,
    "class, __next__": InNext,
    "tqdm around a generator": lambda items: bar(one_ahead(items)),
    "tqdm around a class": lambda items: bar(InInit(items)),
    "tqdm around __iter__": lambda items: bar(InIter(items)),
    "generator around tqdm": lambda items: one_ahead(bar(items)),
    "class around tqdm": lambda items: InIter(bar(items)),
    "flax around tqdm": lambda items: to_device(bar(items)),
    "between two": lambda items: bar(one_ahead(bar(items))),
    "under enumerate": lambda items: (item for _, item in enumerate(one_ahead(items))),
    "around enumerate": lambda items: (item for _, item in one_ahead(enumerate(items))),
    "chained": lambda items: itertools.chain(one_ahead(items), []),
}

# -- they do not ----------------------------------------------------------------------


class Peek:
    """Takes the first item early, and hands it out before it asks for the second."""

    def __init__(self, items: Iterable[Any]) -> None:
        self.source = iter(items)
        self.first = [next(self.source)]

    def __iter__(self) -> Iterator[Any]:
        return self

    def __len__(self) -> int:
        return 4

    def __next__(self) -> Any:
        return self.first.pop() if self.first else next(self.source)


class PeekInIter:
    def __init__(self, items: Iterable[Any]) -> None:
        self.items = items

    def __iter__(self) -> Iterator[Any]:
        source = iter(self.items)
        first = next(source)
        self.shape = type(first)
        yield first
        yield from source


class OneAtATime:
    def __init__(self, items: Iterable[Any]) -> None:
        self.source = iter(items)

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Any:
        return next(self.source)


def moved(items: Iterable[Any]) -> Iterator[Any]:
    def move(item: Any) -> Any:
        return item

    for item in items:
        item = move(item)
        yield item


def peeked(items: Iterable[Any]) -> Iterator[Any]:
    source = iter(items)
    first = next(source)
    return itertools.chain([first], source)


ONE_AT_A_TIME: dict[str, Wrapper] = {
    "nothing": lambda items: items,
    "generator": bar,
    "generator expression": lambda items: (item for item in items),
    "transforming": moved,
    "enumerate": lambda items: (item for _, item in enumerate(items)),
    "zip": lambda items: (item for item, _ in zip(items, itertools.count(), strict=False)),
    "map": lambda items: map(float, items),
    "islice": lambda items: itertools.islice(items, None),
    "chain": lambda items: itertools.chain(items, []),
    "class": OneAtATime,
    "peek": Peek,
    "peek, in a generator": PeekInIter,
    "peek and chain": peeked,
    "tqdm around peek": lambda items: bar(Peek(items)),
    "peek around tqdm": lambda items: Peek(bar(items)),
    "many": lambda items: bar(OneAtATime(bar(moved(items)))),
    "filter": lambda items: filter(lambda item: item is not None, items),
}
