"""Code that runs again before a run goes on draws the numbers that it drew the first time."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch

import holdfast
from tests.support.jobs import Killed, fresh_address, kill_everywhere, process

namespace: dict[str, Any] = {}


class Environment:
    """Holds its generator, and saves it."""

    def __init__(self) -> None:
        self.rng = np.random.default_rng(5)

    def state_dict(self) -> dict[str, Any]:
        return {"rng": self.rng.bit_generator.state}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.rng.bit_generator.state = state["rng"]


def variables() -> holdfast.Variables:
    namespace["rng"] = np.random.default_rng(6)
    return holdfast.Variables(namespace, "rng")


HOLDERS: dict[str, tuple[Callable[[], Any], Callable[[Any], float]]] = {
    "numpy": (lambda: np.random.default_rng(1), lambda rng: rng.random()),
    "numpy's old kind": (lambda: np.random.RandomState(1), lambda rng: rng.random_sample()),
    "python": (lambda: random.Random(2), lambda rng: rng.random()),
    "torch": (
        lambda: torch.Generator().manual_seed(2),
        lambda rng: float(torch.rand((), generator=rng)),
    ),
    "dict": (lambda: {"a": {"b": random.Random(3)}}, lambda held: held["a"]["b"].random()),
    "many": (
        lambda: [np.random.default_rng(n) for n in range(100)],
        lambda held: sum(rng.random() for rng in held),
    ),
    "object": (Environment, lambda held: held.rng.random()),
    "variables": (variables, lambda held: namespace["rng"].random()),
}


@pytest.mark.parametrize("kind", HOLDERS)
def test_a_tracked_generator_in_a_prologue(kind: str) -> None:
    build, draw = HOLDERS[kind]

    def script(address: str, die: Any, trace: list) -> None:
        holder = build()
        run = holdfast.Run(address, every=1, quiet=True).track(trace=trace, holder=holder)
        for _ in run.epochs(3):
            drawn = draw(holder)
            for item in run.range(3):
                die()
                trace.append((drawn, item, draw(holder)))
            die()
            drawn = draw(holder)
            for item in run.range(2):
                die()
                trace.append((drawn, item))

    assert kill_everywhere(script) == 3 * (3 + 1 + 2)


def test_a_generator_in_the_box() -> None:
    def script(address: str, die: Any, trace: list) -> None:
        run = holdfast.Run(address, every=1, quiet=True).track(trace=trace)
        box = run.box(rng=np.random.default_rng(4))
        for _ in run.epochs(2):
            order = box.rng.permutation(4)
            for item in run.range(4):
                die()
                trace.append((int(order[item]), box.rng.random()))

    kill_everywhere(script)


@pytest.mark.parametrize("drawn_after", [True, False])
def test_a_tracked_generator_that_the_start_of_a_loader_draws_from(drawn_after: bool) -> None:
    """It is a global of the loader's module, so that nothing but `track` tells of it."""
    namespace["order"] = np.random.default_rng(0)

    class Data:
        def __iter__(self) -> Iterator[int]:
            yield from namespace["order"].permutation(5).tolist()

    def script(address: str, die: Any, trace: list) -> None:
        rng = namespace["order"] = np.random.default_rng(0)
        data = Data()
        run = holdfast.Run(address, every=1, quiet=True).track(trace=trace, rng=rng)
        for _ in run.epochs(3):
            for item in run.batches(data):
                die()
                trace.append(item)
            die()
            if drawn_after:
                trace.append(rng.random())

    assert kill_everywhere(script) == 3 * 6


def test_under_another_name_a_tracked_generator_is_the_same() -> None:
    def train(run: holdfast.Run, rng: Any, die_at: int, trace: list) -> None:
        for _ in run.epochs(2):
            order = rng.permutation(4)
            for item in run.range(4):
                if run.step == die_at:
                    raise Killed
                trace.append(int(order[item]))

    whole: list[int] = []
    rng = np.random.default_rng(0)
    train(holdfast.Run(fresh_address(), quiet=True).track(a=rng), rng, 99, whole)
    address, trace = fresh_address(), []
    with process():
        rng = np.random.default_rng(0)
        train(holdfast.Run(address, every=1, quiet=True).track(a=rng, t=trace), rng, 6, trace)
    rng, trace = np.random.default_rng(0), []
    run = holdfast.Run(address, every=1, quiet=True, rename={"a": "b"}).track(b=rng, t=trace)
    train(run, rng, 99, trace)
    assert trace == whole


