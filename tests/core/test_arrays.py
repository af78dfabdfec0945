from __future__ import annotations

import gc
from math import prod
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra import numpy as nps

from holdfast.core.arrays import (
    ArraySource,
    MemoryDestination,
    byte_span,
    dense_order,
    dtype_node,
    in_words,
    parse_dtype,
    stored_dtype,
)
from holdfast.core.plan import boxes, itemsize
from holdfast.core.tree import capture
from holdfast.errors import DamagedObject, UnsupportedValue
from tests.core.tree_harness import Saved, roundtrip, save

# -- dtypes -------------------------------------------------------------------------


@given(nps.array_dtypes(allow_subarrays=True) | nps.scalar_dtypes())
def test_dtypes_come_back(dtype: np.dtype) -> None:
    found = parse_dtype(dtype_node(dtype, "a"), "a")
    assert found == dtype
    assert found.descr == dtype.descr if dtype.names else found.str == dtype.str


@pytest.mark.parametrize(
    "dtype",
    [
        np.dtype([("a", "i1"), ("b", "<f8")], align=True),
        np.dtype({"names": ["b", "a"], "formats": ["i4", "i4"], "offsets": [4, 0]}),
        np.dtype({"names": ["a", "b"], "formats": ["i4", "i2"], "offsets": [0, 2]}),  # overlap
        np.dtype({"names": ["a"], "formats": ["i1"], "itemsize": 100}),
        np.dtype([(("title", "name"), "i4")]),
        np.dtype([("a", [("b", ">M8[3ns]")], (2, 3))]),
        np.dtype([]),
        np.dtype("V7"),
    ],
)
def test_unusual_dtypes_come_back(dtype: np.dtype) -> None:
    found = parse_dtype(dtype_node(dtype, "a"), "a")
    assert (found, found.itemsize, found.isalignedstruct) == (
        dtype,
        dtype.itemsize,
        dtype.isalignedstruct,
    )
    assert repr(found) == repr(dtype)
    array = np.zeros((3, 2), dtype)
    assert roundtrip(array).tobytes() == array.tobytes()


@pytest.mark.parametrize(
    "node",
    [
        "O",
        "|O",
        "object",
        "float32",
        "f4",
        "<f3",
        "<f4,<f4",
        "(2,)<f4",
        "<U99999999999",
        "<M8[parsec]",
        "<M8[99999999999ns]",
        "__import__('os')",
        None,
        3,
        [],
        {},
        {"fields": [], "itemsize": -1},
        {"fields": [], "itemsize": 1 << 40},
        {"fields": [["a", "<f4", 2]], "itemsize": 4},
        {"fields": [["a", "<f4", -4]], "itemsize": 4},
        {"fields": [["a", "<f4", 0], ["a", "<f4", 4]], "itemsize": 8},
        {"fields": [["a", "|O", 0]], "itemsize": 8},
        {"fields": [[1, "<f4", 0]], "itemsize": 8},
        {"fields": [["a", "<f4"]], "itemsize": 8},
        {"fields": [["a", "<f4", 0, "t", 3]], "itemsize": 8},
        {"fields": [["a", "<f4", 0, 3]], "itemsize": 8},
        {"fields": 3, "itemsize": 8},
        {"base": "<f4", "shape": [1 << 30, 1 << 30]},
        {"base": "<f4", "shape": [-1]},
        {"base": "<f4", "shape": "ab"},
    ],
)
def test_other_dtypes_are_refused(node: Any) -> None:
    with pytest.raises(DamagedObject, match="dtype"):
        parse_dtype(node, "a")


def test_deeply_nested_dtypes_are_refused() -> None:
    node: Any = "<f4"
    for _ in range(200):
        node = {"fields": [["a", node, 0]], "itemsize": 4}
    with pytest.raises(DamagedObject, match="nested"):
        parse_dtype(node, "a")


@pytest.mark.parametrize(
    "array",
    [
        np.zeros(2, [("a", "i4"), ("b", "O")]),
        np.zeros(2, np.dtypes.StringDType()),
        np.ma.masked_array([1, 2], [True, False]),
    ],
    ids=["field", "string", "masked"],
)
def test_arrays_without_bytes_of_their_own_are_refused(array: Any) -> None:
    with pytest.raises(UnsupportedValue, match="'x/y'") as caught:
        capture({"x": {"y": array}})
    assert caught.value.hint


