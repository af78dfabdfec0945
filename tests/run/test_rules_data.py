"""The rules of the loop: data between epochs and inside them."""

from __future__ import annotations

import signal
from typing import Any

import numpy as np
import pytest
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

import holdfast
from holdfast.errors import (
    LoopError,
)
from tests.support.jobs import (
    Killed,
    Shuffled,
    fresh_address,
    kill_everywhere,
    killed_at,
    process,
    steps_of,
)


def test_two_loaders_in_one_loop() -> None:
    for mode, expected in (("min", 2), ("cycle", 5)):

        def script(address: str, die: Any, trace: list, mode: Any = mode) -> None:
            run = holdfast.Run(address, every=1, quiet=True).track(trace=trace)
            left, right = Shuffled(2), Shuffled(5)
            for _ in run.epochs(2):
                for a, b in run.batches(left, right, mode=mode):
                    die()
                    trace.append((a, b, np.random.rand()))

        assert kill_everywhere(script) == 2 * expected


class OwnGenerator:
    """A loader with a generator that goes on from epoch to epoch."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.rng = np.random.default_rng(5)

    def __len__(self) -> int:
        return self.n

    def __iter__(self) -> Any:
        return iter(self.rng.permutation(self.n).tolist())


@pytest.mark.parametrize(("every", "leave_at"), [(1, 99), (1, 2), ("epoch", 2)])
def test_what_a_loader_keeps_between_epochs_goes_on(every: Any, leave_at: int) -> None:
    def script(address: str, die: Any, trace: list) -> None:
        run = holdfast.Run(address, every=every, quiet=True).track(trace=trace)
        first, second = OwnGenerator(4), OwnGenerator(3)
        for _ in run.epochs(2):
            for loader in (first, second, first):
                for item in run.batches(loader):
                    die()
                    trace.append((item, run.step))
                    if run.batch == leave_at:
                        break

    kill_everywhere(script)


def test_a_loader_that_is_built_in_each_epoch() -> None:
    def script(address: str, die: Any, trace: list) -> None:
        run = holdfast.Run(address, every=1, quiet=True).track(trace=trace)
        for epoch in run.epochs(3):
            for item in run.batches(Shuffled(3)):
                die()
                trace.append((epoch, float(item)))

    kill_everywhere(script)


def test_data_that_changed_is_allowed_between_epochs_with_one_line(capfd) -> None:
    address = fresh_address()
    for n, epochs in ((3, 2), (4, 3)):
        run = holdfast.Run(address)
        for _ in run.epochs(epochs):
            list(run.batches(list(range(n))))
        run.close()
    assert "batches: 4 items in an epoch, 3 before" in capfd.readouterr().err
    assert steps_of(address)[-1] == 10


def test_data_that_changed_in_mid_epoch_is_refused_unless_allowed(caplog) -> None:
    def epoch(run: holdfast.Run, n: int = 4) -> Any:
        for _ in run.epochs(2):
            yield from run.batches(list(range(n)))

    address = killed_at(2, epoch)
    with pytest.raises(LoopError, match="changed") as caught:
        list(epoch(holdfast.Run(address, quiet=True), 6))
    assert 'data="restart-epoch"' in caught.value.hint
    run = holdfast.Run(address, data="restart-epoch", quiet=True)
    assert list(epoch(run, 6)) == [0, 1, 2, 3, 4, 5] * 2
    assert run.step == 2 + 12
    assert "begins anew" in caplog.text


class Positioned:
    """A loader that knows its position."""

    def __init__(self, n: int) -> None:
        self.n = n
        self.at = 0

    def __iter__(self) -> Any:
        while self.at < self.n:
            self.at += 1
            yield self.at - 1
        self.at = 0

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at = state["at"]


@pytest.mark.parametrize("stop", ["killed", "preempted"])
@pytest.mark.parametrize(
    "loaders",
    [
        lambda n: [list(range(n))],
        lambda n: [Shuffled(n)],
        lambda n: [Positioned(n)],
        lambda n: [Shuffled(n), list(range(2 * n))],
        lambda n: [DataLoader(range(n), 2, shuffle=True)],  # type: ignore[arg-type],
    ],
)
def test_an_epoch_left_by_break_is_over_so_its_data_may_change(loaders: Any, stop: str) -> None:
    address = fresh_address()
    for n in (8, 12):
        run = holdfast.Run(address, every="epoch", quiet=True)
        many = loaders(n)
        try:
            with process():
                for epoch in run.epochs(4):
                    if (n, epoch, stop) == (8, 2, "killed"):
                        raise Killed
                    taken = 0
                    for _ in run.batches(*many):
                        taken += 1
                        if taken == 3:
                            break
                    assert taken == 3
                    if (n, epoch, stop) == (8, 1, "preempted"):
                        run._session.stopping.signals.receive(signal.SIGTERM)
        except SystemExit:
            assert steps_of(address)[-1] == 4
        run.close()
    assert run.step == 4 * 2


class Counting(Positioned):
    """Its items depend on how often it was gone through."""

    def __init__(self, n: int) -> None:
        super().__init__(n)
        self.rounds = 0

    def __iter__(self) -> Any:
        for item in super().__iter__():
            yield item + 100 * self.rounds
        self.rounds += 1

    def state_dict(self) -> dict[str, int]:
        return {"at": self.at, "rounds": self.rounds}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.at, self.rounds = state["at"], state["rounds"]


def from_generator(n: int) -> Any:
    yield from Shuffled(n)


@pytest.mark.parametrize("leave_at", [99, 1])
@pytest.mark.parametrize("make", [Counting, from_generator])
def test_a_position_of_a_loader_that_is_built_in_each_epoch(
    make: Any, leave_at: int, caplog: pytest.LogCaptureFixture
) -> None:
    def script(address: str, die: Any, trace: list) -> None:
        run = holdfast.Run(address, every="1 epoch", quiet=True).track(trace=trace)
        for epoch in run.epochs(4):
            # A kill in the second epoch comes after the save at the end of the first: whether
            # the loader lasts cannot be known there.
            if epoch != 1:
                die()
            for item in run.batches(make(3)):
                if epoch != 1:
                    die()
                trace.append((epoch, float(item)))
                if run.batch == leave_at:
                    break

    kill_everywhere(script)
    assert "built anew" not in caplog.text


def test_a_loader_that_was_taken_to_last_and_does_not_is_said(
    caplog: pytest.LogCaptureFixture,
) -> None:
    address = fresh_address()
    for kill_at in (1, None):
        with process():
            run = holdfast.Run(address, every="epoch", quiet=True)
            for epoch in run.epochs(3):
                if epoch == kill_at:
                    raise Killed
                list(run.batches(Counting(2)))
    assert "Counting is built anew in each epoch" in caplog.text


def test_what_the_program_changed_is_not_overruled_behind_the_last_batch(caplog) -> None:
    """Stopped there, the run passes the loop over and settles its loader; the next epoch has
    the batch size, and the settings of a sampler, that the program was started with."""
    address = fresh_address()
    taken: list[Any] = []
    for size, seed in ((4, 1), (2, 2)):
        taken.clear()
        with process():
            run = holdfast.Run(address, every=1, quiet=True)
            sampler: Any = DistributedSampler(range(8), 1, 0, seed=seed)  # type: ignore[arg-type]
            loader: Any = DataLoader(range(8), size, sampler=sampler)  # type: ignore[arg-type]
            for _ in run.epochs(2):
                for batch in run.batches(loader):
                    taken.append(batch.tolist())
                    if size == 4 and len(taken) == 2:
                        signal.raise_signal(signal.SIGTERM)
                if size == 4:
                    raise Killed  # in the tail, for which there is a checkpoint
            run.close()
    assert [len(batch) for batch in taken] == [2, 2, 2, 2]
    assert (sampler.seed, loader.batch_sampler.batch_size) == (2, 2)
    assert "batch_size was 4, is 2" in caplog.text
