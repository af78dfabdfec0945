"""The tensors of a checkpoint as files in the safetensors format.

Bytes go from the packs into the files, piece by piece, each compared with its digest before: no
tensor is ever in memory whole, and no framework is needed.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import cache
from math import prod
from pathlib import Path
from typing import Any, NamedTuple, cast

import msgspec
import numpy as np

from holdfast.core import arrays
from holdfast.core.address import printable
from holdfast.core.decode import definitions
from holdfast.core.decode_array import checked_view
from holdfast.core.leaves import FileDestination, check_leaf
from holdfast.core.packing import PackChunk, pack_header
from holdfast.core.plan import NAMED, itemsize
from holdfast.core.records import Leaf, Manifest, Record
from holdfast.core.types import MiB, Node
from holdfast.core.values import MAX_DEPTH, malformed
from holdfast.errors import UsageError
from holdfast.manager.nodes import leaf_indexes, mapping_pairs
from holdfast.manager.reader import ChunkReader, Wanted
from holdfast.repo.check import leaf_nbytes
from holdfast.repo.repo import Repo

_NO_TENSORS = frozenset({"str", "bytes", "bytearray", "pickle", "npstr", "npbytes", "file"})
_VIEWED = frozenset({"torch.tensor", "array"})
# Of dtypes that safetensors cannot name, where an item is not one byte.
_WIDE = {"complex32": 4, "complex128": 16}
_PIECE_BYTES = 8 * MiB
_MOST_AGAIN = 100_000  # names that come by references: dicts that are in a model twice
# What Transformers and PEFT look for, in this order or another.
_WEIGHTS = re.compile(
    r"(model|adapter_model)(-\d+-of-\d+)?\.safetensors(\.index\.json)?|adapter_config\.json"
)


class View(NamedTuple):
    """Where in a leaf of bytes a tensor lies that shares its memory with others; in bytes."""

    offset: int
    strides: tuple[int, ...]
    itemsize: int


class Stored(NamedTuple):
    """A tensor of a checkpoint, by the name that it gets in a file."""

    name: str
    index: int
    """Of its leaf."""
    dtype: str
    shape: tuple[int, ...]
    view: View | None = None

    @property
    def nbytes(self) -> int:
        return prod(self.shape) * itemsize(self.dtype)

    @property
    def place(self) -> object:
        """Equal for those that are one tensor: tied weights."""
        return self[1:]


def below(tree: Node, name: str) -> Node | None:
    """The node at `name` ("model", "trainer/model") of a state; None if there is none."""
    node: Node = tree
    while name:
        for key, value in mapping_pairs(node) or []:
            if isinstance(key, str) and (name == key or name.startswith(f"{key}/")):
                node, name = _resolved(value, lambda: definitions(tree)), name[len(key) + 1 :]
                break
        else:
            return None
    return node


def _resolved(node: Node, named: Callable[[], Mapping[int, Node]]) -> Node:
    """`node`, or what it refers to: what was saved twice is stored once."""
    if isinstance(node, dict) and cast(dict[str, Any], node).get("!") == "ref":
        return named().get(cast(dict[str, Any], node).get("v", -1), node)
    return node


def every_tensor(manifest: Manifest) -> list[Stored]:
    """Each tensor and array of the state, once, by the path of its leaf; one that shares
    memory with others by its own."""
    indexes = [i for i in tensor_indexes(manifest.tree) if 0 <= i < len(manifest.leaves)]
    views: dict[int, list[Stored]] = {}
    known: set[object] = set()
    for path, node in _tagged(manifest.tree, ""):
        if node.get("!") in _VIEWED and "strides" in node:
            one = stored(manifest, node, path)
            if one.place not in known:
                known.add(one.place)
                views.setdefault(one.index, []).append(one)
    found: list[Stored] = []
    for index in indexes:
        leaf = manifest.leaves[index]
        found += views.get(index) or [Stored(leaf.path, index, *check_leaf(leaf))]
    return found


def tensor_indexes(tree: Node) -> list[int]:
    """The leaves of a tree that are neither texts nor files, each once, in its order."""
    # Checked for depth, and for nodes that are none.
    every = list(dict.fromkeys(leaf_indexes(tree)))
    others: set[int] = set()
    waiting: list[Node] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, dict):
            tagged = cast(dict[str, Node], node)
            if tagged.get("!") in _NO_TENSORS and isinstance(tagged.get("leaf"), int):
                others.add(tagged["leaf"])
            waiting.extend(tagged.values())
        elif isinstance(node, list):
            waiting.extend(cast(list[Node], node))
    return [index for index in every if index not in others]


def tensors_of(manifest: Manifest, node: Node) -> tuple[dict[str, Stored], list[str]]:
    """The tensors of a state_dict, by their names there; names of what else is in it.

    A dict in it is joined with a point, as modules name their parts.
    """
    found: dict[str, Stored] = {}
    others: list[str] = []
    named = cache(lambda: definitions(manifest.tree))
    again = 0

    def walk(node: Node, prefix: str, depth: int, referred: bool) -> None:
        nonlocal again
        for key, value in mapping_pairs(node) or []:
            again += referred
            # References can lead in a circle, or to the same things over and over.
            if depth > MAX_DEPTH or again > _MOST_AGAIN:
                raise malformed(prefix[:200], "it holds itself, or too much")
            name = f"{prefix}{key if isinstance(key, str) else repr(key)}"
            target = _resolved(value, named)
            inner, value = referred or target is not value, target
            if mapping_pairs(value) is not None:
                walk(value, f"{name}.", depth + 1, inner)
            elif _is_tensor(value):
                if name in found:
                    raise malformed(name, "two tensors have this name")
                found[name] = stored(manifest, cast(dict[str, Node], value), name)
            else:
                others.append(name)

    walk(node, "", 0, False)
    return found, others


def _is_tensor(node: Node) -> bool:
    tagged = cast(dict[str, Any], node) if isinstance(node, dict) else {}
    return tagged.get("!") in ("torch.tensor", "array", "jax.array") and "leaf" in tagged


def stored(manifest: Manifest, node: dict[str, Node], name: str) -> Stored:
    """What a tensor's node says, checked. Raises DamagedObject for what no save wrote."""
    index = node.get("leaf")
    if type(index) is not int or not 0 <= index < len(manifest.leaves):
        raise malformed(name, "it names no leaf")
    dtype, shape = check_leaf(manifest.leaves[index])
    if "strides" not in node:
        return Stored(name, index, dtype, shape)
    if dtype != "U8" or len(shape) != 1:
        raise malformed(name, "its leaf is not plain bytes")
    if node.get("!") == "array":
        kind = arrays.parse_dtype(node.get("dtype"), name)
        named, width = arrays.stored_dtype(kind), kind.itemsize
    else:
        text = str(node.get("dtype"))
        named = NAMED.get(text)
        width = itemsize(named) if named else _WIDE.get(text, 1)
    sizes, strides, offset = checked_view(node, width, shape[0], name)
    view = View(offset, strides, width)
    # As a leaf of its own would be: its items as bytes, where they have no name.
    return Stored(name, index, named or "U8", sizes if named else (*sizes, width), view)


