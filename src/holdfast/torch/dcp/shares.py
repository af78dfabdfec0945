"""What each rank has written of one save, and how it becomes one manifest. Pure.

A rank writes items: parts of tensors, and whole values. Of a tensor each rank's part is a
number of chunks of one leaf, which has the shape of the whole tensor.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Mapping, Sequence
from math import prod
from typing import Any, cast

import msgspec
from msgspec.structs import replace

from holdfast.core.encode import MAX_PATH_CHARACTERS
from holdfast.core.records import Chunk, Leaf, Manifest, Pack
from holdfast.core.types import Node
from holdfast.core.values import encode_str
from holdfast.errors import StateError

Path = tuple[str | int, ...]
"""Where a value is in the state: keys of dicts, and numbers in lists."""

Box = tuple[tuple[int, ...], tuple[int, ...]]
"""(start, shape)."""


class Part(msgspec.Struct, frozen=True):
    """A part of a tensor, or all of it."""

    path: Path
    node: dict[str, Node]
    """Of the tensor, without its leaf."""
    leaf: Leaf
    """With the whole tensor's shape, and the chunks of this part."""


class Value(msgspec.Struct, frozen=True):
    """Anything else."""

    path: Path
    node: Node
    """Its leaves are numbered as in the share."""


class Share(msgspec.Struct, frozen=True):
    """What one rank has written."""

    parts: tuple[Part, ...]
    values: tuple[Value, ...]
    leaves: tuple[Leaf, ...]
    """Of the values."""
    packs: tuple[Pack, ...]
    pickled: bool = False
    new_nbytes: int = 0
    """Of the chunks that were written for it."""


class Joined(msgspec.Struct, frozen=True):
    """What a manifest needs of all shares."""

    tree: Node
    leaves: tuple[Leaf, ...]
    packs: tuple[Pack, ...]
    pickled: bool


def text_of(path: Path) -> str:
    """A path as leaves are called.

    >>> text_of(("model", "layers.0.weight")), text_of(("losses", 2))
    ('model/layers.0.weight', 'losses/2')
    """
    text = "/".join(map(str, path))
    return text.encode("ascii", "backslashreplace").decode()[:MAX_PATH_CHARACTERS]


def moved(leaf: Leaf, shape: Sequence[int], start: Sequence[int]) -> Leaf:
    """`leaf`, whose shape is that of a part, as that part of a leaf of `shape`."""
    chunks = [
        Chunk(
            tuple(a + b for a, b in zip(chunk.start, start, strict=True)),
            *(chunk.shape, chunk.pack, chunk.offset, chunk.nbytes, chunk.digest, chunk.codec),
        )
        for chunk in leaf.chunks
    ]
    return replace(leaf, shape=tuple(shape), chunks=tuple(chunks))


def own_part(
    base: Manifest, boxes: Mapping[str, Sequence[Box]], names: Collection[str]
) -> Manifest:
    """`base` with those chunks only that begin in one of `boxes` (by the path of their leaf), and
    with the leaves in `names`.

    What all ranks write are boxes that do not overlap, so each chunk of an earlier checkpoint is
    given to one of them at most, and stands once in the next manifest.
    """
    leaves: list[Leaf] = []
    for leaf in base.leaves:
        if leaf.path in names:
            leaves.append(leaf)
        elif found := boxes.get(leaf.path):
            chunks = [c for c in leaf.chunks if any(_begins_in(c.start, box) for box in found)]
            leaves.append(replace(leaf, chunks=tuple(chunks)))
    return replace(base, leaves=tuple(leaves))


def _begins_in(start: Sequence[int], box: Box) -> bool:
    first, shape = box
    return len(start) == len(first) and all(
        a <= n < a + size for n, a, size in zip(start, first, shape, strict=True)
    )


def join(shares: Iterable[Share]) -> Joined:
    """One tree and one list of leaves of all. Raises StateError if they do not fit together."""
    packs: dict[str, tuple[int, Pack]] = {}
    leaves = _Leaves()
    nodes: dict[Path, Node] = {}
    parts: dict[Path, list[tuple[dict[str, Node], Leaf]]] = {}
    ids = 0
    pickled = False
    for share in shares:
        pickled |= share.pickled
        numbers = [packs.setdefault(pack.name, (len(packs), pack))[0] for pack in share.packs]
        for part in share.parts:
            leaf = _repacked(part.leaf, numbers)
            parts.setdefault(part.path, []).append((part.node, leaf))
        first = len(leaves.all)
        for leaf in share.leaves:
            leaves.add(_repacked(leaf, numbers))
        for value in share.values:
            if value.path in nodes:
                raise StateError(f"two ranks have written {text_of(value.path)!r}")
            node, ids = _renumbered(value.node, first, ids)
            nodes[value.path] = node
    for path, found in parts.items():
        nodes[path] = {**found[0][0], "leaf": leaves.add(_whole(path, found))}
    tree = _tree(nodes)
    return Joined(tree, tuple(leaves.all), tuple(pack for _, pack in packs.values()), pickled)


