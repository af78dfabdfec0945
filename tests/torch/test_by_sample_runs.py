"""`Run(data="by-sample")`: runs whose loader changes at each kill, against a plain loop.

The reference knows nothing of feeds. It has an epoch's order as a list, cuts batches off it,
and goes back to what was saved last when it is told to die.
"""

from __future__ import annotations

import contextlib
import copy
import itertools
import signal
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings
from torch.utils.data import DataLoader, Dataset

import holdfast
from tests.support.exhaustive import EXHAUSTIVE
from tests.support.jobs import Copying, Countdown, Killed, fresh_address, process, steps_of

EPOCHS = 2
STEP = 1 if EXHAUSTIVE else 3
"""From one place that is tried to the next."""


class Squares(Dataset[Any]):
    def __init__(self, samples: int) -> None:
        self.samples = samples

    def __len__(self) -> int:
        return self.samples

    def __getitem__(self, index: int) -> Any:
        return index, torch.tensor([1.0, index / 7, (index / 7) ** 2])


@dataclass(frozen=True)
class Process:
    """One start of the program, and the `die()` call at which it is killed."""

    size: int
    drop_last: bool = False
    die_at: int | None = None
    samples: int = 11
    workers: int = 0
    persistent: bool = False
    shuffle: str = "global"
    """"global", "generator" or ""."""

    def loader(self, generator: torch.Generator | None) -> DataLoader[Any]:
        return DataLoader(
            Squares(self.samples),
            self.size,
            shuffle=bool(self.shuffle),
            drop_last=self.drop_last,
            generator=generator if self.shuffle == "generator" else None,
            num_workers=self.workers,
            persistent_workers=self.persistent,
        )


def learn(weights: torch.Tensor, x: torch.Tensor) -> float:
    """A step whose loss depends on all before it and on random numbers."""
    error = (x + 0.1 * torch.rand(x.shape)) @ weights - 1
    weights -= 0.1 * (error[:, None] * x).mean(0)
    return float((error**2).mean())


def program(process: Process, address: str, die: Countdown, trace: list[Any]) -> None:
    run = holdfast.Run(address, every=1, quiet=True, data="by-sample")
    weights = torch.zeros(3)
    run.track(weights=weights, trace=trace)
    loader = process.loader(torch.Generator().manual_seed(5))
    for epoch in run.epochs(EPOCHS):
        noise = torch.rand(()).item()
        die()
        loop = run.batches(loader)
        for indices, x in loop:
            die()
            where = (epoch, run.step, run.batch, len(loop))
            trace.append((*where, indices.tolist(), learn(weights, x)))
            die()
        die()
        trace.append(("tail", epoch, run.step, noise))
    run.close()


@dataclass
class Saved:
    """What the newest checkpoint of the reference holds."""

    rng: torch.Tensor
    generator: torch.Tensor
    epoch: int = 0
    step: int = 0
    weights: torch.Tensor = field(default_factory=lambda: torch.zeros(3))
    trace: list[Any] = field(default_factory=list)
    order: list[int] | None = None
    """Of the epoch in progress; `at` samples in `done` items are behind."""
    at: int = 0
    done: int = 0
    begun_rng: torch.Tensor | None = None
    """Before the prologue of the epoch in progress."""


def cut(order: list[int], process: Process) -> list[list[int]]:
    """The batches of a whole `order`."""
    batches = [order[at : at + process.size] for at in range(0, len(order), process.size)]
    if process.drop_last:
        batches = [batch for batch in batches if len(batch) == process.size]
    return batches


def reference(processes: list[Process]) -> list[Any]:
    """The trace that the program must leave after all these starts."""
    torch.manual_seed(1)
    generator = torch.Generator().manual_seed(5)
    saved = Saved(torch.get_rng_state(), generator.get_state())
    for one in processes:
        try:
            saved = _reference(one, saved, saves := [saved])
        except Killed:
            saved = saves[-1]
    return saved.trace


def _reference(one: Process, saved: Saved, saves: list[Saved]) -> Saved:
    die = Countdown(one.die_at)
    now = copy.deepcopy(saved)
    generator = torch.Generator()
    generator.set_state(now.generator)
    torch.set_rng_state(now.rng if now.begun_rng is None else now.begun_rng)
    while now.epoch < EPOCHS:
        begun = torch.get_rng_state()
        noise = torch.rand(()).item()
        die()
        if now.order is None:
            # One sample at a time: the order, and all that torch draws for an epoch.
            single = replace(one, size=1, workers=0, persistent=False)
            now.order = [int(index) for index, _ in single.loader(generator)]
            now.at = now.done = 0
        else:
            torch.set_rng_state(now.rng)
            if not one.shuffle:
                now.order = list(range(one.samples))
        rest = cut(now.order[now.at :], one)
        total = now.done + len(rest)
        for batch in rest:
            die()
            x = torch.stack([Squares(one.samples)[index][1] for index in batch])
            where = (now.epoch, now.step, now.done, total)
            now.trace.append((*where, batch, learn(now.weights, x)))
            die()
            now.at, now.done, now.step = now.at + len(batch), now.done + 1, now.step + 1
            if now.done < total:
                now.rng, now.begun_rng = torch.get_rng_state(), begun
                now.generator = generator.get_state()
                saves.append(copy.deepcopy(now))
        die()
        now.trace.append(("tail", now.epoch, now.step, noise))
        now.epoch, now.order, now.begun_rng = now.epoch + 1, None, None
        now.rng, now.generator = torch.get_rng_state(), generator.get_state()
        if now.step > saves[-1].step:  # as every=1 does
            saves.append(copy.deepcopy(now))
    return now


