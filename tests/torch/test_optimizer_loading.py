"""Optimizers that load themselves, and restores of a part of an optimizer."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch

from holdfast.errors import StateError
from holdfast.torch.optimizers import plain_loading
from tests.torch.roundtrip import Checkpoint, assert_same
from tests.torch.training import MixedAdam, check_exact, groups, model, train

# -- optimizers that load themselves --------------------------------------------------


class Own(MixedAdam):
    """Adds to the state_dict and takes it out again."""

    def __init__(self, params: Any) -> None:
        super().__init__(params)
        self.calls = 0

    def step(self, closure: Any = None) -> Any:
        super().step(closure)
        self.calls += 1

    def state_dict(self) -> Any:
        return {**super().state_dict(), "calls": self.calls}

    def load_state_dict(self, state_dict: Any) -> None:
        super().load_state_dict({key: state_dict[key] for key in ("state", "param_groups")})
        self.calls = state_dict["calls"]


def test_an_optimizer_with_its_own_loading_does_it_itself() -> None:
    check_exact(Own)


def test_hooks_run_and_dtypes_are_repaired() -> None:
    module = model(torch.bfloat16)
    optimizer = MixedAdam(groups(module))
    train(module, optimizer, 0, 2)
    checkpoint = Checkpoint({"o": optimizer})
    live = MixedAdam(groups(module), lr=7.0)
    calls: list[str] = []
    live.register_load_state_dict_pre_hook(lambda *_: calls.append("pre"))
    live.register_load_state_dict_post_hook(lambda *_: calls.append("post"))
    assert not plain_loading(live)
    kept = list(live.param_groups)
    checkpoint.restore({"o": live})
    assert calls == ["pre", "post"]
    assert all(group is same for group, same in zip(live.param_groups, kept, strict=True))
    assert live.state[next(module.parameters())]["master"].dtype is torch.float32
    assert_same(
        live.state_dict()["state"][0]["master"], optimizer.state_dict()["state"][0]["master"]
    )


def test_hooks_keep_a_tensor_learning_rate_where_it_is() -> None:
    module = model()
    checkpoint = Checkpoint({"o": torch.optim.Adam(groups(module), lr=torch.tensor(0.25))})
    live = torch.optim.Adam(groups(module), lr=torch.tensor(7.0))
    live.register_load_state_dict_post_hook(lambda *_: None)
    rate = live.param_groups[0]["lr"]
    checkpoint.restore({"o": live})
    assert live.param_groups[0]["lr"] is rate
    assert rate == 0.25


def test_a_state_dict_of_another_form_is_passed_on() -> None:
    class Odd(torch.optim.SGD):
        seen: Any = None

        def state_dict(self) -> Any:
            return {"rates": [group["lr"] for group in self.param_groups], "x": torch.ones(2)}

        def load_state_dict(self, state_dict: Any) -> None:
            self.seen = state_dict

    module = model()
    live = Odd(groups(module), lr=7.0)
    Checkpoint({"o": Odd(groups(module), lr=0.1)}).restore({"o": live})
    assert_same(live.seen, {"rates": [0.1, 0.1], "x": torch.ones(2)})


def test_an_error_of_the_optimizers_own_loading_is_explained() -> None:
    class Refusing(torch.optim.SGD):
        def load_state_dict(self, state_dict: Any) -> None:
            raise ValueError("not today")

    module = model()
    with pytest.raises(StateError, match="Refusing at 'o' failed: not today"):
        Checkpoint({"o": Refusing(groups(module), lr=0.1)}).restore(
            {"o": Refusing(groups(module), lr=0.1)}
        )


def test_any_object_with_state_dict_is_restored_too() -> None:
    class Lookahead:
        def __init__(self, inner: torch.optim.Optimizer) -> None:
            self.inner = inner
            self.slow = [torch.zeros(2)]

        def state_dict(self) -> Any:
            return {"inner": self.inner.state_dict(), "slow": self.slow}

        def load_state_dict(self, state: Any) -> None:
            self.inner.load_state_dict(state["inner"])
            self.slow = state["slow"]

    module = model()
    saved = Lookahead(torch.optim.Adam(groups(module), lr=0.25))
    saved.slow[0] += 3
    train(module, saved.inner, 0, 2)
    live = Lookahead(torch.optim.Adam(groups(module)))
    Checkpoint({"o": saved}).restore({"o": live})
    assert_same(live.state_dict(), saved.state_dict())


# -- parts ----------------------------------------------------------------------------


def test_state_or_hyperparameters_can_be_left_out() -> None:
    module = model()
    optimizer = torch.optim.Adam(groups(module), lr=0.25)
    train(module, optimizer, 0, 2)
    checkpoint = Checkpoint({"o": optimizer})
    live = torch.optim.Adam(groups(module), lr=7.0)
    checkpoint.restore({"o": live}, skip=["o/param_groups"])
    assert live.param_groups[0]["lr"] == 7.0
    assert_same(live.state_dict()["state"], optimizer.state_dict()["state"])
    live = torch.optim.Adam(groups(module), lr=7.0)
    checkpoint.restore({"o": live}, skip=["o/state"])
    assert live.param_groups[0]["lr"] == 0.25
    assert not live.state


@pytest.fixture(params=["in place", "through its own loading"])
def trained(request: Any) -> Any:
    """A trained Adam's checkpoint, another one with a history of its own, and a copy of
    what the second holds."""

    def make(steps: range) -> torch.optim.Optimizer:
        module = model()
        optimizer = torch.optim.Adam(groups(module, lr=0.5), lr=0.25)
        train(module, optimizer, steps.start, steps.stop)
        if request.param != "in place":
            optimizer.register_load_state_dict_post_hook(lambda *_: None)
        return optimizer

    saved, live = make(range(2)), make(range(50, 53))
    live.param_groups[0]["lr"] = 7.0
    assert plain_loading(live) is (request.param == "in place")
    return saved, live, copy.deepcopy(live.state_dict())


def test_a_skipped_entry_of_the_state_stays_as_it_is(trained: Any) -> None:
    saved, live, before = trained
    entry = live.state[live.param_groups[0]["params"][0]]
    tensors = dict(entry)
    Checkpoint({"o": saved}).restore({"o": live}, skip=["o/state/0"])
    assert all(entry[name] is tensor for name, tensor in tensors.items())
    assert_same(live.state_dict()["state"][0], before["state"][0])
    assert_same(live.state_dict()["state"][1], saved.state_dict()["state"][1])
    assert_same(live.state_dict()["param_groups"], saved.state_dict()["param_groups"])


def test_a_skipped_tensor_of_an_entry_stays_as_it_is(trained: Any) -> None:
    saved, live, before = trained
    Checkpoint({"o": saved}).restore({"o": live}, skip=["o/state/1/exp_avg"])
    state, expected = live.state_dict()["state"], saved.state_dict()["state"]
    assert_same(state[0], expected[0])
    assert_same(state[1]["exp_avg"], before["state"][1]["exp_avg"])
    assert_same(state[1]["exp_avg_sq"], expected[1]["exp_avg_sq"])
    assert_same(state[1]["step"], expected[1]["step"])


def test_only_one_entry_of_the_state(trained: Any) -> None:
    saved, live, before = trained
    Checkpoint({"o": saved}).restore({"o": live}, only=["o/state/1"])
    assert_same(live.state_dict()["state"][0], before["state"][0])
    assert_same(live.state_dict()["state"][1], saved.state_dict()["state"][1])
    assert_same(live.state_dict()["param_groups"], before["param_groups"])


@pytest.mark.parametrize("part", ["o/state", "o/param_groups"])
def test_a_skipped_half_stays_as_it_is(trained: Any, part: str) -> None:
    saved, live, before = trained
    Checkpoint({"o": saved}).restore({"o": live}, skip=[part])
    for name in ("state", "param_groups"):
        from_here = part == f"o/{name}"
        assert_same(live.state_dict()[name], (before if from_here else saved.state_dict())[name])


def test_hyperparameters_of_one_group_are_skipped(trained: Any) -> None:
    saved, live, _ = trained
    saved.param_groups[0]["betas"] = saved.param_groups[1]["betas"] = (0.5, 0.6)
    skipped = ["o/param_groups/0/lr", "o/param_groups/1"]
    Checkpoint({"o": saved}).restore({"o": live}, skip=skipped)
    assert [group["lr"] for group in live.param_groups] == [7.0, 0.5]
    assert [group["betas"] for group in live.param_groups] == [(0.5, 0.6), (0.9, 0.999)]


def test_a_skipped_entry_that_is_not_there_is_not_made(trained: Any) -> None:
    saved, live, _ = trained
    first, last = (group["params"][0] for group in live.param_groups)
    del live.state[first]
    Checkpoint({"o": saved}).restore({"o": live}, skip=["o/state/0"])
    assert list(live.state) == [last]
