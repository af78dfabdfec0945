"""Optimizers: training goes on bit for bit, dtypes and devices of state, reports."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from holdfast.errors import DamagedObject, StructureMismatch
from tests.torch.roundtrip import Checkpoint, assert_same
from tests.torch.training import Make, MixedAdam, check_exact, groups, model, train

OPTIMIZERS: dict[str, Make] = {
    "ASGD": lambda params: torch.optim.ASGD(params, t0=2),
    "Adadelta": torch.optim.Adadelta,
    "Adafactor": torch.optim.Adafactor,
    "Adagrad": lambda params: torch.optim.Adagrad(params, lr_decay=0.1),
    "Adam": torch.optim.Adam,
    "Adam amsgrad": lambda params: torch.optim.Adam(params, amsgrad=True, weight_decay=0.1),
    "Adam foreach": lambda params: torch.optim.Adam(params, foreach=True),
    "Adam fused": lambda params: torch.optim.Adam(params, fused=True),
    "Adam capturable off": lambda params: torch.optim.Adam(params, capturable=False),
    "AdamW": lambda params: torch.optim.AdamW(params, betas=(0.8, 0.95)),
    "Adamax": torch.optim.Adamax,
    "Muon": lambda params: torch.optim.Muon(params, lr=0.02),
    "NAdam": lambda params: torch.optim.NAdam(params, decoupled_weight_decay=True),
    "RAdam": torch.optim.RAdam,
    "RMSprop": lambda params: torch.optim.RMSprop(params, momentum=0.9, centered=True),
    "Rprop": torch.optim.Rprop,
    "SGD": lambda params: torch.optim.SGD(params, lr=0.1),
    "SGD momentum": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, nesterov=True),
    "SGD fused": lambda params: torch.optim.SGD(params, lr=0.1, momentum=0.9, fused=True),
}


def test_every_optimizer_of_torch_is_tried() -> None:
    classes = {
        name
        for name, value in vars(torch.optim).items()
        if isinstance(value, type) and issubclass(value, torch.optim.Optimizer)
    }
    tried = {name.split()[0] for name in OPTIMIZERS}
    assert classes - tried == {"Optimizer", "LBFGS", "SparseAdam"}  # below


@pytest.mark.parametrize("name", OPTIMIZERS)
@pytest.mark.parametrize("before", [0, 3])
def test_training_goes_on_exactly(name: str, before: int) -> None:
    check_exact(OPTIMIZERS[name], before=before)


@pytest.mark.parametrize("search", [None, "strong_wolfe"])
def test_lbfgs(search: str | None) -> None:
    check_exact(
        lambda params: torch.optim.LBFGS(
            params, lr=0.5, max_iter=4, history_size=3, line_search_fn=search
        ),
        grouped=False,
    )


@pytest.mark.filterwarnings("ignore:Sparse:UserWarning")
def test_sparse_adam() -> None:
    def build() -> tuple[nn.Embedding, torch.optim.Optimizer]:
        torch.manual_seed(1)
        embedding = nn.Embedding(10, 3, sparse=True)
        return embedding, torch.optim.SparseAdam(embedding.parameters())

    def go(embedding: nn.Embedding, optimizer: Any, rows: range) -> None:
        for row in rows:
            optimizer.zero_grad()
            embedding(torch.tensor([row, 9 - row])).square().sum().backward()
            optimizer.step()

    embedding, optimizer = build()
    go(embedding, optimizer, range(3))
    checkpoint = Checkpoint({"m": embedding, "o": optimizer})
    go(embedding, optimizer, range(2, 5))
    fresh, restored = build()
    checkpoint.restore({"m": fresh, "o": restored})
    go(fresh, restored, range(2, 5))
    assert_same(dict(fresh.state_dict()), dict(embedding.state_dict()))
    assert_same(restored.state_dict(), optimizer.state_dict())


# -- dtypes and devices of state ------------------------------------------------------


def test_float32_state_of_bfloat16_parameters_survives() -> None:
    checkpoint = check_exact(MixedAdam, dtype=torch.bfloat16)
    assert checkpoint.leaf("optimizer/state/0/master").dtype == "F32"
    state = checkpoint.restore()["optimizer"]
    assert state["state"][0]["moments"][0].dtype is torch.float32
    assert type(state["param_groups"][0]["betas"]) is list


def test_adam_with_float32_state_of_bfloat16_parameters() -> None:
    def make(params: list[Any]) -> torch.optim.Optimizer:
        optimizer = torch.optim.Adam(params, lr=0.01)
        for group in optimizer.param_groups:
            for param in group["params"]:
                optimizer.state[param] = {
                    "step": torch.tensor(0.0),
                    "exp_avg": torch.zeros_like(param, dtype=torch.float32),
                    "exp_avg_sq": torch.zeros_like(param, dtype=torch.float32),
                }
        return optimizer

    module = model(torch.bfloat16)
    optimizer = make(groups(module))
    for state in optimizer.state.values():
        state["exp_avg"].normal_()
    checkpoint = Checkpoint({"o": optimizer})
    for fresh in (torch.optim.Adam(groups(module)), make(groups(module))):
        checkpoint.restore({"o": fresh})
        assert_same(fresh.state_dict(), optimizer.state_dict())


def test_live_state_is_filled_in_place_and_lazy_state_is_made() -> None:
    module = model()
    optimizer = torch.optim.Adam(groups(module))
    train(module, optimizer, 0, 2)
    checkpoint = Checkpoint({"o": optimizer})
    first, last = module.parameters()

    live = torch.optim.Adam(groups(module))
    train(module, live, 0, 1)
    del live.state[last]
    live.state[first]["left over"] = 1
    entry, moment = live.state[first], live.state[first]["exp_avg"]
    checkpoint.restore({"o": live})
    assert live.state[first] is entry
    assert entry["exp_avg"] is moment
    assert "left over" not in entry
    assert_same(live.state_dict(), optimizer.state_dict())


def test_state_that_the_checkpoint_lacks_is_removed() -> None:
    module = model()
    empty = Checkpoint({"o": torch.optim.Adam(groups(module))})
    live = torch.optim.Adam(groups(module))
    train(module, live, 0, 2)
    empty.restore({"o": live})
    assert len(live.state) == 0
    train(module, live, 0, 1)  # and it can be built again


def test_state_of_some_parameters_only() -> None:
    module = model()
    first, last = module.parameters()
    optimizer = torch.optim.Adam([first, last])
    last.grad = torch.ones_like(last)
    optimizer.step()
    live = torch.optim.Adam([first, last])
    Checkpoint({"o": optimizer}).restore({"o": live})
    assert list(live.state) == [last]
    assert_same(live.state_dict(), optimizer.state_dict())


def test_channels_last_state_keeps_its_order() -> None:
    conv: Any = nn.Conv2d(3, 4, 3)
    conv.to(memory_format=torch.channels_last)
    optimizer = torch.optim.Adam(conv.parameters())
    conv(torch.randn(1, 3, 5, 5)).sum().backward()
    optimizer.step()
    live = torch.optim.Adam(conv.parameters())
    Checkpoint({"o": optimizer}).restore({"o": live})
    moment = live.state[conv.weight]["exp_avg"]
    assert moment.is_contiguous(memory_format=torch.channels_last)
    assert_same(live.state_dict(), optimizer.state_dict())


def test_one_state_tensor_of_all_parameters_stays_one() -> None:
    class Counting(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            for param in self.param_groups[0]["params"]:
                self.state[param].setdefault("count", self.count)
            self.count += 1

        def __init__(self, params: Any) -> None:
            super().__init__(params, lr=0.1)
            self.count = torch.tensor(0.0)

    params = [nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))]
    optimizer = Counting(params)
    optimizer.step()
    checkpoint = Checkpoint({"o": optimizer})
    for steps in (0, 3):
        live = Counting(params)
        for _ in range(steps):
            live.step()
        checkpoint.restore({"o": live})
        one, other = (live.state[param]["count"] for param in params)
        assert one is other
        assert one == 1


def test_live_state_of_another_kind_is_replaced() -> None:
    module = model(torch.bfloat16)
    first, last = module.parameters()
    optimizer = torch.optim.Adam([first, last])
    for param in (first, last):
        optimizer.state[param] = {
            "step": torch.tensor(3.0),
            "exp_avg": torch.randn(param.shape),
            "exp_avg_sq": torch.randn(param.shape),
        }
    live = torch.optim.Adam([first, last])
    shared = torch.zeros(last.shape)
    live.state[first] = {
        "step": torch.tensor([1.0, 2.0]),
        "exp_avg": torch.zeros_like(first),  # bfloat16
        "exp_avg_sq": 3.0,
    }
    live.state[last] = {"step": torch.tensor(1.0), "exp_avg": shared, "exp_avg_sq": shared}
    Checkpoint({"o": optimizer}).restore({"o": live})
    assert_same(live.state_dict(), optimizer.state_dict())
    # Where two live tensors were one, each value has its own now.
    entry = live.state[last]
    assert entry["exp_avg"].data_ptr() != entry["exp_avg_sq"].data_ptr()


def test_state_of_an_older_form_is_converted_as_torch_does() -> None:
    """Long ago steps were plain numbers; Adam's __setstate__ makes tensors of them."""
    param = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([param])
    param.grad = torch.ones(2)
    optimizer.step()
    optimizer.state[param]["step"] = 1
    live = torch.optim.Adam([param])
    Checkpoint({"o": optimizer}).restore({"o": live})
    assert live.state[param]["step"] == torch.tensor(1.0)
    live.step()


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with dupl:UserWarning")
def test_a_parameter_listed_twice() -> None:
    param = nn.Parameter(torch.ones(2))
    optimizer = torch.optim.Adam([param, param])
    live = torch.optim.Adam([param, param])
    param.grad = torch.ones(2)
    optimizer.step()
    Checkpoint({"o": optimizer}).restore({"o": live})
    assert_same(live.state_dict(), optimizer.state_dict())


