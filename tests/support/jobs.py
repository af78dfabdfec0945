"""A small training job in plain Python and NumPy that can be killed at any line."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet
from zlib import crc32

import numpy as np

import holdfast
from holdfast.manager import manager
from holdfast.manager.saver import Saver
from holdfast.stores.memory import MemoryStore
from tests.support.exhaustive import EXHAUSTIVE

_numbers = itertools.count()


def fresh_address() -> str:
    """A run in memory that no other test uses."""
    return f"memory://run-{next(_numbers)}"


_savers: WeakSet[Saver] = WeakSet()


class _Known(Saver):
    """One that can be waited for."""

    def __init__(self, *args: Any, **named: Any) -> None:
        super().__init__(*args, **named)
        _savers.add(self)


manager.Saver = _Known  # type: ignore[misc]


def savers() -> list[Saver]:
    """Those of this process, which can be waited for."""
    return list(_savers)


def copied(address: str) -> str:
    """Another run in memory, with what this one's store holds once no save is in progress."""
    for saver in savers():
        saver.finish()
    store, other = (
        MemoryStore.named(one.removeprefix("memory://")) for one in (address, fresh_address())
    )
    with store._lock:
        other._objects.update(store._objects)
    return other.address


class Killed(BaseException):
    """The process dies here: nothing is closed or flushed by the program."""


class Model:
    """Weights that depend on every random number and batch, with `state_dict`."""

    def __init__(self) -> None:
        self.weights = np.zeros(3)
        self.seen = 0

    def step(self, batch: Any) -> float:
        self.weights = self.weights * 0.9 + np.random.rand(3) + float(np.sum(batch))
        self.seen += 1
        return float(self.weights.sum())

    def state_dict(self) -> dict[str, Any]:
        return {"weights": self.weights, "seen": self.seen}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.weights = np.array(state["weights"])
        self.seen = state["seen"]


class Shuffled:
    """A loader that draws its order at the start of an epoch."""

    def __init__(self, n: int) -> None:
        self.n = n

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Iterator[float]:
        yield from np.random.permutation(self.n) + random.random()


@contextmanager
def process(seed: int = 1) -> Iterator[None]:
    """What a new process has: its own random states, and an end by `Killed`."""
    random.seed(seed)
    np.random.seed(seed)
    try:
        yield
    except Killed:
        pass


class Countdown:
    """Dies at the n-th call; `calls` tells how many there were."""

    def __init__(self, n: int | None = None) -> None:
        self.n = n
        self.calls = 0

    def __call__(self) -> None:
        if self.calls == self.n:
            raise Killed
        self.calls += 1


Script = Callable[[str, Countdown, list[Any]], None]


class Copying(Countdown):
    """Copies the run at each call: what a process that is killed there leaves behind."""

    def __init__(self, address: str) -> None:
        super().__init__()
        self.address = address
        self.left: list[str] = []

    def __call__(self) -> None:
        self.left.append(copied(self.address))
        super().__call__()


def kill_everywhere(script: Script, *, only: Callable[[int], bool] | None = None) -> int:
    """Run `script(address, die, trace)`, and from what it has left at each of its `die()` calls
    (those whose number is `only`; else every third one, but in `make exhaustive`) run it again:
    each must end with the trace of the first. Returns the number of calls.

    The script tracks `trace`, so that after a resume it holds what the first one did.
    """
    address = fresh_address()
    places, whole = Copying(address), list[Any]()
    with process():
        script(address, places, whole)
    assert whole
    chosen = [*filter(only, range(len(places.left)))] if only else [*range(len(places.left))]
    if only is None and not EXHAUSTIVE:
        chosen = chosen[crc32(script.__qualname__.encode()) % 3 :: 3]
    for number, left in enumerate(places.left):
        if number in chosen:
            trace: list[Any] = []
            with process():
                script(left, Countdown(), trace)
            assert trace == whole, f"killed at place {number}"
    return places.calls


def train(
    run: holdfast.Run, model: Model, loader: Any, epochs: int, die: Callable[[], None]
) -> None:
    """The plain loop, with places to die at."""
    for epoch in run.epochs(epochs):
        die()
        for batch in run.batches(loader):
            die()
            run.log(loss=model.step(batch))
            die()
        die()
        run.log(val_loss=abs(3 - epoch))
        die()


def steps_of(address: str) -> list[int]:
    with holdfast.CheckpointManager(address) as manager:
        return [info.step for info in manager.checkpoints()]


def killed_at(step: int, loop: Any) -> str:
    """The address of a run that was killed after `step` steps of `loop(run)`."""
    address = fresh_address()
    with process():
        run = holdfast.Run(address, every=1, quiet=True)
        for _ in loop(run):
            if run.step == step:
                raise Killed
    return address
