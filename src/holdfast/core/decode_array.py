"""How nodes of NumPy arrays and scalars become arrays."""

from __future__ import annotations

from collections.abc import Sequence
from math import prod
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from holdfast.core import arrays
from holdfast.core.types import Node
from holdfast.core.values import kind_name, malformed, unb64
from holdfast.errors import UsageError

if TYPE_CHECKING:
    from holdfast.core.decode import TreeDecoder

_MAX_STRIDE = 1 << 62


def checked_view(
    node: dict[str, Node], itemsize: int, nbytes: int, path: str
) -> tuple[tuple[int, ...], tuple[int, ...], int]:
    """(shape, strides, offset), in bytes, of a node that is a view of a leaf of
    `nbytes` bytes; every element lies inside. Raises DamagedObject."""
    shape = _integers(node.get("shape"), path)
    strides = _integers(node.get("strides"), path)
    offset = node.get("offset")
    if (
        len(shape) != len(strides)
        or len(shape) > arrays.MAX_DIMENSIONS
        or type(offset) is not int
        or any(not 0 <= size < _MAX_STRIDE for size in shape)
        or any(not -_MAX_STRIDE < stride < _MAX_STRIDE for stride in strides)
    ):
        raise malformed(path, "its view is malformed")
    low, high = arrays.byte_span(offset, shape, strides, itemsize)
    if low < 0 or high > nbytes or (not prod(shape) and not 0 <= offset <= nbytes):
        raise malformed(path, "its view lies outside its bytes")
    return shape, strides, offset


def checked_order(node: dict[str, Node], dimensions: int, path: str) -> tuple[int, ...] | None:
    """The order of dimensions in memory; None for C order. Raises DamagedObject."""
    if "order" not in node:
        return None
    order = _integers(node["order"], path)
    if sorted(order) != list(range(dimensions)):
        raise malformed(path, "its order of dimensions is malformed")
    return order


def _integers(value: object, path: str) -> tuple[int, ...]:
    if not isinstance(value, list) or any(type(i) is not int for i in cast(list[object], value)):
        raise malformed(path, "its shape is malformed")
    return tuple(cast(list[int], value))


def empty(shape: tuple[int, ...], dtype: arrays.DType, order: Sequence[int] | None) -> arrays.Array:
    """A new array whose dimensions lie in memory in this order."""
    if order is None:
        return np.empty(shape, dtype)
    inverse = sorted(range(len(order)), key=order.__getitem__)
    return np.empty([shape[dimension] for dimension in order], dtype).transpose(inverse)


def decode_array(decoder: TreeDecoder, node: dict[str, Node], target: object, path: str) -> Any:
    dtype = arrays.parse_dtype(node.get("dtype"), path)
    leaf = cast(Any, node.get("leaf"))
    stored, stored_shape = decoder.spec(leaf)
    live = cast(arrays.Array, target) if isinstance(target, np.ndarray) else None
    target = cast(object, target)
    if live is None and decoder.is_live(target):
        decoder.changed(path, f"a {dtype} array", kind_name(target))
        return target
    if "strides" in node:
        return _decode_view(decoder, node, dtype, live, path)
    expected = arrays.stored_dtype(dtype)
    shape = stored_shape if expected else stored_shape[:-1]
    if stored != (expected or "U8") or (not expected and stored_shape[-1:] != (dtype.itemsize,)):
        raise malformed(path, f"its leaf of {stored}{list(stored_shape)} is no {dtype} array")
    order = checked_order(node, len(shape), path)
    if live is not None and _fits(live, shape, dtype) and decoder.adopt(live, node):
        decoder.request(leaf, arrays.MemoryDestination(live))
        return live
    # Arrays that were one memory are one again.
    made = decoder.arrays
    base = made.get((leaf, dtype, order))
    if base is None:
        base = made[leaf, dtype, order] = _allocate(shape, dtype, order, path)
        decoder.request(leaf, arrays.MemoryDestination(base))
        return base
    return base.view()


