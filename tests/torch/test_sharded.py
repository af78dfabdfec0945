"""Which leaves of several processes are one, and which are each process's own."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import distributed, nn

from holdfast.core.group import Ranks
from holdfast.core.placement import Placement, replicated
from holdfast.core.tree import TreeEncoder
from holdfast.errors import StateError
from tests.support import layouts, ranks
from tests.support.joined import Captured, Joined, captured, restore

TWO = Ranks(1, 2)


def placements(state: dict[str, Any], **options: Any) -> dict[str, Placement | None]:
    encoder = TreeEncoder(ranks=TWO, **options)
    encoder.encode(state, "")
    return {leaf.path: leaf.placement for leaf in encoder.leaves}


def stepped(model: nn.Module, optimizer: torch.optim.Optimizer, *shape: int) -> None:
    model(torch.randn(*shape)).sum().backward()
    optimizer.step()


# -- classification, in one process ------------------------------------------------------


def test_parameters_are_shared_and_buffers_are_not() -> None:
    model = nn.Sequential(nn.Linear(3, 5), nn.BatchNorm1d(5))
    found = placements({"model": model, "other": torch.zeros(5), "array": torch.ones(2).numpy()})
    shared = {path for path, placement in found.items() if placement is not None}
    assert shared == {"model/0.weight", "model/0.bias", "model/1.weight", "model/1.bias"}
    assert found["model/0.weight"] == replicated((5, 3), 2)


@pytest.mark.parametrize("kind", [torch.optim.AdamW, torch.optim.Adafactor])
def test_the_state_of_shared_parameters_is_shared(kind: Any) -> None:
    model = nn.Linear(3, 5)
    optimizer = kind(model.parameters())
    stepped(model, optimizer, 2, 3)
    found = placements({"model": model, "optimizer": optimizer})
    assert all(found.values())
    if kind is torch.optim.Adafactor:
        assert found["optimizer/state/0/row_var"] == replicated((5, 1), 2)


class Divided(torch.optim.SGD):
    """Each process keeps a part of what belongs to a parameter."""

    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for param in group["params"]:
                self.state[param]["part"] = torch.zeros(param.numel() // 2)
                self.state[param]["whole"] = torch.zeros_like(param)
                self.state[param]["count"] = torch.tensor(1)


def test_what_another_optimizer_may_have_divided_is_its_own() -> None:
    model = nn.Linear(3, 4, bias=False)
    optimizer = Divided(model.parameters(), lr=0.1)
    stepped(model, optimizer, 2, 3)
    found = placements({"model": model, "optimizer": optimizer})
    assert found["optimizer/state/0/part"] is None
    assert found["optimizer/state/0/whole"] == replicated((4, 3), 2)
    assert found["optimizer/state/0/count"] == replicated((), 2)


def test_a_name_can_be_each_process_s_own() -> None:
    local, common = nn.Linear(3, 5), nn.Linear(3, 5)
    optimizers = {
        "local_optimizer": torch.optim.Adam(local.parameters()),
        "optimizer": torch.optim.Adam(common.parameters()),
    }
    for model, optimizer in zip((local, common), optimizers.values(), strict=True):
        stepped(model, optimizer, 2, 3)
    state = {"local": local, "common": common, **optimizers}
    found = placements(state, own=lambda path: path == "local")
    own = {path.split("/")[0] for path, placement in found.items() if placement is None}
    assert own == {"local", "local_optimizer"}  # its parameters are not shared


def test_a_parameter_without_elements_is_shared_too() -> None:
    model = nn.ParameterDict({"none": nn.Parameter(torch.zeros(0, 3))})
    assert placements({"model": model}) == {"model/none": replicated((0, 3), 2)}


def test_a_dtype_without_a_name_has_one_dimension_more() -> None:
    model = nn.ParameterDict({"z": nn.Parameter(torch.zeros(3, dtype=torch.complex128))})
    assert placements({"model": model}) == {"model/z": replicated((3, 16), 2)}


class Views(nn.Module):
    def __init__(self, second: type) -> None:
        super().__init__()
        flat = torch.arange(6.0)
        self.first = nn.Parameter(flat[:4])
        self.apart = nn.Parameter(torch.zeros(2))
        if second is nn.Parameter:
            self.second = nn.Parameter(flat[2:])
        else:
            self.register_buffer("second", flat[2:])


def test_views_of_shared_parameters_are_a_shared_leaf_of_bytes() -> None:
    found = placements({"model": Views(nn.Parameter)})
    assert found == {"model/first": replicated((24,), 2), "model/apart": replicated((2,), 2)}


def test_a_view_that_is_each_process_s_own_makes_all_of_them_own() -> None:
    found = placements({"model": Views(torch.Tensor)})
    assert found == {"model/first": None, "model/apart": replicated((2,), 2)}


def test_one_process_that_saves_alone_has_no_placements() -> None:
    encoder = TreeEncoder()
    encoder.encode({"model": nn.Linear(2, 2)}, "")
    assert {leaf.placement for leaf in encoder.leaves} == {None}


# -- DTensors ------------------------------------------------------------------------------


def refusals() -> dict[str, str]:
    from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
    from torch.distributed.tensor import DTensor, Partial, Replicate, Shard
    from torch.distributed.tensor.placement_types import _StridedShard

    rank = distributed.get_rank()
    mesh = init_device_mesh("cpu", (4,))
    halves = [DeviceMesh("cpu", part) for part in ([0, 1], [2, 3])]
    local = torch.zeros(2, 3)
    odd = DTensor.from_local(
        torch.zeros(2, 3),
        mesh,
        [_StridedShard(0, split_factor=2)],
        run_check=False,
        shape=torch.Size((8, 3)),
        stride=(3, 1),
    )
    values = {
        "sum": DTensor.from_local(local, mesh, [Partial()], run_check=False),
        "half": DTensor.from_local(local, halves[rank // 2], [Shard(0)], run_check=False),
        "other": DTensor.from_local(local, halves[0], [Shard(0)], run_check=False),
        "no box": odd,
    }
    found: dict[str, str] = {}
    for name, value in values.items():
        try:
            captured({name: value})
        except StateError as error:
            found[name] = str(error)
    try:
        TreeEncoder().encode({"alone": DTensor.from_local(local, mesh, [Shard(0)])}, "")
    except StateError as error:
        found["alone"] = str(error)
    whole = DTensor.from_local(local, mesh, [Replicate()], run_check=False)
    TreeEncoder().encode({"whole": whole}, "")  # as good as a plain one
    checkpoint = Joined.of([captured({"x": torch.zeros(2, 3)})])
    try:
        restore(checkpoint, {"x": values["sum"]})
    except StateError as error:
        found["into a sum"] = str(error)
    return found


def test_what_cannot_be_one_leaf_is_refused() -> None:
    first, _, _, last = ranks.call(refusals, 4)
    assert "'sum' is a DTensor with the placements [Partial(sum)]" in first["sum"]
    assert "redistribute(placements=[Replicate()])" in first["sum"]
    assert "a DTensor of 2 of 4 processes" in first["half"]
    assert "mesh_dim_names=('dp', 'tp')" in first["half"]
    assert "this one is not in its mesh" in last["other"]
    assert "is no box" in first["no box"]
    assert "this one saves alone" in first["alone"]
    assert "redistribute" in first["into a sum"]
    assert last.keys() == first.keys()


def gaps() -> tuple[Captured, list[str]]:
    """Local tensors in memory with gaps, in another order, and the same twice."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    rank = distributed.get_rank()
    mesh = init_device_mesh("cpu", (2,))
    images = torch.arange(2 * 4 * 3 * 3.0).view(2, 4, 3, 3).to(memory_format=torch.channels_last)
    padded = torch.full((5, 7), -1.0)
    padded[:2, :3] = rank

    def on(local: torch.Tensor, dim: int, whole: torch.Tensor) -> DTensor:
        return DTensor.from_local(
            local, mesh, [Shard(dim)], run_check=False, shape=whole.shape, stride=whole.stride()
        )

    wide = torch.zeros(4, 3)
    state = {
        "images": on(images.chunk(2, 1)[rank], 1, images),
        "padded": on(padded[:2, :3], 0, wide),
        "again": on(padded[:2, :3], 0, wide),
        "overlapping": on(padded[1:3, :3], 0, wide),
        "conjugate": on(torch.full((1, 2), 1j * (rank + 1)).conj(), 0, torch.zeros(2, 2)),
    }
    piece = captured(state)
    live = {
        "images": on(torch.zeros_like(images.chunk(2, 1)[rank]), 1, images),
        "padded": on(torch.full((4, 7), -2.0)[1:3, 2:5], 0, wide),
    }
    return piece, [str(live[name].stride()) for name in live]