# -- sources and destinations -----------------------------------------------------------


@given(
    nps.array_shapes(min_dims=0, max_dims=4, max_side=5),
    st.sampled_from(["<f4", ">f4", "|b1", "<c16", ">c8", "<U2", ">M8[s]", "|V3", "<f2"]),
    st.data(),
)
def test_any_range_of_any_layout(shape: tuple[int, ...], dtype: str, data: st.DataObject) -> None:
    count = prod(shape)
    size = np.dtype(dtype).itemsize
    raw = np.arange(count * size, dtype=np.uint8) % 2
    array = raw.view(dtype).reshape(shape).transpose(data.draw(st.permutations(range(len(shape)))))
    if array.ndim:
        array = array[..., :: data.draw(st.sampled_from([1, -1, 2]))]
    source = ArraySource(array)
    assert source.nbytes == array.nbytes == prod(source.shape) * itemsize(source.dtype)
    whole = bytearray(source.nbytes)
    source.copy_range(0, memoryview(whole))
    if stored_dtype(array.dtype):
        little = array.astype(array.dtype.newbyteorder("<")) if dtype[0] == ">" else array
        assert whole == np.ascontiguousarray(little).tobytes()
    else:
        assert whole == np.ascontiguousarray(array).tobytes()
    first = data.draw(st.integers(0, len(whole)))
    last = data.draw(st.integers(first, len(whole)))
    part = bytearray(last - first)
    source.copy_range(first, memoryview(part))
    assert part == whole[first:last]

    back = np.empty_like(array)
    destination = MemoryDestination(back)
    for start, counts, offset, nbytes in boxes(source.shape, itemsize(source.dtype), 16):
        destination.write(start, counts, memoryview(whole)[offset : offset + nbytes])
    assert np.ascontiguousarray(back).tobytes() == np.ascontiguousarray(array).tobytes()


def test_signalling_nans_of_the_other_byte_order_keep_their_bits() -> None:
    array = np.array([0x7FA00001, 0xFFC12345], ">u4").view(">f4")
    assert roundtrip(array).tobytes() == array.tobytes()
    array = np.array([0x7FF4000000000001] * 4, ">u8").view(">c16")
    assert roundtrip(array[::-1]).tobytes() == array.tobytes()


def test_order_of_dimensions_is_kept() -> None:
    array = np.arange(24).reshape(2, 3, 4).transpose(2, 0, 1)
    back = roundtrip(array)
    assert back.strides == array.strides
    assert np.array_equal(back, array)
    fortran = np.asfortranarray(np.arange(600.0).reshape(20, 30))
    assert roundtrip(fortran).flags.f_contiguous


def test_words() -> None:
    assert in_words((4096, 1024), np.dtype("f4")) == "float32[4096, 1024]"
    assert dense_order((2, 1, 3), (24, 999, 8), 8) in ([1, 0, 2], [0, 1, 2])
    assert byte_span(10, (0, 3), (8, 8), 8) == (10, 10)


# -- arrays that share memory --------------------------------------------------------------


def leaf_bytes(saved: Saved) -> int:
    return sum(map(len, saved.bytes))


def test_the_same_array_twice_is_one_object() -> None:
    array = np.arange(3)
    back = roundtrip([array, array])
    assert back[0] is back[1]


def test_equal_views_are_one_leaf_and_share_memory() -> None:
    base = np.arange(100)
    saved = save({"a": base[10:20], "b": base[10:20], "c": base[10:20].reshape(2, 5)[:1]})
    assert leaf_bytes(saved) == 80
    back = saved.restore()
    assert back["a"] is not back["b"]
    back["a"][0] = -1
    assert back["b"][0] == back["c"][0, 0] == -1


def test_overlapping_views_share_memory_again_and_store_their_union() -> None:
    base = np.arange(1000.0)
    state = {"a": base[100:200], "b": base[150:250:2], "c": base[199:90:-1], "d": base[500:]}
    saved = save(state)
    assert leaf_bytes(saved) == (250 - 91 - 1) * 8 + 500 * 8  # 91..248, and d alone
    back = saved.restore()
    for name, array in state.items():
        assert np.array_equal(back[name], array), name
        assert back[name].strides == array.strides
    back["a"][50] = -1
    assert back["b"][0] == back["c"][49] == -1
    assert not np.shares_memory(back["d"], back["a"])


