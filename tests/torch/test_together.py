"""Many tensors captured together: the same as one by one, and without a call for each."""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from typing import Any

import hypothesis.strategies as st
import msgspec
import numpy as np
import pytest
import torch
from hypothesis import given
from torch.overrides import TorchFunctionMode

import holdfast.torch
from holdfast.core.adapters import LeafSource
from holdfast.core.copying import copy_leaves
from holdfast.core.sharing import SharedMemory
from holdfast.core.tree import TreeEncoder
from holdfast.errors import StateError
from holdfast.torch import together
from holdfast.torch.memory import TensorSource, source_of

DTYPES = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.complex64, torch.complex128)


def dense(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.randint(0, 2, shape).to(dtype)


def from_parts(dtype: torch.dtype, shape: tuple[int, ...]) -> torch.Tensor:
    return torch.view_as_complex(torch.randint(0, 9, (*shape, 2)).float())


FORMS: dict[str, Callable[[torch.dtype, tuple[int, ...]], torch.Tensor]] = {
    "dense": dense,
    "parameter": lambda dtype, shape: torch.nn.Parameter(dense(dtype, shape), requires_grad=False),
    "trained": lambda dtype, shape: torch.nn.Parameter(torch.randn(shape)),
    "leaf": lambda dtype, shape: torch.randn(shape, requires_grad=True),
    "result": lambda dtype, shape: torch.randn(shape, requires_grad=True) * 2,
    "conj": lambda dtype, shape: from_parts(dtype, shape).conj(),
    "plain complex": from_parts,
    "neg": lambda dtype, shape: from_parts(dtype, shape).conj().imag,
    "neg without gaps": lambda dtype, shape: torch.ops.aten._neg_view(torch.randn(shape)),
    "transposed": lambda dtype, shape: dense(dtype, (2, *shape)).transpose(0, -1),
    "rows": lambda dtype, shape: dense(dtype, (4, *shape))[1],
    "expanded": lambda dtype, shape: dense(dtype, shape).expand(3, *shape),
    "sparse": lambda dtype, shape: torch.eye(3).to_sparse(),
    "frozen": lambda dtype, shape: torch.nn.Parameter(torch.randn(shape), requires_grad=False),
}
SHAPES = ((), (0,), (1,), (3,), (2, 3), (2, 1))
"""Few of everything, so that most tensors have something in common with another."""

ORDERS = st.lists(
    st.tuples(st.sampled_from(sorted(FORMS)), st.sampled_from(DTYPES), st.sampled_from(SHAPES)),
    min_size=1,
    max_size=12,
)


@st.composite
def states(draw: st.DrawFn) -> dict[str, Any]:
    """Dicts, lists and sets of tensors, some of them tied, views of others, or met twice."""
    made = [FORMS[form](dtype, shape) for form, dtype, shape in draw(ORDERS)]
    for kind, index in draw(st.lists(st.tuples(st.integers(0, 3), st.integers(0, 11)), max_size=4)):
        first = made[index % len(made)]
        if kind == 0 or first.layout is not torch.strided:
            made.append(first)
        elif kind == 1:
            made.append(first.detach())
        elif kind == 2:
            made.append(first.detach().reshape(-1)[1:])
        else:
            made.append(first.data)
    places = draw(st.lists(st.integers(0, 4), min_size=len(made), max_size=len(made)))
    state: dict[str, Any] = {"d": {}, "l": [], "s": set(), "t": (), "n": np.arange(3)}
    for number, (tensor, place) in enumerate(zip(made, places, strict=True)):
        if place == 0:
            state["l"].append(tensor)
        elif place == 1:
            state["s"].add(tensor)
        elif place == 2:
            state["t"] = (*state["t"], tensor)
        else:
            state["d"][f"{number}" * place] = tensor
    return state


def captured(state: dict[str, Any]) -> tuple[bytes, list[Any]]:
    """All that a save would write of it."""
    encoder = TreeEncoder()
    tree = encoder.encode(state, "")
    runtime = encoder.encode({"again": state["d"]}, "!runtime")
    leaves: list[Any] = []
    for path, source in ((leaf.path, leaf.source) for leaf in encoder.leaves):
        data = bytearray(source.nbytes)
        source.copy_range(0, memoryview(data))
        leaves.append((path, source.dtype, tuple(source.shape), bytes(data)))
    return msgspec.json.encode([tree, runtime], order="deterministic"), leaves


def one_by_one(state: dict[str, Any]) -> tuple[bytes, list[Any]]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(holdfast.torch.adapter), "together", frozenset[type]())
        return captured(state)


