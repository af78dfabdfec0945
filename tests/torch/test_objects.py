"""Schedulers, scalers, generators, and torch's plain values."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler as schedulers

from holdfast.errors import DamagedObject, StateError, StructureMismatch
from tests.torch.roundtrip import Checkpoint, assert_same, roundtrip


class Warmup:
    """A callable object: its attributes are part of a LambdaLR's state."""

    def __init__(self, steps: int) -> None:
        self.steps = steps
        self.calls = 0

    def __call__(self, epoch: float) -> float:
        self.calls += 1
        return min(1.0, (epoch + 1) / self.steps)


def sequence(optimizer: Any) -> Any:
    parts = [
        schedulers.LinearLR(optimizer, 0.1, total_iters=2),
        schedulers.ExponentialLR(optimizer, 0.9),
    ]
    return schedulers.SequentialLR(optimizer, parts, milestones=[2])


def chain(optimizer: Any) -> Any:
    parts = [
        schedulers.ConstantLR(optimizer, 0.5, total_iters=4),
        schedulers.MultiStepLR(optimizer, [2, 2, 5]),
    ]
    return schedulers.ChainedScheduler(parts)


SCHEDULERS: dict[str, Callable[[Any], Any]] = {
    "ChainedScheduler": chain,
    "ConstantLR": lambda o: schedulers.ConstantLR(o, total_iters=4),
    "CosineAnnealingLR": lambda o: schedulers.CosineAnnealingLR(o, 10),
    "CosineAnnealingWarmRestarts": lambda o: schedulers.CosineAnnealingWarmRestarts(o, 2, 2),
    "CyclicLR": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, 2, mode="exp_range", gamma=0.9),
    "CyclicLR function": lambda o: schedulers.CyclicLR(
        o, 0.01, 0.1, 2, scale_fn=lambda x: 0.5**x, scale_mode="cycle"
    ),
    "CyclicLR object": lambda o: schedulers.CyclicLR(o, 0.01, 0.1, 2, scale_fn=Warmup(3)),
    "ExponentialLR": lambda o: schedulers.ExponentialLR(o, 0.9),
    "LambdaLR": lambda o: schedulers.LambdaLR(o, lambda epoch: 0.95**epoch),
    "LambdaLR object": lambda o: schedulers.LambdaLR(o, [Warmup(5), Warmup(3)]),
    "LinearLR": lambda o: schedulers.LinearLR(o, total_iters=4),
    "MultiStepLR": lambda o: schedulers.MultiStepLR(o, [2, 4, 4]),
    "MultiplicativeLR": lambda o: schedulers.MultiplicativeLR(o, lambda epoch: 0.95),
    "OneCycleLR": lambda o: schedulers.OneCycleLR(o, [0.1, 0.2], total_steps=20),
    "PolynomialLR": lambda o: schedulers.PolynomialLR(o, 6, 2.0),
    "ReduceLROnPlateau": lambda o: schedulers.ReduceLROnPlateau(o, patience=1, cooldown=1),
    "SequentialLR": sequence,
    "StepLR": lambda o: schedulers.StepLR(o, 2),
    "SWALR": lambda o: torch.optim.swa_utils.SWALR(o, 0.01, anneal_epochs=3),
}


def optimizer(rate: Any = 0.5) -> torch.optim.Optimizer:
    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
    return torch.optim.SGD(
        [{"params": params[:1]}, {"params": params[1:], "lr": rate * 2}], lr=rate, momentum=0.9
    )


def step(scheduler: Any, first: int, last: int) -> list[Any]:
    """Rates after each step; the loss stands still for a while."""
    rates = []
    for number in range(first, last):
        scheduler.optimizer.step()
        if isinstance(scheduler, schedulers.ReduceLROnPlateau):
            scheduler.step(max(0.5, 2.0 - number))
        else:
            scheduler.step()
        rates.append([float(group["lr"]) for group in scheduler.optimizer.param_groups])
        rates.append([group["momentum"] for group in scheduler.optimizer.param_groups])
    return rates


