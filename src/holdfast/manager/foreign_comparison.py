"""What differs between two of these: foreign files or folders, and checkpoints.

A foreign file is encoded as a save of its values would be, so that both sides are trees with
leaves. Compared are tensors and plain values by their paths; what containers and
frameworks add around them (a list or a tuple, a parameter or a buffer) is no difference.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from math import prod
from typing import Any, cast

import numpy as np

from holdfast.core.adapters import LeafSource
from holdfast.core.captured import capture
from holdfast.core.digest import digest
from holdfast.core.leaves import ChunkIndex
from holdfast.core.plan import itemsize, overlap, slices
from holdfast.core.records import Chunk, Leaf, Manifest, Record
from holdfast.core.types import MiB, Node
from holdfast.foreign import Foreign
from holdfast.manager.comparison import (
    Difference,
    Kind,
    Part,
    Side,
    encoded,
    flat,
    numbers_in,
    parts_of,
)
from holdfast.manager.foreign_state import Converter, named
from holdfast.manager.nodes import leaf_indexes
from holdfast.manager.numbers import apart_in, assembled, stretches
from holdfast.manager.reader import ChunkReader
from holdfast.repo.repo import Repo

_PIECE_BYTES = 8 * MiB
_CONTAINERS = frozenset(("dict", "odict", "defaultdict", "counter", "object", "dataclass"))


@dataclass
class Compared:
    """One of the two, ready to be compared."""

    items: dict[str, Side]
    """By path."""
    sources: dict[str, LeafSource] = field(default_factory=dict[str, LeafSource])
    """Of a foreign file: by the path of a leaf."""
    reader: ChunkReader | None = None
    """Of a checkpoint."""
    left_out: tuple[tuple[str, str], ...] = ()
    """(path, class) of objects in a foreign file, which cannot be compared."""


@dataclass(frozen=True)
class FileComparison:
    differences: tuple[Difference, ...]
    parts: tuple[Part, ...]
    leaves: int
    values: int
    left_out: tuple[tuple[str, str], ...]

    @property
    def equal(self) -> bool:
        """Whether all tensors and plain values are the same, bit for bit."""
        return not self.differences


def of_checkpoint(repo: Repo, record: Record, only: str = "") -> Compared:
    """Raises DamagedObject, CheckpointRemoved, StoreUnavailable."""
    manifest = repo.manifest(record)
    found = _flat(manifest.tree, manifest)
    return Compared(_only(found, only), reader=ChunkReader(repo, record, manifest))


def of_foreign(foreign: Foreign, only: str = "") -> Compared:
    """Of an open one; with `only` what is below that name, where there is one."""
    converter = Converter(None)
    names = named(foreign.compared(), "", only)
    captured = capture(converter.state(names))
    leaves = tuple(
        Leaf(leaf.path, leaf.source.dtype, leaf.source.shape, ()) for leaf in captured.leaves
    )
    sources = {leaf.path: leaf.source for leaf in captured.leaves}
    items = _only(_flat(captured.tree, leaves), only)
    return Compared(items, sources, left_out=tuple(converter.objects))


def _flat(tree: Node, manifest: Manifest | tuple[Leaf, ...]) -> dict[str, Side]:
    leaves = manifest.leaves if isinstance(manifest, Manifest) else manifest
    for _ in leaf_indexes(tree):
        pass  # it checks how deep the tree is
    return {
        path: side
        for path, side in flat(tree, leaves)
        if not _is_container(side) and "/~attrs/" not in f"/{path}/"
    }


def _is_container(side: Side) -> bool:
    if side.leaf is not None or not isinstance(side.node, dict):
        return False
    node = cast(dict[str, Any], side.node)
    tag = f"{node.get('!')}"
    # A tuple that holds others, a module.
    return tag in _CONTAINERS or ((tag == "tuple" or "." in tag) and "v" not in node)


def _only(items: dict[str, Side], only: str) -> dict[str, Side]:
    below = f"{only}/"
    found = {p.removeprefix(below): side for p, side in items.items() if p.startswith(below)}
    return found if only and found else items


def compare_files(a: Compared, b: Compared, *, values: bool = False) -> FileComparison:
    """Compare two; with `values` also how far unequal numbers are apart.

    Raises DamagedObject, CheckpointRemoved, StoreUnavailable.
    """
    differences: list[Difference] = []
    for path, side in a.items.items():
        other = b.items.get(path)
        if other is None:
            differences.append(Difference("state", "only a", path, side, None))
        elif (kind := _kind(side, other)) is not None:
            differences.append(Difference("state", kind, path, side, other))
        elif side.leaf is not None:
            differences += _unequal_leaf(path, a, b, values)
    for path, side in b.items.items():
        if path not in a.items:
            differences.append(Difference("state", "only b", path, None, side))
    paths = {**a.items, **b.items}
    leaves = sum(1 for side in paths.values() if side.leaf is not None)
    parts = parts_of(a.items, b.items, differences)
    left_out = dict.fromkeys((*a.left_out, *b.left_out))
    return FileComparison(
        tuple(differences), tuple(parts), leaves, len(paths) - leaves, tuple(left_out)
    )


def _kind(a: Side, b: Side) -> Kind | None:
    """How the two differ without a look at their bytes; None if they do not."""
    if a.leaf is not None and b.leaf is not None:
        if _dtype(a) != _dtype(b):
            return "dtype"
        return "shape" if a.leaf.shape != b.leaf.shape else None
    if a.leaf is not None or b.leaf is not None:
        return "type"
    return None if _plain(a.node) == _plain(b.node) else "value"


def _dtype(side: Side) -> str:
    """With what the leaf does not say: a complex128 and a text of 16 bytes are U8, both."""
    assert side.leaf is not None
    node = cast(dict[str, Any], side.node) if isinstance(side.node, dict) else {}
    if side.leaf.dtype != "U8":
        return side.leaf.dtype
    name = f"{node.get('dtype', node.get('!'))}"
    return {"|u1": "uint8", "<c16": "complex128"}.get(name, name)


def _plain(node: Node) -> bytes:
    """A list and a tuple of the same are no difference."""
    if isinstance(node, dict) and node.get("!") == "tuple":
        node = cast(Node, node.get("v"))
    return encoded(node)


def _unequal_leaf(path: str, a: Compared, b: Compared, values: bool) -> Iterator[Difference]:
    side, other = a.items[path], b.items[path]
    assert side.leaf is not None
    unequal = _stretches(path, a, b)
    if not values:
        if next(unequal, None) is not None:
            yield Difference("state", "values", path, side, other)
        return
    first = next(unequal, None)
    if first is None:
        return
    numeric, row_bytes = numbers_in(side)

    def every() -> Iterator[tuple[memoryview, memoryview]]:
        yield first
        yield from unequal

    found = apart_in(
        every(), side.leaf.dtype, side.leaf.shape, numeric=numeric, row_bytes=row_bytes
    )
    yield Difference("state", "values", path, side, other, found)


def _stretches(path: str, a: Compared, b: Compared) -> Iterator[tuple[memoryview, memoryview]]:
    """The stretches of two leaves whose bytes differ. Of a checkpoint only those are read."""
    if a.reader is not None and b.reader is None:
        for theirs, ours in _stretches(path, b, a):
            yield ours, theirs
        return
    mine, leaf = a.items[path].leaf, b.items[path].leaf
    assert mine is not None
    assert leaf is not None
    source = a.sources[mine.path]
    if b.reader is None:
        other = b.sources[leaf.path]
        for at in range(0, source.nbytes, _PIECE_BYTES):
            count = min(_PIECE_BYTES, source.nbytes - at)
            ours, theirs = memoryview(bytearray(count)), memoryview(bytearray(count))
            source.copy_range(at, ours)
            other.copy_range(at, theirs)
            if ours != theirs:
                yield ours, theirs
        return
    index, size = ChunkIndex(leaf), itemsize(leaf.dtype)
    at = 0
    for start, shape in stretches(leaf):
        ours = memoryview(bytearray(prod(shape) * size))
        source.copy_range(at, ours)
        at += ours.nbytes
        items = np.frombuffer(ours, f"u{size}").reshape(shape)
        left = [chunk for chunk in index.reaching(start, shape) if not _holds(items, chunk, start)]
        if left:
            theirs = assembled(b.reader, leaf, left, start, shape, memoryview(bytearray(ours)))
            if theirs != ours:
                yield ours, theirs


def _holds(items: np.ndarray[Any, Any], chunk: Chunk, start: Sequence[int]) -> bool:
    """Whether the items, a box that begins at `start`, have all bytes of the chunk."""
    if overlap(chunk.start, chunk.shape, start, items.shape) != (chunk.start, chunk.shape):
        return False
    return digest(items[(*slices(chunk.start, chunk.shape, start), ...)].tobytes()) == chunk.digest
