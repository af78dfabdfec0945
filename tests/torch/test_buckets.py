"""DistributedDataParallel on more than two ranks sums in the order of before: down to bits."""

from __future__ import annotations

import contextlib
import io
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import distributed, nn
from torch._C import _distributed_c10d
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks
from torch.nn.parallel import DistributedDataParallel

import holdfast
from holdfast.core.frameworks import process_group
from holdfast.torch import buckets
from tests.support import ranks


class Net(nn.Module):
    """Its parts are used in another order than they are defined in."""

    def __init__(self, mixed: bool = False) -> None:
        super().__init__()
        self.c = nn.Linear(90, 90)
        self.a = nn.Linear(90, 90)
        self.b = nn.Linear(90, 90).to(torch.float64 if mixed else torch.float32)
        self.d = nn.Linear(90, 90)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for part in (self.a, self.b, self.c, self.d):
            x = torch.tanh(part(x.to(part.weight.dtype)))
        return x


def wrapped(how: str) -> Any:
    torch.manual_seed(1)
    options: dict[str, Any] = {
        "static": {"static_graph": True},
        "views": {"gradient_as_bucket_view": True},
        "unused": {"find_unused_parameters": True},
    }.get(how, {})
    ddp = DistributedDataParallel(Net(mixed=how == "mixed"), bucket_cap_mb=0.07, **options)
    if how == "hook":
        ddp.register_comm_hook(None, default_hooks.fp16_compress_hook)
    if how == "built in":
        ddp._register_builtin_comm_hook(_distributed_c10d.BuiltinCommHookType.ALLREDUCE)
    return ddp


def backward(model: nn.Module, number: int) -> None:
    generator = torch.Generator().manual_seed(100 * number + distributed.get_rank())
    model(torch.randn(4, 90, generator=generator)).square().mean().backward()


def train(address: str, how: str, ends: int | None = None, again: int | None = None) -> Any:
    """Six bodies; ended after so many (`ends`), and with a new wrapper before one (`again`)."""
    ddp = wrapped(how)
    optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
    run = holdfast.Run(address, every=1, keep=None, quiet=True, take_over=True)
    run.track(model={"inner": [nn.Sequential(ddp)]}, optimizer=optimizer)
    accumulates = how == "accumulates"
    for step in run.range(6):
        if step == ends:
            run.manager.wait()
            run._closed = True  # as a killed process, without its end
            run._session.gradients.close()
            run._session.barriers.close()
            return None
        if step == again:
            ddp = DistributedDataParallel(ddp.module, bucket_cap_mb=0.07)
        if accumulates:
            with ddp.no_sync():
                backward(ddp, 10 + step)
        backward(ddp, step)
        if not accumulates or step % 2:
            optimizer.step()
            optimizer.zero_grad()
    run.close()
    return {name: value.clone() for name, value in ddp.module.state_dict().items()}


def same(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(one[name], other[name]) for name in one)


def test_the_order_of_sums_is_seen_in_their_bits(tmp_path: Path) -> None:
    whole = ranks.call(train, 3, str(tmp_path / "whole"), "")
    again = ranks.call(train, 3, str(tmp_path / "again"), "", None, 3)
    assert not same(again[0], whole[0])


@pytest.mark.parametrize(
    "how",
    [
        "",
        "accumulates",
        *(
            pytest.param(how, marks=pytest.mark.slow)
            for how in ("static", "views", "unused", "hook", "mixed")
        ),
    ],
)
def test_a_run_goes_on_in_the_order_of_before(how: str, tmp_path: Path) -> None:
    whole = ranks.call(train, 3, str(tmp_path / "whole"), how)
    for ends in (2, 4) if how == "static" else (1, 2, 4):  # that one has an order from step 2 on
        address = str(tmp_path / f"ended-{ends}")
        ranks.call(train, 3, address, how, ends)
        ranks.call(train, 3, address, how, ends + 1)  # which had the order, and hands it on
        assert all(same(found, whole[0]) for found in ranks.call(train, 3, address, how))


def orders(how: str, steps: int = 1) -> Any:
    """What is found behind so many steps, and what is written of it elsewhere."""
    ddp = wrapped(how)
    for step in range(steps):
        backward(ddp, step)
    return buckets.read({"model": ddp})


