"""Optimizers and schedulers that are built otherwise than in the last run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.optim import lr_scheduler as schedulers

import holdfast
from holdfast.errors import ConfigChanged, UsageError
from holdfast.torch.settings import is_derived, read, write
from tests.support.damage import damage_newest
from tests.support.jobs import Killed, fresh_address, process

Made = tuple[torch.optim.Optimizer, Any]


def net() -> torch.nn.Module:
    torch.manual_seed(0)
    return torch.nn.Linear(2, 2)


def job(
    address: str,
    make: Callable[[torch.nn.Module], Made],
    *,
    steps: int = 8,
    kill_at: int | None = None,
    **options: Any,
) -> list[float]:
    """The learning rate at each step of this process."""
    model = net()
    optimizer, scheduler = make(model)
    rates: list[float] = []
    with process():
        run = holdfast.Run(address, every=1, **options)
        run.track(model=model, optimizer=optimizer, scheduler=scheduler)
        for number in run.range(steps):
            if number == kill_at:
                run.manager.wait()
                raise Killed
            rates.append(float(optimizer.param_groups[0]["lr"]))
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
            scheduler.step()
    run.close()
    return rates


def one_cycle(steps: int, lr: float = 0.1) -> Callable[[torch.nn.Module], Made]:
    def make(model: torch.nn.Module) -> Made:
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        return optimizer, schedulers.OneCycleLR(optimizer, lr, total_steps=steps)

    return make


def adam(scheduled: Any = None, **options: Any) -> Callable[[torch.nn.Module], Made]:
    def make(model: torch.nn.Module) -> Made:
        optimizer = torch.optim.Adam(model.parameters(), **options)
        if scheduled is not None:
            return optimizer, scheduled(optimizer)
        return optimizer, schedulers.StepLR(optimizer, 100)

    return make


def test_changed_totals_are_refused_with_a_diff() -> None:
    address = fresh_address()
    job(address, one_cycle(10), kill_at=4, quiet=True)
    with pytest.raises(ConfigChanged) as caught:
        job(address, one_cycle(30), quiet=True)
    assert "scheduler.total_steps: 10 -> 30" in caught.value.message
    assert "_schedule_phases" not in caught.value.message
    assert "Run(..., override=['scheduler'])" in caught.value.hint


def test_an_override_takes_the_new_total(capfd: pytest.CaptureFixture[str]) -> None:
    address = fresh_address()
    rates = job(address, one_cycle(10), kill_at=4, quiet=True)
    rates += job(address, one_cycle(30), steps=30, override=["scheduler"])
    assert "not as in the checkpoint: scheduler.total_steps: 10 -> 30" in capfd.readouterr().err
    expected = job(fresh_address(), one_cycle(30), steps=30, quiet=True)
    # The rate of the fifth step was set in the fourth, by the old schedule.
    assert rates[5:] == expected[5:]
    # And it is what later runs are compared with.
    assert job(address, one_cycle(30), steps=30, quiet=True) == []
    with pytest.raises(ConfigChanged):
        job(address, one_cycle(10), steps=30, quiet=True)


def test_the_hint_can_be_pasted_in_place_of_an_earlier_override() -> None:
    address = fresh_address()
    job(address, adam(lr=0.1), kill_at=4, quiet=True)
    new = adam(lambda one: schedulers.StepLR(one, 7), lr=0.1, betas=(0.8, 0.9))
    with pytest.raises(ConfigChanged) as caught:
        job(address, new, quiet=True, override=["optimizer"])
    assert "scheduler.step_size: 100 -> 7" in caught.value.message
    assert "betas" not in caught.value.message
    assert "Run(..., override=['optimizer', 'scheduler'])" in caught.value.hint
    job(address, new, quiet=True, override=["optimizer", "scheduler"])


@pytest.mark.parametrize(
    ("old", "new", "lines"),
    [
        (
            adam(lr=0.1),
            adam(lr=0.2),
            ["optimizer.lr: 0.1 -> 0.2", "scheduler.base_lrs[0]: 0.1 -> 0.2"],
        ),
        (adam(), adam(betas=(0.8, 0.99)), ["optimizer.betas: (0.9, 0.999) -> (0.8, 0.99)"]),
        (adam(), adam(amsgrad=True), ["optimizer.amsgrad: False -> True"]),
        (
            adam(lambda one: schedulers.MultiStepLR(one, [3, 6], gamma=0.5)),
            adam(lambda one: schedulers.MultiStepLR(one, [3, 6], gamma=0.1)),
            ["scheduler.gamma: 0.5 -> 0.1"],
        ),
        (
            adam(
                lambda one: schedulers.SequentialLR(
                    one, [schedulers.ConstantLR(one), schedulers.StepLR(one, 3)], [4]
                )
            ),
            adam(
                lambda one: schedulers.SequentialLR(
                    one, [schedulers.ConstantLR(one), schedulers.StepLR(one, 2)], [5]
                )
            ),
            [
                "scheduler._schedulers[1].step_size: 3 -> 2",
                "scheduler._milestones[0]: 4 -> 5",
            ],
        ),
    ],
)
def test_what_differs_is_named(old: Any, new: Any, lines: list[str]) -> None:
    address = fresh_address()
    job(address, old, kill_at=2, quiet=True)
    with pytest.raises(ConfigChanged) as caught:
        job(address, new, quiet=True)
    for line in lines:
        assert line in caught.value.message
    job(address, old, quiet=True)


def chained(gamma: float) -> Callable[[torch.nn.Module], Made]:
    return adam(
        lambda one: schedulers.ChainedScheduler(
            [schedulers.ConstantLR(one, 0.5, 4), schedulers.ExponentialLR(one, gamma)]
        ),
        lr=0.1,
    )


def test_a_chain_of_schedulers() -> None:
    address = fresh_address()
    rates = job(address, chained(0.9), kill_at=3, quiet=True)
    with pytest.raises(ConfigChanged, match=r"scheduler._schedulers\[1\].gamma: 0.9 -> 0.8"):
        job(address, chained(0.8), quiet=True)
    rates += job(address, chained(0.9), quiet=True)
    assert rates == job(fresh_address(), chained(0.9), quiet=True)


def test_a_chain_of_schedulers_that_is_in_use_is_not_compared() -> None:
    optimizer, chain = chained(0.9)(net())
    assert read({"chain": chain}) is not None
    optimizer.step()
    chain.step()
    assert read({"chain": chain}) is None


def test_one_setting_can_be_overridden() -> None:
    address = fresh_address()
    job(address, adam(lr=0.1), kill_at=2, quiet=True)
    names = ["optimizer.lr", "optimizer.initial_lr", "scheduler.base_lrs"]
    rates = job(address, adam(lr=0.2), quiet=True, override=names)
    assert rates == [0.2] * 6
    with pytest.raises(UsageError, match="is text"):
        holdfast.Run(address, override="optimizer")


def test_a_learning_rate_in_a_tensor() -> None:
    address = fresh_address()
    job(address, adam(lr=torch.tensor(0.5)), kill_at=2, quiet=True)
    with pytest.raises(ConfigChanged, match=r"optimizer.lr: 0.5 -> 0.25"):
        job(address, adam(lr=torch.tensor(0.25)), quiet=True)
    rates = job(
        address, adam(lr=torch.tensor(0.25)), quiet=True, override=["optimizer", "scheduler"]
    )
    assert rates == [0.25] * 6


def test_objects_that_are_in_use_are_not_compared() -> None:
    """A notebook's cell makes a new Run for the optimizer that the last one left."""
    address = fresh_address()
    model = net()
    optimizer, scheduler = one_cycle(20)(model)
    for kill_at in (3, None):
        with process():
            run = holdfast.Run(address, every=1, quiet=True)
            run.track(model=model, optimizer=optimizer, scheduler=scheduler)
            for number in run.range(6):
                if number == kill_at:
                    raise Killed
                model(torch.ones(1, 2)).sum().backward()
                optimizer.step()
                scheduler.step()
    run.close()
    with pytest.raises(ConfigChanged, match="total_steps: 20 -> 10"):
        job(address, one_cycle(10), quiet=True)