def test_every_scheduler_of_torch_is_tried() -> None:
    abstract = {"LRScheduler", "_LRScheduler"}
    classes = {
        name
        for name, value in vars(schedulers).items()
        if isinstance(value, type) and issubclass(value, schedulers.LRScheduler)
    }
    assert classes - abstract == {name.split()[0] for name in SCHEDULERS} - {"SWALR"}


@pytest.mark.parametrize("name", SCHEDULERS)
@pytest.mark.parametrize("scheduler_first", [True, False])
def test_rates_go_on_exactly(name: str, scheduler_first: bool) -> None:
    make = SCHEDULERS[name]
    saved = make(optimizer())
    step(saved, 0, 4)
    names = ("s", "o") if scheduler_first else ("o", "s")
    checkpoint = Checkpoint({key: {"s": saved, "o": saved.optimizer}[key] for key in names})

    live = make(optimizer())
    step(live, 0, 1)
    checkpoint.restore({"s": live, "o": live.optimizer})
    assert [group["lr"] for group in live.optimizer.param_groups] == [
        group["lr"] for group in saved.optimizer.param_groups
    ]
    assert_same(live.state_dict(), saved.state_dict())
    assert step(live, 4, 10) == step(saved, 4, 10)


@pytest.mark.parametrize("name", ["ExponentialLR", "OneCycleLR", "SequentialLR"])
def test_tensor_rates(name: str) -> None:
    make = SCHEDULERS[name]
    saved = make(optimizer(torch.tensor(0.5)))
    step(saved, 0, 4)
    live = make(optimizer(torch.tensor(0.25)))
    rates = [group["lr"] for group in live.optimizer.param_groups]
    Checkpoint({"o": saved.optimizer, "s": saved}).restore({"o": live.optimizer, "s": live})
    assert all(
        group["lr"] is rate for group, rate in zip(live.optimizer.param_groups, rates, strict=True)
    )
    assert step(live, 4, 8) == step(saved, 4, 8)


def test_a_scheduler_alone_leaves_the_rates_alone() -> None:
    class Eager(schedulers.ExponentialLR):
        def load_state_dict(self, state_dict: Any) -> None:
            super().load_state_dict(state_dict)
            for group in self.optimizer.param_groups:
                group["lr"] = 99.0
                group["momentum"] = 99.0

    saved = Eager(optimizer(), 0.5)
    step(saved, 0, 3)
    live = Eager(optimizer(), 0.5)
    Checkpoint({"s": saved}).restore({"s": live})
    assert live.last_epoch == 3
    assert [group["lr"] for group in live.optimizer.param_groups] == [0.5, 1.0]
    assert [group["momentum"] for group in live.optimizer.param_groups] == [0.9, 0.9]


def test_without_a_target_it_is_the_state_dict() -> None:
    saved = SCHEDULERS["MultiStepLR"](optimizer())
    assert_same(roundtrip(saved), saved.state_dict())


def test_other_classes_and_counts_are_reported() -> None:
    checkpoint = Checkpoint({"s": SCHEDULERS["StepLR"](optimizer())})
    with pytest.raises(StructureMismatch, match=r"StepLR, live is .*ExponentialLR"):
        checkpoint.restore({"s": SCHEDULERS["ExponentialLR"](optimizer())})
    single = torch.optim.SGD([nn.Parameter(torch.zeros(2))], lr=0.1)
    with pytest.raises(StructureMismatch, match="s/base_lrs: saved as 2 items, live is 1 items"):
        checkpoint.restore({"s": SCHEDULERS["StepLR"](single)})
    with pytest.raises(StructureMismatch, match="a scheduler or scaler"):
        checkpoint.restore({"s": single})


# -- scalers ------------------------------------------------------------------