def test_local_tensors_may_lie_anyhow() -> None:
    pieces = ranks.call(gaps, 2)
    checkpoint = Joined.of([piece for piece, _ in pieces])
    values, _ = restore(checkpoint)
    images = torch.arange(2 * 4 * 3 * 3.0).view(2, 4, 3, 3)
    assert torch.equal(values["images"], images)
    assert values["images"].is_contiguous(memory_format=torch.channels_last)
    expected = torch.tensor([[0.0] * 3] * 2 + [[1.0] * 3] * 2)
    assert torch.equal(values["padded"], expected)
    assert values["again"] is values["padded"] or torch.equal(values["again"], expected)
    assert len(checkpoint.leaves) == 4  # the same elements are there once
    assert torch.equal(values["overlapping"][1], torch.full((3,), -1.0))
    assert torch.equal(values["conjugate"], torch.tensor([[-1j] * 2, [-2j] * 2]))


# -- ways of wrapping ------------------------------------------------------------------------


def wrapped(kind: str) -> nn.Module:
    from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
    from torch.distributed.fsdp import fully_shard

    model = layouts.Net(tied=kind == "tied")
    for number, block in enumerate(model.blocks):
        if kind == "checkpointed":
            model.blocks[number] = checkpoint_wrapper(block)
        elif kind == "compiled":
            compiled: Any = torch.compile(block, backend="eager")
            model.blocks[number] = compiled
        elif kind == "compiled in place":
            block.compile(backend="eager")
    if kind != "plain":
        for block in model.blocks:
            fully_shard(block)
        fully_shard(model)
    return model