def _tagged(node: Node, path: str) -> Iterator[tuple[str, dict[str, Any]]]:
    """Every node with a leaf, with its path as a save names it."""
    if isinstance(node, list):
        items = cast(list[Node], node)
        marked = bool(items) and isinstance(items[0], dict) and items[0].get("!") == "id"
        for number, item in enumerate(items[1:] if marked else items):
            yield from _tagged(item, f"{path}/{number}".lstrip("/"))
        return
    if not isinstance(node, dict):
        return
    tagged = cast(dict[str, Any], node)
    if "leaf" in tagged:
        yield path, tagged
    if (pairs := mapping_pairs(node)) is not None and tagged.get("!") != "ref":
        for key, value in pairs:
            name = key if isinstance(key, str) else repr(key)
            yield from _tagged(value, f"{path}/{name}".lstrip("/"))
        return
    for value in tagged.values():
        yield from _tagged(value, path)


# -- files --------------------------------------------------------------------


def shards(tensors: Sequence[Stored], most_bytes: int) -> list[list[Stored]]:
    """`tensors` in files of at most `most_bytes`, in their order; a longer one has its own."""
    found: list[list[Stored]] = []
    room = 0
    for one in tensors:
        if not found or one.nbytes > room:
            found.append([])
            room = most_bytes
        found[-1].append(one)
        room -= one.nbytes
    return found or [[]]


def shard_names(stem: str, count: int) -> list[str]:
    """
    >>> shard_names("model", 1), shard_names("model", 2)[1]
    (['model.safetensors'], 'model-00002-of-00002.safetensors')
    """
    if count == 1:
        return [f"{stem}.safetensors"]
    return [f"{stem}-{n:05}-of-{count:05}.safetensors" for n in range(1, count + 1)]


def index_name(stem: str) -> str:
    return f"{stem}.safetensors.index.json"


def names_of(stem: str, count: int) -> list[str]:
    """All files of `count` shards."""
    return [*shard_names(stem, count), *([index_name(stem)] if count > 1 else [])]


