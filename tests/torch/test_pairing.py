"""The state of an optimizer goes to the parameters that it belongs to, also in a changed model."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

import holdfast
from holdfast.errors import DamagedObject, StructureMismatch
from tests.torch.roundtrip import Checkpoint, assert_same


def net(**widths: tuple[int, int]) -> nn.Module:
    return nn.ModuleDict({name: nn.Linear(*width) for name, width in widths.items()})


def trained(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Different gradients everywhere, so that no two moments are equal."""
    for number, param in enumerate(model.parameters()):
        param.grad = torch.full_like(param, float(number + 1))
    optimizer.step()
    optimizer.zero_grad()


def moments(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    return {
        name: dict(optimizer.state[param])
        for name, param in sorted(model.named_parameters())
        if param in optimizer.state
    }


def adam(model: nn.Module, lr: float = 0.1) -> torch.optim.Optimizer:
    return torch.optim.Adam(model.parameters(), lr=lr)


def saved(
    model: nn.Module, optimizer: torch.optim.Optimizer | None = None
) -> tuple[Checkpoint, Any]:
    optimizer = optimizer or adam(model)
    trained(model, optimizer)
    return Checkpoint({"model": model, "optimizer": optimizer}), moments(model, optimizer)


BODY = {"a": (3, 3), "b": (3, 3), "head": (3, 2)}


@pytest.mark.parametrize(
    ("widths", "same", "said"),
    [
        (
            {"a": (3, 3), "new": (3, 3), "b": (3, 3), "head": (3, 2)},
            ("a", "b", "head"),
            "saved as 1 group of 6 parameters, live is 1 group of 8 parameters, 6 of them the same",
        ),
        (
            {"b": (3, 3), "head": (3, 2)},
            ("b", "head"),
            "saved as 1 group of 6 parameters, live is 1 group of 4 parameters, 4 of them the same",
        ),
        (
            {"a": (3, 3), "b": (3, 3), "head": (3, 5)},
            ("a", "b"),
            "params/4: saved as float32[2, 3], live is float32[5, 3]",
        ),
        (
            {"a": (3, 3), "b": (3, 3), "other": (3, 2)},
            ("a", "b"),
            "",
        ),
    ],
    ids=["a layer more", "a layer less", "another head", "a layer replaced"],
)
def test_what_fits_is_kept(
    widths: dict[str, tuple[int, int]], same: tuple[str, ...], said: str
) -> None:
    checkpoint, before = saved(net(**BODY))
    live = net(**widths)
    optimizer = adam(live, lr=7.0)
    with pytest.raises(StructureMismatch) as caught:
        checkpoint.restore({"model": live, "optimizer": optimizer})
    assert said in str(caught.value)
    assert not optimizer.state
    checkpoint.restore({"model": live, "optimizer": optimizer}, strict=False)
    found = moments(live, optimizer)
    assert_same(
        found, {name: state for name, state in before.items() if name.split(".")[0] in same}
    )
    assert optimizer.param_groups[0]["lr"] == 0.1
    trained(live, optimizer)
    assert set(moments(live, optimizer)) == {name for name, _ in live.named_parameters()}


def test_new_parameters_keep_the_state_that_they_have() -> None:
    checkpoint, _ = saved(net(**BODY))
    live = net(new=(3, 3), **BODY)
    optimizer = adam(live)
    trained(live, optimizer)
    fresh = moments(live, optimizer)["new.weight"]["exp_avg"].clone()
    checkpoint.restore({"model": live, "optimizer": optimizer}, strict=False)
    assert torch.equal(moments(live, optimizer)["new.weight"]["exp_avg"], fresh)


def test_an_order_that_only_the_model_tells_is_seen() -> None:
    """torch gives each layer the moments of the other, without a word."""
    checkpoint, before = saved(net(a=(3, 3), b=(3, 3)))
    live = net(b=(3, 3), a=(3, 3))
    optimizer = adam(live)
    with pytest.raises(StructureMismatch) as caught:
        checkpoint.restore({"model": live, "optimizer": optimizer})
    assert caught.value.changed == (
        "optimizer/param_groups/0/params/0: saved as the state of 'model/a.weight', "
        "live is that of 'model/b.weight'",
    )
    checkpoint.restore({"model": live, "optimizer": optimizer}, strict=False)
    assert_same(moments(live, optimizer), before)


def test_the_state_follows_a_renamed_layer() -> None:
    checkpoint, before = saved(net(a=(3, 3), b=(3, 3)))
    live = net(b=(3, 3), c=(3, 3))
    optimizer = adam(live)
    checkpoint.restore(
        {"model": live, "optimizer": optimizer}, rename={"model/a": "model/c"}, strict=False
    )
    found = moments(live, optimizer)
    assert_same(found["c.weight"], before["a.weight"])
    assert_same(found["b.bias"], before["b.bias"])


def test_groups_that_were_split_keep_their_state() -> None:
    checkpoint, before = saved(net(a=(3, 3), b=(3, 3)))
    live = net(a=(3, 3), b=(3, 3))
    weights = [param for param in live.parameters() if param.dim() > 1]
    others = [param for param in live.parameters() if param.dim() == 1]
    optimizer = torch.optim.Adam([{"params": weights}, {"params": others, "lr": 5.0}], lr=7.0)
    checkpoint.restore({"model": live, "optimizer": optimizer}, strict=False)
    assert_same(moments(live, optimizer), before)
    assert [group["lr"] for group in optimizer.param_groups] == [0.1, 0.1]
    assert [len(group["params"]) for group in optimizer.param_groups] == [2, 2]


def test_a_group_from_two_others_keeps_its_own_settings() -> None:
    model = net(a=(3, 3), b=(3, 3))
    first, second = ([*model[name].parameters()] for name in "ab")  # type: ignore[index]
    two = torch.optim.Adam([{"params": first, "lr": 1.0}, {"params": second, "lr": 2.0}])
    checkpoint, before = saved(model, two)
    live = net(a=(3, 3), b=(3, 3))
    optimizer = adam(live, lr=7.0)
    checkpoint.restore({"model": live, "optimizer": optimizer}, strict=False)
    assert_same(moments(live, optimizer), before)
    assert optimizer.param_groups[0]["lr"] == 7.0


def test_names_tell_where_the_model_does_not() -> None:
    """A module with hooks is restored by its own loading: nobody knows what goes where."""
    model = net(**BODY)
    checkpoint, before = saved(model, torch.optim.Adam(model.named_parameters(), lr=0.1))
    live = net(new=(3, 3), **BODY)
    live.register_load_state_dict_post_hook(lambda module, keys: None)
    optimizer = torch.optim.Adam(live.named_parameters(), lr=7.0)
    checkpoint.restore({"model": live, "optimizer": optimizer}, strict=False)
    assert_same(moments(live, optimizer), before)
    unnamed = adam(live, lr=7.0)
    checkpoint.restore({"model": live, "optimizer": unnamed}, strict=False)
    assert not unnamed.state
    assert unnamed.param_groups[0]["lr"] == 7.0


def test_without_the_model_order_counts() -> None:
    model = net(a=(3, 3), b=(3, 3))
    optimizer = adam(model)
    trained(model, optimizer)
    # In front of the model: which leaves it will have is not known yet.
    checkpoint = Checkpoint({"optimizer": optimizer, "model": model})
    assert "leaves" not in checkpoint.tree["v"][0][1]
    live = net(a=(3, 3), b=(3, 3))
    fresh = adam(live)
    checkpoint.restore({"model": live, "optimizer": fresh})
    assert_same(moments(live, fresh), moments(model, optimizer))
    checkpoint, _ = saved(net(a=(3, 3), b=(3, 3)))
    fresh = adam(net(b=(3, 3), a=(3, 3)))
    checkpoint.restore({"optimizer": fresh}, only=["optimizer"])
    assert len(fresh.state) == 4


def test_slices_of_one_tensor_are_told_by_order() -> None:
    """Their leaf holds all of them."""
    whole = torch.zeros(6)
    parts = {"model": [nn.Parameter(whole[:3]), nn.Parameter(whole[3:])]}
    optimizer = torch.optim.SGD(parts["model"], lr=0.1)
    checkpoint = Checkpoint({**parts, "optimizer": optimizer})
    assert "leaves" not in dict(checkpoint.tree["v"])["optimizer"]
    other = [nn.Parameter(torch.ones(3)), nn.Parameter(torch.ones(3))]
    checkpoint.restore({"model": other, "optimizer": torch.optim.SGD(other, lr=0.1)})
    assert other[1].sum() == 0


@pytest.mark.parametrize("leaves", [7, [[0]], [[0, "x", 1, 2]], [[0, 1, 2, 3], []], {"a": 1}])
def test_leaves_that_no_save_wrote_are_refused(leaves: object) -> None:
    checkpoint, _ = saved(net(a=(3, 3), b=(3, 3)))
    tree = checkpoint.tree
    dict(tree["v"])["optimizer"]["leaves"] = leaves
    checkpoint.json = json.dumps(tree).encode()
    live = net(a=(3, 3), b=(3, 3))
    with pytest.raises(DamagedObject, match="the leaves of its parameters are malformed"):
        checkpoint.restore({"model": live, "optimizer": adam(live)})


def test_a_run_goes_on_with_a_layer_more(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    def train(model: nn.Module, steps: int, **settings: Any) -> dict[str, Any]:
        optimizer = adam(model)
        with holdfast.Run(tmp_path, keep=None, **settings) as run:
            run.track(model=model, optimizer=optimizer)
            for _ in run.range(steps):
                trained(model, optimizer)
        return moments(model, optimizer)

    before = train(net(a=(3, 3)), 2)
    with pytest.raises(StructureMismatch, match=r"missing in the checkpoint \(2\)"):
        train(net(a=(3, 3), b=(3, 3)), 3)
    with caplog.at_level(logging.WARNING, "holdfast"):
        after = train(net(a=(3, 3), b=(3, 3)), 3, strict=False)
    assert after["a.weight"]["step"] == before["a.weight"]["step"] + 1
    assert after["b.weight"]["step"] == 1
    assert "2 of them the same" in caplog.text