def test_a_small_slice_does_not_store_its_base() -> None:
    base = np.zeros(10**6)
    saved = save({"a": base[:10], "b": base[-10:], "c": base.reshape(1000, 1000)[:, 500]})
    assert leaf_bytes(saved) == 160 + 8000


def test_columns_between_each_other_are_apart() -> None:
    table = np.arange(20).reshape(10, 2)
    saved = save({"a": table[:, 0], "b": table[:, 1]})
    assert [len(data) for data in saved.bytes] == [80, 80]
    back = saved.restore()
    assert not np.shares_memory(back["a"], back["b"])


def test_two_leaves_become_one_when_a_third_array_joins_them() -> None:
    base = np.arange(30)
    saved = save({"a": base[:10], "b": base[20:], "c": base[5:25]})
    assert sorted(len(data) for data in saved.bytes) == [0, 240]
    back = saved.restore()
    back["c"][:] = -1
    assert back["a"][5] == back["b"][4] == -1
    assert back["a"][4] == 4


def test_a_view_under_another_dtype_shares_memory() -> None:
    floats = np.arange(4, dtype=np.float32)
    back = save({"f": floats, "bits": floats.view(np.uint32)}).restore()
    back["bits"][0] = 0x3F800000
    assert back["f"][0] == 1.0
    assert back["f"].dtype == np.float32


def test_broadcast_arrays_stay_small() -> None:
    array = np.broadcast_to(np.arange(3.0), (1000, 1000, 3))
    saved = save({"a": array})
    assert leaf_bytes(saved) == 24
    back = saved.restore()["a"]
    assert back.strides == array.strides
    assert np.array_equal(back, array)
    windows = np.lib.stride_tricks.sliding_window_view(np.arange(50), 10)
    assert leaf_bytes(save({"w": windows})) == 400
    assert np.array_equal(roundtrip(windows), windows)


def test_memory_of_other_owners_is_shared_too() -> None:
    buffer = bytearray(range(64))
    one = np.frombuffer(buffer, np.uint8, 32)
    other = np.frombuffer(buffer, np.uint8, 32, 16)
    back = save({"one": one, "other": other}).restore()
    back["one"][16] = 200
    assert back["other"][0] == 200


def test_sources_keep_temporary_buffers_alive() -> None:
    captured = capture({"a": [np.arange(1000)[:500], np.arange(1000)[250:]]})
    base = np.arange(1000)
    both = capture({"a": base[:600], "b": base[400:]})
    del base
    gc.collect()
    noise = [np.full(1000, 7) for _ in range(20)]
    data = bytearray(8000)
    both.leaves[0].source.copy_range(0, memoryview(data))
    assert np.array_equal(np.frombuffer(data, np.int64), np.arange(1000))
    assert len(captured.leaves) == 2
    assert len(noise) == 20


def test_memmaps_are_arrays(tmp_path: Any) -> None:
    array = np.memmap(tmp_path / "m", np.int32, "w+", shape=(3, 4))
    array[:] = 5
    back = roundtrip(array)
    assert type(back) is np.ndarray
    assert (back == 5).all()


# -- scalars ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "scalar",
    [
        np.float16(1.5),
        np.longdouble(1) / 3,
        np.clongdouble(1j),
        np.datetime64("2024-02-29T12", "h"),
        np.timedelta64("NaT"),
        np.bool_(True),
        np.array([(1, 2.5)], [("a", "i4"), ("b", "f8")])[0],
        np.void(b"abc"),
    ],
)
def test_scalars_keep_their_type(scalar: Any) -> None:
    back = roundtrip(scalar)
    assert type(back) is type(scalar)
    assert back.dtype == scalar.dtype
    assert np.asarray(back).tobytes()[:8] == np.asarray(scalar).tobytes()[:8]


def test_padding_of_extended_floats_does_not_change_the_tree() -> None:
    trees = {str(capture({"x": np.longdouble(1) / np.longdouble(3)}).tree) for _ in range(5)}
    assert len(trees) == 1