class _Leaves:
    def __init__(self) -> None:
        self.all: list[Leaf] = []
        self._taken: set[str] = set()

    def add(self, leaf: Leaf) -> int:
        path, count = leaf.path, 1
        while path in self._taken:
            count += 1
            path = f"{leaf.path}#{count}"
        self._taken.add(path)
        self.all.append(leaf if count == 1 else replace(leaf, path=path))
        return len(self.all) - 1


def _repacked(leaf: Leaf, numbers: Sequence[int]) -> Leaf:
    """`leaf` with the packs of its chunks by their number in the manifest."""
    return replace(
        leaf,
        chunks=tuple(
            Chunk(c.start, c.shape, numbers[c.pack], c.offset, c.nbytes, c.digest, c.codec)
            for c in leaf.chunks
        ),
    )


def _whole(path: Path, found: Sequence[tuple[dict[str, Node], Leaf]]) -> Leaf:
    first = found[0][1]
    chunks = sorted((c for _, leaf in found for c in leaf.chunks), key=lambda chunk: chunk.start)
    for _, leaf in found:
        if (leaf.dtype, leaf.shape) != (first.dtype, first.shape):
            raise StateError(
                f"the ranks do not agree about {text_of(path)!r}: {first.dtype}"
                f"{list(first.shape)} and {leaf.dtype}{list(leaf.shape)}"
            )
    held, all = sum(prod(chunk.shape) for chunk in chunks), prod(first.shape)
    if held != all:
        raise StateError(
            f"of {text_of(path)!r} the ranks have written {held:,} elements, and it has {all:,}",
            hint="All ranks of the process group must take part in the save, and each must give "
            "the same names.",
        )
    return replace(first, chunks=tuple(chunks))


def _renumbered(node: Node, first: int, ids: int) -> tuple[Node, int]:
    """A value's node with its leaves from `first` on, and its ids after `ids`; the highest id."""
    highest = ids

    def visit(node: Any) -> Any:
        nonlocal highest
        if isinstance(node, list):
            return [visit(item) for item in cast(list[Any], node)]
        if not isinstance(node, dict):
            return node
        tagged = cast(dict[str, Any], node)
        names_id = tagged.get("!") in ("ref", "id")
        made: dict[str, Any] = {}
        for key, item in tagged.items():
            if type(item) is int and key == "leaf":
                made[key] = item + first
            elif type(item) is int and (key == "id" or (key == "v" and names_id)):
                made[key] = item + ids
                highest = max(highest, item + ids)
            else:
                made[key] = visit(item)
        return made

    return visit(node), highest


def _tree(nodes: Mapping[Path, Node]) -> Node:
    """The state that has these nodes at these paths."""
    root: dict[Any, Any] = {}
    for path, node in nodes.items():
        at = root
        for part in path[:-1]:
            below = at.setdefault(part, {})
            if type(below) is not dict:
                raise StateError(f"{text_of(path)!r} is below a value")
            at = cast(dict[Any, Any], below)
        if path[-1] in at:
            raise StateError(f"there are values below {text_of(path)!r}, and it is one")
        at[path[-1]] = _Node(node)
    return _dict_node(root)


class _Node:
    def __init__(self, node: Node) -> None:
        self.node = node


def _dict_node(values: Mapping[Any, Any]) -> Node:
    def of(value: Any) -> Node:
        if isinstance(value, _Node):
            return value.node
        below = cast(dict[Any, Any], value)
        if all(type(key) is int for key in below):
            # DCP says nothing of what is empty: there a list has a hole.
            absent = _Node(None)
            return [of(below.get(index, absent)) for index in range(max(below) + 1)]
        return _dict_node(below)

    pairs: list[Node] = [[encode_str(str(key)), of(value)] for key, value in values.items()]
    return {"!": "dict", "v": pairs}