@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize("second", FORMS)
def test_what_one_tensor_is_says_nothing_of_another(first: str, second: str) -> None:
    made = {form: FORMS[form](torch.float32, (3,)) for form in (first, second)}
    assert captured({"d": made}) == one_by_one({"d": made})


@given(states())
def test_together_is_as_one_by_one(state: dict[str, Any]) -> None:
    assert captured(state) == one_by_one(state)


# -- from save to save ----------------------------------------------------------


class Two:
    def __init__(self) -> None:
        self.one = torch.nn.Linear(4, 4)
        self.two = torch.nn.Linear(4, 4)
        self.both = torch.nn.Sequential(self.one, self.two)


def swap(model: Two) -> None:
    model.one.weight = torch.nn.Parameter(torch.randn(4, 4))


def swap_data(model: Two) -> None:
    model.one.weight.data = torch.randn(2, 4)


def resize(model: Two) -> None:
    model.two.bias.data.resize_(3).zero_()


def set_storage(model: Two) -> None:
    with torch.no_grad():
        storage = torch.arange(9.0).to(model.two.bias.dtype).untyped_storage()
        model.two.bias.set_(storage, 1, (2, 2), (4, 1))  # type: ignore[call-overload]


def freeze(model: Two) -> None:
    model.both.requires_grad_(not model.one.weight.requires_grad)


def tie(model: Two) -> None:
    model.one.weight = model.two.weight


def untie(model: Two) -> None:
    model.one.weight = torch.nn.Parameter(model.two.weight.detach().clone())


def view(model: Two) -> None:
    model.one.bias.data = model.two.weight.data[1]


def retype(model: Two) -> None:
    model.both.to(torch.bfloat16)


def rename(model: Two) -> None:
    parts = model.both._modules
    name = next(iter(parts))
    parts[f"{name}_"] = parts.pop(name)  # the last one now


def reallocate(model: Two) -> None:
    """Tensors die, and others come to their addresses."""
    for part in (model.one, model.two):
        shape = part.weight.shape
        del part.weight
        part.weight = torch.nn.Parameter(torch.randn(shape).t())


EDITS = (
    swap,
    swap_data,
    resize,
    set_storage,
    freeze,
    tie,
    untie,
    view,
    retype,
    rename,
    reallocate,
)


@given(st.lists(st.sampled_from(EDITS), max_size=5))
def test_no_save_sees_what_an_earlier_one_saw(edits: list[Any]) -> None:
    model = Two()
    optimizer = torch.optim.SGD(model.both.parameters(), momentum=0.9)
    for parameter in model.both.parameters():
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    state: dict[str, Any] = {"model": model.both, "optimizer": optimizer, "d": {}}
    earlier: list[tuple[Any, bytes]] = []
    for edit in (freeze, *edits):
        edit(model)
        assert captured(state) == one_by_one(state)
        encoder = TreeEncoder()
        tree = encoder.encode([state, list(model.both.parameters()), *model.both.parameters()], "")
        earlier.append((tree, msgspec.json.encode(tree)))
    for tree, text in earlier:
        assert msgspec.json.encode(tree) == text


# -- how much is done --------------------------------------------------------------


def many(count: int) -> dict[str, Any]:
    model = torch.nn.ParameterList([torch.randn(4, 4) for _ in range(count)])
    optimizer = torch.optim.Adam(model.parameters())
    for parameter in model:
        parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    return {"model": model, "optimizer": optimizer, "more": {"x": torch.randn(3), "y": [1, 2]}}


