"""Training mode, frozen parameters, dropout rates: what a program changes in a module and
no state_dict holds."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from holdfast.torch.attributes import read, unsaved, write
from tests.support.jobs import Countdown, Killed, fresh_address, kill_everywhere, process

EPOCHS, BATCHES = 3, 2


class Net(nn.Module):
    def __init__(self, p: float = 0.5) -> None:
        super().__init__()
        self.encoder = nn.Linear(4, 4)
        self.norm = nn.BatchNorm1d(4)
        self.drop = nn.Dropout(p)
        self.head = nn.Linear(4, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.head(self.drop(self.norm(self.encoder(x))))


def train(
    address: str,
    die: Callable[[], None],
    losses: list[Any],
    *,
    begin: Callable[[Net, int], None] = lambda model, epoch: None,
    end: Callable[[Net, int], None] = lambda model, epoch: None,
    make: Callable[[], Net] = Net,
    wrap: Callable[[nn.Module], nn.Module] = lambda model: model,
    **options: Any,
) -> Net:
    """A script whose every number depends on dropout, batch norm and what is frozen."""
    torch.manual_seed(1)
    net = make()
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1)
    whole = wrap(net)
    run = holdfast.Run(address, every=1, keep=None, **options)
    run.track(model=whole, optimizer=optimizer, losses=losses)
    for epoch in run.epochs(EPOCHS):
        begin(net, epoch)
        die()
        for _ in run.range(BATCHES):
            die()
            loss = whole(torch.randn(5, 4)).square().mean()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
            die()
        end(net, epoch)
        die()
    run.close()
    return net


def frozen(p: float = 0.5) -> Net:
    model = Net(p)
    model.encoder.requires_grad_(False)
    return model


def test_an_evaluation_that_leaves_the_model_in_eval_mode() -> None:
    """`model.train()` stands before the loops: from epoch 1 on nothing is dropped."""

    def script(address: str, die: Countdown, losses: list[Any]) -> None:
        train(address, die, losses, end=lambda model, epoch: model.eval() and None)

    assert kill_everywhere(script) > EPOCHS * BATCHES * 2


def test_parts_that_are_unfrozen_at_some_epoch() -> None:
    def begin(model: Net, epoch: int) -> None:
        if epoch == 1:
            model.encoder.requires_grad_(True)
            model.head.bias.requires_grad_(False)

    def script(address: str, die: Countdown, losses: list[Any]) -> None:
        trained = train(address, die, losses, begin=begin, make=frozen)
        losses.append([p.requires_grad for p in trained.parameters()])
        losses.append([p.tolist() for p in trained.parameters()])

    kill_everywhere(script)


def test_settings_of_torchs_modules_that_are_scheduled() -> None:
    def end(model: Net, epoch: int) -> None:
        model.drop.p *= 0.5
        model.norm.momentum = 0.05

    def script(address: str, die: Countdown, losses: list[Any]) -> None:
        trained = train(address, die, losses, end=end)
        losses.append(trained.norm.running_mean.tolist())  # type: ignore[union-attr]

    kill_everywhere(script)


def test_a_prologue_that_changes_an_attribute_runs_twice_and_counts_once() -> None:
    def begin(model: Net, epoch: int) -> None:
        model.drop.p = 0.9 - model.drop.p  # 0.4, and every other time as built

    def script(address: str, die: Countdown, losses: list[Any]) -> None:
        losses.append(train(address, die, losses, begin=begin).drop.p)

    kill_everywhere(script)


def killed_after_epoch_1(**options: Any) -> str:
    address = fresh_address()
    with process():
        train(address, Countdown(2 * (2 + 2 * BATCHES) + 1), [], **options)
    return address


def thin(model: Net, epoch: int) -> None:
    model.drop.p = 0.1


def test_an_edited_program_keeps_what_the_run_did_not_change(
    capfd: pytest.CaptureFixture[str],
) -> None:
    address = killed_after_epoch_1()
    with process():
        model = train(address, Countdown(), [], make=lambda: frozen(p=0.2))
    assert model.drop.p == 0.2
    assert not model.encoder.weight.requires_grad
    assert "as in the checkpoint" not in capfd.readouterr().err


def test_what_the_run_changed_wins_over_an_edit_and_is_said(
    capfd: pytest.CaptureFixture[str],
) -> None:
    address = killed_after_epoch_1(end=thin)
    with process():
        model = train(address, Countdown(), [], make=lambda: Net(p=0.2))
    assert model.drop.p == 0.1
    line = "as in the checkpoint: model/drop.p is 0.1 (built with 0.2 now, with 0.5 before)"
    assert line in capfd.readouterr().err


def test_wrappers_and_other_names_make_no_difference() -> None:
    address = killed_after_epoch_1(end=thin)
    with process():
        model = train(address, Countdown(), [], wrap=nn.DataParallel)
    assert model.drop.p == 0.1

    address = killed_after_epoch_1(end=thin)
    model = Net()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    with holdfast.Run(address, rename={"model": "net"}, quiet=True) as run:
        run.track(net=model, optimizer=optimizer, losses=[])
        next(iter(run.epochs(EPOCHS)))
    assert model.drop.p == 0.1


def test_an_object_that_is_tracked_late() -> None:
    def job(model: Net, address: str, *, die: bool) -> None:
        with process():
            run = holdfast.Run(address, every=1, late=["model"], quiet=True)
            for step in run.range(4):
                run.track(model=model)
                if step == 2 and die:
                    raise Killed
                model.drop.p = 0.1 if step == 0 else model.drop.p
            run.close()

    address, model = fresh_address(), Net()
    job(Net(), address, die=True)
    job(model, address, die=False)
    assert model.drop.p == 0.1


class Annealed(Net):
    """Softer at each step, counted in an attribute."""

    def __init__(self) -> None:
        super().__init__()
        self.temperature = 1.0
        self.classes = 10

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        self.temperature *= 0.9
        return super().forward(x) / self.temperature


def test_numbers_that_no_checkpoint_holds_are_said_once(capfd: pytest.CaptureFixture[str]) -> None:
    with process():
        train(fresh_address(), Countdown(), [], make=Annealed)
    err = capfd.readouterr().err
    assert err.count("in no checkpoint") == 1
    assert "model.temperature (1.0 -> 0.9)" in err
    assert "classes" not in err


class Remembered(Annealed):
    def get_extra_state(self) -> float:
        return self.temperature

    def set_extra_state(self, state: float) -> None:
        self.temperature = state


def test_numbers_in_extra_state_are_saved_and_not_complained_of(
    capfd: pytest.CaptureFixture[str],
) -> None:
    def script(address: str, die: Countdown, losses: list[Any]) -> None:
        train(address, die, losses, make=Remembered)

    kill_everywhere(script)
    assert "in no checkpoint" not in capfd.readouterr().err


def test_what_is_read() -> None:
    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.ReLU())
    assert read({"all": {"net": [model]}, "step": 3}) == {
        "all/net/0.training": True,
        "all/net/0/0.training": True,
        "all/net/0/0.weight.requires_grad": True,
        "all/net/0/0.in_features": 2,
        "all/net/0/0.out_features": 2,
        "all/net/0/1.training": True,
        "all/net/0/1.inplace": False,
    }
    assert unsaved({"model": Annealed()}) == {"model.temperature": 1.0, "model.classes": 10}


def test_a_lazy_module_keeps_the_sizes_that_it_finds() -> None:
    model = nn.LazyLinear(3)
    before = read({"model": model})
    assert "model.in_features" not in before
    model(torch.ones(1, 2))
    write({"model": model}, before)
    assert model.in_features == 2
