"""Dense tensors: every dtype and layout, shared memory, live targets, hostile nodes."""

from __future__ import annotations

import subprocess
import sys
import threading
import warnings
from typing import Any

import numpy as np
import pytest
import torch

import holdfast.torch
from holdfast.errors import DamagedObject, StateError, StructureMismatch, UnsupportedValue
from holdfast.torch.dtypes import DTYPES
from holdfast.torch.memory import TensorDestination, _tensor_over, source_of
from tests.torch.roundtrip import Checkpoint, assert_same, bits, random_bits, roundtrip


@pytest.mark.parametrize("name", sorted(DTYPES))
def test_every_dtype_keeps_its_bits(name: str) -> None:
    dtype = DTYPES[name]
    for shape in ((), (0,), (3, 0), (7,), (3, 5)):
        tensor = random_bits(dtype, *shape)
        assert_same(roundtrip(tensor), tensor)
        live = random_bits(dtype, *shape)
        Checkpoint({"x": tensor}).restore({"x": live})
        assert bits(live) == bits(tensor)


def test_every_dtype_of_torch_is_stored_or_refused() -> None:
    quantized = {torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4}
    every = {value for value in vars(torch).values() if isinstance(value, torch.dtype)}
    assert every - quantized == set(DTYPES.values())


def test_dtypes_that_safetensors_names_are_stored_under_that_name() -> None:
    checkpoint = Checkpoint({"a": torch.zeros(2, 3, dtype=torch.bfloat16)})
    assert (checkpoint.leaf("a").dtype, checkpoint.leaf("a").shape) == ("BF16", (2, 3))
    checkpoint = Checkpoint({"a": torch.zeros(2, 3, dtype=torch.complex128)})
    assert (checkpoint.leaf("a").dtype, checkpoint.leaf("a").shape) == ("U8", (2, 3, 16))


def test_nan_payloads_and_negative_zero() -> None:
    tensor = torch.from_numpy(np.array([0x7FC00001, 0xFFA00123, 0x80000000], np.uint32)).view(
        torch.float32
    )
    assert bits(roundtrip(tensor)) == bits(tensor)


def test_channels_last_keeps_its_order_and_its_logical_shape() -> None:
    tensor = torch.randn(2, 3, 4, 5).to(memory_format=torch.channels_last)
    checkpoint = Checkpoint({"x": tensor})
    assert checkpoint.leaf("x").shape == (2, 3, 4, 5)
    loaded = checkpoint.restore()["x"]
    assert loaded.stride() == tensor.stride()
    assert loaded.is_contiguous(memory_format=torch.channels_last)
    assert_same(loaded, tensor)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(
    "shape", [(8, 1, 3, 3), (1, 3, 4, 5), (1, 1, 4, 5), (2, 3, 1, 1), (1, 1, 1, 1), (2, 1, 1, 4)]
)
def test_dimensions_of_size_1_keep_their_strides(shape: Any, memory_format: Any) -> None:
    """They decide about the memory format of what is computed from the tensor."""
    # .to() leaves tensors alone that are contiguous in both ways.
    tensor = torch.empty(shape, memory_format=memory_format).normal_()
    loaded = roundtrip(tensor)
    assert loaded.stride() == tensor.stride()
    for asked in (torch.contiguous_format, torch.channels_last):
        same = tensor.is_contiguous(memory_format=asked)
        assert loaded.is_contiguous(memory_format=asked) is same
    made = [torch.conv2d(x, torch.ones(4, shape[1], 1, 1)).stride() for x in (tensor, loaded)]
    assert made[0] == made[1]
    assert bits(loaded) == bits(tensor)


@pytest.mark.parametrize("dims", [(1, 0), (2, 0, 1), (3, 1, 0, 2)])
def test_permuted_tensors(dims: tuple[int, ...]) -> None:
    tensor = torch.randn((2, 3, 4, 5)[: len(dims)]).permute(dims)
    loaded = roundtrip(tensor)
    assert loaded.stride() == tensor.stride()
    assert_same(loaded, tensor)