def test_several_groups_and_nested_names() -> None:
    model = net()
    groups = [{"params": [param], "lr": 0.1 * n} for n, param in enumerate(model.parameters(), 1)]
    tracked = {"all": {"one": torch.optim.SGD(groups)}}
    found = read(tracked)
    assert found is not None
    assert found["all/one[1].lr"] == 0.2
    assert "all/one[1].fused" not in found
    write(tracked, {"all/one[0].lr": 5.0})
    assert tracked["all"]["one"].param_groups[0]["lr"] == 5.0


def test_derived_names() -> None:
    assert is_derived("scheduler._schedule_phases[0].end_step")
    assert not is_derived("scheduler._schedulers[0].gamma")
    assert is_derived("scheduler._schedulers[0]._schedule_phases[0].end_step")


def late_job(address: str, lr: float, *, stop_at: int, name: str = "second", **options: Any) -> Any:
    """An optimizer that is built and tracked once the loop runs; its learning rate at the
    last step of this process."""
    model = net()
    optimizer: Any = None
    with process():
        run = holdfast.Run(address, every=1, late=[name], **options)
        run.track(model=model)
        for number in run.range(8):
            if number == stop_at:
                run.manager.wait()
                raise Killed
            if optimizer is None:
                optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
                run.track(**{name: optimizer})
            model(torch.ones(1, 2)).sum().backward()
            optimizer.step()
            optimizer.zero_grad()
    return optimizer.param_groups[0]["lr"]


