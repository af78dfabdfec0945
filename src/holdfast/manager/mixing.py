"""What the mean of checkpoints holds: which leaves are averaged, which are the last one's.

Everything is decided from the manifests, before any byte is read.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, Literal, cast

import numpy as np

from holdfast.core.averaging import ITEMSIZE, Format
from holdfast.core.leaves import check_leaf
from holdfast.core.records import Leaf, Manifest
from holdfast.core.selection import Selection, check_names, select
from holdfast.core.types import Node
from holdfast.errors import StateError, StructureMismatch
from holdfast.manager.comparison import encoded, flat, same_bytes
from holdfast.manager.nodes import leaf_indexes
from holdfast.manager.numbers import apart
from holdfast.manager.reader import ChunkReader

_ARRAYS = frozenset({"array", "torch.tensor", "jax.array"})
_FORMATS: dict[str, Format] = {"F64": "f8", "F32": "f4", "F16": "f2", "BF16": "bf16", "C64": "f4"}
_BY_NAME: dict[str, Format] = {
    "bfloat16": "bf16",
    "complex32": "f2",
    "complex64": "f4",
    "complex128": "f8",
}
_UNABLE: Literal["unable"] = "unable"
_HINT = 'Average a part: only=["model"] (--only model on the command line).'


@dataclass(frozen=True)
class Side:
    """A checkpoint, as far as it is averaged."""

    ref: str
    tree: Node
    manifest: Manifest
    reader: ChunkReader
    arrays: dict[str, Array]
    """By the path of their leaf."""


@dataclass(frozen=True)
class Array:
    """A leaf that tensors or arrays lie in."""

    leaf: Leaf
    uses: tuple[tuple[Any, ...], ...]
    """(dtype, shape, strides, offset) of each that is a view of it, else (dtype,)."""
    sparse: bool

    @property
    def words(self) -> str:
        names = sorted({_dtype_words(use[0]) for use in self.uses})
        return f"{'/'.join(names)}{list(self.leaf.shape)}"


def _dtype_words(name: object) -> str:
    """
    >>> _dtype_words("<f4"), _dtype_words("bfloat16")
    ('float32', 'bfloat16')
    """
    try:
        return np.dtype(name).name if isinstance(name, str) else "a structure"
    except TypeError:
        return str(name)


def side_of(ref: str, manifest: Manifest, reader: ChunkReader, selection: Selection) -> Side:
    """The part of a checkpoint that `selection` names. Raises UsageError if it names nothing;
    DamagedObject."""
    tree = manifest.tree
    if selection:
        check_names(tree, dict, None, selection)
        tree = select(tree, selection)
    for index in leaf_indexes(tree):  # it checks the depth, too
        if 0 <= index < len(manifest.leaves):
            check_leaf(manifest.leaves[index])
    found: dict[int, list[tuple[Any, ...]]] = {}
    sparse: set[int] = set()
    for node, below_sparse in _array_nodes(tree):
        index = node["leaf"]
        use = (node.get("dtype"),)
        if "offset" in node:
            use += (encoded([node.get("shape"), node.get("strides"), node["offset"]]),)
        found.setdefault(index, []).append((*use, node.get("offset", 0)))
        if below_sparse:
            sparse.add(index)
    leaves = manifest.leaves
    arrays = {
        leaves[index].path: Array(leaves[index], tuple(uses), index in sparse)
        for index, uses in found.items()
        if 0 <= index < len(leaves)
    }
    return Side(ref, tree, manifest, reader, arrays)


def _array_nodes(tree: Node) -> Iterator[tuple[dict[str, Any], bool]]:
    """Every node of an array with a leaf, in the tree's order, and whether it is a part of a
    sparse one."""
    waiting: list[tuple[Any, bool]] = [(tree, False)]
    while waiting:
        node, sparse = waiting.pop()
        if isinstance(node, list):
            waiting.extend((item, sparse) for item in reversed(cast(list[Any], node)))
        elif isinstance(node, dict):
            tagged = cast(dict[str, Any], node)
            if tagged.get("!") in _ARRAYS and type(tagged.get("leaf")) is int:
                yield tagged, sparse
            sparse = sparse or tagged.get("!") == "torch.sparse"
            waiting.extend((item, sparse) for item in reversed(list(tagged.values())))


# -- what becomes of each leaf --------------------------------------------------


@dataclass(frozen=True)
class Part:
    """A leaf of the mean."""

    leaf: Leaf
    """As the last checkpoint has it."""
    format: Format | None
    """Of the numbers that are averaged; None: it is the last one's."""
    of: tuple[Leaf, ...]
    """In each checkpoint; of the last only, if it is not averaged."""


@dataclass(frozen=True)
class Plan:
    """What the mean of checkpoints is."""

    parts: dict[str, Part]
    """Of the leaves with arrays, by path."""
    averaged: list[str]
    """Paths of those that hold numbers of which there is a mean."""
    differing: list[str]
    """Paths of all else that is not the same in all. It is the last one's."""


def plan_of(sides: Sequence[Side]) -> Plan:
    """Raises StructureMismatch naming the first array that is not in all, or not of one shape
    and dtype; StateError naming the first that cannot be averaged.
    """
    last = sides[-1]
    for side in sides[:-1]:
        _check_same_arrays(side, last)
    plan = Plan({}, [], [])
    for path, array in last.arrays.items():
        of = tuple(side.arrays[path].leaf for side in sides)
        format = _format(array)
        mean = format is not None and format != _UNABLE and not array.sparse
        pairs = zip(sides[:-1], of, strict=False)
        same = all(_same(side, leaf, last, array.leaf, look=not mean) for side, leaf in pairs)
        if mean:
            plan.averaged.append(path)
        elif not same and (format is not None or array.sparse):
            what = "a sparse tensor" if array.sparse else array.words
            raise StateError(
                f"{path}: {what} is not the same in all, and cannot be averaged", hint=_HINT
            )
        elif not same:
            plan.differing.append(path)
        # What is the same in all is its own mean, whatever a sum of 64-bit floats would say.
        averaged = cast(Format, format) if mean and not same else None
        plan.parts[path] = Part(array.leaf, averaged, of if averaged else of[-1:])
    plan.differing.extend(_plain_differences(sides))
    return plan


