"""What a "torch.tensor" node says, checked: it comes from a store."""

from __future__ import annotations

from math import prod
from typing import NamedTuple

import torch

from holdfast.core.adapters import Decoder
from holdfast.core.types import Node
from holdfast.errors import DamagedObject
from holdfast.torch.dtypes import DTYPES, name_of, words
from holdfast.torch.memory import stored_dtype, stored_shape


class Saved(NamedTuple):
    """A checked tensor node."""

    leaf: int
    dtype: torch.dtype
    shape: tuple[int, ...]
    order: tuple[int, ...] | None = None
    view: tuple[int, tuple[int, ...]] | None = None
    """Offset in bytes and strides in items, of a view of the leaf's bytes."""
    leaf_bytes: int = 0

    def __str__(self) -> str:
        return words(self.dtype, self.shape)


def read_node(node: dict[str, Node], path: str, decoder: Decoder) -> Saved:
    """What a "torch.tensor" node says. Raises DamagedObject for what no save wrote."""
    dtype = DTYPES.get(node.get("dtype", "")) if isinstance(node.get("dtype"), str) else None
    if dtype is None:
        raise malformed(path, f"this torch has no dtype {node.get('dtype')!r}")
    leaf = node.get("leaf")
    if type(leaf) is not int:
        raise malformed(path, "it names no leaf")
    stored_as, stored = decoder.spec(leaf)
    if "offset" in node:
        return _read_view(node, path, leaf, dtype, stored_as, stored)
    if stored_as != stored_dtype(dtype):
        raise malformed(path, f"{name_of(dtype)} stored as {stored_as}")
    shape = tuple(stored)
    if stored_shape(dtype, shape) != shape:
        shape = shape[:-1]
        if stored_shape(dtype, shape) != tuple(stored):
            raise malformed(path, f"{name_of(dtype)} stored with shape {list(stored)}")
    order = node.get("order")
    if order is not None:
        order = tuple(naturals(order, path))
        if sorted(order) != list(range(len(shape))):
            raise malformed(path, "its order of dimensions is no permutation")
    return Saved(leaf, dtype, shape, order)


def _read_view(
    node: dict[str, Node],
    path: str,
    leaf: int,
    dtype: torch.dtype,
    stored_as: str,
    stored: tuple[int, ...],
) -> Saved:
    shape = tuple(naturals(node.get("shape"), path))
    strides = tuple(naturals(node.get("strides"), path))
    (offset,) = naturals([node.get("offset")], path)
    itemsize = dtype.itemsize
    if stored_as != "U8" or len(stored) != 1 or len(shape) != len(strides) or 0 in shape:
        raise malformed(path, "its view is malformed")
    last = sum((size - 1) * step for size, step in zip(shape, strides, strict=True))
    if offset + last + itemsize > stored[0]:
        raise malformed(path, "its view reaches outside of the stored bytes")
    if any(step % itemsize for step in (offset, *strides)):
        raise malformed(path, "its view is not aligned to its items")
    if prod(shape) >= 1 << 62:
        raise malformed(path, "its shape is too large")
    steps = tuple(step // itemsize for step in strides)
    return Saved(leaf, dtype, shape, None, (offset, steps), stored[0])


def malformed(path: str, reason: str) -> DamagedObject:
    """The error for a node that no save wrote."""
    return DamagedObject("the tree", reason, leaf=path)


def naturals(value: object, path: str) -> list[int]:
    """A list of sizes from a checkpoint, checked."""
    if not isinstance(value, list) or not all(
        type(number) is int and 0 <= number < 1 << 62 for number in value
    ):
        raise malformed(path, "its sizes are malformed")
    return value