# -- hyperparameters ------------------------------------------------------------------


def test_hyperparameters_are_restored_and_new_ones_stay() -> None:
    module = model()
    optimizer = torch.optim.SGD(groups(module, lr=0.5, label="head"), lr=0.1, momentum=0.9)
    optimizer.param_groups[0]["custom"] = [1, (2, 3)]
    live = torch.optim.SGD(groups(module), lr=7.0)
    live.param_groups[0]["mine"] = "kept"
    Checkpoint({"o": optimizer}).restore({"o": live})
    assert [group["lr"] for group in live.param_groups] == [0.1, 0.5]
    assert [group["momentum"] for group in live.param_groups] == [0.9, 0.9]
    assert live.param_groups[0]["custom"] == [1, (2, 3)]
    assert live.param_groups[1]["label"] == "head"
    assert live.param_groups[0]["mine"] == "kept"


def test_a_tensor_learning_rate_is_filled_in_place() -> None:
    module = model()
    rate = torch.tensor(0.25)
    saved = Checkpoint({"o": torch.optim.Adam(groups(module), lr=rate)})
    live = torch.optim.Adam(groups(module), lr=torch.tensor(7.0))
    first = live.param_groups[0]["lr"]
    saved.restore({"o": live})
    assert live.param_groups[0]["lr"] is first is live.param_groups[1]["lr"]
    assert first == 0.25