def _check_same_arrays(side: Side, last: Side) -> None:
    for path, array in last.arrays.items():
        other = side.arrays.get(path)
        if other is None:
            raise StructureMismatch(
                f"{path} is in {last.ref}, and not in {side.ref}", missing=[path], hint=_HINT
            )
        if (other.leaf.dtype, other.leaf.shape, other.uses) != (
            array.leaf.dtype,
            array.leaf.shape,
            array.uses,
        ):
            here, there = array.words, other.words
            same = " (they share memory in other ways)" if here == there else ""
            raise StructureMismatch(
                f"{path} is {here} in {last.ref}, and {there} in {side.ref}{same}",
                changed=[path],
                hint=_HINT,
            )
    for path in side.arrays:
        if path not in last.arrays:
            raise StructureMismatch(
                f"{path} is in {side.ref}, and not in {last.ref}", unexpected=[path], hint=_HINT
            )


def _format(array: Array) -> Format | Literal["unable"] | None:
    """What its bytes are; None: whole numbers and other things of which there is no mean."""
    leaf = array.leaf
    if leaf.dtype in _FORMATS:
        return _FORMATS[leaf.dtype]
    if leaf.dtype.startswith("F8"):
        return _UNABLE
    if leaf.dtype != "U8":
        return None
    found = {_by_name(use[0]) for use in array.uses}
    if found == {None}:
        return None
    if len(found) > 1 or _UNABLE in found:
        return _UNABLE
    format = cast(Format, found.pop())
    aligned = all(use[-1] % ITEMSIZE[format] == 0 for use in array.uses)
    return format if aligned and prod(leaf.shape) % ITEMSIZE[format] == 0 else _UNABLE


def _by_name(name: object) -> Format | Literal["unable"] | None:
    if not isinstance(name, str):
        return _UNABLE  # a structure
    if name in _BY_NAME:
        return _BY_NAME[name]
    if name.startswith(("float4", "float8")):
        return _UNABLE  # NumPy may know them, by way of ml_dtypes, as something of its own
    try:
        dtype = np.dtype(name)
    except TypeError:
        return _UNABLE if "float" in name or "complex" in name else None
    if dtype.kind not in "fc":
        return None
    size = dtype.itemsize // (2 if dtype.kind == "c" else 1)
    known: dict[int, Format] = {2: "f2", 4: "f4", 8: "f8"}
    return _UNABLE if dtype.byteorder == ">" else known.get(size, _UNABLE)


def _same(side: Side, leaf: Leaf, last: Side, other: Leaf, *, look: bool = True) -> bool:
    """Whether two leaves hold the same bytes. By their digests; if they were cut at other places,
    False, or with `look` by reading them."""
    if leaf.dtype != other.dtype or leaf.shape != other.shape:
        return False
    same = same_bytes(leaf, other)
    if same is None and look:
        return not apart(side.reader, leaf, last.reader, other, numeric=False).differing
    return bool(same)


def _plain_differences(sides: Sequence[Side]) -> list[str]:
    """Paths of plain values, texts and files that are not the same in all."""
    last = sides[-1]
    arrays = {array.leaf.path for array in last.arrays.values()}
    items = dict(flat(last.tree, last.manifest.leaves))
    differing: dict[str, None] = {}
    for side in sides[:-1]:
        others = dict(flat(side.tree, side.manifest.leaves))
        for path, item in items.items():
            if item.leaf is not None and item.leaf.path in arrays:
                continue
            other = others.get(path)
            if other is None or (item.leaf is None) != (other.leaf is None):
                differing[path] = None
            elif item.leaf is not None and other.leaf is not None:
                if not _same(side, other.leaf, last, item.leaf):
                    differing[path] = None
            elif encoded(item.node) != encoded(other.node):
                differing[path] = None
    return list(differing)


# -- the tree of the mean -------------------------------------------------------


def used_leaves(*trees: Node) -> list[int]:
    """Leaves that the trees name, in the order of the manifest."""
    return sorted({index for tree in trees for index in leaf_indexes(tree)})


def renumbered(node: Node, numbers: dict[int, int]) -> Node:
    """The tree with other numbers for its leaves."""
    if isinstance(node, list):
        return [renumbered(item, numbers) for item in cast(list[Node], node)]
    if not isinstance(node, dict):
        return node
    return {
        key: numbers[value] if key == "leaf" and type(value) is int else renumbered(value, numbers)
        for key, value in cast(dict[str, Any], node).items()
    }


def check_references(tree: Node) -> None:
    """Raise StateError if something in a selected tree is defined outside of it."""
    defined: set[Any] = set()
    named: set[Any] = set()
    waiting: list[Any] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, list):
            waiting.extend(cast(list[Any], node))
        elif isinstance(node, dict):
            tagged = cast(dict[str, Any], node)
            if tagged.get("!") == "ref":
                named.add(tagged.get("v"))
            elif tagged.get("!") == "id":
                defined.add(tagged.get("v"))
            if "id" in tagged:
                defined.add(tagged["id"])
            waiting.extend(tagged.values())
    if not named <= defined:
        raise StateError(
            "what is selected holds objects that stand elsewhere in the checkpoint",
            hint="Name that part in only=, too, or average everything.",
        )
