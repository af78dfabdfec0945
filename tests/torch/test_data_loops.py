"""Several loops in one epoch, or in one another, that share what loaders hold."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from tests.support.data_phases import check, hidden, loader, open_run, seeded


@pytest.mark.parametrize("draws", [False, True])
@pytest.mark.parametrize("one", [False, True])
def test_two_loops_in_an_epoch_that_share_a_generator(one: bool, draws: bool) -> None:
    """`one`: over one loader. `draws`: so does the code between and after them."""

    def script(address: str, die: Any, trace: list) -> None:
        shared = seeded()
        first = loader(6, shared)
        second = first if one else loader(4, shared)
        with open_run(address, trace) as run:
            for _ in run.epochs(3):
                for data in (first, second):
                    for batch in run.batches(data):
                        die()
                        trace.append(batch.tolist())
                    if draws:
                        torch.rand((), generator=shared)
                trace.append(torch.rand((), generator=shared).item())
                die()

    check(script)


def test_a_torch_generator_that_nobody_seeded() -> None:
    def script(address: str, die: Any, trace: list) -> None:
        shared = torch.Generator()
        first, second = loader(6, shared), loader(4, shared)
        with open_run(address, trace) as run:
            for _ in run.epochs(3):
                for data in (first, second):
                    for batch in run.batches(data):
                        die()
                        trace.append(batch.tolist())
                die()

    check(script)


def test_loaders_that_take_turns() -> None:
    def script(address: str, die: Any, trace: list) -> None:
        shared = seeded()
        odd, even = loader(6, shared), loader(4, shared)
        with open_run(address, trace) as run:
            for epoch in run.epochs(5):
                data, name = (odd, "odd") if epoch % 2 else (even, "even")
                for batch in run.batches(data, name=name):
                    die()
                    trace.append(batch.tolist())
                die()

    check(script)


def test_loops_inside_a_loop_over_batches_that_share_its_generator() -> None:
    def script(address: str, die: Any, trace: list) -> None:
        shared = seeded()
        outer, inner = loader(6, shared), loader(4, shared)
        with open_run(address, trace) as run:
            for _ in run.epochs(2):
                for batch in run.batches(outer):
                    for one in run.batches(inner):
                        die()
                        trace.append((batch.tolist(), one.tolist()))
                    trace.append(torch.rand((), generator=shared).item())

    check(script)


def test_two_loops_over_a_loader_that_no_variable_reaches() -> None:
    def script(address: str, die: Any, trace: list) -> None:
        make = hidden(6)
        with open_run(address, trace) as run:
            for _ in run.epochs(3):
                for _ in range(2):
                    for batch in run.batches(make()):
                        die()
                        trace.append(batch.tolist())
                die()

    check(script)


def test_a_tail_draws_from_a_hidden_generator_that_the_prologue_seeds() -> None:
    """Where only the tail is left to run, what the prologue seeds there again has since
    made the order of the epoch."""

    def script(address: str, die: Any, trace: list) -> None:
        make = hidden(6)
        with open_run(address, trace) as run:
            for epoch in run.epochs(4):
                make().generator.manual_seed(epoch)
                for batch in run.batches(make()):
                    die()
                    trace.append(batch.tolist())
                trace.append(torch.rand((), generator=make().generator).item())

    check(script)
