"""Arrays of Python objects: each item is a node of its own."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

import holdfast
from holdfast.core.records import Leaf
from holdfast.core.tree import TreeDecoder, capture
from holdfast.errors import DamagedObject, StateError, UnsupportedValue
from tests.core.exactness import assert_exact
from tests.support.jobs import fresh_address


def objects(*shape: int, items: list[Any]) -> np.ndarray[Any, Any]:
    array = np.empty(shape, object)
    for index, item in zip(np.ndindex(*shape), items, strict=True):
        array[index] = item
    return array


def round_trip(value: Any, live: Any = None) -> Any:
    with holdfast.CheckpointManager(fresh_address()) as manager:
        manager.save(1, {"x": value}).result()
        state = {"x": live}
        manager.restore(state)
    return state["x"]


@pytest.mark.parametrize(
    "array",
    [
        np.array(["a", "bcd", "ä"], object),
        np.array(["x" * 5000, None, 1.5, np.float32(2)], object),  # a leaf among them
        objects(2, 1, items=[np.arange(3), [1, 2]]),
        objects(2, items=[{"a": np.arange(3)}, (1, "y" * 5000)]),
        objects(items=["no dimension"]),
        np.empty((0, 3), object),
        objects(2, 3, items=list("abcdef")).T,
    ],
    ids=["texts", "mixed", "arrays", "containers", "0-d", "empty", "transposed"],
)
def test_all_items_come_back(array: Any) -> None:
    found = round_trip(array)
    assert found.dtype == object
    assert found.shape == array.shape
    assert_exact(found.reshape(-1).tolist(), array.reshape(-1).tolist(), "items")


def test_what_is_one_object_stays_one() -> None:
    item = [1]
    array = objects(2, items=[item, item])
    found = round_trip({"a": array, "b": array, "item": item})
    assert found["a"] is found["b"]
    assert found["a"][0] is found["a"][1] is found["item"]


def test_live_arrays_are_filled_in_place_with_what_is_in_them() -> None:
    live, inner = objects(2, items=[np.zeros(3), "old"]), None
    inner = live[0]
    assert round_trip(objects(2, items=[np.ones(3), "new"]), live) is live
    assert live[0] is inner
    assert (inner == 1).all()
    assert live[1] == "new"


def test_items_that_cannot_be_saved_are_named() -> None:
    with pytest.raises(UnsupportedValue, match=r"'x/1'.*builtins\.object"):
        capture({"x": np.array(["a", object()], object)})
    array = np.empty(1, object)
    array[0] = array
    with pytest.raises(StateError, match="nested deeper"):
        capture({"x": array})


@pytest.mark.parametrize(
    "node",
    [
        {"!": "objects", "v": [1]},
        {"!": "objects", "shape": [2], "v": [1]},
        {"!": "objects", "shape": [-1, -1], "v": [1]},
        {"!": "objects", "shape": [True], "v": [1]},
        {"!": "objects", "shape": [1] * 65, "v": [1]},
        {"!": "objects", "shape": [0, 1 << 61, 1 << 61], "v": []},
        {"!": "objects", "shape": [1], "v": {"!": "dict", "v": []}},
    ],
)
def test_malformed_nodes_are_refused(node: Any) -> None:
    leaves: list[Leaf] = []
    with pytest.raises(DamagedObject):
        TreeDecoder(leaves).apply({"!": "dict", "v": [["x", node]]})
