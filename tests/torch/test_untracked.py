"""What lies beside tracked objects and is not saved."""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from holdfast.errors import UntrackedParameters
from holdfast.torch import (
    find_untracked,
    load_checkpoint,
    save_checkpoint,
    untracked_parameters,
)


def test_names_of_what_is_not_tracked() -> None:
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.StepLR(optimizer, 2)
    scaler = torch.amp.GradScaler("cpu")
    unused = torch.amp.GradScaler("cpu", enabled=False)
    frame = {
        "model": model,
        "optimizer": optimizer,
        "same": optimizer,
        "scheduler": scheduler,
        "scaler": scaler,
        "unused": unused,
        "step": 3,
    }
    assert find_untracked(frame, {"model": model}) == ["optimizer", "scheduler", "scaler"]
    assert find_untracked(frame, {"model": model, "opt": optimizer}) == ["scheduler", "scaler"]
    assert find_untracked(frame, [optimizer, scheduler, scaler]) == []


def test_what_tracked_objects_hold_is_tracked() -> None:
    optimizer = torch.optim.SGD(nn.Linear(2, 2).parameters(), lr=0.1)
    parts = [torch.optim.lr_scheduler.ConstantLR(optimizer) for _ in range(2)]
    both = torch.optim.lr_scheduler.ChainedScheduler(parts)
    frame = {"optimizer": optimizer, "part": parts[0], "both": both}
    assert find_untracked(frame, {"s": both}) == ["optimizer"]
    assert find_untracked(frame, {"all": {"o": [optimizer], "s": (both,)}}) == []

    class Trainer:
        def __init__(self) -> None:
            self.optimizer = optimizer
            self.schedulers = {"warmup": both}

        def state_dict(self) -> dict[str, object]:
            return {}

    assert find_untracked(frame, {"trainer": Trainer()}) == []
    # Of a composed scheduler that is untracked, its parts need no line of their own.
    assert find_untracked({"both": both, "part": parts[0]}, {}) == ["both"]


# -- parameters -----------------------------------------------------------------------


def sgd(*params: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(params, lr=0.1)


def plain(*shape: int) -> torch.Tensor:
    return torch.zeros(shape, requires_grad=True)


def test_parameters_of_no_tracked_module_are_named() -> None:
    model, weight, scale = nn.Linear(4, 3), plain(10, 4), nn.Parameter(plain(1).double())
    optimizer = torch.optim.SGD(
        [
            {"params": [*model.parameters(), weight]},
            {"params": [scale]},
            {"params": nn.LazyLinear(2).parameters()},
        ],
        lr=0.1,
    )
    assert untracked_parameters({"model": model, "optimizer": optimizer}) == [
        "optimizer: parameter 2 of group 0, float32[10, 4]",
        "optimizer: parameter 0 of group 1, float64[1]",
        "optimizer: parameter 0 of group 2, float32[]",
        "optimizer: parameter 1 of group 2, float32[]",
    ]
    assert len(untracked_parameters({"optimizer": optimizer, "weight": weight})) == 5
    assert untracked_parameters({"model": model}) == []


def test_names_that_the_optimizer_knows_are_told() -> None:
    optimizer = torch.optim.SGD([("log_alpha", plain(1))], lr=0.1)
    assert untracked_parameters({"opts": {"alpha": [optimizer]}}) == [
        "opts/alpha/0: parameter 0 of group 0 (log_alpha), float32[1]"
    ]


@dataclass
class Pair:
    first: Any
    second: Any


class Agent:
    """Holds its parts through an object that nothing is known of."""

    def __init__(self, part: Any) -> None:
        self.inside = SimpleNamespace(part=part)

    def state_dict(self) -> dict[str, Any]:
        return {"part": self.inside.part}

    def load_state_dict(self, state: Any) -> None: ...


class ByHand(nn.Module):
    """Saves a tensor that torch does not know as its parameter."""

    def __init__(self, extra: torch.Tensor) -> None:
        super().__init__()
        self.extra = extra

    def get_extra_state(self) -> Any:
        return self.extra

    def set_extra_state(self, state: Any) -> None: ...


WEIGHT = plain(3)
HOLDERS = {
    "itself": WEIGHT,
    "its memory": WEIGHT.detach(),
    "a list": [[WEIGHT]],
    "a deque": deque([WEIGHT]),
    "a dataclass": Pair(1, {"w": WEIGHT}),
    "an object with state_dict": Agent(WEIGHT),
    "a ParameterList": nn.ParameterList([nn.Parameter(WEIGHT)]),
    "extra state": nn.Sequential(ByHand(WEIGHT)),
}


@pytest.mark.parametrize("holder", HOLDERS)
def test_a_parameter_is_saved_with_what_holds_it(holder: str) -> None:
    optimizer = sgd(WEIGHT)
    assert len(untracked_parameters({"optimizer": optimizer})) == 1
    assert untracked_parameters({"optimizer": optimizer, "holder": HOLDERS[holder]}) == []


def test_modules_that_wrap_the_parameters_save_them() -> None:
    tied = nn.Linear(3, 3)
    model = nn.Sequential(tied, tied, nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)))
    optimizer = sgd(*model.parameters())
    compiled: Any = torch.compile(model, backend="eager")
    wrapped = nn.DataParallel(compiled)
    assert untracked_parameters({"model": wrapped, "optimizer": optimizer}) == []


