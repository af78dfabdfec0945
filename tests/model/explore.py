"""Breadth-first search through every interleaving of a scenario.

A process's local state is what its suspended generator holds: where it stands and its
local variables. Two histories that lead to equal local states go on alike, so the search
merges them. Generators cannot be copied; a local state therefore keeps one history of
results that leads to it, and one more step replays that history (once: successors are
remembered, so the search itself is table look-ups). Programs must keep all that they
will need in local variables: `test_merging_is_sound` compares with a search that merges
only equal histories.
"""

from __future__ import annotations

import gc
from collections.abc import Callable, Hashable, Iterable, Iterator
from dataclasses import dataclass, field
from types import GeneratorType
from typing import Any, NamedTuple

from .operations import Program
from .protocol import Process

FINISHED = 0
"""The local state of every program that has ended."""


class Violation(Exception):
    """Something that must always hold does not."""

    def __init__(self, invariant: str, text: str) -> None:
        super().__init__(f"{invariant}: {text}")
        self.invariant = invariant


class Local(NamedTuple):
    """One local state."""

    thread: int
    operation: Any
    history: tuple[Any, ...]


@dataclass
class Locals:
    """All local states met so far, and their successors."""

    programs: list[Callable[[], Program]]
    """By thread; restarted programs follow those that run from the start."""
    decode: Callable[[Any], Any]
    """From a result as states hold it to what the program is sent."""
    merge: bool = True
    table: list[Local] = field(default_factory=lambda: [Local(-1, None, ())])
    endings: set[tuple[int, str]] = field(default_factory=set[tuple[int, str]])
    _index: dict[Hashable, int] = field(default_factory=dict[Hashable, int])
    _suspended: dict[int, Program] = field(default_factory=dict[int, Program])
    """Programs that wait in a local state whose first successor they will become."""
    _next: dict[tuple[int, Hashable], int] = field(default_factory=dict[tuple[int, Hashable], int])

    def start(self, thread: int) -> int:
        return self._reach(thread, ())

    def step(self, local: int, result: Hashable) -> int:
        """The local state after the operation of `local` gave `result`."""
        try:
            return self._next[local, result]
        except KeyError:
            state = self.table[local]
            history = (*state.history, self.decode(result))
            found = self._reach(state.thread, history, self._suspended.pop(local, None))
            self._next[local, result] = found
            return found

    def _reach(
        self, thread: int, history: tuple[Any, ...], suspended: Program | None = None
    ) -> int:
        """`suspended`: the program as it is before the last result of `history`."""
        generator = suspended or self.programs[thread]()
        try:
            operation = None if suspended else next(generator)
            for result in history[-1:] if suspended else history:
                operation = generator.send(result)
        except StopIteration as end:
            self.endings.add((thread, str(end.value)))
            return FINISHED
        key = (thread, frames(generator) if self.merge else history)
        found = self._index.setdefault(key, len(self.table))
        if found == len(self.table):
            self.table.append(Local(thread, operation, history))
            self._suspended[found] = generator
        return found


def frames(generator: Program) -> Hashable:
    """Where a suspended generator stands, with the local variables of all its frames."""
    parts: list[Hashable] = []
    inner: Any = generator
    while isinstance(inner, GeneratorType):
        frame: Any = inner.gi_frame
        parts.append((frame.f_code.co_name, frame.f_lasti, _frozen(frame.f_locals)))
        inner = inner.gi_yieldfrom
    return tuple(parts)


def _frozen(values: dict[str, Any]) -> Hashable:
    return tuple(
        (name, value.name if isinstance(value, Process) else value)
        for name, value in sorted(values.items())
    )


State = tuple[Any, ...]


@dataclass
class Explored:
    """What a search found."""

    states: int
    violation: Violation | None
    trace: list[str]
    """The shortest way to the violation."""
    endings: set[tuple[str, str]]
    """How each program ended, in some interleaving."""
    visited: list[State]

    def __str__(self) -> str:
        if self.violation is None:
            return f"{self.states} states, nothing found"
        steps = "\n".join(f"{i:3} {label}" for i, label in enumerate(self.trace, 1))
        return f"{self.violation}\n{steps}"


class Model:
    """What `search` needs of a world."""

    def initial(self) -> State:
        raise NotImplementedError

    def successors(self, state: State) -> Iterator[tuple[Any, State | Violation]]:
        raise NotImplementedError

    def describe(self, label: Any) -> str:
        raise NotImplementedError

    def endings(self) -> Iterable[tuple[str, str]]:
        raise NotImplementedError


def search(model: Model, *, most_states: int = 3_000_000) -> Explored:
    """Visit every reachable state; stop at the first violation, which is a nearest one.

    Raises OverflowError rather than leave states out.
    """
    collecting = gc.isenabled()
    gc.disable()  # nothing here is cyclic garbage, and there are millions of tuples to scan
    try:
        return _search(model, most_states)
    finally:
        if collecting:
            gc.enable()


def _search(model: Model, most_states: int) -> Explored:
    start = model.initial()
    seen: dict[State, int] = {start: 0}
    queue: list[State] = [start]
    came: list[tuple[int, Any]] = [(-1, None)]
    at = 0
    while at < len(queue):
        for label, after in model.successors(queue[at]):
            if isinstance(after, Violation):
                trace = _trace(model, came, at, label)
                return Explored(len(queue), after, trace, set(model.endings()), queue)
            if after not in seen:
                seen[after] = len(queue)
                queue.append(after)
                came.append((at, label))
        at += 1
        if len(queue) > most_states:
            raise OverflowError(f"more than {most_states} states")
    return Explored(len(queue), None, [], set(model.endings()), queue)


def _trace(model: Model, came: list[tuple[int, Any]], at: int, last: Any) -> list[str]:
    labels = [last]
    while at > 0:
        at, label = came[at]
        labels.append(label)
    return [model.describe(label) for label in reversed(labels)]