def _allocate(
    shape: tuple[int, ...], dtype: arrays.DType, order: Sequence[int] | None, path: str
) -> arrays.Array:
    try:
        return empty(shape, dtype, order)
    except ValueError as error:  # more dimensions than this NumPy has, sizes that overflow
        raise malformed(path, f"no array can have its shape ({error})") from None


def filled(decoder: TreeDecoder, target: object, value: Any, path: str) -> Any:
    """What a name at the top level gets. The program holds its array elsewhere too: one
    that does not fit is reported and kept, not replaced."""
    if not isinstance(target, np.ndarray) or not isinstance(value, np.ndarray):
        return value
    live, saved = cast(arrays.Array, target), cast(arrays.Array, value)
    if saved is live or _fits(live, saved.shape, saved.dtype):
        return saved
    decoder.changed(path, _describe(saved), _describe(live))
    return live


def _describe(array: arrays.Array) -> str:
    """
    >>> _describe(np.zeros((2, 3)))
    'float64[2, 3]'
    """
    return f"{array.dtype}{list(array.shape)}{'' if array.flags.writeable else ', read-only'}"


def _fits(live: arrays.Array, shape: tuple[int, ...], dtype: arrays.DType) -> bool:
    return live.shape == shape and live.dtype == dtype and live.flags.writeable


def _decode_view(
    decoder: TreeDecoder,
    node: dict[str, Node],
    dtype: arrays.DType,
    live: arrays.Array | None,
    path: str,
) -> Any:
    leaf = cast(Any, node.get("leaf"))
    stored, stored_shape = decoder.spec(leaf)
    if stored != "U8" or len(stored_shape) != 1:
        raise malformed(path, "its leaf is not plain bytes")
    shape, strides, offset = checked_view(node, dtype.itemsize, stored_shape[0], path)
    base = decoder.arrays.get((leaf, None, None))
    if base is None:
        base = decoder.arrays[leaf, None, None] = np.empty(stored_shape, np.uint8)
        decoder.request(leaf, arrays.MemoryDestination(base))
    try:
        view = np.ndarray(shape, dtype, buffer=base, offset=offset, strides=strides)
    except (ValueError, TypeError) as error:
        raise malformed(path, f"no array can be this view ({error})") from None
    if live is not None and _fits(live, shape, dtype) and decoder.adopt(live, node):
        target = live
        decoder.finish(lambda: np.copyto(target, view))
        return live
    return view


def decode_numbers(decoder: TreeDecoder, node: dict[str, Node], target: object, path: str) -> Any:
    """A list of int or float that is a leaf."""
    if decoder.selecting and decoder.selection.divides(path):
        raise UsageError(
            f"{path!r} is saved as one array of numbers: its items cannot be restored one by one",
            hint=f"Name the whole list: {path!r}.",
        )
    leaf = cast(Any, node.get("leaf"))
    stored, shape = decoder.spec(leaf)
    if stored not in ("I64", "F64") or len(shape) != 1:
        raise malformed(path, "its leaf is no list of numbers")
    numbers = np.empty(shape, np.int64 if stored == "I64" else np.float64)
    decoder.request(leaf, arrays.MemoryDestination(numbers))
    live = type(target) is list and decoder.adopt(cast(object, target), node)
    result = cast("list[Any]", target) if live else list[Any]()

    def fill() -> None:
        result[:] = numbers.tolist()

    decoder.finish(fill)
    return result


def decode_scalar(decoder: TreeDecoder, node: dict[str, Node], target: object, path: str) -> Any:
    dtype = arrays.parse_dtype(node.get("dtype"), path)
    data = unb64(node.get("b64"), path)
    if len(data) != dtype.itemsize or dtype.subdtype is not None:
        raise malformed(path, "its bytes do not fit its dtype")
    if dtype.itemsize == 0:
        return np.zeros((), dtype)[()]
    return np.frombuffer(bytearray(data), dtype)[0]