def test_only_the_slice_of_a_large_storage_is_stored() -> None:
    base = torch.randn(1000, 10)
    for piece in (base[3:5], base[:, 2:4], base[::7], base[10, 3]):
        checkpoint = Checkpoint({"x": piece})
        assert checkpoint.stored_bytes == piece.numel() * 4
        assert_same(checkpoint.restore()["x"], piece)


def test_expanded_tensors_store_their_memory_once() -> None:
    row = torch.randn(1, 4)
    expanded = row.expand(1000, 4)
    checkpoint = Checkpoint({"x": expanded})
    assert checkpoint.stored_bytes == 16
    loaded = checkpoint.restore()["x"]
    assert loaded.stride() == (0, 1)
    assert bits(loaded) == bits(expanded)


def test_a_live_expanded_tensor_takes_an_expanded_one_only() -> None:
    saved = torch.randn(1, 4).expand(3, 4)
    live = torch.zeros(1, 4).expand(3, 4)
    Checkpoint({"x": saved}).restore({"x": live})
    assert bits(live) == bits(saved)
    assert live.stride() == (0, 1)
    ordinary = torch.zeros(3, 4)
    Checkpoint({"x": saved}).restore({"x": ordinary})
    assert bits(ordinary) == bits(saved)
    with pytest.raises(StructureMismatch, match="share memory"):
        Checkpoint({"x": torch.randn(3, 4)}).restore({"x": live})


def test_windows_over_one_buffer() -> None:
    saved = torch.arange(10.0).unfold(0, 4, 1)
    checkpoint = Checkpoint({"x": saved})
    assert checkpoint.stored_bytes == 40
    assert_same(checkpoint.restore()["x"], saved)
    live = torch.zeros(10).unfold(0, 4, 1)
    checkpoint.restore({"x": live})
    assert bits(live) == bits(saved)


# -- shared memory ------------------------------------------------------------


def test_equal_views_are_one_leaf_and_share_memory_again() -> None:
    weight = torch.randn(4, 3)
    state = {"a": weight.detach(), "b": weight.detach(), "c": torch.randn(4, 3)}
    checkpoint = Checkpoint(state)
    assert len(checkpoint.leaves) == 2
    loaded = checkpoint.restore()
    assert loaded["a"].data_ptr() == loaded["b"].data_ptr() != loaded["c"].data_ptr()
    assert loaded["a"] is not loaded["b"]
    assert_same(loaded, state)


def test_one_tensor_object_comes_back_as_one_object() -> None:
    tensor = torch.randn(3)
    loaded = Checkpoint({"a": tensor, "b": [tensor, {"c": tensor}]}).restore()
    assert loaded["a"] is loaded["b"][0] is loaded["b"][1]["c"]


def test_disjoint_slices_are_leaves_of_their_own() -> None:
    base = torch.randn(6, 4)
    checkpoint = Checkpoint({"a": base[:3], "b": base[3:]})
    assert [leaf.shape for leaf in checkpoint.leaves] == [(3, 4), (3, 4)]


def test_overlapping_views_are_stored_once_and_overlap_again() -> None:
    base = torch.arange(24.0).view(6, 4)
    state = {"low": base[:4], "high": base[2:], "all": base.t(), "int": base.view(torch.int32)[1]}
    checkpoint = Checkpoint(state)
    assert checkpoint.stored_bytes == base.nbytes
    loaded = checkpoint.restore()
    assert_same(loaded, state)
    assert loaded["all"].stride() == (1, 4)
    loaded["all"][1, 2] = -1.0
    assert loaded["low"][2, 1] == -1.0 == loaded["high"][0, 1]
    assert loaded["int"].dtype is torch.int32


