"""Random programs of nested loops, run on the loop engine with a host that keeps
checkpoints in memory and can stop at any place where one could be taken."""

from __future__ import annotations

import copy
import random
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

from holdfast.core.rng import apply_rng, capture_rng
from holdfast.run import position as at
from holdfast.run.engine import Engine
from holdfast.run.feeds import FeedBook
from holdfast.run.loop import IndexFeed, Loop
from holdfast.run.position import Label, Replay
from holdfast.run.random_states import RandomStates

# -- programs -----------------------------------------------------------------


@dataclass(frozen=True)
class Act:
    """Changes the state, with a random number."""

    tag: int


@dataclass(frozen=True)
class Draw:
    """Draws a random number into a local of the body."""


@dataclass(frozen=True)
class Use:
    """Puts the body's local into the state."""


@dataclass(frozen=True)
class For:
    """A loop; `leave_at`: the item in whose body it is left by `break`; `only_at`: the
    one item of the loop around it in which it runs."""

    kind: str
    n: int
    counted: bool
    named: bool
    leave_at: int | None
    body: tuple[Any, ...]
    only_at: int | None = None


def programs() -> st.SearchStrategy[tuple[Any, ...]]:
    """Bodies of one to three statements, nested at most three loops deep."""
    plain = st.one_of(st.builds(Act, st.integers(0, 9)), st.builds(Draw), st.builds(Use))

    def loops(body: st.SearchStrategy[tuple[Any, ...]]) -> st.SearchStrategy[For]:
        return st.builds(
            For,
            kind=st.sampled_from(["epochs", "range", "batches"]),
            n=st.integers(0, 3),
            counted=st.sampled_from([True, True, True, False]),
            named=st.booleans(),
            leave_at=st.one_of(st.none(), st.none(), st.integers(0, 2)),
            body=body,
            only_at=st.one_of(st.none(), st.none(), st.integers(0, 2)),
        )

    body = st.lists(plain, max_size=2).map(tuple)
    for _ in range(2):
        body = st.lists(st.one_of(plain, loops(body)), max_size=3).map(tuple)
    outer = st.one_of(plain, loops(body))
    return st.lists(outer, min_size=1, max_size=3).map(tuple)


class Shuffled:
    """A loader that draws its order when an epoch starts, and noise at each item."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[tuple[int, float]]:
        for index in random.sample(range(self.n), self.n):
            yield index, random.random()


# -- running them -------------------------------------------------------------


class Killed(BaseException):
    pass


@dataclass
class Checkpoint:
    loop: Any
    trace: list[Any]
    rng: Any
    feeds: Any
    step: int


@dataclass
class Process:
    """One process that runs a program, from a checkpoint or from nothing.

    `die_at`: the number of the place where it is killed, of those that could be saved.
    """

    checkpoint: Checkpoint | None = None
    die_at: int | None = None
    trace: list[Any] = field(default_factory=list)
    places: int = 0
    saved: Checkpoint | None = None
    landed: int = 0

    def __post_init__(self) -> None:
        self.random = RandomStates()
        self.engine = Engine(self)
        self.book = FeedBook()
        self.loaders: dict[int, Shuffled] = {}

    # -- the host --

    def start(self) -> Replay | None:
        if self.checkpoint is None:
            return None
        self._restore(rng=True)
        self.book.restore(self.checkpoint.feeds)
        return Replay(at.from_tree(self.checkpoint.loop))

    def redrawn(self, passed: Label, following: Loop) -> None:
        raise AssertionError(f"random numbers between {passed} and {following.label}")

    def land(self, *, over: bool, rng: bool) -> None:
        self.landed += 1
        self._restore(rng=rng)

    def _restore(self, *, rng: bool) -> None:
        assert self.checkpoint is not None
        self.trace[:] = copy.deepcopy(self.checkpoint.trace)
        if rng:
            apply_rng(self.checkpoint.rng)

    def before_item(self, loop: Loop) -> None:
        pass

    def took(self, loop: Loop, item: Any) -> None:
        pass

    def acted(self) -> bool:
        return False

    def left(self, loop: Loop, following: Loop) -> None:
        pass

    def opened(self, loop: Loop, *, first_inside: bool) -> None:
        pass

    def open_feed(self, loop: Loop, saved: Any) -> bool:
        if not loop.loaders:
            return loop.feed.open(saved)
        return self.book.open(loop.place, loop.loaders, loop.mode, loop.feed, saved)

    def passed(self, loop: Loop) -> None:
        if loop.loaders:
            self.book.passed(loop.place, loop.loaders, loop.mode, loop.feed)

    def completed(self, *, is_step: bool) -> None:
        pass

    def boundary(self, loop: Loop, *, last: bool) -> None:
        self._place()

    def tail(self) -> None:
        self._place()

    def outermost_done(self) -> None:
        self._place()

    def interrupted(self, error: Any) -> None:
        raise error

    def _place(self) -> None:
        if not self.engine.position.replayable:
            return
        if self.places == self.die_at:
            position = self.engine.snapshot()
            feeds = self.book.states(self.engine.open_feeds())
            self.saved = copy.deepcopy(
                Checkpoint(at.to_tree(position), self.trace, capture_rng(), feeds, position.step)
            )
            raise Killed
        self.places += 1

    # -- the program --

    def run(self, program: tuple[Any, ...], seed: int = 7) -> None:
        random.seed(seed)
        self._block(program, {}, ())

    def _block(self, block: tuple[Any, ...], local: dict[str, Any], path: tuple[int, ...]) -> None:
        for index, statement in enumerate(block):
            here = (*path, index)
            match statement:
                case Act(tag):
                    self.trace.append((tag, random.random()))
                case Draw():
                    local["drawn"] = random.random()
                case Use():
                    self.trace.append(("use", local.get("drawn")))
                case For(only_at=only_at):
                    if only_at is None or only_at == local.get("item", only_at):
                        self._for(statement, local, here)

    def _for(self, loop: For, local: dict[str, Any], path: tuple[int, ...]) -> None:
        for item in self._open(loop, path):
            number = item[0] if isinstance(item, tuple) else item
            self.trace.append((path, item, self.engine.position.step))
            self._block(loop.body, {**local, "item": number}, path)
            if number == loop.leave_at:
                break

    def _open(self, loop: For, path: tuple[int, ...]) -> Loop:
        self.engine.start()
        label = Label(loop.kind, str(path) if loop.named else "")
        if loop.kind == "batches":
            loader = self.loaders.setdefault(hash(path), Shuffled(loop.n))
            feed = self.book.feed_for([loader], "min")
            return Loop(self.engine, label, feed, counted=loop.counted, loaders=[loader])
        return Loop(self.engine, label, IndexFeed(range(loop.n)), counted=loop.counted)