def test_grad_scaler() -> None:
    saved: Any = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=2)
    saved.scale(torch.ones(1))
    saved._growth_tracker.fill_(1)
    live = torch.amp.GradScaler("cpu", init_scale=4.0)
    used = torch.amp.GradScaler("cpu", init_scale=2.0)
    used.scale(torch.ones(1))
    scale = used._scale
    checkpoint = Checkpoint({"x": saved})
    for target in (live, used):
        checkpoint.restore({"x": target})
        assert_same(target.state_dict(), saved.state_dict())
        assert target.scale(torch.ones(1)).item() == 8.0
    assert used._scale is scale


def test_a_part_of_a_scaler_can_be_skipped() -> None:
    saved = torch.amp.GradScaler("cpu", init_scale=8.0, growth_interval=3)
    live = torch.amp.GradScaler("cpu", init_scale=2.0, growth_interval=5)
    Checkpoint({"s": saved}).restore({"s": live}, skip=["s/growth_interval"])
    assert (live.get_scale(), live.get_growth_interval()) == (8.0, 5)


def test_disabled_scalers() -> None:
    off, on = torch.amp.GradScaler("cpu", enabled=False), torch.amp.GradScaler("cpu")
    Checkpoint({"x": off}).restore({"x": off})
    Checkpoint({"x": on}).restore({"x": off})  # nothing that it could hold
    with pytest.raises(StructureMismatch, match="a disabled scaler, live is an enabled scaler"):
        Checkpoint({"x": off}).restore({"x": on})


# -- generators -----------------------------------------------------------------


def test_generators() -> None:
    saved = torch.Generator().manual_seed(5)
    torch.rand(3, generator=saved)
    checkpoint = Checkpoint({"g": saved, "again": saved})
    expected = torch.rand(4, generator=saved).tolist()
    live = torch.Generator()
    checkpoint.restore({"g": live, "again": live})
    assert torch.rand(4, generator=live).tolist() == expected
    loaded = checkpoint.restore()
    assert loaded["g"] is loaded["again"]
    assert torch.rand(4, generator=loaded["g"]).tolist() == expected


def test_generators_of_other_devices() -> None:
    checkpoint = Checkpoint({"g": torch.Generator()})
    checkpoint.json = checkpoint.json.replace(b'"device":"cpu"', b'"device":"cuda:0"')
    with pytest.raises(StructureMismatch, match="a generator on cuda:0"):
        checkpoint.restore({"g": torch.Generator()})
    checkpoint.json = checkpoint.json.replace(b"cuda:0", b"cuda:4000")
    with pytest.raises((StateError, DamagedObject)):
        checkpoint.restore()


def test_a_damaged_generator_state_is_refused() -> None:
    checkpoint = Checkpoint({"g": torch.Generator()})
    checkpoint.chunks[0] = [(chunk, b"\xff" * len(data)) for chunk, data in checkpoint.chunks[0]]
    with pytest.raises(DamagedObject, match="generator"):
        checkpoint.restore()


# -- values -----------------------------------------------------------------------


def test_plain_values_of_torch() -> None:
    state = {
        "size": torch.Size([2, 0, 3]),
        "dtype": torch.bfloat16,
        "device": torch.device("cuda:1"),
        "layout": torch.sparse_csr,
        "format": torch.channels_last,
        torch.float32: [torch.Size([]), math.pi],
    }
    loaded = Checkpoint({"x": state}).restore()["x"]
    assert loaded == state
    assert type(loaded["size"]) is torch.Size
    live = {"x": {"size": torch.Size([1]), "dtype": torch.int8}}
    Checkpoint({"x": state}).restore(live)
    assert live["x"] == state


@pytest.mark.parametrize(
    ("old", "new"),
    [('"float16"', '"load"'), ('"float16"', '"__name__"'), ('"float16"', "[]"), ('"cpu"', '"?"')],
)
def test_hostile_values_are_refused(old: str, new: str) -> None:
    checkpoint = Checkpoint({"x": [torch.float16, torch.device("cpu")]})
    assert old.encode() in checkpoint.json
    checkpoint.json = checkpoint.json.replace(old.encode(), new.encode())
    with pytest.raises(DamagedObject):
        checkpoint.restore()