def test_a_view_that_joins_two_leaves() -> None:
    base = torch.arange(30.0)
    state = {"a": base[:10], "b": base[20:], "c": base[5:25]}
    checkpoint = Checkpoint(state)
    assert checkpoint.stored_bytes == base.nbytes
    assert_same(checkpoint.restore(), state)
    live = {"a": torch.zeros(10), "b": torch.zeros(10), "c": torch.zeros(20)}
    checkpoint.restore(live)
    assert_same(live, {name: value.clone() for name, value in state.items()})


def test_live_views_are_written_through() -> None:
    saved = torch.arange(24.0).view(6, 4)
    live = torch.zeros(6, 4)
    Checkpoint({"low": saved[:4], "high": saved[2:]}).restore({"low": live[:4], "high": live[2:]})
    assert_same(live, saved)


def test_live_tied_tensors_refuse_two_different_values() -> None:
    live = torch.zeros(3)
    with pytest.raises(StructureMismatch, match="tied") as caught:
        Checkpoint({"a": torch.ones(3), "b": torch.full((3,), 2.0)}).restore(
            {"a": live, "b": live.view(3)}
        )
    assert len(caught.value.changed) == 1
    assert live.tolist() == [0, 0, 0]


def test_live_tied_tensors_take_one_value_that_was_saved_twice() -> None:
    live = torch.zeros(3)
    Checkpoint({"a": torch.ones(3), "b": torch.ones(3)}).restore({"a": live, "b": live.view(3)})
    assert live.tolist() == [1, 1, 1]


def test_saved_tied_fills_live_tensors_that_are_two() -> None:
    saved = torch.randn(3)
    live = {"a": torch.zeros(3), "b": torch.zeros(3)}
    Checkpoint({"a": saved, "b": saved}).restore(live)
    assert live["a"].tolist() == live["b"].tolist() == saved.tolist()
    assert live["a"] is not live["b"]


# -- what else a tensor has -----------------------------------------------------


def test_parameters_and_gradients() -> None:
    state = {
        "p": torch.nn.Parameter(torch.randn(2)),
        "frozen": torch.nn.Parameter(torch.randn(2), requires_grad=False),
        "leaf": torch.randn(2, requires_grad=True),
        "ids": torch.nn.Parameter(torch.tensor([1, 2]), requires_grad=False),
    }
    assert_same(Checkpoint(state).restore(), state)


def test_a_result_comes_back_without_its_graph() -> None:
    loaded = roundtrip(torch.randn(2, requires_grad=True) * 2)
    assert loaded.requires_grad is False
    assert loaded.grad_fn is None


def test_conjugate_and_negative_views_are_resolved() -> None:
    numbers = torch.randn(3, dtype=torch.complex64)
    assert_same(roundtrip(numbers.conj()), numbers.conj().resolve_conj())
    assert_same(roundtrip(numbers.conj().imag), numbers.conj().imag.resolve_neg())
    base = torch.zeros(3, dtype=torch.complex64)
    Checkpoint({"x": numbers}).restore({"x": base.conj()})
    assert bits(base.conj().resolve_conj()) == bits(numbers)


def test_live_tensors_are_written_without_autograd_but_seen_by_it() -> None:
    saved = torch.randn(4)
    parameter = torch.nn.Parameter(torch.zeros(4))
    before = parameter._version
    square = parameter**2
    Checkpoint({"x": saved}).restore({"x": parameter})
    assert parameter.tolist() == saved.tolist()
    assert parameter.is_leaf
    assert parameter.grad_fn is None
    assert parameter._version > before
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        square.sum().backward()


def test_live_tensors_made_in_inference_mode() -> None:
    with torch.inference_mode():
        live = torch.zeros(4)
        view = torch.zeros(4, 2).t()
    Checkpoint({"x": torch.ones(4), "y": torch.ones(2, 4)}).restore({"x": live, "y": view})
    assert live.tolist() == [1.0] * 4
    assert view.sum() == 8
    assert_same(roundtrip(live), live.clone())