def test_what_is_tracked_late_is_as_saved_and_that_is_said(capfd) -> None:
    address = fresh_address()
    assert late_job(address, 0.5, stop_at=2) == 0.5
    capfd.readouterr()
    assert late_job(address, 0.25, stop_at=4, quiet=True) == 0.5
    err = capfd.readouterr().err
    assert "as in the checkpoint, not as built now: second.lr: 0.5 -> 0.25; override=" in err


def test_an_override_reaches_what_is_tracked_late(capfd) -> None:
    address = fresh_address()
    late_job(address, 0.5, stop_at=2)
    assert late_job(address, 0.25, stop_at=4, override=["second.lr"]) == 0.25
    assert "not as in the checkpoint: second.lr: 0.5 -> 0.25" in capfd.readouterr().err
    assert late_job(address, 0.25, stop_at=6) == 0.25
    assert "second.lr" not in capfd.readouterr().err


def test_settings_are_compared_under_the_new_name(capfd) -> None:
    address = fresh_address()
    late_job(address, 0.5, stop_at=2)
    renamed = {"name": "third", "rename": {"second": "third"}}
    assert late_job(address, 0.25, stop_at=4, override=["third"], **renamed) == 0.25
    assert "not as in the checkpoint: third.lr: 0.5 -> 0.25" in capfd.readouterr().err


def test_a_renamed_optimizer_is_refused_with_other_settings() -> None:
    address = fresh_address()
    job(address, adam(lr=0.5), kill_at=3, quiet=True)
    model = net()
    optimizer, scheduler = adam(lr=0.25)(model)
    rename = {"optimizer": "adam"}
    with holdfast.Run(address, rename=rename, quiet=True) as run:
        run.track(model=model, adam=optimizer, scheduler=scheduler)
        with pytest.raises(ConfigChanged, match=r"adam\.lr: 0\.5 -> 0\.25"):
            run.range(8)


def test_a_fallback_is_compared_with_the_checkpoint_that_it_takes(tmp_path: Path) -> None:
    """An override was saved with the newest checkpoint only, and that is damaged."""
    address = str(tmp_path / "run")
    job(address, adam(lr=0.5), kill_at=3, quiet=True)
    job(address, adam(lr=0.25), kill_at=4, quiet=True, override=["optimizer", "scheduler"])
    damage_newest(tmp_path / "run")
    options: dict[str, Any] = {"quiet": True, "override": ["optimizer", "scheduler"]}
    assert job(address, adam(lr=0.25), kill_at=5, **options) == [0.25] * 2


def test_a_fallback_to_a_checkpoint_with_other_names(tmp_path: Path) -> None:
    """From before a rename that has been done in the newest one."""
    address = str(tmp_path / "run")
    job(address, adam(lr=0.5), kill_at=3, quiet=True)

    def renamed_job(kill_at: int | None) -> list[int]:
        model = net()
        optimizer, scheduler = adam(lr=0.5)(model)
        steps: list[int] = []
        with process():
            run = holdfast.Run(address, every=1, quiet=True, rename={"optimizer": "adam"})
            run.track(model=model, adam=optimizer, scheduler=scheduler)
            for number in run.range(6):
                if number == kill_at:
                    run.manager.wait()
                    raise Killed
                steps.append(number)
        return steps

    assert renamed_job(kill_at=4) == [3]
    damage_newest(tmp_path / "run")
    assert renamed_job(kill_at=None) == [3, 4, 5]