def test_a_learning_rate_may_become_a_tensor_or_a_number() -> None:
    module = model()
    number = Checkpoint({"o": torch.optim.Adam(groups(module), lr=0.25)})
    tensor = Checkpoint({"o": torch.optim.Adam(groups(module), lr=torch.tensor(0.25))})
    live = torch.optim.Adam(groups(module), lr=torch.tensor(7.0))
    rate = live.param_groups[0]["lr"]
    number.restore({"o": live})
    assert live.param_groups[0]["lr"] is rate
    assert rate == 0.25
    live = torch.optim.Adam(groups(module), lr=7.0)
    tensor.restore({"o": live})
    assert type(live.param_groups[0]["lr"]) is float
    assert live.param_groups[0]["lr"] == 0.25


# -- reports --------------------------------------------------------------------------


def test_other_numbers_of_groups_or_parameters_are_reported() -> None:
    module = model()
    live = torch.optim.SGD(list(module.parameters()), lr=7.0)
    with pytest.raises(StructureMismatch) as caught:
        Checkpoint({"o": torch.optim.SGD(groups(module), lr=0.1)}).restore({"o": live})
    assert caught.value.changed == (
        "o/param_groups: saved as 2 groups of 1 + 1 parameters, live is 1 group of 2 parameters",
    )
    assert live.param_groups[0]["lr"] == 7.0