@pytest.mark.parametrize("make", [lambda t: t.t(), lambda t: t[:, ::2], lambda t: t[1:]])
def test_live_strided_tensors_leave_their_neighbours_alone(make: Any) -> None:
    base = torch.zeros(6, 8)
    live = make(base)
    saved = torch.randn(live.shape)
    Checkpoint({"x": saved}, chunk_bytes=12).restore({"x": live})
    assert bits(live) == bits(saved)
    assert (base != 0).sum() == live.numel()


def test_unaligned_buffers() -> None:
    tensor = torch.randn(3, 5).t()
    source = source_of(tensor)
    whole = bytearray(source.nbytes + 1)
    source.copy_range(0, memoryview(whole)[1:])
    assert bytes(whole[1:]) == bits(tensor)
    part = bytearray(6)
    source.copy_range(3, memoryview(part))
    assert bytes(part) == bits(tensor)[3:9]
    live = torch.zeros(5, 3)[:, :]
    strided = torch.zeros(3, 5).t()
    for target in (live, strided):
        TensorDestination(target).write((0, 0), (5, 3), memoryview(whole)[1:].toreadonly())
        assert bits(target) == bits(tensor)


def test_read_only_memory_is_read_in_place_unless_it_is_unaligned() -> None:
    data = np.frombuffer(bytes(64), np.uint8)
    whole = _tensor_over(data, 8)
    assert whole.data_ptr() == data.ctypes.data
    assert _tensor_over(data[1:9], 8).data_ptr() % 8 == 0


def test_boxes_need_not_be_contiguous_in_the_leaf() -> None:
    """Other writers may cut leaves as they like."""
    saved, live = torch.randn(4, 6), torch.zeros(4, 6)
    destination = TensorDestination(live)
    for column in range(0, 6, 2):
        piece = saved[:, column : column + 2]
        destination.write((0, column), (4, 2), memoryview(bits(piece)))
    assert bits(live) == bits(saved)


def test_destinations_can_be_written_from_threads() -> None:
    saved = torch.randn(64, 33)
    live = torch.zeros(33, 64).t()
    destination = TensorDestination(live)
    data = memoryview(bits(saved))

    def write(row: int) -> None:
        destination.write((row, 0), (1, 33), data[row * 132 : (row + 1) * 132])

    threads = [threading.Thread(target=write, args=(row,)) for row in range(64)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert bits(live) == bits(saved)


def test_devices_are_recorded_and_loading_goes_to_the_cpu() -> None:
    checkpoint = Checkpoint({"x": torch.ones(2)})
    assert b"device" not in checkpoint.json
    checkpoint.json = checkpoint.json.replace(b'"leaf":0', b'"leaf":0,"device":"nowhere:0"')
    assert checkpoint.restore()["x"].device.type == "cpu"
    with holdfast.torch.recorded_devices(), pytest.raises(StateError, match="nowhere:0"):
        checkpoint.restore()
    checkpoint.json = checkpoint.json.replace(b"nowhere:0", b"meta")
    with holdfast.torch.recorded_devices(), pytest.raises(DamagedObject, match="meta"):
        checkpoint.restore()
    checkpoint.json = checkpoint.json.replace(b"meta", b"cpu pinned")
    with holdfast.torch.recorded_devices():
        assert checkpoint.restore()["x"].device.type == "cpu"


PROGRAM = """
import torch
from holdfast.torch.tensors import _empty
for shape in ((), (3,), (0, 2)):
    tensor = _empty(shape, torch.complex32, torch.device("cpu"))
    assert (tensor.dtype, tensor.shape) == (torch.complex32, shape)
"""


def test_loading_an_experimental_dtype_does_not_warn() -> None:
    """torch warns once in a process when such a tensor is made."""
    subprocess.run([sys.executable, "-W", "error", "-c", PROGRAM], check=True, timeout=120)


# -- refusals -----------------------------------------------------------------


class Subclass(torch.Tensor):
    pass


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (torch.zeros(2, device="meta"), "meta device"),
        (torch.zeros(2).as_subclass(Subclass), "not in this version"),
        (torch.nested.nested_tensor([torch.zeros(2)], layout=torch.jagged), "not in this version"),
    ],
)
def test_tensors_without_bytes_of_their_own_are_refused(value: Any, words: str) -> None:
    with pytest.raises(UnsupportedValue, match=words) as caught:
        Checkpoint({"deep": {"x": value}})
    assert caught.value.path == "deep/x"
    assert caught.value.hint