def test_what_a_state_dict_leaves_out_is_not_saved() -> None:
    class Careless(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.log_alpha = plain(1)  # no nn.Parameter: state_dict does not have it
            self.register_buffer("scale", plain(2), persistent=False)

    model = Careless()
    optimizer = sgd(model.log_alpha, model.scale)
    assert len(untracked_parameters({"model": model, "optimizer": optimizer})) == 2


def test_an_average_does_not_hold_the_model() -> None:
    model = nn.Linear(2, 2)
    average = torch.optim.swa_utils.AveragedModel(model)
    optimizer = sgd(*model.parameters())
    assert len(untracked_parameters({"ema": average, "optimizer": optimizer})) == 2


def test_frozen_parameters_need_not_be_tracked() -> None:
    frozen = plain(2).requires_grad_(False)
    optimizer = sgd(frozen)
    assert untracked_parameters({"optimizer": optimizer}) == []
    frozen.grad = torch.ones(2)  # set by hand, it is trained all the same
    assert len(untracked_parameters({"optimizer": optimizer})) == 1


def test_an_optimizer_that_saves_its_parameters() -> None:
    class Mixed(torch.optim.SGD):
        """Keeps float32 parameters for a bfloat16 model."""

        def state_dict(self) -> Any:
            masters = [p.detach() for group in self.param_groups for p in group["params"]]
            return {**super().state_dict(), "masters": masters}

    class Counted(torch.optim.SGD):
        def state_dict(self) -> Any:
            return super().state_dict()

    assert untracked_parameters({"optimizer": Mixed([plain(2)], lr=0.1)}) == []
    assert len(untracked_parameters({"optimizer": Counted([plain(2)], lr=0.1)})) == 1


def test_a_container_in_itself_ends() -> None:
    loop: list[Any] = [sgd(plain(2))]
    loop.append(loop)
    assert len(untracked_parameters({"loop": loop})) == 1


def test_where_there_is_too_much_to_search_nothing_is_claimed(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tracked = {"optimizer": sgd(plain(2)), "many": [[] for _ in range(10)]}
    assert len(untracked_parameters(tracked)) == 1
    monkeypatch.setattr("holdfast.torch.untracked._MAX_OBJECTS", 5)
    assert untracked_parameters(tracked) == []


def test_long_reports_are_cut() -> None:
    error = UntrackedParameters([f"p{n}" for n in range(25)])
    assert "p9\n  ... and 15 more" in error.message
    assert "p10" not in error.message
    assert len(error.parameters) == 25


# -- who refuses ----------------------------------------------------------------------

LOST = r"optimizer: parameter 2 of group 0, float32\[3\]"


def test_the_plain_functions_refuse(tmp_path: Path) -> None:
    model, extra = nn.Linear(2, 2), plain(3)
    named: Any = {"model": model, "optimizer": sgd(*model.parameters(), extra)}
    with pytest.raises(UntrackedParameters, match=LOST) as caught:
        save_checkpoint(tmp_path / "run", step=1, **named)
    assert "save_checkpoint(..., extra=tensor)" in caught.value.hint
    assert not (tmp_path / "run").exists()
    save_checkpoint(tmp_path / "run", step=1, **named, extra=extra)
    with pytest.raises(UntrackedParameters, match=LOST):
        load_checkpoint(tmp_path / "run", **named)
    assert load_checkpoint(tmp_path / "run", **named, extra=extra) is not None
    assert load_checkpoint(tmp_path / "run", strict=False, **named) is not None


def test_a_run_refuses_before_its_first_step(tmp_path: Path) -> None:
    model, extra = nn.Linear(2, 2), plain(3)
    optimizer = sgd(*model.parameters(), extra)
    steps: list[int] = []
    run = holdfast.Run(tmp_path / "run", quiet=True)
    run.track(model=model, optimizer=optimizer)
    with pytest.raises(UntrackedParameters, match=LOST) as caught:
        steps.extend(run.range(3))
    assert "run.track(extra=tensor)" in caught.value.hint
    run.close()
    assert steps == []
    with holdfast.Run(tmp_path / "run", quiet=True) as run:
        run.track(model=model, optimizer=optimizer, extra=extra)
        steps.extend(run.range(3))
    assert steps == [0, 1, 2]


def test_a_run_waits_for_what_is_tracked_late_until_it_saves(tmp_path: Path) -> None:
    model, extra = nn.Linear(2, 2), plain(3)
    optimizer = sgd(*model.parameters(), extra)
    with holdfast.Run(tmp_path / "run", every=1, late=["extra"], quiet=True) as run:
        run.track(model=model, optimizer=optimizer)
        for _ in run.range(3):
            run.track(extra=extra)
    assert run.step == 3
    run = holdfast.Run(tmp_path / "other", every=1, late=["extra"], quiet=True)
    run.track(model=model, optimizer=optimizer)
    with pytest.raises(UntrackedParameters, match=LOST):
        for _ in run.range(3):
            assert run.step == 0
    run.close()


def test_an_optimizer_tracked_inside_the_loop_is_looked_at(tmp_path: Path) -> None:
    run = holdfast.Run(tmp_path / "run", every=1, late=["optimizer"], quiet=True)
    run.track(model=nn.Linear(2, 2))
    with pytest.raises(UntrackedParameters):
        for _ in run.range(3):
            run.track(optimizer=sgd(plain(3)))
    run.close()


def test_a_local_that_raises_when_it_is_looked_at() -> None:
    class Broken:
        def __getattribute__(self, name: str) -> object:
            raise RuntimeError(name)

    model = nn.Linear(1, 1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scope = {"broken": Broken(), "optimizer": optimizer}
    assert find_untracked(scope, {"model": model}) == ["optimizer"]