def check(*processes: Process) -> list[Any]:
    """Start the program as each of `processes`, and require the reference's trace."""
    address, trace = fresh_address(), []
    for one in processes:
        trace = []
        with process():
            torch.manual_seed(99 if steps_of(address) else 1)
            program(one, address, Countdown(one.die_at), trace)
    assert trace == reference(list(processes))
    return trace


def check_from(before: Process, after: Process, places: Iterable[int]) -> list[list[Any]]:
    """As `check`, with `before` killed at each of `places`, which runs but once: `after` goes on
    from what it has left there."""
    address, traces = fresh_address(), []
    there = Copying(address)
    with process():
        torch.manual_seed(1)
        program(before, address, there, [])
    for die_at in places:
        if die_at >= there.calls:
            break
        left, trace = there.left[die_at], []
        with process():
            torch.manual_seed(99 if steps_of(left) else 1)
            program(after, left, Countdown(), trace)
        assert trace == reference([replace(before, die_at=die_at), after]), f"place {die_at}"
        traces.append(trace)
    return traces


def indices_of(trace: list[Any], epoch: int) -> list[int]:
    return sorted(index for row in trace if row[0] == epoch for index in row[4])


@pytest.mark.parametrize("shuffle", ["global", "generator", ""])
@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Process(4), Process(2)),
        (Process(2), Process(4)),
        (Process(3), Process(20)),
        (Process(5), Process(1)),
        (Process(4), Process(3, drop_last=True)),
        (Process(4, drop_last=True), Process(4)),
    ],
)
def test_killed_everywhere_and_gone_on_with_another_batch_size(
    before: Process, after: Process, shuffle: str
) -> None:
    before, after = replace(before, shuffle=shuffle), replace(after, shuffle=shuffle)
    traces = check_from(before, after, itertools.count(before.size % STEP, STEP))
    assert len(traces) * STEP > 2 * EPOCHS
    if not before.drop_last and not after.drop_last:
        for trace in traces:
            for epoch in range(EPOCHS):
                assert indices_of(trace, epoch) == list(range(11))


@pytest.mark.parametrize(
    ("before", "after"),
    [
        (Process(4, workers=2), Process(3, workers=2)),
        (Process(2, workers=2, persistent=True), Process(5, workers=2, persistent=True)),
        (Process(4), Process(3, workers=2)),
        (Process(4, workers=2), Process(4)),
        (Process(4, workers=2, shuffle="generator"), Process(3, workers=2, shuffle="generator")),
        (Process(2, workers=2, shuffle="generator"), Process(3, shuffle="generator")),
        (Process(2, shuffle="generator"), Process(3, workers=2, shuffle="generator")),
    ],
)
def test_with_workers(before: Process, after: Process) -> None:
    check_from(before, after, [2, 4, 7, 9, 14])


def test_killed_again_and_again_with_another_batch_size_each_time() -> None:
    """There and back, workers there and not there, and one that was not changed."""
    check(
        Process(1, die_at=6),
        Process(3, die_at=4, workers=2),
        Process(3, die_at=3),
        Process(1, die_at=6),
        Process(1, die_at=6),
        Process(4),
    )


def test_data_appended_to_an_unshuffled_loader() -> None:
    before, after = (Process(4, samples=samples, shuffle="") for samples in (10, 17))
    traces = check_from(before, after, range(12))
    assert len(traces) == 12
    for trace in traces:
        assert indices_of(trace, 1) == list(range(17))


class Stopping(Countdown):
    """Gets a SIGTERM at one call, before it dies at another."""

    def __init__(self, stop_at: int, n: int | None) -> None:
        super().__init__(n)
        self.stop_at = stop_at

    def __call__(self) -> None:
        if self.calls == self.stop_at:
            signal.raise_signal(signal.SIGTERM)
        super().__call__()


@pytest.mark.parametrize("die_at", [None, 7])
def test_preempted_in_the_last_batch_of_such_an_epoch(die_at: int | None) -> None:
    """The tail runs once, in that process or, where it was killed in it, in the next."""
    address = fresh_address()
    first, second, third = Process(4, die_at=4), Process(3), Process(2)
    with process():
        torch.manual_seed(1)
        program(first, address, Countdown(first.die_at), [])
    with process(), contextlib.suppress(SystemExit):
        program(second, address, Stopping(5, die_at), [])
    trace: list[Any] = []
    with process():
        program(third, address, Countdown(), trace)
    assert trace == reference([first, replace(second, die_at=8), third])


PROCESSES = st.builds(
    Process,
    size=st.integers(1, 6),
    drop_last=st.booleans(),
    die_at=st.integers(0, 14),
)


@settings(max_examples=80 // STEP, deadline=None)
@given(
    st.lists(PROCESSES, min_size=1, max_size=4),
    st.integers(0, 13),
    st.sampled_from(["global", "generator", ""]),
    st.integers(1, 6),
)
def test_any_sizes_and_any_kills(
    killed: list[Process], samples: int, shuffle: str, size: int
) -> None:
    if not samples:
        shuffle = ""  # torch refuses to shuffle nothing
    everywhere = {"samples": samples, "shuffle": shuffle}
    check(*[replace(one, **everywhere) for one in killed], Process(size, **everywhere))


@settings(max_examples=40 // STEP, deadline=None)
@given(st.lists(PROCESSES, min_size=1, max_size=3), st.lists(st.integers(1, 14), min_size=4))
def test_any_sizes_and_lengths_of_an_unshuffled_loader(
    killed: list[Process], lengths: list[int]
) -> None:
    processes = [*killed, Process(3)]
    check(
        *[
            replace(one, samples=samples, shuffle="")
            for one, samples in zip(processes, lengths, strict=False)
        ]
    )