def test_parameters_in_another_order_are_reported() -> None:
    module = model()
    first, last = module.parameters()
    saved = Checkpoint({"o": torch.optim.SGD([first, last], lr=0.1)})
    with pytest.raises(StructureMismatch) as caught:
        saved.restore({"o": torch.optim.SGD([last, first], lr=0.1)})
    assert caught.value.changed[0] == (
        "o/param_groups/0/params/0: saved as float32[3, 4], live is float32[2, 3]"
    )


def test_parameter_names_show_an_order_that_shapes_do_not() -> None:
    one, two = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    saved = Checkpoint({"o": torch.optim.SGD([("a", one), ("b", two)], lr=0.1)})
    with pytest.raises(StructureMismatch, match="saved as a, b, live is b, a"):
        saved.restore({"o": torch.optim.SGD([("b", two), ("a", one)], lr=0.1)})
    live = torch.optim.SGD([("module.a", one), ("module.b", two)], lr=0.1)
    saved.restore({"o": live})
    assert live.param_groups[0]["param_names"] == ["module.a", "module.b"]


def test_another_class_is_reported_and_left_as_it_is() -> None:
    module = model()
    optimizer = torch.optim.Adam(groups(module))
    train(module, optimizer, 0, 2)
    saved = Checkpoint({"o": optimizer})
    live = torch.optim.AdamW(groups(module))
    with pytest.raises(
        StructureMismatch, match=r"saved as torch\.optim\.adam:Adam, live is .*AdamW"
    ):
        saved.restore({"o": live})
    before = live.state_dict()
    saved.restore({"o": live}, strict=False)
    assert_same(live.state_dict(), before)
    assert live.param_groups[0]["decoupled_weight_decay"] is True


def test_a_subclass_in_another_module_is_the_same_class() -> None:
    module = model()

    class Adam(torch.optim.Adam):
        pass

    Adam.__qualname__ = "Adam"
    optimizer = Adam(groups(module))
    train(module, optimizer, 0, 2)
    live = torch.optim.Adam(groups(module))
    Checkpoint({"o": optimizer}).restore({"o": live})
    assert_same(live.state_dict(), optimizer.state_dict())


@pytest.mark.parametrize("count", [1, 3])
def test_groups_that_do_not_belong_to_the_parameters_are_refused(count: int) -> None:
    module = model()
    checkpoint = Checkpoint({"o": torch.optim.SGD(groups(module), lr=0.1)})
    tree = checkpoint.tree
    [[_, node]] = tree["v"]
    entries = dict(node["v"]["v"])
    node["v"]["v"] = [
        ["state", entries["state"]],
        ["param_groups", entries["param_groups"][:1] * count],
    ]
    decoder = checkpoint.decoder()
    with pytest.raises(DamagedObject, match="groups"):
        decoder.apply(tree, {"o": torch.optim.SGD(groups(module), lr=0.1)})
