"""The feeds of a run's loops, kept from epoch to epoch.

A loader has state between epochs: generators that go on, workers that persist. So one
feed serves a loader for the whole run, its state is in every checkpoint even while it is
not iterated over, and in a resuming process it is brought there before its first epoch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from holdfast.core.rng import apply_rng, capture_rng
from holdfast.errors import UsageError
from holdfast.run.feed import Feed, Policy
from holdfast.run.iterables import open_feed
from holdfast.run.randomness import libraries
from holdfast.run.search import find_generators, generators_among

Mode = Literal["min", "cycle"]

logger = logging.getLogger("holdfast")


@dataclass
class _Entry:
    loaders: tuple[Any, ...]
    mode: str
    feed: Feed
    opened: bool = False
    """In this process."""


class FeedBook:
    """Feeds by the place of their loop in the program (`epochs/batches#0`)."""

    def __init__(
        self,
        policy: Policy = "refuse",
        tracked: Callable[[], Iterable[object]] = tuple,
    ) -> None:
        self._policy: Policy = policy
        self._tracked = tracked
        self._entries: dict[str, _Entry] = {}
        self._saved: dict[str, Any] = {}
        self._told = False

    def restore(self, saved: Mapping[str, Any]) -> None:
        """Go on from the states that `states` returned."""
        self._saved = dict(saved)

    def feed_for(self, loaders: Sequence[Any], mode: Mode) -> Feed:
        """The feed that already serves these loaders, or a new one."""
        for entry in self._entries.values():
            if entry.mode == mode and _same(entry.loaders, loaders):
                return entry.feed
        feeds = [open_feed(loader, policy=self._policy) for loader in loaders]
        return feeds[0] if len(feeds) == 1 else TogetherFeed(feeds, mode)

    def open(self, place: str, loaders: Sequence[Any], mode: Mode, feed: Feed, saved: Any) -> bool:
        """Begin an epoch at `place` (`saved` None), or go to the saved one. As Feed.open."""
        entry = self.bind(place, loaders, mode, feed)
        first, entry.opened = not entry.opened, True
        before = self._take_saved(entry)
        if saved is None and first and before is not None:
            # Between epochs tracked generators are what the checkpoint and the prologue
            # made of them: later than what the feed knows, the end of its last epoch.
            found = generators_among(self._tracked(), libraries())
            exact = [(library, one, library.read(one)) for library, one in found]
            rng = capture_rng()
            feed.open(before)
            feed.close()
            apply_rng(rng)
            for library, one, state in exact:
                library.write(one, state)
        return feed.open(saved)

    def _take_saved(self, entry: _Entry) -> Any:
        """The saved state of a feed, once: a loader that the program builds in a later
        epoch is another one. (One loader may serve loops at several places.)"""
        places = [place for place, one in self._entries.items() if one is entry]
        states = [self._saved.pop(place) for place in places if place in self._saved]
        return states[0] if states else None

    def bind(self, place: str, loaders: Sequence[Any], mode: Mode, feed: Feed) -> _Entry:
        """The loop at `place` is served by `feed`."""
        found = self._entries.get(place)
        if found is not None and found.feed is feed:
            return found
        if found is None:
            self._check_generators(place, loaders)
        shared = next((e for e in self._entries.values() if e.feed is feed), None)
        entry = shared or _Entry(tuple(loaders), mode, feed)
        self._entries[place] = entry
        if found is not None and shared is None:
            feed.inherit(found.feed)
        if found is not None and all(e is not found for e in self._entries.values()):
            found.feed.shutdown()  # the program built its loader anew
        return entry

    def _check_generators(self, place: str, loaders: Sequence[Any]) -> None:
        """Say once if a loop draws from a generator of another one: what a feed records of
        it belongs to one place, and on the way back to another it is as built."""
        if self._told:
            return
        known = libraries()
        own = {id(one): one for _, one in find_generators(list(loaders), known)}
        tracked = {id(one) for _, one in generators_among(self._tracked(), known)}
        for other, entry in self._entries.items():
            there = {id(one) for _, one in find_generators(list(entry.loaders), known)}
            if own.keys() & there - tracked:
                self._told = True
                logger.warning(
                    "the loops %s and %s draw from one generator: track it too, "
                    "run.track(generator=...), or a resume behind the first loop draws other "
                    "numbers",
                    other,
                    place,
                )
                return

    def states(self, open_feeds: Sequence[Feed]) -> dict[str, Any]:
        """The state of each feed that was used, except `open_feeds`, whose loops save it."""
        states: dict[int, Any] = {}
        found = dict(self._saved)
        for place, entry in self._entries.items():
            if not entry.opened:
                continue  # still as it was saved
            if any(feed is entry.feed for feed in open_feeds):
                found.pop(place, None)
                continue
            if id(entry) not in states:
                states[id(entry)] = entry.feed.state()
            found[place] = states[id(entry)]
        return found

    def close(self) -> None:
        """Stop the workers of every loader."""
        for entry in self._entries.values():
            entry.feed.shutdown()


def _same(left: Sequence[Any], right: Sequence[Any]) -> bool:
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))


class TogetherFeed:
    """Several feeds advanced together; an item is a tuple of theirs.

    Mode "min" ends with the first that ends; in "cycle" the others start again until
    each has ended once.
    """

    def __init__(self, feeds: Sequence[Feed], mode: Mode) -> None:
        if mode not in ("min", "cycle"):
            raise UsageError(
                f"mode={mode!r} is not known",
                hint='Two loaders: mode="min" stops with the shorter, "cycle" repeats it.',
            )
        self.name = " and ".join(feed.name for feed in feeds)
        self._feeds = list(feeds)
        self._mode = mode
        self._begin()

    def _begin(self) -> None:
        self._ended = [False] * len(self._feeds)
        # Each is opened when its first item is fetched, since a loader may draw random
        # numbers then: it records the states that it will see again in a replay.
        self._opened = [False] * len(self._feeds)

    def open(self, saved: dict[str, Any] | None) -> bool:
        self._begin()
        if saved is None:
            return True
        if len(saved["feeds"]) != len(self._feeds):
            raise UsageError(
                f"this loop had {len(saved['feeds'])} loaders, and has {len(self._feeds)} now",
                hint="Give run.batches the same loaders.",
            )
        as_saved = [
            feed.open(state)
            for feed, state in zip(self._feeds, saved["feeds"], strict=True)
            if state is not None
        ]
        if all(as_saved):
            self._ended = [bool(ended) for ended in saved["ended"]]
            self._opened = [state is not None for state in saved["feeds"]]
            return True
        return False  # one begins anew, so all do: their items belong together

    def take(self) -> tuple[Any, ...]:
        items: list[Any] = []
        for index, feed in enumerate(self._feeds):
            if not self._opened[index]:
                feed.open(None)
                self._opened[index] = True
            try:
                items.append(feed.take())
            except StopIteration:
                if self._mode == "min":
                    raise
                self._ended[index] = True
                if all(self._ended):
                    raise
                feed.open(None)
                items.append(feed.take())  # raises for an empty one: the loop ends
        return tuple(items)

    def state(self) -> dict[str, Any]:
        return {
            "feeds": [
                feed.state() if opened else None
                for feed, opened in zip(self._feeds, self._opened, strict=True)
            ],
            "ended": list(self._ended),
        }

    def length(self) -> int | None:
        lengths = [feed.length() for feed in self._feeds]
        known = [length for length in lengths if length is not None]
        if len(known) < len(lengths):
            return None
        return min(known) if self._mode == "min" or 0 in known else max(known)

    def close(self) -> None:
        for feed in self._feeds:
            feed.close()

    def shutdown(self) -> None:
        for feed in self._feeds:
            feed.shutdown()

    def inherit(self, before: Any) -> None:
        others = before._feeds if isinstance(before, TogetherFeed) else []
        for feed, other in zip(self._feeds, [*others, *[None] * len(self._feeds)], strict=False):
            feed.inherit(other)