def test_the_order_is_known_behind_any_step() -> None:
    [found, *others] = ranks.call(orders, 3, "")
    assert found["model"]["order"] == "7 6 1 0 5 4 3 2"
    assert others == [found, found]
    for steps in (2, 3, 15):
        assert ranks.call(orders, 3, "", steps) == [found] * 3


def test_nothing_is_said_of_what_keeps_its_order() -> None:
    assert ranks.call(orders, 3, "", 0) == [{}] * 3  # no gradients were ready yet
    assert ranks.call(orders, 3, "unused") == [{}] * 3
    assert ranks.call(orders, 2, "") == [{}] * 2


def unfinished() -> Any:
    """Some parameters have no gradient, of which torch tells the program in the next step."""
    ddp = wrapped("")
    ddp.module.c = nn.Identity()
    ddp.module.c.weight = torch.zeros(())
    backward(ddp, 0)
    found = buckets.read({"model": ddp})
    with pytest.raises(RuntimeError, match="find_unused_parameters=True"):
        backward(ddp, 1)
    return found


def test_gradients_that_are_missing_are_no_error_of_the_save() -> None:
    assert ranks.call(unfinished, 3) == [{}] * 3


def written(how: str, changes: dict[str, Any], only_on: int | None = None) -> Any:
    group = process_group()
    assert group is not None
    behind = wrapped("")
    backward(behind, 0)
    saved = buckets.read({"model": behind})["model"]
    ddp = wrapped(how)
    if how == "stepped":
        for parameter in ddp.module.parameters():
            parameter._in_backward_optimizers = []  # pyright: ignore[reportAttributeAccessIssue]
        ddp._lazy_init_ran = True
    reducer = ddp.reducer
    mine = only_on is None or distributed.get_rank() == only_on
    said = buckets.write({"model": ddp}, {"model": saved | changes} if mine else {}, group)
    assert (ddp.reducer is reducer) == bool(said or not mine)
    backward(ddp, 1)  # it is one that can be used
    return said


@pytest.mark.parametrize(
    ("how", "changes", "why"),
    [
        ("", {"names": "0123"}, "its parameters are others"),
        ("", {"order": "0 1 2 3 4 5 6 6"}, "does not name each parameter once"),
        ("built in", {}, "a built-in communication hook"),
        ("stepped", {}, "an optimizer steps in its backward"),
    ],
)
def test_why_it_has_another_order_is_told(how: str, changes: dict[str, Any], why: str) -> None:
    for said in ranks.call(written, 3, how, changes):
        assert why in said["model"]


def test_all_ranks_have_the_order_or_none() -> None:
    said = ranks.call(written, 3, "", {}, 1)
    assert said == [{}, {"model": "not all ranks have it"}, {}]


def given_twice() -> bool:
    group = process_group()
    assert group is not None
    ddp = wrapped("")
    backward(ddp, 0)
    reducer, saved = ddp.reducer, buckets.read({"model": ddp})
    assert buckets.write({"model": ddp}, saved, group) == {}
    return ddp.reducer is reducer


def test_one_that_has_the_order_stays_as_it_is() -> None:
    assert ranks.call(given_twice, 3) == [True] * 3


def said_of_a_run(address: str) -> str:
    """A run that was saved with one model goes on with another hook."""
    train(address, "", ends=2)
    with contextlib.redirect_stderr(io.StringIO()) as err:
        ddp = wrapped("built in")
        optimizer = torch.optim.SGD(ddp.parameters(), lr=0.1, momentum=0.9)
        with holdfast.Run(address, every=1, keep=None, take_over=True) as run:
            run.track(model={"inner": [nn.Sequential(ddp)]}, optimizer=optimizer)
            for step in run.range(3):
                backward(ddp, step)
                optimizer.step()
                optimizer.zero_grad()
    return err.getvalue()


def test_a_run_says_that_the_order_is_another(tmp_path: Path) -> None:
    first, *_ = ranks.call(said_of_a_run, 3, str(tmp_path / "run"))
    assert (
        "model/inner/0/0: gradients are summed in another order than before, as a built-in "
        "communication hook cannot be given to it again"
    ) in first
