"""Gradient accumulation: killed everywhere, every bit compared."""

from __future__ import annotations

import signal
from collections.abc import Callable
from typing import Any

import pytest
import torch

import holdfast
from holdfast.run.gradients import MAX_WAIT
from holdfast.torch.gradients import Gradients
from tests.run.feed_checks import plain
from tests.support.jobs import Script, fresh_address, kill_everywhere, process

STEPS = 7

Zero = Callable[[torch.optim.Optimizer], None]


def zero(optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad()


def zero_in_place(optimizer: torch.optim.Optimizer) -> None:
    optimizer.zero_grad(set_to_none=False)


class Net(torch.nn.Module):
    """The second layer takes part in every third batch only."""

    def __init__(self) -> None:
        super().__init__()
        self.first = torch.nn.Linear(2, 2)
        self.second = torch.nn.Linear(2, 2)

    def forward(self, x: torch.Tensor, number: int) -> torch.Tensor:
        x = torch.dropout(self.first(x), 0.5, train=True)
        return self.second(x) if number % 3 == 0 else x


def bodies(name: str, every: int, zeroes: Zero) -> Callable[..., None]:
    def after(optimizer: Any, backward: Callable[[], None], number: int) -> None:
        backward()
        if number % every == every - 1:
            optimizer.step()
            zeroes(optimizer)

    def before(optimizer: Any, backward: Callable[[], None], number: int) -> None:
        if number % every == 0:
            if number:
                optimizer.step()
            zeroes(optimizer)
        backward()

    def start(optimizer: Any, backward: Callable[[], None], number: int) -> None:
        if number % every == 0:
            zeroes(optimizer)
        backward()
        if number % every == every - 1:
            optimizer.step()

    return {"after": after, "before": before, "start": start}[name]


def script(body: Callable[..., None], save_every: Any = 1) -> Script:
    def run_it(address: str, die: Any, trace: list[Any]) -> None:
        torch.manual_seed(1)
        net = Net()
        optimizer = torch.optim.Adam(net.parameters(), lr=0.1, weight_decay=0.1)
        run = holdfast.Run(address, every=save_every, quiet=True)
        run.track(trace=trace, net=net, optimizer=optimizer)
        for epoch in run.epochs(2):
            die()
            for number in run.range(STEPS):
                die()
                x = torch.rand(3, 2)
                body(optimizer, lambda x=x, n=number: net(x, n).sum().backward(), number)
                trace.append(plain([epoch, *net.parameters()]))
                die()
            die()
        trace.append(plain([param.grad for param in net.parameters()]))

    return run_it


@pytest.mark.parametrize("zeroes", [zero, zero_in_place])
@pytest.mark.parametrize("name", ["after", "before", "start"])
def test_killed_anywhere_in_an_accumulation(name: str, zeroes: Zero) -> None:
    kill_everywhere(script(bodies(name, 3, zeroes)))


def test_killed_anywhere_without_one() -> None:
    kill_everywhere(script(bodies("start", 1, zero_in_place)))


def notes(address: str) -> list[tuple[int, str]]:
    with holdfast.CheckpointManager(address) as manager:
        return [(info.step, info.note) for info in manager.checkpoints()]


def job(
    address: str,
    *,
    accumulate: int = 4,
    stop_at: int = -1,
    steps: int = 8,
    every: int | None = 1,
    kill_at: int = -1,
) -> list[Any]:
    torch.manual_seed(1)
    net = torch.nn.Linear(2, 1)
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    run = holdfast.Run(address, every=every, keep=None, quiet=True)
    run.track(net=net, optimizer=optimizer)
    try:
        for number in run.range(steps):
            net(torch.rand(3, 2)).sum().backward()
            if number % accumulate == accumulate - 1:
                optimizer.step()
                optimizer.zero_grad()
            if number == stop_at:
                run._session.stopping.signals.receive(signal.SIGTERM)
    except SystemExit:
        pass
    run.close()
    return plain(list(net.parameters()))


def test_saves_wait_for_a_boundary_after_a_step() -> None:
    address = fresh_address()
    job(address)
    assert notes(address) == [(4, "every=1"), (8, "final")]


def test_a_preemption_in_an_accumulation_saves_the_gradients() -> None:
    whole = job(fresh_address())
    for stop_at in range(7):
        address = fresh_address()
        job(address, stop_at=stop_at, every=None)
        assert notes(address) == [(stop_at + 1, "preempted")]
        assert job(address, every=None) == whole


def test_a_step_that_is_never_seen_does_not_keep_a_run_from_saving() -> None:
    address = fresh_address()
    job(address, accumulate=10_000, steps=MAX_WAIT + 3)
    assert [step for step, _ in notes(address)] == [MAX_WAIT + 1, MAX_WAIT + 2, MAX_WAIT + 3]


def test_more_steps_go_on_with_what_was_left_over() -> None:
    address, whole = fresh_address(), job(fresh_address(), steps=12)
    job(address, steps=6)
    assert job(address, steps=12) == whole


def test_what_was_left_over_is_there_behind_the_loop_of_a_finished_run() -> None:
    def script(address: str) -> Any:
        param = torch.nn.Parameter(torch.ones(3))
        optimizer = torch.optim.SGD([param], lr=0.1)
        run = holdfast.Run(address, quiet=True).track(param=param, optimizer=optimizer)
        for number in run.range(3):
            (param * (number + 1)).sum().backward()
            if number == 1:
                optimizer.step()
                optimizer.zero_grad()
        optimizer.step()
        return plain(param)

    address = fresh_address()
    assert script(address) == script(address)


def test_checkpoints_without_fresh_gradients_hold_none() -> None:
    address = fresh_address()
    job(address, accumulate=1)
    with holdfast.CheckpointManager(address) as manager:
        found = manager.read_loop()
    assert found is not None
    assert found.loop["gradients"] == {"torch": {}}


# -- the watch ----------------------------------------------------------------


def watched() -> tuple[Gradients, torch.nn.Parameter, torch.optim.Optimizer]:
    param = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.SGD([param], lr=0.1)
    gradients = Gradients()
    gradients.watch({"all": [optimizer]})
    return gradients, param, optimizer


@pytest.mark.filterwarnings("ignore:Using backward")  # with create_graph: it may leak
@pytest.mark.parametrize("graph", [False, True])
def test_fresh_until_its_optimizer_steps(graph: bool) -> None:
    gradients, param, optimizer = watched()
    other = torch.optim.SGD([torch.nn.Parameter(torch.ones(1))], lr=0.1)
    assert not gradients.fresh()
    for _ in range(3):
        (param * param).sum().backward(create_graph=graph)
        assert gradients.fresh()
        other.step()
        assert gradients.fresh()
        assert not gradients.stepped
        optimizer.step()
        assert not gradients.fresh()
        assert gradients.stepped
        gradients.stepped = False
    param.grad = None


def test_a_new_gradient_at_the_same_place_is_fresh() -> None:
    gradients, param, optimizer = watched()
    for _ in range(5):
        (param * 2).sum().backward()
        optimizer.step()
        param.grad = None
        (param * 2).sum().backward()
        assert gradients.fresh()
        param.grad = None


def test_optimizers_that_are_no_longer_tracked_are_let_go() -> None:
    gradients, param, optimizer = watched()
    (param * 2).sum().backward()
    gradients.watch({})
    assert not gradients.fresh()
    assert not optimizer._optimizer_step_post_hooks
    gradients.watch({"optimizer": optimizer})
    assert gradients.fresh()
    gradients.close()
    assert not optimizer._optimizer_step_post_hooks


def test_a_wrapper_without_hooks_is_left_out() -> None:
    class Wrapper(torch.optim.Optimizer):
        def __init__(self) -> None:
            self.param_groups = [{"params": [torch.nn.Parameter(torch.ones(1))]}]

    gradients = Gradients()
    gradients.watch({"optimizer": Wrapper()})
    assert not gradients.fresh()


def test_restore_makes_gradients_what_they_were() -> None:
    params = [torch.nn.Parameter(torch.ones(2)) for _ in range(4)]
    optimizer = torch.optim.SGD(params, lr=0.1)
    gradients = Gradients()
    gradients.watch({"optimizer": optimizer})
    (params[1] * 3).sum().backward()
    optimizer.step()
    (params[0] * 2).sum().backward()
    params[2].grad = torch.zeros(2)
    state = gradients.state()
    assert list(state["optimizer"]["fresh"]) == ["0"]
    assert state["optimizer"]["used"] == [1, 2]
    for param in params:
        param.grad = torch.full((2,), 9.0)
    gradients.restore(state)
    assert [None if p.grad is None else p.grad.tolist() for p in params] == [
        [2.0, 2.0],
        [0.0, 0.0],
        [0.0, 0.0],
        None,
    ]
    assert gradients.fresh()


def test_sparse_gradients_and_other_types() -> None:
    table = torch.nn.Embedding(5, 2, sparse=True)
    half = torch.nn.Parameter(torch.ones(3, dtype=torch.bfloat16))

    def script(address: str, stop: bool) -> Any:
        torch.manual_seed(2)
        table.reset_parameters()
        with torch.no_grad():
            half.fill_(1)
        table.weight.grad = half.grad = None
        optimizer = torch.optim.SGD([table.weight, half], lr=0.1)
        run = holdfast.Run(address, every=None, quiet=True)
        run.track(optimizer=optimizer, table=table, half=half)
        with process():
            try:
                for number in run.range(4):
                    (table(torch.tensor([number, 1])).sum() * half.sum()).backward()
                    if number % 2:
                        optimizer.step()
                        optimizer.zero_grad()
                    if stop and number == 2:
                        run._session.stopping.signals.receive(signal.SIGTERM)
            except SystemExit:
                pass
        run.close()
        return plain([table.weight, half])

    address, whole = fresh_address(), script(fresh_address(), False)
    script(address, True)
    assert script(address, False) == whole
