"""NumPy arrays of Python objects: texts of any length, trees of an ensemble.

    {"!": "objects", "shape": [2, 1], "v": [node, node]}

The items are nodes, in C order.
"""

from __future__ import annotations

from math import prod
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from holdfast.core.adapters import NOTHING, Encoder
from holdfast.core.arrays import MAX_DIMENSIONS, Array
from holdfast.core.containers import items_of
from holdfast.core.leaves import Later, settle
from holdfast.core.types import Node
from holdfast.core.values import kind_name, malformed

if TYPE_CHECKING:
    from holdfast.core.decode import TreeDecoder


def encode_objects(value: Array, path: str, encoder: Encoder) -> dict[str, Node]:
    """The node of an array of dtype `object`. Raises UnsupportedValue with an item's path."""
    items = cast("list[object]", value.reshape(-1).tolist())
    nodes = [encoder.encode(item, f"{path}/{index}") for index, item in enumerate(items)]
    return {"!": "objects", "shape": list(value.shape), "v": nodes}


def decode_objects(decoder: TreeDecoder, node: dict[str, Node], target: object, path: str) -> Any:
    """Into the live array `target` if it is one of objects, and of this shape."""
    items, shape = items_of(node, path), _shape(node.get("shape"), path)
    if prod(shape) != len(items):
        raise malformed(path, "its shape is malformed")
    if decoder.is_live(target):
        decoder.changed(path, "an array of objects", kind_name(target))
        return target
    live = _fitting(target, shape)
    here: list[Any] = [NOTHING] * len(items) if live is None else live.reshape(-1).tolist()
    found = [
        decoder.decode_node(item, here[index], f"{path}/{index}")
        for index, item in enumerate(items)
    ]
    if live is None or not decoder.adopt(live, node):
        try:
            live = np.empty(shape, object)
        except ValueError as error:  # more dimensions than this NumPy has, sizes that overflow
            raise malformed(path, f"no array can have its shape ({error})") from None
        _fill(live, found)
        if not any(type(value) is Later for value in found):
            return live
    array = live
    decoder.finish(lambda: _fill(array, [settle(value) for value in found]))
    return array


def _shape(found: Node, path: str) -> tuple[int, ...]:
    sizes = cast("list[object]", found) if isinstance(found, list) else [None]
    if len(sizes) > MAX_DIMENSIONS:
        raise malformed(path, "its shape is malformed")
    if any(type(size) is not int or not 0 <= size < 1 << 62 for size in sizes):
        raise malformed(path, "its shape is malformed")
    return tuple(cast("list[int]", sizes))


def _fitting(target: object, shape: tuple[int, ...]) -> Array | None:
    """`target` if it is an array of objects that can be filled."""
    if not isinstance(target, np.ndarray):
        return None
    array = cast(Array, target)
    fits = array.dtype.kind == "O" and array.shape == shape and array.flags.writeable
    return array if fits else None


def _fill(array: Array, values: list[Any]) -> None:
    for index, value in zip(np.ndindex(array.shape), values, strict=True):
        array[index] = value  # one by one: NumPy would look into lists
