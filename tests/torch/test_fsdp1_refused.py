"""What cannot be saved of FullyShardedDataParallel (FSDP1) says so, on all ranks."""

from __future__ import annotations

import logging
import warnings
from typing import Any, cast

import pytest
import torch
from torch import distributed, nn
from torch.distributed.fsdp import FullyShardedDataParallel

from holdfast.core.tree import TreeEncoder
from holdfast.errors import HoldfastError
from holdfast.torch.gradients import Gradients
from holdfast.torch.untracked import untracked_parameters
from tests.support import ranks
from tests.support.flat_layouts import CPU
from tests.support.joined import Joined, captured, restore
from tests.torch.test_fsdp1 import OPTIMIZERS, backward, built, gathered, train


def flat(module: nn.Module, **options: Any) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return FullyShardedDataParallel(
            module, **{"device_id": CPU, "use_orig_params": True, **options}
        )


class Doubling(nn.Linear):
    def state_dict(self, *args: Any, **named: Any) -> Any:
        return {name: 2 * value for name, value in super().state_dict(*args, **named).items()}


class Holder:
    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer

    def state_dict(self) -> dict[str, Any]:
        return {"inside": self.optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None: ...


class Factored(torch.optim.SGD):
    """Keeps for each parameter a vector that has nothing of its shape."""

    def step(self, closure: Any = None) -> None:
        for param in (param for group in self.param_groups for param in group["params"]):
            if param.grad is not None:
                self.state[param]["rows"] = torch.zeros(param.numel() + 2)


def said(state: dict[str, Any]) -> str:
    try:
        captured(state)
    except HoldfastError as error:
        return str(error)
    return ""


def refusals() -> dict[str, str]:
    found: dict[str, str] = {}
    model, optimizer = built("full", 1)
    train(model, optimizer, range(1))
    with FullyShardedDataParallel.summon_full_params(model):
        found["summoned"] = said({"model": model})
    found["inside"] = said({"model": model, "holder": Holder(optimizer)})
    try:
        TreeEncoder().encode({"model": model}, "")
    except HoldfastError as error:
        found["alone"] = str(error)
    images = cast(Any, nn.Conv2d(3, 4, 2)).to(memory_format=torch.channels_last)
    found["order"] = said({"model": flat(images)})
    found["own state"] = said({"model": flat(nn.Sequential(Doubling(2, 3)))})
    halves = [distributed.new_group(part) for part in ([0, 1], [2, 3])]
    half = flat(nn.Linear(8, 8), process_group=halves[distributed.get_rank() // 2])
    found["half"] = said({"model": half})
    other = flat(nn.Linear(5, 7))
    factored = Factored(other.parameters(), lr=0.1)
    other(torch.ones(2, 5)).sum().backward()
    factored.step()
    found["factored"] = said({"model": other, "optimizer": factored})
    uneven = flat(nn.Linear(5, 7))
    one_sided = OPTIMIZERS["adamw"](uneven.parameters())
    uneven(torch.ones(2, 5)).sum().backward()
    one_sided.step()
    if distributed.get_rank() == 1:
        one_sided.state.clear()
    from torch.distributed.optim import ZeroRedundancyOptimizer  # warns of what it imports

    zero = ZeroRedundancyOptimizer(nn.Linear(2, 2).parameters(), torch.optim.SGD, lr=0.1)
    found["zero"] = said({"optimizer": zero})
    untracked_parameters({"optimizer": zero})  # does not ask for its state_dict
    found["uneven"] = said({"model": uneven, "optimizer": one_sided})
    return found


def test_what_cannot_be_saved_is_refused_on_all_ranks() -> None:
    results = ranks.call(refusals, 4)
    first = results[0]
    assert "inside summon_full_params" in first["summoned"]
    assert "run.track(optimizer=optimizer)" in first["inside"]
    assert "this one saves alone" in first["alone"]
    assert "weight, whose dimensions are in another order" in first["order"]
    assert "a state_dict of its own" in first["own state"]
    assert "divided among 2 of 4 processes" in first["half"]
    assert "'rows' is a tensor of" in first["factored"]
    assert "have different state of it" in first["uneven"]
    assert "ZeroRedundancyOptimizer, of which each process has another part" in first["zero"]
    for found in results:
        assert found.keys() == first.keys()
        assert all(found.values()), found


def untracked() -> str:
    model, optimizer = built("full", 1)
    with pytest.raises(HoldfastError) as error:
        captured({"optimizer": optimizer})
    del model
    return str(error.value)


def test_an_optimizer_without_its_model_is_refused() -> None:
    assert "run.track(model=model, optimizer=optimizer)" in ranks.call(untracked, 2)[0]


def half_state(layout: str, checkpoint: Joined) -> str:
    model, optimizer = built(layout, 2)
    with pytest.raises(HoldfastError) as error:
        restore(checkpoint, {"model": model, "optimizer": optimizer})
    return str(error.value)


def saved_in_part(counts: bool) -> Any:
    """The state of another optimizer for one of the parameters."""
    model, optimizer = built("ddp", 1)
    train(model, optimizer, range(2))
    last = list(optimizer.state)[-2]
    if counts:
        optimizer.state[last]["step"] += 1
    else:
        del optimizer.state[last]
    return captured({"model": model, "optimizer": optimizer})


@pytest.mark.parametrize(
    ("counts", "words"),
    [(True, "they differ in 'step'"), (False, "some of them have state, and some have not")],
)
def test_a_flat_parameter_has_one_state(counts: bool, words: str) -> None:
    checkpoint = Joined.of(ranks.call(saved_in_part, 2, counts))
    for message in ranks.call(half_state, 2, "flat", checkpoint):
        assert words in message
        assert "use_orig_params=True" in message


# -- gradients -----------------------------------------------------------------------------------


def accumulated(layout: str, in_place: bool) -> Any:
    """Two backwards for a step; captured between them, and evaluated."""
    model, optimizer = built(layout, 1)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer}
    watch = Gradients()
    watch.watch(state)
    backward(model, 0)
    optimizer.step()
    assert not watch.fresh()
    optimizer.zero_grad(set_to_none=not in_place)
    backward(model, 10 + distributed.get_rank())
    assert watch.fresh()
    piece, gradients = captured(state), captured(watch.state())
    with torch.no_grad():
        model(torch.zeros(2, 4, dtype=torch.long))
    backward(model, 20 + distributed.get_rank())
    optimizer.step()
    watch.close()
    return piece, gradients, gathered(model, optimizer)


def accumulated_again(layout: str, checkpoint: Joined, gradients: list[Any]) -> Any:
    model, optimizer = built(layout, 2)
    state: dict[str, Any] = {"model": model, "optimizer": optimizer}
    watch = Gradients()
    watch.watch(state)
    restore(checkpoint, state)
    values, _ = restore(Joined.of([gradients[min(distributed.get_rank(), len(gradients) - 1)]]))
    watch.restore(values)
    backward(model, 20 + distributed.get_rank())
    optimizer.step()
    watch.close()
    return gathered(model, optimizer)


@pytest.mark.parametrize(("layout", "in_place"), [("full", False), ("flat", True), ("zero2", True)])
def test_an_accumulation_goes_on_with_the_same_bits(layout: str, in_place: bool) -> None:
    results = ranks.call(accumulated, 2, layout, in_place)
    checkpoint = Joined.of([piece for piece, *_ in results])
    gradients = [gradients for _, gradients, _ in results]
    for found in ranks.call(accumulated_again, 2, layout, checkpoint, gradients):
        assert all(torch.equal(found[name], value) for name, value in results[0][2].items())


def unreduced() -> str:
    model, optimizer = built("full", 1)
    watch = Gradients()
    watch.watch({"model": model, "optimizer": optimizer})
    with model.no_sync():
        backward(model, 0)
    assert watch.fresh()  # a save that is due waits
    with pytest.raises(HoldfastError) as error:
        watch.state()
    backward(model, 1)
    assert watch.state()
    watch.close()
    return str(error.value)


def test_what_is_not_reduced_is_not_lost_unseen() -> None:
    assert "leaves no_sync()" in ranks.call(unreduced, 2)[0]


def elsewhere(gradients: list[Any]) -> list[str]:
    model, optimizer = built("full", 2)
    watch = Gradients()
    watch.watch({"model": model, "optimizer": optimizer})
    values, _ = restore(Joined.of([gradients[distributed.get_rank() % 2]]))
    said: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: said.append(record.getMessage())
    logging.getLogger("holdfast").addHandler(handler)
    try:
        watch.restore(values)
    finally:
        logging.getLogger("holdfast").removeHandler(handler)
        watch.close()
    assert all(
        param.grad is None or param.grad.shape == param.shape for param in model.parameters()
    )
    return said


def test_an_accumulation_begins_anew_on_other_ranks_and_says_so() -> None:
    results = ranks.call(accumulated, 2, "full", False)
    found = ranks.call(elsewhere, 3, [gradients for _, gradients, _ in results])
    assert "gradients of an accumulation" in found[0][0]