def names_and_back(kind: str, checkpoint: Joined | None) -> tuple[Captured, bool]:
    """What is saved; and whether the plain model's state came to the live one."""
    from holdfast.torch.modules import plain_loading, to_sharded

    torch.manual_seed(3)
    model = wrapped(kind)
    tokens = torch.zeros(1, 2, dtype=torch.long)
    with torch.no_grad():
        model(tokens)
    piece = captured({"model": model})
    if checkpoint is None:
        return piece, True
    assert plain_loading(model)
    with torch.no_grad():
        model(tokens)  # its root is not sharded now
        for parameter in model.parameters():
            parameter.zero_()
    restore(checkpoint, {"model": model})
    to_sharded(model)
    came = all(layouts.full(parameter).any() for _, parameter in layouts.named(model))
    with torch.no_grad():
        assert torch.isfinite(model(tokens)).all()
    return piece, came


@pytest.mark.parametrize("kind", ["fsdp", "checkpointed", "compiled", "compiled in place"])
def test_wrappers_leave_no_trace(kind: str) -> None:
    plain = Joined.of([piece for piece, _ in ranks.call(names_and_back, 2, "plain", None)])
    results = ranks.call(names_and_back, 2, kind, plain)
    found = Joined.of([piece for piece, _ in results])
    assert {leaf.path for leaf in found.leaves} == {leaf.path for leaf in plain.leaves}
    assert all(came for _, came in results)
    live = layouts.Net()
    restore(found, {"model": live})
    expected, _ = restore(plain)
    assert all(torch.equal(expected["model"][n], p) for n, p in live.named_parameters())


def test_tied_weights_are_one_leaf() -> None:
    tied = Joined.of([piece for piece, _ in ranks.call(names_and_back, 4, "tied", None)])
    assert sum("words" in leaf.path or "head" in leaf.path for leaf in tied.leaves) == 1
    live = layouts.Net(tied=True)
    restore(tied, {"model": live})
    results = ranks.call(names_and_back, 3, "tied", tied)
    assert all(came for _, came in results)
    again = Joined.of([piece for piece, _ in results])
    assert [leaf.path for leaf in again.leaves] == [leaf.path for leaf in tied.leaves]
