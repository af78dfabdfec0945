"""Loaders that are used by several loops: what they hold goes on from one to the next,
wherever the run was stopped."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from torch.utils.data import DataLoader, Sampler

import holdfast
from tests.support.data_phases import check, hidden, loader, open_run, seeded, stop_everywhere
from tests.support.jobs import Killed, fresh_address, kill_everywhere, process

# -- two outer loops ---------------------------------------------------------------------


@pytest.mark.parametrize("names", [("warmup", "main"), ("", "")])
def test_two_outer_loops_over_one_loader(names: tuple[str, str]) -> None:
    plain = [batch.tolist() for data in [loader(6, seeded())] for _ in range(4) for batch in data]

    def script(address: str, die: Any, trace: list) -> None:
        data = loader(6, seeded())
        with open_run(address, trace) as run:
            for name in names:
                for _ in run.epochs(2, name=name):
                    for batch in run.batches(data):
                        die()
                        trace.append(batch.tolist())
                    die()
                die()
        assert trace == plain

    check(script)


@pytest.mark.parametrize("persistent", [False, True])
def test_two_outer_loops_over_one_loader_with_workers(persistent: bool) -> None:
    def script(address: str, die: Any, trace: list) -> None:
        data = loader(4, seeded(), num_workers=2, persistent_workers=persistent)
        with open_run(address, trace) as run:
            for name in ("warmup", "main"):
                for _ in run.epochs(1, name=name):
                    for batch in run.batches(data):
                        die()
                        trace.append(batch.tolist())
                    die()

    kill_everywhere(script)


def test_three_phases_with_two_loaders_and_a_tail_that_draws() -> None:
    def script(address: str, die: Any, trace: list) -> None:
        shared = seeded()
        first, second = loader(4, shared), loader(6, shared)
        with open_run(address, trace) as run:
            for name, data in (("a", first), ("b", second), ("c", first)):
                for _ in run.epochs(2, name=name):
                    for batch in run.batches(data):
                        die()
                        trace.append(batch.tolist())
                    trace.append(torch.rand((), generator=shared).item())
                    die()

    check(script)


def test_a_loader_rebuilt_for_the_second_phase_around_the_same_generator() -> None:
    def script(address: str, die: Any, trace: list) -> None:
        shared = seeded()
        with open_run(address, trace) as run:
            data = loader(4, shared)
            for _ in run.epochs(2, name="small"):
                for batch in run.batches(data):
                    die()
                    trace.append(batch.tolist())
                die()
            data = loader(8, shared)
            for _ in run.epochs(2, name="large"):
                for batch in run.batches(data):
                    die()
                    trace.append(batch.tolist())
                die()

    check(script)


def test_a_loader_that_is_built_where_its_loop_starts() -> None:
    def script(address: str, die: Any, trace: list) -> None:
        shared = seeded()
        with open_run(address, trace) as run:
            for n in (4, 6):
                for _ in run.epochs(2):
                    for batch in run.batches(loader(n, shared)):
                        die()
                        trace.append(batch.tolist())
                    die()

    check(script)


def test_a_loader_in_an_object_and_loops_in_functions() -> None:
    class Trainer:
        def __init__(self, run: holdfast.Run, die: Any, trace: list) -> None:
            self.run, self.die, self.trace = run, die, trace
            self.loaders = {"train": [loader(6, seeded())]}

        def epoch(self) -> None:
            for batch in self.run.batches(self.loaders["train"][0]):
                self.die()
                self.trace.append(batch.tolist())
            self.die()

        def fit(self, name: str) -> None:
            for _ in self.run.epochs(2, name=name):
                self.epoch()

    def script(address: str, die: Any, trace: list) -> None:
        with open_run(address, trace) as run:
            trainer = Trainer(run, die, trace)
            trainer.fit("one")
            trainer.fit("two")

    check(script)


@pytest.mark.parametrize("early", [False, True])
def test_two_loaders_with_equal_generators_are_not_mixed_up(early: bool) -> None:
    """Seeded alike, but each phase has its own: the second starts as it was built."""

    def script(address: str, die: Any, trace: list) -> None:
        both = [loader(6, seeded()), loader(6, seeded())]
        with open_run(address, trace) as run:
            for number in range(2):
                data = both[number] if early else loader(6, seeded())
                for _ in run.epochs(2):
                    for batch in run.batches(data):
                        die()
                        trace.append(batch.tolist())
                    die()
        half = len(trace) // 2
        assert trace[:half] == trace[half:]

    check(script)


def test_a_variable_that_the_body_binds_anew_is_not_the_one_before_the_loop() -> None:
    def script(address: str, die: Any, trace: list) -> None:
        first = data = loader(6, seeded())
        with open_run(address, trace) as run:
            for epoch in run.epochs(1, name="other"):
                data = loader(6, seeded())
                for batch in run.batches(data):
                    die()
                    trace.append((epoch, batch.tolist()))
                die()
            for _ in run.epochs(2, name="first"):
                for batch in run.batches(first):
                    die()
                    trace.append(batch.tolist())
        assert data is not None

    check(script)


class Rounds(Sampler[int]):
    """With a counter and a random number generator of its own."""

    def __init__(self) -> None:
        self.rng = random.Random(3)
        self.rounds = 0
        self.order = list(range(6))

    def __iter__(self) -> Iterator[int]:
        self.rounds += 1
        self.rng.shuffle(self.order)
        first = self.rounds % 3
        return iter([*self.order[first:], *self.order[:first]])

    def __len__(self) -> int:
        return 6


@pytest.mark.parametrize("workers", [0, 1])
def test_a_sampler_with_a_counter_in_two_outer_loops(workers: int) -> None:
    def script(address: str, die: Any, trace: list) -> None:
        sampler = Rounds()
        data: Any = DataLoader(range(6), 3, sampler=sampler, num_workers=workers)  # type: ignore[arg-type]
        with open_run(address, trace) as run:
            for name in ("a", "b"):
                for _ in run.epochs(2 - workers, name=name):
                    for batch in run.batches(data):
                        die()
                        trace.append((sampler.rounds, batch.tolist()))
                    die()

    kill_everywhere(script)
    if not workers:
        stop_everywhere(script)


def test_code_between_the_phases_that_draws_from_the_loaders_generator() -> None:
    def script(address: str, die: Any, trace: list) -> None:
        shared = seeded()
        data = loader(6, shared)
        with open_run(address, trace) as run:
            for _ in run.epochs(2, name="a"):
                for batch in run.batches(data):
                    die()
                    trace.append(batch.tolist())
            torch.rand((), generator=shared)
            die()
            for _ in run.epochs(3, name="b"):
                for batch in run.batches(data):
                    die()
                    trace.append(batch.tolist())
                die()

    check(script)


def test_a_generator_that_is_seeded_between_the_phases() -> None:
    def script(address: str, die: Any, trace: list) -> None:
        shared = seeded()
        data = loader(6, shared)
        with open_run(address, trace) as run:
            for seed in (1, 2):
                shared.manual_seed(seed)
                for _ in run.epochs(2):
                    for batch in run.batches(data):
                        die()
                        trace.append(batch.tolist())
                    die()

    check(script)


def test_folds_with_two_phases_each() -> None:
    def script(address: str, die: Any, trace: list) -> None:
        with open_run(address, trace) as run:
            for fold in run.range(2):
                data = loader(4 + 2 * fold, seeded())
                for name in ("a", "b"):
                    for _ in run.epochs(2, name=name):
                        for batch in run.batches(data):
                            die()
                            trace.append(batch.tolist())

    stop_everywhere(script)


def test_outermost_loops_over_batches() -> None:
    def script(address: str, die: Any, trace: list) -> None:
        shared = seeded()
        data = loader(6, shared)
        with open_run(address, trace) as run:
            for _ in range(3):
                for batch in run.batches(data):
                    die()
                    trace.append(batch.tolist())
                die()
        trace.append(torch.rand((), generator=shared).item())

    check(script)


# -- loaders that are themselves at a place ------------------------------------------------


class Positioned:
    """A loader with `state_dict` whose order depends on how often it was gone through."""

    def __init__(self) -> None:
        self.rounds = self.at = 0

    def __iter__(self) -> Iterator[int]:
        while self.at < 4:
            self.at += 1
            yield 10 * self.rounds + self.at
        self.rounds, self.at = self.rounds + 1, 0

    def state_dict(self) -> dict[str, int]:
        return {"rounds": self.rounds, "at": self.at}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.rounds, self.at = state["rounds"], state["at"]


def test_a_loader_that_knows_its_position_in_two_outer_loops() -> None:
    def script(address: str, die: Any, trace: list) -> None:
        data = Positioned()
        with open_run(address, trace) as run:
            for name in ("a", "b"):
                for _ in run.epochs(2, name=name):
                    for item in run.batches(data):
                        die()
                        trace.append(item)
                    die()

    check(script)


def test_an_iterator_that_goes_on_in_a_second_outer_loop() -> None:
    def script(address: str, die: Any, trace: list) -> None:
        stream = iter(range(100))
        with open_run(address, trace) as run:
            for name in ("a", "b"):
                for _ in run.epochs(2, name=name):
                    for item in run.batches(stream):
                        die()
                        trace.append(item)
                        if run.batch == 2:
                            break
                    die()

    check(script)


# -- what is said, what is left alone --------------------------------------------------------


def between_phases(address: str, make: Callable[[], Any], tracked: bool) -> list[Any]:
    """Killed where the second phase starts, and started again."""
    trace: list[Any] = []
    for kills in (True, False):
        trace = []
        data = make()
        with process():
            run = open_run(address, trace)
            if tracked:
                run.track(generator=data().generator)
            for name in ("a", "b"):
                for _ in run.epochs(1, name=name):
                    trace += [batch.tolist() for batch in run.batches(data())]
                if kills:
                    raise Killed
            run.close()
    return trace


@pytest.mark.parametrize("tracked", [False, True])
def test_a_generator_that_cannot_be_found_is_said(
    tracked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    data = loader(6, seeded())
    plain = [batch.tolist() for _ in range(2) for batch in data]
    with caplog.at_level(logging.WARNING, "holdfast"):
        trace = between_phases(fresh_address(), lambda: hidden(6), tracked)
    said = "as this process made it; the loop epochs 'a'#0/batches#0 drew" in caplog.text
    assert said is not tracked
    assert (trace == plain) is tracked


def test_nothing_is_said_of_loaders_that_are_found(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "holdfast"):
        test_two_loaders_with_equal_generators_are_not_mixed_up(early=True)
    assert not caplog.records


@pytest.mark.parametrize("tracked", [False, True])
def test_a_prologue_that_draws_before_the_first_epoch_is_said(
    tracked: bool, caplog: pytest.LogCaptureFixture
) -> None:
    """What the generator was built as was not seen: it may have been given another seed."""

    def phases(address: str, trace: list[Any], kills: bool) -> None:
        shared = seeded()
        data = loader(6, shared)
        run = open_run(address, trace)
        if tracked:
            run.track(shared=shared)
        for name in ("a", "b"):
            for _ in run.epochs(1, name=name):
                torch.rand((), generator=shared)
                trace += [batch.tolist() for batch in run.batches(data)]
            if kills:
                raise Killed
        run.close()

    whole, trace, address = list[Any](), list[Any](), fresh_address()
    with process():
        phases(fresh_address(), whole, kills=False)
    for kills in (True, False):
        trace = []
        with process(), caplog.at_level(logging.WARNING, "holdfast"):
            phases(address, trace, kills)
    assert (trace == whole) is tracked
    assert ("the loop epochs 'a'#0 drew from it" in caplog.text) is not tracked


def test_another_seed_than_the_saved_run_had_is_not_overruled() -> None:
    address, order = fresh_address(), []
    for seed in (1, 2):
        data = loader(6, seeded(seed))
        run = holdfast.Run(address, every=1, quiet=True)
        for _ in run.epochs(1, name="a"):
            for _ in run.batches(data):
                pass
        if seed == 2:
            for _ in run.epochs(1, name="b"):
                order = [batch.tolist() for batch in run.batches(data)]
        run.close()
    assert order == [batch.tolist() for batch in loader(6, seeded(2))]


def test_code_after_a_finished_run_finds_its_generator() -> None:
    address, drawn = fresh_address(), []
    for _ in range(2):
        shared = seeded()
        data = loader(6, shared)
        with holdfast.Run(address, quiet=True) as run:
            for _ in run.epochs(2):
                for _ in run.batches(data):
                    pass
        drawn.append(torch.rand((), generator=shared).item())
    assert drawn[0] == drawn[1]
