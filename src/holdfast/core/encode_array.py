"""How NumPy arrays and scalars become nodes."""

from __future__ import annotations

from typing import Any, cast

import numpy as np

from holdfast.core import arrays, values
from holdfast.core.adapters import Encoder
from holdfast.core.object_arrays import encode_objects
from holdfast.core.sharing import Layout, SharedMemory
from holdfast.core.types import Node

_First = tuple[arrays.Array, dict[str, Node], arrays.ArraySource]


class ArrayNodes:
    """The arrays of one save, and the buffers that they share."""

    def __init__(self) -> None:
        # id of a buffer -> its first array, or all of them once there is a second.
        self._buffers: dict[int, _First | SharedMemory] = {}

    def encode(self, encoder: Encoder, value: arrays.Array, path: str) -> dict[str, Node]:
        """The node of `value`, which must be kept alive until the save is captured."""
        dtype = value.dtype
        if dtype.kind == "O":
            return encode_objects(value, path, encoder)
        node: dict[str, Node] = {"!": "array", "dtype": arrays.dtype_node(dtype, path)}
        dense = value.flags.c_contiguous
        if not dense:
            order = arrays.dense_order(value.shape, value.strides, dtype.itemsize)
            dense = order is not None
            if order and order != sorted(order):
                node["order"] = order
        base = _buffer_of(value)
        shared = self._buffers.get(id(base))
        if shared is None and dense:
            source = arrays.ArraySource(value)
            node["leaf"] = encoder.leaf(source, path)
            self._buffers[id(base)] = value, node, source
            return node
        if not isinstance(shared, SharedMemory):
            first = shared
            shared = SharedMemory(lambda low, high: arrays.memory_source(low, high, base))
            if first is not None:
                shared.add(_layout(first[0]), first[1], first[2])
            self._buffers[id(base)] = shared
        layout = _layout(value)
        return shared.place(encoder, layout, node, lambda: arrays.ArraySource(value), path)


def scalar_node(value: Any, path: str) -> dict[str, Node] | None:
    """The node of a NumPy scalar; None if its type is not NumPy's own."""
    array = np.asarray(value)
    if type(value) is not array.dtype.type:
        return None
    dtype = arrays.dtype_node(array.dtype, path)
    return {"!": "scalar", "dtype": dtype, "b64": values.b64(arrays.scalar_bytes(array))}


def _buffer_of(array: arrays.Array) -> object:
    """The object that owns an array's memory, or at least one that all its views name."""
    base: Any = array
    while isinstance(base, np.ndarray) and base.base is not None:
        base = cast(Any, base.base)
    return cast(object, base.obj if isinstance(base, memoryview) else base)


def _layout(array: arrays.Array) -> Layout:
    address: int = array.__array_interface__["data"][0]
    return Layout(address, array.shape, array.strides, array.dtype.itemsize, array.dtype)