def test_quantized_tensors_are_refused() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        value = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
    with pytest.raises(UnsupportedValue, match="quantized"):
        Checkpoint({"x": value})


def test_live_targets_that_cannot_be_written_are_refused() -> None:
    checkpoint = Checkpoint({"x": torch.zeros(2)})
    with pytest.raises(StateError, match="to_empty"):
        checkpoint.restore({"x": torch.zeros(2, device="meta")})
    live = torch.ones(2).as_subclass(Subclass)
    checkpoint.restore({"x": live})  # it has memory like any other
    assert live.tolist() == [0, 0]


def test_reports_name_dtype_and_shape_of_both_sides() -> None:
    live = {"a": torch.zeros(2, 3), "b": torch.zeros(4), "c": torch.zeros(1)}
    before = {name: value.clone() for name, value in live.items()}
    saved = {"a": torch.ones(2, 3, dtype=torch.bfloat16), "b": torch.ones(5), "c": torch.ones(1)}
    with pytest.raises(StructureMismatch) as caught:
        Checkpoint(saved).restore(live)
    assert caught.value.changed == (
        "a: saved as bfloat16[2, 3], live is float32[2, 3]",
        "b: saved as float32[5], live is float32[4]",
    )
    assert_same(live, before)
    Checkpoint(saved).restore(live, strict=False)
    assert live["c"].item() == 1
    assert live["a"].sum() == 0


HOSTILE = [
    ('"leaf":0', '"leaf":7'),
    ('"leaf":0', '"leaf":-1'),
    ('"leaf":0', '"leaf":"0"'),
    ('"float32"', '"float64"'),
    ('"float32"', '"complex128"'),
    ('"float32"', '"nn"'),
    ('"float32"', "3"),
    ('"leaf":0', '"leaf":0,"order":[0]'),
    ('"leaf":0', '"leaf":0,"order":[1,1]'),
    ('"leaf":0', '"leaf":0,"order":[0,-1]'),
    ('"leaf":0', '"leaf":0,"offset":0,"shape":[9],"strides":[4]'),
]


@pytest.mark.parametrize(("old", "new"), HOSTILE)
def test_hostile_nodes_are_refused(old: str, new: str) -> None:
    checkpoint = Checkpoint({"x": torch.ones(2, 3)})
    assert old.encode() in checkpoint.json
    checkpoint.json = checkpoint.json.replace(old.encode(), new.encode())
    with pytest.raises(DamagedObject):
        checkpoint.restore()


@pytest.mark.parametrize(
    ("old", "new"),
    [
        ('"offset":0', '"offset":12'),
        ('"offset":0', '"offset":-8'),
        ('"offset":0', '"offset":1'),
        ('"offset":0', '"offset":true'),
        ('"strides":[4]', '"strides":[3]'),
        ('"strides":[4]', '"strides":[400]'),
        ('"strides":[4]', '"strides":[4,4]'),
        ('"shape":[6]', '"shape":[4611686018427387903]'),
        ('"shape":[6]', '"shape":[0]'),
        ('"shape":[6]', '"shape":{}'),
    ],
)
def test_hostile_views_are_refused(old: str, new: str) -> None:
    base = torch.ones(8)
    checkpoint = Checkpoint({"x": base[:6], "y": base[2:]})
    assert old.encode() in checkpoint.json
    checkpoint.json = checkpoint.json.replace(old.encode(), new.encode(), 1)
    with pytest.raises(DamagedObject):
        checkpoint.restore()
