"""Generators that a loader shares: with another loader, with the training loop, with tail
and prologue."""

from __future__ import annotations

import random
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Sampler

import holdfast
from tests.support.jobs import fresh_address, kill_everywhere


def loader(n: int, generator: torch.Generator, **options: Any) -> DataLoader[Any]:
    return DataLoader(range(n), 2, shuffle=True, generator=generator, **options)  # type: ignore[arg-type]


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


@pytest.mark.parametrize("mode", ["min", "cycle"])
def test_two_loaders_that_share_one(mode: Any) -> None:
    """In "cycle" the shorter one starts again, and draws, in the middle of the longer."""

    def script(address: str, die: Any, trace: list) -> None:
        run = holdfast.Run(address, every=1, quiet=True).track(trace=trace)
        shared = seeded()
        short, long = loader(4, shared), loader(12, shared)
        for _ in run.epochs(2):
            for a, b in run.batches(short, long, mode=mode):
                die()
                trace.append((a.tolist(), b.tolist()))

    kill_everywhere(script)


def test_a_training_loop_that_draws_from_the_loaders_generator() -> None:
    def script(address: str, die: Any, trace: list) -> None:
        run = holdfast.Run(address, every=1, quiet=True).track(trace=trace)
        shared = seeded()
        data = loader(6, shared)
        for _ in run.epochs(3):
            die()
            for batch in run.batches(data):
                die()
                trace.append((batch.tolist(), torch.rand((), generator=shared).item()))

    kill_everywhere(script)


def test_a_training_loop_that_draws_from_the_generator_of_a_loader_with_workers() -> None:
    traces: list[list[Any]] = []
    for stops in ((99,), (2, 3, 99)):
        trace: list[Any] = []
        address = f"memory://shared-{len(stops)}"
        for stop in stops:
            trace.clear()
            run = holdfast.Run(address, every=1, quiet=True).track(trace=trace)
            shared = seeded()
            data = loader(6, shared, num_workers=1)
            for _ in run.epochs(2):
                for number, batch in enumerate(run.batches(data)):
                    if number == stop % 3 and stop < 99:
                        break
                    trace.append((batch.tolist(), torch.rand((), generator=shared).item()))
                else:
                    continue
                break
            run.close()
        traces.append(list(trace))
    assert traces[0] == traces[1]


class Shuffling(Sampler[int]):
    def __init__(self, rng: random.Random) -> None:
        self.rng = rng

    def __iter__(self) -> Iterator[int]:
        return iter(self.rng.sample(range(6), 6))

    def __len__(self) -> int:
        return 6


def test_a_tracked_generator_that_prologue_and_tail_draw_from() -> None:
    """What they drew is in the checkpoint; where the sampler's last epoch ended is older."""

    def script(address: str, die: Any, trace: list) -> None:
        rng = random.Random(3)
        run = holdfast.Run(address, every=1, quiet=True).track(trace=trace, rngs=[rng])
        data = DataLoader(range(6), 2, sampler=Shuffling(rng))  # type: ignore[arg-type]
        for _ in run.epochs(3):
            trace.append(rng.random())
            die()
            for batch in run.batches(data):
                die()
                trace.append((batch.tolist(), rng.random()))
            trace.append(rng.random())
            die()

    kill_everywhere(script)


def shuffled(rng: random.Random) -> Iterator[int]:
    """A shuffle buffer: what it draws next depends on what it drew before."""
    buffer = list(range(8))
    while buffer:
        yield buffer.pop(rng.randrange(len(buffer)))


@pytest.mark.parametrize("tracked", [False, True])
def test_a_python_generator_with_a_generator_among_its_arguments(tracked: bool) -> None:
    def script(address: str, die: Any, trace: list) -> None:
        rng = random.Random(3)
        run = holdfast.Run(address, every=1, quiet=True).track(trace=trace)
        if tracked:
            run.track(rng=rng)
        for _ in run.epochs(3):
            die()
            for number in run.batches(shuffled(rng)):
                die()
                trace.append(number)
            trace.append(rng.random())
            die()

    kill_everywhere(script)


def test_an_endless_python_generator_that_is_left_in_each_epoch() -> None:
    def endless(rng: random.Random) -> Iterator[int]:
        while True:
            yield from shuffled(rng)

    def script(address: str, die: Any, trace: list) -> None:
        run = holdfast.Run(address, every=1, quiet=True).track(trace=trace)
        stream = endless(random.Random(3))
        for _ in run.epochs(3):
            die()
            for number in run.batches(stream):
                die()
                trace.append(number)
                if run.batch == 4:
                    break

    kill_everywhere(script)


class Permuting(Sampler[int]):
    """Draws from a generator of NumPy that it holds."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(3)

    def __iter__(self) -> Iterator[int]:
        yield from self.rng.permutation(6).tolist()

    def __len__(self) -> int:
        return 6


@pytest.mark.parametrize("every", [1, "epoch"])
@pytest.mark.parametrize("kind", ["generator", "sampler"])
def test_a_cell_that_runs_again_has_the_loader_of_the_first_time(kind: str, every: Any) -> None:
    """What another run of this process has moved still counts as built by the program."""

    def build() -> DataLoader[Any]:
        if kind == "generator":
            return loader(6, seeded())
        return DataLoader(range(6), 2, sampler=Permuting())  # type: ignore[arg-type]

    def cell(address: str, data: Any, trace: list, stop: tuple[int, int] | None = None) -> None:
        run = holdfast.Run(address, every=every, quiet=True).track(trace=trace)
        for epoch in run.epochs(3):
            for number, batch in enumerate(run.batches(data)):
                if (epoch, number) == stop:
                    run.close()
                    return
                trace.append((epoch, batch.tolist()))

    whole: list[Any] = []
    cell(fresh_address(), build(), whole)
    first = (0, 1) if every == 1 else (1, 0)  # before it nothing was saved
    for stop in [(epoch, number) for epoch in range(3) for number in range(3)]:
        if stop < first:
            continue
        address, data, again = fresh_address(), build(), []
        cell(address, data, [], stop)
        cell(address, data, again)
        assert again == whole, stop
