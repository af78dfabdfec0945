"""The feeds of a run's loops, kept from epoch to epoch.

A loader has state between epochs: generators that go on, workers that persist. So one
feed serves a loader for the whole run, its state is in every checkpoint even while it is
not iterated over, and in a resuming process it is brought there before its first epoch.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, get_args

from holdfast.core.group import ALONE
from holdfast.errors import UsageError
from holdfast.run.console import plural
from holdfast.run.feed import TOGETHER, Feed, Policy
from holdfast.run.iterables import open_feed
from holdfast.run.ledger import Ledger
from holdfast.run.random_states import RandomStates
from holdfast.run.readahead import Origin

Mode = Literal["min", "cycle", "max"]

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
        random: RandomStates | None = None,
    ) -> None:
        self._policy: Policy = policy
        self._random = random or RandomStates()
        self._entries: dict[str, _Entry] = {}
        self._saved: dict[str, Any] = {}
        self.ledger = Ledger()
        self.ranks = ALONE
        """Of the run: set before its first epoch is opened."""

    def restore(self, saved: Mapping[str, Any], held: Iterable[dict[str, Any]] = ()) -> None:
        """Go on from what `states` and `held` returned."""
        self._saved = dict(saved)
        self.ledger.restore(held)

    def held(self, inside: Sequence[Feed]) -> list[dict[str, Any]]:
        """The objects that loaders keep state in. `inside`: the feed, if any, that a run
        which stops here goes on with, within an epoch."""
        return self.ledger.state([held for feed in inside for held in feed.held])

    def met(self, place: str, origin: Origin | None) -> None:
        """A loop of the checkpoint is met on the way back: what the loops in it have used
        is brought to where it was at the save, so far as variables reach it."""
        for inner, loader in self.ledger.met(place, origin):
            if inner in self._saved:
                self.passed(inner, [loader], "min", self.feed_for([loader], "min"))

    def feed_for(self, loaders: Sequence[Any], mode: Mode) -> Feed:
        """The feed that already serves these loaders, or a new one."""
        for entry in self._entries.values():
            if entry.mode == mode and _same(entry.loaders, loaders):
                return entry.feed
        feeds = [open_feed(loader, policy=self._policy) for loader in loaders]
        for feed in feeds:
            feed.random, feed.ranks = self._random, lambda: self.ranks
        return feeds[0] if len(feeds) == 1 else TogetherFeed(feeds, mode)

    def open(
        self,
        place: str,
        loaders: Sequence[Any],
        mode: Mode,
        feed: Feed,
        saved: Any,
        *,
        again: bool = False,
    ) -> bool:
        """Begin an epoch at `place` (`saved` None), or go to the saved one. As Feed.open.
        `again`: the item that comes next was in progress when the run stopped."""
        if saved is not None and (had := len(_states_in(saved))) != len(loaders):
            raise UsageError(
                f"this loop had {plural(had, 'loader')}, and has {len(loaders)} now",
                hint="Give run.batches the same loaders.",
            )
        entry = self.bind(place, loaders, mode, feed)
        before = self._take_saved(entry)
        if saved is None and not entry.opened:
            if before is not None:
                self._settle(feed, loaders, before)
            else:
                self._warn_alike(feed)
        entry.opened = True
        fixed = "the body of one of its items was half done, with loops of its own" if again else ""
        return feed.open(saved, fixed=fixed)

    def passed(self, place: str, loaders: Sequence[Any], mode: Mode, feed: Feed) -> None:
        """The loop at `place` had ended before the checkpoint: what its loaders hold is
        brought to where it was then. Random states may be moved."""
        entry = self.bind(place, loaders, mode, feed)
        before = self._take_saved(entry)
        if before is not None and not entry.opened:
            with self.ledger.passed():
                self._settle(feed, loaders, before)
            entry.opened = True

    def _settle(self, feed: Feed, loaders: Sequence[Any], before: Any) -> None:
        """Bring a feed that was not used in this process to where its last epoch ended."""
        if len(_states_in(before)) != len(loaders):
            return  # between epochs that may change
        # Between epochs tracked generators are what the checkpoint and the prologue
        # made of them: later than what the feed knows, the end of its last epoch.
        random = self._random.capture()
        feed.open(before)
        feed.close()
        self._random.apply(random)

    def _warn_alike(self, feed: Feed) -> None:
        """The feed has no state in the checkpoint. Say so if what it holds may be what
        another loop has used and was not put back."""
        moved = dict(_moved(self._saved))
        for held in feed.held:
            known = self.ledger.known(besides=held)
            for path, one in held.places().items():
                loop = self.ledger.refused(one)
                built = held.built(path) or ""
                if not loop and one.key not in known and not self.ledger.explains(built):
                    loop = moved.get(built, "")
                if loop:
                    logger.warning(
                        "%s: its %s is as this process made it; the loop %s drew from it or from "
                        "one like it. Unless the program seeds it, or it is another one, this "
                        "epoch has another order than in a run that was not stopped: track it, "
                        "run.track(generator=generator).",
                        *(feed.name, path, loop),
                    )

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
        shared = next((e for e in self._entries.values() if e.feed is feed), None)
        entry = shared or _Entry(tuple(loaders), mode, feed)
        self._entries[place] = entry
        if shared is None:
            for held in feed.held:
                held.join(self.ledger)
        if found is not None and shared is None:
            feed.inherit(found.feed)
        if found is not None and all(e is not found for e in self._entries.values()):
            found.feed.shutdown()  # the program built its loader anew
            self.ledger.release(place, found.feed.held)
        if shared is None:
            self.ledger.note(place, feed.held, loaders if feed.moves else ())
        return entry

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


def _moved(saved: Mapping[str, Any]) -> Iterator[tuple[str, str]]:
    """Generators in saved states that were drawn from: what each was built as, and the
    place of its loop."""
    for place, state in saved.items():
        for one in _states_in(state):
            entries = [] if one is None else [one.get("held_now", {}), one.get("augmenting", {})]
            for entry in [entry for found in entries for entry in found.values()]:
                drawn = "library" in entry and entry["now"] != entry["built"]
                if drawn and entry["lasts"] is not False:
                    yield entry["built"], place


def _states_in(saved: Mapping[str, Any]) -> list[Any]:
    """What the loop that saved this state had: one for each of its loaders."""
    return saved.get("feeds", [saved])


def _same(left: Sequence[Any], right: Sequence[Any]) -> bool:
    return len(left) == len(right) and all(a is b for a, b in zip(left, right, strict=True))


class TogetherFeed:
    """Several feeds advanced together; an item is a tuple of theirs.

    Mode "min" ends with the first that ends; in "cycle" the others start again until
    each has ended once; in "max" they give None until then.
    """

    def __init__(self, feeds: Sequence[Feed], mode: Mode) -> None:
        if mode not in get_args(Mode):
            raise UsageError(
                f"mode={mode!r} is not known",
                hint='Two loaders: mode="min" stops with the shorter, "cycle" repeats it, "max" '
                "gives None in its place.",
            )
        self.name = " and ".join(feed.name for feed in feeds)
        self.held = [held for feed in feeds for held in feed.held]
        self.moves = False
        self._feeds = list(feeds)
        self._mode = mode
        self._begin()

    def _begin(self) -> None:
        self._ended = [False] * len(self._feeds)
        # Each is opened when its first item is fetched, since a loader may draw random
        # numbers then: it records the states that it will see again in a replay.
        self._opened = [False] * len(self._feeds)

    def open(self, saved: dict[str, Any] | None, *, fixed: str = "") -> bool:
        self._begin()
        if saved is None:
            return True
        fixed = fixed or TOGETHER
        as_saved = [
            feed.open(state, fixed=fixed)
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
                if self._mode == "max":
                    items.append(None)
                    continue
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