def test_an_object_that_no_longer_holds_its_generators_is_told(
    caplog: pytest.LogCaptureFixture,
) -> None:
    class Lazy(Environment):
        def state_dict(self) -> dict[str, Any]:
            return {}

        def load_state_dict(self, state: dict[str, Any]) -> None:
            pass

    address = fresh_address()
    for attempt in range(2):
        lazy = Lazy()
        if attempt:
            del lazy.rng
        with process():
            run = holdfast.Run(address, every=1, quiet=True).track(lazy=lazy)
            for _ in run.epochs(2):
                for _ in run.range(2):
                    if run.step == 1 and not attempt:
                        raise Killed
    told = [one.getMessage() for one in caplog.records if "generators" in one.getMessage()]
    assert told[0].startswith("lazy does not hold the random generators that it held")


# -- behind a loop that was left ---------------------------------------------------------


def everything() -> tuple[float, float]:
    return random.random(), float(np.random.rand())


def returning(run: holdfast.Run) -> None:
    for epoch in run.epochs(3):
        for item in run.range(3):
            if (epoch, item) == (1, 1):
                return


def generator(loop: Any) -> Iterator[Any]:
    yield from loop


def left_by_break(run: holdfast.Run) -> None:
    for _ in run.epochs(3):
        break


def left_inside(run: holdfast.Run) -> None:
    for _ in run.epochs(2):
        for item in run.range(3):
            if item == 1:
                break


def left_by_exception(run: holdfast.Run) -> None:
    try:
        for epoch in run.epochs(3):
            if epoch:
                raise ValueError
    except ValueError:
        pass


def left_through_wrappers(run: holdfast.Run) -> None:
    for number, _ in enumerate(generator(run.epochs(3))):
        if number:
            break


@pytest.mark.parametrize(
    "leave", [left_by_break, left_inside, left_by_exception, left_through_wrappers, returning]
)
@pytest.mark.parametrize("inside", [True, False])
def test_what_is_drawn_behind_a_loop_that_was_left_is_drawn_again(
    leave: Callable[[holdfast.Run], None], inside: bool
) -> None:
    """Whether the loop was an outermost one, or in the body of another."""

    def phases(run: holdfast.Run, die: Any, trace: list) -> None:
        leave(run)
        drawn = everything()
        for item in run.range(3):
            die()
            trace.append((drawn, item, everything()))

    def script(address: str, die: Any, trace: list) -> None:
        run = holdfast.Run(address, every=1, quiet=True).track(trace=trace)
        if not inside:
            phases(run, die, trace)
            run.finish()
            return
        for _ in run.epochs(2, name="outer"):
            phases(run, die, trace)

    assert kill_everywhere(script) == (6 if inside else 3)


def test_a_tracked_generator_behind_a_loop_that_was_left() -> None:
    def script(address: str, die: Any, trace: list) -> None:
        rng = np.random.default_rng(0)
        run = holdfast.Run(address, every=1, quiet=True).track(trace=trace, rng=rng)
        left_by_break(run)
        drawn = rng.random()
        for item in run.range(3):
            die()
            trace.append((drawn, item, rng.random()))
        run.finish()

    kill_everywhere(script)


def test_a_run_that_was_finished_behind_a_break_draws_the_same_again() -> None:
    def script(address: str) -> list[Any]:
        with process(), holdfast.Run(address, every=1, quiet=True) as run:
            left_by_break(run)
            drawn = everything()
        return [drawn, everything()]

    address = fresh_address()
    assert script(address) == script(address)


@pytest.mark.parametrize("draws", [True, False])
def test_a_loop_that_a_variable_holds_on_to(draws: bool, capsys: pytest.CaptureFixture) -> None:
    """When it was left nobody saw. If it matters, the resume says so."""

    def script(address: str, *, until: int) -> None:
        with process():
            run = holdfast.Run(address, every=1, quiet=True)
            items = iter(run.epochs(3))
            for _ in items:
                break
            if draws:
                random.random()
            for _ in run.range(3):
                if run.step == until:
                    raise Killed

    address = fresh_address()
    script(address, until=3)
    script(address, until=99)
    told = capsys.readouterr().err
    assert told.count("between the epochs loop, which was left early, and the range loop") == draws


def test_a_loop_gone_on_with_in_a_second_for() -> None:
    def script(address: str, die: Any, trace: list) -> None:
        run = holdfast.Run(address, every=1, quiet=True).track(trace=trace)
        loop = run.epochs(4)
        for epoch in loop:
            if epoch == 1:
                break
        drawn = everything()
        for epoch in loop:
            die()
            trace.append((epoch, drawn, everything()))

    with process():
        script(fresh_address(), lambda: None, trace := [])
    assert [epoch for epoch, _, _ in trace] == [2, 3]