def test_usual_tensors_are_never_looked_at_one_by_one(monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise AssertionError(arguments)

    kinds: list[torch.Tensor] = []
    kind = together._kind
    monkeypatch.setattr(together, "_kind", lambda tensor: kinds.append(tensor) or kind(tensor))
    encoder = TreeEncoder()
    monkeypatch.setattr(TreeEncoder, "leaf", fail)
    monkeypatch.setattr(TensorSource, "copy_range", fail)
    encoder.encode(many(50), "")
    assert len(encoder.leaves) == 201
    assert len(kinds) == 3  # parameters and moments; steps; x
    sources = [leaf.source for leaf in encoder.leaves]
    copied = copy_all(sources)
    assert copied == b"".join(bytes_of(leaf.source._tensor) for leaf in encoder.leaves)  # type: ignore[attr-defined]


class Counting(TorchFunctionMode):
    """As `torch.set_default_device` is one."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Any | None = None
    ) -> Any:
        self.calls += 1
        return func(*args, **(kwargs or {}))


def test_a_default_device_costs_nothing_for_each_tensor() -> None:
    few, lots = ({f"{n}": torch.randn(3) for n in range(count)} for count in (2, 200))
    calls: list[int] = []
    for state in (few, lots):
        with Counting() as mode:
            encoder = TreeEncoder()
            encoder.encode(state, "")
            copy_all([leaf.source for leaf in encoder.leaves])
        calls.append(mode.calls)
    assert calls[0] == calls[1]


# -- copies ------------------------------------------------------------------------


def bytes_of(tensor: torch.Tensor) -> bytes:
    return tensor.detach().contiguous().view(-1).view(torch.uint8).numpy().tobytes()


def copy_all(sources: list[LeafSource], gap: int = 0) -> bytes:
    """All of them one after another, from an odd address on."""
    ends = list(accumulate(source.nbytes + gap for source in sources))
    region = np.full(ends[-1] + 1, 255, np.uint8)[1:]
    copy_leaves(sources, region, [0, *ends[:-1]])
    return region.tobytes()


@given(states())
def test_copied_at_once_is_as_one_by_one(state: dict[str, Any]) -> None:
    encoder = TreeEncoder()
    encoder.encode(state, "")
    expected: list[bytes] = []
    for source in (leaf.source for leaf in encoder.leaves):
        data = bytearray(source.nbytes)
        source.copy_range(0, memoryview(data))
        expected.append(bytes(data) + b"\xff" * 3)
    assert copy_all([leaf.source for leaf in encoder.leaves], gap=3) == b"".join(expected)


def test_large_tensors_are_copied_by_themselves(monkeypatch: pytest.MonkeyPatch) -> None:
    # That copy releases the GIL.
    ranges: list[int] = []
    copy_range = TensorSource.copy_range

    def counted(self: TensorSource, offset: int, into: memoryview) -> None:
        ranges.append(len(into))
        copy_range(self, offset, into)

    monkeypatch.setattr(TensorSource, "copy_range", counted)
    small, large = torch.arange(1000.0), torch.arange(100_000.0)
    copied = copy_all([source_of(small), source_of(large), source_of(small)])
    assert copied == bytes_of(small) + bytes_of(large) + bytes_of(small)
    assert ranges == [large.nbytes]


def test_nothing_is_copied_outside_of_the_region() -> None:
    sources: list[LeafSource] = [source_of(torch.ones(4)), source_of(torch.ones(4))]
    region = np.zeros(31, np.uint8)
    for starts in ([0, 16], [-1, 8]):
        with pytest.raises(ValueError, match="16 bytes at"):
            copy_leaves(sources, region, starts)
    assert not region.any()


@pytest.mark.parametrize("nbytes", [0, 8])
def test_memory_that_was_freed_meanwhile_is_not_read(nbytes: int) -> None:
    # As FSDP does with the parameters of a layer that has run.
    tensor = torch.ones(100)
    source = source_of(tensor)
    tensor.untyped_storage().resize_(nbytes)
    with pytest.raises(StateError, match="its memory"):
        copy_all([source])
    assert tensor.untyped_storage().nbytes() == nbytes


def test_a_tensor_without_its_memory_is_refused() -> None:
    tensor = torch.ones(100)
    tensor.untyped_storage().resize_(0)
    encoder = TreeEncoder()
    with pytest.raises(StateError, match="its memory"):
        encoder.encode({"a": torch.ones(2), "b": tensor}, "")
        copy_all([leaf.source for leaf in encoder.leaves])


def test_views_of_one_buffer_are_not_compared_with_each_other(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    # Optimizers that keep all parameters in one flat buffer have thousands of them.
    compared: list[Any] = []
    between = SharedMemory._between

    def counted(self: SharedMemory, low: int, high: int) -> Any:
        found = between(self, low, high)
        compared.extend(found)
        return found

    monkeypatch.setattr(SharedMemory, "_between", counted)
    views = list(torch.arange(1000.0).split(2))
    state = {f"{number}": view for number, view in enumerate([*views[250:], *views[:250]])}
    encoder = TreeEncoder()
    encoder.encode(state, "")
    assert len(encoder.leaves) == 500
    assert compared == []
    assert copy_all([leaf.source for leaf in encoder.leaves]) == b"".join(
        map(bytes_of, state.values())
    )