def check_no_others(folder: Path, names: Sequence[str]) -> None:
    """Raise UsageError if `folder` has weights that these files would not replace: a program
    could load those in their stead."""
    if not folder.is_dir():
        return
    for path in sorted(folder.iterdir()):
        if _WEIGHTS.fullmatch(path.name) and path.name not in names:
            raise UsageError(
                f"{printable(str(path))} would stay there, and could be loaded in place of what is "
                "written",
                hint="Remove it, or name a new folder.",
            )


def write_shards(
    repo: Repo,
    record: Record,
    manifest: Manifest,
    parts: Sequence[Sequence[Stored]],
    folder: Path,
    stem: str,
    metadata: Mapping[str, str] = {},
) -> list[Path]:
    """Write one file for each of `parts`, and an index if there are several; their paths."""
    written: list[Path] = []
    places: dict[str, str] = {}
    for name, part in zip(shard_names(stem, len(parts)), parts, strict=True):
        written.append(folder / name)
        write_tensors(repo, record, manifest, part, folder / name, metadata)
        places |= {one.name: name for one in part}
    if len(parts) > 1:
        nbytes = sum(one.nbytes for part in parts for one in part)
        index = {"metadata": {"total_size": nbytes}, "weight_map": dict(sorted(places.items()))}
        written.append(folder / index_name(stem))
        write_bytes(written[-1], msgspec.json.format(msgspec.json.encode(index), indent=2))
    return written


def write_bytes(path: Path, data: bytes) -> None:
    """A new file, synced."""
    with open(path, "xb") as out:
        out.write(data)
        out.flush()
        os.fsync(out.fileno())


def sync_file(path: Path) -> None:
    with open(path, "rb") as written:
        os.fsync(written.fileno())


def write_tensors(
    repo: Repo,
    record: Record,
    manifest: Manifest,
    tensors: Sequence[Stored],
    path: Path,
    metadata: Mapping[str, str] = {},
) -> None:
    """Write one file and sync it. Raises DamagedObject, StateError for two of one name."""
    header, offsets = pack_header(
        [PackChunk(one.name, one.dtype, one.shape, one.nbytes) for one in tensors], metadata
    )
    reader = ChunkReader(repo, record, manifest)
    wanted: list[Wanted] = []
    views: dict[int, list[tuple[Stored, int]]] = {}
    with open(path, "xb") as out:
        out.write(header)
        out.flush()
        for one, offset in zip(tensors, offsets, strict=True):
            if one.view is None:
                leaf = manifest.leaves[one.index]
                wanted += _wanted(leaf, FileDestination(out.fileno(), offset, *_kind(leaf)))
            else:
                views.setdefault(one.index, []).append((one, offset))
        reader.read(wanted)
        for index, members in views.items():
            _write_views(reader, manifest.leaves[index], members, out.fileno(), path)
        out.truncate(offsets[-1] + tensors[-1].nbytes if tensors else len(header))
        os.fsync(out.fileno())


def _kind(leaf: Leaf) -> tuple[str, tuple[int, ...]]:
    return leaf.dtype, leaf.shape


def _wanted(leaf: Leaf, place: FileDestination) -> list[Wanted]:
    return [Wanted(leaf, chunk, place.write) for chunk in leaf.chunks]


def _write_views(
    reader: ChunkReader, leaf: Leaf, members: Sequence[tuple[Stored, int]], fd: int, path: Path
) -> None:
    """The bytes that they share are brought into a file of their own first: on disk, where
    there is room for what is written anyway."""
    with open(path.with_name(f"{path.name}.shared"), "x+b") as shared:
        os.unlink(shared.name)
        shared.truncate(leaf_nbytes(leaf))
        reader.read(_wanted(leaf, FileDestination(shared.fileno(), 0, *_kind(leaf))))
        if not leaf_nbytes(leaf):
            return
        memory = np.memmap(shared, np.uint8, "r")
        for one, offset in members:
            assert one.view is not None
            start, strides, width = one.view
            shape = one.shape if len(one.shape) == len(strides) else one.shape[:-1]
            # Any dtype of this size: a copy keeps the bits.
            view = np.ndarray(shape, f"V{width}", memory, start, strides)
            for piece in _pieces(view):
                data = memoryview(piece).cast("B")
                while data:
                    done = os.pwrite(fd, data, offset)
                    data, offset = data[done:], offset + done


def _pieces(view: np.ndarray[Any, Any]) -> Iterator[bytes]:
    """The items of `view` in C order, a few at a time."""
    if view.nbytes <= _PIECE_BYTES:
        yield view.tobytes()
        return
    row = max(view.nbytes // len(view), 1)
    if row > _PIECE_BYTES:
        for part in view:
            yield from _pieces(part)
        return
    step = _PIECE_BYTES // row
    for start in range(0, len(view), step):
        yield view[start : start + step].tobytes()
