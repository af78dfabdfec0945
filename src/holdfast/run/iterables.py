"""Feeds for iterables of plain Python: sequences, loaders that know their position, others."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np

from holdfast.core.frameworks import adapter_for_value
from holdfast.errors import LoopError
from holdfast.run.console import plural
from holdfast.run.feed import BaseFeed, Policy, Stateful, describe
from holdfast.run.held import Held
from holdfast.run.randomness import PrivateStreams, data_module


def open_feed(loader: Any, *, policy: Policy = "refuse") -> BaseFeed:
    """The feed for `loader`. Keep it as long as the loader: it remembers what the loader
    was like when it was first seen, and holds workers that persist between epochs.

    Raises LoopError for what cannot be iterated over in the same order again.
    """
    adapter = adapter_for_value(loader)
    if adapter is not None:
        module = data_module(adapter.name)
        feed = None if module is None else module.feed(loader, policy=policy)
        if feed is not None:
            return feed
    if isinstance(loader, Stateful) and not isinstance(loader, type):
        return AskedFeed(loader, policy=policy)
    if _by_index(loader):
        return SequenceFeed(loader, policy=policy)
    if isinstance(loader, set | frozenset):
        raise LoopError(
            f"a {type(loader).__name__} has another order in each process, so it cannot be resumed",
            hint="Iterate over sorted(...) of it.",
        )
    if not isinstance(loader, Iterable) and not hasattr(loader, "__getitem__"):
        raise LoopError(
            f"{describe(loader)} cannot be iterated over",
            hint="Give run.batches a DataLoader, a sequence, or another iterable.",
        )
    return CountedFeed(loader, policy=policy)


def _by_index(loader: object) -> bool:
    if isinstance(loader, range | list | tuple):
        # A subclass may iterate otherwise than by index.
        return type(loader).__iter__ in (range.__iter__, list.__iter__, tuple.__iter__)
    if isinstance(loader, np.ndarray):
        return loader.ndim > 0
    return isinstance(loader, Sequence) and type(loader).__iter__ is Sequence.__iter__


class SequenceFeed(BaseFeed):
    """A range or another sequence, by index: nothing is skipped by iterating."""

    kind = "sequence"

    def _undealt(self, saved: dict[str, Any]) -> str:
        if isinstance(self.loader, range):
            return ""  # numbers to count by, the same on all ranks
        return super()._undealt(saved)

    def _begin(self) -> None:
        pass

    def _prepare(self, saved: dict[str, Any]) -> list[str]:
        return []

    def _resume(self, saved: dict[str, Any]) -> None:
        pass

    def _record(self) -> dict[str, Any]:
        return {}

    def _next(self) -> Any:
        if self._taken >= len(self.loader):
            raise StopIteration
        return self.loader[self._taken]


class AskedFeed(BaseFeed):
    """A loader with `state_dict` and `load_state_dict`: it is asked, at saves only."""

    kind = "asked"

    def __init__(
        self,
        loader: Any,
        *,
        policy: Policy = "refuse",
        guard: Callable[[], AbstractContextManager[Any]] = nullcontext,
        tell: Sequence[object] = (),
    ) -> None:
        """`tell`: what in the loader may say whose part of the data it deals."""
        super().__init__(loader, policy=policy)
        self._tell = [loader, *tell]
        self.moves = True
        self._guard = guard
        self._iterator: Iterator[Any] | None = None
        self._rng: dict[str, Any] | None = None
        self._left = False
        self._guessed = False  # was told a saved end, though nobody knew if it lasts

    def identity(self) -> dict[str, Any]:
        # Its length may be what is left, and what may change is for it to say.
        return {"type": self.name}

    def _begin(self) -> None:
        self._left = False
        self._rng = self.random.capture()
        with self._guard():
            self._iterator = iter(self.loader)

    def _prepare(self, saved: dict[str, Any]) -> list[str]:
        self._rng, self._left = saved["rng"], False
        self.loader.load_state_dict(saved["state"])
        return []

    def _resume(self, saved: dict[str, Any]) -> None:
        # It may draw as it starts: a base seed for its workers, an order.
        self.random.apply(saved["rng"])
        with self._guard():
            self._iterator = iter(self.loader)

    def _settle(self, saved: dict[str, Any]) -> None:
        self._rng = saved["rng"]
        # A StatefulDataLoader skips what its sampler yielded, which may be fewer items now.
        other = len(self._tell) > 1 and bool(self._other_ranks(saved))
        self._left = saved["state"] is None or self._lasts is False or other
        if not self._left:
            self._guessed = self._lasts is None
            self.loader.load_state_dict(saved["state"])

    def _share(self, before: AskedFeed) -> list[str]:
        return [self.name] if before._guessed else []

    def _record(self) -> dict[str, Any]:
        # An epoch that was left early is not gone on with: the next one begins anew.
        return {"rng": self._rng, "state": None if self._left else self.loader.state_dict()}

    def _next(self) -> Any:
        if self._iterator is None:
            raise StopIteration
        with self._guard():
            try:
                return next(self._iterator)
            except StopIteration:
                self._left = False
                raise

    def _drop(self) -> None:
        self._iterator = None

    def close(self) -> None:
        self._left = self._left or self._at == "inside"
        super().close()


class CountedFeed(BaseFeed):
    """Any other iterable: consumed items are iterated over again and thrown away.

    What it draws from the global generators is replayed exactly (`PrivateStreams`).
    An iterator (a generator, a file) can be gone through once, by one loop or several.
    """

    kind = "counted"

    def __init__(
        self,
        loader: Any,
        *,
        policy: Policy = "refuse",
        guard: Callable[[], AbstractContextManager[Any]] = nullcontext,
        tell: Sequence[object] = (),
    ) -> None:
        """`tell`: what in the loader may say whose part of the data it deals."""
        super().__init__(loader, policy=policy)
        self._tell = [loader, *tell]
        self._guard = guard
        self._once = isinstance(loader, Iterator)
        self.moves = self._once
        self._held = Held({"loader": loader})
        self.held = [self._held]
        self._iterator: Iterator[Any] | None = None
        self._streams: PrivateStreams | None = None
        self._start_state: dict[str, Any] = {}
        self._before = 0  # items that earlier loops took of a one-shot iterator
        self._exhausted = False

    def _begin(self) -> None:
        if self._once and self._iterator is not None:
            if self._exhausted:
                raise LoopError(
                    f"this {self.name} has been iterated over to its end",
                    hint="An iterator goes once. Give run.batches an object whose __iter__ "
                    "starts anew (a list, a DataLoader, a class), and one per epoch.",
                )
            return
        self._held.begin()
        self._start_state = {"rng": self.random.capture(), "held": self._held.state()}
        self._iterate()

    def _rewind(self, saved: dict[str, Any]) -> None:
        self._held.restore(saved["held"])

    def _iterate(self) -> None:
        self._streams = PrivateStreams()
        # Of an iterator, too: it may be one that only its own `iter` makes ready.
        self._iterator = iter(self.loader)

    def _prepare(self, saved: dict[str, Any]) -> list[str]:
        self._held.restore(saved["held"])  # other differences are not known to matter
        return []

    def _resume(self, saved: dict[str, Any]) -> None:
        self._replay(saved, self._taken)
        self._held.put(saved.get("generators", {}))

    def _settle(self, saved: dict[str, Any]) -> None:
        if not self._once or saved["exhausted"] or self._lasts is False:
            # (An exhausted iterator has been replaced by another: nobody can have gone
            # on with it.)
            self._start_state = {"rng": saved["rng"], "held": saved["held"]}
            self._held.settle(saved["held_now"])
        else:
            # Left early, and the next loop goes on with it.
            rng = self.random.capture()
            self._held.restore(saved["held"])
            self._replay(saved, 0)
            self.random.apply(rng)
            self._held.settle(saved["held_now"])

    def _replay(self, saved: dict[str, Any], taken: int) -> None:
        if self._once and self._iterator is not None:
            raise LoopError(
                f"this {self.name} has been used and cannot go back",
                hint="Build it anew, or give run.batches an iterable that can start again.",
            )
        self._start_state = {"rng": saved["rng"], "held": saved["held"]}
        self._before = int(saved["before"])
        self._exhausted = bool(saved["exhausted"])
        self.random.apply(saved["rng"])
        self._iterate()
        for number in range(self._before + taken):
            try:
                self._pull()
            except StopIteration:
                raise LoopError(
                    f"{self.name} has only {plural(number, 'item')} now; "
                    f"{self._before + taken:,} had been taken when the checkpoint was made",
                    hint="Put its data back, or start the run at another address.",
                ) from None

    def _pull(self) -> Any:
        assert self._iterator is not None
        assert self._streams is not None
        with self._streams, self._guard():
            return next(self._iterator)

    def _next(self) -> Any:
        if self._iterator is None:
            raise StopIteration
        try:
            return self._pull()
        except StopIteration:
            self._exhausted = True
            raise

    def _ended(self) -> None:
        self._held.end()

    def _share(self, before: CountedFeed) -> list[str]:
        return self._held.inherit(before._held)

    def _record(self) -> dict[str, Any]:
        return {
            **self._start_state,
            "held_now": self._held.state() if self._at == "end" else {},
            "generators": self._held.generators() if self._at == "inside" else {},
            "before": self._before,
            "exhausted": self._exhausted,
        }

    def _drop(self) -> None:
        if self._once:
            self._before, self._taken = self._before + self._taken, 0
        else:
            self._iterator = None
